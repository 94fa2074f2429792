"""The four stages of `train.py`, in order, from pictures to a model. Each takes a run and writes its result into a folder of the run.

A result is reused if its recorded settings match, and refused if they do not. A killed stage resumes from its last trainer state.
A step is a pure function of (config, step), unless max_minutes shapes the schedule, so only the weights, the optimizer and the step
number are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokun.config import Config
from tokun.training.codes import encode_shards
from tokun.training.generator import train_generator
from tokun.training.image_tokenizer import train_image_tokenizer
from tokun.training.preferences import train_preferences
from tokun.training.run import Run
from tokun.training.text_only import train_words
from tokun.training.text_tokenizer import train_text_tokenizer
from tokun.utils.errors import UserError

STAGES = (train_text_tokenizer, train_image_tokenizer, encode_shards, train_generator)


def stages_of(config: Config) -> tuple[Callable[[Run], Path], ...]:
    """The stages of this config. Preferences and text-only training start from a whole model and are one stage each."""
    if config.dpo.pairs and config.words.train:
        raise UserError("dpo.pairs and words.train are both set: they are separate trainings; run one after the other")
    if config.dpo.pairs:
        return (train_preferences,)
    return (train_words,) if config.words.train else STAGES

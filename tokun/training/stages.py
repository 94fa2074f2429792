"""The stages of `train.py`, in order: four from pictures to a model. Each takes a run and leaves its result in a folder of it.

A result is reused when the record of its settings matches, and refused when it does not; a stage that was killed goes on from its last
trainer state. What a step computes is a pure function of (config, step), unless max_minutes shapes the schedule, so nothing but weights,
optimizer and the step number has to be saved.
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
from tokun.training.text_tokenizer import train_text_tokenizer
from tokun.training.words import train_words
from tokun.utils.errors import UserError

STAGES = (train_text_tokenizer, train_image_tokenizer, encode_shards, train_generator)


def stages_of(config: Config) -> tuple[Callable[[Run], Path], ...]:
    """Those of this config: learning from preferences and words alone go on from a whole model and are one stage each."""
    if config.dpo.pairs and config.words.train:
        raise UserError("dpo.pairs and words.train are both set: they are two trainings, one after the other")
    if config.dpo.pairs:
        return (train_preferences,)
    return (train_words,) if config.words.train else STAGES

"""The four stages of `train.py`, in order. Each takes a run and leaves its result in a folder of it.

A result is reused when the record of its settings matches, and refused when it does not; a stage that was killed goes on from its last
trainer state. What a step computes is a pure function of (config, step), unless max_minutes shapes the schedule, so nothing but weights,
optimizer and the step number has to be saved.
"""

from __future__ import annotations

from tokun.training.codes import encode_shards
from tokun.training.generator import train_generator
from tokun.training.image_tokenizer import train_image_tokenizer
from tokun.training.text_tokenizer import train_text_tokenizer

STAGES = (train_text_tokenizer, train_image_tokenizer, encode_shards, train_generator)

"""Shards in, batches out. Knows tar files, pictures, captions and the order of samples; knows no model.

    tars      offsets of the files in a tar, quickly     shards    the index of a shard's samples; writing shards
    sample_order   which sample comes when               prefetching    batches prepared ahead in a thread
    image_files    bytes -> an upright picture           image_dataset  image shards -> batches of crops
    cropping       a picture -> the grid nearest to it    captions  are they good enough to train on?
    colour         is a picture in colour?
    codes     samples of code shards                     tokens    code shards -> batches of packed sequences

`data.X` finds what these modules define. Each is imported on first use, so that reading tars needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "shards": ("CODES_SUFFIX", "IMAGE_SUFFIXES", "ShardIndex", "expand_shards", "write_shard"),
    "sample_order": ("BucketOrder", "Order", "check_batch", "positions_of", "rng_for"),
    "prefetching": ("prefetch",),
    "image_dataset": (
        "ONE_SQUARE", "Box", "ImageBatches", "ImageSamples", "centre_box", "centre_crops", "crop", "decode_image", "first_frames",
        "to_float",
    ),
    "codes": ("CodeSamples", "Record", "read_codes"),
    "tokens": ("PackedRow", "TokenBatch", "TokenBatches", "check_task_mix", "collate"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"tokun.data.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'tokun.data' has no attribute {name!r}")

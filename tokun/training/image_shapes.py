"""Shapes of pictures in the stages: opening them, recording them, and describing them in log lines."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from tokun import config as configs
from tokun import data
from tokun.config import Config
from tokun.data import cropping

ENOUGH = 64  # pictures, to judge a tokenizer by


def held_out_pictures(config: Config, n: int = 256) -> list[Tensor]:
    """Framed held-out pictures, (k, C, H, W) for each grid; without held-out shards, training pictures."""
    return _pictures(config, config.data.val or config.data.train, n)


def unseen_pictures(config: Config) -> list[Tensor]:
    """The same for a tokenizer that was trained elsewhere: few held-out pictures are joined by training pictures, up to ENOUGH."""
    found = held_out_pictures(config)
    held_out = sum(map(len, found))
    return found + (_pictures(config, config.data.train, ENOUGH - held_out) if config.data.val and held_out < ENOUGH else [])


def _pictures(config: Config, pattern: str, n: int) -> list[Tensor]:
    m = config.image_tokenizer
    samples = data.ImageSamples.open(pattern, image_size=m.image_size, channels=m.image_channels, **shape_options(config))
    return data.first_frames(samples, n)


def shape_options(config: Config) -> dict[str, Any]:
    """The options of `data.ImageSamples` for the shapes of pictures."""
    return {"grids": configs.parse_grids(config.data.grids), "downsample": config.image_tokenizer.downsample, "fit": config.data.fit}


def shape_settings(config: Config) -> dict[str, Any]:
    """The shapes of pictures in a stage's record: empty if all are squares, as in older records."""
    return {"grids": config.data.grids, "fit": config.data.fit} if config.data.grids else {}


def shapes_line(samples: data.ImageSamples) -> str:
    counts = Counter(samples.shapes.tolist())
    return "image tokenizer: pictures by grid: " + ", ".join(
        f"{cropping.grid_text(grid)} {counts[number]}" for number, grid in enumerate(samples.grids)
    )


def sizes_line(config: Config) -> str:
    """The sizes of the pictures, height x width unless they are squares."""
    f = config.image_tokenizer.downsample
    return (
        ", ".join(f"{rows * f}x{columns * f}" for rows, columns in configs.parse_grids(config.data.grids)) + " px"
        if config.data.grids
        else f"{config.image_tokenizer.image_size} px"
    )

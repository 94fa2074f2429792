"""Rewards for drawings: how much of a picture survives as SVG within a byte limit, and how short it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tokun.render import svg
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

if TYPE_CHECKING:
    from tokun.config import RewardConfig
    from tokun.inference.model import Pair, Tokun

SIDE = 64  # px of the longer side at which drawings and pictures are compared
FINENESS = svg.DETAILS[3]  # of `shortness`


def likeness_within(asked: RewardConfig, model: Tokun | None = None) -> Callable[[Sequence[Pair]], list[float]]:
    """Likeness of each picture and its drawing of at most `max_bytes` bytes."""
    if asked.max_bytes < svg.LEAST_BYTES:
        raise UserError(f"max_bytes is {asked.max_bytes}; a picture takes at least {svg.LEAST_BYTES} bytes")
    svg.renderer()
    return lambda pairs: [likeness(pair.image, svg.rendered(svg.to_svg(pair.image, asked.max_bytes))) for pair in pairs]


def shortness(asked: RewardConfig, model: Tokun | None = None) -> Callable[[Sequence[Pair]], list[float]]:
    """Negative kilobytes of each picture exported at a fixed fineness; the finest that fits a limit would always fill it. A blank page is
    the shortest: combine it with a likeness."""
    need("vtracer", extra="svg")

    def size(image: Image.Image) -> int:
        return len(svg.traced(svg.flat(image), *image.size, *FINENESS)) or svg.LEAST_BYTES

    return lambda pairs: [-size(pair.image) / 1000 for pair in pairs]


def likeness(one: Image.Image, other: Image.Image) -> float:
    """The correlation of two pictures' grey levels at SIDE px, -1 to 1; 0 if one of them is flat, so that a blank page gains nothing."""
    scale = SIDE / max(one.size)
    width, height = (max(1, round(side * scale)) for side in one.size)
    a, b = (np.asarray(image.convert("L").resize((width, height), Image.Resampling.BOX), np.float64) for image in (one, other))
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / length) if length > 1e-6 * a.size else 0.0

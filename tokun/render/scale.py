"""Larger pictures: with repeated pixels, smoothly enlarged, or drawn again from a traced drawing. Knows pictures, no models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from tokun.render import svg
from tokun.render.grids import LARGE, captioned_grid
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

METHODS = ("nearest", "lanczos", "svg")
LARGEST = 32  # largest scale; 128 px become 4096
FINE: tuple[int, int, int] = (12, 512, 3)  # as `svg.DETAILS`, for a drawing without a limit of bytes
CUT = (176, 32, 24)
PAGE = 8192  # px: about the greatest width of a grid, whose pictures are reduced if there are many


@dataclass(frozen=True)
class Enlarge:
    """`scaled` by a fixed scale and method. Raises UserError as `require` does."""

    scale: int = 1
    by: str = "lanczos"

    def __post_init__(self) -> None:
        require(self.scale, self.by)

    def __call__(self, image: Image.Image) -> Image.Image:
        return scaled(image, self.scale, self.by)

    def record(self) -> dict[str, Any]:
        """Its fields in samples.jsonl: none for pictures of their own size."""
        return {"scale": self.scale, "scale_by": self.by} if self.scale != 1 else {}


def scaled(image: Image.Image, scale: int, by: str = "lanczos") -> Image.Image:
    """The picture with `scale` times its width and height. `by`, one of METHODS:

    nearest   each pixel becomes a square
    lanczos   smooth; mode kept
    svg       traced in twelve tones, and drawn again at that size: sharp edges, flat tones; 'L' stays 'L'. Needs the extra `svg`

    Raises UserError for another method, or a scale that is not from 1 to LARGEST.
    """
    require(scale, by)
    if scale == 1:
        return image
    width, height = image.width * scale, image.height * scale
    if by == "svg":
        fine = svg.traced(svg.flat(image), *image.size, *FINE)
        drawn = svg.rendered(fine or svg.to_svg(image), side=max(width, height))
        drawn = drawn if drawn.size == (width, height) else drawn.resize((width, height), Image.Resampling.LANCZOS)
        return drawn.convert(image.mode) if image.mode in ("1", "L") else drawn
    return image.resize((width, height), Image.Resampling.NEAREST if by == "nearest" else Image.Resampling.LANCZOS)


def require(scale: int, by: str) -> None:
    """Raise UserError as `scaled` does, ImportError if a package is missing."""
    if by not in METHODS:
        raise UserError(f"pictures are scaled by {by!r}; it must be one of {', '.join(METHODS)}")
    if isinstance(scale, bool) or not isinstance(scale, int) or not 1 <= scale <= LARGEST:
        raise UserError(f"scale is {scale!r}; it must be a whole number from 1 to {LARGEST}")
    if by == "svg":
        need("vtracer", extra="svg")
        svg.renderer()


def grid(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """`grids.captioned_grid` of enlarged pictures: those above its usual cell keep their size, unless the page would be wider than PAGE."""
    side, columns = max(max(image.size) for image in images), math.ceil(math.sqrt(len(images)))
    return captioned_grid(images, captions, cell=max(LARGE, min(side, PAGE // columns)) if side > LARGE else None)


def with_cut(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The picture with the border of the part in `box` (left, top, right, bottom, in shares of it) marked: 'RGB', enlarged until a line one
    pixel wide is thin. A border at the picture's own edge is left out."""
    large = scaled(image, max(1, math.ceil(LARGE / max(image.size)))).convert("RGB")
    (width, height), draw, line = large.size, ImageDraw.Draw(large), max(2, round(max(large.size) / 200))
    left, top, right, bottom = (round(share * side) for share, side in zip(box, (width, height) * 2))
    dash = 6 * line
    for x in {left, right} - {0, width}:
        for y in range(top, bottom, dash):
            _dash(draw, (x, y, x, min(y + dash, bottom)), line, y // dash)
    for y in {top, bottom} - {0, height}:
        for x in range(left, right, dash):
            _dash(draw, (x, y, min(x + dash, right), y), line, x // dash)
    return large


def _dash(draw: ImageDraw.ImageDraw, ends: tuple[int, int, int, int], line: int, number: int) -> None:
    """One dash, red or white by turns, so that the line is visible on light and dark pictures."""
    draw.line(ends, fill=CUT if number % 2 == 0 else "white", width=line)


NOT = Enlarge()

"""Larger pictures: each pixel repeated, smoothly enlarged, or drawn again from its traced drawing. Knows pictures, no models."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from tokun.render import svg
from tokun.render.grids import captioned_grid
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

METHODS = ("nearest", "lanczos", "svg")
LARGEST = 32  # times; 128 px become 4096
PAGE = 8192  # px: about the width of a grid of pictures, whose pictures are reduced if there are many


def scaled(image: Image.Image, scale: int, by: str = "lanczos") -> Image.Image:
    """The picture with `scale` times its width and height. `by`, one of METHODS:

    nearest   each pixel becomes a square
    lanczos   smooth; mode kept
    svg       traced as finely as `svg.DETAILS` has it, and drawn again at that size: sharp edges, flat tones; 'L' stays 'L'. Needs the extra `svg`

    Raises UserError for another method, or a scale that is not from 1 to LARGEST.
    """
    require(scale, by)
    if scale == 1:
        return image
    width, height = image.width * scale, image.height * scale
    if by == "svg":
        fine = svg.traced(svg.flat(image), *image.size, *svg.DETAILS[0])
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


def grid(images: Sequence[Image.Image], captions: Sequence[str], scale: int = 1) -> Image.Image:
    """`grids.captioned_grid` of pictures that have been enlarged by `scale`, each at its own size unless the page would get much wider than PAGE."""
    if scale == 1:
        return captioned_grid(images, captions)
    side, columns = max(max(image.size) for image in images), max(1, round(len(images) ** 0.5))
    return captioned_grid(images, captions, cell=min(side, max(1, PAGE // columns)))

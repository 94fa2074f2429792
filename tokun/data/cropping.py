"""How a picture is fitted to a grid of codes: all cropping and padding happens here. Knows PIL and numpy; no torch, no model.
image_files.py opens pictures.

A grid is (rows, columns) of codes; at `downsample` pixels a code it needs a picture of rows * downsample by columns * downsample pixels.
A box is (left, top, width, height) in pixels of the picture. It has the grid's aspect; where it extends beyond the picture, paper fills it.
A negative width means that the crop is mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokun.utils.errors import UserError

Grid = tuple[int, int]  # rows, columns of codes
Box = tuple[float, float, float, float]  # left, top, width, height
FITS = ("auto", "pad", "crop")
MOST_CUT = 0.25  # share of a picture that "auto" cuts off at most; it pads if more would be lost
LEAST_CUT = 0.02  # "auto" crops if less is lost: it goes unnoticed, and nothing needs filling
MOST_ENLARGED = 2.0  # limit of enlarging a padded picture: a small one stays small on its paper
EDGE = 0.03  # width of the strips that the background is measured on, as a share of the short side
PAPER_SHARE, PAPER_RANGE = 0.75, 32  # background is paper if this share of its pixels is within this range (grey levels) of their median
WHITE = 235  # grey level from which paper is filled with white


# --- grids ----------------------------------------------------------------------------------------------------------


def alike(grids: Sequence[Hashable], most: int) -> Iterator[tuple[Any, list[int]]]:
    """(grid, indices of at most `most` pictures that have it), for each grid, or grid and length, in the order in which they come."""
    for grid in dict.fromkeys(grids):
        own = [i for i, other in enumerate(grids) if other == grid]
        yield from ((grid, own[at : at + most]) for at in range(0, len(own), most))


def grid_text(grid: Grid) -> str:
    """(12, 21) -> '12x21'."""
    return f"{grid[0]}x{grid[1]}"


def nearest_grid(width: float, height: float, grids: Sequence[Grid]) -> int:
    """The index of the grid whose aspect is nearest to the picture's, by the log of their ratio. Ties go to the first."""
    aspect = math.log(width / height)
    return min(range(len(grids)), key=lambda k: abs(aspect - math.log(grids[k][1] / grids[k][0])))


# --- boxes ----------------------------------------------------------------------------------------------------------


class Framed(NamedTuple):
    """A picture and the box taken from it."""

    image: Image.Image
    grid: Grid
    box: Box  # the part that the grid shows
    padded: bool  # the whole picture is on paper; else it covers the grid
    paper: tuple[int, ...]  # one value per channel, fills the box beyond the picture


def crop_box(width: float, height: float, grid: Grid) -> Box:
    """The largest centred box of the grid's aspect inside a picture."""
    aspect = grid[1] / grid[0]
    w, h = (height * aspect, float(height)) if width > height * aspect else (float(width), width / aspect)
    return ((width - w) / 2, (height - h) / 2, w, h)


def pad_box(width: float, height: float, grid: Grid, downsample: int) -> Box:
    """The smallest box of the grid's aspect around a picture; larger if the picture would be enlarged more than MOST_ENLARGED times."""
    aspect = grid[1] / grid[0]
    h = max(height, width / aspect, grid[0] * downsample / MOST_ENLARGED)
    return ((width - h * aspect) / 2, (height - h) / 2, h * aspect, h)


def lost(width: float, height: float, box: Box) -> float:
    """Share of a picture that a box leaves out."""
    left, top, w, h = box
    inside = max(0.0, min(width, left + w) - max(0.0, left)) * max(0.0, min(height, top + h) - max(0.0, top))
    return 1 - inside / (width * height)


def ground(image: Image.Image, sides: str) -> tuple[tuple[int, ...], float]:
    """The median colour (per channel) along some sides ('lr', 'tb' or 'lrtb') of a picture, and the share of pixels near it."""
    pixels = np.asarray(image)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    n = max(1, round(EDGE * min(pixels.shape[:2])))
    strips = {"l": pixels[:, :n], "r": pixels[:, -n:], "t": pixels[:n], "b": pixels[-n:]}
    edge = np.concatenate([strips[side].reshape(-1, pixels.shape[2]) for side in sides])
    median = np.median(edge, axis=0)
    share = float((np.abs(edge - median).max(axis=1) <= PAPER_RANGE).mean())
    paper = (255,) * len(median) if median.min() >= WHITE else tuple(int(value) for value in median)
    return paper, share


def fit_to(image: Image.Image, grid: Grid, downsample: int, fit: str) -> Framed:
    """Which box of a picture a grid shows.

    crop: the picture covers the grid and the overhang is cut off, half on each side. pad: the whole picture is kept on paper, which has the
    colour of the picture's edges (white if they are nearly white). auto: pads if the edges next to the paper are blank background, as
    around a single thing, or if more than MOST_CUT would be cut off; crops otherwise.
    """
    width, height = image.size
    cropped, padded = crop_box(width, height, grid), pad_box(width, height, grid, downsample)
    sides = "tb" if cropped[2] < width else "lr"  # the sides where paper would be added
    cut = lost(width, height, cropped)
    if fit == "crop" or (fit == "auto" and cut <= LEAST_CUT):
        return Framed(image, grid, cropped, False, (255,) * len(image.getbands()))
    paper, share = ground(image, sides)
    pad = fit == "pad" or cut > MOST_CUT or share >= PAPER_SHARE
    return Framed(image, grid, padded if pad else cropped, pad, paper)


def reduced(framed: Framed, downsample: int, scale: float) -> Framed:
    """The same on a smaller copy of the picture, in which the box is `scale` times the grid's pixels. Never enlarges."""
    image, grid, height = framed.image, framed.grid, framed.box[3]
    target = round(grid[0] * downsample * scale)
    if height <= target:
        return framed
    size = max(1, round(image.width * target / height)), max(1, round(image.height * target / height))
    box = pad_box(*size, grid, downsample) if framed.padded else crop_box(*size, grid)
    return framed._replace(image=image.resize(size, Image.Resampling.LANCZOS), box=box)


def zoomed(frame: Box, scale: Sequence[float], rng: np.random.Generator, anywhere: tuple[int, int] | None = None) -> Box:
    """A box smaller than the frame by a factor s, uniform in `scale`, at a random place in the frame or, with `anywhere` (width, height),
    in the picture.

    Raises UserError for a scale that is not 1 <= low <= high.
    """
    low, high = scale
    if not 1 <= low <= high:
        raise UserError(f"crop_scale is [{low}, {high}]; it takes 1 <= low <= high, where 1 is the largest crop that fits")
    left, top, width, height = frame
    right, bottom = left + width, top + height
    if anywhere is not None:
        left, top, right, bottom = min(0.0, left), min(0.0, top), max(anywhere[0], right), max(anywhere[1], bottom)
    s = low + (high - low) * rng.random()
    width, height = width / s, height / s
    x, y = left + (right - left - width) * rng.random(), top + (bottom - top - height) * rng.random()
    return float(x), float(y), float(width), float(height)


def five_boxes(frame: Box, scale: float) -> list[Box]:
    """Boxes smaller than the frame by the factor `scale`, in its corners and its middle (LlamaGen's ten-crop, unmirrored)."""
    left, top, width, height = frame
    w, h = width / scale, height / scale
    return [(left + x * (width - w), top + y * (height - h), w, h) for x, y in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))]


def views(
    frame: Box, count: int, scale: Sequence[float], rng: np.random.Generator, anywhere: tuple[int, int] | None = None,
    *, positions: str = "random", mirror: bool = False,
) -> list[Box]:  # fmt: skip
    """View 0: the frame. The others, smaller by `scale`: at random places (see `zoomed`), or at five fixed ones.
    With `mirror`, about half of them are mirrored."""
    boxes = [frame]
    if positions == "five":
        boxes += [box for end in sorted(set(scale), reverse=True) if end > 1 for box in five_boxes(frame, end)]
        boxes = boxes[:count]
    else:
        boxes += [zoomed(frame, scale, rng, anywhere) for _ in range(count - 1)]
    return boxes[:1] + [(left, top, -w if mirror and rng.random() < 0.5 else w, h) for left, top, w, h in boxes[1:]]


# --- pixels ---------------------------------------------------------------------------------------------------------


def cut(image: Image.Image, box: Box, size: tuple[int, int], paper: tuple[int, ...] = ()) -> np.ndarray:
    """Crop a box and resize it to (width, height): uint8 (C, height, width).
    Beyond the picture it is filled with `paper`, by default white."""
    left, top, width, height = box[0], box[1], abs(box[2]), box[3]
    inner = (max(0.0, left), max(0.0, top), min(float(image.width), left + width), min(float(image.height), top + height))
    x, y = size[0] / width, size[1] / height  # pixels of the result per pixel of the picture
    x0, x1 = max(0, min(round(-left * x), size[0] - 1)), min(size[0], round((image.width - left) * x))
    y0, y1 = max(0, min(round(-top * y), size[1] - 1)), min(size[1], round((image.height - top) * y))
    if (x0, y0, x1, y1) == (0, 0, *size):
        out = image.resize(size, Image.Resampling.LANCZOS, box=inner)
    else:
        fill = paper or (255,) * len(image.getbands())
        out = Image.new(image.mode, size, fill[0] if len(fill) == 1 else fill)
        if inner[0] < inner[2] and inner[1] < inner[3]:
            covered = max(1, x1 - x0), max(1, y1 - y0)
            out.paste(image.resize(covered, Image.Resampling.LANCZOS, box=inner), (x0, y0))
    array = np.asarray(out, np.uint8)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array if box[2] > 0 else array[:, :, ::-1]


def usual_fit(grids: Sequence[Grid]) -> str:
    """The fit where no record gives one: "crop" for a single square grid, as all models of square pictures were trained; "auto"
    otherwise."""
    return "crop" if len(grids) == 1 and grids[0][0] == grids[0][1] else "auto"


def frame(image: Image.Image, grid: Grid, downsample: int, fit: str = "auto") -> tuple[np.ndarray, Box]:
    """A picture ('L' or 'RGB') fitted to a grid:
    uint8 (C, rows * downsample, columns * downsample), and the box that was used (`fit_to`)."""
    if fit not in FITS:
        raise UserError(f"fit is {fit!r}; it must be one of {', '.join(FITS)}")
    framed = fit_to(image, grid, downsample, fit)
    return cut(image, framed.box, (grid[1] * downsample, grid[0] * downsample), framed.paper), framed.box


@dataclass(frozen=True)
class Ready:
    """Pictures of one grid, ready to be encoded together."""

    grid: Grid
    places: list[int]  # of each picture in the given list
    pixels: np.ndarray  # uint8 (n, C, rows * downsample, columns * downsample)
    boxes: list[Box]


def encode_ready(
    images: Sequence[Image.Image], grids: Sequence[Grid], *, downsample: int, fit: str = "", grid: Grid | None = None
) -> Iterator[Ready]:
    """Pictures of any shapes (all 'L' or all 'RGB') -> one group per grid in use, in the order of `grids`.

    Each picture goes to the grid nearest to its shape, or all go to `grid`. `fit` is the one used in training; default `usual_fit`. To
    encode:

        codes: list = [None] * len(images)
        for group in cropping.encode_ready(images, vocabulary.grids, downsample=config.downsample):
            found = tokenizer.encode(data.to_float(group.pixels).to(device), rows=rows).cpu()
            for place, own in zip(group.places, found):
                codes[place] = (group.grid, own)
    """
    fit = fit or usual_fit(grids)
    chosen = [grids.index(grid) if grid is not None else nearest_grid(*image.size, grids) for image in images]
    for number in sorted(set(chosen)):
        places = [place for place, own in enumerate(chosen) if own == number]
        made = [frame(images[place], grids[number], downsample, fit) for place in places]
        yield Ready(grids[number], places, np.stack([pixels for pixels, _ in made]), [box for _, box in made])

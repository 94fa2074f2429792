"""SVG: a picture as a small vector drawing that is valid, safe and within a byte limit. Knows pictures, no models.

    to_svg(image, max_bytes=10_000)  ->  text

The picture is split into layers of tone, each traced by vtracer and drawn over the lighter ones, at the finest of `DETAILS`
that fits. If none fits, or vtracer is not installed, it is a mosaic of rectangles as fine as the limit allows.
Only svg, rect and path elements with numbers and colours are written: no text, links, styles, scripts or references.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

LEAST_BYTES = 400
FEW_CELLS = 16  # pixels: a picture of at most this size is not traced; its pixels are drawn as cells
LARGEST_SCALE = 4  # most that a picture is enlarged for tracing
LONGEST = 4096  # pixels of a side; larger pictures are scaled down first
# layers, long side of the traced picture in pixels, smallest spot in pixels
DETAILS = ((7, 320, 2), (6, 288, 3), (5, 256, 4), (4, 224, 4), (4, 192, 6), (3, 160, 6), (3, 128, 8), (2, 96, 8), (2, 64, 10), (1, 64, 16))


def to_svg(image: Image.Image, max_bytes: int = 10_000) -> str:
    """A picture of any mode -> an SVG document of at most `max_bytes` bytes. Raises UserError for a limit below LEAST_BYTES."""
    if max_bytes < LEAST_BYTES:
        raise UserError(f"max_bytes is {max_bytes}; a picture takes at least {LEAST_BYTES} bytes")
    width, height = image.size
    pixels = flat(image)
    traceable = max(image.size) > FEW_CELLS and importlib.util.find_spec("vtracer") is not None
    fitting = finest_traced(pixels, width, height, max_bytes) if traceable else ""
    return fitting or next(svg for svg in mosaics(pixels, width, height) if len(svg) <= max_bytes)


def flat(image: Image.Image) -> Image.Image:
    """Any mode -> 'RGB' on white, no side above LONGEST."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    image = image.copy()
    image.thumbnail((LONGEST, LONGEST))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def document(width: int, height: int, box: tuple[int, int], ground: np.ndarray, body: str) -> str:
    shape = f'width="{width}" height="{height}" viewBox="0 0 {box[0]} {box[1]}" preserveAspectRatio="none"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {shape}>'
    return f'{head}<rect width="{box[0]}" height="{box[1]}" fill="{colour(ground)}"/>{body}</svg>'


def colour(rgb: np.ndarray) -> str:
    red, green, blue = (int(value) for value in np.clip(np.rint(rgb), 0, 255))
    return f"#{red:02x}{green:02x}{blue:02x}"


def rendered(text: str, side: int = 0) -> Image.Image:
    """An SVG document as 'RGB' on white, by resvg; `side`: px of its longer side (0: its own size)."""
    made = Image.open(io.BytesIO(bytes(renderer().svg_to_bytes(svg_string=text, skip_system_fonts=True))))
    if side and max(made.size) != side:
        zoom = side / max(made.size)
        made = Image.open(io.BytesIO(bytes(renderer().svg_to_bytes(svg_string=text, skip_system_fonts=True, zoom=zoom))))
    page = Image.new("RGBA", made.size, "white")
    return Image.alpha_composite(page, made.convert("RGBA")).convert("RGB")


def renderer() -> Any:
    """Raises ImportError if resvg is missing."""
    return need("resvg_py", extra="svg")


# --- traced -----------------------------------------------------------------------------------------------------------


def finest_traced(pixels: Image.Image, width: int, height: int, max_bytes: int) -> str:
    """The traced picture at the finest of DETAILS that fits, by binary search (coarser ones are shorter); "" if none fits."""
    found, first, last = "", 0, len(DETAILS)
    while first < last:
        middle = (first + last) // 2
        svg = traced(pixels, width, height, *DETAILS[middle])
        if 0 < len(svg) <= max_bytes:
            found, last = svg, middle
        else:
            first = middle + 1
    return found


def traced(pixels: Image.Image, width: int, height: int, layers: int, long_side: int, spot: int) -> str:
    """The document, or "" if no outline is left although the picture is not flat."""
    scale = min(long_side / max(width, height), LARGEST_SCALE)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    rgb_HW3 = np.asarray(pixels.resize(size, Image.Resampling.LANCZOS), np.float64)
    tone_HW = rgb_HW3 @ (0.299, 0.587, 0.114)
    limits = between_tones(tone_HW, layers + 1)
    ground = rgb_HW3[tone_HW >= limits[0]].mean(0) if len(limits) else rgb_HW3.mean((0, 1))
    body = "".join(layer(rgb_HW3, tone_HW, limits, place, spot) for place in range(len(limits)))
    return document(width, height, size, ground, body) if body or not len(limits) else ""


def between_tones(tone_HW: np.ndarray, count: int) -> np.ndarray:
    """Thresholds, from light to dark, between at most `count` representative tones (k-means on the histogram)."""
    tones = np.arange(256)
    weights = np.bincount(np.clip(tone_HW.round().astype(int), 0, 255).ravel(), minlength=256)
    lightest, darkest = np.flatnonzero(weights)[[0, -1]]
    centres = np.linspace(lightest, darkest, count)
    for _ in range(12):
        nearest = np.abs(tones[:, None] - centres).argmin(1)
        sums, sizes = (np.bincount(nearest, part, len(centres)) for part in (weights * tones, weights))
        centres = sums[sizes > 0] / sizes[sizes > 0]
    limits = (centres[1:] + centres[:-1]) / 2
    return limits[(limits > tone_HW.min()) & (limits <= tone_HW.max())][::-1]


def layer(rgb_HW3: np.ndarray, tone_HW: np.ndarray, limits: np.ndarray, place: int, spot: int) -> str:
    """The area darker than a threshold, in the mean colour of the part that the next layer leaves visible."""
    inside_HW = tone_HW < limits[place]
    shown_HW = inside_HW & (tone_HW >= limits[place + 1]) if place + 1 < len(limits) else inside_HW
    outline = trace(inside_HW, spot)
    return f'<path fill="{colour(rgb_HW3[shown_HW if shown_HW.any() else inside_HW].mean(0))}" d="{outline}"/>' if outline else ""


def trace(inside_HW: np.ndarray, spot: int) -> str:
    """The outlines of a mask as path data in whole numbers."""
    import vtracer

    buffer = io.BytesIO()
    Image.fromarray(np.where(inside_HW, 0, 255).astype(np.uint8)).convert("RGB").save(buffer, "PNG", compress_level=0)
    made = vtracer.convert_raw_image_to_svg(
        buffer.getvalue(), img_format="png", colormode="binary", mode="spline", filter_speckle=spot, path_precision=0
    )
    paths = re.findall(r'<path d="([MLCZ0-9 ,.-]+)"[^>]*transform="translate\((-?[\d.]+),(-?[\d.]+)\)"', made)
    return "".join(relative(data, round(float(x)), round(float(y))) for data, x, y in paths)


def relative(data: str, x: int, y: int) -> str:
    """Path data of M, L, C and Z -> the same moved by (x, y), in relative coordinates, which are shorter."""
    out, at, start = [], (0, 0), (0, 0)
    for command, numbers in re.findall(r"([MLCZ])([^MLCZ]*)", data):
        values = [round(float(number)) for number in re.findall(r"-?[\d.]+", numbers)]
        points = list(zip(values[::2], values[1::2]))
        if command == "M":
            start = points[0]
            out.append(f"M{joined([start[0] + x, start[1] + y])}")
            at = start
        elif command == "Z":
            out.append("z")
            at = start
        else:
            size = 3 if command == "C" else 1
            for first in range(0, len(points), size):
                part = points[first : first + size]
                out.append(command.lower() + joined([value - base for point in part for value, base in zip(point, at)]))
                at = part[-1]
    return "".join(out)


def joined(numbers: list[int]) -> str:
    return "".join(f"{' ' if place and number >= 0 else ''}{number}" for place, number in enumerate(numbers))


# --- mosaics ----------------------------------------------------------------------------------------------------------


def mosaics(pixels: Image.Image, width: int, height: int) -> Iterator[str]:
    """Mosaics of rectangles, 16 tones per colour channel, from 64 cells on the long side down to one."""
    for long_side in (64, 48, 36, 28, 22, 17, 13, 10, 8, 6, 4, 3, 2, 1):
        scale = long_side / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        cells_HW3 = np.asarray(pixels.resize(size, Image.Resampling.BOX))
        cells_HW3 = np.rint(np.rint(cells_HW3 / 17.0) * 17).astype(np.uint8)
        yield document(width, height, size, np.median(cells_HW3.reshape(-1, 3), 0), runs(cells_HW3))


def runs(cells_HW3: np.ndarray) -> str:
    """One path per colour, with a bar for each run of equal cells in a row."""
    bars: dict[int, list[str]] = {}
    tones_HW = (cells_HW3.astype(np.int64) @ (2**16, 2**8, 1)).tolist()
    for y, (row, tones) in enumerate(zip(cells_HW3, tones_HW)):
        ends = [0, *(np.flatnonzero((row[1:] != row[:-1]).any(1)) + 1).tolist(), len(row)]
        for left, right in pairwise(ends):
            bars.setdefault(tones[left], []).append(f"M{left} {y}h{right - left}v1h-{right - left}z")
    return "".join(f'<path fill="#{fill:06x}" d="{"".join(parts)}"/>' for fill, parts in bars.items())

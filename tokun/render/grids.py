"""Pages of pictures: captioned grids and reconstruction sheets.

Pillow and numpy only. Knows pictures and words, never models.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokun.utils.errors import UserError

PAPER, INK, FRAME = (255, 255, 255), (38, 34, 30), (214, 210, 204)
FONTS = ("DejaVuSerif.ttf", "DejaVuSans.ttf")  # wide glyph coverage; without them, the face embedded in Pillow
SMALL = 192  # px; pictures with a shorter longer side are enlarged
LARGE = 512  # px; pictures with a longer longer side are reduced, unless `cell` is larger
ALIKE = 1.5  # ratio of largest to smallest area up to which pictures share one scale, as those of one model do
MAX_LINES = 4
WHOLE = 1000  # lines: more than any caption has
ELLIPSIS = "…"


def to_pil(image) -> Image.Image:
    """A float picture in [-1, 1], torch tensor or numpy array, (H, W), (1, H, W) or (3, H, W) -> 'L' or 'RGB'.

    Values beyond [-1, 1], as decoders may produce, are clipped. Raises UserError for another shape, integer pixels, NaN
    or infinity.
    """
    if hasattr(image, "detach"):  # a torch tensor, recognised without importing torch; numpy has no bfloat16
        image = image.detach().float().cpu().numpy() if image.is_floating_point() else image.detach().cpu().numpy()
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise UserError(f"a picture has shape (H, W), (1, H, W) or (3, H, W), not {tuple(np.shape(image))}")
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UserError(f"a picture is floats in [-1, 1], not {pixels.dtype}: divide 0..255 by 127.5 and subtract 1")
    if not np.isfinite(pixels).all():
        raise UserError(f"{int((~np.isfinite(pixels)).sum())} of {pixels.size} values are NaN or infinite")
    bytes_CHW = np.rint((pixels.astype(np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return as_picture(bytes_CHW)


def as_picture(array: np.ndarray) -> Image.Image:
    """uint8 (C, H, W) -> 'L' or 'RGB'."""
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def save_page(page: Image.Image, target: Path | BinaryIO) -> None:
    """Write a page as PNG at zlib's level 3: in a third of the time of the usual 6, and about as small."""
    page.save(target, "PNG", compress_level=3)


def captioned_grid(
    images: Sequence[Image.Image], captions: Sequence[str | Sequence[str]], *, columns: int | None = None, cell: int | None = None,
    font_size: int | None = None,
) -> Image.Image:  # fmt: skip
    """A white page of pictures in reading order, each with its caption beneath it -> 'RGB'.

    `cell` is the side in px of the square that the largest picture is fitted into. By default pictures keep their size, except that those
    under 192 px are enlarged by a whole factor and those over 512 px reduced. Pictures of different shapes are centred in cells
    of one size, at one scale if their areas are similar, otherwise each as large as fits. By default, `columns` makes the page nearly
    square with few empty cells. A caption is wrapped to its cell and ends in an ellipsis after four lines; a list of captions
    is set one below the other, left-aligned and in full.
    Raises UserError for no pictures, or if the numbers of pictures and captions differ.
    """
    if not images:
        raise UserError("a grid needs at least one picture")
    if len(images) != len(captions):
        raise UserError(f"{len(images)} pictures but {len(captions)} captions: give each picture one, '' for none")
    columns, cell = _checked("columns", columns, _columns_for(len(images))), _checked("cell", cell, _cell_for(images))
    font = _font(_checked("font_size", font_size, max(12, round(cell / 16))))
    pictures = _fitted_alike(images, cell)
    several = [not isinstance(caption, str) for caption in captions]
    texts = [
        _wrap(c, font, cell) if isinstance(c, str) else [line for one in c for line in _wrap(one, font, cell, WHOLE)] for c in captions
    ]

    margin, gap, padding, line = cell // 8, cell // 10, max(4, cell // 24), _line_height(font)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    tallest = max(picture.height for picture in pictures)
    text_heights = [max(len(texts[k]) for k in row) * line for row in rows]
    columns = min(columns, len(images))
    width = 2 * margin + columns * cell + (columns - 1) * gap
    height = 2 * margin + len(rows) * tallest + sum(text_heights) + len(rows) * padding + (len(rows) - 1) * gap
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    top = margin
    for row, text_height in zip(rows, text_heights):
        for column, k in enumerate(row):
            left = margin + column * (cell + gap)
            _paste(page, pictures[k], left + (cell - pictures[k].width) // 2, top + (tallest - pictures[k].height) // 2)
            for number, text in enumerate(texts[k]):
                x = left + (0 if several[k] else max(0, (cell - font.getlength(text)) / 2))
                draw.text((x, top + tallest + padding + number * line), text, fill=INK, font=font)
        top += tallest + padding + text_height + gap
    return page


def pair_sheet(rows: Sequence[tuple[Image.Image, ...]], labels: Sequence[str] | None = None, *, cell: int | None = None) -> Image.Image:
    """A white page of rows of related pictures side by side, such as (original, reconstruction) -> 'RGB'.

    Every row has as many pictures as the first. `labels`, one per column of a row, are set above the first line of
    the page. Many rows are set in several blocks, to keep the page nearly square. Raises UserError for no rows,
    rows of different lengths, or if the numbers of labels and columns differ.
    """
    if not rows or not rows[0]:
        raise UserError("a sheet needs at least one row of at least one picture")
    places = len(rows[0])
    if any(len(row) != places for row in rows):
        raise UserError(f"rows of {sorted({len(row) for row in rows})} pictures: give each row the same number")
    if labels is not None and len(labels) != places:
        raise UserError(f"{len(labels)} labels for rows of {places} pictures: give one for each picture of a row")
    cell = _checked("cell", cell, _cell_for([image for row in rows for image in row]))
    font = _font(max(12, round(cell / 16)))
    fitted = iter(_fitted_alike([image for row in rows for image in row], cell))
    pictures = [[next(fitted) for _ in row] for row in rows]

    margin, gap, seam = cell // 8, cell // 10, max(2, cell // 64)
    blocks = max(1, min(len(rows), round(math.sqrt(len(rows) / places))))  # rows side by side on the page
    block_width = places * cell + (places - 1) * seam
    lines = [range(start, min(start + blocks, len(rows))) for start in range(0, len(rows), blocks)]
    heights = [max(picture.height for k in line for picture in pictures[k]) for line in lines]
    header = _line_height(font) + max(4, cell // 24) if labels is not None else 0
    size = 2 * margin + blocks * block_width + (blocks - 1) * gap, 2 * margin + header + sum(heights) + (len(lines) - 1) * gap
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for block in range(blocks if labels is not None else 0):
        for place, label in enumerate(labels or ()):
            left = margin + block * (block_width + gap) + place * (cell + seam)
            text = (_wrap(label, font, cell, max_lines=1) or [""])[0]
            draw.text((left + (cell - font.getlength(text)) / 2, margin), text, fill=INK, font=font)
    top = margin + header
    for line, height in zip(lines, heights):
        for block, k in enumerate(line):
            for place, picture in enumerate(pictures[k]):
                left = margin + block * (block_width + gap) + place * (cell + seam)
                _paste(page, picture, left + (cell - picture.width) // 2, top + (height - picture.height) // 2)
        top += height + gap
    return page


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one mode side by side, without a gap. Pictures of several shapes are centred in white cells."""
    images = on_one_size(images)
    width, height = images[0].size
    page = Image.new(images[0].mode, (width * len(images), height))
    for place, image in enumerate(images):
        page.paste(image, (place * width, 0))
    return page


def on_one_size(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of several shapes, each centred on a white page large enough for all; pictures of one shape are unchanged."""
    size = max(image.width for image in images), max(image.height for image in images)
    out = []
    for image in images:
        page = image
        if image.size != size:
            page = Image.new(image.mode, size, "white")
            page.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        out.append(page)
    return out


def gif(images: Sequence[Image.Image]) -> bytes:
    """An animation that loops forwards and backwards. Pictures under 128 px are enlarged; different shapes are padded with white."""
    images = on_one_size(images)
    width, height = images[0].size
    large = [image.resize((4 * width, 4 * height), Image.Resampling.NEAREST) if width < 128 else image for image in images]
    buffer = io.BytesIO()
    large[0].save(buffer, "GIF", save_all=True, append_images=[*large[1:], *large[-2:0:-1]], duration=150, loop=0)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- pictures


def _checked(name: str, value: int | None, default: int) -> int:
    """`value`, or `default` if it is None. Raises UserError unless it is a positive whole number."""
    if value is None:
        return default
    if int(value) != value or value < 1:
        raise UserError(f"{name}={value!r}: give a whole number of at least 1, or leave it out")
    return int(value)


def _columns_for(count: int) -> int:
    """The number of columns, from the square root up to a third more, that leaves the fewest cells empty."""
    side = math.ceil(math.sqrt(count))
    return min(range(side, side + max(1, side // 3) + 1), key=lambda columns: (-count % columns, columns))


def _cell_for(images: Sequence[Image.Image]) -> int:
    side = max(max(image.size) for image in images)
    return min(LARGE, side * math.ceil(SMALL / side))


def _fitted_alike(images: Sequence[Image.Image], cell: int) -> list[Image.Image]:
    """Pictures in RGB on white, no side above `cell` px: all at one scale if their areas are similar, else each as large as fits."""
    areas = [image.width * image.height for image in images]
    longest = max(max(image.size) for image in images)
    alike = max(areas) <= ALIKE * min(areas)
    return [_fitted(image, max(1, round(cell * max(image.size) / longest)) if alike else cell) for image in images]


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """The picture in RGB on white, its longer side `cell` px."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image.convert("RGBA"))
    image = image.convert("RGB")
    scale = cell / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    size = (width, height)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _paste(page: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    """Paste the picture with a hairline around it: much of an engraving is as white as the page."""
    page.paste(picture, (left, top))
    outline = (left - 1, top - 1, left + picture.width, top + picture.height)
    ImageDraw.Draw(page).rectangle(outline, outline=FRAME)


# ---------------------------------------------------------------------------------------------------- words


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The first of FONTS that this machine has, else Pillow's own: always the same font on one machine."""
    for name in FONTS:
        try:  # basic layout: the other engine is an optional library and would set the same words differently
            return ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
        except OSError:
            continue
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)
    return own


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(sum(font.getmetrics()) * 1.12)


def _printable(text: str) -> str:
    """One line without control characters; a lone surrogate, which fonts and encoders reject, becomes U+FFFD."""
    kinds = ((character, unicodedata.category(character)) for character in " ".join(text.split()))
    return "".join("\ufffd" if kind == "Cs" else character for character, kind in kinds if kind != "Cc")


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """Lines of at most `width` px, broken between words; a word wider than a line is broken inside."""
    limit = (max_lines + 1) * width  # more characters cannot fit: a glyph takes at least a pixel
    words = _printable(text[:limit]).split(" ")
    lines, line = [], ""
    while words and len(lines) <= max_lines:
        word = words.pop(0)
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
        elif line:
            lines.append(line)
            line = ""
            words.insert(0, word)
        else:
            head = _fitting(word, font, width)
            lines.append(word[:head])
            words[:0] = [word[head:]] if word[head:] else []
    if line:
        lines.append(line)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    if font.getlength(last + ELLIPSIS) > width:
        last = last[: _fitting(last, font, width - font.getlength(ELLIPSIS))]
    return [*lines[: max_lines - 1], last.rstrip(" ,.;:—-") + ELLIPSIS]


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many leading characters of `text` fit in `width` px; at least one, so that wrapping advances."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low

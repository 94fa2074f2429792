"""From a user's picture to codes: open it, fit it to a grid as in training, encode it."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from tokun import data
from tokun.data import cropping, image_files
from tokun.render.grids import as_picture
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Tokun

Picture = Image.Image | str | Path | bytes
MAX_BYTES = 50_000_000  # of a picture file; more if the pixel limit is raised
CPU_ROWS = 16  # always computed together, so that a picture's codes do not depend on the batch


class TooLarge(UserError):
    """A picture with more pixels than the limit."""


TIFF_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F")


def open_picture(source: Picture, channels: int) -> Image.Image:
    """A file, its bytes or a PIL picture -> 'L' or 'RGB', upright (`image_files.decode`).

    Raises FileNotFoundError, or UserError with the reason.
    """
    name = "the picture"
    if isinstance(source, Image.Image):
        require_size(source, name)
        source = as_tiff(source)
    if not isinstance(source, bytes):
        if not isinstance(source, (str, os.PathLike)):
            raise UserError(f"{type(source).__name__} is not a picture: give a file's path, its bytes or a PIL picture")
        path = Path(source).expanduser()
        name = str(path)
        if not path.is_file():
            raise FileNotFoundError(f"{name!r} is not a file: name a picture")
        if path.stat().st_size > (most := max(MAX_BYTES, image_files.max_pixels() // 2)):
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, more than the limit of {most:,}: "
                f"scale it down, or raise the limit with {HIGHER}"
            )
        source = path.read_bytes()
    try:
        return image_files.decode_as(source, channels)
    except image_files.PictureError as error:
        if str(error) == image_files.TOO_MANY:
            raise TooLarge(
                f"{name} has more than {image_files.max_pixels():,} pixels: scale it down, or raise the limit with {HIGHER}. "
                "For a file that is very small for its number of pixels the limit is a tenth of that"
            ) from error
        reason = "unknown format, or empty" if str(error) in ("empty file", "not a picture that can be read") else error
        raise UserError(f"{name} is not a picture that can be read: {reason}") from error


def as_tiff(picture: Image.Image) -> bytes:
    """A PIL picture as a TIFF file, upright and with its colour profile, so that all modes, including CMYK and 16 bits, are read alike."""
    buffer = io.BytesIO()
    try:
        profile = picture.info.get("icc_profile")
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):  # either byte order
            upright = Image.fromarray(np.asarray(upright).astype(np.uint16))
        elif upright.has_transparency_data:
            upright = upright.convert("RGBA")
        elif upright.mode not in TIFF_MODES:
            upright = upright.convert("RGB")
        upright.save(buffer, "TIFF", icc_profile=profile)
    except (OSError, ValueError, SystemError) as error:  # for example without pixels
        raise UserError(
            f"a picture of mode {picture.mode!r} and {picture.width} x {picture.height} pixels is not supported ({error}): "
            "convert it to 'RGB' first"
        ) from error
    return buffer.getvalue()


def require_size(image: Image.Image, name: str) -> None:
    """Raise TooLarge for a picture with more pixels than the limit, before decoding."""
    (width, height), most = image.size, image_files.max_pixels()
    if width * height > most:
        raise TooLarge(f"{name} has {width} x {height} pixels, more than {most:,}: scale it down, or raise the limit with {HIGHER}")


HIGHER = f"--max-megapixels N, or {image_files.LIMIT}=N in the environment"


@dataclass(frozen=True)
class Seen:
    """A picture as the model sees it."""

    codes: list[int]  # 0..K-1, raster order
    grid: cropping.Grid
    box: cropping.Box  # the part that the grid shows, in pixels of the picture
    size: tuple[int, int]  # width and height of the picture


def see(model: Tokun, pictures: Sequence[Picture], grid: cropping.Grid | None = None) -> list[Seen]:
    """Pictures of any shapes, each fitted as in training to the grid nearest to its own shape, or all to `grid`, and encoded."""
    config = model.image_tokenizer.config
    opened = [open_picture(picture, config.image_channels) for picture in pictures]
    rows, found = CPU_ROWS if model.device.type == "cpu" else 0, {}
    for group in cropping.encode_ready(opened, model.grids, downsample=config.downsample, fit=model.fit, grid=grid):
        codes = model.image_tokenizer.encode(data.to_float(group.pixels).to(model.device), rows=rows).tolist()
        found |= {place: Seen(own, group.grid, box, opened[place].size) for place, own, box in zip(group.places, codes, group.boxes)}
    return [found[place] for place in range(len(opened))]


def encode_whole(model: Tokun, picture: Picture) -> tuple[list[int], cropping.Grid]:
    """Codes of a picture, and the model's grid with the shape nearest to its own."""
    (seen,) = see(model, [picture])
    return seen.codes, seen.grid


def framed(model: Tokun, picture: Picture, largest: int = 1) -> Image.Image:
    """What the model sees of a picture -> 'L' or 'RGB', with up to `largest` times the pixels of its grid's pictures,
    if the picture has as many."""
    downsample = model.image_tokenizer.config.downsample
    image = open_picture(picture, model.image_tokenizer.config.image_channels)
    rows, columns = model.grids[cropping.nearest_grid(*image.size, model.grids)]
    found = cropping.fit_to(image, (rows, columns), downsample, model.fit)
    scale = min(largest, max(1, round(found.box[3] / (rows * downsample))))
    return as_picture(cropping.cut(image, found.box, (columns * downsample * scale, rows * downsample * scale), found.paper))

"""Opening pictures: the bytes of one file -> an upright picture in 8-bit sRGB, or the reason why not. Bytes become pixels here alone.

Any file of any folder gives either a picture or a PictureError. Knows Pillow; knows no folders, no shards, no model,
and runs without torch. Pillow reads AVIF since 11.3; HEIC needs pillow-heif (the extra `heif`).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageFile, ImageOps

from tokun.data.image_completeness import has_all_tiles, is_covered, jpeg_is_whole, png_chunks, png_is_whole, strips
from tokun.utils.errors import BadSample, UserError

MAX_PIXELS = 100_000_000  # default limit for one picture: 300 MB as RGB
LIMIT = "TOKUN_MAX_MEGAPIXELS"  # environment variable that overrides it, in millions
MAX_PIXELS_PER_BYTE = 2000  # of the file, above MAX_PIXELS / 10: more is an empty page or a decompression bomb
MAX_SLOW_BYTES = 4_000_000  # file size where Pillow decodes in plain Python, half a second per million bytes


class PictureError(BadSample):
    """Why a picture cannot be used, worded as in the manifest."""


# Formats of picture collections that Pillow reads without starting another program, as it does for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "MPO", "JPEG2000", "AVIF", "HEIF", "PPM")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
NO_HEIC = "HEIC cannot be read here: pip install pillow-heif (the extra 'heif'), or save it as JPEG"
NO_AVIF = "AVIF cannot be read here: pip install 'Pillow>=11.3', or save it as JPEG"
SLOW_DECODERS = ("ppm", "ppm_plain", "bmp_rle")  # Pillow's names
TOO_MANY = "too many pixels"
LFS_POINTER = "a pointer of Git LFS, not the picture: run git lfs pull"
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257  # tags of TIFF
ORIENTATION, TURNED = 0x112, (5, 6, 7, 8)  # EXIF tag, and its values that swap width and height
BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 258, 262, 322, 323, 339  # tags of TIFF
COMPRESSION, SUBFILE_TYPE = 259, 254
MOST_THUMBNAILS = 8  # pages of a TIFF that are looked at for a whole one
MAX_SAMPLE_VALUE, WHITE_LEVEL = 281, 50717
SCALED_BITS = 14  # data of more bits in 16 are not nearly black
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13
# What Pillow's decoders raise on hostile bytes. There is no common base class: each plugin parses its format in plain Python.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError, MemoryError,
    AssertionError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def max_pixels(megapixels: float | None = None) -> int:
    """How many pixels a picture may have: `megapixels`, else TOKUN_MAX_MEGAPIXELS, else MAX_PIXELS.
    Raises UserError for an invalid number."""
    given = os.environ.get(LIMIT, "") if megapixels is None else megapixels
    if given == "":
        return MAX_PIXELS
    try:
        pixels = round(float(given) * 1_000_000)
    except (ValueError, OverflowError):
        pixels = 0
    if pixels < 1:
        raise UserError(
            f"{LIMIT if megapixels is None else '--max-megapixels'} is {given!r}; "
            "it must be a number of million pixels above 0, such as 400"
        )
    return pixels


def decode(data: bytes, *, most: int | None = None, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Encoded bytes -> an upright picture in 8-bit sRGB, mode "RGB", or "L" where the file is grayscale.

    Takes the first frame of an animation, puts transparency on white, scales 16 bits instead of clipping them, applies the colour
    profile if it can, drops metadata. `most` is how many pixels it may have (None: `max_pixels()`), `formats` the accepted
    subset of FORMATS. Raises PictureError with the reason.
    """
    return decode_reduced(data, most=most, formats=formats)[0]


def decode_as(data: bytes, channels: int, *, most: int | None = None, formats: Sequence[str] = FORMATS) -> Image.Image:
    """As `decode`, in mode "L" for one channel and "RGB" for three."""
    image, mode = decode(data, most=most, formats=formats), "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def open_own_png(path: Path) -> Image.Image:
    """A PNG that tokun wrote, with the pixels as they are stored. Pictures from elsewhere need the checks of `decode`.

    Raises OSError if it is missing or damaged.
    """
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
    return image


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) that `decode` would give, from the header alone. Raises PictureError if the header cannot be read."""
    with quiet():
        image = read_header(data)
        size = image.size
        with contextlib.suppress(*DECODE_ERRORS):
            if image.getexif().get(ORIENTATION) in TURNED and not is_turned(image):
                size = (size[1], size[0])
    return size


def is_turned(image: Image.Image) -> bool:
    """Whether Pillow has swapped a TIFF's width and height by its orientation already."""
    tags = getattr(image, "tag_v2", {})
    return image.size != (tags.get(IMAGE_WIDTH, image.width), tags.get(IMAGE_LENGTH, image.height))


def decode_reduced(
    data: bytes, short_side: int = 0, *, most: int | None = None, formats: Sequence[str] = FORMATS
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, and the (width, height) of the full picture. With `short_side`, a large JPEG is decoded at a half, a quarter or
    an eighth of its size, which is faster, as long as its short side stays at least that long."""
    with quiet():
        image = read_header(data, most=most, formats=formats)
        whole = image.size
        scaled = math.ceil(whole[0] * short_side / min(whole)), math.ceil(whole[1] * short_side / min(whole))
        if short_side and image.format == "JPEG":
            image.draft(None, scaled)
        wide = image.tile[0] if image.mode in ("RGB", "RGBA") and image.tile else None
        read_pixels(image, data, scaled if short_side else None)
        try:
            if wide is not None:
                rescale_low_bits(image, data, raw_mode_of(wide))
            if image.format == "PNG":
                convert_transparent_colour(image, depth=data[24])
            with contextlib.suppress(*DECODE_ERRORS):  # broken EXIF: leave it as stored
                ImageOps.exif_transpose(image, in_place=True)
            image = to_srgb(image, data)
        except DECODE_ERRORS as error:
            raise PictureError(f"colours cannot be read (mode {image.mode})") from error
    image.info.clear()
    turned = (image.width > image.height) != (whole[0] > whole[1])  # by its EXIF
    return image, (whole[1], whole[0]) if turned else whole


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings about broken metadata and large pictures: both are handled here.

    All threads share one list of filters, so only the main thread restores it; others leave behind a filter for Pillow's warnings alone.
    """
    if threading.current_thread() is threading.main_thread():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    else:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def know_formats() -> None:
    """Register the formats that Pillow can read here, and HEIC if pillow-heif is installed."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()


def unread_kind(data: bytes) -> str:
    """Why a HEIC or AVIF file cannot be read here; "" if it can, and for other formats."""
    if data[4:8] != b"ftyp":
        return ""
    kinds = {data[at : at + 4] for at in range(8, min(len(data), int.from_bytes(data[:4], "big"), 256), 4)}
    if kinds & {b"avif", b"avis"}:
        return "" if "AVIF" in Image.OPEN else NO_AVIF
    return NO_HEIC if kinds & {*HEIC_BRANDS} and "HEIF" not in Image.OPEN else ""


def read_header(data: bytes, *, most: int | None = None, formats: Sequence[str] = FORMATS) -> ImageFile.ImageFile:
    """Open a picture: format, size and metadata, no pixels yet."""
    if not data:
        raise PictureError("empty file")
    if data.startswith(b"version https://git-lfs"):
        raise PictureError(LFS_POINTER)
    most = max_pixels() if most is None else most
    know_formats()
    if Image.MAX_IMAGE_PIXELS is not None and most > 2 * Image.MAX_IMAGE_PIXELS:  # above Pillow's own limit it raises
        Image.MAX_IMAGE_PIXELS = most
    if why_not := unread_kind(data):
        raise PictureError(why_not)
    if data[:4] == b"RIFF" and data[12:16] == b"VP8X":  # Pillow before 13 reports too large a canvas as no picture
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        if width * height > most:
            raise PictureError(TOO_MANY)
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in formats if name in Image.OPEN])
        pass_thumbnails(image)
        bomb, slow = is_bomb(image, data, most), any(tile[0] in SLOW_DECODERS for tile in image.tile)
    except Image.DecompressionBombError as error:
        raise PictureError(TOO_MANY) from error
    except DECODE_ERRORS as error:
        raise PictureError("not a picture that can be read") from error
    if bomb:
        raise PictureError(TOO_MANY)
    if image.format == "TIFF" and is_misread(image):
        raise PictureError(f"colours cannot be read by Pillow {PIL.__version__} (13 can)")
    if slow and (len(data) > MAX_SLOW_BYTES or data.count(b"#") > 1000):  # the cost of comments is quadratic in their number
        raise PictureError("file too large")
    return image


def pass_thumbnails(image: ImageFile.ImageFile) -> None:
    """Go to the first whole page of a TIFF that begins with reduced ones, as scanners write them; else stay at the first."""
    try:
        for page in range(1, MOST_THUMBNAILS + 2):
            if not int(getattr(image, "tag_v2", {}).get(SUBFILE_TYPE, 0)) & 1:
                return
            image.seek(page)
    except DECODE_ERRORS:
        pass  # no further page, or one that is damaged, as tags may be: the first is the picture
    image.seek(0)


def is_misread(image: Image.Image) -> bool:
    """Whether Pillow misreads the colours: before 13 it takes a TIFF's luma and chroma for RGB, except in JPEG compression."""
    tags = getattr(image, "tag_v2", {})
    return not PILLOW_13 and tags.get(PHOTOMETRIC) == 6 and tags.get(COMPRESSION, 1) != 7


def is_bomb(image: Image.Image, data: bytes, most: int) -> bool:
    """Would the pixels take far more memory or time than the file is worth?"""
    pixels = image.width * image.height
    tags = getattr(image, "tag_v2", {})  # a TIFF's tiles may be larger than the picture
    scans = 1
    # each scan visits every pixel; its header alone takes ten bytes
    if image.format in ("JPEG", "MPO") and len(data) // 10 * pixels > 20 * most:
        scans = data.count(b"\xff\xda")
    return (
        pixels > most
        or pixels > max(most // 10, MAX_PIXELS_PER_BYTE * len(data))
        or tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0) > most
        or scans * pixels > 20 * most
    )


def read_pixels(image: ImageFile.ImageFile, data: bytes, scaled: tuple[int, int] | None) -> None:
    """Decode in place. Most decoders leave missing pixels black or gray, so completeness is checked separately."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "broken files would pass as half black pictures"
    try:
        whole = is_covered(image) and (image.format != "JPEG2000" or has_all_tiles(data))
        if whole:
            image.load()
        if image.format in ("JPEG", "MPO"):
            whole = whole and jpeg_is_whole(image, data, scaled)
        elif image.format == "PNG":
            whole = whole and png_is_whole(image, data)
        elif image.format in ("WEBP", "AVIF"):
            whole = whole and any(data[-64:])  # these formats have no checksums; zeros are a download that never filled its file
    except DECODE_ERRORS as error:
        raise PictureError("truncated or damaged") from error
    if not whole:
        raise PictureError("truncated or damaged")


def to_srgb(image: Image.Image, data: bytes) -> Image.Image:
    """Any mode -> "L" or "RGB", 8 bits, sRGB, on white."""
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):  # 16 or 32 bits; convert("L") would clip at 255
        image = to_8_bits(image, data)
    gray = image.mode in ("1", "L", "LA", "La") or (image.mode == "P" and has_gray_palette(image))
    mode = "L" if gray else "RGB"
    if image.has_transparency_data:
        image = on_white(image, mode)
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert(mode)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = through_profiles(image, lab, srgb)
    elif profile:
        image = apply_profile(image, profile)
    return image if image.mode == mode else image.convert(mode)


def on_white(image: Image.Image, mode: str) -> Image.Image:
    """Any mode with transparency -> `mode`."""
    result = Image.new(mode, image.size)
    for box in strips(image):
        strip = image.crop(box)
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        white.alpha_composite(strip)
        result.paste(white.convert(mode), box)
    return result


def has_gray_palette(image: Image.Image) -> bool:
    if image.palette is None:
        raise BadSample("a palette picture without its palette, which would come out black")
    palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def white_of(largest: float, image: Image.Image, data: bytes) -> int:
    """The number that is white in 16-bit data whose largest is `largest`: 65535, or less where a camera or scanner stored 9 to 14 bits in
    16.

    The file says how many bits it has (sBIT of PNG; MaxSampleValue or WhiteLevel of TIFF); else they are as many as the largest number has.
    So a picture with a tone above a quarter of 65535 stays as it is, as does a black page (nothing above 255) and one that is declared to
    have 16 bits.
    """
    if image.format == "PNG":
        declared = max(next(png_chunks(data, b"sBIT"), b"")[8:-4][:3], default=0)
    else:
        tags, declared = getattr(image, "tag_v2", {}), 0
        level = tags.get(MAX_SAMPLE_VALUE) or tags.get(WHITE_LEVEL) or 0
        with contextlib.suppress(ValueError, TypeError, ArithmeticError):  # text, or a fraction of nothing
            declared = int(max(level) if isinstance(level, tuple) else level).bit_length()
    if declared > SCALED_BITS:
        declared = 16
    bits = declared or (int(largest).bit_length() if 255 < largest < 2**SCALED_BITS else 16)
    return 2**bits - 1 if largest < 2**bits else 2**16 - 1


def to_8_bits(image: Image.Image, data: bytes) -> Image.Image:
    """16 or 32-bit numbers -> "L". White is `white_of` 16 bits, 1.0 for floats, or the largest value if that is more."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    unsigned = image.mode == "I" and bits == 32 and tags.get(SAMPLE_FORMAT, (1,))[0] == 1

    def values(box: tuple[int, int, int, int]) -> np.ndarray:
        numbers = np.asarray(image.crop(box))
        return numbers.view(np.uint32) if unsigned else numbers

    white, largest = 1.0 if image.mode == "F" else 2.0 ** min(bits, 16) - 1, 0.0
    for box in strips(image):
        numbers = values(box)
        largest = max(largest, float(numbers.max(initial=0, where=np.isfinite(numbers))))
    white = max(white_of(largest, image, data) if white == 2**16 - 1 else white, largest)
    result = Image.new("L", image.size)
    for box in strips(image):
        numbers = np.nan_to_num(values(box).astype(np.float64), nan=0.0, posinf=white).clip(0, white)
        grays = np.round(numbers * (255.0 / white)).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == 0:  # WhiteIsZero
            grays = 255 - grays
        grays[numbers == image.info.get("transparency", -1)] = 255
        result.paste(Image.fromarray(grays), box)
    return result


OTHER_BYTE = {  # Pillow keeps one byte of each 16-bit colour; this maps to the mode that keeps the other. "N" is the machine's byte order
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}


def raw_mode_of(tile: Any) -> str:
    """The raw mode in which Pillow reads a piece of a file, such as "RGB;16B"."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def with_raw_mode(tile: Any, mode: str) -> Any:
    """The same piece of a file, to be read in another raw mode."""
    return (*tile[:3], (mode, *tile[3][1:]) if isinstance(tile[3], tuple) else mode)


def rescale_low_bits(image: Image.Image, data: bytes, raw_mode: str) -> None:
    """Rescale colours of fewer than 16 bits stored in 16, in place (`white_of`): Pillow keeps the upper 8 bits, of which they use a few."""
    other = OTHER_BYTE.get(raw_mode)
    if other is None or np.asarray(image.getextrema())[:3, 1].max() >= 1 << SCALED_BITS - 8:
        return
    if "transparency" in image.info:  # a transparent colour: not a camera's or scanner's file
        return
    low = Image.open(io.BytesIO(data), formats=[str(image.format)])
    low.seek(image.tell())
    low.tile = [with_raw_mode(tile, other) for tile in low.tile]
    low.load()

    def values(box: tuple[int, int, int, int]) -> np.ndarray:
        high, least = (np.asarray(part.crop(box)).astype(np.uint16) for part in (image, low))
        return (high << 8) | least

    boxes = list(strips(image))
    colour, opaque = (max(int(values(box)[..., bands].max(initial=0)) for box in boxes) for bands in (slice(3), slice(3, 4)))
    if (white := white_of(colour, image, data)) == 2**16 - 1:
        return
    for box in boxes:
        numbers = values(box)
        scaled = np.round(numbers.clip(0, white) * (255.0 / white)).astype(np.uint8)
        if opaque > white:  # the colours have fewer bits than the transparency
            scaled[..., 3:] = numbers[..., 3:] >> 8
        image.paste(Image.fromarray(scaled), box)


def convert_transparent_colour(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent colour to 8 bits: Pillow converts only the pixels. 16-bit gray is left alone."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and depth == 16 and key is not None:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode == "L" and depth < 8 and key is not None:
        image.info["transparency"] = key * 255 // (2**depth - 1)


def apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours from the embedded ICC profile to sRGB; unchanged if the profile does not fit or is broken."""
    kinds = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(given)
        header: Any = given.profile
        if header.xcolor_space.strip() != kinds[image.mode] or "sRGB" in name:
            return image
        return through_profiles(image, given, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, *DECODE_ERRORS):
        return image


def through_profiles(image: Image.Image, given: Any, wanted: Any) -> Image.Image:
    """The picture in mode "RGB", its colours those of another profile."""
    out = ImageCms.profileToProfile(image, given, wanted, outputMode="RGB")
    assert out is not None, "not in place"
    return out

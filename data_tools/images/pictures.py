"""Pictures: the bytes of one file -> an upright picture in 8-bit sRGB, or the reason why not; its hash; its new size.

Every file that a stranger's folder can hold ends here in a picture or in a PictureError. This file knows Pillow, and OpenCV for one filter. It knows
no folders, no captions and no shards, and runs without torch.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageFile, ImageOps

from tokun.utils.extras import need

MAX_PIXELS = 100_000_000  # of one picture: 300 MB as RGB
MAX_PIXELS_PER_BYTE = 2000  # of the file, for more than MAX_PIXELS / 10: an empty page, or a bomb
MAX_SLOW_BYTES = 4_000_000  # of a file whose pixels Pillow reads in plain Python, half a second for a million
MAX_ENLARGEMENT = 1.5
WEBP_LIMIT = 16383  # pixels on a side, a limit of the format
KINDS = {
    "webp": {"format": "WEBP", "quality": 80, "method": 1},  # a fifth larger than method 4, in less than half the time
    "jpg": {"format": "JPEG", "quality": 92},
    "png": {"format": "PNG", "optimize": True},
}

FILTERS = ("lanczos", "hamming", "area", "linear")
OF_OPENCV = ("area", "linear")
PILLOW_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "hamming": Image.Resampling.HAMMING}


class PictureError(ValueError):
    """Why a picture cannot be used, in the words that stand in the manifest."""


# Those that a picture collection holds and that Pillow reads by itself: EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "MPO", "JPEG2000", "AVIF", "PPM")
SLOW_DECODERS = ("ppm", "ppm_plain", "bmp_rle")  # Pillow's names
BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 258, 262, 322, 323, 339  # tags of TIFF
COMPRESSION = 259
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13
# What Pillow's decoders raise on hostile bytes. There is no common base: each plugin parses its format in plain Python.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError, MemoryError,
    AssertionError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> an upright picture in 8-bit sRGB, mode "RGB", or "L" where the file is grayscale.

    The first frame of an animation; transparency laid on white; 16-bit scaled, not cut; the colour profile applied
    where it can be; no metadata. Raises PictureError with the reason.
    """
    return decode_reduced(data)[0]


def decode_reduced(data: bytes, short_side: int = 0) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, and the (width, height) of the whole. With a `short_side`, a large JPEG is decoded at a half, a quarter or
    an eighth of its size, which is quicker, as long as its short side stays at least that long."""
    if not data:
        raise PictureError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken metadata, large pictures: both are dealt with here
        image = read_header(data)
        whole = image.size
        scaled = tuple(math.ceil(length * short_side / min(whole)) for length in whole)
        if short_side and image.format == "JPEG":
            image.draft(None, scaled)
        read_pixels(image, data, scaled if short_side else None)
        try:
            if image.format == "PNG":
                mend_transparent_colour(image, depth=data[24])
            with contextlib.suppress(*DECODE_ERRORS):  # broken EXIF: as it lies
                ImageOps.exif_transpose(image, in_place=True)
            image = to_srgb(image)
        except DECODE_ERRORS as error:
            raise PictureError(f"colours cannot be read (mode {image.mode})") from error
    image.info.clear()
    turned = (image.width > image.height) != (whole[0] > whole[1])  # by its EXIF
    return image, whole[::-1] if turned else whole


def read_header(data: bytes) -> Image.Image:
    """Format, size and metadata; no pixel yet."""
    Image.init()
    if data[:4] == b"RIFF" and data[12:16] == b"VP8X":  # Pillow before 13 calls a canvas that is too large no picture
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        if width * height > MAX_PIXELS:
            raise PictureError("too many pixels")
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
        bomb, slow = is_bomb(image, data), any(tile[0] in SLOW_DECODERS for tile in image.tile)
    except Image.DecompressionBombError as error:
        raise PictureError("too many pixels") from error
    except DECODE_ERRORS as error:
        raise PictureError("not a picture that can be read") from error
    if bomb:
        raise PictureError("too many pixels")
    if image.format == "TIFF" and is_misread(image):
        raise PictureError(f"colours cannot be read by Pillow {PIL.__version__} (13 can)")
    if slow and (len(data) > MAX_SLOW_BYTES or data.count(b"#") > 1000):  # comments cost the square of their number
        raise PictureError("file too large")
    return image


def is_misread(image: Image.Image) -> bool:
    """Pillow before 13 takes a TIFF's luma and chroma for red, green and blue; in JPEG compression its decoder converts them."""
    tags = getattr(image, "tag_v2", {})
    return not PILLOW_13 and tags.get(PHOTOMETRIC) == 6 and tags.get(COMPRESSION, 1) != 7


def is_bomb(image: Image.Image, data: bytes) -> bool:
    """Would the pixels take far more memory or time than the file is worth?"""
    pixels = image.width * image.height
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than the picture
    scans = 1
    if (
        image.format in ("JPEG", "MPO") and len(data) // 10 * pixels > 20 * MAX_PIXELS
    ):  # each visits every pixel; its head alone takes ten bytes
        scans = data.count(b"\xff\xda")
    return (
        pixels > MAX_PIXELS
        or pixels > max(MAX_PIXELS // 10, MAX_PIXELS_PER_BYTE * len(data))
        or tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0) > MAX_PIXELS
        or scans * pixels > 20 * MAX_PIXELS
    )


def read_pixels(image: Image.Image, data: bytes, scaled: tuple[int, ...] | None) -> None:
    """Decode in place. Whatever is missing stays black or gray with most decoders, so completeness is checked apart."""
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
            whole = whole and any(data[-64:])  # zeros: a download that never filled its file; without checksums
    except DECODE_ERRORS as error:
        raise PictureError("truncated or damaged") from error
    if not whole:
        raise PictureError("truncated or damaged")


def is_covered(image: Image.Image) -> bool:
    """Do the pieces that Pillow is about to decode fill the picture, once (or once for each channel)?"""
    pieces = [tile[1] for tile in image.tile]
    if image.format == "GIF" or not pieces:  # a frame may be smaller than its GIF; WebP makes its piece later
        return True
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in pieces)
    layers, rest = divmod(area, image.width * image.height)
    return rest == 0 and 1 <= layers <= 6


def has_all_tiles(data: bytes) -> bool:
    """Has a JPEG 2000 as many tiles as its header says? The decoder leaves those that are missing black."""
    start = data.find(b"\xff\x4f\xff\x51")
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", data, start + 8)
    return data.count(b"\xff\x90\0\n", start) >= math.ceil((right - left) / width) * math.ceil((bottom - top) / height)


def jpeg_is_whole(image: Image.Image, data: bytes, scaled: tuple[int, ...] | None) -> bool:
    """False for a scan that was cut and then closed: the decoder paints its rest gray, or leaves it coarse, silently.

    Bytes put between the scan and its end marker change nothing in a whole picture; in a cut one they are read as the next
    blocks. To read twice is dear, so only what looks suspicious is: the last pixel is middle gray, or the file is
    progressive.
    """
    start = scan_start(data)
    if data.rfind(b"\xff\xd9", start) < 0:  # from the end, where it mostly is
        return False
    corner = image.getpixel((image.width - 1, image.height - 1))
    if image.mode != "CMYK" and corner not in (128, (128, 128, 128)) and "progressive" not in image.info:
        return True
    end = data.find(b"\xff\xd9", start)
    if "progressive" in image.info and not is_refined(data[start:end], channels=len(image.getbands())):
        return False
    padded = Image.open(io.BytesIO(data[:end] + bytes(range(255)) * 4 + b"\xff\xd9"), formats=["JPEG"])
    if scaled is not None:
        padded.draft(None, scaled)
    return all(image.crop(box).tobytes() == padded.crop(box).tobytes() for box in strips(image))


def is_refined(scans: bytes, channels: int) -> bool:
    """Does a progressive JPEG hold, for each channel, the scan that ends its last frequency at the last bit?"""
    finished = set()
    for match in re.finditer(b"\xff\xda", scans):
        head = scans[match.end() :][:16]  # length, count, (channel, tables) each, first and last frequency, bits
        count = head[2]
        last, bit = head[4 + 2 * count], head[5 + 2 * count] & 15
        finished |= set(head[3 : 3 + 2 * count : 2]) if last == 63 and bit == 0 else set()
    return len(finished) == channels


def scan_start(data: bytes) -> int:
    """Where a JPEG's pixels begin: behind the segments before, of which one may hold a whole JPEG (a thumbnail)."""
    position = 2
    while position < len(data) - 4:
        marker = data[position + 1]
        if data[position] != 0xFF or marker in (0x00, 0xFF):  # filling bytes
            position += 1
        elif marker == 0xDA:
            break
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def png_is_whole(image: Image.Image, data: bytes) -> bool:
    """False for pixels of another checksum, which Pillow does not look at, or too few: their rows are black without a word."""
    parts = list(png_chunks(data, b"IDAT"))
    if any(zlib.crc32(part[4:-4]) != int.from_bytes(part[-4:], "big") for part in parts):
        return False
    if any(image.crop((0, image.height - 1, *image.size)).tobytes()) or "interlace" in image.info:
        return True
    depth, channels = data[24], {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[data[25]]
    missing = image.height * (1 + math.ceil(image.width * depth * channels / 8))
    rest, inflate = b"".join(part[8:-4] for part in parts), zlib.decompressobj()
    while rest and missing > 0:
        missing -= len(inflate.decompress(rest, 1 << 20))
        rest = inflate.unconsumed_tail
    return missing <= 0


def png_chunks(data: bytes, kind: bytes) -> Iterator[bytes]:
    """Each with its length, kind and checksum."""
    position = 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == kind:
            yield data[position : position + 12 + length]
        position += 12 + length


def strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that fill a picture from top to bottom, of some four million pixels each: copies of it stay small."""
    rows = max(1, 4_000_000 // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def to_srgb(image: Image.Image) -> Image.Image:
    """Any mode -> "L" or "RGB", 8 bits, sRGB, on white."""
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):  # 16 or 32 bits; convert("L") would cut at 255
        image = to_8_bits(image)
    gray = image.mode in ("1", "L", "LA", "La") or (image.mode == "P" and has_gray_palette(image))
    mode = "L" if gray else "RGB"
    if image.has_transparency_data:
        image = on_white(image, mode)
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert(mode)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
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
        raise ValueError("a picture of palette colours without a palette, which would come out black")
    palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def to_8_bits(image: Image.Image) -> Image.Image:
    """16 or 32-bit numbers -> "L". White is what the bits can hold, 1.0 for floats, or the largest value if that is more."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    unsigned = image.mode == "I" and bits == 32 and tags.get(SAMPLE_FORMAT, (1,))[0] == 1

    def values(box: tuple[int, int, int, int]) -> np.ndarray:
        numbers = np.asarray(image.crop(box))
        return numbers.view(np.uint32) if unsigned else numbers

    white = 1.0 if image.mode == "F" else 2.0 ** min(bits, 16) - 1
    for box in strips(image):
        numbers = values(box)
        white = max(white, float(numbers.max(initial=0, where=np.isfinite(numbers))))
    result = Image.new("L", image.size)
    for box in strips(image):
        numbers = np.nan_to_num(values(box).astype(np.float64), nan=0.0, posinf=white).clip(0, white)
        grays = np.round(numbers * (255.0 / white)).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == 0:  # white is zero
            grays = 255 - grays
        grays[numbers == image.info.get("transparency", -1)] = 255
        result.paste(Image.fromarray(grays), box)
    return result


def mend_transparent_colour(image: Image.Image, depth: int) -> None:
    """Pillow brings the pixels of a PNG to 8 bits, but not the colour that is to be transparent. 16-bit gray is left alone."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and depth == 16 and key is not None:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode == "L" and depth < 8 and key is not None:
        image.info["transparency"] = key * 255 // (2**depth - 1)


def apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours through the embedded ICC profile into sRGB; unchanged where the profile does not fit or is broken."""
    kinds = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(given)
        if given.profile.xcolor_space.strip() != kinds[image.mode] or "sRGB" in name:
            return image
        return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *DECODE_ERRORS):
        return image


def as_gray(image: Image.Image) -> Image.Image:
    """In mode "L"; the picture itself where it is."""
    return image if image.mode == "L" else image.convert("L")


def dhash(image: Image.Image) -> int:
    """64 bits: is each of 8 x 8 cells lighter than its left neighbour? The same bits as imagehash.dhash."""
    gray_HW = np.asarray(as_gray(image).resize((9, 8), Image.Resampling.LANCZOS))  # (8, 9)
    return int.from_bytes(np.packbits(gray_HW[:, 1:] > gray_HW[:, :-1]).tobytes(), "big")


def resize(image: Image.Image, side: int, filter: str = "lanczos") -> Image.Image:
    """Scaled so that the short side is `side`, but enlarged by `MAX_ENLARGEMENT` at most. What is four times too large is halved first, by the mean.

    `filter` is a name in FILTERS, for what is made smaller; Lanczos enlarges in any case. "area" is OpenCV's, the mean of
    what each new pixel covers, and "linear" the mean of points there, both without the halving. Raises ImportError where OpenCV is not installed.
    """
    scale = min(side / min(image.size), MAX_ENLARGEMENT)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    if size == image.size:
        return image
    if filter in OF_OPENCV and scale < 1:
        smaller = mean_of_points if filter == "linear" else mean_of_area
        return Image.fromarray(smaller(np.asarray(image), size))
    return image.resize(size, PILLOW_FILTERS[filter if scale < 1 else "lanczos"], reducing_gap=2.0)


def mean_of_area(image_HW: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> (height, width, …) of a smaller `size` (width, height)."""
    return opencv().resize(image_HW, size, interpolation=opencv().INTER_AREA)


def mean_of_points(image_HW: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """As `mean_of_area`, but of n x n points of each new pixel, read between the old ones: as many as there are old ones, at least two.

    On engravings it is 53 dB from the mean by area (half a gray level), in two fifths of its time, and less of what is too
    fine for the new size is left behind as moiré.
    """
    (width, height), n = size, max(2, math.ceil(min(image_HW.shape[1] / size[0], image_HW.shape[0] / size[1])))
    points = opencv().resize(image_HW, (n * width, n * height), interpolation=opencv().INTER_LINEAR)
    return mean_of_area(points, size)


@lru_cache
def opencv() -> ModuleType:
    """OpenCV, in one thread: prepare has processes of its own. Raises ImportError with the way out."""
    cv2 = need("cv2", extra="data")
    cv2.setNumThreads(1)
    return cv2


def encode(image: Image.Image, kind: str) -> bytes:
    """A picture as bytes of a kind in KINDS, without metadata. WebP has no gray mode: gray decodes with R ≈ G ≈ B."""
    if image.info:
        image = image.copy()
        image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, **KINDS[kind])
    return buffer.getvalue()

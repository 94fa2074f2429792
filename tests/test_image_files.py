"""Promises of tokun/data/image_files.py and data_tools/images/image_ops.py: each file ends as the right pixels or as a reason.

On files built byte by byte."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data_tools.images.image_ops import decode_reduced, dhash, encode, resize
from tokun.data import image_completeness, image_files
from tokun.data.image_files import PILLOW_13, PictureError, decode

ROOT = Path(__file__).resolve().parents[1]
Image.init()
HAS_AVIF = "AVIF" in Image.SAVE  # since Pillow 11.3
EMPTY, UNREADABLE, DAMAGED, HUGE, LARGE = (
    "empty file", "not a picture that can be read", "truncated or damaged", "too many pixels", "file too large",
)  # fmt: skip


# ---- files, built by hand -------------------------------------------------------------------------------------------


def texture(mode: str = "RGB", size: tuple[int, int] = (96, 80), seed: int = 0) -> Image.Image:
    """Soft random spots, nowhere uniform: what is missing would show."""
    spots = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, raw: bytes, *extra: tuple[bytes, bytes], depth: int = 8, color: int = 0, interlace: int = 0) -> bytes:
    """`raw`: rows, each led by its filter byte. `extra`: chunks before the pixels. color: 0 L, 2 RGB, 3 P, 4 LA, 6 RGBA."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    chunks = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def rows(values: bytes, height: int = 1) -> bytes:
    return (b"\0" + values) * height


def directory(tags: dict[int, tuple[str, list[int]]], at: int, order: str, following: int = 0) -> bytes:
    """A TIFF directory that stands at byte `at`; tags: {number: (struct letter, values)}."""
    codes = {"B": 1, "H": 3, "I": 4}
    entries, extra = struct.pack(order + "H", len(tags)), b""
    behind = at + 2 + 12 * len(tags) + 4
    for tag, (letter, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        field = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", behind + len(extra))
        extra += packed if len(packed) > 4 else b""
        entries += struct.pack(order + "HHI", tag, codes[letter], len(values)) + field
    return entries + struct.pack(order + "I", following) + extra


def tiff(data: bytes, size=(2, 1), bits=8, photometric=1, channels=1, order="<", cyclic=False, **more: tuple[str, list[int]]) -> bytes:
    """One strip, not compressed, unless `more` ({"t273": (letter, values)}) says otherwise."""
    at = 8 + len(data)
    tags = {256: ("I", [size[0]]), 257: ("I", [size[1]]), 258: ("H", [bits] * channels), 259: ("H", [1])}
    tags |= {262: ("H", [photometric]), 273: ("I", [8]), 277: ("H", [channels]), 278: ("I", [size[1]]), 279: ("I", [len(data)])}
    tags |= {int(name[1:]): value for name, value in more.items()}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    return head + data + directory(tags, at, order, at if cyclic else 0)


def two_pages() -> bytes:
    """The second one claims 60000 x 60000."""
    first, second = tiff(b"\7\x09"), {tag: ("I", [60_000]) for tag in (256, 257)}
    pointer = 10 + 2 + 12 * 9
    return first[:pointer] + struct.pack("<I", len(first)) + first[pointer + 4 :] + directory(second, len(first), "<")


def bmp(width: int, height: int, pixels: bytes, bits: int = 24, compression: int = 0) -> bytes:
    head = struct.pack("<IiiHHIIIIII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, 256 if bits == 8 else 0, 0)
    palette = bytes(v for i in range(256) for v in (i, i, i, 0)) if bits == 8 else b""
    return b"BM" + struct.pack("<IHHI", 54 + len(palette) + len(pixels), 0, 0, 54 + len(palette)) + head + palette + pixels


def gif(canvas: tuple[int, int], frame: tuple[int, int, int, int], codes: list[int]) -> bytes:
    """Eight-bit LZW that never grows: 9-bit codes, cleared before each pixel. 256 clears, 257 ends."""
    number, length = 0, 0
    for code in codes:
        number, length = number | code << length, length + 9
    packed = number.to_bytes(length // 8 + 1, "little")
    blocks = b"".join(bytes([len(packed[i : i + 255])]) + packed[i : i + 255] for i in range(0, len(packed), 255))
    palette = bytes(v for i in range(256) for v in (i, 255 - i, 7))
    return (
        b"GIF89a" + struct.pack("<HHBBB", *canvas, 0xF7, 0, 0) + palette + b"," + struct.pack("<4HB", *frame, 0) + b"\x08" + blocks + b"\0;"
    )


def pixels_of_gif(values: bytes) -> list[int]:
    return [code for value in values for code in (256, value)]


def inflating(count: int) -> bytes:
    """`count` MB of zeros, compressed."""
    deflate = zlib.compressobj(1)
    return b"".join(deflate.compress(bytes(1 << 20)) for _ in range(count)) + deflate.flush()


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def jpeg(**options) -> bytes:
    return save(texture(), "JPEG", quality=95, **options)


def first_scan_only(data: bytes) -> bytes:
    start = data.index(b"\xff\xda")
    return data[: min(data.index(kind, start + 2) for kind in (b"\xff\xda", b"\xff\xc4"))] + b"\xff\xd9"


def cut_behind_ff(data: bytes) -> bytes:
    return data[: data.index(b"\xff\0", len(data) * 2 // 3) + 1]


def progressive_with_scans(count: int) -> bytes:
    data = save(Image.new("L", (3600, 3600), 128), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def jpeg2000_with_size(image: Image.Image, *fields: int) -> bytes:
    """A codestream whose header claims (width, height, x, y, tile width, tile height, x, y)."""
    data = save(image, "JPEG2000", no_jp2=True)
    return data[:8] + struct.pack(">8I", *fields) + data[40:]


def without_last_tile() -> bytes:
    data = save(texture(), "JPEG2000", no_jp2=True, tile_size=(32, 32))
    return data[: data.rindex(b"\xff\x90\0\n")] + b"\xff\xd9"


def apng_with_small_first_frame() -> bytes:
    control = struct.pack(">5I2H2B", 0, 1, 1, 0, 0, 1, 1, 0, 0)
    return png(4, 4, rows(b"\xc8" * 4, 4), (b"acTL", struct.pack(">II", 2, 0)), (b"fcTL", control))


def damaged(data: bytes, at: float, with_bytes: bytes) -> bytes:
    start = int(len(data) * at)
    return data[:start] + with_bytes + data[start + len(with_bytes) :]


def at_kind(data: bytes, kind: bytes, offset: int, new: bytes) -> bytes:
    start = data.index(kind) + offset
    return data[:start] + new + data[start + len(new) :]


ZIPPED = {"t259": ("H", [8])}
PALETTE = (b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
WHOLE_GIF = [*pixels_of_gif(bytes(range(40))), 257]

REFUSED = {
    "zero bytes": (EMPTY, lambda: b""),
    "one byte": (UNREADABLE, lambda: b"\xff"),
    "zeros": (UNREADABLE, lambda: bytes(5000)),
    "html": (UNREADABLE, lambda: b"<!DOCTYPE html><html><body>404</body></html>"),
    "plain text": (UNREADABLE, lambda: b"This picture is no longer here.\n"),
    "svg": (UNREADABLE, lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    "pdf": (UNREADABLE, lambda: b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n"),
    "zip": (UNREADABLE, lambda: b"PK\x05\x06" + bytes(18)),
    "postscript, which would start a program": (UNREADABLE, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"),
    "icon": (UNREADABLE, lambda: save(texture(size=(32, 32)), "ICO")),
    "photoshop": (UNREADABLE, lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(99)),
    "tga": (UNREADABLE, lambda: save(texture(), "TGA")),
    # PNG
    "png: signature only": (UNREADABLE, lambda: b"\x89PNG\r\n\x1a\n"),
    "png: cut in half": (DAMAGED, lambda: cut(save(texture(), "PNG"), 0.5)),
    "png: cut before its last row": (DAMAGED, lambda: save(texture(), "PNG")[:-60]),
    "png: bad checksum in the header": (UNREADABLE, lambda: at_kind(save(texture(), "PNG"), b"IHDR", 17, b"\0\0\0\0")),
    "png: damaged pixels": (DAMAGED, lambda: damaged(save(texture(), "PNG"), 0.4, bytes(40))),
    "png: the stream ends early, properly": (DAMAGED, lambda: png(96, 80, rows(bytes(range(100, 196)), 40))),
    "png: the stream ends early, palette": (DAMAGED, lambda: png(3, 9, rows(b"\1\2\1", 5), PALETTE, color=3)),
    "png: the stream ends early, alpha": (DAMAGED, lambda: png(2, 9, rows(bytes(range(1, 9)), 5), color=6)),
    "png: the stream ends early, interlaced": (DAMAGED, lambda: png(96, 80, rows(bytes(range(100, 196)), 40), interlace=1)),
    "png: bad checksum of the pixels": (DAMAGED, lambda: save(texture(), "PNG")[:-16] + bytes(4) + chunk(b"IEND", b"")),
    "png: cut in half, filled with zeros": (DAMAGED, lambda: cut(save(texture(), "PNG"), 0.5) + bytes(90_000)),
    "png: no pixels": (UNREADABLE, lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))),
    "png: 0 x 0": (UNREADABLE, lambda: png(0, 0, b"")),
    "png: depth of 7 bits": (UNREADABLE, lambda: png(2, 1, rows(b"\1\2"), depth=7)),
    "png: palette missing": ("colours cannot be read (mode P)", lambda: png(3, 1, rows(b"\0\1\2"), color=3)),
    "png: more alphas than colours": (
        "colours cannot be read (mode P)",
        lambda: png(3, 1, rows(b"\0\1\2"), PALETTE, (b"tRNS", bytes(999)), color=3),
    ),
    "png: transparent colour cut": (UNREADABLE, lambda: png(2, 1, rows(bytes(6)), (b"tRNS", b"\0"), color=2)),
    "png: header of 60000 x 60000": (HUGE, lambda: png(60_000, 60_000, rows(b"\0"))),
    "png: header of 12000 x 10000": (HUGE, lambda: png(12_000, 10_000, rows(b"\0"))),
    "png: header of 2**31 x 2**31": (HUGE, lambda: png(2**31 - 1, 2**31 - 1, rows(b"\0"))),
    "png: 90 million pixels of nothing": (HUGE, lambda: png(9_000, 10_000, rows(b"\0"))),
    "png: compressed text of 100 MB": (UNREADABLE, lambda: png(1, 1, rows(b"\0"), (b"zTXt", b"k\0\0" + inflating(100)))),
    "png: international text of 100 MB": (UNREADABLE, lambda: png(1, 1, rows(b"\0"), (b"iTXt", b"k\0\1\0\0\0" + inflating(100)))),
    "png: two hundred texts of 1 MB": (UNREADABLE, lambda: png(1, 1, rows(b"\0"), *[(b"zTXt", b"k\0\0" + inflating(1))] * 200)),
    "png: colour profile of 100 MB": (UNREADABLE, lambda: png(1, 1, rows(b"\0"), (b"iCCP", b"k\0\0" + inflating(100)))),
    "apng: first frame of one pixel": (DAMAGED, apng_with_small_first_frame),
    # JPEG
    "jpeg: start only": (UNREADABLE, lambda: b"\xff\xd8\xff"),
    "jpeg: cut in half": (DAMAGED, lambda: cut(jpeg(), 0.5)),
    "jpeg: cut in half and closed": (DAMAGED, lambda: cut(jpeg(), 0.5) + b"\xff\xd9"),
    "jpeg: gray, cut and closed": (DAMAGED, lambda: cut(save(texture("L"), "JPEG"), 0.7) + b"\xff\xd9"),
    "jpeg: four inks, cut and closed": (DAMAGED, lambda: cut(save(texture("CMYK"), "JPEG", quality=95), 0.7) + b"\xff\xd9"),
    "jpeg: cut in half, filled with zeros": (DAMAGED, lambda: cut(jpeg(), 0.5) + bytes(20_000)),
    "jpeg: progressive, cut": (DAMAGED, lambda: cut(jpeg(progressive=True), 0.6)),
    "jpeg: progressive, cut early and closed": (DAMAGED, lambda: cut(jpeg(progressive=True), 0.2) + b"\xff\xd9"),
    "jpeg: progressive, closed after its first scan": (DAMAGED, lambda: first_scan_only(jpeg(progressive=True))),
    "jpeg: cut behind a 255 and closed": (DAMAGED, lambda: cut_behind_ff(jpeg()) + b"\xff\xd9"),
    "jpeg: progressive, cut late and closed": (DAMAGED, lambda: cut(jpeg(progressive=True), 0.9) + b"\xff\xd9"),
    "jpeg: end missing": (DAMAGED, lambda: jpeg()[:-2]),
    "jpeg: a whole thumbnail in a cut picture": (DAMAGED, lambda: cut(jpeg(exif=b"Exif\0\0" + jpeg()), 0.8)),
    "jpeg: tables missing": (DAMAGED, lambda: at_kind(jpeg(), b"\xff\xdb", 1, b"\xfe")),
    "jpeg: 12 bits": (UNREADABLE, lambda: at_kind(jpeg(), b"\xff\xc0", 4, b"\x0c")),
    "jpeg: 0 rows": (UNREADABLE, lambda: at_kind(jpeg(), b"\xff\xc0", 5, b"\0\0")),
    "jpeg: size of 65500 x 65500": (HUGE, lambda: at_kind(jpeg(), b"\xff\xc0", 5, struct.pack(">HH", 65500, 65500))),
    "jpeg: taller than its scan": (DAMAGED, lambda: at_kind(jpeg(), b"\xff\xc0", 5, struct.pack(">H", 2000))),
    "jpeg: hundreds of scans": (HUGE, lambda: progressive_with_scans(300)),
    "jpeg: a hundred thousand empty segments": (UNREADABLE, lambda: b"\xff\xd8" + b"\xff\xe1\0\2" * 100_000),
    # GIF
    "gif: cut": (DAMAGED, lambda: cut(save(texture("L"), "GIF"), 0.7)),
    "gif: end code in the middle": (DAMAGED, lambda: gif((8, 5), (0, 0, 8, 5), [*pixels_of_gif(bytes(20)), 257])),
    "gif: no frame": (UNREADABLE, lambda: b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";"),
    "gif: canvas of 65535 x 65535": (HUGE, lambda: gif((65535, 65535), (0, 0, 1, 1), [256, 1, 257])),
    "gif: frame of 65535 x 65535": (HUGE, lambda: gif((9, 9), (0, 0, 65535, 65535), [256, 1, 257])),
    # TIFF
    "tiff: header only": (UNREADABLE, lambda: b"II*\0\x08\0\0\0"),
    "tiff: directory far outside": (UNREADABLE, lambda: b"II*\0\xf0\xff\xff\xff" + bytes(99)),
    "tiff: big, directory far outside": (UNREADABLE, lambda: b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(99)),
    "tiff: strip far outside": (DAMAGED, lambda: tiff(bytes(2), t273=("I", [2**32 - 9]))),
    "tiff: fewer strips than rows": (DAMAGED, lambda: tiff(b"abcd", (4, 4), t278=("I", [1]), t273=("I", [8, 8]), t279=("I", [4, 4]))),
    "tiff: the same strips 20000 times": (DAMAGED, lambda: tiff(bytes(500), (10, 100), t278=("I", [50]), t273=("I", [8] * 20_000))),
    "tiff: compressed strips missing": (
        DAMAGED,
        lambda: tiff(zlib.compress(b"abcd"), (4, 4), t278=("I", [1]), t273=("I", [8, 8]), t279=("I", [12, 12]), **ZIPPED),
    ),
    "tiff: compressed strip too short": (DAMAGED, lambda: tiff(zlib.compress(b"abcd"), (4, 4), **ZIPPED)),
    "tiff: damaged deflate": (DAMAGED, lambda: damaged(save(texture(), "TIFF", compression="tiff_adobe_deflate"), 0.3, b"\xff" * 99)),
    "tiff: damaged LZW": (DAMAGED, lambda: damaged(save(texture(), "TIFF", compression="tiff_lzw"), 0.3, b"\xff" * 99)),
    "tiff: a tile far larger than the picture": (
        HUGE,
        lambda: tiff(inflating(2), (9, 9), t322=("I", [30720]), t323=("I", [30720]), t324=("I", [8]), t325=("I", [9000]), **ZIPPED),
    ),
    "tiff: a million channels": (UNREADABLE, lambda: tiff(bytes(2), t277=("I", [1_000_000]))),
    "tiff: 64-bit floats": (UNREADABLE, lambda: tiff(bytes(16), bits=64, t339=("H", [3]))),
    "tiff: unknown compression": (UNREADABLE, lambda: tiff(bytes(2), t259=("H", [4242]))),
    "tiff: 0 x 0": (UNREADABLE, lambda: tiff(bytes(2), (0, 0))),
    "tiff: 2**32 wide": (HUGE, lambda: tiff(bytes(2), (2**32 - 1, 2**31))),
    # BMP, PPM
    "bmp: cut": (DAMAGED, lambda: cut(save(texture(), "BMP"), 0.7)),
    "bmp: runs that end early": (DAMAGED, lambda: bmp(8, 8, b"\x08\x55\0\0\0\1", bits=8, compression=1)),
    "bmp: one very long empty row": (HUGE, lambda: bmp(99_000_000, 1, b"\0\0" * 9, bits=8, compression=1)),
    "bmp: compression 77": (UNREADABLE, lambda: bmp(2, 2, bytes(16), compression=77)),
    "ppm: cut": (DAMAGED, lambda: b"P6 40 40 255\n" + bytes(range(250))),
    "ppm: maximum of 70000": (UNREADABLE, lambda: b"P5 2 1 70000\n" + bytes(8)),
    "ppm: maximum of 0": (UNREADABLE, lambda: b"P5 2 1 0\n" + bytes(8)),
    "ppm: size of 99999 x 99999": (HUGE, lambda: b"P6 99999 99999 255\nabc"),
    "ppm: negative size": (UNREADABLE, lambda: b"P5 -4 4 255\n" + bytes(16)),
    "ppm: words for numbers": (DAMAGED, lambda: b"P2 2 1 255\none two\n"),
    "ppm: half a million comments": (LARGE, lambda: b"P2 1000 1000 255\n" + b"#\n" * 500_000),
    "ppm: 9 million numbers as text": (LARGE, lambda: b"P2 3000 3000 255\n" + b"1 " * 9_000_000),
    "pfm: scale that is not a number": (UNREADABLE, lambda: b"Pf 2 1 nan\n" + bytes(8)),
    # WebP, AVIF, JPEG 2000
    "webp: cut": (UNREADABLE, lambda: cut(save(texture(), "WEBP"), 0.7)),
    "webp: cut, filled with zeros": (DAMAGED, lambda: cut(save(texture(), "WEBP"), 0.5) + bytes(20_000)),
    "webp: damaged": (DAMAGED, lambda: damaged(save(texture(), "WEBP", lossless=True), 0.01, bytes(300))),
    "webp: canvas of 2**24 x 2**24": (HUGE, lambda: b"RIFF\x80\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + bytes(99)),
    "webp: 16 million pixels in 40 bytes": (HUGE, lambda: save(Image.new("RGB", (4000, 4000)), "WEBP", lossless=True, quality=0, method=0)),
    "avif: brand only": (UNREADABLE, lambda: struct.pack(">I", 16) + b"ftypavif" + bytes(99)),
    "avif: cut": (DAMAGED, lambda: save(texture(), "AVIF")[:-40]),
    "j2k: cut": (DAMAGED, lambda: cut(save(texture(), "JPEG2000"), 0.6)),
    "j2k: last tile missing": (DAMAGED, without_last_tile),
    "j2k: sixty thousand tiles, one there": (DAMAGED, lambda: jpeg2000_with_size(texture("L"), 250, 250, 0, 0, 1, 1, 0, 0)),
    "j2k: 81 million pixels in 200 bytes": (HUGE, lambda: jpeg2000_with_size(Image.new("L", (9, 9)), 9000, 9000, 0, 0, 9000, 9000, 0, 0)),
    "j2k: tiles of no size": (DAMAGED, lambda: jpeg2000_with_size(texture("L"), 96, 80, 0, 0, 0, 0, 0, 0)),
    "jp2: box shorter than its picture": (DAMAGED, lambda: at_kind(save(texture(), "JPEG2000"), b"ihdr", 4, struct.pack(">II", 8, 8))),
    "jp2: boxes only": (UNREADABLE, lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_or_hostile_file_is_refused_with_its_reason_and_at_once(name):
    reason, build = REFUSED[name]
    if name.startswith("avif") and not HAS_AVIF:
        pytest.skip("this Pillow reads no AVIF")
    data = build()
    start = time.process_time()
    with pytest.raises(PictureError) as caught:
        decode(data)
    assert str(caught.value) == reason
    assert time.process_time() - start < 2


# ---- odd but good files ---------------------------------------------------------------------------------------------

QUARTERS = np.array([[0, 80, 160], [240, 30, 200]], np.uint8)  # what the turned pictures show: 3 x 2 fields


def fields(side: int = 16) -> np.ndarray:
    return np.kron(QUARTERS, np.ones((side, side), np.uint8))


def turned(orientation: int, format: str) -> bytes:
    """Stored so that its EXIF orientation turns it back to `fields`."""
    grid = fields()
    stored = {
        1: grid, 2: grid[:, ::-1], 3: grid[::-1, ::-1], 4: grid[::-1], 5: grid.T,
        6: np.rot90(grid), 7: grid[::-1, ::-1].T, 8: np.rot90(grid, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(format, {})
    return save(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), format, exif=exif, **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation, format):
    pixels = np.asarray(decode(turned(orientation, format)).convert("L")).astype(int)
    assert pixels.shape == fields().shape
    assert np.abs(pixels - fields()).max() <= 3


def profile(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def swapped_profile() -> bytes:
    """sRGB with red and green changed over, under another name."""
    data = profile("sRGB").replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    return data.replace("sRGB".encode("utf-16-be"), "GRB!".encode("utf-16-be"))


def gray_profile(gamma: float) -> bytes:
    """The smallest ICC profile of a gray scanner: a white point and one curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256)) + b"\0\0"
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 156 + len(white), len(curve)) + white + curve
    head = struct.pack(">I4sI4s4s4s12s4s", 128 + len(tags), b"\0\0\0\0", 0x02400000, b"scnr", b"GRAY", b"XYZ ", bytes(12), b"acsp")
    return head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + tags


def on_paper(values, alphas) -> np.ndarray:
    values, alphas = np.asarray(values, float), np.asarray(alphas, float)[..., None] / 255
    return values * alphas + 255 * (1 - alphas)


def animation(format: str) -> bytes:
    first, second = texture("P" if format == "GIF" else "RGB"), texture(seed=1)
    options = {"lossless": True} if format == "WEBP" else {}
    return save(first, format, save_all=True, append_images=[second.convert(first.mode)], **options)


def exactly(format: str, image: Image.Image, **options):
    return lambda: (save(image, format, **options), np.asarray(image), 0)


SWATCH = Image.new("RGB", (8, 8), (200, 100, 50))
GRAYS = np.asarray(texture("L"))
# name -> the file, the pixels that it shows, the largest difference
ACCEPTED = {
    "png": exactly("PNG", texture()),
    "png: gray": exactly("PNG", texture("L")),
    "png: black below": exactly("PNG", Image.fromarray(np.vstack([GRAYS, np.zeros_like(GRAYS)]))),
    "png: one pixel": lambda: (png(1, 1, rows(b"\x07")), [[7]], 0),
    "png: one column": lambda: (png(1, 500, rows(b"\x07", 500)), np.full((500, 1), 7), 0),
    "png: one bit": lambda: (png(8, 1, rows(b"\xa5"), depth=1), [[255, 0, 255, 0, 0, 255, 0, 255]], 0),
    "png: one bit, black transparent": lambda: (png(8, 1, rows(b"\x00"), (b"tRNS", b"\0\0"), depth=1), [[255] * 8], 0),
    "png: two bits, one gray transparent": lambda: (png(4, 1, rows(b"\x1b"), (b"tRNS", b"\0\1"), depth=2), [[0, 255, 170, 255]], 0),
    "png: 8-bit gray transparent": lambda: (png(3, 1, rows(b"\1\2\3"), (b"tRNS", b"\0\2")), [[1, 255, 3]], 0),
    "png: 16 bits": lambda: (png(3, 1, rows(struct.pack(">3H", 0, 257, 65535)), depth=16), [[0, 1, 255]], 0),
    "png: 16 bits, one gray transparent": lambda: (
        png(3, 1, rows(struct.pack(">3H", 1000, 1001, 65535)), (b"tRNS", struct.pack(">H", 1000)), depth=16), [[255, 4, 255]], 0
    ),
    "png: 16-bit gray with alpha": lambda: (
        png(2, 1, rows(struct.pack(">4H", 0, 65535, 0, 0)), depth=16, color=4), [[[0] * 3, [255] * 3]], 0
    ),
    "png: 16-bit colour, one transparent": lambda: (
        png(2, 1, rows(struct.pack(">6H", 1000, 2000, 3000, 256, 512, 768)), (b"tRNS", struct.pack(">3H", 1000, 2000, 3000)),
            depth=16, color=2),
        [[[255] * 3, [1, 2, 3]]], 0,
    ),
    "png: one colour transparent": lambda: (
        png(2, 1, rows(b"\1\2\3\4\5\6"), (b"tRNS", b"\0\1\0\2\0\3"), color=2), [[[255] * 3, [4, 5, 6]]], 0
    ),
    "png: palette": lambda: (png(3, 1, rows(b"\2\1\0"), PALETTE, color=3), [[[70, 80, 90], [40, 50, 60], [10, 20, 30]]], 0),
    "png: gray palette": lambda: (png(2, 1, rows(b"\1\0"), (b"PLTE", b"\5\5\5\x63\x63\x63"), color=3), [[99, 5]], 0),
    "png: palette, half transparent": lambda: (
        png(3, 1, rows(b"\0\1\2"), PALETTE, (b"tRNS", b"\xff\x80\0"), color=3),
        on_paper([[[10, 20, 30], [40, 50, 60], [70, 80, 90]]], [[255, 128, 0]]), 1,
    ),
    "png: palette, one transparent": lambda: (
        png(2, 1, rows(b"\0\1"), PALETTE, (b"tRNS", b"\xff\0"), color=3), [[[10, 20, 30], [255] * 3]], 0
    ),
    "png: gray with alpha": lambda: (png(2, 1, rows(bytes([64, 128, 9, 0])), color=4), [[159, 255]], 1),
    "png: colour with alpha": lambda: (
        png(2, 1, rows(bytes([64, 32, 16, 128, 1, 2, 3, 0])), color=6), on_paper([[[64, 32, 16], [1, 2, 3]]], [[128, 0]]), 1
    ),
    "png: all clear": lambda: (png(2, 2, rows(bytes(8), 2), color=6), np.full((2, 2, 3), 255), 0),
    "png: bytes after the end": lambda: (save(texture(), "PNG") + b"more" * 999, np.asarray(texture()), 0),
    "png: broken EXIF": lambda: (save(SWATCH, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff"), np.asarray(SWATCH), 0),
    "png: profile cut": exactly("PNG", SWATCH, icc_profile=profile("sRGB")[:100]),
    "png: profile of garbage": exactly("PNG", SWATCH, icc_profile=b"garbage"),
    "png: profile of another kind": exactly("PNG", SWATCH, icc_profile=profile("LAB")),
    "png: profile of sRGB": exactly("PNG", SWATCH, icc_profile=profile("sRGB")),
    "png: profile that changes red and green": lambda: (
        save(SWATCH, "PNG", icc_profile=swapped_profile()), np.full((8, 8, 3), (100, 200, 50)), 24
    ),
    "png: gray with a colour profile": exactly("PNG", texture("L"), icc_profile=swapped_profile()),
    "png: linear gray profile": lambda: (
        save(Image.new("L", (8, 8), 55), "PNG", icc_profile=gray_profile(1.0)),
        np.full((8, 8), 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)), 2
    ),
    "png: 16-bit linear gray profile": lambda: (
        png(2, 1, rows(struct.pack(">2H", 55 * 257, 65535)), (b"iCCP", b"k\0\0" + zlib.compress(gray_profile(1.0))), depth=16),
        [[128, 255]], 2
    ),
    "apng: first frame": lambda: (animation("PNG"), np.asarray(texture()), 0),
    "jpeg": lambda: (jpeg(), np.asarray(texture()), 60),
    "jpeg: gray": lambda: (save(texture("L"), "JPEG", quality=100), GRAYS, 4),
    "jpeg: a flat middle gray": lambda: (save(Image.new("L", (50, 50), 128), "JPEG"), np.full((50, 50), 128), 0),
    "jpeg: progressive": lambda: (save(texture("L"), "JPEG", quality=100, progressive=True), GRAYS, 4),
    "jpeg: restart markers": lambda: (save(texture("L"), "JPEG", quality=100, restart_marker_rows=1), GRAYS, 4),
    "jpeg: bytes after the end": lambda: (save(texture("L"), "JPEG", quality=100) + b"\xff\xd8 more" * 99, GRAYS, 4),
    "jpeg: a thumbnail inside": lambda: (save(texture("L"), "JPEG", quality=100, exif=b"Exif\0\0" + jpeg()), GRAYS, 4),
    "jpeg: EXIF that points at itself": lambda: (
        save(texture("L"), "JPEG", quality=100, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"), GRAYS, 4
    ),
    "jpeg: inverted inks": lambda: (
        save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), np.full((16, 16, 3), (255, 0, 0)), 3
    ),
    "jpeg: inks with a profile that is none": lambda: (
        save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100, icc_profile=b"?" * 200),
        np.full((16, 16, 3), (255, 0, 0)), 3
    ),
    "mpo: first picture": lambda: (
        save(texture(), "MPO", save_all=True, append_images=[SWATCH], quality=100, subsampling=0), np.asarray(texture()), 4
    ),
    "gif": lambda: (gif((8, 5), (0, 0, 8, 5), WHOLE_GIF), [[[i, 255 - i, 7] for i in range(8 * y, 8 * y + 8)] for y in range(5)], 0),
    "gif: first frame": lambda: (animation("GIF"), np.asarray(texture("P").convert("RGB")), 0),
    "gif: transparent": lambda: (save(Image.new("P", (9, 9), 3), "GIF", transparency=3), np.full((9, 9), 255), 0),
    "tiff": exactly("TIFF", texture()),
    "tiff: LZW": exactly("TIFF", texture("L"), compression="tiff_lzw"),
    "tiff: first page": lambda: (two_pages(), [[7, 9]], 0),
    "tiff: directory that follows itself": lambda: (tiff(b"\7\x09", cyclic=True), [[7, 9]], 0),
    "tiff: fax": lambda: (save(texture("1"), "TIFF", compression="group4"), np.asarray(texture("1")) * 255, 0),
    "tiff: white is zero": lambda: (tiff(b"\0\xff", photometric=0), [[255, 0]], 0),
    "tiff: 12 bits": lambda: (tiff(b"\xff\xf8\0", bits=12), [[255, 128]], 0),
    "tiff: 16 bits": lambda: (tiff(struct.pack("<2H", 65535, 257), bits=16), [[255, 1]], 0),
    "tiff: 16 bits, big end first": lambda: (tiff(struct.pack(">2H", 65535, 257), bits=16, order=">"), [[255, 1]], 0),
    "tiff: 16 bits, white is zero": lambda: (tiff(struct.pack("<2H", 65535, 0), bits=16, photometric=0), [[0, 255]], 0),
    "tiff: 16 bits with sign": lambda: (tiff(struct.pack("<2h", -5, 32767), bits=16, t339=("H", [2])), [[0, 127]], 0),
    "tiff: 32 bits": lambda: (tiff(struct.pack("<2I", 2**32 - 1, 2**31), bits=32, t339=("H", [1])), [[255, 128]], 1),
    "tiff: 32 bits with sign": lambda: (tiff(struct.pack("<2i", -7, 2**31 - 1), bits=32, t339=("H", [2])), [[0, 255]], 0),
    "tiff: floats": lambda: (tiff(struct.pack("<2f", 1, 0.25), bits=32, t339=("H", [3])), [[255, 64]], 0),
    "tiff: floats above one": lambda: (tiff(struct.pack("<2f", 500, 100), bits=32, t339=("H", [3])), [[255, 51]], 0),
    "tiff: floats that are no numbers": lambda: (
        tiff(struct.pack("<3f", float("nan"), float("inf"), float("-inf")), (3, 1), bits=32, t339=("H", [3])), [[0, 255, 0]], 0
    ),
    "tiff: gray with alpha": lambda: (tiff(bytes([64, 128, 9, 0]), channels=2, t338=("H", [2])), [[159, 255]], 1),
    "tiff: gray with alpha multiplied in": lambda: (tiff(bytes([64, 128, 0, 0]), channels=2, t338=("H", [1])), [[191, 255]], 1),
    "tiff: colour with alpha multiplied in": lambda: (
        tiff(bytes([64, 32, 16, 128, 0, 0, 0, 0]), photometric=2, channels=4, t338=("H", [1])), [[[191, 159, 143], [255] * 3]], 1
    ),
    "tiff: L*a*b*": lambda: (tiff(bytes([136, 81, 70, 255, 0, 0]), photometric=8, channels=3), [[[255, 0, 0], [255] * 3]], 6),
    "tiff: YCbCr": lambda: (tiff(bytes([76, 85, 255, 128, 128, 128]), photometric=6, channels=3), [[[255, 0, 0], [128] * 3]], 1),
    "tiff: 16-bit inks": lambda: (
        tiff(struct.pack("<8H", 0, 0, 0, 0, 65535, 0, 0, 0), bits=16, photometric=5, channels=4), [[[255] * 3, [0, 255, 255]]], 0
    ),
    "bmp": exactly("BMP", texture()),
    "bmp: from the top down": lambda: (
        bmp(2, -2, b"\1\2\3\4\5\6\0\0\7\x08\x09\0\0\0\0\0"), [[[3, 2, 1], [6, 5, 4]], [[9, 8, 7], [0] * 3]], 0
    ),
    "ppm": exactly("PPM", texture()),
    "ppm: text with a comment": lambda: (b"P2 # small\n2 1 15\n0 15\n", [[0, 255]], 0),
    "ppm: 10 bits": lambda: (b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 0), [[255, 0]], 0),
    "pfm: floats": lambda: (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0, 0.5), [[0, 128]], 0),
    "webp": exactly("WEBP", texture(), lossless=True),
    "webp: first frame": lambda: (animation("WEBP"), np.asarray(texture()), 0),
    "webp: all clear": lambda: (save(Image.new("RGBA", (9, 9)), "WEBP", lossless=True), np.full((9, 9, 3), 255), 0),
    "j2k": exactly("JPEG2000", texture()),
    "j2k: 16 bits": lambda: (save(Image.fromarray(GRAYS.astype(np.uint16) * 257), "JPEG2000"), GRAYS, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_file_shows_what_it_holds(name):
    data, expected, tolerance = ACCEPTED[name]()
    if not PILLOW_13 and name in ("tiff: gray with alpha multiplied in", "tiff: YCbCr"):
        with pytest.raises(PictureError, match=r"13 can|not a picture"):  # older ones show other colours, or nothing
            decode(data)
        return
    image = decode(data)
    assert image.mode == ("RGB" if np.ndim(expected) == 3 else "L") and not image.info
    assert np.asarray(image).shape == np.shape(expected)
    assert np.abs(np.asarray(image).astype(float) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_png_of_our_own_is_opened_as_it_was_written(tmp_path, mode):
    path, picture = tmp_path / "000042-00.png", texture(mode)
    picture.save(path)
    opened = image_files.open_own_png(path)
    assert opened.mode == mode and opened.tobytes() == picture.tobytes()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError):
        image_files.open_own_png(path)
    picture.save(path, "BMP")
    with pytest.raises(OSError):
        image_files.open_own_png(path)


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow reads no AVIF")
def test_the_first_frame_of_an_avif_is_taken():
    data = save(texture(), "AVIF", quality=100, save_all=True, append_images=[SWATCH.resize((96, 80))])
    assert np.abs(np.asarray(decode(data)).astype(int) - np.asarray(texture())).mean() < 3


def test_a_large_picture_is_worked_on_in_strips_without_seams():
    """5.2 million pixels are two strips."""
    values = np.arange(2600, dtype=np.uint16)[:, None] * np.ones((1, 2000), np.uint16) * 25
    assert len(list(image_completeness.strips(Image.new("1", (2000, 2600))))) == 2
    wide = np.asarray(decode(save(Image.fromarray(values), "PNG", compress_level=1)))
    assert (wide == np.round(values / 257)).all()
    gray = Image.fromarray((values >> 8).astype(np.uint8))
    gray.putalpha(255)
    assert (np.asarray(decode(save(gray, "PNG", compress_level=1))) == values >> 8).all()


# ---- any bytes at all -----------------------------------------------------------------------------------------------

HEADS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0", b"BM",
         b"P2 ", b"P6 ", b"Pf ", b"RIFF\xff\0\0\0WEBPVP8 ", b"\0\0\0\x18ftypavif", b"\xff\x4f\xff\x51",
         b"\0\0\0\x0cjP  \r\n\x87\n"]  # fmt: skip
WHOLE = {
    "PNG": save(texture(), "PNG"), "JPEG": jpeg(), "progressive": jpeg(progressive=True), "GIF": save(texture("P"), "GIF"),
    "TIFF": save(texture(), "TIFF"), "LZW": save(texture(), "TIFF", compression="tiff_lzw"), "BMP": save(texture(), "BMP"),
    "PPM": save(texture(), "PPM"), "WEBP": save(texture(), "WEBP"), "J2K": save(texture(), "JPEG2000"),
    "MPO": save(texture(), "MPO", save_all=True, append_images=[SWATCH]), "APNG": animation("PNG"),
    "EXIF": turned(6, "JPEG"), "ICC": save(texture(), "PNG", icc_profile=swapped_profile()), "PA": save(texture("LA"), "PNG"),
}  # fmt: skip

PATCHES = {"nothing": b"", "end marker": b"\xff\xd9", "zeros": bytes(9000)}


def decode_or_refuse(data: bytes) -> Image.Image | None:
    try:
        image = decode(data)
    except PictureError as error:
        assert str(error)
        return None
    assert image.mode in ("L", "RGB") and np.asarray(image).size
    return image


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HEADS), st.binary(max_size=400))
def test_any_bytes_are_a_picture_or_a_reason(head, data):
    decode_or_refuse(head + data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_are_a_picture_or_a_reason(kind, flips):
    data = bytearray(WHOLE[kind])
    for at, value in flips:
        data[int(at**2 * len(data))] = value  # more often in the headers
    decode_or_refuse(bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(set(WHOLE) - {"EXIF"})), st.floats(0, 1, exclude_max=True), st.sampled_from(sorted(PATCHES)))
def test_a_cut_file_is_refused_or_shows_all_of_its_picture(kind, share, patch):
    """Shown where what is left out is an end marker, metadata, a second picture, or a part of the very last JPEG block."""
    whole = np.asarray(decode(WHOLE[kind])).astype(int)
    image = decode_or_refuse(cut(WHOLE[kind], share) + PATCHES[patch])
    zeros_are_pixels = patch == "zeros" and kind in ("BMP", "PPM", "TIFF")
    if image is not None and not zeros_are_pixels:
        assert np.abs(np.asarray(image).astype(int) - whole).mean() < 5


# ---- hash, size, file -----------------------------------------------------------------------------------------------


def test_dhash_is_imagehash_dhash():
    imagehash = pytest.importorskip("imagehash")
    for seed, mode in enumerate(("RGB", "L", "RGB")):
        image = texture(mode, (123, 97), seed)
        assert f"{dhash(image):016x}" == str(imagehash.dhash(image))


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((300, 200), 100, (150, 100)),
        ((200, 300), 100, (100, 150)),
        ((100, 100), 100, (100, 100)),
        ((70, 90), 256, (105, 135)),  # enlarged 1.5 times at most
        ((90, 90), 100, (100, 100)),
        ((1, 1000), 256, (2, 1500)),
        ((5000, 7), 3, (2143, 3)),
    ],
)
def test_the_short_side_is_brought_to_side_and_enlarged_by_half_at_most(size, side, expected):
    assert resize(Image.new("L", size), side).size == expected


def test_a_png_comes_back_to_the_bit_and_a_webp_nearly_and_neither_has_metadata():
    image = decode(save(texture(), "PNG", icc_profile=profile("sRGB"), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", dpi=(300, 300)))
    image.info["dpi"] = (300, 300)
    for gray in (image, image.convert("L")):
        assert (np.asarray(decode(encode(gray, "png"))) == np.asarray(gray)).all()
        lossy = np.asarray(decode(encode(gray, "webp")).convert("RGB")).astype(int)
        assert np.abs(lossy - np.asarray(gray.convert("RGB"))).mean() < 5
    assert np.ptp(lossy, axis=2).max() <= 1, "WebP has no gray mode; its decoder rounds by one level"
    assert image.info == {"dpi": (300, 300)}, "the caller's picture is left as it was"
    assert not Image.open(io.BytesIO(encode(image, "png"))).info
    assert set(Image.open(io.BytesIO(encode(image, "webp"))).info) <= {"loop", "background", "timestamp", "duration"}


def test_it_runs_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is blocked')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-W", "error", "-c", "from data_tools.images.image_ops import decode; decode(b'P5 1 1 255 x')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_decoded_at_a_fraction_is_the_same_picture_and_says_its_whole_size(orientation):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).resize((1200, 900), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    whole = decode(buffer.getvalue())
    small, size = decode_reduced(buffer.getvalue(), 200)
    assert size == whole.size and min(small.size) == 225 and decode_reduced(buffer.getvalue(), 1000)[0].size == whole.size
    difference = np.asarray(small).astype(int) - np.asarray(whole.resize(small.size, Image.Resampling.BOX))
    assert np.abs(difference).mean() < 2
    for end in (len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 40):
        with pytest.raises(PictureError, match="truncated or damaged"):
            decode_reduced(buffer.getvalue()[:end], 200)
        with pytest.raises(PictureError, match="truncated or damaged"):
            decode_reduced(buffer.getvalue()[:end] + b"\xff\xd9", 200)


def test_area_is_the_mean_of_what_each_new_pixel_covers():
    pytest.importorskip("cv2")
    old = np.random.default_rng(0).integers(0, 256, (30, 45), dtype=np.uint8)
    new = np.asarray(resize(Image.fromarray(old), 12, "area"))
    fine = old.repeat(2, 0).repeat(2, 1).astype(float)  # 60 x 90: whole numbers of its points make one new pixel
    assert new.shape == (12, 18) and np.abs(new - fine.reshape(12, 5, 18, 5).mean((1, 3))).max() <= 0.51


@pytest.mark.parametrize("size", [(300, 400), (257, 700), (1900, 1100), (64 * 31, 64 * 40)])
def test_linear_is_near_the_mean_by_area_and_leaves_no_more_moire(size):
    pytest.importorskip("cv2")
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    smooth = Image.fromarray(np.round(127.5 + 100 * np.sin(2 * np.pi * (x + y) * 64 / min(size) / 10)).astype(np.uint8))
    linear, area = (np.asarray(resize(smooth, 64, name)).astype(float) for name in ("linear", "area"))
    assert linear.shape == area.shape and np.abs(linear - area).mean() < 2.5
    hatching = Image.fromarray(
        np.round(127.5 + 100 * np.sin(2 * np.pi * (x + y) * 64 / min(size) * 0.85)).astype(np.uint8)
    )  # 0.85 lines a new pixel
    linear, area = (np.asarray(resize(hatching, 64, name)).astype(float).std() for name in ("linear", "area"))
    assert linear < max(1.05 * area, 3)


def test_linear_takes_colour_and_long_pictures():
    pytest.importorskip("cv2")
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8))
    assert resize(colour, 60, "linear").size == (100, 60) and resize(colour, 60, "linear").mode == "RGB"
    assert resize(Image.new("L", (70_000, 70), 200), 64, "linear").getextrema() == (200, 200)


@pytest.mark.parametrize("name", ["area", "linear"])
def test_opencvs_filters_enlarge_as_the_others_do(name):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
    assert resize(small, 56, name).tobytes() == resize(small, 56).tobytes()

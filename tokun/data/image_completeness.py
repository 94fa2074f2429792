"""Whether all of a picture is in its file. Most decoders leave missing pixels black or gray and report no error.

Knows the bytes of JPEG, JPEG 2000 and PNG, as far as that takes.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageFile


def is_covered(image: ImageFile.ImageFile) -> bool:
    """Do the pieces that Pillow is about to decode fill the picture, once (or once for each channel)?"""
    pieces: list[Any] = [tile[1] for tile in image.tile]
    if image.format == "GIF" or not pieces:  # a frame may be smaller than its GIF; WebP adds its piece later
        return True
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in pieces)
    layers, rest = divmod(area, image.width * image.height)
    return rest == 0 and 1 <= layers <= 6


def has_all_tiles(data: bytes) -> bool:
    """Does a JPEG 2000 have as many tiles as its header says? The decoder leaves missing ones black."""
    start = data.find(b"\xff\x4f\xff\x51")
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", data, start + 8)
    return data.count(b"\xff\x90\0\n", start) >= math.ceil((right - left) / width) * math.ceil((bottom - top) / height)


def jpeg_is_whole(image: Image.Image, data: bytes, scaled: tuple[int, int] | None) -> bool:
    """False for a truncated scan with an end marker: the decoder silently paints the rest gray or leaves it coarse.

    Bytes inserted between the scan and its end marker change nothing in a complete picture; in a truncated one they are decoded as
    the next blocks. Decoding twice is expensive, so only suspicious files are checked: those whose last pixel is middle gray,
    and progressive ones.
    """
    start = scan_start(data)
    if data.rfind(b"\xff\xd9", start) < 0:  # searched from the end, where it usually is
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
    """Does a progressive JPEG hold, for each channel, the scan that completes the last frequency to the last bit?"""
    finished = set()
    for match in re.finditer(b"\xff\xda", scans):
        head = scans[match.end() :][:16]  # length, count, (channel, tables) each, first and last frequency, bits
        count = head[2]
        last, bit = head[4 + 2 * count], head[5 + 2 * count] & 15
        finished |= set(head[3 : 3 + 2 * count : 2]) if last == 63 and bit == 0 else set()
    return len(finished) == channels


def scan_start(data: bytes) -> int:
    """Where a JPEG's scan data begins, after the other segments, one of which may hold a whole JPEG (a thumbnail)."""
    position = 2
    while position < len(data) - 4:
        marker = data[position + 1]
        if data[position] != 0xFF or marker in (0x00, 0xFF):  # fill bytes
            position += 1
        elif marker == 0xDA:
            break
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def png_is_whole(image: Image.Image, data: bytes) -> bool:
    """False if a checksum is wrong, which Pillow does not check, or pixels are missing, which it silently paints black."""
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
    """The chunks of one kind, each with its length, kind and checksum."""
    position = 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == kind:
            yield data[position : position + 12 + length]
        position += 12 + length


def strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that tile a picture from top to bottom, of some four million pixels each, so that copies stay small."""
    rows = max(1, 4_000_000 // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)

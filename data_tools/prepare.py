"""Prepare: a folder of pictures -> clean, captioned image shards, and a manifest that accounts for every file.

    python -m data_tools.prepare my-pictures/ --style engraving --out shards/

Two passes. The first measures every file (hashes, size, whether it decodes, whether it has a caption) and settles what
is kept and where it goes; the second decodes again, resizes and writes. Neither holds more than a few pictures at a
time, and the bytes written depend on the files and the settings alone, never on the number of workers.

Nothing is dropped in silence: each input file has a row in `manifest.parquet`, with the reason where it was rejected.
This file knows pictures, captions and tar files. It knows no model, and runs without torch.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import os
import posixpath
import re
import shlex
import shutil
import stat
import struct
import sys
import tarfile
import threading
import unicodedata
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps
from tqdm import tqdm

from tokun.extras import need

# ---------------------------------------------------------------------------------------------------------------------
# settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the bytes that are written. Kept in `prepare.json` beside the shards."""

    style: str
    """The tag of every picture in SOURCE, in lower-case kebab words: engraving, wood-engraving, etching."""
    side: int = 256
    """Pixels of the short side. A smaller picture is enlarged by `MAX_ENLARGEMENT` at most and may stay below it."""
    val: float = 0.05
    """Share of the pictures for validation, by whole groups where SOURCE has several folders."""
    seed: int = 0
    """Decides the split and the order of the shards."""
    shard_size: int = 1000
    """Pairs in a shard."""
    min_side: int = 64
    """Pictures with a shorter side than this many pixels are rejected."""
    max_aspect: float = 2.5
    """Pictures longer than this many times their width (or the reverse) are rejected."""
    register: str = "plain"
    """The register the captions are written in."""
    license: str = ""
    """The licence of every picture that does not name its own."""
    source: str = ""
    """The name of the collection; empty: the folder's name."""
    lossless: bool = False
    """Write PNG instead of WebP at quality 80."""
    allow_missing_captions: bool = False
    """Keep pictures without a caption, with an empty one."""

    def __post_init__(self) -> None:
        for name in ("style", "register"):
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)!r} is no tag: write words like wood-engraving")
        if not 0 <= self.val < 1:
            raise ValueError(f"--val {self.val} is no share of the pictures: give 0 or more, below 1")
        if not 8 <= self.side <= 4096:
            raise ValueError(f"--side {self.side} is outside 8..4096 pixels")
        if self.shard_size < 1:
            raise ValueError(f"--shard-size {self.shard_size} must be 1 or more")
        if self.min_side < 1:
            raise ValueError(f"--min-side {self.min_side} must be 1 or more")
        if not self.max_aspect >= 1:
            raise ValueError(f"--max-aspect {self.max_aspect} must be 1 or more: long side over short side")
        if not self.lossless and self.side * self.max_aspect > WEBP_LIMIT:
            raise ValueError(
                f"--side {self.side} with --max-aspect {self.max_aspect} may pass WebP's {WEBP_LIMIT} pixels: add --lossless (PNG)"
            )


MAX_ENLARGEMENT = 1.5
MAX_BYTES = 256 * 2**20  # of one picture file
MAX_PIXELS = 100_000_000  # of one picture: 300 MB as RGB
MAX_TEXT_BYTES = 2**20  # of one sidecar caption file
WEBP_LIMIT = 16383  # pixels on a side, a limit of the format
WEBP_QUALITY = 80

MANIFEST = "manifest.parquet"
RECORD = "prepare.json"
PARTIAL = ".prepare-partial"
SHARD_NAME = re.compile(r"(train|val)-\d{5,}\.tar")


# ---------------------------------------------------------------------------------------------------------------------
# finding the files

PICTURE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Found:
    """One input file: its path within SOURCE with forward slashes, and why it may not be opened ("" when it may)."""

    path: str
    problem: str = ""


def scan(source: Path, *, leave_out: Path | None = None) -> tuple[list[Found], list[str]]:
    """All pictures under `source` and all caption tables, as paths within it, sorted.

    A picture is what has a picture's suffix, or a picture's first bytes under any other name. `leave_out` is a folder
    that is not entered (the output, when it lies inside the source).
    """
    root = source.resolve()
    pictures: list[Found] = []
    tables: list[str] = []

    def cannot_enter(error: OSError) -> None:
        pictures.append(Found(Path(error.filename).relative_to(source).as_posix(), "folder cannot be read"))

    for folder, subfolders, names in os.walk(source, onerror=cannot_enter):
        here = Path(folder)
        within = here.relative_to(source).as_posix()
        for name in list(subfolders):
            path = here / name
            if path.is_symlink():
                problem = "symlink to a folder" if path.resolve().is_relative_to(root) else "symlink leaves the source"
                pictures.append(Found(posixpath.normpath(posixpath.join(within, name)), problem))
            elif leave_out is None or path.resolve() != leave_out.resolve():
                continue
            subfolders.remove(name)
        for name in names:
            path, inside = here / name, posixpath.normpath(posixpath.join(within, name))
            problem = why_not_open(path, root)
            if name in TABLE_NAMES:
                if problem:
                    raise ValueError(f"{path} cannot be read for captions ({problem}): put the file itself there")
                tables.append(inside)
            elif path.suffix.lower() in PICTURE_SUFFIXES or (not problem and starts_like_a_picture(path)):
                pictures.append(Found(inside, problem))
    return sorted(pictures, key=lambda found: found.path), sorted(tables)


def why_not_open(path: Path, root: Path) -> str:
    """Why this file is not to be opened (a link out of the source, a pipe that would block for ever), or ""."""
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            return "symlink leaves the source"
        return "" if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return "broken symlink" if path.is_symlink() else "cannot be read"


def starts_like_a_picture(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:  # not known to be a picture, so not ours to report
        return False
    return start.startswith(PICTURE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def shown(path: str) -> str:
    """A path as text that any file can hold: bytes of a name that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------------------------------
# captions

TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "captions.csv")  # where one folder has several, the first wins
PATH_COLUMNS = ("file_name", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "title", "description")


class CaptionError(ValueError):
    """A caption file is there and cannot be read: guessing another caption would mislabel the picture."""


@dataclass(frozen=True)
class Words:
    """What is said of one picture beside its pixels."""

    caption: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    subject: str = ""
    license: str = ""
    source_url: str = ""

    def or_else(self, other: Words) -> Words:
        """These words, each empty one filled from `other`."""
        return Words(**{name: value or getattr(other, name) for name, value in vars(self).items()})


# Known tags only, so that "2 < 3 and 5 > 4" stays. Tags inside a line leave nothing behind; the others part words.
INLINE_TAG = re.compile(r"</?(?:a|abbr|b|big|cite|code|del|em|font|i|ins|q|s|small|span|strike|strong|sub|sup|tt|u|var)\b[^<>]*>", re.I)
BLOCK_TAG = re.compile(
    r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?(?:blockquote|body|br|center|dd|div|dl|dt|figcaption|figure|h[1-6]|head|hr|"
    r"html|img|li|ol|p|pre|table|tbody|td|th|thead|tr|ul)\b[^<>]*>",
    re.I | re.S,
)


def strip_tags(text: str) -> str:
    return BLOCK_TAG.sub(" ", INLINE_TAG.sub("", text))


def clean_caption(text: str) -> str:
    """One line of plain text: no HTML tags and entities, no control characters or surplus spaces, in Unicode NFC."""
    text = strip_tags(html.unescape(strip_tags(text)))
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair, as JSON can hold it
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text if c not in "\ufeff\u00ad\u200b")
    return " ".join(unicodedata.normalize("NFC", text).split())


def kebab(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def words_from(record: dict[Any, Any]) -> Words:
    """Words from a row of a table or a JSON object, by the names of the columns; other columns are left alone."""
    texts = {str(key).strip().lower(): value for key, value in record.items() if isinstance(value, str)}
    captions = record.get("captions")
    captions = captions if isinstance(captions, dict) else {}
    return Words(
        caption=next((caption for name in CAPTION_COLUMNS if (caption := clean_caption(texts.get(name, "")))), ""),
        captions={kebab(str(key)): clean_caption(text) for key, text in captions.items() if isinstance(text, str)},
        subject=kebab(texts.get("subject", "")),
        license=clean_caption(texts.get("license", "")),
        source_url=texts.get("source_url", "").strip().encode("utf-8", "replace").decode("utf-8"),
    )


def read_table(source: Path, table: str) -> dict[str, Words]:
    """A caption table -> {path of the picture within SOURCE: its words}. Its paths start at the table's folder."""
    rows = {}
    for row in read_rows(source / table):
        names = {str(key).strip().lower(): value for key, value in row.items()}
        name = next((str(names[column]) for column in PATH_COLUMNS if names.get(column)), "")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table), name.replace("\\", "/")))
        if name:
            rows.setdefault(path, words_from(row))
    return rows


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .csv (comma, semicolon or tab) or .jsonl file. Raises ValueError with the way out."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield json_object(line, where=f"line {number}")
                return
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
            columns = {str(name).strip().lower() for name in reader.fieldnames or ()}
            for wanted in (PATH_COLUMNS, CAPTION_COLUMNS):
                if not columns.intersection(wanted):
                    raise ValueError(f"its columns are {sorted(columns)}, and none is called {' or '.join(wanted)}")
            yield from reader
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of captions: {error}. Mend it, or rename it to go without") from error


def json_object(text: str, *, where: str) -> dict[Any, Any]:
    """The JSON object in `text`. Raises ValueError saying where and what is wrong."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object")
    return value


def find_words(source: Path, path: str, row: Words) -> Words:
    """The words of the picture at `path`: NAME.txt, then NAME.json, then its `row` of a table, then the file's name.

    Raises CaptionError when a sidecar file is there and cannot be read.
    """
    sidecar = source / path
    words = Words(caption=clean_caption(read_text(sidecar.with_suffix(".txt"), source)))
    text = read_text(sidecar.with_suffix(".json"), source)
    if text:
        try:
            words = words.or_else(words_from(json_object(text, where="caption file")))
        except ValueError as error:
            raise CaptionError(str(error)) from error
    return words.or_else(row).or_else(Words(caption=caption_from_name(path)))


def read_text(path: Path, source: Path) -> str:
    """A small text file in UTF-8, UTF-16 with its mark, or the Windows code page; "" where there is no such file."""
    if not os.path.lexists(path):
        return ""
    if problem := why_not_open(path, source.resolve()):
        raise CaptionError(f"caption file: {problem}")
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CaptionError("caption file is too large")
        data = path.read_bytes()
    except OSError as error:
        raise CaptionError("caption file cannot be read") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


# What cameras, scanners, books and web sites call a picture: no words about what it shows.
NO_WORDS = frozenset({
    "back", "chap", "copy", "cover", "dcim", "download", "dsc", "dscf", "dscn", "edited", "fig", "figure", "file",
    "final", "footer", "frame", "front", "frontis", "frontispiece", "full", "gif", "gopr", "header", "icon", "ill",
    "illo", "ills", "illus", "illustration", "image", "images", "img", "initial", "jpeg", "jpg", "large", "logo", "mvi",
    "new", "original", "page", "photo", "photos", "pic", "pict", "picture", "plate", "plt", "png", "pxl", "scan",
    "scanned", "screen", "screenshot", "shot", "signal", "small", "spine", "thumb", "thumbnail", "tif", "tiff", "title",
    "titlepage", "unnamed", "untitled", "vol", "webp", "whatsapp",
})  # fmt: skip


def caption_from_name(path: str) -> str:
    """The file's name as words, or "" when it does not read like words: `the_wolf-02.jpg` yes, `IMG_1234.jpg` no."""
    stem = unquote(posixpath.splitext(posixpath.basename(path))[0])
    if not stem.isprintable():  # bytes that are not UTF-8, control characters
        return ""
    stem = re.sub("(?<=[a-z])(?=[A-Z])", " ", stem)  # WolfAndLamb
    tokens = re.split(r"[\s_\-.+]+", clean_caption(stem).strip("_-.+ "))
    while tokens and is_counter(tokens[-1]):
        tokens.pop()
    while tokens and is_counter(tokens[0]):
        tokens.pop(0)
    real = [token for token in tokens if is_word(token)]
    letters = sum(map(len, real))
    if not any(is_telling(token) for token in real) or 2 * letters < sum(map(len, tokens)):
        return ""
    return " ".join(tokens)


def is_counter(token: str) -> bool:
    """A number that is no year: 01, 0007, 3, (2)."""
    token = token.strip("()[]")
    return token.isdigit() and not (len(token) == 4 and "1000" <= token <= "2099")


def is_word(token: str) -> bool:
    letters = token.strip("()[],'’!?&;:\"")
    if not letters or any(unicodedata.category(c)[0] not in "LM" and c not in "'’" for c in letters):
        return False
    return not letters.isascii() or bool(re.search("[aeiouy]", letters, re.IGNORECASE))


def is_telling(token: str) -> bool:
    """A word that can say what a picture shows: no camera's prefix, no two letters, no hash in letters only."""
    word = token.strip("()[],'’!?&;:\"").lower()
    if word in NO_WORDS or re.fullmatch("[a-f]{8,}", word):
        return False
    return len(word) >= 3 or not word.isascii()


# ---------------------------------------------------------------------------------------------------------------------
# pictures

# Those that a picture collection holds and that Pillow reads by itself: EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "MPO", "JPEG2000", "AVIF", "PPM")
# What Pillow's decoders raise on hostile bytes. There is no common base: each plugin parses its format in plain Python.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError, MemoryError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class PictureError(ValueError):
    """Why a picture cannot be used, in the words that stand in the manifest."""


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> an upright picture in 8-bit sRGB, mode "RGB", or "L" where the file is grayscale.

    The first frame of an animation; transparency laid on white; 16-bit scaled, not cut; the colour profile applied
    where it can be. Raises PictureError with the reason.
    """
    if not data:
        raise PictureError("empty file")
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken metadata, large pictures: both are dealt with here
        try:
            image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
        except Image.DecompressionBombError as error:
            raise PictureError("too many pixels") from error
        except DECODE_ERRORS as error:
            raise PictureError("not a picture that can be read") from error
        if image.width * image.height > MAX_PIXELS:
            raise PictureError("too many pixels")
        assert not ImageFile.LOAD_TRUNCATED_IMAGES, "broken files would pass as half black pictures"
        try:
            image.load()
        except DECODE_ERRORS as error:
            raise PictureError("truncated or damaged") from error
        try:
            return to_srgb(upright(image))
        except DECODE_ERRORS as error:
            raise PictureError(f"colours cannot be read (mode {image.mode})") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it lies where the EXIF is broken."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def to_srgb(image: Image.Image) -> Image.Image:
    """Any mode -> "L" or "RGB", 8 bits, sRGB, on white."""
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):  # 16 or 32 bits; convert("L") would cut at 255
        return Image.fromarray(to_8_bits(np.asarray(image), integer=image.mode != "F"))
    gray = image.mode in ("1", "L", "LA", "La") or (image.mode == "P" and has_gray_palette(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
        image = image.convert("L" if gray else "RGB")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if gray else "RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    elif profile:
        image = apply_profile(image, profile)
    return image.convert("L" if gray else "RGB")


def has_gray_palette(image: Image.Image) -> bool:
    palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def to_8_bits(values: np.ndarray, *, integer: bool) -> np.ndarray:
    """(H, W) 16 or 32-bit numbers -> (H, W) uint8: white is 65535, or 1.0 for floats, or the largest value."""
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    white = max(65535.0 if integer else 1.0, float(values.max()))
    return np.round(values * (255.0 / white)).astype(np.uint8)


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


def is_blank(image: Image.Image) -> bool:
    """Whether fewer than 1 in 200 points differ clearly from the picture's usual tone: an empty page, a black frame."""
    small = image.convert("L")
    small.thumbnail((256, 256), Image.Resampling.BOX)
    gray_HW = np.asarray(small).astype(np.int16)
    return float(np.mean(np.abs(gray_HW - np.median(gray_HW)) > 12)) < 0.005


def dhash(image: Image.Image) -> int:
    """64 bits: is each of 8 x 8 cells lighter than its left neighbour? The same bits as imagehash.dhash."""
    gray_HW = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS))  # (8, 9)
    return int.from_bytes(np.packbits(gray_HW[:, 1:] > gray_HW[:, :-1]).tobytes(), "big")


def resize(image: Image.Image, side: int) -> Image.Image:
    """Scaled so that the short side is `side`, but enlarged by `MAX_ENLARGEMENT` at most."""
    scale = min(side / min(image.size), MAX_ENLARGEMENT)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.LANCZOS)


def encode(image: Image.Image, *, lossless: bool) -> bytes:
    """A picture as PNG or WebP bytes, without metadata. WebP has no gray mode: gray decodes with R ≈ G ≈ B."""
    image.info.clear()
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# first pass: measure, then settle what is kept and where it goes


@dataclass(frozen=True)
class Measured:
    """What the first pass learned of one file. `reason` is "" for what is kept; the size is the upright original's."""

    path: str
    reason: str = ""
    sha256: str | None = None
    dhash: int | None = None
    width: int | None = None
    height: int | None = None
    license: str = ""
    source_url: str = ""


def measure(source: Path, settings: Settings, task: tuple[Found, Words]) -> Measured:
    """Read, decode and judge one file on its own. Runs in a worker."""
    found, row = task
    result = Measured(path=found.path, reason=found.problem)
    if found.problem:
        return result
    try:
        data = read_bytes(source / found.path)
        result = replace(result, sha256=hashlib.sha256(data).hexdigest())
        image = decode(data)
        result = replace(result, dhash=dhash(image), width=image.width, height=image.height)
        judge(image, settings)
        words = find_words(source, found.path, row)
    except (PictureError, CaptionError) as error:
        return replace(result, reason=str(error))
    if not words.caption and not settings.allow_missing_captions:
        return replace(result, reason="no caption")
    return replace(result, license=words.license or settings.license, source_url=words.source_url)


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PictureError("file too large")
        return path.read_bytes()
    except OSError as error:
        raise PictureError("cannot be read") from error


def judge(image: Image.Image, settings: Settings) -> None:
    """Raise PictureError when a decoded picture is not worth keeping."""
    short, long = sorted(image.size)
    if short < settings.min_side:
        raise PictureError("too small")
    if long > settings.max_aspect * short:
        raise PictureError("too long for its width")
    if is_blank(image):
        raise PictureError("blank")


def reject_duplicates(measured: list[Measured]) -> list[Measured]:
    """Of equal files, and of pictures whose dHash differs in 2 bits at most, only the first in the list stays."""
    seen: set[str] = set()
    near = NearHashes()
    results = []
    for one in measured:
        if not one.reason:
            assert one.sha256 is not None and one.dhash is not None
            if one.sha256 in seen:
                one = replace(one, reason="exact duplicate")
            elif near.holds(one.dhash):
                one = replace(one, reason="near duplicate")
            else:
                near.add(one.dhash)
            seen.add(one.sha256)
        results.append(one)
    return results


class NearHashes:
    """A set of 64-bit hashes that answers whether it holds one within 2 bits, without comparing all.

    A hash is cut into 4 bands of 16 bits. Two hashes that differ in 2 bits differ in 2 bands at most, so they agree in
    at least one of the 6 pairs of bands: looking in those 6 buckets finds every one.
    """

    distance = 2
    pairs = tuple(combinations(range(4), 2))

    def __init__(self) -> None:
        self.buckets: dict[tuple[int, int], list[int]] = {}

    def keys(self, value: int) -> Iterator[tuple[int, int]]:
        bands = [(value >> (16 * band)) & 0xFFFF for band in range(4)]
        for number, (a, b) in enumerate(self.pairs):
            yield number, bands[a] << 16 | bands[b]

    def holds(self, value: int) -> bool:
        return any((value ^ other).bit_count() <= self.distance for key in self.keys(value) for other in self.buckets.get(key, ()))

    def add(self, value: int) -> None:
        for key in self.keys(value):
            self.buckets.setdefault(key, []).append(value)


def draw(seed: int, purpose: str, name: str) -> int:
    """A number in [0, 2**64) fixed by the seed, what it is for, and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{shown(name)}".encode()).digest()[:8], "big")


def split_by_group(kept: list[Measured], settings: Settings) -> dict[str, str]:
    """{path: "train" or "val"}, whole groups together.

    A group is a folder when SOURCE has several with pictures; a picture outside any folder is its own group. Each group
    draws a number from the seed, so adding files later moves no others across. Validation gets at least one group, and
    never more than half of the pictures.
    """
    folders = {posixpath.dirname(one.path) for one in kept} - {""}
    groups: dict[str, list[str]] = {}
    for one in kept:
        folder = posixpath.dirname(one.path)
        group = f"folder/{folder}" if folder and len(folders) > 1 else f"sha256/{one.sha256}"
        groups.setdefault(group, []).append(one.path)
    val: set[str] = set()
    for group in sorted(groups, key=lambda group: (draw(settings.seed, "split", group), group)):
        wanted = draw(settings.seed, "split", group) < settings.val * 2**64 or (settings.val > 0 and not val)
        if wanted and 2 * (len(val) + len(groups[group])) <= len(kept):
            val.update(groups[group])
    return {one.path: "val" if one.path in val else "train" for one in kept}


@dataclass(frozen=True)
class Place:
    """Where a kept picture goes."""

    path: str
    sha256: str
    dhash: int
    shard: str
    key: str


def place(measured: list[Measured], settings: Settings) -> list[Place]:
    """Shard and key of every kept file, in the order of writing: train, then val, each shuffled by the seed."""
    kept = [one for one in measured if not one.reason]
    split = split_by_group(kept, settings)
    order = sorted(kept, key=lambda one: (split[one.path], draw(settings.seed, "order", one.sha256 or ""), one.path))
    places, counts = [], Counter()
    for one in order:
        assert one.sha256 is not None and one.dhash is not None
        name = split[one.path]
        index = counts[name]
        counts[name] += 1
        shard = f"{name}-{index // settings.shard_size:05d}.tar"
        places.append(Place(one.path, one.sha256, one.dhash, shard, f"{name}-{index:06d}"))
    return places


# ---------------------------------------------------------------------------------------------------------------------
# second pass: render and write


@dataclass(frozen=True)
class Rendered:
    """One pair as the members of a shard, or the reason why it cannot be made after all."""

    place: Place
    image: bytes = b""
    json: bytes = b""
    reason: str = ""


def render(source: Path, settings: Settings, task: tuple[Place, Words]) -> Rendered:
    """Decode, resize and encode one kept picture, and write its JSON. Runs in a worker."""
    spot, row = task
    try:
        data = read_bytes(source / spot.path)
        if hashlib.sha256(data).hexdigest() != spot.sha256:
            raise PictureError("changed while being read")
        image = resize(decode(data), settings.side)
        words = find_words(source, spot.path, row)
    except (PictureError, CaptionError) as error:
        return Rendered(spot, reason=str(error))
    if not words.caption and not settings.allow_missing_captions:
        return Rendered(spot, reason="no caption")
    record = {
        "caption": words.caption,
        "captions": {settings.register: words.caption, **words.captions} if words.caption else words.captions,
        "style": settings.style,
        "subject": words.subject,
        "source": settings.source,
        "license": words.license or settings.license,
        "sha256": spot.sha256,
        "source_url": words.source_url,
        "path": shown(spot.path),
        "width": image.width,
        "height": image.height,
        "dhash": f"{spot.dhash:016x}",
    }
    return Rendered(spot, encode(image, lossless=settings.lossless), json.dumps(record, ensure_ascii=False).encode())


def write_shards(folder: Path, rendered: Iterable[Rendered], *, suffix: str) -> tuple[Counter[str], dict[str, str]]:
    """Write pairs, in order, into the tar files they are placed in.

    Returns the number of pairs in each shard, and {path: reason} of the files that failed since they were measured.
    """
    pairs: Counter[str] = Counter()
    failed: dict[str, str] = {}
    tar: tarfile.TarFile | None = None
    name = ""
    try:
        for one in rendered:
            if one.reason:
                failed[one.place.path] = one.reason
                continue
            if one.place.shard != name:
                if tar is not None:
                    tar.close()
                name = one.place.shard
                tar = tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            assert tar is not None
            add_member(tar, f"{one.place.key}.{suffix}", one.image)
            add_member(tar, f"{one.place.key}.json", one.json)
            pairs[name] += 1
    finally:
        if tar is not None:
            tar.close()
    return pairs, failed


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file whose header holds nothing of this machine or this hour: the same data gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))


def write_manifest(path: Path, measured: list[Measured], places: dict[str, Place]) -> None:
    """One row for each input file, kept or not. Columns as in the format's description; null where unknown."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    columns: dict[str, tuple[Any, Callable[[Measured], Any]]] = {
        "path": (pa.string(), lambda one: shown(one.path)),
        "sha256": (pa.string(), lambda one: one.sha256),
        "dhash": (pa.string(), lambda one: None if one.dhash is None else f"{one.dhash:016x}"),
        "width": (pa.int32(), lambda one: one.width),
        "height": (pa.int32(), lambda one: one.height),
        "status": (pa.string(), lambda one: "rejected" if one.reason else "kept"),
        "reason": (pa.string(), lambda one: one.reason),
        "shard": (pa.string(), lambda one: None if one.reason else places[one.path].shard),
        "key": (pa.string(), lambda one: None if one.reason else places[one.path].key),
        "license": (pa.string(), lambda one: one.license),
        "source_url": (pa.string(), lambda one: one.source_url),
    }
    arrays = {name: pa.array([value(one) for one in measured], type=kind) for name, (kind, value) in columns.items()}
    pq.write_table(pa.table(arrays), path, compression="zstd")


# ---------------------------------------------------------------------------------------------------------------------
# the output folder


def refuse_other_shards(out: Path, record: dict[str, Any], *, overwrite: bool) -> None:
    """Raise ValueError unless `out` may be written: absent, without shards, of these same settings, or `overwrite`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if (out / "codes.json").exists():
        raise ValueError(f"--out {out} holds code shards (codes.json), which prepare does not replace: name another folder")
    if overwrite or not out.exists() or not any(is_ours(path.name) for path in out.iterdir()):
        return
    way_out = "Name another --out, or add --overwrite to replace the shards there"
    try:
        there = json.loads((out / RECORD).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out {out} holds shards without a whole {RECORD}: of another tool, or of a broken run. {way_out}") from error
    changes = [f"{name}: {there.get(name)!r} there, {value!r} now" for name, value in record.items() if there.get(name) != value]
    if changes:
        raise ValueError(f"--out {out} holds shards of other settings ({'; '.join(changes)}). {way_out}")


def is_ours(name: str) -> bool:
    return bool(SHARD_NAME.fullmatch(name)) or name in (MANIFEST, RECORD)


def publish(partial: Path, out: Path) -> None:
    """Replace the old files of `out` by the new ones. The record goes first and comes last: its absence tells."""
    (out / RECORD).unlink(missing_ok=True)
    for path in sorted(out.iterdir()):
        if is_ours(path.name):
            path.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == RECORD, path.name)):
        os.replace(path, out / path.name)
    partial.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# the whole


class WorkerDied(RuntimeError):
    """A worker process was killed from outside, most often for want of memory."""


def end_with_parent() -> None:
    """In a worker: exit when the main process is gone. Without this, workers of a killed run wait for ever."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Workers:
    """Map a function over items in order: in this process, or in `count` others, few items under way."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"--workers {count} must be 1 or more")
        self.count = count
        # spawn: a fork of a process with threads may hang, and spawn is what every platform has
        self.pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=end_with_parent) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def imap(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the items. Raises WorkerDied naming the item in question."""
        if self.pool is None:
            yield from map(function, items)
            return
        waiting: deque[tuple[Any, Any]] = deque()
        try:
            for item in items:
                waiting.append((item, self.pool.submit(function, item)))
                if len(waiting) >= 8 * self.count:
                    yield waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][1].result()
                waiting.popleft()
        except BrokenProcessPool as error:
            near = f" at or soon after {shown(waiting[0][0][0].path)}" if waiting else ""
            raise WorkerDied(f"a worker process died{near}, perhaps for want of memory: try --workers 1") from error


@dataclass(frozen=True)
class Report:
    """What was done: files by reason ("" for kept), pairs by shard, rows of caption tables without a picture."""

    reasons: Counter[str]
    shards: Counter[str]
    unmatched_rows: int

    def pairs(self, split: str) -> int:
        return sum(count for name, count in self.shards.items() if name.startswith(f"{split}-"))

    def table(self) -> str:
        """The counts as lines of text, the most frequent reason first."""
        total = sum(self.reasons.values())
        lines = [f"{'files':<36} {total:>9,}", f"{'kept':<36} {self.reasons['']:>9,} {self.reasons[''] / total:>7.1%}"]
        for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0])):
            if reason:
                lines.append(f"  {'rejected: ' + reason:<34} {count:>9,} {count / total:>7.1%}")
        for split in ("train", "val"):
            shards = sum(name.startswith(f"{split}-") for name in self.shards)
            lines.append(f"{split + ' pairs':<36} {self.pairs(split):>9,} in {shards} shard{'' if shards == 1 else 's'}")
        if self.unmatched_rows:
            lines.append(f"{'rows of captions without a picture':<36} {self.unmatched_rows:>9,}")
        return "\n".join(lines)


def prepare(source: Path, out: Path, settings: Settings, *, workers: int = 1, overwrite: bool = False, progress: bool = False) -> Report:
    """Turn the pictures under `source` into shards and a manifest in `out`. The story of this file, top to bottom.

    Raises FileNotFoundError or ValueError, with the way out, when the source is missing or holds no picture, when a
    table of captions cannot be read, or when `out` holds something else.
    """
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise FileNotFoundError(f"SOURCE {source} {what}: give a folder of pictures")
    if out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is SOURCE itself: name another folder")
    need("pyarrow", extra="data")  # before the hours of work, not after
    settings = replace(settings, source=settings.source or source.resolve().name)
    folder_id = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]  # tells folders apart, names no disk
    record = {**asdict(settings), "folder": folder_id}
    refuse_other_shards(out, record, overwrite=overwrite)

    found, tables = scan(source, leave_out=out)
    if not found:
        raise FileNotFoundError(f"no pictures found in {source}. Known suffixes: {' '.join(sorted(PICTURE_SUFFIXES))}")
    rows: dict[str, Words] = {}
    for table in sorted(tables, key=lambda table: TABLE_NAMES.index(posixpath.basename(table))):
        rows = {**read_table(source, table), **rows}
    unmatched = len(rows.keys() - {one.path for one in found})

    partial_folder = out / PARTIAL
    shutil.rmtree(partial_folder, ignore_errors=True)  # of a run that was killed
    partial_folder.mkdir(parents=True)
    bar = partial(tqdm, unit="file", disable=None if progress else True)
    try:
        with Workers(workers) as pool:
            tasks = ((one, rows.get(one.path, Words())) for one in found)
            results = pool.imap(partial(measure, source, settings), tasks)
            measured = reject_duplicates(list(bar(results, desc="measure", total=len(found))))

            places = place(measured, settings)
            tasks = ((spot, rows.get(spot.path, Words())) for spot in places)
            results = bar(pool.imap(partial(render, source, settings), tasks), desc="write", total=len(places))
            shards, failed = write_shards(partial_folder, results, suffix="png" if settings.lossless else "webp")

        measured = [replace(one, reason=failed.get(one.path, one.reason)) for one in measured]
        write_manifest(partial_folder / MANIFEST, measured, {spot.path: spot for spot in places})
        report = Report(Counter(one.reason for one in measured), shards, unmatched)
        record = {"settings": record, "files": len(measured), "kept": report.reasons[""], "shards": dict(shards)}
        (partial_folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        publish(partial_folder, out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return report


def next_steps(out: Path, report: Report) -> str:
    """The three commands to paste after this one."""
    data = "data.train=" + shlex.quote(f"{out}/train-*.tar")
    if report.pairs("val"):
        data += " data.val=" + shlex.quote(f"{out}/val-*.tar")
    return (
        f"Next:\n"
        f"  python -m data_tools.inspect {shlex.quote(str(out))} --verify --sheet sheet.png\n"
        f"  python train.py --config configs/engraving-cpu.yaml {data} out=runs/mine\n"
        f"  python sample.py --checkpoint runs/mine --seed 0"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    default = Settings(style="any")
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.prepare",
        description="A folder of pictures -> clean, captioned image shards.",
        epilog="Captions come from NAME.txt or NAME.json beside NAME.jpg, from metadata.csv, metadata.jsonl or "
        "captions.csv in the folder (file_name, caption), or from file names that read like words, in this order.",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a folder of pictures, searched with all its subfolders")
    add("--style", required=True, help="the style of all, a tag: engraving, wood-engraving, etching, drawing")
    add("--out", type=Path, required=True, help="the folder for the shards and the manifest")
    add("--side", type=int, default=default.side, help="pixels of the short side (%(default)s)")
    add("--val", type=float, default=default.val, help="share for validation, by whole folders (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of the split and the order (%(default)s)")
    add("--shard-size", type=int, default=default.shard_size, help="pairs in a shard (%(default)s)")
    add("--min-side", type=int, default=default.min_side, help="reject a shorter side, in pixels (%(default)s)")
    add("--max-aspect", type=float, default=default.max_aspect, help="reject a longer shape (%(default)s)")
    add("--register", default=default.register, help="the register of the captions (%(default)s)")
    add("--license", default="", metavar="TEXT", help="the licence of pictures that name none of their own")
    add("--source", default="", metavar="NAME", dest="name", help="the collection's name (the folder's)")
    add("--lossless", action="store_true", help="write PNG instead of WebP at quality 80")
    add("--allow-missing-captions", action="store_true", help="keep pictures without a caption")
    add("--workers", type=int, default=2, help="processes (%(default)s); the output is the same for any number")
    add("--overwrite", action="store_true", help="replace shards of other settings in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    options = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__ and name != "source"}
    try:
        settings = Settings(source=args.name, **options)
        report = prepare(args.source, args.out, settings, workers=args.workers, overwrite=args.overwrite, progress=True)
    except (ValueError, OSError, ImportError, WorkerDied) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(report.table())
    if not report.reasons[""]:
        print(f"prepare: no picture was kept; {args.out / MANIFEST} has the reason of each", file=sys.stderr)
        return 1
    print(next_steps(args.out, report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

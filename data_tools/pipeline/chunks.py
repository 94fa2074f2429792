"""Chunks: the first task of prepare, for any process or machine. The second writes the shards: shard_writer.py.

`measure_chunk` reads some hundred files, judges each, and stores one row per file, with the encoded picture if it is worth
keeping. Files are written atomically, and the bytes depend only on the input. Nothing here knows the rest of the collection.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.images.image_ops import FILTERS, KINDS, WEBP_LIMIT, PictureError, as_gray, decode_reduced, dhash, encode, resize
from data_tools.images.judge import of_size, reasons
from data_tools.images.line_art_duplicates import sketch
from data_tools.images.measure import BLANK, Look, look, plain_share
from data_tools.images.trim import trim
from data_tools.pipeline.storage_backends import Store
from data_tools.pipeline.verdicts import REJECT, Verdict, decide
from data_tools.readers import CaptionError, Found, Words, find_words, read_picture, shown
from data_tools.readers.book_page import HEADING_ABOVE
from data_tools.text.captions import Caption, clean_caption, plain_text
from tokun.data.image_files import max_pixels
from tokun.utils.errors import UserError, require_positive

KEPT, AMBIGUOUS, REJECTED = "kept", "ambiguous", "rejected"
PRINTS = frozenset({
    "aquatint", "drawing", "drypoint", "engraving", "etching", "lithograph", "linocut", "mezzotint", "pen", "print", "woodblock", "woodcut",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide the written bytes. Stored in `prepare.json` beside the shards."""

    style: str
    """The tag of every picture, in lower-case kebab words: engraving, wood-engraving, etching. "": each picture has its own."""
    side: int = 256
    """Pixels of the short side. A smaller picture is enlarged by at most `MAX_ENLARGEMENT` and may stay smaller."""
    val: float = 0.05
    """Share of the pictures for validation, by whole groups if SOURCE has several folders or books."""
    val_by: str = "group"
    """What stays whole when validation pictures are drawn: group (books, objects, folders) or picture (any may be held out)."""
    seed: int = 0
    """Decides the split and the order of the shards."""
    shard_size: int = 1000
    """Pairs per shard."""
    min_side: int = 64
    """Pictures with a shorter side than this many pixels are rejected."""
    max_aspect: float = 3.2
    """Pictures longer than this many times their width (or the reverse) are rejected."""
    clean: bool = True
    """Whether pictures and captions are judged and cleaned; otherwise only size, shape, blank pages and duplicates are checked."""
    keep_ambiguous: bool = False
    """Whether doubtful pictures are kept; they are labelled in any case."""
    clip: str = ""
    """An open_clip model (a name with pretrained weights, hf-hub:…, or a path) that checks the medium; "": none."""
    register: str = "plain"
    """The register the captions are written in."""
    license: str = ""
    """The licence of pictures without one of their own."""
    source: str = ""
    """The name of the collection; empty: the folder's name."""
    format: str = "webp"
    """Picture format: webp, jpg (quicker, larger) or png (lossless, largest)."""
    filter: str = "lanczos"
    """Filter for downscaling: lanczos (sharpest), hamming (softer, half the time), area (OpenCV, mean over each new pixel, as in
    img2dataset), or linear (OpenCV, mean of points, fastest)."""
    allow_missing_captions: bool = False
    """Keep pictures without a caption, with an empty caption."""
    caption_column: str = ""
    """The table column and JSON field with captions; empty: the first with a known name."""
    duplicates: str = "alike"
    """Duplicates to reject in favour of the best one: alike (pictures that look the same) or exact (identical files only)."""
    captions_from_names: bool = False
    """Whether a file name that reads like words is the caption of a picture without one."""
    max_megapixels: float = field(default_factory=lambda: max_pixels() / 1_000_000)
    """Pictures with more million pixels are rejected."""

    def __post_init__(self) -> None:
        for name in ("style", "register"):
            value = getattr(self, name)
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", value) and (name, value) != ("style", ""):
                raise UserError(f"--{name} {value!r} is not a tag: write words like wood-engraving")
        max_pixels(self.max_megapixels)
        if not 0 <= self.val < 1:
            raise UserError(f"--val {self.val} is not a share of the pictures: give 0 or more, below 1")
        if self.val_by not in ("group", "picture"):
            raise UserError(f"--val-by {self.val_by!r} is unknown: choose group or picture")
        if not 8 <= self.side <= 4096:
            raise UserError(f"--side {self.side} is outside 8..4096 pixels")
        require_positive(self, "shard_size", "min_side")
        if not self.max_aspect >= 1:
            raise UserError(f"--max-aspect {self.max_aspect} must be 1 or more: long side over short side")
        if self.duplicates not in ("alike", "exact"):
            raise UserError(f"--duplicates {self.duplicates!r} is unknown: choose alike or exact")
        if self.format not in KINDS:
            raise UserError(f"--format {self.format!r} is unknown: choose {', '.join(KINDS)}")
        if self.filter not in FILTERS:
            raise UserError(f"--filter {self.filter!r} is unknown: choose {', '.join(FILTERS)}")
        if self.format == "webp" and self.side * self.max_aspect > WEBP_LIMIT:
            raise UserError(
                f"--side {self.side} with --max-aspect {self.max_aspect} may exceed WebP's limit of {WEBP_LIMIT} pixels: add --format png"
            )


@dataclass(frozen=True)
class FileResult:
    """The results for one input file. The size is that of the upright original, in pixels."""

    path: str
    status: str
    reason: str = ""
    sha256: str | None = None
    dhash: int | None = None
    fine: tuple[int, ...] = ()
    """The 256-bit hash that confirms a duplicate, as four numbers."""
    sketch: str = ""
    """Sketch of a drawing on plain paper, compressed, in base64: it distinguishes drawings with similar hashes."""
    aspect: float = 0.0
    """Width over height of the sketch."""
    width: int | None = None
    height: int | None = None
    caption: str = ""
    words_from: str = ""
    """The file the caption comes from."""
    group: str = ""
    """The group that its words name, which stays in one split."""
    language: str = ""
    license: str = ""
    source_url: str = ""
    own_style: bool = False
    """Whether it has a style of its own, which --style replaces."""
    technique: bool = False
    """Whether it has a technique."""
    several: bool = False
    """Whether it has several captions."""
    start: int = 0
    """Offset in the chunk's data and the lengths of the picture and of its JSON, which follows it; all 0 if it is not kept."""
    image_bytes: int = 0
    json_bytes: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# first task: measure and judge


@dataclass(frozen=True)
class Chunk:
    """Files that are measured together."""

    number: int
    base: str
    """The folder that the pictures' paths are relative to."""
    entries: list[tuple[Found, Words]]
    settings: Settings
    store: Store
    """The store for the rows and the data."""


ROWS = 5  # version of what a row holds, with its JSON


def rows_name(number: int) -> str:
    """The file of a chunk's rows."""
    return f"chunk-{number:06d}.jsonl"


def data_name(number: int) -> str:
    """The file of a chunk's pictures and their JSON."""
    return f"chunk-{number:06d}.data"


@dataclass
class Opened:
    """A resized picture with the measurements of the original and its words; or why it cannot be used."""

    problem: str = ""
    known: dict[str, Any] = field(default_factory=dict)
    """The known fields of its row: sha256, width, height."""
    image: Image.Image | None = None
    size: tuple[int, int] = (0, 0)
    """Measurements of the original without its margin."""
    crop: tuple[int, int, int, int] | None = None
    look: Look | None = None
    words: Words = field(default_factory=Words)


@dataclass
class Judged:
    """One judged file, not yet stored."""

    row: FileResult
    image: Image.Image | None = None
    words: Words = field(default_factory=Words)
    caption: Caption = field(default_factory=lambda: Caption(""))
    style: str = ""
    crop: tuple[int, int, int, int] | None = None


as_json = json.JSONEncoder(ensure_ascii=False).encode  # shared: json.dumps would make an encoder each time


def measure_chunk(chunk: Chunk) -> Counter[str]:
    """Measure the files of a chunk and store the results. Returns the number of files by status and reason."""
    judged: Iterable[Judged] = in_groups(chunk)
    if chunk.settings.clip:  # CLIP takes many at a time; otherwise one group is in memory
        judged = look_at_medium(list(judged), chunk.settings)
    data, lines, counts = io.BytesIO(), [], Counter()
    for one in judged:
        row = one.row
        if one.image is not None and row.status != REJECTED:
            image, text = encoded(one, chunk.settings)
            row = replace(row, start=data.tell(), image_bytes=len(image), json_bytes=len(text))
            data.write(image + text)
        lines.append(as_json(vars(row)) + "\n")
        counts[row.reason or KEPT] += 1
    chunk.store.write(data_name(chunk.number), data.getvalue())
    chunk.store.write(rows_name(chunk.number), "".join(lines).encode())  # written last: its presence means that both files exist
    return counts


GROUP_SIDES = 4096  # total pixels of the short sides in a group: 16 pictures of 256


def in_groups(chunk: Chunk) -> Iterator[Judged]:
    """The files of a chunk, processed in groups step by step rather than picture by picture, which keeps each step's code in the
    processor's caches. Saves 2 to 9 % of the time, a fifth on a busy machine."""
    base, settings = Path(chunk.base), chunk.settings
    size = max(1, GROUP_SIDES // settings.side)
    for start in range(0, len(chunk.entries), size):
        part = chunk.entries[start : start + size]
        opened = [open_picture(base, settings, found) for found, _ in part]
        for one, (found, words) in zip(opened, part, strict=True):
            add_words(one, base, settings, found, words)
        yield from [judge(one, settings, found) for one, (found, _) in zip(opened, part, strict=True)]


def open_picture(base: Path, settings: Settings, found: Found) -> Opened:
    """Read, decode, trim, measure and resize one picture."""
    if found.problem:
        return Opened(found.problem)
    known: dict[str, Any] = {}
    try:
        data = read_picture(base, found)
        known["sha256"] = hashlib.sha256(data).hexdigest()
        # a reduced picture has lost the grain that cleaning measures
        image, (width, height) = decode_reduced(data, 0 if settings.clean else settings.side, most=max_pixels(settings.max_megapixels))
    except PictureError as error:
        return Opened(str(error), known)
    known |= {"width": width, "height": height}
    if not settings.clean:
        return Opened("", known, resize(image, settings.side, settings.filter), (width, height))
    trimmed, box = trim(image)
    crop = None if trimmed.size == image.size else box
    return Opened("", known, resize(trimmed, settings.side, settings.filter), trimmed.size, crop, look(image))


def add_words(one: Opened, base: Path, settings: Settings, found: Found, words: Words) -> None:
    """Find the words about a usable picture."""
    if one.problem:
        return
    try:
        one.words = find_words(base, found, words, from_names=settings.captions_from_names, caption_column=settings.caption_column)
    except CaptionError as error:
        one.problem = str(error)


def judge(one: Opened, settings: Settings, found: Found) -> Judged:
    """Hash and judge one file on its own."""
    path, words = shown(found.path), one.words
    if one.problem or one.image is None:
        return Judged(FileResult(path, REJECTED, one.problem, **one.known))
    gray = as_gray(one.image)
    caption = judged_caption(words, settings)
    own_style = found.style or words.style
    style = settings.style or own_style
    seen = of_picture(one.look, words.caption, settings, style) if one.look else of_blank(gray)
    size = of_size(min(one.size), max(one.size), settings.min_side, settings.max_aspect)
    status, reason = decide([*size, *seen, *of_caption(caption, settings)])
    drawn = sketch(gray)
    row = FileResult(
        path,
        status,
        reason,
        **one.known,
        dhash=dhash(reduced_to(gray, HASH_SIDE)),
        fine=fine_hash(gray),
        sketch=base64.b64encode(zlib.compress(drawn.tones)).decode() if drawn else "",
        aspect=drawn.aspect if drawn else 0.0,
        caption=caption.text,
        words_from=shown(words.words_from),
        group=words.group,
        language=caption.language,
        license=words.license or settings.license,
        source_url=words.source_url,
        own_style=own_style not in ("", style),
        technique=bool(words.more.get("technique")),
        several=bool(words.more.get("captions_all")),
    )
    return Judged(row, one.image, words, caption, style, one.crop)


def judged_caption(words: Words, settings: Settings) -> Caption:
    """The caption of a picture's words, as the settings want it, and its objections."""
    return cleaned(words) if settings.clean else unchanged_caption(words.caption)


def cleaned(words: Words) -> Caption:
    caption = clean_caption(words.caption)
    doubted = words.more.get("caption_origin") == HEADING_ABOVE and not caption.reason
    return replace(caption, reason="caption is a heading") if doubted else caption


def unchanged_caption(text: str) -> Caption:
    text = plain_text(text)
    return Caption(text, "" if text else "no caption")


def of_picture(seen: Look, caption: str, settings: Settings, style: str) -> list[Verdict]:
    prints = bool(PRINTS.intersection(style.split("-")))
    return reasons(seen, caption, min_side=settings.min_side, max_aspect=settings.max_aspect, prints=prints)


def of_blank(gray: Image.Image) -> list[Verdict]:
    return [Verdict(REJECT, "blank")] if plain_share(gray.histogram()) < BLANK else []


def of_caption(caption: Caption, settings: Settings) -> list[Verdict]:
    return [verdict for verdict in caption.verdicts if verdict.kind != REJECT or not settings.allow_missing_captions]


HASH_SIDE = 64  # least short side in pixels for the coarse hash; hashing the whole picture takes ten times as long


def reduced_to(image: Image.Image, side: int) -> Image.Image:
    """The picture scaled down by an integer factor, by the mean, so that no side is below `side`."""
    factor = min(image.size) // side
    return image.reduce(factor) if factor > 1 else image


def fine_hash(image: Image.Image) -> tuple[int, ...]:
    """256 bits as four numbers: is each of 16 x 16 cells lighter than its left neighbour?"""
    gray_HW = np.asarray(as_gray(image).resize((17, 16), Image.Resampling.BOX))  # (16, 17)
    return struct.unpack(">4Q", np.packbits(gray_HW[:, 1:] > gray_HW[:, :-1]).tobytes())


def look_at_medium(judged: list[Judged], settings: Settings) -> list[Judged]:
    """The same files; those in which CLIP sees something other than their style are marked as ambiguous."""
    from data_tools.images.medium import doubts  # imports torch only if needed

    good = [one for one in judged if one.image is not None and one.row.status == KEPT]
    for one, doubt in zip(
        good, doubts([one.image for one in good if one.image is not None], [one.style for one in good], settings.clip), strict=True
    ):
        if doubt:
            one.row = replace(one.row, status=AMBIGUOUS, reason=doubt)
    return judged


def encoded(one: Judged, settings: Settings) -> tuple[bytes, bytes]:
    """The bytes of the picture and of its JSON."""
    assert one.image is not None and one.row.dhash is not None
    row, words, caption = one.row, one.words, one.caption.text
    own = {settings.register: caption} if caption or words.caption else {}  # also if nothing is left of it: a source's own is not cleaned
    record: dict[str, Any] = {
        "caption": caption,
        "captions": {register: text for register, text in {**words.captions, **own}.items() if text},
        "style": one.style,
        "subject": words.subject,
        "source": settings.source,
        "license": row.license,
        "source_url": row.source_url,
        "sha256": row.sha256,
        "path": row.path,
        "width": one.image.width,
        "height": one.image.height,
        "dhash": f"{row.dhash:016x}",
        "language": row.language,
    }
    if (raw := words.raw or words.caption) != caption:
        record["raw_caption"] = raw
    if one.crop:
        record["crop"] = list(one.crop)
    if row.status != KEPT:
        record |= {"status": row.status, "reason": row.reason}
    record |= {name: value for name, value in words.more.items() if name not in record}
    text = as_json(record).encode("utf-8", "replace")
    return encode(one.image, settings.format), text


def read_rows(store: Store, name: str) -> list[FileResult]:
    """The rows that `measure_chunk` stored."""
    rows = map(json.loads, store.read(name).splitlines())
    return [FileResult(**{**row, "fine": tuple(row["fine"])}) for row in rows]

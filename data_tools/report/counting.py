"""Counting: a manifest and its shards -> everything the report shows, in bounded size."""

from __future__ import annotations

import bisect
import hashlib
import heapq
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from data_tools.images.image_ops import PictureError, decode
from data_tools.report.reasons import family
from data_tools.report.records import SPLITS, Records
from tokun.data import tars
from tokun.data.shards import IMAGE_SUFFIXES, key_and_suffix
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

MANIFEST = "manifest.parquet"
RECORD = "prepare.json"
KEPT_TILES = 48
REASON_TILES = 24
CAPTION_TILES = 200  # of pictures that only lack a caption, to fill in captions.csv
THUMBNAIL = 144  # pixels of the long side
MAX_BYTES = 64 * 2**20  # largest picture file opened for a thumbnail
MAX_NAME = 160  # characters of a file name or caption on the page
Opener = Callable[[str], "bytes | None"]


@dataclass
class Sample:
    """The `size` items with the smallest hashes: independent of the order, found in one pass."""

    size: int
    seed: str
    heap: list[tuple[int, str, Any]] = field(default_factory=list)
    seen: int = 0

    def add(self, name: str, item: Any = None) -> None:
        self.seen += 1
        digest = hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "replace")).digest()
        entry = (-int.from_bytes(digest[:8], "big"), name, item)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        elif entry[:2] > self.heap[0][:2]:
            heapq.heapreplace(self.heap, entry)

    def items(self) -> list[tuple[str, Any]]:
        """(name, item), sorted by name."""
        return sorted(((name, item) for _, name, item in self.heap), key=lambda pair: pair[0])


@dataclass
class Histogram:
    """Counts between fixed edges, separately for kept and left-out pictures."""

    title: str
    edges: tuple[float, ...]
    labels: tuple[str, ...]
    kept: Counter[int] = field(default_factory=Counter)
    others: Counter[int] = field(default_factory=Counter)

    def add(self, value: float, *, kept: bool) -> None:
        (self.kept if kept else self.others)[bisect.bisect_right(self.edges, value)] += 1

    @property
    def most(self) -> int:
        """The greatest count, at least 1."""
        return max([1, *(self.kept + self.others).values()])


def size_histogram() -> Histogram:
    edges = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
    return Histogram("Short side, in pixels", edges, ("<32", *(str(edge) if edge < 1000 else f"{edge / 1024:g}k" for edge in edges)))


def aspect_histogram() -> Histogram:
    edges = (0.32, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.45, 1.7, 2.0, 2.5, 3.2)
    return Histogram("Shape: width ÷ height (left: tall, right: wide)", edges, ("<0.32", *(f"{edge:g}" for edge in edges)))


def length_histogram() -> Histogram:
    edges = (1, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300)
    return Histogram("Kept captions: length in characters", edges, ("0", *map(str, edges)))


@dataclass
class Summary:
    """Everything the page shows, in bounded size."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (status, family)
    samples: dict[tuple[str, str], Sample] = field(default_factory=dict)
    kept: Sample = field(default_factory=lambda: Sample(KEPT_TILES, "kept"))  # items are (shard, key)
    size: Histogram = field(default_factory=size_histogram)
    aspect: Histogram = field(default_factory=aspect_histogram)
    length: Histogram = field(default_factory=length_histogram)
    pairs: Counter[str] = field(default_factory=Counter)  # by split
    bytes: int = 0  # of the shards
    tiles: dict[tuple[str, str], tuple[bytes, str]] = field(default_factory=dict)  # (shard, key) -> picture, caption
    damaged: list[str] = field(default_factory=list)  # shards that could not be read to the end
    settings: dict[str, Any] = field(default_factory=dict)
    records: Records = field(default_factory=Records)  # for the dataset card

    @property
    def total(self) -> int:
        return sum(self.statuses.values())


COLUMNS = ("path", "status", "reason", "width", "height", "shard", "key", "caption")
MAX_FAMILIES = 200  # bounds the memory if every file has a reason of its own


def manifest_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a manifest, a thousand in memory at a time. A missing column is None in every row.

    Raises FileNotFoundError or UserError with the way out.
    """
    pq = need("pyarrow.parquet", extra="data")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the folder that tokun prepare wrote")
    try:
        # opened here: pyarrow takes s3:x for an address, and no bytes that are not UTF-8
        with open(path, "rb") as binary, pq.ParquetFile(binary) as file:
            there = [name for name in COLUMNS if name in file.schema_arrow.names]
            if missing := {"path", "status"} - set(there):
                raise UserError(f"it has no column {' and '.join(sorted(missing))}")
            for batch in file.iter_batches(batch_size=1024, columns=there):
                for row in batch.to_pylist():
                    yield {**dict.fromkeys(COLUMNS), **row}
    except (ValueError, OSError) as error:  # pyarrow's errors are both
        raise UserError(f"{path} is not a readable manifest ({error}): run tokun prepare again") from error


def count_manifest(summary: Summary, path: Path) -> None:
    for row in manifest_rows(path):
        kept = str(row["status"]) == "kept" or (bool(row["shard"]) and bool(row["key"]))
        status = "kept" if kept else str(row["status"])  # with --keep-ambiguous a doubtful picture is kept, with its reason
        reason = family(str(row["reason"] or ""))
        name = str(row["path"])
        summary.statuses[status] += 1
        if row["width"] and row["height"]:
            summary.size.add(min(row["width"], row["height"]), kept=kept)
            summary.aspect.add(row["width"] / row["height"], kept=kept)
        if kept:
            summary.kept.add(name, (str(row["shard"]), str(row["key"])))
        if status == "kept" and not reason:
            continue
        group = (status, reason or "no reason given")
        if group not in summary.reasons and len(summary.reasons) >= MAX_FAMILIES:
            group = (status, "other reasons")
        summary.reasons[group] += 1
        details = (str(row["reason"]) if row["reason"] != reason else "", str(row["caption"] or ""))
        tiles = CAPTION_TILES if group == ("rejected", "no caption") else REASON_TILES
        summary.samples.setdefault(group, Sample(tiles, "/".join(group))).add(name, tuple(one[:MAX_NAME] for one in details))


def read_shards(summary: Summary, folder: Path) -> None:
    """Count the pairs of all shards and fetch those of the kept sample. A damaged shard is listed and skipped."""
    wanted = {place for _, place in summary.kept.items()}
    for shard in sorted(folder.glob("*.tar")):
        broken: Counter[str] = Counter()
        try:
            summary.bytes += shard.stat().st_size
            read_shard(summary, shard, *tars.files(shard, broken), wanted)
        except (UserError, OSError):
            broken["not readable"] += 1
        if broken:
            summary.damaged.append(shard.name)


def read_shard(summary: Summary, shard: Path, names: list[str], places: np.ndarray, wanted: set[tuple[str, str]]) -> None:
    split = shard.name.split("-")[0].removesuffix(".tar")
    with open(shard, "rb", buffering=0) as file:
        for name, (offset, size) in zip(names, places.tolist(), strict=True):
            key, suffix = key_and_suffix(name)
            place, known = (shard.name, key), SPLITS.get(split, "")
            if known:
                summary.records.bytes[known] += size
                summary.records.suffixes.update({suffix} & {*IMAGE_SUFFIXES})
            if size > MAX_BYTES:
                continue
            if suffix == "json":
                record = record_of(os.pread(file.fileno(), size, offset))
                caption = record["caption"] if isinstance(record.get("caption"), str) else ""
                summary.pairs[split] += 1
                if known:
                    summary.records.add(record, known)
                summary.length.add(len(caption), kept=True)
                if place in wanted:
                    summary.tiles[place] = (summary.tiles.get(place, (b"", ""))[0], caption)
            elif suffix in IMAGE_SUFFIXES and place in wanted:
                summary.tiles[place] = (thumbnail(os.pread(file.fileno(), size, offset)), summary.tiles.get(place, (b"", ""))[1])


def record_of(data: bytes) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def settings_of(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {str(name): setting for name, setting in value.items()} if isinstance(value, dict) else {}


def folder_opener(source: Path) -> Opener:
    """A function that opens pictures of a folder by their path in the manifest; None if missing or outside the folder."""
    root = source.resolve()

    def open_picture(name: str) -> bytes | None:
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root) or not path.is_file() or path.stat().st_size > MAX_BYTES:
                return None
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # names with a zero byte, loops of links
            return None

    return open_picture


def thumbnail(data: bytes | None) -> bytes:
    """A small JPEG of a picture file, b"" if it cannot be decoded."""
    if not data:
        return b""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = decode(data)
    except PictureError:
        return b""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=58, optimize=True)
    return buffer.getvalue()

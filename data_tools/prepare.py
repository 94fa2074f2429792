"""Prepare: pictures as they come -> clean, captioned image shards, and a manifest that accounts for every file.

    python -m data_tools.prepare my-pictures/ --style engraving --out shards/

SOURCE is a folder of pictures, of classes, of books or of tar files, a table of paths, a data set, or the address of one of
these in object storage: see readers.py. The work is two lists of independent tasks (chunks.py): some hundred files are
measured, cleaned and encoded by each task of the first; the whole collection is then settled (what is a duplicate, what is
kept, in which split and shard); each task of the second writes one shard. Every task writes its file aside and renames it, so
a run that was killed goes on where it was, and the bytes depend on the files and the settings alone: not on the number of
workers, nor on interruptions.

Nothing is dropped in silence: each input file has a row in `manifest.parquet` with the reason, and `report.html` shows them.
This file knows the collection as a whole; it decodes no picture, and runs without torch.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from posixpath import dirname, join
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools import report
from data_tools.images.duplicates import alike_pairs, clusters
from data_tools.images.pictures import OF_OPENCV, opencv
from data_tools.images.sketches import Sketch, look_the_same
from data_tools.pipeline.advice import Captions, first_word, steps, write_captions_to_fill
from data_tools.pipeline.chunks import (
    AMBIGUOUS,
    KEPT,
    REJECTED,
    Chunk,
    Piece,
    Row,
    Settings,
    Shard,
    data_name,
    measure_chunk,
    read_rows,
    rows_name,
    write_shard,
)  # fmt: skip
from data_tools.pipeline.disk import DiskDict
from data_tools.pipeline.engine import ENGINES, Engine, WorkerDied, open_engine
from data_tools.pipeline.stores import Store, is_url, open_store
from data_tools.readers import READERS, Found, Listing, Options, PictureError, Words, choose_reader, read_picture, shown
from data_tools.readers.survey import RECOGNISED
from data_tools.readers.tables import with_captions
from tokun.utils.extras import need
from tokun.utils.memory import keep_memory

MANIFEST = "manifest.parquet"
RECORD = "prepare.json"
PARTIAL = ".prepare-partial"
PLAN = "plan.json"
PUBLISH = "publish.json"
SHARD_NAME = re.compile(r"(train|val)-\d{5,}\.tar")
CHUNK_FILES = 128  # at most, in one task
KIN_DISTANCE = 72  # of 256 bits: not duplicates yet, but too alike to stand on both sides of the split


# ---------------------------------------------------------------------------------------------------------------------
# between the passes: what is kept, and where it goes


@dataclass
class Columns:
    """What is kept in memory of every file, in the order of the listing: about a hundred bytes each."""

    state: np.ndarray
    """uint8 (N,): 0 kept, 1 ambiguous, 2 rejected."""
    hashed: np.ndarray
    """bool (N,): whether it has hashes, which means that it was decoded."""
    sha256: np.ndarray
    """bytes of 32 (N,)."""
    coarse: np.ndarray
    """uint64 (N,)."""
    fine: np.ndarray
    """uint64 (N, 4)."""
    area: np.ndarray
    """int64 (N,): pixels of the original."""
    captioned: np.ndarray
    """bool (N,)."""
    place: np.ndarray
    """int64 (N, 4): chunk, start, bytes of the picture, bytes of the JSON."""
    sketches: DiskDict = field(default_factory=DiskDict)
    """The sketches of drawings on plain paper, by the file's number as text; on disk."""

    @classmethod
    def read(cls, store: Store, tasks: Tasks) -> Columns:
        total = tasks.files
        columns = cls(
            np.zeros(total, np.uint8), np.zeros(total, bool), np.zeros(total, "V32"), np.zeros(total, np.uint64),
            np.zeros((total, 4), np.uint64), np.zeros(total, np.int64), np.zeros(total, bool), np.zeros((total, 4), np.int64),
        )  # fmt: skip
        for number in range(tasks.count):
            for index, row in enumerate(read_rows(store, rows_name(number)), start=tasks.size * number):
                columns.set(index, row, number)
        return columns

    def set(self, index: int, row: Row, chunk: int) -> None:
        self.state[index] = STATES.index(row.status)
        self.captioned[index] = bool(row.caption)
        self.place[index] = chunk, row.start, row.image_bytes, row.json_bytes
        if row.dhash is not None and row.sha256 is not None:
            self.hashed[index] = True
            self.sha256[index] = np.void(bytes.fromhex(row.sha256))
            self.coarse[index], self.fine[index] = row.dhash, row.fine
            self.area[index] = (row.width or 0) * (row.height or 0)
            if row.sketch:
                self.sketches[str(index)] = Sketch(base64.b64decode(row.sketch), row.aspect)

    def alike(self, among: np.ndarray, settings: Settings, **distance: int) -> np.ndarray:
        """Pairs (P, 2) among the files, first < second, that look the same, or are the same where `settings` ask for that alone."""
        if settings.duplicates == "exact":
            hashes = np.ascontiguousarray(self.sha256[among]).view(np.uint64).reshape(-1, 4)
            _, first, which = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
            pairs = np.stack([among[first[which.reshape(-1)]], among], 1)
            return pairs[pairs[:, 0] < pairs[:, 1]]
        pairs = alike_pairs(self.coarse, self.fine, among=among, **distance)
        return pairs[[self.look_the_same(one, other) for one, other in pairs.tolist()]] if len(pairs) else pairs

    def look_the_same(self, one: int, other: int) -> bool:
        """Of two files with nearly the same hashes."""
        if self.sha256[one] == self.sha256[other]:
            return True
        sketches = [self.sketches.get(str(index)) for index in (one, other)]
        return None in sketches or look_the_same(*sketches)


STATES = (KEPT, AMBIGUOUS, REJECTED)


@dataclass
class Settled:
    """What becomes of each file, where that hangs on the others."""

    cause: np.ndarray
    """uint8 (N,): an index of CAUSES; 0 where the file's own verdict stands."""
    like: np.ndarray
    """int64 (N,): the file that the cause names."""
    turn: np.ndarray
    """int64 (N,): which pair of its split it is, -1 where it is not written."""
    val: np.ndarray
    """bool (N,): whether it is in the validation split."""
    order: dict[str, np.ndarray]
    """{split: int64 (n,)}: the files in the order of writing."""
    shard_size: int

    @classmethod
    def begin(cls, total: int, settings: Settings) -> Settled:
        empty = np.empty(0, np.int64)
        return cls(
            np.zeros(total, np.uint8), np.zeros(total, np.int64), np.full(total, -1), np.zeros(total, bool),
            {"train": empty, "val": empty}, settings.shard_size,
        )  # fmt: skip

    def reject(self, index: int, cause: str, like: int) -> None:
        self.cause[index], self.like[index] = CAUSES.index(cause), like

    def verdict(self, index: int, own: tuple[str, str], found: Sequence[Found]) -> tuple[str, str]:
        """(status, reason) of a file: its `own`, or what its likeness to another makes of it."""
        if not self.cause[index]:
            return own
        return REJECTED, CAUSES[self.cause[index]].format(like=shown(found[self.like[index]].path))

    def place(self, index: int) -> tuple[str | None, str | None]:
        """(shard, key), or None twice where the file is not written."""
        turn, split = int(self.turn[index]), "val" if self.val[index] else "train"
        return (None, None) if turn < 0 else (shard_name(split, turn // self.shard_size), f"{split}-{turn:06d}")


CAUSES = ("", "exact duplicate", "thumbnail of {like}", "near duplicate of {like}", "too like {like} in the training split")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def settle(columns: Columns, found: Sequence[Found], settings: Settings) -> Settled:
    """Reject duplicates, draw the split, and give every kept picture its place."""
    settled = Settled.begin(len(columns.state), settings)
    find_duplicates(columns, settled, settings)
    limit = 1 if settings.keep_ambiguous else 0
    kept = np.flatnonzero((columns.state <= limit) & (settled.cause == 0))
    settled.val[kept] = split_by_group(columns, found, kept, settings)
    for index, near in kin_across(columns, kept, settled.val, settings):
        settled.reject(index, "too like {like} in the training split", near)
    kept = kept[settled.cause[kept] == 0]
    for split, part in (("train", kept[~settled.val[kept]]), ("val", kept[settled.val[kept]])):
        settled.order[split] = shuffled(columns, part, settings)
        settled.turn[settled.order[split]] = np.arange(len(part))
    return settled


def find_duplicates(columns: Columns, settled: Settled, settings: Settings) -> None:
    """Reject all but the best of each cluster of pictures that look the same.

    The best has a caption, and the most pixels, and comes first. Its own verdict stands: the thumbnail of a colour plate
    that was rejected is no more wanted than the plate. Files that were rejected for themselves keep their reason.
    """
    pairs = columns.alike(np.flatnonzero(columns.hashed), settings)
    there, pairs = np.unique(pairs, return_inverse=True)
    cluster = clusters(len(there), pairs.reshape(-1, 2))
    best: dict[int, int] = {}
    for name, index in zip(cluster.tolist(), there.tolist(), strict=True):
        best[name] = min(best.get(name, index), index, key=lambda one: (not columns.captioned[one], -columns.area[one], one))
    for name, index in zip(cluster.tolist(), there.tolist(), strict=True):
        if best[name] != index and columns.state[index] != STATES.index(REJECTED):
            settled.reject(index, likeness(columns, index, best[name]), best[name])


def likeness(columns: Columns, index: int, best: int) -> str:
    if columns.sha256[index] == columns.sha256[best]:
        return "exact duplicate"
    return "thumbnail of {like}" if 2 * columns.area[index] <= columns.area[best] else "near duplicate of {like}"


def draw(seed: int, purpose: str, name: bytes) -> int:
    """A number in [0, 2**64) fixed by the seed, what it is for, and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/".encode() + name).digest()[:8], "big")


def drawn(settings: Settings, purpose: str, names: Iterable[bytes], count: int) -> np.ndarray:
    """uint64 (count,): the numbers of as many names."""
    return np.fromiter((draw(settings.seed, purpose, name) for name in names), np.uint64, count)


def sha_name(columns: Columns, index: int) -> bytes:
    return bytes(columns.sha256[index]).hex().encode()


def folder_of(one: Found) -> str:
    """What the reader names as its group, else its folder; "" where it is outside any."""
    return dirname(one.path) if one.group is None else one.group


def are_several(names: Iterable[str]) -> bool:
    first = next(names := iter(names), "")
    return any(name != first for name in names)


def split_by_group(columns: Columns, found: Sequence[Found], kept: np.ndarray, settings: Settings) -> np.ndarray:
    """bool (len(kept),): which of the kept files are for validation, whole groups together.

    A group is what the reader names (a book, an artist, an object), else a folder, when there are several; a picture outside
    any is its own group. Each group draws a number from the seed, so adding files later moves no others across. Validation
    gets at least one group, and never more than half of the pictures.
    """
    several = are_several(name for index in kept if (name := folder_of(found[index])))

    def group(index: int) -> bytes:
        name = folder_of(found[index]) if several else ""
        return b"folder/" + shown(name).encode() if name else b"sha256/" + sha_name(columns, index)

    numbers, which, sizes = np.unique(drawn(settings, "split", map(group, kept), len(kept)), return_inverse=True, return_counts=True)
    chosen, taken = np.zeros(len(numbers), bool), 0
    for place, (number, size) in enumerate(zip(numbers, sizes, strict=True)):
        if int(number) >= settings.val * 2**64 and (taken or not settings.val):
            break
        if 2 * (taken + size) <= len(kept):
            chosen[place], taken = True, taken + size
    return chosen[which]


def kin_across(columns: Columns, kept: np.ndarray, val: np.ndarray, settings: Settings) -> Iterator[tuple[int, int]]:
    """(validation picture, training picture) that look so alike that the first would be no test; each first once."""
    seen = set()
    for one, other in columns.alike(kept, settings, fine_distance=KIN_DISTANCE).tolist():
        if not val[one]:
            one, other = other, one
        if val[one] and not val[other] and one not in seen:
            seen.add(one)
            yield one, other


def shuffled(columns: Columns, part: np.ndarray, settings: Settings) -> np.ndarray:
    """The files of a split in the order of writing, which hangs on the seed and on each picture alone."""
    return part[np.argsort(drawn(settings, "order", (sha_name(columns, index) for index in part), len(part)), kind="stable")]


def shards_to_write(columns: Columns, settled: Settled, settings: Settings, store: Store) -> Iterator[Shard]:
    for split, order in settled.order.items():
        for number, start in enumerate(range(0, len(order), settings.shard_size)):
            part = order[start : start + settings.shard_size]
            pieces = [
                Piece(f"{split}-{turn:06d}", data_name(chunk), *where)
                for turn, (chunk, *where) in enumerate(columns.place[part].tolist(), start=start)
            ]
            yield Shard(shard_name(split, number), settings.format, pieces, store)


# ---------------------------------------------------------------------------------------------------------------------
# the manifest


FIELDS = ("path", "sha256", "dhash", "width", "height", "status", "reason", "shard", "key", "caption", "words_from", "language", "license", "source_url")
ROW_GROUP = 1024  # rows in memory at a time


def manifest(store: Store, tasks: Tasks, settled: Settled, listing: Listing) -> tuple[Counter[tuple[str, str]], Captions]:
    """Write one row for each input file, kept or not, as Parquet, null where unknown. Returns the files by status and reason, and
    what the captions are like."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    schema = pa.schema([(name, pa.int32() if name in ("width", "height") else pa.string()) for name in FIELDS])
    counts: Counter[tuple[str, str]] = Counter()
    captions = Captions()
    with tempfile.TemporaryFile() as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            rows = chain(manifest_rows(store, tasks, settled, listing.found), unread_rows(listing))
            while part := list(islice(rows, ROW_GROUP)):
                counts.update((row["status"], report.family(row["reason"])) for row in part)
                for row in part:
                    captions.add(row)
                writer.write_table(as_table(part, schema))
        file.seek(0)
        store.write_from(MANIFEST, file)
    return counts, captions


def unread_rows(listing: Listing) -> Iterator[dict[str, Any]]:
    """The files that no reader takes, each with the reason."""
    for path, reason in listing.unread.items():
        yield {**dict.fromkeys(FIELDS), "path": shown(path), "status": REJECTED, "reason": reason, "caption": ""}


def manifest_rows(store: Store, tasks: Tasks, settled: Settled, found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    for number in range(tasks.count):
        for index, row in enumerate(read_rows(store, rows_name(number)), start=tasks.size * number):
            (status, reason), (shard, key) = settled.verdict(index, (row.status, row.reason), found), settled.place(index)
            fields = vars(row) | {"status": status, "reason": reason, "shard": shard, "key": key}
            fields["dhash"] = None if row.dhash is None else f"{row.dhash:016x}"
            yield {name: fields[name] for name in FIELDS}


def as_table(rows: list[dict[str, Any]], schema: Any) -> Any:
    """Rows -> a table, by way of JSON: pyarrow's own way from Python's lists would import pandas, which takes as long as some 200 pictures."""
    reader = need("pyarrow.json", extra="data")
    text = "\n".join(map(json.dumps, rows)).encode()
    whole = reader.ReadOptions(use_threads=False, block_size=len(text) + 1)
    return reader.read_json(io.BytesIO(text), read_options=whole, parse_options=reader.ParseOptions(explicit_schema=schema))


# ---------------------------------------------------------------------------------------------------------------------
# the output folder


def refuse_other_shards(out: Store, record: dict[str, Any], *, overwrite: bool) -> None:
    """Raise ValueError unless `out` may be written: absent, without shards, of these same settings, or `overwrite`."""
    names = out.list()
    if "codes.json" in names:
        raise ValueError(f"--out {out} holds code shards (codes.json), which prepare does not replace: name another folder")
    if overwrite or not any(is_ours(name) for name in names):
        return
    way_out = "Name another --out, or add --overwrite to replace the shards there"
    # a run that was killed while its files took their places: they are of the plan aside, and the record may not be there
    begun = out.exists(f"{PARTIAL}/{PLAN}") and (RECORD not in names or out.exists(f"{PARTIAL}/{PUBLISH}"))
    try:
        there = json.loads(out.read(f"{PARTIAL}/{PLAN}" if begun else RECORD))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out {out} holds shards without a whole {RECORD}: of another tool, or of a broken run. {way_out}") from error
    changes = [f"{name}: {there.get(name)!r} there, {value!r} now" for name, value in record.items() if there.get(name) != value]
    if changes:
        raise ValueError(f"--out {out} holds shards of other settings ({'; '.join(changes)}). {way_out}")


def is_ours(name: str) -> bool:
    return bool(SHARD_NAME.fullmatch(name)) or name in (MANIFEST, RECORD, report.NAME)


def publish(out: Store, names: list[str]) -> None:
    """Replace the old files of `out` by the new ones. The record goes first and comes last: its absence tells.

    May be killed and called again: what has taken its place already is left there, the record too.
    """
    if out.exists(f"{PARTIAL}/{RECORD}"):
        out.remove(RECORD)
    for name in out.list():
        if is_ours(name) and name not in names:
            out.remove(name)
    for name in names:
        if out.exists(f"{PARTIAL}/{name}"):
            out.move(f"{PARTIAL}/{name}", name)
    out.remove(f"{PARTIAL}/{PUBLISH}")  # first: without it the rest is work to go on with, with it all must be there
    out.remove(PARTIAL)


# ---------------------------------------------------------------------------------------------------------------------
# the whole


@dataclass(frozen=True)
class Report:
    """What was done: files by (status, reason), pairs by shard, rows of caption tables without a picture."""

    counts: Counter[tuple[str, str]]
    shards: Counter[str]
    unmatched_rows: int
    notes: tuple[str, ...] = ()
    """What the reader has to tell."""
    captions: Mapping[str, int] = field(default_factory=dict)
    """How many pictures want a caption (missing), were kept, were kept without one (empty), and how many texts there are (distinct)."""

    @property
    def kept(self) -> int:
        return sum(self.shards.values())

    def pairs(self, split: str) -> int:
        return sum(count for name, count in self.shards.items() if name.startswith(f"{split}-"))

    def table(self) -> str:
        """The counts as lines of text, the most frequent reason first."""
        total = sum(self.counts.values())
        lines = [f"{'files':<46} {total:>9,}", f"{'pairs written':<46} {self.kept:>9,} {self.kept / total:>7.1%}"]
        for (status, reason), count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            if status != KEPT:
                what = reason if reason.startswith("not read: ") else f"{status}: {reason}"
                lines.append(f"  {what:<44} {count:>9,} {count / total:>7.1%}")
        for split in ("train", "val"):
            shards = sum(name.startswith(f"{split}-") for name in self.shards)
            lines.append(f"{split + ' pairs':<46} {self.pairs(split):>9,} in {shards} shard{'' if shards == 1 else 's'}")
        if self.unmatched_rows:
            lines.append(f"{'rows of captions without a picture':<46} {self.unmatched_rows:>9,}")
        lines += self.notes
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """How tables of captions are read."""

    encoding: str = "utf-8"
    """Of tables of text."""
    quoting: str = "auto"
    """Of tables of text: auto, none, csv."""
    captions: Path | None = None
    """A table of captions by the paths of SOURCE, which come before all others."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done: nothing here changes a byte of the result."""

    workers: int = 1
    engine: str = "local"
    ray_address: str = ""
    progress: bool = False


def prepare(
    source: Path | str,
    out: Path | str,
    settings: Settings,
    *,
    reader: str = "auto",
    root: Path | None = None,
    tables: Tables | None = None,
    work: Work | None = None,
    overwrite: bool = False,
) -> Report:
    """Turn the pictures of `source` into shards, a manifest and a report in `out`. The story of this file, top to bottom.

    `reader` is a name in READERS, or "auto"; `root` is where the paths in a table start, `tables` how tables are read. Raises FileNotFoundError or
    ValueError, with the way out, when the source is missing or holds no picture, when a table of captions cannot be
    read, or when `out` holds something else; WorkerDied when a worker was killed. Running again goes on where it stopped.
    """
    source, work = source if is_url(source) else Path(source), work or Work()
    leave_out = None if is_url(out) else Path(out)
    reader = choose_reader(source, reader, leave_out=leave_out)
    check_folders(source, out)
    need("pyarrow", extra="data")  # before the hours of work, not after
    if settings.filter in OF_OPENCV:
        opencv()
    settings = replace(settings, source=settings.source or name_of(source))
    store = open_store(out)
    aside = open_store(f"{str(out).rstrip('/')}/{PARTIAL}")
    record = {**asdict(settings), "folder": source_id(source, root), "reader": reader}
    refuse_other_shards(store, record, overwrite=overwrite)

    options = reader_options(settings, root, leave_out, tables or Tables())
    listing = with_captions(READERS[reader](source, options), options)
    check_listing(listing, source, settings)
    if work.progress and (told := first_word(listing, from_names=settings.captions_from_names)):
        tqdm.write(f"prepare: {told}", file=sys.stderr)
    begin(aside, record, listing)
    if not aside.exists(PUBLISH):
        with open_engine(work.engine, workers=work.workers, address=work.ray_address) as engine:
            make(aside, listing, settings, engine, record, progress=work.progress)
    names = json.loads(aside.read(PUBLISH))
    publish(store, names["files"])
    made = json.loads(store.read(RECORD))
    counts = Counter({(status, reason): count for status, reason, count in names["counts"]})
    notes = listing.notes
    if leave_out is not None:
        told = write_captions_to_fill(store, report.manifest_rows(leave_out / MANIFEST))
        notes = (*notes, told) if told else notes
        report.write_report(leave_out, opener=opener(listing))
    return Report(counts, Counter(made["shards"]), listing.unmatched, notes, names.get("captions", {}))


def reader_options(settings: Settings, root: Path | None, leave_out: Path | None, tables: Tables) -> Options:
    return Options(
        style=settings.style, root=root, leave_out=leave_out, caption_column=settings.caption_column,
        captions_needed=not settings.allow_missing_captions, **vars(tables),
    )  # fmt: skip


def check_folders(source: Path | str, out: Path | str) -> None:
    if is_url(out) or is_url(source):
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if Path(out).resolve() == Path(source).resolve():
        raise ValueError(f"--out {out} is SOURCE itself: name another folder")


def check_listing(listing: Listing, source: Path | str, settings: Settings) -> None:
    if not listing.found:
        there = "".join(f"; {count:,} {reason}" for reason, count in Counter(listing.unread.values()).most_common(3))
        raise FileNotFoundError(f"no pictures found in {source}: see --reader for what can be read{there}")
    if not settings.style and not all(one.style or one.problem for one in listing.found):
        raise ValueError(f"--style is needed: {source} does not say the style of every picture. Add --style engraving, or another tag")


def begin(aside: Store, record: dict[str, Any], listing: Listing) -> None:
    """Go on with the work that lies in `aside` when it is of these settings and files, else start afresh."""
    plan = json.dumps({"settings": record, "files": identity(listing)}).encode()
    if not aside.exists(PLAN) or aside.read(PLAN) != plan:
        for name in sorted(aside.list(), key=lambda name: name != PUBLISH):  # that first: a part of the rest is never published
            if name != PLAN:
                aside.remove(name)
        aside.write(PLAN, plan)  # until then the old one tells whose work this was


def identity(listing: Listing) -> str:
    """A hash of what the listing names: paths, words, and the sizes and times of the files on this disk."""
    digest = hashlib.sha256()
    for one in listing.found:
        digest.update(repr((one, listing.words.get(one.path))).encode("utf-8", "backslashreplace"))
        if one.where is None and not one.problem and not is_url(listing.base):
            path = join(listing.base, one.path)
            beside = [join(dirname(path), name) for name in one.sidecars or ()] if one.beside else []
            digest.update(repr([stamp(path) for path in (path, *beside)]).encode())
    for path, reason in listing.unread.items():
        digest.update(repr((path, reason)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def stamp(path: str) -> tuple[int, int] | None:
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_size, there.st_mtime_ns


@dataclass(frozen=True)
class Tasks:
    """The files in tasks: small enough that a small collection shows progress and keeps several workers busy."""

    files: int

    @property
    def size(self) -> int:
        return min(CHUNK_FILES, max(16, self.files // 64))

    @property
    def count(self) -> int:
        return -(-self.files // self.size)

    def range(self, number: int) -> range:
        return range(self.size * number, min(self.files, self.size * (number + 1)))

    def chunk(self, number: int, listing: Listing, settings: Settings, aside: Store) -> Chunk:
        part = self.range(number)
        entries = [(one, listing.words.get(one.path, NO_WORDS)) for one in listing.found.part(part.start, part.stop)]
        return Chunk(number, str(listing.base), entries, settings, aside)


NO_WORDS = Words()


def make(aside: Store, listing: Listing, settings: Settings, engine: Engine, record: dict[str, Any], *, progress: bool) -> None:
    """Write everything that is to be published into `aside`, and last of all the list of it."""
    tasks, there = Tasks(len(listing.found)), set(aside.list())
    with Progress("measure", "file", tasks.files, progress) as bar:
        todo = [number for number in range(tasks.count) if rows_name(number) not in there]
        bar.update(tasks.files - sum(len(tasks.range(number)) for number in todo))
        for turn, counts in engine.run(measure_chunk, (tasks.chunk(number, listing, settings, aside) for number in todo)):
            bar.update(len(tasks.range(todo[turn])), counts)

    settled, pairs = write_shards(aside, tasks, listing, settings, engine, there, progress=progress)
    counts, captions = manifest(aside, tasks, settled, listing)
    record = {"settings": record, "files": tasks.files, "kept": sum(pairs.values()), "shards": pairs}
    aside.write(RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    names = {"files": [*pairs, MANIFEST, RECORD], "counts": [[*name, count] for name, count in sorted(counts.items())], "captions": captions.as_json()}
    aside.write(PUBLISH, json.dumps(names).encode())


def write_shards(
    aside: Store, tasks: Tasks, listing: Listing, settings: Settings, engine: Engine, there: set[str], *, progress: bool
) -> tuple[Settled, dict[str, int]]:
    """Settle the whole and write the shards that are not there. Returns what was settled, and {shard: pairs}."""
    columns = Columns.read(aside, tasks)
    settled = settle(columns, listing.found, settings)
    pairs: dict[str, int] = {}
    with Progress("write", "pair", sum(map(len, settled.order.values())), progress) as bar:

        def to_write() -> Iterator[Shard]:
            for shard in shards_to_write(columns, settled, settings, aside):
                pairs[shard.name] = len(shard.pieces)
                if shard.name in there:
                    bar.update(len(shard.pieces))
                else:
                    yield shard

        for _, count in engine.run(write_shard, to_write()):
            bar.update(count)
    return settled, pairs


NO_COUNTS: Mapping[str, int] = {}


class Progress:
    """A bar with a rate, the time left, and the most frequent reasons so far."""

    def __init__(self, name: str, unit: str, total: int, shown: bool) -> None:
        self.bar = tqdm(total=total, desc=name, unit=unit, disable=None if shown else True)
        self.counts: Counter[str] = Counter()

    def update(self, count: int, counts: Mapping[str, int] = NO_COUNTS) -> None:
        for reason, number in counts.items():
            self.counts[report.family(reason)] += number  # or there might be as many reasons as files
        if self.counts:
            self.bar.set_postfix_str(", ".join(f"{reason} {number:,}" for reason, number in self.counts.most_common(3)), refresh=False)
        self.bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def opener(listing: Listing) -> Callable[[str], bytes | None]:
    """Opens the original of a path in the manifest, for the report; None where it cannot be read."""
    places = DiskDict((shown(one.path), one) for one in listing.found if not one.problem)
    # what a reader put aside is a file within the source, or not to be opened
    aside = report.folder_opener(Path(listing.base)) if not is_url(listing.base) else lambda path: None

    def open_picture(path: str) -> bytes | None:
        try:
            return read_picture(listing.base, places[path]) if path in places else aside(path)
        except PictureError:
            return None

    return open_picture


def name_of(source: Path | str) -> str:
    """The name of a collection: its folder's, or its file's without what follows the dot."""
    if isinstance(source, str):
        return source.rstrip("/").rpartition("/")[2]
    return source.stem if source.is_file() else source.resolve().name


def source_id(source: Path | str, root: Path | None) -> str:
    """Tells sources apart, and names no disk."""
    first = source.encode() if isinstance(source, str) else os.fsencode(source.resolve())
    paths = [first] + ([os.fsencode(root.resolve())] if root is not None else [])
    return hashlib.sha256(b"\0".join(paths)).hexdigest()[:16]


def parse(argv: list[str] | None) -> argparse.Namespace:
    default = Settings(style="any")
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.prepare",
        description="Pictures as they come -> clean, captioned image shards.",
        epilog=f"{RECOGNISED}. A file beside a picture comes before a table. What lies there and is not read stands in the manifest. "
        "A run that was killed goes on when the same command is given again.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder of pictures, classes, books or tars; a table; a data set's id; an address like s3://…")
    add("--style", default="", help="the style of all, a tag: engraving, etching; with --reader classes, the class to take")
    add("--out", required=True, help="the folder (or address) for the shards, the manifest and the report")
    add("--reader", default="auto", metavar="NAME", help=f"how to read SOURCE: auto, {', '.join(READERS)} (%(default)s)")
    add("--root", type=Path, metavar="DIR", help="where the paths in a table start (its own folder)")
    add("--captions", type=Path, metavar="TABLE", help="captions by the paths of SOURCE (file_name, caption), before all others: the captions.csv of an earlier run")
    add("--caption-column", default="", metavar="NAME", help="the column of tables, or field of JSON, with the captions (caption, text, prompt …)")
    add("--captions-from-names", action="store_true", help="a file name that reads like words is the caption of a picture without another")
    add("--encoding", default="utf-8", help="of tables of text: cp1252, utf-16 … (%(default)s)")
    add("--quoting", default="auto", help="of tables of text: auto, none (fields stand as they are) or csv (%(default)s)")
    add("--side", type=int, default=default.side, help="pixels of the short side (%(default)s)")
    add("--val", type=float, default=default.val, help="share for validation, by whole folders or books (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of the split and the order (%(default)s)")
    add("--shard-size", type=int, default=default.shard_size, help="pairs in a shard (%(default)s)")
    add("--min-side", type=int, default=default.min_side, help="reject a shorter side, in pixels (%(default)s)")
    add("--max-aspect", type=float, default=default.max_aspect, help="reject a longer shape (%(default)s)")
    add("--no-clean", action="store_false", dest="clean", help="take pictures and captions as they are, save size, blanks, duplicates")
    add("--duplicates", default=default.duplicates, help="what is left out beside a better copy: alike (what looks the same) or exact (the very same files alone) (%(default)s)")
    add("--keep-ambiguous", action="store_true", help="keep what may not belong, labelled in its JSON")
    add("--clip", default="", metavar="NAME", help="doubt the medium by open_clip: ViT-B-32:laion2b_s34b_b79k, hf-hub:ID, a folder")
    add("--register", default=default.register, help="the register the captions are written in (%(default)s)")
    add("--license", default="", metavar="TEXT", help="the licence of pictures that name none of their own")
    add("--source", default="", metavar="NAME", dest="name", help="the collection's name (the folder's)")
    add("--format", default=default.format, help="of the pictures: webp, jpg (quicker, larger) or png (lossless) (%(default)s)")
    add("--filter", default=default.filter, help="that makes pictures smaller: lanczos (sharpest), hamming (softer, in half the time), area (OpenCV's, as img2dataset's) or linear (OpenCV's, the quickest) (%(default)s)")
    add("--allow-missing-captions", action="store_true", help="keep pictures without a caption")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s); the output is the same for any number")
    add("--engine", default="local", metavar="NAME", help=f"{' or '.join(ENGINES)} (%(default)s): where the tasks run")
    add("--ray-address", default="", metavar="HOST:PORT", help="of a Ray cluster; its nodes must reach SOURCE and --out")
    add("--overwrite", action="store_true", help="replace shards of other settings in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    command = sys.argv[1:] if argv is None else list(argv)
    args = at_home(parse(argv))
    keep_memory()
    options = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__ and name != "source"}
    work = Work(workers=args.workers, engine=args.engine, ray_address=args.ray_address, progress=True)
    try:
        settings = Settings(source=args.name, **options)
        tables = Tables(encoding=args.encoding, quoting=args.quoting, captions=args.captions)
        made = prepare(args.source, args.out, settings, reader=args.reader, root=args.root, tables=tables, work=work, overwrite=args.overwrite)
    except (ValueError, OSError, ImportError, WorkerDied) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(made.table())
    if not made.kept:
        print(f"prepare: no picture was kept; {args.out}/{MANIFEST} has the reason of each", file=sys.stderr)
    if made.kept or made.captions.get("missing"):
        print(steps(args.out.rstrip("/"), command, made.captions, report=report.NAME, val=bool(made.pairs("val"))))
    return 0 if made.kept else 1


def at_home(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with ~ at the start of a path as the home folder: after an = the shell leaves it as it is."""
    for name in ("source", "out", "root", "captions"):
        value = getattr(args, name)
        if value is not None and str(value).startswith("~"):
            setattr(args, name, type(value)(os.path.expanduser(value)))
    return args


if __name__ == "__main__":
    sys.exit(main())

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
import hashlib
import io
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from posixpath import dirname
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools import report
from data_tools.chunks import AMBIGUOUS, KEPT, REJECTED, Chunk, Piece, Row, Settings, Shard, measure_chunk, read_rows, write_shard
from data_tools.duplicates import alike_pairs, clusters
from data_tools.engine import ENGINES, Engine, WorkerDied, open_engine
from data_tools.readers import READERS, Found, Listing, Options, PictureError, Words, choose_reader, read_picture, shown
from data_tools.stores import Store, is_url, open_store
from tokun.extras import need

MANIFEST = "manifest.parquet"
RECORD = "prepare.json"
PARTIAL = ".prepare-partial"
PLAN = "plan.json"
PUBLISH = "publish.json"
SHARD_NAME = re.compile(r"(train|val)-\d{5,}\.tar")
CHUNK_FILES = 256  # at most, in one task
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

    @classmethod
    def read(cls, store: Store, chunks: list[Chunk]) -> Columns:
        total = sum(len(chunk.entries) for chunk in chunks)
        columns = cls(
            np.zeros(total, np.uint8), np.zeros(total, bool), np.zeros(total, "V32"), np.zeros(total, np.uint64),
            np.zeros((total, 4), np.uint64), np.zeros(total, np.int64), np.zeros(total, bool), np.zeros((total, 4), np.int64),
        )  # fmt: skip
        index = 0
        for chunk in chunks:
            for row in read_rows(store, chunk.rows_name):
                columns.set(index, row, chunk.number)
                index += 1
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


STATES = (KEPT, AMBIGUOUS, REJECTED)


@dataclass
class Settled:
    """What becomes of each file: its status and reason where they differ from the row's, and its shard and key."""

    changed: dict[int, tuple[str, str]] = field(default_factory=dict)
    places: dict[int, tuple[str, str]] = field(default_factory=dict)

    def status(self, index: int, row: Row) -> tuple[str, str]:
        return self.changed.get(index, (row.status, row.reason))


def settle(columns: Columns, found: list[Found], settings: Settings) -> Settled:
    """Reject duplicates, draw the split, and give every kept picture its place."""
    settled = Settled(changed=find_duplicates(columns, found))
    limit = 1 if settings.keep_ambiguous else 0
    kept = [index for index in np.flatnonzero(columns.state <= limit).tolist() if index not in settled.changed]
    split = split_by_group(columns, found, kept, settings)
    for index, near in [*kin_across(columns, kept, split)]:  # all, before the split changes
        settled.changed[index] = REJECTED, f"too like {shown(found[near].path)} in the training split"
        del split[index]
    settled.places = place(columns, found, split, settings)
    return settled


def find_duplicates(columns: Columns, found: list[Found]) -> dict[int, tuple[str, str]]:
    """{index: (rejected, reason)} of all but the best of each cluster of pictures that look the same.

    The best has a caption, and the most pixels, and comes first. Its own verdict stands: the thumbnail of a colour plate
    that was rejected is no more wanted than the plate. Files that were rejected for themselves keep their reason.
    """
    there = np.flatnonzero(columns.hashed)
    cluster = clusters(len(there), alike_pairs(columns.coarse[there], columns.fine[there]))
    best: dict[int, int] = {}
    for name, index in zip(cluster.tolist(), there.tolist(), strict=True):
        best[name] = min(best.get(name, index), index, key=lambda one: (not columns.captioned[one], -columns.area[one], one))
    changed = {}
    for name, index in zip(cluster.tolist(), there.tolist(), strict=True):
        if best[name] != index and columns.state[index] != STATES.index(REJECTED):
            changed[index] = REJECTED, likeness(columns, found, index, best[name])
    return changed


def likeness(columns: Columns, found: list[Found], index: int, best: int) -> str:
    if columns.sha256[index] == columns.sha256[best]:
        return "exact duplicate"
    kind = "thumbnail" if 2 * columns.area[index] <= columns.area[best] else "near duplicate"
    return f"{kind} of {shown(found[best].path)}"


def draw(seed: int, purpose: str, name: bytes) -> int:
    """A number in [0, 2**64) fixed by the seed, what it is for, and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/".encode() + name).digest()[:8], "big")


def split_by_group(columns: Columns, found: list[Found], kept: list[int], settings: Settings) -> dict[int, str]:
    """{index: "train" or "val"} of the kept files, whole groups together.

    A group is what the reader names (a book, an artist, an object), else a folder, when there are several; a picture outside
    any is its own group. Each group draws a number from the seed, so adding files later moves no others across. Validation
    gets at least one group, and never more than half of the pictures.
    """
    names = [dirname(found[index].path) if found[index].group is None else found[index].group or "" for index in kept]
    several = len(set(names) - {""}) > 1
    groups: dict[bytes, list[int]] = {}
    for index, name in zip(kept, names, strict=True):
        group = b"folder/" + shown(name).encode() if name and several else b"sha256/" + bytes(columns.sha256[index]).hex().encode()
        groups.setdefault(group, []).append(index)
    val: set[int] = set()
    for number, group in sorted((draw(settings.seed, "split", group), group) for group in groups):
        wanted = number < settings.val * 2**64 or (settings.val > 0 and not val)
        if wanted and 2 * (len(val) + len(groups[group])) <= len(kept):
            val.update(groups[group])
    return {index: "val" if index in val else "train" for index in kept}


def kin_across(columns: Columns, kept: list[int], split: dict[int, str]) -> Iterator[tuple[int, int]]:
    """(validation picture, training picture) that look so alike that the first would be no test; each first once."""
    order = np.array(kept, dtype=np.int64)
    seen = set()
    for a, b in alike_pairs(columns.coarse[order], columns.fine[order], fine_distance=KIN_DISTANCE).tolist():
        one, other = kept[a], kept[b]
        if split[one] == "train":
            one, other = other, one
        if split[one] == "val" and split[other] == "train" and one not in seen:
            seen.add(one)
            yield one, other


def place(columns: Columns, found: list[Found], split: dict[int, str], settings: Settings) -> dict[int, tuple[str, str]]:
    """{index: (shard, key)} in the order of writing: train, then val, each shuffled by the seed."""

    def turn(index: int) -> tuple[str, int, str]:
        return split[index], draw(settings.seed, "order", bytes(columns.sha256[index]).hex().encode()), found[index].path

    places, counts = {}, Counter()
    for index in sorted(split, key=turn):
        name = split[index]
        number = counts[name]
        counts[name] += 1
        places[index] = f"{name}-{number // settings.shard_size:05d}.tar", f"{name}-{number:06d}"
    return places


def shards_to_write(columns: Columns, settled: Settled, chunks: list[Chunk], settings: Settings, store: Store) -> list[Shard]:
    shards: dict[str, Shard] = {}
    for index, (name, key) in settled.places.items():
        chunk, start, image_bytes, json_bytes = columns.place[index].tolist()
        shard = shards.setdefault(name, Shard(name, settings.format, [], store))
        shard.pieces.append(Piece(key, chunks[chunk].data_name, start, image_bytes, json_bytes))
    return list(shards.values())


# ---------------------------------------------------------------------------------------------------------------------
# the manifest


def manifest(store: Store, chunks: list[Chunk], settled: Settled) -> tuple[bytes, Counter[tuple[str, str]]]:
    """One row for each input file, kept or not, as Parquet; and the files counted by status and reason. Null where unknown."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    columns: dict[str, tuple[Any, Callable[[Row], Any]]] = {
        "path": (pa.string(), lambda row: row.path),
        "sha256": (pa.string(), lambda row: row.sha256),
        "dhash": (pa.string(), lambda row: None if row.dhash is None else f"{row.dhash:016x}"),
        "width": (pa.int32(), lambda row: row.width),
        "height": (pa.int32(), lambda row: row.height),
        "caption": (pa.string(), lambda row: row.caption),
        "language": (pa.string(), lambda row: row.language),
        "license": (pa.string(), lambda row: row.license),
        "source_url": (pa.string(), lambda row: row.source_url),
    }
    schema = [(name, kind) for name, (kind, _) in columns.items()]
    schema = pa.schema(schema[:5] + [(name, pa.string()) for name in ("status", "reason", "shard", "key")] + schema[5:])
    counts: Counter[tuple[str, str]] = Counter()
    buffer, index = io.BytesIO(), 0
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for chunk in chunks:
            rows = read_rows(store, chunk.rows_name)
            numbers = range(index, index + len(rows))
            index += len(rows)
            verdicts = [settled.status(number, row) for number, row in zip(numbers, rows, strict=True)]
            places = [settled.places.get(number, (None, None)) for number in numbers]
            counts.update((status, report.family(reason)) for status, reason in verdicts)
            table = {name: pa.array(list(map(value, rows)), kind) for name, (kind, value) in columns.items()}
            for position, pairs in enumerate((verdicts, places)):
                for part, name in enumerate((("status", "reason"), ("shard", "key"))[position]):
                    table[name] = pa.array([pair[part] for pair in pairs], pa.string())
            writer.write_table(pa.table(table).select(schema.names))
    return buffer.getvalue(), counts


# ---------------------------------------------------------------------------------------------------------------------
# the output folder


def refuse_other_shards(out: Store, record: dict[str, Any], *, overwrite: bool) -> None:
    """Raise ValueError unless `out` may be written: absent, without shards, of these same settings, or `overwrite`."""
    names = out.list()
    if "codes.json" in names:
        raise ValueError(f"--out {out} holds code shards (codes.json), which prepare does not replace: name another folder")
    if overwrite or not any(is_ours(name) for name in names) or out.exists(f"{PARTIAL}/{PUBLISH}"):
        return  # the last: killed while the files took their places
    way_out = "Name another --out, or add --overwrite to replace the shards there"
    try:
        there = json.loads(out.read(RECORD))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out {out} holds shards without a whole {RECORD}: of another tool, or of a broken run. {way_out}") from error
    changes = [f"{name}: {there.get(name)!r} there, {value!r} now" for name, value in record.items() if there.get(name) != value]
    if changes:
        raise ValueError(f"--out {out} holds shards of other settings ({'; '.join(changes)}). {way_out}")


def is_ours(name: str) -> bool:
    return bool(SHARD_NAME.fullmatch(name)) or name in (MANIFEST, RECORD, report.NAME)


def publish(out: Store, names: list[str]) -> None:
    """Replace the old files of `out` by the new ones. The record goes first and comes last: its absence tells.

    May be killed and called again: what has taken its place already is left there.
    """
    out.remove(RECORD)
    for name in out.list():
        if is_ours(name) and name not in names:
            out.remove(name)
    for name in names:
        if out.exists(f"{PARTIAL}/{name}"):
            out.move(f"{PARTIAL}/{name}", name)
    out.remove(PARTIAL)


# ---------------------------------------------------------------------------------------------------------------------
# the whole


@dataclass(frozen=True)
class Report:
    """What was done: files by (status, reason), pairs by shard, rows of caption tables without a picture."""

    counts: Counter[tuple[str, str]]
    shards: Counter[str]
    unmatched_rows: int

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
                lines.append(f"  {f'{status}: {reason}':<44} {count:>9,} {count / total:>7.1%}")
        for split in ("train", "val"):
            shards = sum(name.startswith(f"{split}-") for name in self.shards)
            lines.append(f"{split + ' pairs':<46} {self.pairs(split):>9,} in {shards} shard{'' if shards == 1 else 's'}")
        if self.unmatched_rows:
            lines.append(f"{'rows of captions without a picture':<46} {self.unmatched_rows:>9,}")
        return "\n".join(lines)


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
    work: Work | None = None,
    overwrite: bool = False,
) -> Report:
    """Turn the pictures of `source` into shards, a manifest and a report in `out`. The story of this file, top to bottom.

    `reader` is a name in READERS, or "auto"; `root` is where the paths in a table start. Raises FileNotFoundError or
    ValueError, with the way out, when the source is missing or holds no picture, when a table of captions cannot be
    read, or when `out` holds something else; WorkerDied when a worker was killed. Running again goes on where it stopped.
    """
    source, work = source if is_url(source) else Path(source), work or Work()
    leave_out = None if is_url(out) else Path(out)
    reader = choose_reader(source, reader, leave_out=leave_out)
    check_folders(source, out)
    need("pyarrow", extra="data")  # before the hours of work, not after
    settings = replace(settings, source=settings.source or name_of(source))
    store = open_store(out)
    aside = open_store(f"{str(out).rstrip('/')}/{PARTIAL}")
    record = {**asdict(settings), "folder": source_id(source, root), "reader": reader}
    refuse_other_shards(store, record, overwrite=overwrite)

    listing = READERS[reader](source, Options(style=settings.style, root=root, leave_out=leave_out))
    check_listing(listing, source, settings)
    if not aside.exists(PUBLISH):
        begin(aside, record, listing)
        with open_engine(work.engine, workers=work.workers, address=work.ray_address) as engine:
            make(aside, listing, settings, engine, record, progress=work.progress)
    names = json.loads(aside.read(PUBLISH))
    publish(store, names["files"])
    made = json.loads(store.read(RECORD))
    counts = Counter({(status, reason): count for status, reason, count in names["counts"]})
    if leave_out is not None:
        report.write_report(leave_out, opener=opener(listing))
    return Report(counts, Counter(made["shards"]), listing.unmatched)


def check_folders(source: Path | str, out: Path | str) -> None:
    if is_url(out) or is_url(source):
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if Path(out).resolve() == Path(source).resolve():
        raise ValueError(f"--out {out} is SOURCE itself: name another folder")


def check_listing(listing: Listing, source: Path | str, settings: Settings) -> None:
    if not listing.found:
        raise FileNotFoundError(f"no pictures found in {source}: see --reader for what can be read")
    if not settings.style and not all(one.style or one.problem for one in listing.found):
        raise ValueError(f"--style is needed: {source} does not say the style of every picture. Add --style engraving, or another tag")


def begin(aside: Store, record: dict[str, Any], listing: Listing) -> None:
    """Go on with the work that lies in `aside` when it is of these settings and files, else start afresh."""
    plan = json.dumps({"settings": record, "files": identity(listing)}).encode()
    if not aside.exists(PLAN) or aside.read(PLAN) != plan:
        aside.remove("")
        aside.write(PLAN, plan)


def identity(listing: Listing) -> str:
    """A hash of what the listing names: paths, words, and the sizes and times of the files on this disk."""
    digest = hashlib.sha256()
    for one in listing.found:
        digest.update(repr((one, listing.words.get(one.path))).encode("utf-8", "backslashreplace"))
        if one.where is None and not one.problem and not is_url(listing.base):
            path = Path(listing.base) / one.path
            beside = (path, path.with_suffix(".txt"), path.with_suffix(".json")) if one.beside else (path,)
            digest.update(repr([stamp(path) for path in beside]).encode())
    return digest.hexdigest()


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_size, there.st_mtime_ns


def chunks_of(listing: Listing, settings: Settings, aside: Store) -> list[Chunk]:
    """The files in tasks: small enough that a small collection shows progress and keeps several workers busy."""
    size = min(CHUNK_FILES, max(16, len(listing.found) // 64))
    return [
        Chunk(
            number,
            str(listing.base),
            [(one, listing.words.get(one.path, Words())) for one in listing.found[start : start + size]],
            settings,
            aside,
        )
        for number, start in enumerate(range(0, len(listing.found), size))
    ]


def make(aside: Store, listing: Listing, settings: Settings, engine: Engine, record: dict[str, Any], *, progress: bool) -> None:
    """Write everything that is to be published into `aside`, and last of all the list of it."""
    chunks = chunks_of(listing, settings, aside)
    there = set(aside.list())
    with Progress("measure", "file", len(listing.found), progress) as bar:
        bar.update(sum(len(chunk.entries) for chunk in chunks if chunk.rows_name in there))
        todo = [chunk for chunk in chunks if chunk.rows_name not in there]
        for number, counts in engine.run(measure_chunk, todo):
            bar.update(len(todo[number].entries), counts)

    columns = Columns.read(aside, chunks)
    settled = settle(columns, listing.found, settings)
    shards = shards_to_write(columns, settled, chunks, settings, aside)
    with Progress("write", "pair", len(settled.places), progress) as bar:
        bar.update(sum(len(shard.pieces) for shard in shards if shard.name in there))
        for _, pairs in engine.run(write_shard, [shard for shard in shards if shard.name not in there]):
            bar.update(pairs)

    table, counts = manifest(aside, chunks, settled)
    aside.write(MANIFEST, table)
    pairs = {shard.name: len(shard.pieces) for shard in shards}
    record = {"settings": record, "files": len(listing.found), "kept": sum(pairs.values()), "shards": pairs}
    aside.write(RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    names = {"files": [*pairs, MANIFEST, RECORD], "counts": [[*name, count] for name, count in sorted(counts.items())]}
    aside.write(PUBLISH, json.dumps(names).encode())


class Progress:
    """A bar with a rate, the time left, and the most frequent reasons so far."""

    def __init__(self, name: str, unit: str, total: int, shown: bool) -> None:
        self.bar = tqdm(total=total, desc=name, unit=unit, disable=None if shown else True)
        self.counts: Counter[str] = Counter()

    def update(self, count: int, counts: Iterable[str] = ()) -> None:
        self.counts.update(counts)
        if self.counts:
            self.bar.set_postfix_str(", ".join(f"{reason} {number:,}" for reason, number in self.counts.most_common(3)), refresh=False)
        self.bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def opener(listing: Listing) -> Callable[[str], bytes | None]:
    """Opens the original of a path in the manifest, for the report; None where it cannot be read."""
    places = {shown(one.path): one for one in listing.found if not one.problem}
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


def next_steps(out: str, made: Report) -> str:
    """What to look at, and the commands to paste after this one."""
    data = "data.train=" + shlex.quote(f"{out}/train-*.tar")
    if made.pairs("val"):
        data += " data.val=" + shlex.quote(f"{out}/val-*.tar")
    look = "" if is_url(out) else f"Look at {out}/{report.NAME} in a browser: it shows what was kept, what was not, and why.\n"
    return (
        f"{look}Next:\n"
        f"  python -m data_tools.inspect {shlex.quote(out)} --verify --sheet sheet.png\n"
        f"  python train.py --config configs/engraving-cpu.yaml {data} out=runs/mine\n"
        f"  python sample.py --checkpoint runs/mine --seed 0"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    default = Settings(style="any")
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.prepare",
        description="Pictures as they come -> clean, captioned image shards.",
        epilog="In a plain folder, captions come from NAME.txt or NAME.json beside NAME.jpg, from metadata.csv, metadata.jsonl or "
        "captions.csv in the folder (file_name, caption), or from file names that read like words, in this order. "
        "A run that was killed goes on when the same command is given again.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder of pictures, classes, books or tars; a table; a data set's id; an address like s3://…")
    add("--style", default="", help="the style of all, a tag: engraving, etching; with --reader classes, the class to take")
    add("--out", required=True, help="the folder (or address) for the shards, the manifest and the report")
    add("--reader", default="auto", metavar="NAME", help=f"how to read SOURCE: auto, {', '.join(READERS)} (%(default)s)")
    add("--root", type=Path, metavar="DIR", help="where the paths in a table start (its own folder)")
    add("--side", type=int, default=default.side, help="pixels of the short side (%(default)s)")
    add("--val", type=float, default=default.val, help="share for validation, by whole folders or books (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of the split and the order (%(default)s)")
    add("--shard-size", type=int, default=default.shard_size, help="pairs in a shard (%(default)s)")
    add("--min-side", type=int, default=default.min_side, help="reject a shorter side, in pixels (%(default)s)")
    add("--max-aspect", type=float, default=default.max_aspect, help="reject a longer shape (%(default)s)")
    add("--no-clean", action="store_false", dest="clean", help="take pictures and captions as they are, save size, blanks, duplicates")
    add("--keep-ambiguous", action="store_true", help="keep what may not belong, labelled in its JSON")
    add("--clip", default="", metavar="NAME", help="doubt the medium by open_clip: ViT-B-32:laion2b_s34b_b79k, hf-hub:ID, a folder")
    add("--register", default=default.register, help="the register the captions are written in (%(default)s)")
    add("--license", default="", metavar="TEXT", help="the licence of pictures that name none of their own")
    add("--source", default="", metavar="NAME", dest="name", help="the collection's name (the folder's)")
    add("--format", default=default.format, help="of the pictures: webp, jpg (quicker, larger) or png (lossless) (%(default)s)")
    add("--allow-missing-captions", action="store_true", help="keep pictures without a caption")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s); the output is the same for any number")
    add("--engine", default="local", metavar="NAME", help=f"{' or '.join(ENGINES)} (%(default)s): where the tasks run")
    add("--ray-address", default="", metavar="HOST:PORT", help="of a Ray cluster; its nodes must reach SOURCE and --out")
    add("--overwrite", action="store_true", help="replace shards of other settings in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    options = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__ and name != "source"}
    work = Work(workers=args.workers, engine=args.engine, ray_address=args.ray_address, progress=True)
    try:
        settings = Settings(source=args.name, **options)
        made = prepare(args.source, args.out, settings, reader=args.reader, root=args.root, work=work, overwrite=args.overwrite)
    except (ValueError, OSError, ImportError, WorkerDied) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(made.table())
    if not made.kept:
        print(f"prepare: no picture was kept; {args.out}/{MANIFEST} has the reason of each", file=sys.stderr)
        return 1
    print(next_steps(args.out.rstrip("/"), made))
    return 0


if __name__ == "__main__":
    sys.exit(main())

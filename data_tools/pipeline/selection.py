"""Selection: the whole collection -> which files are kept, and their split and shard.

Duplicates, the split by groups and the order depend on all files. They are computed from the measured rows; no picture is
decoded here.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from posixpath import dirname

import numpy as np

from data_tools.images.duplicates import alike_pairs, clusters, joined
from data_tools.images.line_art_duplicates import Sketch, look_the_same
from data_tools.pipeline.chunks import AMBIGUOUS, KEPT, REJECTED, FileResult, Settings, data_name, read_rows, rows_name
from data_tools.pipeline.disk import DiskDict
from data_tools.pipeline.shard_writer import Piece, Shard
from data_tools.pipeline.storage_backends import Store
from data_tools.pipeline.tasks import Tasks
from data_tools.readers import Found, shown

SIMILAR_DISTANCE = 72  # of 256 bits: not duplicates, but too similar to be in different splits


@dataclass
class Columns:
    """The data of every file that are kept in memory, in the order of the listing: about a hundred bytes each."""

    state: np.ndarray
    """uint8 (N,): 0 kept, 1 ambiguous, 2 rejected."""
    hashed: np.ndarray
    """bool (N,): whether it has hashes, that is, was decoded."""
    sha256: np.ndarray
    """(N,) of 32 bytes each."""
    coarse: np.ndarray
    """uint64 (N,)."""
    fine: np.ndarray
    """uint64 (N, 4)."""
    area: np.ndarray
    """int64 (N,): pixels of the original."""
    captioned: np.ndarray
    """bool (N,)."""
    place: np.ndarray
    """int64 (N, 4): chunk, offset, bytes of the picture, bytes of the JSON."""
    sketches: DiskDict = field(default_factory=DiskDict)
    """The sketches of drawings on plain paper, by the file's number as text, on disk."""
    groups: DiskDict = field(default_factory=DiskDict)
    """The groups that the files' words name, in the same way."""

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

    def set(self, index: int, row: FileResult, chunk: int) -> None:
        self.state[index] = STATES.index(row.status)
        self.captioned[index] = bool(row.caption)
        if row.group:
            self.groups[str(index)] = row.group
        self.place[index] = chunk, row.start, row.image_bytes, row.json_bytes
        if row.dhash is not None and row.sha256 is not None:
            self.hashed[index] = True
            self.sha256[index] = np.void(bytes.fromhex(row.sha256))
            self.coarse[index], self.fine[index] = row.dhash, row.fine
            self.area[index] = (row.width or 0) * (row.height or 0)
            if row.sketch:
                self.sketches[str(index)] = Sketch(zlib.decompress(base64.b64decode(row.sketch)), row.aspect)

    def alike(self, among: np.ndarray, settings: Settings, **distance: int) -> np.ndarray:
        """Pairs (P, 2) of files, first < second, that look the same, or are identical if `settings` ask only for that."""
        if settings.duplicates == "exact":
            hashes = np.ascontiguousarray(self.sha256[among]).view(np.uint64).reshape(-1, 4)
            _, first, which = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
            pairs = np.stack([among[first[which.reshape(-1)]], among], 1)
            return pairs[pairs[:, 0] < pairs[:, 1]]
        pairs = alike_pairs(self.coarse, self.fine, among=among, **distance)
        return pairs[[self.look_the_same(one, other) for one, other in pairs.tolist()]] if len(pairs) else pairs

    def look_the_same(self, one: int, other: int) -> bool:
        """Whether two files with nearly the same hashes look the same."""
        if self.sha256[one] == self.sha256[other]:
            return True
        mine, its = (self.sketches.get(str(index)) for index in (one, other))
        return mine is None or its is None or look_the_same(mine, its)


STATES = (KEPT, AMBIGUOUS, REJECTED)


@dataclass
class Settled:
    """The decisions on each file that depend on the others."""

    cause: np.ndarray
    """uint8 (N,): an index into CAUSES; 0 if the file's own verdict stands."""
    like: np.ndarray
    """int64 (N,): the file named in the cause."""
    turn: np.ndarray
    """int64 (N,): its position in its split, -1 if it is not written."""
    val: np.ndarray
    """bool (N,): whether it is in the validation split."""
    order: dict[str, np.ndarray]
    """{split: int64 (n,)}: the files in writing order."""
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
        """(status, reason) of a file: its `own`, or that from its similarity to another."""
        if not self.cause[index]:
            return own
        return REJECTED, CAUSES[self.cause[index]].format(like=shown(found[self.like[index]].path))

    def place(self, index: int) -> tuple[str | None, str | None]:
        """(shard, key), or (None, None) if the file is not written."""
        turn, split = int(self.turn[index]), "val" if self.val[index] else "train"
        return (None, None) if turn < 0 else (shard_name(split, turn // self.shard_size), f"{split}-{turn:06d}")


CAUSES = ("", "exact duplicate", "thumbnail of {like}", "near duplicate of {like}", "too like {like} in the training split")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def settle(columns: Columns, found: Sequence[Found], settings: Settings) -> Settled:
    """Reject duplicates, draw the split, and assign every kept picture its shard and position."""
    settled = Settled.begin(len(columns.state), settings)
    find_duplicates(columns, settled, settings)
    limit = 1 if settings.keep_ambiguous else 0
    kept = np.flatnonzero((columns.state <= limit) & (settled.cause == 0))
    settled.val[kept] = split_by_group(columns, found, kept, settings)
    for index, near in similar_across_splits(columns, kept, settled.val, settings):
        settled.reject(index, "too like {like} in the training split", near)
    kept = kept[settled.cause[kept] == 0]
    for split, part in (("train", kept[~settled.val[kept]]), ("val", kept[settled.val[kept]])):
        settled.order[split] = shuffled(columns, part, settings)
        settled.turn[settled.order[split]] = np.arange(len(part))
    return settled


def find_duplicates(columns: Columns, settled: Settled, settings: Settings) -> None:
    """Reject all but the best of each cluster of pictures that look the same.

    The best is the one with a caption, then with the most pixels, then the first. Its own verdict stands, and duplicates
    of a rejected picture are rejected too. Files rejected for other reasons keep their reason.
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
    """A number in [0, 2**64) determined by the seed, a purpose and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/".encode() + name).digest()[:8], "big")


def drawn(settings: Settings, purpose: str, names: Iterable[bytes], count: int) -> np.ndarray:
    """uint64 (count,): the number drawn for each name."""
    return np.fromiter((draw(settings.seed, purpose, name) for name in names), np.uint64, count)


def sha_name(columns: Columns, index: int) -> bytes:
    return bytes(columns.sha256[index]).hex().encode()


def folder_of(one: Found) -> str:
    """The group given by the reader, else the folder; "" if it is outside any folder."""
    return dirname(one.path) if one.group is None else one.group


def are_several(names: Iterable[str]) -> bool:
    first = next(names := iter(names), "")
    return any(name != first for name in names)


def split_by_group(columns: Columns, found: Sequence[Found], kept: np.ndarray, settings: Settings) -> np.ndarray:
    """bool (len(kept),): which of the kept files are for validation, whole groups together.

    A group is what the reader gives (a book, an object), else a folder, if there are several. What a picture's words name (an object, an
    artist) is not divided either: groups that share such a name are one, unless that joins nearly all of them. A picture outside any group
    is its own. With `val_by` picture, every picture is its own group. Each group draws a number from the seed, so files added later do not
    move others to another split. Validation gets at least one group and at most half of the pictures.
    """
    if settings.val_by == "picture":
        return for_validation((b"sha256/" + sha_name(columns, index) for index in kept), len(kept), settings)
    several = are_several(name for index in kept if (name := folder_of(found[index])))

    def keys(index: int, named: str = "") -> list[bytes]:
        names = [folder_of(found[index]) if several else "", named]
        return [b"folder/" + shown(name).encode() for name in names if name] or [b"sha256/" + sha_name(columns, index)]

    if len(columns.groups) and are_several(columns.groups.get(str(index), "") for index in kept):  # not one artist's folder
        group = joined(keys(index, name) for index in kept if (name := columns.groups.get(str(index))))
        chosen = for_validation((group(keys(index, columns.groups.get(str(index), ""))[0]) for index in kept), len(kept), settings)
        if chosen.any():
            return chosen
    return for_validation((keys(index)[0] for index in kept), len(kept), settings)


def for_validation(names: Iterable[bytes], count: int, settings: Settings) -> np.ndarray:
    """bool (count,): the pictures of the groups with the smallest numbers, up to the share for validation.

    `names`: the group of each picture.
    """
    numbers, which, sizes = np.unique(drawn(settings, "split", names, count), return_inverse=True, return_counts=True)
    chosen, taken = np.zeros(len(numbers), bool), 0
    for place, (number, size) in enumerate(zip(numbers, sizes, strict=True)):
        if int(number) >= settings.val * 2**64 and (taken or not settings.val):
            break
        if 2 * (taken + size) <= count:
            chosen[place], taken = True, taken + size
    return chosen[which]


def similar_across_splits(columns: Columns, kept: np.ndarray, val: np.ndarray, settings: Settings) -> Iterator[tuple[int, int]]:
    """(validation picture, training picture) pairs too similar for a fair test; each validation picture once."""
    seen = set()
    for one, other in columns.alike(kept, settings, fine_distance=SIMILAR_DISTANCE).tolist():
        if not val[one]:
            one, other = other, one
        if val[one] and not val[other] and one not in seen:
            seen.add(one)
            yield one, other


def shuffled(columns: Columns, part: np.ndarray, settings: Settings) -> np.ndarray:
    """The files of a split in writing order, which depends only on the seed and on each picture."""
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

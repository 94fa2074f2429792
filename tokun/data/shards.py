"""Shards: WebDataset tars, written atomically and read by random access through an index of their members (offset and size), without
unpacking. Knows tar files, keys and suffixes; knows no picture and no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tokun.data import tars
from tokun.utils.errors import BadSample, UserError
from tokun.utils.files import fsync, write_bytes

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
CODES_SUFFIX = "codes.npy"
TWICE = "ambiguous: its key is there twice"
SEVERAL = "ambiguous: several pictures under one key"
MOST_NAMED = 5  # keys listed per reason
MOST_READ = 20_000  # records of `some_records`
MOST_OPEN = 256  # shards that an index keeps open at once


class ShardIndex:
    """Random access to the samples of WebDataset tars. `skipped` counts unusable samples by reason; `named` has the first keys of the
    ambiguous ones.

    A sample is the files that share a key (`key_and_suffix`). It has every suffix of `need` and one of `one_of`; only these are indexed. A
    key that has a suffix twice, or several of `one_of`, is ambiguous and skipped. Samples are in the order of the shards and, within a
    shard, of their first file. The index is a few arrays, some tens of bytes a sample.
    `cache_file` names a cache file for the next opening. It is used while it is intact and all shards have the same size and time, and
    rewritten otherwise.
    """

    def __init__(
        self, paths: Sequence[Path], *, need: Sequence[str] = ("json",), one_of: Sequence[str] = (), cache_file: Path | None = None
    ):
        self.paths = [Path(p) for p in paths]
        self._asked = (list(need), list(one_of))
        self._columns = {suffix: column for column, suffix in enumerate(dict.fromkeys((*need, *one_of)))}
        self._slots: list[_OpenShard | None] = [None] * MOST_OPEN
        table = _open_table(self.paths, need, one_of, cache_file)
        self._shard, self._offset, self._size, self._key_end, self._keys = table.shard, table.offset, table.size, table.key_end, table.keys
        self.skipped: Counter[str] = Counter(table.skipped)
        self.named = {reason: list(keys) for reason, keys in table.named.items()}

    def usable(self) -> ShardIndex:
        """Itself. Raises UserError, with what was skipped, if it has no sample."""
        if not len(self):
            found, (need, one_of) = ", ".join(map(str, self.paths[:3])), self._asked
            raise UserError(
                f"no usable sample in {found}: each needs KEY.{'/'.join([*need, '|'.join(one_of)])}. Skipped: "
                f"{self.skipped_summary() or 'nothing'}"
            )
        return self

    def __len__(self) -> int:
        return len(self._shard)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slots": [None] * MOST_OPEN}  # another process opens its own

    def skipped_summary(self) -> str:
        """Counts of skipped samples by reason, with keys of the ambiguous ones; "" for none."""
        named = {reason: f" ({', '.join(keys)}{', …' if self.skipped[reason] > len(keys) else ''})" for reason, keys in self.named.items()}
        return "; ".join(f"{count} {reason}{named.get(reason, '')}" for reason, count in self.skipped.items())

    def stamp(self) -> bytes:
        """Identifies the index: differs for other shards, changed shards or other suffixes."""
        return stamp_of(self.paths, *self._asked)

    def key(self, index: int) -> str:
        index = range(len(self))[index]
        start = self._key_end.item(index - 1) if index else 0
        return self._keys[start : self._key_end.item(index)].tobytes().decode(*tars.NAMES)

    def read(self, index: int, suffix: str) -> bytes:
        """The bytes of one file of sample `index`. Raises OSError if the shard has become shorter."""
        column, number = self._columns[suffix], self._shard.item(index)
        offset, size = self._offset.item(index, column), self._size.item(index, column)
        if offset < 0:
            raise KeyError(f"{self.key(index)} has no {suffix}")
        shard = self._open(number)
        data = os.pread(shard.descriptor, size, offset)
        if len(data) != size:
            raise OSError(f"{self.paths[number]} ends before {self.key(index)}.{suffix}")
        return data

    def _open(self, number: int) -> _OpenShard:
        """The opened shard, in the slot shared by every MOST_OPENth shard.
        Needs no lock: a replaced shard is closed when its last reader is done."""
        shard = self._slots[number % MOST_OPEN]
        if shard is None or shard.number != number:
            shard = self._slots[number % MOST_OPEN] = _OpenShard(number, self.paths[number])
        return shard

    def read_json(self, index: int) -> dict[str, Any]:
        """The record of sample `index`. Raises BadSample if it is not a JSON object, OSError as `read` does."""
        try:
            record = json.loads(self.read(index, "json"))
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{self.key(index)}.json is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(f"{self.key(index)}.json is not a JSON object")
        return record

    def some_records(self) -> Iterator[dict[str, Any] | None]:
        """The records of an even subsample, at most `MOST_READ`; None for one that cannot be read."""
        for i in range(0, len(self), max(1, -(-len(self) // MOST_READ))):
            try:
                yield self.read_json(i)
            except (OSError, BadSample):
                yield None

    def image_suffix(self, index: int) -> str:
        return next(s for s in IMAGE_SUFFIXES if s in self._columns and self._offset.item(index, self._columns[s]) >= 0)


class _OpenShard:
    def __init__(self, number: int, path: Path):
        self.number, self.descriptor = number, os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if "descriptor" in self.__dict__:
            close(self.descriptor)


@dataclass(frozen=True)
class _Table:
    """Offsets and sizes of n samples with S suffixes."""

    shard: np.ndarray  # (n,) int32
    offset: np.ndarray  # (n, S) int64, -1 for a missing file
    size: np.ndarray  # (n, S) int64
    key_end: np.ndarray  # (n,) int64: the end of each key in `keys`
    keys: np.ndarray  # uint8
    skipped: dict[str, int]
    named: dict[str, list[str]]  # the first ambiguous keys, with their shards, by reason


def _open_table(paths: Sequence[Path], need: Sequence[str], one_of: Sequence[str], cache_file: Path | None) -> _Table:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} does not exist")
    if cache_file is None:
        return _scan_all(paths, need, one_of)
    stamp = stamp_of(paths, need, one_of)
    arrays = load_arrays(cache_file, stamp, len(fields(_Table)) - 1)
    if arrays is not None:
        shard, offset, size, key_end, keys, told = arrays
        skipped, named = json.loads(told.tobytes())
        return _Table(shard, offset, size, key_end, keys, skipped, named)
    table = _scan_all(paths, need, one_of)
    with contextlib.suppress(OSError):  # read-only folder or full disk: the next opening scans again
        *columns, skipped, named = vars(table).values()
        save_arrays(cache_file, stamp, [*columns, np.frombuffer(json.dumps([skipped, named]).encode(), np.uint8)])
    return table


def stamp_of(paths: Sequence[Path], need: Sequence[str] = (), one_of: Sequence[str] = ()) -> bytes:
    """The inputs of an index: the shards, their sizes and times, and the required suffixes."""
    states = [path.stat() for path in paths]
    shards = [(os.path.abspath(path), state.st_size, state.st_mtime_ns) for path, state in zip(paths, states, strict=True)]
    return json.dumps([3, list(need), list(one_of), shards]).encode()  # 3: version of the layout


def save_arrays(path: Path, stamp: bytes, arrays: Sequence[np.ndarray]) -> None:
    """Write the arrays, preceded by a digest of them and of `stamp`, atomically."""
    buffer = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(buffer, array, allow_pickle=False)
    write_bytes(path, hashlib.sha256(stamp + buffer.getbuffer()).digest(), buffer.getbuffer())


def load_arrays(path: Path, stamp: bytes, count: int) -> list[np.ndarray] | None:
    """What `save_arrays` wrote with the same `stamp`; None if it is missing, damaged or has another."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest = hashlib.sha256(stamp)
    digest.update(memoryview(content)[32:])
    if content[:32] != digest.digest():
        return None
    buffer = io.BytesIO(content)
    buffer.seek(32)
    return [np.lib.format.read_array(buffer, allow_pickle=False) for _ in range(count)]


MADE = "Shards are made from pictures by `python -m data_tools.prepare PICTURES --out shards/`"


def without_shards(folder: Path) -> str:
    """The message for a folder that holds no shards."""
    if _kept_nothing(folder):
        told = next((name for name in ("report.html", "manifest.parquet") if (folder / name).is_file()), "prepare.json")
        return f"no shards (*.tar) in {folder}: prepare kept no picture there, and {folder}/{told} says why"
    return f"no shards (*.tar) in {folder}. {MADE}"


def _kept_nothing(folder: Path) -> bool:
    return (folder / "prepare.json").is_file() and not any(folder.glob("*.tar"))


def expand_shards(pattern: str) -> list[Path]:
    """'a/train-*.tar,b/x.tar' or 'a/train-{00000..00007}.tar' or a folder of tars -> sorted existing paths.

    An existing folder is taken literally: brackets, commas and braces in its name are no pattern. ~ is the home folder.
    Raises FileNotFoundError naming the part that matches nothing.
    """
    pattern = os.path.expanduser(pattern)
    whole = Path(pattern)
    if pattern.strip() and (whole.is_dir() or whole.parent.is_dir()):
        named = sorted(whole.glob("*.tar")) if whole.is_dir() else [whole] if whole.is_file() else sorted(whole.parent.glob(whole.name))
        if named:
            return named
    paths: list[Path] = []
    for part in filter(None, (os.path.expanduser(p.strip()) for p in _split_commas(pattern))):
        if Path(part).is_dir():
            found = sorted(Path(part).glob("*.tar"))
        else:
            found = []
            for one in _expand_braces(part):
                hits = [Path(one)] if Path(one).is_file() else sorted(map(Path, glob(one)))  # a file name may contain brackets
                if not hits:
                    folder = Path(one).parent
                    if _kept_nothing(folder):
                        raise FileNotFoundError(without_shards(folder))
                    looked = f"{one} does not exist (from {pattern!r}, looked in {folder.resolve()})"
                    raise FileNotFoundError(looked if one.endswith(".jsonl") else f"shard {looked}. {MADE}")
                found += hits
        if not found:
            raise FileNotFoundError(without_shards(Path(part)))
        paths += found
    if not paths:
        raise FileNotFoundError(f"no shards are named. {MADE}")
    return paths


def _scan_all(paths: Sequence[Path], need: Sequence[str], one_of: Sequence[str]) -> _Table:
    suffixes = list(dict.fromkeys((*need, *one_of)))
    skipped: Counter[str] = Counter()
    named: dict[str, list[str]] = {}
    shards, places, lengths, keys = [], [np.empty((0, len(suffixes), 2), np.int64)], [], []
    with ThreadPoolExecutor(2) as pool:  # one thread reads while the other counts
        scans = pool.map(lambda path: _scan(path, suffixes, one_of), paths)
    for number, (own, where, ambiguous, broken) in enumerate(scans):
        skipped.update(broken)
        there = where[:, :, 0] >= 0
        whole = there[:, [suffixes.index(s) for s in need]].all(1)
        if one_of:
            whole &= there[:, [suffixes.index(s) for s in one_of]].any(1)
        if ambiguous:
            for reason, rows in ambiguous.items():
                skipped[reason] += len(rows)
                first = named.setdefault(reason, [])
                first += [f"{paths[number].name}/{shown_key(own[row])}" for row in rows[: MOST_NAMED - len(first)]]
            where = np.delete(where, left := [row for rows in ambiguous.values() for row in rows], 0)
            whole, gone = np.delete(whole, left), set(left)
            own = [key for row, key in enumerate(own) if row not in gone]
        if not whole.all():
            skipped["incomplete sample"] += int((~whole).sum())
        encoded = [key.encode(*tars.NAMES) for key, usable in zip(own, np.asarray(whole), strict=True) if usable]
        shards.append(np.full(len(encoded), number, np.int32))
        places.append(where[whole])
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        keys.append(b"".join(encoded))
    offset, size = np.moveaxis(np.concatenate(places), 2, 0).copy()
    return _Table(
        np.concatenate([np.empty(0, np.int32), *shards]), offset, size, np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths])),
        np.frombuffer(b"".join(keys), np.uint8), dict(skipped), named,
    )  # fmt: skip


def shown_key(key: str) -> str:
    return key.encode(*tars.NAMES).decode("utf-8", "backslashreplace")


def key_and_suffix(name: str) -> tuple[str, str]:
    """A member's name -> its sample's key, and its suffix in lower case: what follows the first dot after the last slash.

    'set.v1/0000.mask.PNG' -> ('set.v1/0000', 'mask.png'): a folder's dots belong to the key, as in WebDataset.
    """
    name = name.removeprefix("./")
    key, _, suffix = name[(slash := name.rfind("/") + 1) :].partition(".")
    return name[:slash] + key, suffix.lower()


@dataclass(frozen=True)
class Grouped:
    """The files of one shard, by their numbers, as samples in the order of their first files."""

    keys: list[str]
    files: dict[str, dict[int, int]]
    """suffix -> {sample: its first file of that suffix}."""
    ambiguous: dict[str, list[int]]
    """reason -> the samples to refuse, each once."""


def group(names: Sequence[str], suffixes: Sequence[str], one_of: Sequence[str], *, others: bool = False) -> Grouped:
    """Which files are one sample, and which samples are ambiguous, wherever their files lie: with one of `suffixes` twice, or several of
    `one_of`.

    Files with other suffixes are left out, unless `others`.
    """
    rows: dict[str, int] = {}
    files: dict[str, dict[int, int]] = {suffix: {} for suffix in suffixes}
    twice: set[int] = set()
    for number, name in enumerate(names):
        key, suffix = key_and_suffix(name)
        row = rows.setdefault(key, len(rows))
        of_suffix = files.setdefault(suffix, {}) if others else files.get(suffix)
        if of_suffix is not None and of_suffix.setdefault(row, number) != number and suffix in suffixes:
            twice.add(row)
    seen, several = set[int](), set[int]()
    for suffix in one_of:
        several |= seen & files[suffix].keys()
        seen |= files[suffix].keys()
    found = ((TWICE, twice), (SEVERAL, several - twice))
    return Grouped(list(rows), files, {reason: sorted(samples) for reason, samples in found if samples})


def _scan(path: Path, suffixes: Sequence[str], one_of: Sequence[str]) -> tuple[list[str], np.ndarray, dict[str, list[int]], Counter[str]]:
    """The keys of one shard, (n, S, 2) offsets and sizes of their files (-1 for a missing suffix), the ambiguous rows by reason,
    and the counts of what was skipped."""
    skipped: Counter[str] = Counter()
    names, places = tars.files(path, skipped)
    found = group(names, suffixes, one_of)
    where = np.full((len(found.keys), len(suffixes), 2), -1)
    for column, of_suffix in enumerate(found.files.values()):
        where[list(of_suffix), column] = places[list(of_suffix.values())]
    return found.keys, where, found.ambiguous, skipped


def _split_commas(pattern: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for char in pattern:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [*parts, current]


def _expand_braces(pattern: str) -> list[str]:
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inner, _, tail = rest.partition("}")
    first, dots, last = inner.partition("..")
    numbers = dots and first.isdecimal() and last.isdecimal()
    choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)] if numbers else inner.split(",")
    return [head + choice + end for choice in choices for end in _expand_braces(tail)]


def write_samples(tar: BinaryIO, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write the files of {"__key__": key, suffix: bytes, …} into an open tar, and its end mark. Returns the number of samples."""
    count = 0
    for sample in samples:
        for suffix, payload in sample.items():
            if suffix != "__key__":
                tars.write_member(tar, f"{sample['__key__']}.{suffix}", payload)
        count += 1
    tars.write_end(tar)
    return count


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]], beside: Callable[[], dict[str, bytes]] = dict) -> int:
    """Write {"__key__": key, suffix: bytes, …} to a temporary tar and rename it: atomic, and the same bytes each time.

    `beside` is called after the samples are written and gives further files by the suffix that replaces .tar; they exist before the tar
    does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as tar:
        count = write_samples(tar, samples)
    for suffix, payload in beside().items():
        path.with_suffix(suffix).write_bytes(payload)
    try:
        fsync(aside)
        os.replace(aside, path)
    except FileNotFoundError as error:
        raise UserError(
            f"{aside} was removed: another process seems to write to {path.parent} too. "
            "Wait for it to finish or stop it, then run this again"
        ) from error
    return count

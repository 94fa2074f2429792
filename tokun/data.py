"""Shards in, batches out. Knows tar files, pictures, captions and the order of samples; knows no model.

The order is a pure function of (seed, epoch, position): position p of the endless stream is sample
`permutation(seed, epoch)[p mod n]` with epoch = p // n, and step s of a run reads positions s*B … s*B + B - 1, of which
rank r takes its contiguous share. So a run resumes by its step number alone, and any number of processes sees the same
global batches. What is random about a sample (crop, task, dropped tags) is drawn from a generator keyed by its position.

Shards are read at random through an index of their members (offset and size), without unpacking them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import queue
import re
import sys
import tarfile
import tempfile
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokun import framing, tars

T = TypeVar("T")
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
CODES_SUFFIX = "codes.npy"
# the header that numpy writes before uint16 (views, N)
CODES_HEADER = re.compile(rb"\x93NUMPY\x01\x00..\{'descr': '<u2', 'fortran_order': False, 'shape': \(([1-9]\d{0,6}), ([1-9]\d{0,6})\), \} *\n", re.DOTALL)
ENCODED = 2**16  # texts whose ids are remembered: some tens of MB
MOST_OPEN = 256  # shards that an index keeps open at once


# --- shards ---------------------------------------------------------------------------------------------------------


class ShardIndex:
    """Random access to the samples of WebDataset tars. `skipped` counts what could not be used, by reason.

    A sample is what shares a key: it has every suffix of `need` and one of `one_of`; only these are indexed. Samples stand in the
    order of the shards and, in a shard, of their first file. The index is a few arrays, some tens of bytes a sample.
    `kept` names a file that keeps it for the next opening: used while it is whole and all shards have the size and time they had
    then, written anew otherwise.
    """

    def __init__(
        self, paths: Sequence[Path], *, need: Sequence[str] = ("json",), one_of: Sequence[str] = (), may_be_empty: bool = False,
        kept: Path | None = None,
    ):  # fmt: skip
        self.paths = [Path(p) for p in paths]
        self._asked = (list(need), list(one_of))
        self._columns = {suffix: column for column, suffix in enumerate(dict.fromkeys((*need, *one_of)))}
        self._slots: list[_OpenShard | None] = [None] * MOST_OPEN
        table = _open_table(self.paths, need, one_of, kept)
        self._shard, self._offset, self._size, self._key_end, self._keys = table.shard, table.offset, table.size, table.key_end, table.keys
        self.skipped: Counter[str] = Counter(table.skipped)
        if not len(self) and not may_be_empty:
            found = ", ".join(map(str, self.paths[:3]))
            raise ValueError(
                f"no usable sample in {found}: each needs KEY.{'/'.join([*need, '|'.join(one_of)])}. Skipped: {dict(self.skipped)}"
            )

    def __len__(self) -> int:
        return len(self._shard)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slots": [None] * MOST_OPEN}  # another process opens its own

    def stamp(self) -> bytes:
        """Of what it is an index: another for other shards, for shards that have changed, and for other suffixes."""
        return _stamp(self.paths, *self._asked)

    def key(self, index: int) -> str:
        index = range(len(self))[index]
        start = self._key_end.item(index - 1) if index else 0
        return self._keys[start : self._key_end.item(index)].tobytes().decode(*tars.NAMES)

    def read(self, index: int, suffix: str) -> bytes:
        """The bytes of one file of sample `index`. Raises OSError when the shard is shorter than it was."""
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
        """The shard, opened, in the slot that it shares with every MOST_OPENth: no lock, and one that gives way to another is
        closed when its last reader lets go of it."""
        shard = self._slots[number % MOST_OPEN]
        if shard is None or shard.number != number:
            shard = self._slots[number % MOST_OPEN] = _OpenShard(number, self.paths[number])
        return shard

    def read_json(self, index: int) -> dict[str, Any]:
        record = json.loads(self.read(index, "json"))
        if not isinstance(record, dict):
            raise ValueError(f"{self.key(index)}.json is not a JSON object")
        return record

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
    """n samples, S suffixes: where each lies."""

    shard: np.ndarray  # (n,) int32
    offset: np.ndarray  # (n, S) int64, -1 where there is no such file
    size: np.ndarray  # (n, S) int64
    key_end: np.ndarray  # (n,) int64: where in `keys` a key ends, and the next begins
    keys: np.ndarray  # uint8
    skipped: dict[str, int]


def _open_table(paths: Sequence[Path], need: Sequence[str], one_of: Sequence[str], kept: Path | None) -> _Table:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} does not exist")
    if kept is None:
        return _scan_all(paths, need, one_of)
    of = _stamp(paths, need, one_of)
    arrays = _load_arrays(kept, of, len(fields(_Table)))
    if arrays is not None:
        return _Table(*arrays[:-1], json.loads(arrays[-1].tobytes()))
    table = _scan_all(paths, need, one_of)
    with contextlib.suppress(OSError):  # a place that cannot be written, a full disk: the next opening scans again
        *columns, skipped = vars(table).values()
        _save_arrays(kept, of, [*columns, np.frombuffer(json.dumps(skipped).encode(), np.uint8)])
    return table


def _stamp(paths: Sequence[Path], need: Sequence[str], one_of: Sequence[str]) -> bytes:
    """What an index is made of: the shards, their sizes and times, and what is asked of a sample."""
    states = [path.stat() for path in paths]
    shards = [(os.path.abspath(path), state.st_size, state.st_mtime_ns) for path, state in zip(paths, states, strict=True)]
    return json.dumps([1, list(need), list(one_of), shards]).encode()  # 1: this layout


def _save_arrays(kept: Path, of: bytes, arrays: Sequence[np.ndarray]) -> None:
    """Write a digest of what they are of and the arrays, and the arrays; whole or not at all."""
    buffer = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(buffer, array, allow_pickle=False)
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=kept.parent, prefix=f".{kept.name}.")  # a name of its own: processes may write at once
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # mkstemp's 0600 would keep it from others who go on with the run
            file.write(hashlib.sha256(of + buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())
        os.replace(aside, kept)
    except BaseException:
        os.unlink(aside)
        raise


def _load_arrays(kept: Path, of: bytes, count: int) -> list[np.ndarray] | None:
    """What `_save_arrays` wrote of the same; None where it is of others, damaged, or not there."""
    try:
        content = kept.read_bytes()
    except OSError:
        return None
    digest = hashlib.sha256(of)
    digest.update(memoryview(content)[32:])
    if content[:32] != digest.digest():
        return None
    buffer = io.BytesIO(content)
    buffer.seek(32)
    return [np.lib.format.read_array(buffer, allow_pickle=False) for _ in range(count)]


def expand_shards(pattern: str) -> list[Path]:
    """'a/train-*.tar,b/x.tar' or 'a/train-{00000..00007}.tar' or a folder of tars -> sorted existing paths.

    A folder that exists is a name, whatever it holds: brackets, commas and braces in it are no pattern. ~ is the home folder.
    Raises FileNotFoundError naming the part that matches nothing.
    """
    pattern = os.path.expanduser(pattern)
    whole = Path(pattern)
    if pattern.strip() and (whole.is_dir() or whole.parent.is_dir()):
        named = sorted(whole.glob("*.tar")) if whole.is_dir() else [whole] if whole.is_file() else sorted(whole.parent.glob(whole.name))
        if named:
            return named
    paths: list[Path] = []
    for part in filter(None, (p.strip() for p in _split_commas(pattern))):
        if Path(part).is_dir():
            found = sorted(Path(part).glob("*.tar"))
        else:
            found = []
            for one in _expand_braces(part):
                hits = [Path(one)] if Path(one).is_file() else sorted(map(Path, glob(one)))  # a name may hold brackets
                if not hits:
                    raise FileNotFoundError(
                        f"shard {one} does not exist (from {pattern!r}, looked in {Path(one).parent.resolve()}). "
                        "Set data.train and data.val to your shards, for example data.train='shards/train-*.tar'"
                    )
                found += hits
        if not found:
            raise FileNotFoundError(f"the folder {part} holds no .tar shards; make them with python -m data_tools.prepare")
        paths += found
    if not paths:
        raise FileNotFoundError("no shards are named. Set data.train, for example data.train='shards/train-*.tar'")
    return paths


def _scan_all(paths: Sequence[Path], need: Sequence[str], one_of: Sequence[str]) -> _Table:
    suffixes = list(dict.fromkeys((*need, *one_of)))
    skipped: Counter[str] = Counter()
    shards, places, lengths, keys = [], [np.empty((0, len(suffixes), 2), np.int64)], [], []
    with ThreadPoolExecutor(2) as pool:  # one reads while the other counts
        scans = pool.map(lambda path: _scan(path, suffixes), paths)
    for number, (own, where, broken) in enumerate(scans):
        skipped.update(broken)
        there = where[:, :, 0] >= 0
        whole = there[:, [suffixes.index(s) for s in need]].all(1)
        if one_of:
            whole &= there[:, [suffixes.index(s) for s in one_of]].any(1)
        if not whole.all():
            skipped["incomplete sample"] += int((~whole).sum())
        encoded = [key.encode(*tars.NAMES) for key, usable in zip(own, whole.tolist(), strict=True) if usable]
        shards.append(np.full(len(encoded), number, np.int32))
        places.append(where[whole])
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        keys.append(b"".join(encoded))
    offset, size = np.moveaxis(np.concatenate(places), 2, 0).copy()
    return _Table(
        np.concatenate([np.empty(0, np.int32), *shards]), offset, size, np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths])),
        np.frombuffer(b"".join(keys), np.uint8), dict(skipped),
    )  # fmt: skip


def _scan(path: Path, suffixes: Sequence[str]) -> tuple[list[str], np.ndarray, Counter[str]]:
    """The keys of one shard, (n, S, 2) where each has its files (offset and size, -1 where it has none of this suffix), and what was skipped."""
    skipped: Counter[str] = Counter()
    names, places = tars.files(path, skipped)
    rows: dict[str, int] = {}
    numbers: dict[str, dict[int, int]] = {suffix: {} for suffix in suffixes}  # suffix -> row -> number of the file
    for number, name in enumerate(names):
        key, _, suffix = name.removeprefix("./").partition(".")
        row = rows.setdefault(key, len(rows))
        if (of_suffix := numbers.get(suffix.lower())) is not None:
            of_suffix[row] = number
    where = np.full((len(rows), len(suffixes), 2), -1)
    for column, of_suffix in enumerate(numbers.values()):
        where[list(of_suffix), column] = places[list(of_suffix.values())]
    return list(rows), where, skipped


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
    choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)] if dots else inner.split(",")
    return [head + choice + end for choice in choices for end in _expand_braces(tail)]


# --- order ----------------------------------------------------------------------------------------------------------


class Order:
    """Which sample stands at which position of the endless, seeded stream."""

    def __init__(self, n: int, seed: int):
        assert n > 0
        self.n, self.seed = n, seed
        self._latest = (-1, np.empty(0, np.int64))  # epoch and permutation, replaced as one: threads may ask

    def __getitem__(self, position: int) -> int:
        epoch = position // self.n
        known, permutation = self._latest
        if epoch != known:
            permutation = rng_for(self.seed, epoch, stream=1).permutation(self.n)
            self._latest = (epoch, permutation)
        return int(permutation[position % self.n])


class _Key(np.random.bit_generator.ISeedSequence):
    """A key for Philox. Given as `key=`, numpy would first ask the system for a seed that it then drops."""

    def __init__(self, key: np.ndarray):
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.key


def rng_for(seed: int, position: int, *, stream: int = 0) -> np.random.Generator:
    """A generator that is a pure function of (seed, position, stream)."""
    # as uint64: numpy would make a list with a number above 2^63 an array of floats, and its streams one
    return np.random.Generator(np.random.Philox(_Key(np.array([(seed << 8 | stream) & (2**64 - 1), position], np.uint64))))


def positions_of(step: int, batch_size: int, rank: int, world: int) -> range:
    """The positions that rank `rank` reads at `step`: its contiguous share of the global batch."""
    share = batch_size // world
    first = step * batch_size + rank * share
    return range(first, first + share)


def prefetch(make: Callable[[int], T], start: int, *, depth: int = 2, burst: int = 1) -> Iterator[T]:
    """make(start), make(start + 1), …, computed ahead in one thread, `burst` at a time. An error inside reaches the reader in its place.

    What is small is best made many at a time: its code and data then lie in the processor's caches, which the training step takes for itself, and
    the two threads contend for Python's lock less often.
    """
    ready: queue.Queue[list[Any]] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        step = start
        while not stop.is_set():
            made: list[Any] = []
            try:
                for number in range(step, step + burst):
                    made.append(make(number))
            except Exception as error:  # handed to the reader, which raises it
                ready.put([*made, error])
                return
            ready.put(made)
            step += burst

    thread = threading.Thread(target=work, daemon=True, name="tokun-prefetch")
    thread.start()
    try:
        while True:
            for item in ready.get():
                if isinstance(item, Exception):
                    raise item
                yield item
    finally:
        stop.set()
        while thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.01)


# --- pictures -------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float]  # left, top, side of a square crop, in pixels of the picture; a negative side says mirrored
ONE_SQUARE: tuple[framing.Grid, ...] = ((1, 1),)  # without grids: pictures of image_size by image_size, seen as one code of so many pixels


def centre_box(width: int, height: int) -> Box:
    return framing.crop_box(width, height, ONE_SQUARE[0])[:3]


def random_box(width: int, height: int, scale: Sequence[float], rng: np.random.Generator) -> Box:
    """A square of side short / s at a random place, s uniform in `scale` (as if the short side were s times the crop)."""
    return framing.zoomed(framing.crop_box(width, height, ONE_SQUARE[0]), scale, rng, (width, height))[:3]


def view_boxes(
    width: int, height: int, views: int, scale: Sequence[float], rng: np.random.Generator, *, positions: str = "random", mirror: bool = False
) -> list[Box]:
    """View 0: the centre, as large as fits. The others: random crops of the whole picture, or at five positions. A negative side says mirrored."""
    frame = framing.crop_box(width, height, ONE_SQUARE[0])
    return [box[:3] for box in framing.views(frame, views, scale, rng, (width, height), positions=positions, mirror=mirror)]


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Cut a square box and resize it: uint8 (C, size, size); mirrored where its side is negative."""
    return framing.cut(image, (*box, abs(box[2])), (size, size))


decode_image = framing.decode


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape."""
    return torch.as_tensor(np.asarray(images)).float() / 127.5 - 1


@dataclass
class ImageSamples:
    """Pictures of image shards, decoded on demand; a broken one is counted and its successor stands in for it.

    Without `grids`, each is a square of image_size; with them, it is fitted (`fit`) to the grid nearest to its shape, of `downsample` pixels a code.
    """

    index: ShardIndex
    image_size: int
    channels: int
    cache_bytes: int = 0
    max_scale: float = 1.4
    grids: tuple[framing.Grid, ...] = ()
    downsample: int = 0
    fit: str = "auto"
    kept: Path | None = None  # a file that keeps the pictures' sizes
    _cache: dict[int, framing.Framed] = field(default_factory=dict)
    _cached_bytes: int = 0
    _broken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        assert not self.grids or self.downsample > 0
        if not self.grids:
            self.grids, self.downsample, self.fit = ONE_SQUARE, self.image_size, "crop"

    @classmethod
    def open(
        cls, pattern: str, *, image_size: int, channels: int, cache_gb: float = 0.0, max_scale: float = 1.4, kept: Path | None = None,
        grids: tuple[framing.Grid, ...] = (), downsample: int = 0, fit: str = "auto",
    ) -> ImageSamples:  # fmt: skip
        index = ShardIndex(expand_shards(pattern), need=(), one_of=IMAGE_SUFFIXES, kept=kept)
        sizes = kept.with_name(kept.name + ".sizes") if kept else None
        return cls(index, image_size, channels, int(cache_gb * 2**30), max_scale, grids, downsample, fit, sizes)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> bytes:
        return self.index.read(i, self.index.image_suffix(i))

    def framed(self, i: int, shape: int | None = None) -> framing.Framed:
        """Sample i and what its grid shows of it, reduced to at most max_scale times the grid's pixels; for grid number `shape` where one is named.

        Raises OSError / ValueError when it is broken.
        """
        if i in self._cache and shape is None:
            return self._cache[i]
        image = framing.decode(self.read(i), self.channels)
        grid = self.grids[framing.nearest_grid(*image.size, self.grids) if shape is None else shape]
        framed = framing.reduced(framing.fit_to(image, grid, self.downsample, self.fit), self.downsample, self.max_scale)
        size = framed.image.width * framed.image.height * self.channels
        if shape is None and self._cached_bytes + size <= self.cache_bytes:
            self._cache[i] = framed
            self._cached_bytes += size
        return framed

    def picture(self, i: int) -> Image.Image:
        """Sample i, its short side at most image_size * max_scale. Raises OSError / ValueError when it is broken."""
        return self.framed(i).image

    def whole(self, i: int) -> framing.Framed:
        """Like `framed`, passing over broken samples: they are counted, and the next whole one stands in, of the same grid where there is one."""
        several = len(self.grids) > 1
        for j in (j % len(self) for j in range(i, i + len(self))):
            if j in self._broken or (several and j != i and self.shapes[j] != self.shapes[i]):  # of i alone no other's size need be known
                continue
            try:
                return self.framed(j)
            except (OSError, ValueError):
                self._broken.add(j)
                self.index.skipped["broken picture"] = len(self._broken)
        for j in range(len(self) if several else 0):  # none of its grid is whole
            with contextlib.suppress(OSError, ValueError):
                return self.framed(j, max(0, int(self.shapes[i])))
        raise ValueError(f"no picture of {self.index.paths[0]} and its kin can be decoded")

    def whole_picture(self, i: int) -> Image.Image:
        return self.whole(i).image

    def cut(self, framed: framing.Framed, box: framing.Box) -> np.ndarray:
        """What a box shows, at the grid's size: uint8 (C, H, W)."""
        rows, columns = framed.grid
        return framing.cut(framed.image, box, (columns * self.downsample, rows * self.downsample), framed.paper)

    @cached_property
    def shapes(self) -> np.ndarray:
        """(n,) int16: the number of each picture's grid; -1 for those whose header cannot be read."""
        sizes = self.sizes
        known = {(w, h): framing.nearest_grid(w, h, self.grids) if w else -1 for w, h in np.unique(sizes, axis=0).tolist()}
        return np.fromiter((known[w, h] for w, h in sizes.tolist()), np.int16, len(sizes))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n, 2) int32: width and height of each picture, from its header; 0, 0 where it cannot be read. Kept beside the index: headers are read once."""
        of = self.index.stamp()
        if self.kept is not None and (known := _load_arrays(self.kept, of, 1)) is not None:
            return known[0]
        sizes = np.zeros((len(self), 2), np.int32)
        for i in tqdm(range(len(self)), desc="sizes of pictures", unit="picture", dynamic_ncols=True, leave=False, delay=2):
            with contextlib.suppress(OSError, ValueError):
                sizes[i] = framing.size_of(self.read(i))
        if self.kept is not None:
            with contextlib.suppress(OSError):  # as with the index
                _save_arrays(self.kept, of, [sizes])
        return sizes


class BucketOrder:
    """Which sample stands at which position of the endless, seeded stream when each batch has one shape only.

    The samples of a shape have an order of their own (`Order`), of which its batches read one after another, endlessly. An epoch has as many
    batches of each shape as its samples have filled up by then, in a shuffled order: over the epochs every picture comes equally often.
    All of it is a function of (seed, batch size, shapes, position).
    """

    def __init__(self, shapes: np.ndarray, seed: int, batch_size: int):
        self.seed, self.batch_size = seed, batch_size
        self.members = [np.flatnonzero(shapes == shape) for shape in range(int(shapes.max(initial=-1)) + 1)]
        self.members = [own for own in self.members if len(own)]
        if not self.members:
            raise ValueError("no picture's header can be read")
        self.counts = [len(own) for own in self.members]
        self.orders = [Order(n, seed + (number << 32)) for number, n in enumerate(self.counts)]
        self._latest: tuple[int, list[tuple[int, int]]] = (0, [])  # first step, (bucket, batch of it) of each of its steps

    def __getitem__(self, position: int) -> int:
        step, row = divmod(position, self.batch_size)
        bucket, batch = self._batch(step)
        return int(self.members[bucket][self.orders[bucket][batch * self.batch_size + row]])

    def _batch(self, step: int) -> tuple[int, int]:
        first, batches = self._latest  # replaced as one: threads may ask
        if not first <= step < first + len(batches):
            first, batches = self._epoch_of(step)
        return batches[step - first]

    def _epoch_of(self, step: int) -> tuple[int, list[tuple[int, int]]]:
        epoch = max(0, step * self.batch_size // sum(self.counts))  # not behind the one that is sought: batches are filled up no earlier
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        first = self._steps_before(epoch)
        batches = [(bucket, batch) for bucket in range(len(self.counts)) for batch in range(self._filled(bucket, epoch), self._filled(bucket, epoch + 1))]
        order = rng_for(self.seed, epoch, stream=5).permutation(len(batches))
        found = [batches[k] for k in order]
        self._latest = (first, found)
        return first, found

    def _filled(self, bucket: int, epoch: int) -> int:
        """Batches of a bucket before an epoch."""
        return epoch * self.counts[bucket] // self.batch_size

    def _steps_before(self, epoch: int) -> int:
        return sum(self._filled(bucket, epoch) for bucket in range(len(self.counts)))


class ImageBatches:
    """Random crops for the image tokenizer: step -> float (batch_size / world, C, H, W), all of one grid's size."""

    def __init__(
        self, samples: ImageSamples, *, batch_size: int, scale: Sequence[float], seed: int, rank: int = 0, world: int = 1, threads: int = 0
    ):
        check_batch(batch_size, world)
        self.samples, self.batch_size, self.scale, self.seed = samples, batch_size, scale, seed
        self.rank, self.world = rank, world
        self.order = Order(len(samples), seed) if len(samples.grids) == 1 else BucketOrder(samples.shapes, seed, batch_size)
        self.pool = ThreadPoolExecutor(threads) if threads > 0 else None

    def __call__(self, step: int) -> Tensor:
        items = [(position, self.order[position]) for position in self.positions(step)]
        crops = list(self.pool.map(self._item, items) if self.pool else map(self._item, items))
        return to_float(np.stack(crops))

    def positions(self, step: int) -> Sequence[int]:
        """The positions in the stream of this process's rows at `step`."""
        return positions_of(step, self.batch_size, self.rank, self.world)

    def _item(self, item: tuple[int, int]) -> np.ndarray:
        position, i = item
        framed = self.samples.whole(i)
        return self.samples.cut(framed, framing.zoomed(framed.box, self.scale, rng_for(self.seed, position), framed.image.size))


def first_frames(samples: ImageSamples, n: int) -> list[Tensor]:
    """The first n pictures as framed for their grids: float (k, C, H, W) for each grid that one of them has."""
    found: dict[framing.Grid, list[np.ndarray]] = {}
    for i in range(min(n, len(samples))):
        framed = samples.whole(i)
        found.setdefault(framed.grid, []).append(samples.cut(framed, framed.box))
    return [to_float(np.stack(found[grid])) for grid in samples.grids if grid in found]


def centre_crops(samples: ImageSamples, n: int) -> Tensor:
    """The first n pictures' centres, float (n, C, S, S); of samples without grids."""
    (one,) = first_frames(samples, n)
    return one


def check_batch(batch_size: int, world: int, name: str = "batch_size") -> None:
    if batch_size <= 0 or batch_size % world:
        raise ValueError(f"{name} {batch_size} cannot be shared by {world} processes; make it a positive multiple of {world}")


# --- code shards ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One sample of a code shard."""

    key: str
    codes: np.ndarray  # uint16 (views, N)
    grid: tuple[int, int]
    caption: str
    captions: dict[str, str]  # register -> caption, "plain" among them
    style: str
    subject: str
    questions: list[tuple[str, str]]
    thing: str = ""


class CodeSamples:
    """Samples of code shards; a broken one is counted and its successor stands in for it."""

    def __init__(self, paths: Sequence[Path], *, kept: Path | None = None):
        self.index = ShardIndex(paths, need=("json", CODES_SUFFIX), kept=kept)
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.index)

    def record(self, i: int) -> Record:
        try:
            codes = read_codes(self.index.read(i, CODES_SUFFIX))
        except (EOFError, SyntaxError) as error:
            raise ValueError(f"{self.index.key(i)}.{CODES_SUFFIX} is not a numpy array: {error}") from error
        tree = self.index.read_json(i)
        grid = tree["grid"]
        if codes.ndim != 2 or not len(codes) or codes.shape[1] != grid[0] * grid[1] or codes.dtype != np.uint16:
            raise ValueError(
                f"{self.index.key(i)}.{CODES_SUFFIX} is {codes.dtype} {codes.shape}, not uint16 (views, {grid[0] * grid[1]})"
            )
        caption = tree["caption"]
        captions = {"plain": caption, **{r: c for r, c in tree.get("captions", {}).items() if c}}
        questions = [(q["question"], q["answer"]) for q in tree.get("questions", [])]
        return Record(
            self.index.key(i), codes, (int(grid[0]), int(grid[1])), caption, captions,
            tree.get("style", ""), tree.get("subject", ""), questions, tree.get("thing", ""),
        )  # fmt: skip

    def whole_record(self, i: int) -> Record:
        for j in range(i, i + len(self)):
            if j % len(self) in self._broken:
                continue
            try:
                return self.record(j % len(self))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._broken.add(j % len(self))
                self.index.skipped["broken sample"] = len(self._broken)
        raise ValueError(f"no sample of {self.index.paths[0]} and its kin can be read")


def read_codes(data: bytes) -> np.ndarray:
    """The array of a .npy file. Raises EOFError, SyntaxError or ValueError for what is none."""
    header = CODES_HEADER.match(data)
    if header is None or header.end() != 10 + int.from_bytes(data[8:10], "little"):
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)  # not np.load, which also opens archives and pickles
    views, n = map(int, header.groups())
    return np.frombuffer(data, "<u2", views * n, header.end()).reshape(views, n)  # numpy's own reader takes ten times as long


def write_shard(path: Path, samples: Iterator[dict[str, bytes]], beside: Callable[[], dict[str, bytes]] = dict) -> int:
    """Write {"__key__": key, suffix: bytes, …} to a tar aside and rename it: whole or not there, the same bytes each time.

    `beside`, called when the samples are written, gives further files by the suffix that replaces .tar; they are there before the tar is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    count = 0
    with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            key = sample["__key__"]
            for suffix, payload in sample.items():
                if suffix == "__key__":
                    continue
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
            count += 1
    for suffix, payload in beside().items():
        path.with_suffix(suffix).write_bytes(payload)
    try:
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except FileNotFoundError as error:
        raise ValueError(f"{aside} was taken away: another process seems to write to {path.parent} too. Let one of them end, then run this again") from error
    return count


@dataclass(frozen=True)
class TokenBatch:
    """input_ids, labels int64 (B, T); labels are shifted and -100 where there is no loss. Counted where it is made, beside the training."""

    input_ids: Tensor
    labels: Tensor
    counts: tuple[int, int, int]  # image targets, other targets, tokens that are no padding


class Row(NamedTuple):
    """A packed sequence as it waits for its batch."""

    input_ids: np.ndarray  # int32: a tenth of a list's memory
    prompt: int
    read: np.ndarray | None = None  # what stands in the place of input_ids where the model reads, not where it predicts


class TokenBatches:
    """Packed sequences for the generator: step -> TokenBatch with batch_size / world rows.

    The task, the view, the register and the dropped tags of a position are drawn from its own generator. Within windows of
    `sort_window` positions (0: none), sequences of like length come together, so that little is padded; the batches of a
    window then come in a shuffled order. All of it is a function of (seed, position, batch_size, sort_window), and so the
    same for any number of processes, each of which packs the whole window.
    """

    def __init__(
        self, samples: CodeSamples, vocabulary: Any, encode: Callable[[str], list[int]], *, batch_size: int, seed: int,
        task_mix: dict[str, float], tag_dropout: float, plain_share: float = 1.0, rank: int = 0, world: int = 1, views: bool = True, threads: int = 0,
        sort_window: int = 0, word_dropout: float = 0.0,
    ):  # fmt: skip
        check_batch(batch_size, world)
        self.samples, self.vocabulary = samples, vocabulary
        self.encode = lru_cache(ENCODED)(encode)  # a quarter of the packing, from the second epoch on; the lists are shared: nobody changes them
        self.batch_size, self.seed, self.tag_dropout, self.rank, self.world, self.views = batch_size, seed, tag_dropout, rank, world, views
        self.plain_share, self.word_dropout = plain_share, word_dropout
        self.words = np.setdiff1d(np.arange(vocabulary.text_size, dtype=np.int32), vocabulary.illegal_text)
        self.order = Order(len(samples), seed)
        check_task_mix(task_mix)
        self.tasks = list(task_mix)
        self.shares = (np.cumsum([task_mix[t] for t in self.tasks]) / sum(task_mix.values())).tolist()
        self.cut_captions = 0
        self.window = max(1, sort_window // batch_size)  # in batches
        self.pool = ThreadPoolExecutor(threads) if threads > 0 else None
        self.ahead = ThreadPoolExecutor(1) if self.window > 1 else None
        self._windows: dict[int, Future[list[list[tuple[int, Row]]]]] = {}
        self._lock = threading.Lock()

    def __call__(self, step: int) -> TokenBatch:
        if self.window == 1:
            packed = self._pack(positions_of(step, self.batch_size, self.rank, self.world))
        else:
            mine = self._batch(step)[self.rank * self.batch_size // self.world : (self.rank + 1) * self.batch_size // self.world]
            packed = [sequence for _, sequence in mine]
        return collate(packed, self.vocabulary.id("<pad>"), first_code=self.vocabulary.code_offset)

    def positions(self, step: int) -> list[int]:
        """The positions in the stream of this process's rows at `step`."""
        mine = positions_of(step, self.batch_size, self.rank, self.world)
        if self.window == 1:
            return list(mine)
        first = step * self.batch_size
        batch = self._batch(step)
        return [batch[position - first][0] for position in mine]

    def _pack(self, positions: Iterable[int]) -> list[Row]:
        items = [(p, self.order[p]) for p in positions]
        groups = [items[start : start + 32] for start in range(0, len(items), 32)]  # one by one, the handing over costs as much as the packing
        return [row for group in (self.pool.map if self.pool else map)(self._items, groups) for row in group]

    def _items(self, items: Iterable[tuple[int, int]]) -> list[Row]:
        return [self._item(item) for item in items]

    def _batch(self, step: int) -> list[tuple[int, Row]]:
        """(position, sequence) of the whole global batch. Its window is packed in a thread, and the next one ahead of its use."""
        window, number = divmod(step, self.window)
        assert self.ahead is not None
        with self._lock:
            for wanted in (window, window + 1):
                if wanted not in self._windows:
                    self._windows[wanted] = self.ahead.submit(self._pack_window, wanted)
            for old in [known for known in self._windows if not window - 1 <= known <= window + 1]:
                del self._windows[old]
            future = self._windows[window]
        return future.result()[number]

    def _pack_window(self, window: int) -> list[list[tuple[int, Row]]]:
        size = self.window * self.batch_size
        positions = range(window * size, (window + 1) * size)
        by_length = sorted(zip(positions, self._pack(positions), strict=True), key=lambda item: (len(item[1].input_ids), item[0]))
        batches = [sorted(by_length[start : start + self.batch_size], key=lambda item: item[0]) for start in range(0, size, self.batch_size)]
        return [batches[number] for number in rng_for(self.seed, window, stream=4).permutation(self.window)]

    def _item(self, item: tuple[int, int]) -> Row:
        position, i = item
        rng = rng_for(self.seed, position, stream=2)
        packed = self.pack(self.samples.whole_record(i), rng)
        ids = np.array(packed.input_ids, np.int32)
        return Row(ids, packed.prompt, self._other_words(ids, packed.prompt, rng) if self.word_dropout else None)

    def _other_words(self, ids: np.ndarray, prompt: int, rng: np.random.Generator) -> np.ndarray:
        """The ids with a share of the words behind the prompt exchanged for any others (Bowman et al. 2016): what comes next must be told from the picture."""
        chosen = (rng.random(len(ids)) < self.word_dropout) & (ids < self.vocabulary.text_size) & (np.arange(len(ids)) >= prompt)
        return np.where(chosen, rng.choice(self.words, len(ids)), ids)

    def text(self, text: str) -> list[int]:
        """Ids of a text, cut at the longest span and counted."""
        ids = self.encode(text)
        if len(ids) > self.vocabulary.max_text:
            self.cut_captions += 1
        return ids[: self.vocabulary.max_text] or self.encode(".")

    def pack(self, record: Record, rng: np.random.Generator) -> Any:
        """One record -> Packed, by the task that `rng` draws; a task whose fields are missing falls back to joint."""
        from tokun.vocabulary import Tags

        v = self.vocabulary
        task = self.tasks[min(bisect_right(self.shares, rng.random()), len(self.tasks) - 1)]
        codes = record.codes[rng.integers(len(record.codes)) if self.views and len(record.codes) > 1 else 0]  # of one, numpy draws nothing either
        registers = [r for r in record.captions if r in v.registers]
        register = "plain" if rng.random() < self.plain_share or len(registers) == 1 else registers[rng.integers(len(registers))]
        dropped, bare = rng.random(5 if v.things else 4).tolist(), rng.random() < self.tag_dropout
        keep = [not bare and number >= self.tag_dropout for number in dropped]
        only_grid = len(v.grids) > 1 or record.grid != v.default_grid  # which of several it is cannot be guessed
        tags = Tags(
            style=record.style if keep[0] and record.style in v.styles else "",
            subject=record.subject if keep[1] and record.subject in v.subjects else "",
            register=register if keep[2] else "",
            grid=record.grid if keep[3] or only_grid else None,
            thing=record.thing if v.things and keep[4] and record.thing in v.things else "",
        )
        caption = self.text(record.captions[register])
        if task == "text_to_image":
            return v.pack_text_to_image(tags, codes, caption)
        if task == "question" and record.questions:
            question, answer = record.questions[rng.integers(len(record.questions))]
            return v.pack_question(tags, codes, self.text(question), self.text(answer))
        others = [r for r in registers if r != register]
        if task == "rewrite" and others:
            other = others[rng.integers(len(others))]
            return v.pack_rewrite(tags, caption, other, self.text(record.captions[other]))
        return v.pack_joint(tags, codes, caption)


def collate(packed: Sequence[Any], pad: int, *, first_code: int = sys.maxsize) -> TokenBatch:
    """Packed sequences (or rows) -> a batch, padded behind and shifted by one. The only place where labels are shifted.

    Ids from `first_code` on are image codes, which its counts tell from others.
    """
    width = max(len(p.input_ids) for p in packed) - 1
    input_ids = np.full((len(packed), width), pad)
    labels = np.full((len(packed), width), -100)
    for row, p in enumerate(packed):
        n = len(p.input_ids) - 1
        read = getattr(p, "read", None)
        input_ids[row, :n] = (p.input_ids if read is None else read)[:-1]
        labels[row, p.prompt - 1 : n] = p.input_ids[p.prompt :]
    image, targets = int((labels >= first_code).sum()), int((labels >= 0).sum())
    tokens = sum(len(p.input_ids) - 1 for p in packed)
    return TokenBatch(torch.from_numpy(input_ids), torch.from_numpy(labels), (image, targets - image, tokens))


def check_task_mix(task_mix: dict[str, float]) -> None:
    unknown = set(task_mix) - set(_tasks())
    if unknown or not task_mix or min(task_mix.values()) < 0 or sum(task_mix.values()) <= 0:
        raise ValueError(f"train.task_mix is {task_mix}; it takes non-negative shares of {', '.join(_tasks())}, not all zero")


def _tasks() -> tuple[str, ...]:
    from tokun.vocabulary import TASKS

    return TASKS

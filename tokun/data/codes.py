"""Samples of code shards: a picture's codes in one or several views, its captions and its tags. Knows no torch."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokun.data.sample_record import captions_by_register, grid_of, mirrored_of, questions_of
from tokun.data.shards import CODES_SUFFIX, ShardIndex
from tokun.utils.errors import BadSample, UserError

# the header that numpy writes before uint16 (views, N)
CODES_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<u2', 'fortran_order': False, 'shape': \(([1-9]\d{0,6}), ([1-9]\d{0,6})\), \} *\n", re.DOTALL
)


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
    mirrored: tuple[bool, ...] = ()  # per view; empty: none is mirrored


class CodeSamples:
    """Samples of code shards; a broken one is counted and replaced by the next."""

    def __init__(self, paths: Sequence[Path], *, cache_file: Path | None = None):
        self.index = ShardIndex(paths, need=("json", CODES_SUFFIX), cache_file=cache_file).usable()
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.index)

    def record(self, i: int) -> Record:
        try:
            codes = read_codes(self.index.read(i, CODES_SUFFIX))
        except (EOFError, SyntaxError, ValueError) as error:
            raise BadSample(f"{self.index.key(i)}.{CODES_SUFFIX} is not a numpy array: {error}") from error
        tree = self.index.read_json(i)
        grid = grid_of(tree)
        if codes.ndim != 2 or not len(codes) or codes.shape[1] != grid[0] * grid[1] or codes.dtype != np.uint16:
            raise BadSample(f"{self.index.key(i)}.{CODES_SUFFIX} is {codes.dtype} {codes.shape}, not uint16 (views, {grid[0] * grid[1]})")
        captions = captions_by_register(tree)
        if not isinstance(caption := tree.get("caption"), str):
            raise BadSample(f"{self.index.key(i)}.json has no caption")
        return Record(
            self.index.key(i), codes, grid, caption, {"plain": caption, **{r: c for r, c in captions.items() if c}},
            tree.get("style", ""), tree.get("subject", ""), questions_of(tree), tree.get("thing", ""), mirrored_of(tree),
        )  # fmt: skip

    def whole_record(self, i: int) -> Record:
        for j in range(i, i + len(self)):
            if j % len(self) in self._broken:
                continue
            try:
                return self.record(j % len(self))
            except (OSError, BadSample):
                self._broken.add(j % len(self))
                self.index.skipped["broken sample"] = len(self._broken)
        raise UserError(f"no sample of {self.index.paths[0]} and its sibling shards can be read")


def read_codes(data: bytes) -> np.ndarray:
    """The array of a .npy file. Raises EOFError, SyntaxError or ValueError if it is not one."""
    header = CODES_HEADER.match(data)
    if header is None or header.end() != 10 + int.from_bytes(data[8:10], "little"):
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)  # not np.load, which also opens archives and pickles
    views, n = map(int, header.groups())
    return np.frombuffer(data, "<u2", views * n, header.end()).reshape(views, n)  # ten times as fast as numpy's reader

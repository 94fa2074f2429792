"""The order of samples: a pure function of (seed, epoch, position). Knows numbers only.

Position p of the endless stream is sample `permutation(seed, epoch)[p mod n]` with epoch = p // n. Step s of a run reads positions
s*B … s*B + B - 1; rank r takes its contiguous share of them. So a run resumes from its step number alone, and any number of processes sees
the same global batches. Random choices for a sample (crop, task, dropped tags) come from a generator keyed by its position.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokun.utils.errors import UserError


class Order:
    """Position in the endless, seeded stream -> sample."""

    def __init__(self, n: int, seed: int):
        assert n > 0
        self.n, self.seed = n, seed
        self._latest = (-1, np.empty(0, np.int64))  # epoch and permutation, replaced together: threads may read them

    def __getitem__(self, position: int) -> int:
        epoch = position // self.n
        known, permutation = self._latest
        if epoch != known:
            permutation = rng_for(self.seed, epoch, stream=1).permutation(self.n)
            self._latest = (epoch, permutation)
        return int(permutation[position % self.n])


class _Key(np.random.bit_generator.ISeedSequence):
    """A key for Philox. With `key=`, numpy would first draw a seed from the system and then discard it."""

    def __init__(self, key: np.ndarray):
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.key


def rng_for(seed: int, position: int, *, stream: int = 0) -> np.random.Generator:
    """A generator that is a pure function of (seed, position, stream)."""
    # uint64: numpy turns a list with a number above 2^63 into floats, and different streams would coincide
    key = _Key(np.array([(seed << 8 | stream) & (2**64 - 1), position], np.uint64))
    return np.random.Generator(np.random.Philox(key))  # pyright: ignore[reportArgumentType]  # numpy's types know SeedSequence alone


def positions_of(step: int, batch_size: int, rank: int, world: int) -> range:
    """The positions that rank `rank` reads at `step`: its contiguous share of the global batch."""
    share = batch_size // world
    first = step * batch_size + rank * share
    return range(first, first + share)


def check_batch(batch_size: int, world: int, name: str = "batch_size") -> None:
    if batch_size <= 0 or batch_size % world:
        raise UserError(f"{name} {batch_size} cannot be split among {world} processes; make it a positive multiple of {world}")


class BucketOrder:
    """Position in the endless, seeded stream -> sample, where each batch has samples of one shape only.

    Each shape's samples have an endless order of their own (`Order`), which its batches read in sequence. An epoch has as many batches of
    each shape as its samples have filled by then, shuffled: over the epochs every picture comes equally often.
    All of it is a function of (seed, batch size, shapes, position).
    """

    def __init__(self, shapes: np.ndarray, seed: int, batch_size: int):
        self.seed, self.batch_size = seed, batch_size
        self.members = [np.flatnonzero(shapes == shape) for shape in range(int(shapes.max(initial=-1)) + 1)]
        self.members = [own for own in self.members if len(own)]
        if not self.members:
            raise UserError("no picture's header can be read")
        self.counts = [len(own) for own in self.members]
        self.orders = [Order(n, seed + (number << 32)) for number, n in enumerate(self.counts)]
        self._latest: tuple[int, list[tuple[int, int]]] = (0, [])  # first step of the epoch; (bucket, batch in it) of each step

    def __getitem__(self, position: int) -> int:
        step, row = divmod(position, self.batch_size)
        bucket, batch = self._batch(step)
        return int(self.members[bucket][self.orders[bucket][batch * self.batch_size + row]])

    def _batch(self, step: int) -> tuple[int, int]:
        first, batches = self._latest  # replaced together: threads may read them
        if not first <= step < first + len(batches):
            first, batches = self._epoch_of(step)
        return batches[step - first]

    def _epoch_of(self, step: int) -> tuple[int, list[tuple[int, int]]]:
        epoch = max(0, step * self.batch_size // sum(self.counts))  # never too late an epoch: batches fill up no earlier
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        first = self._steps_before(epoch)
        batches = [
            (bucket, batch)
            for bucket in range(len(self.counts))
            for batch in range(self._filled(bucket, epoch), self._filled(bucket, epoch + 1))
        ]
        order = rng_for(self.seed, epoch, stream=5).permutation(len(batches))
        found = [batches[k] for k in order]
        self._latest = (first, found)
        return first, found

    def _filled(self, bucket: int, epoch: int) -> int:
        """Batches of a bucket before an epoch."""
        return epoch * self.counts[bucket] // self.batch_size

    def _steps_before(self, epoch: int) -> int:
        return sum(self._filled(bucket, epoch) for bucket in range(len(self.counts)))

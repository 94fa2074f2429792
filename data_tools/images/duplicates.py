"""Duplicates: which pictures of a collection look the same, in nearly linear time.

Each picture has two hashes: 64 bits that find candidates (dhash, 8 x 8) and 256 bits that confirm them (the same, 16 x 16). A
hash is cut into six bands. Two hashes that differ in at most four bits agree in at least two bands, so sorting by each of the
15 pairs of bands brings them side by side. Works on hashes, not pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np

T = TypeVar("T", int, bytes)
DISTANCE = 4  # of 64 bits: six bands guarantee no more
# of 256 bits. For 400 engravings, JPEG copies at a third of the size are within 22, and different pictures at least 74 apart
FINE_DISTANCE = 48
BANDS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))  # (first bit, bits)
NEIGHBOURS = 8  # compared on each side within a run of equal bands; bounds the time for any hashes
COUNT = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


def bit_counts(words_NM: np.ndarray) -> np.ndarray:
    """uint64 (N, M) -> int (N,): number of set bits in each row."""
    halves = np.ascontiguousarray(words_NM).view(np.uint16)
    return COUNT[halves].reshape(len(words_NM), 4 * words_NM.shape[1]).sum(1, dtype=np.int64)


def alike_pairs(
    coarse_N: np.ndarray, fine_N4: np.ndarray, *, fine_distance: int = FINE_DISTANCE, among: np.ndarray | None = None
) -> np.ndarray:
    """Pairs (P, 2) of indices, first < second, of pictures that look the same.

    `coarse_N` uint64 (N,) and `fine_N4` uint64 (N, 4) are their hashes; `among`: the ascending indices to compare (default: all).
    All pairs within DISTANCE are found, except in runs of more than NEIGHBOURS hashes that agree in two bands, where only
    neighbours in sorted order are compared.
    """
    among = np.arange(len(coarse_N)) if among is None else among
    coarse, count = coarse_N[among], len(coarse_N)
    found = [np.empty(0, dtype=np.int64)]  # first * count + second
    masks = [np.uint64(((1 << bits) - 1) << first) for first, bits in BANDS]
    for a, b in combinations(masks, 2):
        bands = coarse & (a | b)
        order = np.lexsort((coarse, bands))
        bands = bands[order]
        for shift in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            same = np.flatnonzero(bands[:-shift] == bands[shift:])
            left, right = among[order[same]], among[order[same + shift]]
            near = bit_counts((coarse_N[left] ^ coarse_N[right])[:, None]) <= DISTANCE
            near &= bit_counts(fine_N4[left] ^ fine_N4[right]) <= fine_distance
            found.append(np.unique(np.minimum(left, right)[near] * count + np.maximum(left, right)[near]))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), max(1, count)), 1)


def clusters(count: int, pairs: np.ndarray) -> np.ndarray:
    """int (count,): the smallest index in each picture's cluster, after joining the pairs (P, 2)."""
    root = joined(pairs.tolist())
    return np.array([root(index) for index in range(count)], dtype=np.int64)


def joined(groups: Iterable[Sequence[T]]) -> Callable[[T], T]:
    """A function: a key -> the smallest of those connected with it by groups of keys. Holds only keys that are joined to others."""
    parent: dict[T, T] = {}

    def root(key: T) -> T:
        while (above := parent.get(key, key)) != key:
            parent[key] = key = parent.get(above, above)  # halves the path
        return key

    for first, *others in groups:
        for other in others:
            low, high = sorted((root(first), root(other)))
            if low != high:
                parent[high] = low
    return root

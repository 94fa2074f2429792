"""Duplicates among line art: do two drawings on plain paper with nearly the same hashes really look the same?

In a drawing of few lines most cells of the hash are paper, so the hashes of an F and an E differ in a few bits only. Their
sketches are aligned by a small shift and scale, and what remains is compared place by place: coarsely, where the bar that an F
lacks stands out; and finely, where the ink of an outlined O leaves that of a D uncovered, although both have as much of it in each
place. A drawing that is re-encoded, resized or slightly cropped differs by little, and everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

SIDE, COARSE = 64, 32  # cells of a sketch, and of the coarse comparison
PLAIN = 0.4  # least share of paper cells; with less, the hashes suffice
STANDS_OUT = 0.5
"""Coarse difference in one place, as a share of the densest ink. Copies of letters and outlines (JPEG quality 30, a third of the size,
3 % cropped) differ by at most 0.44, an E from an F by 0.6."""
UNCOVERED = 0.39
"""Ink in one place without ink of the other within a cell, as a share of the densest ink. Such copies leave at most 0.37 uncovered, an a
beside an e 0.41."""
OTHER_SHAPE = 1.15  # ratio of the aspect ratios
PLACE = 5  # side in cells of one place
SCALES, SHIFTS = (0.94, 0.97, 1.0, 1.03, 1.06), tuple(np.linspace(-1.5, 1.5, 7).tolist())  # shifts in coarse cells


@dataclass(frozen=True)
class Sketch:
    """The tones of a picture, (SIDE, SIDE) bytes, and its ratio of width to height."""

    tones: bytes
    aspect: float

    def ink(self, side: int) -> np.ndarray:
        """float32 (side, side): 0 paper, 1 ink; `side` is SIDE or COARSE."""
        step = SIDE // side
        return ink_of(np.frombuffer(self.tones, np.uint8).reshape(side, step, side, step).mean((1, 3)))


def sketch(gray: Image.Image) -> Sketch | None:
    """The sketch of a picture in mode "L", or None if it is not a drawing on plain paper."""
    drawn = Sketch(gray.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes(), gray.width / gray.height)
    return drawn if (drawn.ink(COARSE) < 0.1).mean() >= PLAIN else None


def ink_of(tones_HW: np.ndarray) -> np.ndarray:
    paper, ink = map(float, np.percentile(tones_HW, (97, 1)))
    return ((paper - tones_HW.astype(np.float32)) / max(32.0, paper - ink)).clip(0, 1)


def look_the_same(one: Sketch, other: Sketch) -> bool:
    """Whether nothing stands out in one that is missing in the other."""
    if not 1 / OTHER_SHAPE <= one.aspect / other.aspect <= OTHER_SHAPE:
        return False
    a_HW, b_HW = one.ink(COARSE), other.ink(COARSE)
    across, down = alignment(a_HW, b_HW)
    aligned_HW = COARSE_WAYS[down] @ b_HW @ COARSE_WAYS[across].T
    if min(greatest_difference(a_HW, b_HW), greatest_difference(a_HW, aligned_HW)) > STANDS_OUT:
        return False
    a_HW, b_HW = one.ink(SIDE), other.ink(SIDE)
    return uncovered(a_HW, b_HW) <= UNCOVERED or uncovered(a_HW, finely_aligned(a_HW, b_HW, across, down)) <= UNCOVERED


def greatest_difference(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """The greatest difference in any place, relative to the densest ink in any place."""
    return float(np.abs(local_means(a_HW - b_HW)).max() / densest(a_HW, b_HW))


def uncovered(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """The most ink in any place of one that has no ink of the other in the cells around, relative to the densest ink."""
    rest = (local_means((x_HW - spread(y_HW)).clip(0)).max() for x_HW, y_HW in ((a_HW, b_HW), (b_HW, a_HW)))
    return float(max(rest) / densest(a_HW, b_HW))


def densest(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    return max(local_means(a_HW).max(), local_means(b_HW).max(), 1e-6)


def local_means(values_HW: np.ndarray) -> np.ndarray:
    """The mean of PLACE x PLACE cells around each."""
    return around(values_HW, PLACE).mean((2, 3))


def spread(ink_HW: np.ndarray) -> np.ndarray:
    """The most ink in each cell and its eight neighbours."""
    return around(ink_HW, 3).max((2, 3))


def around(values_HW: np.ndarray, side: int) -> np.ndarray:
    """(H, W) -> (H, W, side, side): the cells around each, zeros beyond the edges."""
    return np.lib.stride_tricks.sliding_window_view(np.pad(values_HW, side // 2), (side, side))


def alignment(a_HW: np.ndarray, b_HW: np.ndarray) -> tuple[int, int]:
    """Which of COARSE_WAYS, across and down, resamples `b_HW` so that it fits `a_HW` best."""
    across = down = WAYS.index((1.0, 0.0))
    for _ in range(2):
        across = best_of(a_HW.T, (COARSE_WAYS[down] @ b_HW).T, COARSE_WAYS)
        down = best_of(a_HW, b_HW @ COARSE_WAYS[across].T, COARSE_WAYS)
    return across, down


def finely_aligned(a_HW: np.ndarray, b_HW: np.ndarray, across: int, down: int) -> np.ndarray:
    """`b_HW` (SIDE, SIDE), resampled along each axis for the best fit near a coarse alignment."""
    columns, rows = ways_near(across), ways_near(down)
    middle = rows[len(rows) // 2]
    way = columns[best_of(a_HW.T, (middle @ b_HW).T, columns)]
    return rows[best_of(a_HW, b_HW @ way.T, rows)] @ b_HW @ way.T


def best_of(a_HW: np.ndarray, b_HW: np.ndarray, ways: np.ndarray) -> int:
    """Which of these matrices (N, H, H) resamples the rows of `b_HW` so that they come nearest to `a_HW`."""
    return int(((a_HW - ways @ b_HW) ** 2).sum((1, 2)).argmin())


def resamplings(side: int, ways: Sequence[tuple[float, float]]) -> np.ndarray:
    """(N, side, side): for each scale and shift in cells, the matrix that resamples `side` cells with linear interpolation."""
    places, middle = np.arange(side), (side - 1) / 2
    found = np.zeros((len(ways), side, side), np.float32)
    for matrix, (scale, shift) in zip(found, ways):
        at = ((places - middle) * scale + middle + shift).clip(0, side - 1)
        low = np.floor(at).astype(int)
        matrix[places, low] += 1 - (at - low)
        matrix[places, np.minimum(low + 1, side - 1)] += at - low
    return found


WAYS = [(scale, shift) for scale in SCALES for shift in SHIFTS]
COARSE_WAYS = resamplings(COARSE, WAYS)


@lru_cache
def ways_near(index: int) -> np.ndarray:
    """(N, SIDE, SIDE): the resamplings of fine cells near a coarse one, itself in the middle."""
    scale, shift = WAYS[index]
    return resamplings(
        SIDE, [(scale + more, SIDE // COARSE * shift + by) for more in (-0.015, 0, 0.015) for by in (-0.75, -0.375, 0, 0.375, 0.75)]
    )

"""Duplicates among line art: do two drawings on plain paper with nearly the same hashes really look the same?

In a drawing of few lines most cells of the hash are paper, so the hashes of an F and an E differ in a few bits only. Their
sketches, 32 x 32 tones, are aligned by a small shift and scale, and the remaining difference is compared place by place. An E
that is re-encoded, resized or slightly cropped leaves small differences everywhere; the bar that an F lacks stands out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 32
PLAIN = 0.4  # least share of paper cells; with less, the hashes suffice
STANDS_OUT = 0.5  # difference in one place, as a share of the densest ink. Copies of letters and outlines (JPEG quality 30, a third of the size, 3 % cropped) differ by at most 0.44, an E from an F by 0.6
OTHER_SHAPE = 1.15  # ratio of the aspect ratios
PLACE = 5  # side in cells of one place
SCALES, SHIFTS = (0.94, 0.97, 1.0, 1.03, 1.06), np.linspace(-1.5, 1.5, 7)  # shifts in cells


@dataclass(frozen=True)
class Sketch:
    """The tones of a picture, and its ratio of width to height."""

    tones: bytes
    aspect: float

    def ink(self) -> np.ndarray:
        """float32 (SIDE, SIDE): 0 paper, 1 ink."""
        return ink_of(np.frombuffer(self.tones, np.uint8).reshape(SIDE, SIDE))


def sketch(gray: Image.Image) -> Sketch | None:
    """The sketch of a picture in mode "L", or None if it is not a drawing on plain paper."""
    tones_HW = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX))
    if (ink_of(tones_HW) < 0.1).mean() < PLAIN:
        return None
    return Sketch(tones_HW.tobytes(), gray.width / gray.height)


def ink_of(tones_HW: np.ndarray) -> np.ndarray:
    paper, ink = (float(np.percentile(tones_HW, percent)) for percent in (97, 1))
    return ((paper - tones_HW.astype(np.float32)) / max(32.0, paper - ink)).clip(0, 1)


def look_the_same(one: Sketch, other: Sketch) -> bool:
    """Whether nothing stands out in one that is missing in the other."""
    if not 1 / OTHER_SHAPE <= one.aspect / other.aspect <= OTHER_SHAPE:
        return False
    a_HW, b_HW = one.ink(), other.ink()
    return greatest_difference(a_HW, b_HW) <= STANDS_OUT or greatest_difference(a_HW, aligned(a_HW, b_HW)) <= STANDS_OUT


def greatest_difference(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """The greatest difference in any place, relative to the densest ink in any place."""
    densest = max(local_means(a_HW).max(), local_means(b_HW).max(), 1e-6)
    return float(np.abs(local_means(a_HW - b_HW)).max() / densest)


def local_means(values_HW: np.ndarray) -> np.ndarray:
    """The mean of PLACE x PLACE cells around each."""
    padded = np.pad(values_HW, PLACE // 2)
    return np.lib.stride_tricks.sliding_window_view(padded, (PLACE, PLACE)).mean((2, 3))


def aligned(a_HW: np.ndarray, b_HW: np.ndarray) -> np.ndarray:
    """`b_HW` scaled and shifted along each axis for the best fit to `a_HW`."""
    across = down = np.eye(SIDE, dtype=np.float32)
    for _ in range(2):
        across = best_of(a_HW.T, (down @ b_HW).T)
        down = best_of(a_HW, b_HW @ across.T)
    return down @ b_HW @ across.T


def best_of(a_HW: np.ndarray, b_HW: np.ndarray) -> np.ndarray:
    """The resampling matrix (SIDE, SIDE) of the rows of `b_HW` that comes nearest to `a_HW`."""
    errors_N = ((a_HW - RESAMPLINGS @ b_HW) ** 2).sum((1, 2))
    return RESAMPLINGS[int(errors_N.argmin())]


def resamplings() -> np.ndarray:
    """(N, SIDE, SIDE): every scale with every shift, with linear interpolation between cells."""
    places = np.arange(SIDE)
    found = []
    for scale in SCALES:
        for shift in SHIFTS:
            at = ((places - (SIDE - 1) / 2) * scale + (SIDE - 1) / 2 + shift).clip(0, SIDE - 1)
            low = np.floor(at).astype(int)
            matrix = np.zeros((SIDE, SIDE), np.float32)
            matrix[places, low] += 1 - (at - low)
            matrix[places, np.minimum(low + 1, SIDE - 1)] += at - low
            found.append(matrix)
    return np.stack(found)


RESAMPLINGS = resamplings()

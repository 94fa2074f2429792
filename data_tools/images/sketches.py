"""Sketches: do two drawings on plain paper, which have nearly the same hashes, really look the same?

Of a drawing of few lines most cells of a hash are paper, so that an F and an E differ in a few bits. Their sketches, 32 x 32
tones, are laid over each other as well as a small shift and scale allows, and what is left is compared place by place: an E
that is re-encoded, resized or slightly cropped leaves little everywhere, the bar that an F lacks stands out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 32
PLAIN = 0.4  # of the cells are paper: fewer are a picture whose hashes tell enough
STANDS_OUT = 0.5  # of the densest ink is missing in one place. Copies of letters and outlines (JPEG of quality 30, a third of the size, 3 % cropped) leave 0.44 at most, an E beside an F 0.6
OTHER_SHAPE = 1.15  # times as long for its width
PLACE = 5  # cells on a side of what is compared as one place
SCALES, SHIFTS = (0.94, 0.97, 1.0, 1.03, 1.06), np.linspace(-1.5, 1.5, 7)  # shifts in cells


@dataclass(frozen=True)
class Sketch:
    """The tones of a picture, and its width over its height."""

    tones: bytes
    aspect: float

    def ink(self) -> np.ndarray:
        """float32 (SIDE, SIDE): 0 paper, 1 ink."""
        return ink_of(np.frombuffer(self.tones, np.uint8).reshape(SIDE, SIDE))


def sketch(gray: Image.Image) -> Sketch | None:
    """The sketch of a picture in mode "L", or None where it is no drawing on plain paper."""
    tones_HW = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX))
    if (ink_of(tones_HW) < 0.1).mean() < PLAIN:
        return None
    return Sketch(tones_HW.tobytes(), gray.width / gray.height)


def ink_of(tones_HW: np.ndarray) -> np.ndarray:
    paper, ink = (float(np.percentile(tones_HW, percent)) for percent in (97, 1))
    return ((paper - tones_HW.astype(np.float32)) / max(32.0, paper - ink)).clip(0, 1)


def look_the_same(one: Sketch, other: Sketch) -> bool:
    """Whether nothing stands out in one that the other lacks."""
    if not 1 / OTHER_SHAPE <= one.aspect / other.aspect <= OTHER_SHAPE:
        return False
    a_HW, b_HW = one.ink(), other.ink()
    return left_over(a_HW, b_HW) <= STANDS_OUT or left_over(a_HW, laid_over(a_HW, b_HW)) <= STANDS_OUT


def left_over(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """The greatest difference in one place, as a share of the densest ink in one."""
    densest = max(in_places(a_HW).max(), in_places(b_HW).max(), 1e-6)
    return float(np.abs(in_places(a_HW - b_HW)).max() / densest)


def in_places(values_HW: np.ndarray) -> np.ndarray:
    """The mean of PLACE x PLACE cells around each."""
    padded = np.pad(values_HW, PLACE // 2)
    return np.lib.stride_tricks.sliding_window_view(padded, (PLACE, PLACE)).mean((2, 3))


def laid_over(a_HW: np.ndarray, b_HW: np.ndarray) -> np.ndarray:
    """`b_HW` scaled and shifted along each axis to fit `a_HW` best."""
    across = down = np.eye(SIDE, dtype=np.float32)
    for _ in range(2):
        across = best_of(a_HW.T, (down @ b_HW).T)
        down = best_of(a_HW, b_HW @ across.T)
    return down @ b_HW @ across.T


def best_of(a_HW: np.ndarray, b_HW: np.ndarray) -> np.ndarray:
    """The resampling (SIDE, SIDE) of the rows of `b_HW` that is nearest to `a_HW`."""
    errors_N = ((a_HW - RESAMPLINGS @ b_HW) ** 2).sum((1, 2))
    return RESAMPLINGS[int(errors_N.argmin())]


def resamplings() -> np.ndarray:
    """(N, SIDE, SIDE): every scale with every shift, between cells by the nearness of each."""
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

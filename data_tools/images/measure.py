"""Measuring a picture: paper, ink, tones, colour, grain, rows of letters and staves.

Pure functions on one decoded picture (PIL, "L" or "RGB", upright).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image

from data_tools.images.image_ops import as_gray
from tokun.data.colour import coloured_share, reduced

BLANK = 0.005  # share of points that differ from the usual tone; below, the page is empty
WORK = 512  # longest side in pixels of the copy that is measured
TEXTURE = 448  # side in pixels of the full-size crop whose grain is measured
STRIPS = 4  # vertical strips searched for lines of text: there may be columns, or pictures beside the text


@dataclass(frozen=True)
class Look:
    """Measurements of one picture. Shares are of the picture's area, 0 to 1."""

    width: int
    height: int
    paper: int
    """Tone of the paper, 0 to 255."""
    ink: int
    """Tone of the darkest parts."""
    white: float
    """Share as light as the paper."""
    dark: float
    """Share near the darkest tone: the ink's coverage."""
    levels: int
    """Number of frequent gray tones: a drawing in flat tones has few, a photograph nearly all."""
    plain: float
    """Share that differs from the usual tone: 1 for a busy picture, 0 for an empty page."""
    colour: float
    """Share whose colour is neither the paper's nor the ink's: none on a yellowed or sepia page."""
    smooth: float
    """Share of middle tones without lines or grain at full size, as in continuous tone."""
    text: float
    """Share of the dark points in low, separate rows, like letters."""
    text_lines: float
    """Number of such rows in a strip of the picture."""
    staves: int
    """Number of groups of five long lines at equal distances."""

    @property
    def short(self) -> int:
        return min(self.width, self.height)

    @property
    def long(self) -> int:
        return max(self.width, self.height)


def look(image: Image.Image) -> Look:
    """Measure a picture of at least one pixel. Deterministic; takes a few milliseconds at any size."""
    gray = as_gray(image)
    gray_HW = np.asarray(reduced(gray, WORK))
    counts = np.bincount(gray_HW.ravel(), minlength=256)
    paper, ink = paper_and_ink(counts)
    contrast = max(64, paper - ink)  # the grain of an empty page then counts as paper
    tone_HW = 1 - (paper - gray_HW.astype(np.float32)) / contrast  # 1: paper, 0: ink
    text, text_lines = text_rows(gray_HW < paper - 0.4 * contrast)
    return Look(
        width=image.width,
        height=image.height,
        paper=paper,
        ink=ink,
        white=float((tone_HW > 0.85).mean()),
        dark=float((tone_HW < 0.25).mean()),
        levels=int((counts > gray_HW.size / 2000).sum()),
        plain=plain_share(counts.tolist()),
        colour=coloured_share(image),
        smooth=smooth_share(gray, paper, contrast),
        text=text,
        text_lines=text_lines,
        staves=count_staves((tone_HW < 0.8).mean(1).tolist()),
    )


def plain_share(counts: Sequence[int]) -> float:
    """`Look.plain` from a histogram of 256 tones: the share of points that differ clearly from the median tone."""
    sums = list(accumulate(counts))
    usual = bisect_left(sums, sums[255] / 2)
    near = sums[min(255, usual + 12)] - (sums[usual - 13] if usual > 12 else 0)
    return (sums[255] - near) / sums[255]


def paper_and_ink(counts: np.ndarray) -> tuple[int, int]:
    """The tones of paper and ink, from a histogram of 256 tones: nearly the lightest and the darkest that occur."""
    sums = np.cumsum(counts)
    shares = sums / sums[-1]
    return int(np.searchsorted(shares, 0.97)), int(np.searchsorted(shares, 0.01))


def smooth_share(gray: Image.Image, paper: int, contrast: int) -> float:
    """Share of the central crop, at full size, with a middle tone that hardly varies within 3 x 3 points."""
    left, top = max(0, (gray.width - TEXTURE) // 2), max(0, (gray.height - TEXTURE) // 2)
    part_HW = np.asarray(gray.crop((left, top, min(gray.width, left + TEXTURE), min(gray.height, top + TEXTURE))))
    if min(part_HW.shape) < 8:
        return 0.0
    depth_HW = (paper - part_HW[1:-1, 1:-1].astype(np.float32)) / contrast
    middle_HW = (depth_HW > 0.15) & (depth_HW < 0.85)
    range_HW = over_3x3(np.maximum, part_HW) - over_3x3(np.minimum, part_HW)
    return float((middle_HW & (range_HW < 0.08 * contrast)).mean())


def over_3x3(function: Callable[[np.ndarray, np.ndarray], np.ndarray], values_HW: np.ndarray) -> np.ndarray:
    """(H, W) -> (H-2, W-2): the function reduced over each point and its eight neighbours."""
    rows = function(function(values_HW[:-2], values_HW[1:-1]), values_HW[2:])
    return function(function(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def text_rows(dark_HW: np.ndarray) -> tuple[float, float]:
    """(share of the dark points in rows of letters, number of rows in the median strip)."""
    total = int(dark_HW.sum())
    tallest = max(12, round(0.08 * max(dark_HW.shape)))
    inside, numbers = 0, []
    for strip_HW in np.array_split(dark_HW, min(STRIPS, dark_HW.shape[1]), axis=1):
        rows_H = strip_HW.sum(1)
        starts, ends = runs(rows_H >= 0.006 * strip_HW.shape[1])
        low = [(a, b) for a, b in zip(starts, ends) if 3 <= b - a <= tallest]
        inside += sum(int(rows_H[a:b].sum()) for a, b in low)
        numbers.append(len(low))
    return inside / max(1, total), float(np.median(numbers))


def runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends (exclusive) of the runs of true values."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return changes[0::2], changes[1::2]


def percentiles(tones: np.ndarray, percents: Sequence[float]) -> list[float]:
    """`np.percentile` of bytes, from their histogram, which takes a third of the time."""
    sums, last, found = np.cumsum(np.bincount(tones, minlength=256)), len(tones) - 1, []
    for percent in percents:
        place = last * (percent / 100)
        low, high = (int(np.searchsorted(sums, math.floor(place) + more, side="right")) for more in (0, 1 if place % 1 else 0))
        found.append(low + (high - low) * (place % 1))
    return found


def count_staves(rows_H: Sequence[float]) -> int:
    """Number of groups of exactly five sharp peaks at equal distances, in each row's share that is not paper."""
    peaks = [
        y
        for y in range(1, len(rows_H) - 1)
        if rows_H[y] > 0.55
        and rows_H[y] >= rows_H[y - 1]
        and rows_H[y] > rows_H[y + 1]
        and rows_H[y] - min(rows_H[max(0, y - 2) : y + 3]) > 0.25
    ]
    staves = start = 0
    while start + 5 <= len(peaks):
        gaps = np.diff(peaks[start : start + 5])
        step = float(gaps.mean())
        even = step >= 2.5 and float(np.abs(gaps - step).max()) <= max(1.01, 0.25 * step)
        alone = start == 0 or peaks[start] - peaks[start - 1] > 1.5 * step
        alone = alone and (start + 5 == len(peaks) or peaks[start + 5] - peaks[start + 4] > 1.5 * step)
        staves += even and alone
        start += 5 if even and alone else 1
    return staves

"""Trimming: removes the plain margin of a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_tools.images.image_ops import as_gray
from data_tools.images.measure import percentiles, runs

Box = tuple[int, int, int, int]


def trim(image: Image.Image) -> tuple[Image.Image, Box]:
    """The picture without its plain light margin, and the (left, top, right, bottom) that was kept.

    The margin may be yellowed and contain specks of a few points. Anything connected to the picture or larger than a speck
    is kept: frame lines, a spire's tip, a printed caption. A picture on a dark ground or without a margin is returned unchanged.
    """
    whole = (0, 0, image.width, image.height)
    gray_HW = np.asarray(as_gray(image))
    edge = max(1, min(gray_HW.shape) // 100)
    ring = np.concatenate([part.ravel() for part in (gray_HW[:edge], gray_HW[-edge:], gray_HW[:, :edge], gray_HW[:, -edge:])])
    quarter, paper = percentiles(ring, (25, 80))
    if paper < 160:
        return image, whole
    mark_HW = gray_HW < paper - np.clip(2 * (paper - quarter), 24, 48)
    speck = max(3, mark_HW.size // 100_000)
    left, top, right, bottom = whole
    for _ in range(2):  # twice: without the specks in the corners, a margin may be clean
        for axis in (1, 0):
            marks = line_sums(mark_HW[top:bottom, left:right].view(np.uint8), axis)
            tones = line_sums(gray_HW[top:bottom, left:right], axis) / (right - left if axis else bottom - top)
            toned = tones < paper - 10  # a light sky, line by line, is not a margin
            a, b = without_specks(np.where(toned, marks + speck + 1, marks), speck)
            if axis:
                top, bottom = top + a, top + b
            else:
                left, right = left + a, left + b
            if a == b:  # only paper and specks
                return image, whole
    box = (max(0, left - 1), max(0, top - 1), min(image.width, right + 1), min(image.height, bottom + 1))
    return (image, whole) if box == whole else (image.crop(box), box)


def line_sums(values_HW: np.ndarray, axis: int) -> np.ndarray:
    """Sums of bytes along an axis, int64; computed in 32 bits, which is faster and enough for 16 million bytes."""
    return values_HW.sum(axis, dtype=np.uint32).astype(np.int64)


def without_specks(counts: np.ndarray, speck: int) -> tuple[int, int]:
    """The range (start, end) of lines from the first to the last mark, without isolated specks."""
    starts, ends = runs(counts > 0)
    gap, first, last = max(2, len(counts) // 100), 0, len(starts)

    def is_speck(index: int, distance: int) -> bool:
        return int(counts[starts[index] : ends[index]].sum()) <= speck and distance >= gap

    while first < last - 1 and is_speck(first, starts[first + 1] - ends[first]):
        first += 1
    while last - 1 > first and is_speck(last - 1, starts[last - 1] - ends[last - 2]):
        last -= 1
    if first == last:
        return 0, 0
    return int(starts[first]), int(ends[last - 1])

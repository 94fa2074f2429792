"""Is a picture in colour? Ink on yellowed paper is not. Knows PIL and numpy; no torch."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def reduced(image: Image.Image, long_side: int) -> Image.Image:
    """The picture scaled down by an integer factor so that no side exceeds `long_side`."""
    factor = math.ceil(max(image.size) / long_side)
    return image.reduce(factor) if factor > 1 else image


def coloured_share(image: Image.Image) -> float:
    """Share of points whose colour is not a function of their lightness.

    Two colour differences are fitted as parabolas of the lightness: ink on tinted paper lies on the curve; a red coat
    beside a green tree does not.
    """
    if image.mode != "RGB":
        return 0.0
    red_N, green_N, blue_N = np.asarray(reduced(image, 128)).reshape(-1, 3).T.astype(np.float32)
    light_N = (red_N + green_N + blue_N) / 3 / 255
    basis_N3 = np.stack([np.ones_like(light_N), light_N, light_N**2], 1)
    chroma_N2 = np.stack([red_N - green_N, (red_N + green_N) / 2 - blue_N], 1)
    fit_32 = np.linalg.lstsq(basis_N3, chroma_N2, rcond=None)[0]
    rest_N2 = chroma_N2 - basis_N3 @ fit_32
    return float((np.hypot(rest_N2[:, 0], rest_N2[:, 1]) > 20).mean())

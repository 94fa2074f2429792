"""Small perturbations of pictures before scoring, so that rewards cannot depend on single pixels. Knows pictures, no models."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random crop of at least nine tenths of each side, scaled back to full size."""
    sides = np.array(image.size, float)
    kept = sides * rng.uniform(0.9, 1.0)
    left, top = rng.uniform(0, sides - kept)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + kept[0], top + kept[1]))


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise with a standard deviation of 2 to 8 of 255 grey levels."""
    array = np.asarray(image, np.float64)
    return Image.fromarray((array + rng.normal(0, rng.uniform(2, 8), array.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """JPEG at a quality of 70 to 95."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(70, 96)))
    return Image.open(buffer).convert(image.mode)


CHANGES: dict[str, Change] = {"crop": crop, "noise": noise, "jpeg": jpeg}


def changer(names: Sequence[str], seed: int) -> Callable[[Sequence[Pair]], list[Pair]]:
    """Pairs -> the same with perturbed pictures, one perturbation after the other: a function of seed and pair, so runs are reproducible.

    Raises UserError for an unknown perturbation.
    """
    if unknown := set(names) - set(CHANGES):
        raise UserError(f"grpo.perturb names {', '.join(sorted(unknown))}; known are {', '.join(CHANGES)}")

    def change(pairs: Sequence[Pair]) -> list[Pair]:
        out = []
        for pair in pairs:
            rng, image = np.random.default_rng([seed, pair.seed, pair.index]), pair.image
            for name in names:
                image = CHANGES[name](image, rng)
            out.append(replace(pair, image=image))
        return out

    return change

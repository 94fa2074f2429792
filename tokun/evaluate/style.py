"""Is a picture an engraving? A logistic regression on a network's features decides; its accuracy is also reported.

Real engravings against other kinds of picture, generated from engravings (so that the subject gives nothing away) or from
scratch, plus an optional folder of other pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from tokun import data
from tokun.data import cropping
from tokun.inference.image_to_codes import open_picture
from tokun.render.grids import as_picture
from tokun.utils.errors import UserError

Maker = Callable[[Image.Image, np.random.Generator], Image.Image]  # an engraving 'L' -> another kind of picture, same size
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp"}
CROPS = 4  # per picture of a folder
DECAY = 0.01


# --- other kinds of picture -----------------------------------------------------------------------------------------


def blurred(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    return engraving.filter(ImageFilter.GaussianBlur(engraving.width / rng.uniform(14, 24)))


def posterised(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    levels = int(rng.integers(2, 5))
    smooth = engraving.filter(ImageFilter.GaussianBlur(engraving.width / 40))
    return smooth.point([round(255 * (v * levels // 256) / (levels - 1)) for v in range(256)])


def photograph(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Continuous tones, grey whites and a little grain."""
    tones = np.asarray(engraving.filter(ImageFilter.GaussianBlur(engraving.width / 32)), float) / 255
    return _picture(255 * (rng.uniform(0.05, 0.2) + 0.7 * tones ** rng.uniform(0.6, 1.8)) + rng.normal(0, 4, tones.shape))


def drawing(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Outlines of a few shapes on white."""
    size = np.array(engraving.size)
    page = Image.new("L", engraving.size, 255)
    draw = ImageDraw.Draw(page)
    for _ in range(int(rng.integers(1, 6))):
        (x, y), side, width = rng.uniform(0, 0.8 * size, 2), rng.uniform(0.1, 0.5) * size.min(), max(1, int(size.min()) // 48)
        match int(rng.integers(3)):
            case 0:
                draw.rectangle((x, y, x + side, y + side), outline=0, width=width)
            case 1:
                draw.ellipse((x, y, x + side, y + side), outline=0, width=width)
            case _:
                draw.line((x, y, x + side, y + rng.uniform(-1, 1) * side), fill=0, width=width)
    return page


def text_page(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    page = Image.new("L", engraving.size, 255)
    draw, height = ImageDraw.Draw(page), int(rng.integers(8, max(9, engraving.height // 8) + 1))
    for top in range(int(rng.integers(height)), engraving.height, round(1.3 * height)):
        letters = "".join(rng.choice(list("etaoinshrdlu   "), 80))
        draw.text((int(rng.integers(-5, 8)), top), letters, fill=0, font=ImageFont.load_default(height))
    return page


def noise(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    return _picture(rng.normal(rng.uniform(60, 200), rng.uniform(10, 90), (engraving.height, engraving.width)))


def flat(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.new("L", engraving.size, int(rng.integers(256)))


def gradient(engraving: Image.Image, rng: np.random.Generator) -> Image.Image:
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : engraving.height * 1j, -1 : 1 : engraving.width * 1j]
    return _picture(127 + rng.uniform(30, 90) * (np.cos(angle) * x + np.sin(angle) * y))


KINDS: dict[str, Maker] = {
    "blurred engravings": blurred, "posterised engravings": posterised, "photograph-like engravings": photograph,
    "outline drawings": drawing, "text pages": text_page, "noise": noise, "flat tones": flat, "gradients": gradient,
}  # fmt: skip


def _picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def generated_others(engravings: Sequence[Image.Image], seed: int) -> tuple[list[Image.Image], list[str]]:
    """One other picture for each engraving, cycling through the kinds -> (pictures in the engravings' mode, their kinds)."""
    names = [list(KINDS)[i % len(KINDS)] for i in range(len(engravings))]
    rng = np.random.default_rng(seed)
    return [KINDS[name](one.convert("L"), rng).convert(one.mode) for name, one in zip(names, engravings)], names


def from_folder(
    folder: str, size: int, channels: int, seed: int, *, grids: Sequence[cropping.Grid] = data.ONE_SQUARE, downsample: int = 0
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Crops of the pictures in a folder and its subfolders: from every other file for training, from the rest for testing. Each has the
    size of the grid nearest to its picture's shape; without `grids`, `size` by `size` px.

    Raises FileNotFoundError if none can be read.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    rng, downsample = np.random.default_rng(seed), downsample or size
    taught: list[Image.Image] = []
    examined: list[Image.Image] = []
    for i, path in enumerate(paths):
        try:
            picture = open_picture(path, channels)
        except UserError:  # damaged, or too large
            continue
        grid = grids[cropping.nearest_grid(*picture.size, grids)]
        boxes = cropping.views(cropping.crop_box(*picture.size, grid), CROPS, (1.0, 1.5), rng, picture.size)
        (examined if i % 2 else taught).extend(
            as_picture(cropping.cut(picture, box, (grid[1] * downsample, grid[0] * downsample))) for box in boxes
        )
    if not taught and not examined:
        raise FileNotFoundError(f"--others {folder} has no readable picture ({', '.join(sorted(SUFFIXES))})")
    return taught, examined


# --- the classifier -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    centre: Tensor  # (d,)
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, vectors: Tensor) -> list[bool]:
        """(n, d) -> is it an engraving?"""
        return (((vectors - self.centre) / self.scale) @ self.weight + self.bias > 0).tolist()


def fit(real: Tensor, other: Tensor) -> Classifier:
    """Regularised logistic regression with equal weight for both classes. Vectors float64 (n, d)."""
    every = torch.cat([real, other])
    centre, scale = every.mean(0), every.std(0) + 1e-6
    x, y = (every - centre) / scale, torch.cat([torch.ones(len(real)), torch.zeros(len(other))]).double()
    balance = torch.where(y > 0, 0.5 / len(real), 0.5 / len(other))
    weight, bias = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (balance * F.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="none")).sum() + DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Classifier(centre, scale, weight.detach(), bias.detach())

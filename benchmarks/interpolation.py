"""How evenly does a picture change between two seeds? With `Tokun.interpolate`, and with samples on the great circle between the latents.

    python benchmarks/interpolation.py --features squeezenet1_1.safetensors                             the bundled model, 16 pairs of seeds
    python benchmarks/interpolation.py --features squeezenet1_1.safetensors --checkpoint runs/mine --pairs 4 --steps 24

A step is the SqueezeNet distance (tokun.models.losses) of two neighbours, enlarged to at least 128 px; if the sizes differ, both are laid
on the middle of white paper that holds them (--fit resize: the second is resized to the first).
Each row has the mean step, the ratio of the largest to the mean step of a path (mean and largest over the paths), the share of codes that
neighbours with the same grid have in common, and nats per code of the pictures between the ends; the last row is that of the ends. On the
great circle, one changed early code changes all after it: the pictures are as likely as samples, but have nothing in common.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokun
from tokun.evaluate.features import SMALLEST, stack
from tokun.inference import latents
from tokun.inference.model import Pair, Tokun
from tokun.models.losses import SqueezeNetDistance
from tokun.utils import console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True, help="a file of SqueezeNet 1.1 weights")
    parser.add_argument("--checkpoint", default=None, help="default: the bundled model")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of consecutive seeds, from FIRST (%(default)s)")
    parser.add_argument("--first", type=int, default=100, help="the first seed (%(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--fit", choices=("paper", "resize"), default="paper", help="of neighbours of two sizes (%(default)s)")
    args = parser.parse_args()
    model, distance = tokun.load(args.checkpoint, device="cpu"), SqueezeNetDistance(args.features)
    rows: dict[str, list[tuple[float, ...]]] = {"interpolate": [], "great circle": []}
    ends: list[float] = []
    for first in tqdm(range(args.first, args.first + 2 * args.pairs, 2), desc="ways", unit="pair of seeds"):
        for name, way in (
            ("interpolate", model.interpolate(first, first + 1, args.steps)),
            ("great circle", circle(model, first, first + 1, args.steps)),
        ):
            steps = np.array([step(distance, a.image, b.image, args.fit) for a, b in pairwise(way)])
            same = [np.mean(np.equal(a.codes, b.codes)) for a, b in pairwise(way) if len(a.codes) == len(b.codes)]
            rows[name].append(
                (steps.mean(), steps.max() / steps.mean(), float(np.mean(same)), float(np.mean([nats(pair) for pair in way[1:-1]])))
            )
        ends += [nats(way[0]), nats(way[-1])]
    print(f"{args.pairs} pairs of seeds from {args.first}, {args.steps} steps, {args.checkpoint or 'the bundled model'}")
    print(
        "| way | mean step | largest over mean: mean, largest | codes in common | nats a code between the ends |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for name, found in rows.items():
        mean, ratio, same, nll = np.mean(found, axis=0)
        print(f"| {name} | {mean:.3f} | {ratio:.2f}, {max(row[1] for row in found):.2f} | {same:.1%} | {nll:.3f} |")
    print(f"| the ends | | | | {np.mean(ends):.3f} |")


def circle(model: Tokun, first: int, last: int, steps: int) -> list[Pair]:
    """Samples from latents on the great circle between those of two seeds, without keeping any codes."""
    a, b = (latents.draw(seed, [0], model.slots.size)[0] for seed in (first, last))
    z = torch.stack([a if i == 0 else b if i == steps - 1 else latents.slerp(a, b, i / (steps - 1)) for i in range(steps)])
    return model.sample_from(latents.uniform(z), first, range(steps))


@torch.inference_mode()
def step(distance: SqueezeNetDistance, a: Image.Image, b: Image.Image, fit: str) -> float:
    if fit == "resize":
        b = b.resize(a.size, Image.Resampling.LANCZOS)
    paper = max(a.width, b.width), max(a.height, b.height)
    x, y = (stack([on_paper(image, paper)]) for image in (a, b))
    scale = math.ceil(SMALLEST / min(x.shape[2:]))
    x, y = (F.interpolate(image, scale_factor=scale, mode="bicubic") if scale > 1 else image for image in (x, y))
    return float(distance(x, y))


def on_paper(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    paper = Image.new(image.mode, size, "white")
    paper.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return paper


def nats(pair: Pair) -> float:
    return pair.image_nll / len(pair.codes)


if __name__ == "__main__":
    console.run("benchmarks/interpolation.py", main)

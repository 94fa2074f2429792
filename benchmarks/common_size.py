"""Checkpoints of different picture sizes, compared at one size: distances, variety, style and lines.

    python -m benchmarks.common_size --features squeezenet1_1.pth --shards 'val-*.tar' --side 64 ../before/tokun/bundled/engraving bundled

Held-out pictures, reconstructions and single draws of each checkpoint are made at its own size and framing, and then reduced so that its
`image_size` becomes --side px (0: not at all). Each checkpoint is compared with the same held-out pictures, framed as it frames them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokun
from tokun.evaluate import images, style
from tokun.evaluate.distances import jackknife, manifold, spread
from tokun.evaluate.doctor import each, reconstructed
from tokun.evaluate.features import Features, open_features
from tokun.evaluate.figures import Figure, mean, share
from tokun.evaluate.held_out_pairs import read_pairs
from tokun.utils import console
from tokun.utils.errors import UserError
from tokun.utils.metrics import gradients, spectrum_error, ssim


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders, Hub ids or bundled")
    parser.add_argument("--features", required=True, help="a file of SqueezeNet 1.1 weights, or inception")
    parser.add_argument("--shards", required=True, help="held-out image shards")
    parser.add_argument("--side", type=int, default=64, help="px that a checkpoint's image_size becomes; 0: its own (%(default)s)")
    parser.add_argument("--n", type=int, default=256, help="samples, and held-out pictures at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="(%(default)s)")
    args = parser.parse_args(argv)
    features = open_features(args.features, torch.device("cpu"))
    for checkpoint in args.checkpoints:
        found = measured(tokun.load(None if checkpoint == "bundled" else checkpoint, device="cpu"), features, args)
        print(f"{checkpoint}, {f'{args.side} px' if args.side else 'its own size'}, {args.n} samples of seed {args.seed}")
        for figure in found:
            print(f"  {figure.name:44s} {figure.value:8.4g}  [{figure.low:.4g}, {figure.high:.4g}]  n {figure.n}")


def measured(model: tokun.Tokun, features: Features, args: argparse.Namespace) -> list[Figure]:
    own = model.image_tokenizer.config.image_size
    if not 0 <= args.side <= own:
        raise UserError(f"--side is {args.side}; pictures of {own} px can only be reduced: give 0 to {own}")
    held_out = read_pairs(model, args.shards, args.n, args.seed)
    if len(held_out) < 2 * len(style.KINDS):
        raise UserError(f"--shards {args.shards} hold {len(held_out)} usable pictures; at least {2 * len(style.KINDS)} are needed")
    share_kept = args.side / own if args.side else 1.0
    real, copies, made = (
        [reduced(picture, share_kept) for picture in pictures]
        for pictures in (
            [pair.image for pair in held_out],
            reconstructed(model, held_out),
            [pair.image for pair in model.sample(args.seed, args.n)],
        )
    )
    vectors, drawn, half = features(real), features(made), len(real) // 2
    others, _ = style.generated_others(real[:half], args.seed)
    examined, _ = style.generated_others(real[half:], args.seed + 1)
    judge = style.fit(vectors[:half], features(others))
    return [
        *images.distances(vectors, drawn, vectors[:0], features.name, args.seed),
        *manifold(vectors, drawn, ""),
        jackknife("diversity", [drawn, vectors], lambda a, b: spread(a) / spread(b), seed=args.seed),
        share("style: samples taken for engravings", judge(drawn)),
        share("style: the classifier's own accuracy", [*judge(vectors[half:]), *(not verdict for verdict in judge(features(examined)))]),
        mean("lines: spectrum error of reconstructions, dB", each(spectrum_error, real, copies).tolist(), seed=args.seed),
        mean(
            "lines: SSIM of gradients of reconstructions",
            each(lambda a, b: ssim(gradients(a), gradients(b)), real, copies).tolist(),
            seed=args.seed,
        ),
    ]


def reduced(picture: Image.Image, scale: float) -> Image.Image:
    size = round(picture.width * scale), round(picture.height * scale)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    console.run("benchmarks/common_size.py", main)

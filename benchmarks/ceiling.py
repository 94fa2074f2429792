"""How much of a caption can be predicted from its picture at all? How often held-out pictures rank their own caption first of sixteen.

    python benchmarks/ceiling.py --train 'shards/train-*.tar' --val 'shards/val-*.tar' --weights squeezenet1_1.safetensors --side 64

The judge of `tokun.evaluate.recognition` (a ridge regression from ImageNet features to words) on centre squares. It shares nothing with a
tokun model and was trained on photographs, so it is a reference for the generator's PMI, not an upper bound.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokun.evaluate import figures, recognition
from tokun.evaluate.features import last_layer
from tokun.evaluate.held_out_pairs import described, squares
from tokun.utils import console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="image shards")
    parser.add_argument("--val", required=True, help="held-out image shards")
    parser.add_argument("--weights", required=True, help="SqueezeNet 1.1 as safetensors or .pth, or efficientnet-lite0")
    parser.add_argument("--side", type=int, default=64, help="side of the square in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network = last_layer(args.weights, torch.device("cpu"), max(args.side, 128))
    (x, captions), (x_val, captions_val) = (
        recognition.look(described(one, squares(args.side)), network, "features") for one in (args.train, args.val)
    )
    judge = recognition.fit(x, captions, seed=args.seed)
    found = figures.mean("", judge.firsts(x_val, captions_val).tolist(), seed=args.seed)
    print(
        f"{judge.n} training pairs, {found.n} held out, {args.side} px, penalty {judge.penalty:g} (first of 16 in a tenth left out: "
        f"{judge.left_out:.1%})\n"
        f"held out: the own caption first of {recognition.CANDIDATES} in {found.value:.1%} ({found.low:.1%} to "
        f"{found.high:.1%}; chance {1 / 16:.1%})"
    )


if __name__ == "__main__":
    console.run("benchmarks/ceiling.py", main)

"""Do captions name what their own pictures show? Measured on toy pictures, where the truth is known.

    python benchmarks/toy_coherence.py --checkpoint runs/tiny --n 256

Prints, with standard errors: the judge's accuracy on fresh toy pictures; for n pairs sampled from fresh seeds, the share of
captions that name the shapes and the hatching that the judge sees in their own picture; and how often the own caption outranks
15 captions of other samples by PMI. Also writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokun
from benchmarks.toy_judge import judge_accuracy, train_judge
from data_tools.toy import parse_caption
from tokun.evaluate import coherence
from tokun.utils import console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/tiny")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--judge", type=Path, default=Path("runs/toy-judge"), help="folder for the trained judge")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    model = tokun.load(args.checkpoint)
    judge = train_judge(side=model.image_tokenizer.config.image_size, cache=args.judge)
    known = judge_accuracy(judge)
    figures = {"judge_" + k: v for k, v in known.items()} | measure(model, judge, n=args.n, seed=args.seed)
    for name, value in figures.items():
        print(f"{name:32s} {value:.4f}")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


def measure(model: tokun.Tokun, judge, *, n: int, seed: int, rivals: int = 15) -> dict[str, float]:
    """Shares over n pairs of fresh seeds, each with its standard error."""
    pairs = model.sample(seed, n)
    images = torch.stack([torch.from_numpy(np.asarray(p.image, np.float32))[None] / 127.5 - 1 for p in pairs])
    seen = judge.judge(images)
    said = [parse_caption(p.caption) for p in pairs]
    shares = {
        "shapes_right": [a["shapes"] == b["shapes"] for a, b in zip(said, seen)],
        "hatching_right": [a["hatching"] == b["hatching"] for a, b in zip(said, seen)],
        "pmi_rank_first_of_16": pmi_ranks(model, pairs, rivals=rivals, seed=seed),
    }
    out: dict[str, float] = {}
    for name, hits in shares.items():
        share = float(np.mean(hits))
        out[name] = share
        out[name + "_standard_error"] = math.sqrt(share * (1 - share) / len(hits))
    out["mean_pmi"] = float(np.mean([p.pmi for p in pairs]))
    return out


def pmi_ranks(model: tokun.Tokun, pairs: list, *, rivals: int, seed: int) -> list[bool]:
    """For each pair, whether its own caption has a higher PMI with its picture than `rivals` captions of other pairs.

    Rivals are drawn from captions that state other facts, since a caption that is equally true of the picture is not a rival.
    """
    rng = np.random.default_rng(seed)
    facts = [parse_caption(pair.caption) for pair in pairs]
    others = [[j for j, said in enumerate(facts) if said != own] for own in facts]
    candidates = np.array([[i, *rng.choice(rest, rivals, replace=False)] for i, rest in enumerate(others)])
    return (coherence.pmi_of(model, pairs, candidates).argmax(1) == 0).tolist()


if __name__ == "__main__":
    console.run("benchmarks/toy_coherence.py", main)

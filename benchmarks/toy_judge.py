"""A judge of toy pictures: shapes, hatching and ground.

    python benchmarks/toy_judge.py                  # train (minutes on two cores), print the accuracy table

A small CNN trained independently, on pictures drawn only for it, with slight blur and noise, so that reconstructions of a
VQ-VAE are judged fairly. With it, "does the caption say what the picture shows" is one comparison:
`judge.judge(images)` against `data_tools.toy.parse_caption(captions)`. Knows nothing of tokun's models.
`benchmarks.toy_judge:named` makes it a judge of grpo.judges.

Shapes in the margin: B batch, S side, K kinds of shape.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command also works without installation
from data_tools.toy import GROUNDS, HATCHINGS, SHAPES, draw, parse_caption
from tokun.inference.model import Pair
from tokun.utils import console
from tokun.utils.errors import UserError

MOST = 3  # shapes of one kind in a picture
TRAIN_SEED, TEST_SEED = 7_000_000_000, 8_000_000_000  # toy seeds used nowhere else
BATCH_SIZE = 128
CACHE = Path("runs/toy-judge")


class Judge(nn.Module):
    """Picture -> count of each kind (0..3), hatching, ground."""

    def __init__(self, side: int = 64):
        super().__init__()
        self.side = side

        def block(c_in: int, c_out: int, stride: int, kernel: int = 3) -> nn.Sequential:
            conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

        self.trunk = nn.Sequential(
            block(1, 32, 2, kernel=5),  # (B, 32, S/2, S/2)
            block(32, 64, 2),
            block(64, 96, 1),  # (B, 96, S/4, S/4)
            block(96, 128, 2),
            block(128, 128, 1),  # (B, 128, S/8, S/8)
            block(128, 64, 2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),  # (B, 1024)
            nn.Linear(1024, 256),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        self.counts = nn.Linear(256, len(SHAPES) * (MOST + 1))
        self.hatching = nn.Linear(256, len(HATCHINGS))
        self.ground = nn.Linear(256, len(GROUNDS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, 1, S, S)
        features = self.trunk(images)  # (B, 256)
        counts = self.counts(features).unflatten(1, (len(SHAPES), MOST + 1))  # (B, K, 4)
        return counts, self.hatching(features), self.ground(features)  # (B, 3), (B, 2)

    @torch.inference_mode()
    def judge(self, images: Tensor, batch_size: int = 256) -> list[dict]:
        """What each picture shows: `{"shapes": sorted multiset, "hatching", "ground"}`, as in `parse_caption`.

        images: float (B, 1, S, S) in [-1, 1]. Raises UserError for another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (1, self.side, self.side):
            raise UserError(f"expected (B, 1, {self.side}, {self.side}), got {tuple(images.shape)}; average the colours")
        self.eval()
        verdicts = []
        for part in images.to(self.ground.weight).split(batch_size):
            counts, hatching, ground = (head.argmax(-1).tolist() for head in self(part))
            for row, h, g in zip(counts, hatching, ground):
                shapes = sorted(shape for shape, count in zip(SHAPES, row) for _ in range(count))
                verdicts.append({"shapes": shapes, "hatching": HATCHINGS[h], "ground": GROUNDS[g]})
        return verdicts


# ---- training and test pictures ---------------------------------------------------------------------------------


def toy_pictures(seed: int, n: int, side: int) -> tuple[Tensor, list[dict]]:
    """Items 0..n-1 of a toy seed: uint8 (n, 1, S, S) and their truths."""
    images, truths = np.empty((n, 1, side, side), np.uint8), []
    for index in range(n):
        image, record = draw(seed, index, side)
        images[index, 0] = np.asarray(image)
        truths.append(record["truth"])
    return torch.from_numpy(images), truths


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def blur_and_noise(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Degrade (B, 1, S, S) as a VQ-VAE would: blur, contrast and noise, by a random amount for each picture."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * strength * torch.rand(len(images), 1, 1, 1, generator=generator)

    pixel = images.shape[-1] / 64
    sigma = 0.85 * pixel
    reach = max(1, round(2 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    images = torch.lerp(images, blurred, uniform(0.0, 0.8))
    images = images * (1 - uniform(0.0, 0.25)) + uniform(0.0, 0.2) - 0.1 * strength
    noise = torch.randn(images.shape, generator=generator)
    return (images + uniform(0.0, 0.2) * noise).clamp(-1, 1)


def _targets(truths: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.tensor([[truth["shapes"].count(shape) for shape in SHAPES] for truth in truths])  # (n, K)
    hatching = torch.tensor([HATCHINGS.index(truth["hatching"]) for truth in truths])
    ground = torch.tensor([GROUNDS.index(truth["ground"]) for truth in truths])
    return counts, hatching, ground


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of endless shuffled batches."""
    while True:
        yield from (part for part in torch.randperm(n, generator=generator).split(size) if len(part) == size)


# ---- training ---------------------------------------------------------------------------------------------------


def _recipe(side: int, steps: int, seed: int) -> dict[str, str]:
    """The recipe that a cached judge must match, including the drawings themselves, which may have changed."""
    pictures, truths = toy_pictures(TRAIN_SEED, 64, side)
    facts = [(truth["shapes"], truth["hatching"], truth["ground"]) for truth in truths]
    drawings = hashlib.sha256(pictures.numpy().tobytes() + repr(facts).encode()).hexdigest()
    return {"side": str(side), "steps": str(steps), "seed": str(seed), "drawings": drawings}


def train_judge(side: int = 64, steps: int = 1500, seed: int = 0, cache: Path | None = CACHE) -> Judge:
    """Train a judge, or load the one in the folder `cache` if it has the same recipe and drawings."""
    recipe = _recipe(side, steps, seed)
    path = Path(cache) / f"judge-{side}.safetensors" if cache is not None else None
    if path is not None and path.exists():
        with safe_open(path, "pt") as file:
            same = file.metadata() == recipe
        if same:
            judge = Judge(side)
            judge.load_state_dict(load_file(path))
            return judge.eval()
    judge = _fit(side, steps, seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_file(judge.state_dict(), aside, metadata=recipe)
        os.replace(aside, path)
    return judge


@functools.lru_cache
def _judge_of(side: int) -> Judge:
    return train_judge(side, steps=1500 if side > 32 else 500)


def named(pairs: Sequence[Pair]) -> list[float]:
    """For grpo.judges and grpo.rewards (`benchmarks.toy_judge:named`): on what share of shapes and hatching caption and picture agree."""
    images = torch.stack([torch.from_numpy(np.asarray(pair.image.convert("L"), np.float32))[None] / 127.5 - 1 for pair in pairs])
    shares = []
    for pair, seen in zip(pairs, _judge_of(images.shape[-1]).judge(images)):
        said = parse_caption(pair.caption)
        common = (Counter(said["shapes"]) & Counter(seen["shapes"])).total()
        most = max(len(said["shapes"]), len(seen["shapes"]), 1)
        shares.append((common / most + (said["hatching"] == seen["hatching"])) / 2)
    return shares


def _training_set(side: int, steps: int, seed: int) -> tuple[Tensor, list[dict]]:
    return toy_pictures(TRAIN_SEED + seed, min(steps * BATCH_SIZE, 60_000), side)


def _fit(side: int, steps: int, seed: int, peak_lr: float = 3e-3) -> Judge:
    images, truths = _training_set(side, steps, seed)
    targets = _targets(truths)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # weights and dropout draw from torch's global generator
        torch.manual_seed(seed)
        judge = Judge(side).train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=peak_lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.15)
        started = time.perf_counter()
        for step, rows in zip(range(1, steps + 1), _batches(len(images), BATCH_SIZE, generator)):
            batch = blur_and_noise(to_float(images[rows]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                counts, hatching, ground = judge(batch)
            loss_counts = F.cross_entropy(counts.float().flatten(0, 1), targets[0][rows].flatten())
            loss_hatching = F.cross_entropy(hatching.float(), targets[1][rows])
            loss_ground = F.cross_entropy(ground.float(), targets[2][rows])
            loss = len(SHAPES) * loss_counts + loss_hatching + 0.2 * loss_ground
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                seconds = time.perf_counter() - started
                print(f"judge step {step}/{steps} loss {loss.item():.4f} ({seconds:.0f} s)", flush=True)
    return judge.eval()


def judge_accuracy(
    judge: Judge, n: int = 2000, seed: int = 0, strength: float = 1.0, known: frozenset[bytes] = frozenset()
) -> dict[str, float]:
    """Share of n toy pictures of another seed judged right: `shapes` (exact multiset), `hatching`, `ground`, `all`.

    `strength` scales the blur and noise of training: 1 as trained, 0 for pictures as drawn. Pictures whose bytes are in `known`
    are left out: the toy set has so few distinct pictures that most of another seed's were in the training set. `pictures` is
    the number judged.
    """
    pictures, truths = toy_pictures(TEST_SEED + seed, n, judge.side)
    kept = [row for row in range(n) if pictures[row].numpy().tobytes() not in known]
    if not kept:
        raise UserError(f"all {n} pictures are known: ask for a larger n")
    images, truths = to_float(pictures[kept]), [truths[row] for row in kept]
    if strength > 0:
        images = blur_and_noise(images, torch.Generator().manual_seed(seed), strength)
    verdicts = judge.judge(images)
    facts = ("shapes", "hatching", "ground")
    right = {fact: [verdict[fact] == truth[fact] for verdict, truth in zip(verdicts, truths)] for fact in facts}
    right["all"] = [all(row) for row in zip(*right.values())]
    return {"pictures": len(kept), **{name: sum(column) / len(kept) for name, column in right.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the judge of toy pictures and print its accuracy.")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 128 pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the pictures")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the weights")
    parser.add_argument("--n", type=int, default=14_000, help="pictures of another seed to test on")
    args = parser.parse_args()
    started = time.perf_counter()
    judge = train_judge(args.side, args.steps, args.seed, args.cache)
    millions = sum(p.numel() for p in judge.parameters()) / 1e6
    print(f"{millions:.2f} M parameters, ready after {time.perf_counter() - started:.0f} s")
    known = frozenset(image.numpy().tobytes() for image in _training_set(args.side, args.steps, args.seed)[0])
    columns = ("shapes", "hatching", "ground", "all")
    print(f"{'pictures':<36}{'number':>8}" + "".join(f"{name:>10}" for name in columns))
    for name, strength, left_out in (
        ("another seed, as drawn", 0.0, frozenset()),
        ("another seed, blur and noise", 1.0, frozenset()),
        ("never trained on, blur and noise", 1.0, known),
    ):
        row = judge_accuracy(judge, args.n, args.seed, strength, left_out)
        print(f"{name:<36}{row['pictures']:>8}" + "".join(f"{row[column]:>10.2%}" for column in columns))


if __name__ == "__main__":
    console.run("benchmarks/toy_judge.py", main)

"""How much of a caption can be told from its picture at all? Of held-out pairs, how often the own caption is found first of sixteen.

    python benchmarks/ceiling.py --train 'shards/train-*.tar' --val 'shards/val-*.tar' --weights squeezenet1_1.safetensors --side 64

A ridge regression from ImageNet features of a picture (SqueezeNet 1.1's last layer, mean and maximum over places) to the words of its caption
(the 3,000 most frequent ones of three letters or more, weighed by rarity). It shares nothing with a tokun model and knows photographs, so it is a
mark to measure the generator's PMI by, and no proof that more cannot be had. The penalty is chosen on a tenth of the training pairs.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokun import data, losses

WORDS = 3000
RIVALS, DRAWS = 15, 20
SEEN = 128  # pixels that the network is shown: smaller pictures are enlarged, or its last layer has no places left
PENALTIES = (1e3, 1e4, 1e5, 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="image shards")
    parser.add_argument("--val", required=True, help="held-out image shards")
    parser.add_argument("--weights", default="", help="SqueezeNet 1.1 as safetensors or .pth; empty: download it")
    parser.add_argument("--side", type=int, default=64, help="pixels of the square that is looked at (%(default)s)")
    parser.add_argument("--caption-key", default="caption")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network = losses.SqueezeNetDistance(args.weights)
    (x, captions), (x_val, captions_val) = (read(shards, network, args.side, args.caption_key) for shards in (args.train, args.val))
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, x_val = (x - mean) / spread, (x_val - mean) / spread
    rarity = weights_of(captions)
    y, y_val = bags(captions, rarity), bags(captions_val, rarity)
    order = np.random.default_rng(args.seed).permutation(len(x))
    tenth, rest = order[: len(x) // 10], order[len(x) // 10 :]
    scores = {penalty: first(fit(x[rest], y[rest], penalty), x[tenth], y[tenth], args.seed) for penalty in PENALTIES}
    penalty = max(scores, key=lambda p: scores[p])
    found = first(fit(x, y, penalty), x_val, y_val, args.seed)
    error = 1.96 * math.sqrt(found * (1 - found) / len(x_val))
    wordless = float((np.abs(y_val).sum(1) == 0).mean())
    print(
        f"{len(x)} training pairs, {len(x_val)} held out, {args.side} px, penalty {penalty:g} (first of 16 in the tenth left out: {scores[penalty]:.1%})\n"
        f"held out: the own caption first of {RIVALS + 1} in {found:.1%} (about {found - error:.1%} to {found + error:.1%}; chance {1 / (RIVALS + 1):.1%}); "
        f"{wordless:.1%} of the captions hold none of the words"
    )


@torch.inference_mode()
def read(shards: str, network: losses.SqueezeNetDistance, side: int, key: str) -> tuple[np.ndarray, list[str]]:
    """float32 (n, 1024) features of the pictures' centres, and their captions."""
    index = data.ShardIndex(data.expand_shards(shards), one_of=data.IMAGE_SUFFIXES)
    samples = data.ImageSamples(index, side, 1)
    rows, captions = [], []
    for start in tqdm(range(0, len(samples), 64), desc="features", unit="batch"):
        crops = []
        for i in range(start, min(start + 64, len(samples))):
            image = samples.picture(i)
            crops.append(data.crop(image, data.centre_box(*image.size), side))
            captions.append(str(index.read_json(i).get(key, "")))
        images = torch.nn.functional.interpolate(data.to_float(np.stack(crops)), max(side, SEEN), mode="bicubic").clamp(-1, 1)
        last: Tensor = network.taps(images)[-1]
        rows.append(torch.cat([last.mean((2, 3)), last.amax((2, 3))], 1).numpy())
    return np.concatenate(rows), captions


def words(caption: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{3,}", caption.lower()))


def weights_of(captions: list[str]) -> dict[str, float]:
    """The most frequent words, by how rare they are."""
    counts = Counter(word for caption in captions for word in words(caption))
    return {word: math.log(len(captions) / count) for word, count in counts.most_common(WORDS) if count >= 5}


def bags(captions: list[str], rarity: dict[str, float]) -> np.ndarray:
    """float32 (n, words), rows of length 1, or 0 where no word is known."""
    columns = {word: i for i, word in enumerate(rarity)}
    bag = np.zeros((len(captions), len(columns)), np.float32)
    for row, caption in enumerate(captions):
        for word in words(caption) & columns.keys():
            bag[row, columns[word]] = rarity[word]
    return bag / np.maximum(np.linalg.norm(bag, axis=1, keepdims=True), 1e-6)


def fit(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """What is to be multiplied from the right: features -> words above or below their means."""
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1], dtype=np.float32), x.T @ (y - y.mean(0)))


def first(matrix: np.ndarray, x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """How often a picture's own caption scores above RIVALS others', drawn DRAWS times."""
    scores, rng = (x @ matrix) @ y.T, np.random.default_rng(seed)
    hits = 0
    for own in range(len(x)):
        others = rng.integers(len(x) - 1, size=(DRAWS, RIVALS))
        hits += int((scores[own, own] > scores[own][others + (others >= own)].max(1)).sum())
    return hits / (len(x) * DRAWS)


if __name__ == "__main__":
    main()

"""Are samples copies of training pictures? Each sample's nearest training picture, and the likelihood gap of training and held-out pairs.

A sample can only repeat a training picture as its codes show it, so training and held-out pictures are also compared as reconstructions.
Near means: by features, nearer to a training picture than 95 % of the held-out pictures are; by dHash, at most HASH_BITS of 64 bits
different; by codes, at least CODES_SHARE of them equal. Copies with a quarter of their codes changed show what would be found.

    nearest.png    the samples nearest to a training picture, with those nearest to them
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokun import data
from tokun.evaluate.doctor import reconstruct
from tokun.evaluate.features import BATCH, NEEDED, Features
from tokun.evaluate.figures import Figure, bootstrap, mean, share, skipped
from tokun.evaluate.held_out_pairs import RealPair, grids_of, samples_of
from tokun.inference.image_to_codes import see
from tokun.inference.model import Pair, Tokun
from tokun.render.grids import as_picture, pair_sheet
from tokun.utils.optional_packages import need

HASH_BITS = 10  # of 64
CODES_SHARE = 0.25
HELD_OUT_SHARE = 0.05  # of held-out pictures are nearer than the distance that counts as near by features
CHANGED = 0.25  # share of a copy's codes


class Coded(NamedTuple):
    """A picture's codes and their grid."""

    codes: Sequence[int]
    grid: tuple[int, int]


Nearest = dict[str, tuple[Tensor, Tensor]]  # way -> each picture's distance to the nearest training picture, and that one's number
WAYS = ("features", "dHash", "codes")


def measure(
    model: Tokun, held_out: Sequence[RealPair], samples: Sequence[Pair], *, train: Sequence[RealPair], train_shards: str, limit: int = 0,
    seed: int = 0, features: Features | None = None, out: Path | None = None,
) -> list[Figure]:  # fmt: skip
    """`train`: some training pairs, for the gap; `train_shards`: all pictures to search (the first `limit`; 0: all)."""
    gap = likelihood_gap(model, held_out, train, seed)
    if features is None:
        return [skipped("near copies", NEEDED), *gap]
    pictures = samples_of(model, data.ShardIndex(data.expand_shards(train_shards), need=(), one_of=data.IMAGE_SUFFIXES).usable())
    count = min(limit or len(pictures), len(pictures))
    groups = [[Coded(pair.codes, grid) for pair, grid in zip(pairs, grids_of(model, pairs))] for pairs in (samples, held_out)]
    groups.append(changed_copies(model, pictures, count, len(held_out), seed))
    found = nearest(model, [one for group in groups for one in group], pictures, count, features)
    if out is not None:
        sheet([pair.image for pair in samples], found, pictures).save(out / "nearest.png")
    mine, held, copies = (_rows(found, rows) for rows in torch.arange(sum(map(len, groups))).split([len(group) for group in groups]))
    return [*near_copies(mine, held, copies, count, features.name), *gap]


# --- near copies ----------------------------------------------------------------------------------------------------


def nearest(model: Tokun, wanted_codes: Sequence[Coded], pictures: data.ImageSamples, count: int, features: Features) -> Nearest:
    """For each coded picture, the nearest of the first `count` training pictures, in batches. Codes of different grids never match."""
    queries = reconstruct(model, *zip(*wanted_codes))
    wanted, hashes = F.normalize(features(queries), dim=1), dhash(queries)
    best: Nearest = {way: (torch.full((len(queries),), torch.inf, dtype=torch.float64), torch.zeros(len(queries)).long()) for way in WAYS}
    for start in tqdm(range(0, count, BATCH), desc="memorisation: training pictures", unit="batch", leave=False):
        known = coded(model, pictures, range(start, min(count, start + BATCH)))
        shown = reconstruct(model, *zip(*known))
        apart = {
            "features": 1 - wanted @ F.normalize(features(shown), dim=1).T,
            "dHash": (hashes[:, None] != dhash(shown)).sum(-1).double(),
            "codes": codes_apart(wanted_codes, known),
        }
        best = {way: _nearer(*best[way], apart[way], start) for way in WAYS}
    return best


def coded(model: Tokun, pictures: data.ImageSamples, numbers: Iterable[int]) -> list[Coded]:
    return [Coded(seen.codes, seen.grid) for seen in see(model, [shown_of(pictures, int(i)) for i in numbers])]


def codes_apart(a: Sequence[Coded], b: Sequence[Coded]) -> Tensor:
    """(n, m): the share of codes that differ between two pictures; 1 if their grids differ."""
    apart = torch.ones(len(a), len(b), dtype=torch.float64)
    for grid in {one.grid for one in a} & {one.grid for one in b}:
        rows, columns = ([i for i, one in enumerate(side) if one.grid == grid] for side in (a, b))
        x, y = (torch.tensor([list(side[i].codes) for i in places]) for side, places in ((a, rows), (b, columns)))
        apart[torch.tensor(rows)[:, None], torch.tensor(columns)] = (x[:, None] != y).double().mean(-1)
    return apart


def _rows(found: Nearest, rows: Tensor) -> Nearest:
    return {way: (apart[rows], place[rows]) for way, (apart, place) in found.items()}


def _nearer(value: Tensor, place: Tensor, apart: Tensor, start: int) -> tuple[Tensor, Tensor]:  # apart (n, batch)
    least, where = apart.min(1)
    return torch.minimum(value, least), torch.where(least < value, where + start, place)


def changed_copies(model: Tokun, pictures: data.ImageSamples, count: int, n: int, seed: int) -> list[Coded]:
    """n training pictures with a share CHANGED of their codes, at random positions, replaced by those of another one of the same grid."""
    rng, out = np.random.default_rng(seed), []
    chosen = coded(model, pictures, rng.choice(count, min(n, count), replace=False))
    for grid in dict.fromkeys(one.grid for one in chosen):
        codes = torch.tensor([one.codes for one in chosen if one.grid == grid])
        changed = torch.where(torch.from_numpy(rng.random(codes.shape) < CHANGED), codes.roll(1, 0), codes)
        out += [Coded(row, grid) for row in changed.tolist()]
    return out


def shown_of(pictures: data.ImageSamples, i: int) -> Image.Image:
    """A training picture as the model sees it."""
    framed = pictures.whole(i)
    return as_picture(pictures.cut(framed, framed.box))


def dhash(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 64) bool."""
    imagehash = need("imagehash", extra="eval")
    return torch.from_numpy(np.stack([imagehash.dhash(picture).hash.flatten() for picture in pictures]))


def near_copies(mine: Nearest, held: Nearest, copies: Nearest, count: int, network: str) -> list[Figure]:
    limit = float(held["features"][0].quantile(HELD_OUT_SHARE))
    limits = {
        "features": (limit, f"cosine distance of {network} features at most {limit:.4g}; {count} training pictures, all through the codes"),
        "dHash": (HASH_BITS, f"at most {HASH_BITS} of 64 bits differ"),
        "codes": (1 - CODES_SHARE, f"at least {CODES_SHARE:.0%} of the codes are the same"),
    }
    name, note = "distance to the nearest training picture", f"cosine, {network} features, {count} training pictures"
    figures = [
        mean(f"{name}, samples", mine["features"][0].tolist(), note=note),
        mean(f"{name}, held-out", held["features"][0].tolist()),
    ]
    changed = f"the same for training pictures with {CHANGED:.0%} of their codes changed"
    for way, (most, note) in limits.items():
        near = [(found[way][0] <= most).tolist() for found in (mine, held, copies)]
        figures += [
            share(f"near copies by {way}, samples", near[0], better="less", note=note),
            share(f"near copies by {way}, held-out", near[1], note="the same for held-out pictures"),
            share(f"near copies by {way}, copies found", near[2], better="more", note=changed),
        ]
    return figures


def sheet(samples: Sequence[Image.Image], found: Nearest, pictures: data.ImageSamples, rows: int = 16) -> Image.Image:
    """The samples nearest to a training picture by features, with the nearest picture in each way."""
    chosen = found["features"][0][: len(samples)].argsort()[:rows].tolist()
    lines = [(samples[i], *(shown_of(pictures, int(found[way][1][i])) for way in WAYS)) for i in chosen]
    return pair_sheet(lines, ["sample", *(f"by {way}" for way in WAYS)])


# --- likelihood -----------------------------------------------------------------------------------------------------


def likelihood_gap(model: Tokun, held_out: Sequence[RealPair], train: Sequence[RealPair], seed: int) -> list[Figure]:
    """Nats per token of held-out and training pairs, for codes and words, and their difference."""
    found = []
    notes = ("codes given the tags", "pieces of the caption and its end, given picture and tags")
    for name, nats, note in zip(("image", "text"), (image_nats, text_nats), notes):
        held, known = nats(model, held_out), nats(model, train)
        for whose, cases in (("held-out", held), ("training", known)):
            low, high = bootstrap(cases, _a_token, seed=seed)
            found.append(Figure(f"nats per {name} token, {whose}", _a_token(cases), len(cases), low, high, "less", note))
        rng = np.random.default_rng(seed)
        again = [
            _a_token(held[rng.integers(0, len(held), len(held))]) - _a_token(known[rng.integers(0, len(known), len(known))])
            for _ in range(1000)
        ]
        low, high = np.percentile(again, [2.5, 97.5])
        gap, note = _a_token(held) - _a_token(known), "held-out minus training: memorised"
        found.append(Figure(f"nats per {name} token, gap", gap, len(held), float(low), float(high), "less", note))
    return found


def _a_token(cases: np.ndarray) -> float:  # (n, 2): nats, tokens
    return float(cases[:, 0].sum() / cases[:, 1].sum())


def text_nats(model: Tokun, pairs: Sequence[RealPair]) -> np.ndarray:
    """(n, 2): nats of the caption and its end given picture and tags, and their number of tokens."""
    nats = model.caption_nll([p.tags for p in pairs], [p.caption_ids for p in pairs], [p.codes for p in pairs])
    return np.array([(nll, len(pair.caption_ids) + 1) for nll, pair in zip(nats, pairs)])


def image_nats(model: Tokun, pairs: Sequence[RealPair]) -> np.ndarray:
    """(n, 2): nats of the codes given the tags, and their number."""
    nats = model.image_nll([p.tags for p in pairs], [p.codes for p in pairs])
    return np.array([(nll, len(pair.codes)) for nll, pair in zip(nats, pairs)])

"""Rewards for captions: how well the picture explains them, and whether they form a proper caption. Each maker takes a reward's config
and the frozen model, and returns a function from pairs to numbers.

PMI and its like are by the frozen model, or by the checkpoint that `of` names, such as one of another seed: it reads the picture anew, and
the words with its own tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokun.evaluate.captions import loops, unfinished, words
from tokun.evaluate.coherence import pmi_of
from tokun.evaluate.held_out_pairs import read_captions
from tokun.evaluate.recognition import CANDIDATES
from tokun.inference import candidates
from tokun.inference.image_to_codes import see
from tokun.inference.load import load
from tokun.inference.matching import head_of
from tokun.tokenizers.vocabulary import Tags
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.config import RewardConfig
    from tokun.inference.model import Pair, Tokun


@dataclass(frozen=True)
class Reading:
    """A pair as another checkpoint reads it."""

    tags: Tags
    codes: list[int]
    caption_ids: list[int]
    caption: str


Readable = Sequence[Any]  # pairs or readings: both have tags, codes, caption_ids and caption


def reader(asked: RewardConfig, model: Tokun) -> tuple[Tokun, Callable[[Sequence[Pair]], Readable]]:
    """The model that scores, and how it reads pairs: `model` and the pairs themselves; or the checkpoint `of`, without the tags
    that it does not know. Raises UserError or FileNotFoundError if it cannot be loaded."""
    if not asked.of:
        return model, lambda pairs: pairs
    other = load(asked.of, device=str(model.device))
    v, encode = other.vocabulary, other.text_tokenizer.encode

    def read(pairs: Sequence[Pair]) -> list[Reading]:
        return [
            Reading(v.known(replace(pair.tags, grid=seen.grid)), seen.codes, encode(pair.caption)[: v.max_text], pair.caption)
            for pair, seen in zip(pairs, see(other, [pair.image for pair in pairs]))
        ]

    return other, read


def parts(pairs: Readable) -> tuple[list[Tags], list[list[int]], list[list[int]]]:
    """Tags, captions and codes."""
    return [p.tags for p in pairs], [p.caption_ids for p in pairs], [p.codes for p in pairs]


def pmi(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """log p(caption | picture) - log p(caption), in nats, by the frozen model: the trained one could inflate its own score."""
    judge, read = reader(asked, model)
    return lambda pairs: judge.pmi(*parts(read(pairs)))


def likelihood(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """log p(caption | picture), in nats, by the frozen model: high where it is sure of what it has drawn. Favours what is common."""
    judge, read = reader(asked, model)
    return lambda pairs: [-nats for nats in judge.caption_nll(*parts(read(pairs)))]


def mmi(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """log p(caption | picture) - 1/2 log p(caption), in nats, by the frozen model (weighted maximum mutual information, Li et al. 2016):
    half-way between `pmi` and `likelihood`."""
    judge, read = reader(asked, model)

    def score(pairs: Sequence[Pair]) -> list[float]:
        tags, captions, codes = parts(read(pairs))
        alone, given = judge.caption_nll(tags, captions), judge.caption_nll(tags, captions, codes)
        return [a / 2 - g for a, g in zip(alone, given, strict=True)]

    return score


def pmi_both(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """PMI from picture to caption and from caption to picture, without tags (`candidates.pmi_both`), in nats, by the frozen model."""
    judge, read = reader(asked, model)
    return lambda pairs: candidates.pmi_both(judge, read(pairs))


def match(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """How well caption and picture fit by the matching head of the frozen model (`Tokun.match`): a cosine."""
    judge, read = reader(asked, model)
    head_of(judge)
    return lambda pairs: judge.match(read(pairs))


def pmi_first(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """The share of the own caption's exp(PMI) in the sum over it and 15 other captions of the batch, by the frozen model: 0 to 1. Raises
    UserError if a pair has fewer rivals.

    PMI alone has no upper end: captions that are unlikely without their picture raise it, true or not (docs/guides/rewards.md).
    """

    judge, read = reader(asked, model)

    def score(pairs: Sequence[Pair]) -> list[float]:
        table = pmi_of(judge, read(pairs), np.array([[i, *rivals(pairs, i)] for i in range(len(pairs))]))
        return torch.from_numpy(table).softmax(1)[:, 0].tolist()

    return score


def rivals(pairs: Sequence[Pair], i: int, count: int = CANDIDATES - 1) -> list[int]:
    """`count` pairs with captions other than that of pair i, spread evenly over the batch, each caption once."""
    after = [(i + step) % len(pairs) for step in range(1, len(pairs))]
    found = {pairs[j].caption: j for j in after if pairs[j].caption != pairs[i].caption}
    if len(found) < count:
        raise UserError(f"a batch of {len(pairs)} pairs has {len(found)} other captions; {count} are needed: raise train.batch_size")
    return list(found.values())[:: max(1, len(found) // count)][:count]


def caption(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """1 for a caption that ends properly, has no immediate repetitions and is not a verbatim copy from the shards; a third less for each
    fault. Without shards, copies and truncated words go undetected."""
    lines = read_captions(asked.shards) if asked.shards else []
    known = Counter(word for line in lines for word in words(line))
    learnt = {" ".join(words(line)) for line in lines}

    def score(pairs: Sequence[Pair]) -> list[float]:
        faults = [
            unfinished(p.caption, known, len(p.caption_ids) >= model.vocabulary.max_text)
            + loops(p.caption)
            + (" ".join(words(p.caption)) in learnt)
            for p in pairs
        ]
        return [1 - count / 3 for count in faults]

    return score

"""Rewards for captions: how well the picture explains them, and whether they form a proper caption. Each maker takes a reward's config
and the frozen model, and returns a function from pairs to numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokun.evaluate.captions import loops, unfinished, words
from tokun.evaluate.held_out_pairs import read_captions

if TYPE_CHECKING:
    from tokun.config import RewardConfig
    from tokun.inference.model import Pair, Tokun


def pmi(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """log p(caption | picture) - log p(caption), in nats, by the frozen model: the trained one could inflate its own score."""
    return lambda pairs: model.pmi([p.tags for p in pairs], [p.caption_ids for p in pairs], [p.codes for p in pairs])


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

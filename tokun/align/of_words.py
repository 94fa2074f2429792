"""Rewards that look at words: how far the picture explains them, and whether they are a caption at all. Each maker takes what a config says
of one reward and the frozen model, and returns a function from pairs to numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokun.evaluate.material import read_captions
from tokun.evaluate.words import loops, unfinished, words

if TYPE_CHECKING:
    from tokun.config import RewardConfig
    from tokun.inference.model import Pair, Tokun


def pmi(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """log p(caption | picture) - log p(caption), in nats, by the frozen model: the one that learns could raise its own opinion of itself."""
    return lambda pairs: model.pmi([p.tags for p in pairs], [p.caption_ids for p in pairs], [p.codes for p in pairs])


def caption(asked: RewardConfig, model: Tokun) -> Callable[[Sequence[Pair]], list[float]]:
    """1 for a caption that ends where it should, says nothing twice in a row and is not, word for word, one of the shards'; a third less for each
    fault. Without shards nothing is known of what was learnt by heart, and of words that are cut."""
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

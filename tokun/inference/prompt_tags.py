"""Which subject and thing fit a given caption, according to the model itself.

In a sequence the tags come before the caption, so the generator knows p(caption | tags). By Bayes' rule, this times the frequencies of
the tags in training gives the tags that a prompt calls for: "A pelican in the reeds." calls for a bird. A picture drawn from a prompt
gets those tags, because they steer it more strongly than words do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokun.inference.tags import Frequencies
from tokun.tokenizers.vocabulary import Tags

if TYPE_CHECKING:
    from tokun.inference.model import Tokun

LEAST = 0.05  # share below which a subject's things are not compared, unless it is the likeliest
Likelihoods = dict[tuple[str, str], float]  # (subject, thing) -> p(caption | both), over the greatest


def likelihoods(model: Tokun, caption: Sequence[int], wanted: Tags, counts: Frequencies) -> Likelihoods:
    """p(caption | subject, thing), relative to the greatest, of the pairs that occur with `wanted`. Pairs that are left out are unlikely.

    Args:
        caption: text ids of the prompt.
        wanted: the requested tags, which are not inferred.
        counts: how often tags occur together in training.

    First the subjects are compared, then the things of the likely ones: at most some 200 short sequences.
    """
    pairs = counts.subjects_and_things(wanted)
    sums: dict[str, float] = {}
    for (subject, _), n in pairs.items():
        sums[subject] = sums.get(subject, 0.0) + n
    kept = set(sums)
    if len(sums) > 1:
        nats = nats_of(model, caption, wanted, [(subject, wanted.thing) for subject in sums])
        logs = {subject: math.log(n) - nats[subject, wanted.thing] for subject, n in sums.items() if n > 0}
        weights = {subject: math.exp(value - max(logs.values())) for subject, value in logs.items()}
        kept = {subject for subject, weight in weights.items() if weight >= min(1.0, LEAST * sum(weights.values()))}
    asked = [pair for pair in pairs if pair[0] in kept]
    if len(asked) < 2:  # nothing to compare
        return dict.fromkeys(asked, 1.0)
    nats = nats_of(model, caption, wanted, asked)
    least = min(nats.values())
    return {pair: math.exp(least - value) for pair, value in nats.items()}


def nats_of(model: Tokun, caption: Sequence[int], wanted: Tags, pairs: Sequence[tuple[str, str]]) -> Likelihoods:
    """-log p(caption | subject, thing) of each pair, in nats. Subjects without a tag are untagged."""
    v = model.vocabulary
    register, grid = wanted.register or v.default_register, wanted.grid or v.default_grid
    tags = [Tags(wanted.style, subject if subject in v.subjects else "", register, grid, thing) for subject, thing in pairs]
    return dict(zip(pairs, model.caption_nll(tags, [list(caption)] * len(tags))))

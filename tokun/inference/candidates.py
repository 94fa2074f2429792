"""The best of several: the candidates of a pair, and the scores by which one is chosen.

match        how well caption and picture fit by the checkpoint's matching head: the default where it has one
pmi_both     PMI as the model estimates it from picture to caption and from caption to picture, without tags: the default without a head
pmi          nats of the caption that its picture explains: log p(caption | picture) - log p(caption), under the pair's tags
likelihood   log p(caption | picture), under the tags
mmi          the mean of the last two
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tokun.config import MAX_CANDIDATES
from tokun.inference.matching import head_of
from tokun.inference.sampling_arguments import with_sampling_options
from tokun.inference.token_choice import is_whole
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tokun.inference.model import Pair, SamplingPlan, Tokun, Watch
    from tokun.inference.sampling_arguments import SamplingArguments

Score = Callable[[list["Pair"]], list[float]]


def require_candidates(count: int, where: str = "", least: int = 1) -> None:
    """Raise UserError, beginning with `where`, unless a pair can have that many candidates."""
    if not is_whole(count) or not least <= count <= MAX_CANDIDATES:
        raise UserError(f"{where}best_of is {count!r}; it must be a whole number from {least} to {MAX_CANDIDATES:,}")


def pmi_both(model: Tokun, pairs: Sequence[Any]) -> list[float]:
    """PMI of each picture and its caption in nats, estimated in both directions: the mean of log p(caption | picture) - log p(caption) and
    log p(picture | caption) - log p(picture).

    The model that reads a picture and the one that draws it agree on what is plain to see. Style, subject and thing are withheld, so that
    the picture itself has to show them. A model that does not draw from captions has the first estimate alone. `pairs` have tags, codes
    and caption_ids.
    """
    if not pairs:
        return []
    tags = [pair.tags.without_kinds() for pair in pairs]
    captions, codes = [pair.caption_ids for pair in pairs], [pair.codes for pair in pairs]
    if not model.can("text_to_image"):
        return model.pmi(tags, captions, codes)
    drawn, given = zip(*model.pair_nll(tags, codes, captions))
    prompted, alone = zip(*model.pair_nll(tags, codes, captions, caption_first=True))
    return [(a - g + i - p) / 2 for a, g, i, p in zip(alone, given, drawn, prompted)]


OWN_SCORES: dict[str, Callable[[Tokun, list[Pair]], list[float]]] = {
    "match": lambda model, pairs: model.match(pairs),
    "pmi_both": pmi_both,
    "pmi": lambda model, pairs: [pair.pmi for pair in pairs],
    "likelihood": lambda model, pairs: [-pair.caption_nll for pair in pairs],
    "mmi": lambda model, pairs: [(pair.pmi - pair.caption_nll) / 2 for pair in pairs],
}
"""Scores by the model itself; the last three are those that a pair was drawn with."""


def own_score(model: Tokun, name: str) -> Score:
    """One of OWN_SCORES as the `score` of `best_of`. Raises UserError for another name."""
    if name not in OWN_SCORES:
        raise UserError(f"score is {name!r}; it must be one of {', '.join(OWN_SCORES)}, or a function of pairs")
    return partial(OWN_SCORES[name], model)


def default_score(model: Tokun, register: str = "") -> str:
    """The name of the score that chooses where none is named, among captions of this register. The matching head knows plain ones only."""
    plain = register in ("", model.vocabulary.default_register)
    return "match" if plain and model.matching is not None else "pmi_both"


def require_score(model: Tokun, score: Score | str | None) -> None:
    """Raise UserError for a name that is no score, or one that the checkpoint cannot give."""
    if isinstance(score, str):
        own_score(model, score)
    if score == "match":
        head_of(model)


def chosen_by(model: Tokun, score: str, register: str = "") -> dict[str, str]:
    """What a record says of a choice by the matching head, so that one with another head is not continued; `score`: "" for the default."""
    named = score or default_score(model, register)
    return {"matching": head_of(model).fingerprint()} if named == "match" else {}


@with_sampling_options
def best_of(
    model: Tokun,
    seed: int,
    n: int,
    candidates: int,
    score: Score | str | None = None,
    *,
    first: int = 0,
    plan: SamplingPlan | None = None,
    watch: Watch | None = None,
    **options: Unpack[SamplingArguments],
) -> list[Pair]:
    """For each of n pairs, the candidate with the highest score: a function, the name of one of OWN_SCORES, or None for `default_score`.
    A `plan` replaces the options, and can serve several calls. `watch` is that of `Tokun.sample`; it sees the first candidate. Raises
    UserError as `Tokun.sample` does, for an impossible number of candidates, or for a score that the checkpoint cannot give.

    Choice i, counted from `first`, is among the samples i * candidates … of the seed, so it does not depend on n.
    """
    require_candidates(candidates)
    require_score(model, score)
    pairs = model.draw(seed, range(first * candidates, (first + n) * candidates), plan or model.plan(**options), watch=watch)
    if candidates == 1:
        return pairs
    scores = scores_of(model, pairs, candidates, score, watch)
    return [pairs[max(range(i, i + candidates), key=lambda j: scores[j])] for i in range(0, len(pairs), candidates)]


def scores_of(
    model: Tokun, pairs: list[Pair], candidates: int, score: Score | str | None = None, watch: Watch | None = None
) -> list[float]:
    """The score of each pair, as for `best_of`. By the model's own scores one choice's candidates at a time: the last digits of a
    likelihood depend on its batch, and a choice must not depend on how many are made. `watch` sees the first pair before each."""
    if callable(score):
        return score(pairs)
    register = pairs[0].tags.register if pairs else ""  # that of the plan, of all
    own = own_score(model, score or default_score(model, register))
    found: list[float] = []
    for i in range(0, len(pairs), candidates):
        if watch is not None:
            watch(pairs[0].codes, pairs[0].caption_ids)
        found += own(pairs[i : i + candidates])
    return found

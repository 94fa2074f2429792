"""Preferences: pairs of a chosen and a rejected sample, from best-of sampling or a visitor's clicks, for `tokun.training.preferences`.

A line of a JSONL file (or the .json of a tar's sample) is {"chosen": RECORD, "rejected": RECORD}, each a line of samples.jsonl:
    codes        0 … K-1, raster order
    caption_ids  ids of the caption; or `caption`, its text
    tags         {"style": …, "subject": …, "thing": …, "register": …, "grid": [rows, columns]}, those in the prompt
    prompted     true if the caption was given and the picture drawn from it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tokun import data
from tokun.inference import latents
from tokun.inference.candidates import require_candidates, require_score, scores_of
from tokun.inference.sampling_arguments import with_sampling_options
from tokun.tokenizers import sequences
from tokun.tokenizers.sequences import Packed
from tokun.tokenizers.vocabulary import Tags, Vocabulary
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tokun.inference.model import Pair, Tokun
    from tokun.inference.sampling_arguments import SamplingArguments


@dataclass(frozen=True)
class Preference:
    """Two sequences of one model; `same`: whether they have the same tags and prompt, if any."""

    chosen: Packed
    rejected: Packed
    same: bool


def lines(pairs: Sequence[tuple[Pair, Pair]]) -> str:
    """JSONL of (chosen, rejected)."""
    return "".join(json.dumps({"chosen": a.record(), "rejected": b.record()}, ensure_ascii=False) + "\n" for a, b in pairs)


@with_sampling_options
def best_and_worst(
    model: Tokun,
    seed: int,
    n: int,
    candidates: int,
    score: Callable[[list[Pair]], list[float]] | str | None = None,
    **options: Unpack[SamplingArguments],
) -> list[tuple[Pair, Pair]]:
    """As `candidates.best_of`, but the best and the worst candidate of each sample. All candidates of a sample have the tags
    drawn by the first one, so that both are comparable."""
    require_candidates(candidates, least=2)
    if n < 1:
        raise UserError(f"n is {n}; it must be at least 1")
    require_score(model, score)
    plan = model.plan(**options)
    batch_size = plan.options.batch_size
    together = max(1, batch_size // candidates)  # samples
    found = []
    with tqdm(total=n, desc="preferences", unit="sample", dynamic_ncols=True, disable=n * candidates <= batch_size) as bar:
        for first in range(0, n, together):
            numbers = range(first * candidates, min(n, first + together) * candidates)
            u = model.uniforms(seed, numbers)
            latents.share_tags(u, candidates)
            pairs = model.draw(seed, numbers, plan, u=u)
            scores = scores_of(model, pairs, candidates, score)
            for i in range(0, len(pairs), candidates):
                ranked = sorted(range(i, i + candidates), key=lambda j: scores[j])
                if scores[ranked[-1]] > scores[ranked[0]]:
                    found.append((pairs[ranked[-1]], pairs[ranked[0]]))
            bar.update(len(pairs) // candidates)
    return found


def clicked(better: Sequence[Pair], worse: Sequence[Pair]) -> list[tuple[Pair, Pair]]:
    """Every liked pair with every disliked one of the same tags and prompt."""
    return [(a, b) for a in better for b in worse if _wish(a) == _wish(b)]


def compared(chosen: Pair, rejected: Pair) -> tuple[Pair, Pair]:
    """Two pairs of which one was preferred. If their prompts differ, they are compared as pairs of picture and words,
    as if neither had been prompted."""
    if _wish(chosen) == _wish(rejected):
        return chosen, rejected
    return replace(chosen, prompted=False), replace(rejected, prompted=False)


def _wish(pair: Pair) -> tuple[Any, ...]:
    return (pair.prompted, tuple(pair.caption_ids) if pair.prompted else (), pair.tags.register if pair.prompted else "")


def read(pattern: str, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> list[Preference]:
    """All preferences in JSONL files and tars: a path, a glob or a comma-separated list.

    Raises FileNotFoundError for missing files, UserError naming the first line that is invalid or of another model.
    """
    found: list[Preference] = []
    for path in data.expand_shards(pattern):
        for where, tree in _trees(path):
            try:
                chosen, rejected = (side(tree[name], vocabulary, encode) for name in ("chosen", "rejected"))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
                raise UserError(
                    f"{where} is not a preference of this model: {reason}. It must hold chosen and rejected, each a line of samples.jsonl"
                ) from error
            if chosen[0].input_ids != rejected[0].input_ids:
                found.append(Preference(chosen[0], rejected[0], chosen[1] == rejected[1]))
    if not found:
        raise UserError(f"{pattern} holds no preferences: chosen and rejected must differ")
    return found


def _trees(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".tar":
        index = data.ShardIndex([path], need=("json",)).usable()
        yield from ((f"{path}, sample {index.key(i)}", index.read_json(i)) for i in range(len(index)))
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error


def side(tree: dict[str, Any], v: Vocabulary, encode: Callable[[str], list[int]]) -> tuple[Packed, Any]:
    """One side's sequence, and its tags and prompt."""
    named = dict(tree.get("tags") or {})
    grid = named.pop("grid", None)
    tags = Tags(**named, grid=tuple(grid) if grid else None)
    for name in tags.names():
        v.id(name)
    caption = tree["caption_ids"] if "caption_ids" in tree else encode(str(tree["caption"]))[: v.max_text]
    if tree.get("prompted"):
        return sequences.pack_text_to_image(v, tags, tree["codes"], caption), (tags, tuple(caption))
    return sequences.pack_joint(v, tags, tree["codes"], caption), tags

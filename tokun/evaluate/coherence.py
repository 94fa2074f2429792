"""Do picture and words fit each other? Judged by the model's own likelihoods (PMI), by CLIP, and by an independently trained judge.

How often does each picture find its own caption among others, and each caption its own picture? Held-out pairs measure how
well the model reads, generated pairs whether picture and caption belong together. Captions that read alike are never rivals,
since neither would be wrong. Knows pairs and scores; external models are in `judges`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from tokun.evaluate import figures, plots, recognition
from tokun.evaluate.doctor import reconstructed
from tokun.evaluate.figures import Figure
from tokun.evaluate.held_out_pairs import RealPair
from tokun.inference import matching
from tokun.inference.clip import Clip
from tokun.inference.streams import cache_name
from tokun.tokenizers import sequences
from tokun.tokenizers.grammar import STATES
from tokun.tokenizers.vocabulary import Tags

if TYPE_CHECKING:
    from tokun.evaluate.features import Features
    from tokun.inference.model import Pair, Tokun

CANDIDATES = 16  # captions that each picture chooses among
DRAWN = 256  # pictures whose likelihoods given captions are computed: nothing is shared between captions, so each takes seconds
RETRIEVED = 64  # pictures and captions in a retrieval group


def measure(
    model: Tokun, held_out: Sequence[RealPair], samples: Sequence[Pair], *, seed: int, clip: str | None = None, judge: str | None = None,
    out: Path | None = None,
) -> list[Figure]:  # fmt: skip
    """`clip`: an open_clip model (see `tokun.inference.clip.Clip`); `judge`: the folder written by benchmarks/clip_judge.py. Writes
    ranks.png into `out`.

    Without two pairs with different captions there is no choice, and no figure. Raises UserError for a scorer that cannot be opened, before
    anything is measured.
    """
    scorers = {
        name: Clip(weights, device=str(model.device), option=option)
        for name, option, weights in (("CLIP", "--clip", clip), ("judge", "--judge", judge))
        if weights
    }
    found: list[Figure] = []
    chosen: dict[str, np.ndarray] = {}
    ranks: dict[str, np.ndarray] = {}
    for what, pairs in (("held-out", held_out), ("generated", samples)):
        made, chosen[what], ranks[what] = by_pmi(model, pairs, what, seed)
        found += made + without_tags(model, pairs, what, seed) + by_head(model, pairs, what, seed)
    if out is not None and any(r.size for r in ranks.values()):
        plots.ranks({what: r for what, r in ranks.items() if r.size}, CANDIDATES, out / "ranks.png")
    for name, scorer in scorers.items():
        found += by_clip(scorer, name, model, held_out, "held-out", chosen["held-out"], seed)
        found += by_clip(scorer, name, model, samples, "generated", chosen["generated"], seed)
    return found


def by_recognition(
    pairs: Sequence[RealPair | Pair], what: str, judge: recognition.Judge, network: Features, *, seed: int = 0
) -> list[Figure]:
    """How often a judge that was fitted apart from the model ranks the own caption first of 16 (`recognition`): of originals, which it can
    do at most, and of samples. On SqueezeNet's features it is no stranger: they are the image tokenizer's loss."""
    vectors = network([pair.image for pair in pairs], what=f"coherence: {network.name}").float().numpy()
    share = judge.firsts(vectors, [pair.caption for pair in pairs]).tolist()
    note = f"over all draws of rivals; chance {1 / recognition.CANDIDATES:.1%}; judge of {judge.n} described originals, {network.name}"
    return [figures.mean(f"recognition ranks the own caption first of 16, {what}", share, better="more", note=note, seed=seed)]


# --- by the model's own likelihoods ---------------------------------------------------------------------------------


def by_pmi(model: Tokun, pairs: Sequence[RealPair | Pair], what: str, seed: int) -> tuple[list[Figure], np.ndarray, np.ndarray]:
    """The figures; the candidate each picture chooses (n,), 0 for its own caption; and the rank of its own caption (n,), from 1."""
    captions = [tuple(pair.caption_ids) for pair in pairs]
    order, others = rivals(captions, seed)
    if not others.size:
        return [], np.zeros(0, int), np.zeros(0, int)
    candidates = np.concatenate([np.arange(len(pairs))[:, None], others], 1)
    pmi = pmi_of(model, pairs, candidates)
    own, rest = pmi[:, 0], pmi[:, 1:]
    found = [
        first_of("PMI", what, own, rest),
        figures.mean(f"PMI of the own caption, {what}", own, better="more", note="nats that the picture explains", seed=seed),
        figures.mean(f"PMI of others' captions, {what}", rest.mean(1), better="less", note="nats", seed=seed),
    ]
    few = order[:RETRIEVED]
    table = pmi_of(model, [pairs[i] for i in few], np.tile(np.arange(len(few)), (len(few), 1)))
    return found + retrieval("PMI", what, [(table, [captions[i] for i in few])]), pmi.argmax(1), 1 + (rest >= own[:, None]).sum(1)


def without_tags(model: Tokun, pairs: Sequence[RealPair | Pair], what: str, seed: int) -> list[Figure]:
    """The share of own captions put first while style, subject and thing are withheld, as from any judge that sees the picture alone; and
    the same by PMI in both directions (`candidates.pmi_both`), of at most DRAWN pairs, if the model draws from captions.

    Under the pair's tags, PMI leaves out what the tags say already: a rival of another kind is unlikely with the picture and without it.
    """
    order, others = rivals([tuple(pair.caption_ids) for pair in pairs], seed)
    if not others.size:
        return []
    bare = [replace(pair, tags=pair.tags.without_kinds()) for pair in pairs]
    told = bare == list(pairs)  # by `by_pmi`
    if told and not model.can("text_to_image"):
        return []
    rows = np.concatenate([np.arange(len(pairs))[:, None], others], 1)
    pmi, found = pmi_of(model, bare, rows), []
    if not told:
        found.append(first_of("PMI without tags", what, pmi[:, 0], pmi[:, 1:]))
    if model.can("text_to_image"):
        few = order[:DRAWN]
        both = pmi[few] - drawn_nats(model, bare, rows[few])
        found.append(first_of("PMI in both directions, without tags,", what, both[:, 0], both[:, 1:]))
    return found


def by_head(model: Tokun, pairs: Sequence[RealPair | Pair], what: str, seed: int) -> list[Figure]:
    """The share of own captions put first by the checkpoint's matching head, which is told no tags; nothing without one."""
    _, others = rivals([tuple(pair.caption_ids) for pair in pairs], seed)
    if model.matching is None or not others.size:
        return []
    scores = matching.fit(model, pairs).numpy()
    return [first_of("the matching head", what, scores.diagonal(), np.take_along_axis(scores, others, 1))]


def drawn_nats(model: Tokun, pairs: Sequence[RealPair | Pair], candidates: np.ndarray) -> np.ndarray:
    """(n, k) nats of the picture of pair candidates[i, 0], under its tags, drawn from the captions of the pairs candidates[i]."""
    out = np.empty(candidates.shape)
    for i, row in enumerate(tqdm(candidates.tolist(), desc="pictures given captions", unit="picture", leave=False)):
        pair, captions = pairs[row[0]], [pairs[j].caption_ids for j in row]
        both = model.pair_nll([pair.tags] * len(row), [pair.codes] * len(row), captions, caption_first=True)
        out[i] = [drawn for drawn, _ in both]
    return out


def pmi_of(model: Tokun, pairs: Sequence[RealPair | Pair], candidates: np.ndarray) -> np.ndarray:
    """(n, k) nats: PMI of picture i with the captions of the pairs candidates[i] (n, k), under the tags of pair i.

    The same as `model.pmi` but faster: a caption's likelihood without a picture is computed once per set of tags, and the
    sequence up to the caption once per picture.
    """
    v = model.vocabulary
    wanted: dict[Tags, set[int]] = defaultdict(set)
    for pair, row in zip(pairs, candidates):
        wanted[pair.tags].update(row.tolist())
    alone: dict[tuple[Tags, int], float] = {}
    for tags, rows in wanted.items():
        nats = caption_nats(model, sequences.caption_prompt(v, tags, None), [pairs[j].caption_ids for j in sorted(rows)])
        alone.update(zip([(tags, j) for j in sorted(rows)], nats))
    out = np.empty(candidates.shape)
    for i, (pair, row) in enumerate(zip(pairs, candidates.tolist())):
        given = caption_nats(model, sequences.caption_prompt(v, pair.tags, pair.codes), [pairs[j].caption_ids for j in row])
        out[i] = [alone[pair.tags, j] - nats for j, nats in zip(row, given)]
    return out


@torch.inference_mode()
def caption_nats(model: Tokun, prompt: Sequence[int], captions: Sequence[Sequence[int]], rows: int = 16) -> list[float]:
    """Nats of each caption and its end after one prompt, over legal ids. The prompt is computed once; its keys and values are shared."""
    v, device = model.vocabulary, model.device
    begun = torch.tensor([prompt], device=device)
    seen = model.generator(input_ids=begun, use_cache=True, logits_to_keep=1)
    name = cache_name(seen)
    legal = legal_in_caption(model, max(map(len, captions)) + 1)
    nats = [0.0] * len(captions)
    by_length = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    for at in range(0, len(captions), rows):
        part = by_length[at : at + rows]
        width = len(captions[part[-1]]) + 1
        ids = torch.tensor(sequences.padded(v, [sequences.text_end(v, captions[i]) for i in part]), device=device)
        cache = copy.deepcopy(seen[name])
        cache.batch_repeat_interleave(len(part))
        rest = model.generator(input_ids=ids[:, :-1], use_cache=True, **{name: cache}).logits
        logits = torch.cat([seen.logits[:, -1:].expand(len(part), -1, -1), rest], 1)[..., : v.size].float()
        nll = -logits.masked_fill(~legal[:width], -torch.inf).log_softmax(-1).gather(2, ids[..., None])[..., 0]
        total = torch.where(ids == v.id("<pad>"), 0.0, nll.double()).sum(1)
        for i, value in zip(part, total.tolist()):
            nats[i] = value
    return nats


def legal_in_caption(model: Tokun, width: int) -> torch.Tensor:
    """(width, V) bool: the ids that the grammar allows after 0, 1, … pieces of a caption."""
    lengths = torch.arange(width, device=model.device)
    states = torch.full_like(lengths, STATES.index("caption"))
    return model.vocabulary.grammar.on(model.device).legal_mask(states, lengths, torch.zeros_like(lengths))  # no picture in progress


# --- by a CLIP --------------------------------------------------------------------------------------------------------


def by_clip(
    clip: Clip, name: str, model: Tokun, pairs: Sequence[RealPair | Pair], what: str, chosen: np.ndarray, seed: int
) -> list[Figure]:
    """CLIPScore against other captions, ranks and retrieval by CLIP cosines, and how often PMI chooses the same.

    Held-out pictures are judged twice: as they are, and as reconstructed by the image tokenizer, the best that a sample can reach.
    """
    keys = [tuple(pair.caption_ids) for pair in pairs]
    others = rivals(keys, seed)[1]
    if not others.size:
        return []
    found: list[Figure] = []
    kinds = [(what, [pair.image for pair in pairs])]
    if isinstance(pairs[0], RealPair):
        kinds.append((f"{what} through the image tokenizer", reconstructed(model, pairs)))
    for kind, images in kinds:
        scores = clip.similarities(images, [pair.caption for pair in pairs])
        found += clip_scores(name, kind, scores, others, seed) + ranking_figures(name, kind, scores, keys, seed)
        picked = np.concatenate([np.diag(scores)[:, None], np.take_along_axis(scores, others, 1)], 1).argmax(1)
        chance = f"chance {1 / (others.shape[1] + 1):.1%}"
        found.append(figures.share(f"{name} and PMI choose the same caption, {kind}", picked == chosen, better="more", note=chance))
    return found


def clip_scores(name: str, what: str, cosines: np.ndarray, others: np.ndarray, seed: int) -> list[Figure]:
    """CLIPScore (Hessel et al., 2021, eq. 1): 2.5 max(cos, 0), of the own caption and of the rivals."""
    scores = 2.5 * np.maximum(cosines, 0)
    own, rest = np.diag(scores), np.take_along_axis(scores, others, 1).mean(1)
    return [
        figures.mean(f"{name} score of the own caption, {what}", own, better="more", note="CLIPScore", seed=seed),
        figures.mean(f"{name} score of others' captions, {what}", rest, note="CLIPScore", seed=seed),
        figures.mean(f"{name} score, own above others', {what}", own - rest, better="more", note="chance 0", seed=seed),
    ]


# --- ranks by any score -----------------------------------------------------------------------------------------------


def ranking_figures(name: str, what: str, scores: np.ndarray, captions: Sequence[Hashable], seed: int) -> list[Figure]:
    """Rank-1 among 16 and retrieval in as many groups of 64 as there are, from scores (n, n): pictures x captions."""
    order, others = rivals(captions, seed)
    if not others.size:
        return []
    first = first_of(name, what, np.diag(scores), np.take_along_axis(scores, others, 1))
    groups = [order[at : at + RETRIEVED] for at in range(0, max(1, len(order) // RETRIEVED) * RETRIEVED, RETRIEVED)]
    return [first, *retrieval(name, what, [(scores[np.ix_(few, few)], [captions[i] for i in few]) for few in groups])]


def rivals(captions: Sequence[Hashable], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) an order drawn by the seed; (n, 15) indices of the differing captions that follow each in it. Fewer columns if fewer differ."""
    n = len(captions)
    order = np.random.default_rng(seed).permutation(n)
    count = min(CANDIDATES, len(set(captions))) - 1
    out = np.empty((n, max(count, 0)), int)
    for place, i in enumerate(order):
        behind = (order[(place + step) % n] for step in range(1, n))
        out[i] = list(islice((j for j in behind if captions[j] != captions[i]), count))
    return order, out


def first_of(name: str, what: str, own: np.ndarray, rest: np.ndarray) -> Figure:
    """How often the own caption (n,) outranks the others (n, k); ties do not count."""
    k = rest.shape[1] + 1
    return figures.share(f"{name} ranks the own caption first of {k}, {what}", own > rest.max(1), better="more", note=f"chance {1 / k:.1%}")


def retrieval(name: str, what: str, groups: Sequence[tuple[np.ndarray, Sequence[Hashable]]]) -> list[Figure]:
    """R@1 and R@5 in both directions, within groups of one size: scores (m, m) pictures x captions, and the captions."""
    m = len(groups[0][1])
    ways = {
        "caption of a picture": np.concatenate([at_least_as_high(scores, captions) for scores, captions in groups]),
        "picture of a caption": np.concatenate([at_least_as_high(scores.T, captions) for scores, captions in groups]),
    }
    return [
        figures.share(f"{name} finds the {way}, R@{k} of {m}, {what}", count < k, better="more", note=f"chance {min(1, k / m):.1%}")
        for way, count in ways.items()
        for k in (1, 5)
    ]


def at_least_as_high(scores: np.ndarray, captions: Sequence[Hashable]) -> np.ndarray:
    """(m,) how many others score at least as high as the own one, in each row. Pairs with equal captions count as the same."""
    numbers = {caption: i for i, caption in enumerate(captions)}
    same = np.array([numbers[caption] for caption in captions])
    others = np.where(same[:, None] == same[None], -np.inf, scores)
    return (others >= np.diag(scores)[:, None]).sum(1)

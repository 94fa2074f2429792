"""The GRPO objective: group advantages, ratios clipped on both sides, KL divergence from the start.

Its functions take and return tensors, and know no rewards.

    loss = - sum over tokens of  w min(r A, clip(r, 1 - low, 1 + high) A)  +  kl k3(start, policy)  +  entropy (H - H_start)^2

The sum runs over all sampled tokens, codes and words. Tokens of a kind that is not learned have w = 0: only the KL divergence and the
entropy hold them near the start, since the same weights draw them.

r is the ratio of a token's probability under the policy to that when it was drawn (Schulman et al. 2017; Shao et al. 2024, DeepSeekMath).
Both are over the ids that the grammar allows, at the temperature and guidance of the rollout. Sums are over all tokens of an update,
normalised by the number of image or text tokens, not per sequence (DAPO, Yu et al. 2025), so a caption's weight is proportional to its
length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokun.inference.sampling import PLAUSIBLE, legal_cases
from tokun.tokenizers.grammar import IMAGE_STATES, STATES
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training.engine import summed

EPSILON = 1e-4


def advantages(rewards: Tensor, group_size: int, *, scale: str = "group", world: int = 1) -> Tensor:
    """rewards (n,) in consecutive whole groups -> float64 (n,): the difference from the group's mean.

    `scale` chooses the divisor: the standard deviation in the group ("group"), that in all groups of all processes ("batch"), or 1
    ("none").
    """
    groups = rewards.double().view(-1, group_size)
    apart = groups - groups.mean(1, keepdim=True)
    squares = apart.square()
    if scale == "group":
        spread = squares.mean(1, keepdim=True).sqrt()
    elif scale == "batch":
        total, count = summed(torch.stack([squares.sum(), squares.new_tensor(squares.numel())]), world)
        spread = (total / count).sqrt()
    else:
        return apart.flatten()
    return (apart / (spread + EPSILON)).flatten()


@dataclass(frozen=True)
class Chosen:
    """The sampled tokens of some sequences; `places` index the flattened predictions (B, T - 1)."""

    places: Tensor  # (N,)
    ids: Tensor  # (N,)
    cases: Tensor  # (N,) into `Grammar.allowed`
    is_image: Tensor  # (N,) bool
    rows: Tensor  # (N,) the sequence
    slots: Tensor  # (N,) the code's index in its picture, in raster order; for words, the index in the caption


def chosen(vocabulary: Vocabulary, ids: Tensor, kinds: str = "both") -> Chosen:
    """ids (B, T) padded -> the codes of the pictures and the pieces of the captions with their ends: both, or one kind ("image", "text").
    Given tokens (tags, a prompt) and tokens forced by the grammar (<eoi>) are left out."""
    cases = legal_cases(vocabulary, ids)
    image, text = _in(cases // 3, IMAGE_STATES) & vocabulary.is_code(ids), _in(cases // 3, ["caption"])
    wanted = (image & (kinds != "text")) | (text & (kinds != "image"))
    wanted[:, 0] = False
    rows, at = wanted.nonzero(as_tuple=True)
    kind = image[rows, at]
    begun = torch.where(kind, image.cumsum(1)[rows, at], text.cumsum(1)[rows, at]) - 1
    return Chosen(_predictions(ids, rows, at), ids[rows, at], cases[rows, at], kind, rows, begun)


def _in(states: Tensor, names: Sequence[str]) -> Tensor:
    return torch.isin(states, torch.tensor([STATES.index(name) for name in names], device=states.device))


def _predictions(ids: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Indices into the flattened predictions (B, T - 1) of the ids at (rows, at)."""
    return rows * (ids.shape[1] - 1) + at - 1


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of one kind of token, as the sampler applies it (`inference.sampling`).

    Holds the same tokens after an unconditional prompt. The policy of guided tokens is the guided distribution, so that ratios and
    gradients are those of what was drawn.
    """

    scale: float
    ids: Tensor  # (B, U) the sequences without the condition: codes without tags, or words without their picture
    places: Tensor  # (M,) into their flattened predictions: the guided tokens, in the order of `Chosen`
    is_image: bool

    @classmethod
    def of_codes(cls, vocabulary: Vocabulary, scale: float, ids: Tensor) -> Guidance:
        """ids (B, U): pictures after their unconditional prompts."""
        return cls(scale, ids, chosen(vocabulary, ids, "image").places, True)

    @classmethod
    def of_words(cls, vocabulary: Vocabulary, scale: float, ids: Tensor) -> Guidance:
        """ids (B, U): captions with their ends after their tags, without pictures."""
        states = legal_cases(vocabulary, ids) // 3
        rows, at = _in(states, ["prompt"]).nonzero(as_tuple=True)
        return cls(scale, ids, _predictions(ids, rows, at), False)

    def guided(self, model: Any, logits: Tensor, what: Chosen, allowed: Tensor) -> Tensor:
        """logits (N, V) of all chosen tokens -> those of this kind replaced by guided ones. allowed: (N, V) bool by the grammar."""
        mine = (what.is_image == self.is_image).nonzero()[:, 0]
        base = _predicted(model, self.ids, self.places, logits.shape[1])
        own = logits[mine]
        guided = base + self.scale * (own - base)
        if not self.is_image:
            likely = own.detach().masked_fill(~allowed[mine], -torch.inf)
            likely = likely >= likely.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
            likely.scatter_(1, what.ids[mine, None], True)  # what was drawn stays possible after an update
            guided = guided.masked_fill(~likely, -torch.inf)
        return logits.index_put((mine,), guided)


def likelihoods(
    model: Any,
    ids: Tensor,
    what: Chosen,
    vocabulary: Vocabulary,
    *,
    temperatures: tuple[float, float],
    guidance: Sequence[Guidance] = (),
    entropy_needs_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) float32 (N,) of the chosen tokens, over legal ids.

    Runs `model` once over ids (B, T), and once for each guidance. `temperatures`: of codes, of words.
    """
    rows, allowed = _predicted(model, ids, what.places, vocabulary.size), vocabulary.grammar.on(ids.device).allowed[what.cases]
    for each in guidance:
        rows = each.guided(model, rows, what, allowed)
    rows = rows / torch.where(what.is_image, *temperatures)[:, None]
    logs = rows.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    found = logs.gather(1, what.ids[:, None])[:, 0]
    with torch.set_grad_enabled(entropy_needs_grad and torch.is_grad_enabled()):
        entropy = -(logs.exp() * logs.clamp_min(-1e4)).sum(-1)
    return found, entropy


def _predicted(model: Any, ids: Tensor, places: Tensor, size: int) -> Tensor:
    """float32 (N, size): the logits at some places of the flattened predictions."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[..., :size].flatten(0, 1)
    return logits.index_select(0, places).float()


def easy(old: Tensor, limit: float) -> Tensor:
    """(N,) bool: tokens that were almost certain when drawn.

    They occur in good and bad pairs alike, so their gradients contradict one another.
    """
    return old.exp() >= limit if limit < 1 else torch.zeros_like(old, dtype=torch.bool)


def similarity(codes: Tensor, vectors: Tensor) -> Tensor:
    """codes (groups, size, n) of pictures, vectors (K, d) of the codebook -> (groups, size, n) from 0 to 1: mean cosine similarity of each
    code's vector to those of the group's other pictures at its position (after STAGE, Ma et al. 2025)."""
    centred = torch.nn.functional.normalize(vectors.float() - vectors.float().mean(0), dim=1)
    own = centred[codes]  # (groups, size, n, d)
    others = (own.sum(1, keepdim=True) - own) / max(1, codes.shape[1] - 1)
    return (own * others).sum(-1).clamp(0, 1)


@dataclass(frozen=True)
class Terms:
    """Sums over the tokens of images and of words, each (2,); only `loss`, one number, has a gradient."""

    loss: Tensor
    kl: Tensor
    entropy: Tensor
    start_entropy: Tensor
    clipped: Tensor
    count: Tensor

    def totals(self) -> Tensor:
        """float64 (5, 2): KL, entropy, the start's entropy, clipped tokens, number of tokens; of images, of words."""
        return torch.stack([part.detach().double() for part in (self.kl, self.entropy, self.start_entropy, self.clipped, self.count)])


def terms(
    new: Tensor, entropy: Tensor, old: Tensor, start: Tensor, advantage: Tensor, weight: Tensor, share: Tensor, is_image: Tensor,
    *, low: float, high: float, kl: float, start_entropy: Tensor, entropy_weight: float = 0.0,
) -> Terms:  # fmt: skip
    """The terms of the loss over N tokens; all tensors are (N,).

    weight: of a token's advantage, 0 to 1; 0 for a kind that is not learned
    share: a token's weight in the loss, from the number of its kind in the whole update
    start, start_entropy: the frozen model's log-probabilities and entropies
    """
    ratio = (new - old).exp()
    inside = ratio.clamp(1 - low, 1 + high)
    gain = torch.minimum(ratio * advantage, inside * advantage)
    apart = start - new
    divergence = torch.expm1(apart) - apart  # k3 (Schulman 2020): unbiased and never negative
    loss = (share * (kl * divergence - weight * gain)).sum()
    if entropy_weight:
        loss = loss + entropy_weight * (share * (entropy - start_entropy).square()).sum()
    kinds = torch.stack([is_image, ~is_image]).to(new.dtype)
    clipped = (ratio * advantage > inside * advantage) & (weight > 0)
    return Terms(loss, kinds @ divergence, kinds @ entropy, kinds @ start_entropy, kinds @ clipped.to(new.dtype), kinds.sum(1))

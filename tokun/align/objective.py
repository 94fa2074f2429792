"""The GRPO objective: group advantages, ratios clipped on both sides, KL divergence from the start. Tensors in, tensors out; knows no rewards.

    loss = - sum over tokens of  w min(r A, clip(r, 1 - low, 1 + high) A)  +  kl k3(start, policy)  +  entropy (H - H_start)^2

r is the ratio of a token's probability under the policy to that when it was drawn (Schulman et al. 2017; Shao et al.
2024, DeepSeekMath), both over the ids that the grammar allows, at the temperature of the rollout. Sums are over all tokens of an update, normalised by
the number of image or text tokens, not per sequence (DAPO, Yu et al. 2025), so a caption's weight is proportional to its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokun.inference.sampling import legal_cases
from tokun.models.partitioned_parameters import collective_device
from tokun.tokenizers.grammar import IMAGE_STATES, STATES
from tokun.tokenizers.vocabulary import Vocabulary

EPSILON = 1e-4


def advantages(rewards: Tensor, group_size: int, *, scale: str = "group", world: int = 1) -> Tensor:
    """rewards (n,) in consecutive whole groups -> float64 (n,): the difference from the group's mean, divided by the standard deviation in the
    group, in all groups of all processes ("batch"), or undivided ("none")."""
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


def summed(values: Tensor, world: int) -> Tensor:
    """The sum over all processes."""
    if world == 1:
        return values
    out = values.to(collective_device(), copy=True)
    dist.all_reduce(out)
    return out.to(values.device)


@dataclass(frozen=True)
class Chosen:
    """The sampled tokens of some sequences that are trained; `places` index the flattened predictions (B, T - 1)."""

    places: Tensor  # (N,)
    ids: Tensor  # (N,)
    cases: Tensor  # (N,) into `Grammar.allowed`
    is_image: Tensor  # (N,) bool
    rows: Tensor  # (N,) the sequence
    slots: Tensor  # (N,) the code's index in its picture, in raster order; for words, the index in the caption


def chosen(vocabulary: Vocabulary, ids: Tensor, learn: str) -> Chosen:
    """ids (B, T) padded -> the codes of the pictures and the pieces of the captions with their ends: both, or one kind ("image", "text").
    Given tokens (tags, a prompt) and tokens forced by the grammar (<eoi>) are left out."""
    cases = legal_cases(vocabulary, ids)
    states = cases // 3
    image = torch.isin(states, torch.tensor([STATES.index(s) for s in IMAGE_STATES], device=ids.device)) & (ids >= vocabulary.code_offset)
    text = states == STATES.index("caption")
    wanted = (image & (learn != "text")) | (text & (learn != "image"))
    wanted[:, 0] = False
    rows, at = wanted.nonzero(as_tuple=True)
    kind = image[rows, at]
    begun = torch.where(kind, image.cumsum(1)[rows, at], text.cumsum(1)[rows, at]) - 1
    return Chosen(rows * (ids.shape[1] - 1) + at - 1, ids[rows, at], cases[rows, at], kind, rows, begun)


def likelihoods(
    model: Any, ids: Tensor, what: Chosen, vocabulary: Vocabulary, *, temperatures: tuple[float, float], moved: bool = False
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) float32 (N,) of the chosen tokens, over legal ids, by one forward pass of `model` over ids (B, T).
    `temperatures`: of codes, of words; `moved`: whether the entropy has a gradient."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[..., : vocabulary.size].flatten(0, 1)
    rows = logits.index_select(0, what.places).float()
    rows = rows / torch.where(what.is_image, *temperatures)[:, None]
    logs = rows.masked_fill(~vocabulary.grammar.on(ids.device).allowed[what.cases], -torch.inf).log_softmax(-1)
    found = logs.gather(1, what.ids[:, None])[:, 0]
    with torch.set_grad_enabled(moved and torch.is_grad_enabled()):
        entropy = -(logs.exp() * logs.clamp_min(-1e4)).sum(-1)
    return found, entropy


def easy(old: Tensor, limit: float) -> Tensor:
    """(N,) bool: tokens that were almost certain when drawn. They occur in good and bad pairs alike, so their gradients contradict one
    another."""
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
    """Sums over tokens; only `loss` has a gradient."""

    loss: Tensor
    kl: Tensor
    entropy: Tensor  # (2,) of images, of words
    clipped: Tensor
    count: Tensor  # (2,)

    def totals(self) -> Tensor:
        """(6,) float64: KL, entropy of images and of words, clipped tokens, number of image tokens and of text tokens."""
        parts = (self.kl[None], self.entropy, self.clipped[None], self.count)
        return torch.cat([part.detach().double() for part in parts])


def terms(
    new: Tensor, entropy: Tensor, old: Tensor, start: Tensor, advantage: Tensor, weight: Tensor, share: Tensor, is_image: Tensor,
    *, low: float, high: float, kl: float, entropy_weight: float = 0.0, start_entropy: Tensor | None = None,
) -> Terms:  # fmt: skip
    """All (N,). `weight`: 0 to 1, of a token's advantage; `share`: a token's weight in the loss, from the number of its kind in the
    whole update; `start` and `start_entropy`: the frozen model's log-probabilities and entropies."""
    ratio = (new - old).exp()
    inside = ratio.clamp(1 - low, 1 + high)
    gain = torch.minimum(ratio * advantage, inside * advantage)
    apart = start - new
    divergence = torch.expm1(apart) - apart  # k3 (Schulman 2020): unbiased and never negative
    loss = (share * (kl * divergence - weight * gain)).sum()
    if entropy_weight and start_entropy is not None:
        loss = loss + entropy_weight * (share * (entropy - start_entropy).square()).sum()
    kinds = torch.stack([is_image, ~is_image]).to(new.dtype)
    clipped = (ratio * advantage > inside * advantage) & (weight > 0)
    return Terms(loss, divergence.sum(), kinds @ entropy, clipped.sum(), kinds.sum(1))

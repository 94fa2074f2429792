"""The choice of one token: from logits and a uniform number to an id, and back. Knows ids, not sequences.

choose:   logits (B, V), legal (B, V), u (B,)    ->  ids (B,)         the inverse CDF over legal ids, in id order
interval: logits (B, V), legal (B, V), ids (B,)  ->  low, high (B,)   the u for which `choose` takes these ids

On a CPU `native.cpp` makes the same choice. `sampling.py` applies guidance and knows which ids are legal.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokun.utils.errors import UserError

REPEATED = 6  # pieces of the longest phrase that `Choice.no_repeats` detects
MOST = 1_000_000  # greatest temperature or scale, so that products stay finite in float32


def is_number(value: object) -> bool:
    """Whether it is a real number of Python, NumPy or torch; True and False are not."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Choice:
    """How a distribution is truncated before the latent picks from it."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    # for text: no word or phrase of up to `REPEATED` pieces twice in a row, ignoring punctuation in between, and none of the checkpoint's
    # unrepeated words twice
    no_repeats: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature <= MOST:
            raise UserError(f"temperature is {self.temperature!r}; it must be a number from 0 (the most likely id) to {MOST:,}")
        if not is_whole(self.top_k) or not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k is {self.top_k!r}; it must be a whole number, 0 (off) or more")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p!r}; it must be in (0, 1]")
        for name, kind in (("temperature", float), ("top_k", int), ("top_p", float)):
            object.__setattr__(self, name, kind(getattr(self, name)))  # also from NumPy and torch


AS_IT_IS = Choice()  # the model's own distribution


@dataclass(frozen=True)
class DecodingSettings:
    """How a pair is drawn: the choice of its codes and of its words, and the scales of their guidance (1: off)."""

    image: Choice = AS_IT_IS
    text: Choice = AS_IT_IS
    guidance_scale: float = 1.0
    text_guidance_scale: float = 1.0


@dataclass(frozen=True)
class Constraints:
    """Ids that are ruled out although the grammar allows them.
    They do not affect likelihoods, which are over all ids that the grammar allows."""

    forbid: tuple[int, ...] = ()
    """Ids that are never chosen: those of another task, control characters."""
    forbid_first: tuple[int, ...] = ()
    """Ids that may not begin a text: blanks."""
    # the others only matter with `Choice.no_repeats`
    word_starts: Sequence[int] = ()
    """Ids that begin a word."""
    marks: Sequence[int] = ()
    """Ids that are not words: commas, quotes. They are ignored between repeated words."""
    unrepeated: Sequence[Sequence[int]] = ()
    """The ids of each word that a text has at most once."""


def choose(logits: Tensor, legal: Tensor | None, u: Tensor, choice: Choice) -> Tensor:
    """The id at which the cumulative distribution over legal ids (None: all), in id order, exceeds u. float32."""
    if choice.temperature == 0:
        return _masked(logits, legal).argmax(-1)
    cdf = distribution(logits, legal, choice)[1]
    total = cdf[:, -1:]
    # u may be so close to 1 that rounding exceeds the end
    at = torch.minimum(u.float()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, at, right=True)[:, 0]


def interval(logits: Tensor, legal: Tensor | None, ids: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """float64 (B,) each: `choose` picks `ids` for u between them. Equal if no u does: the id is truncated away, or too unlikely."""
    _, cdf = distribution(logits, legal, choice)
    cdf = cdf.double() / cdf[:, -1:].double()
    high = cdf.gather(1, ids[:, None])[:, 0]
    low = torch.where(ids > 0, cdf.gather(1, (ids - 1).clamp_min(0)[:, None])[:, 0], 0.0)
    return low, high


def nats(logits: Tensor, legal: Tensor | None, ids: Tensor) -> Tensor:
    """The negative log-likelihood of ids (B,) under logits (B, V) over the legal ids: float64 (B,)."""
    return -_masked(logits, legal).log_softmax(-1).gather(1, ids[:, None])[:, 0].double()


def distribution(logits: Tensor, legal: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor]:
    """(probabilities, their cumulative sums in id order), float32 (B, V), for a temperature above 0."""
    logits = _masked(logits, legal)
    logits = (logits - logits.amax(-1, keepdim=True)) / choice.temperature  # at most 0, so no temperature overflows
    probabilities = narrow(logits, choice).softmax(-1)
    return probabilities, probabilities.cumsum(-1)


def narrow(logits: Tensor, choice: Choice) -> Tensor:
    """Apply top-k, then top-p (nucleus): logits (B, V) with -inf for excluded ids. Ids tied with the last included one are included."""
    width = logits.shape[-1]
    if choice.top_k:
        kth = logits.topk(min(choice.top_k, width), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if choice.top_p < 1:
        mass = logits.softmax(-1)
        likeliest = _descending(mass)
        # ids preceded by less than top_p of the probability
        inside = (likeliest.cumsum(-1) - likeliest < choice.top_p).sum(-1, keepdim=True)
        logits = logits.masked_fill(mass < likeliest.gather(-1, inside - 1), -torch.inf)
    return logits


def repetition_mask(words: Tensor, counts: Tensor, begins: Tensor, unrepeated: Tensor, width: int) -> Tensor:
    """(B, width) bool: the ids that would repeat the phrase at the end of a text (a1 … an a1 … an, where a1 begins a word), or a word
    that a text has at most once.

    words (B, T) int64: the ids of each text without its marks, right-aligned; counts (B,): their number; begins (V,) bool: the ids that
    begin a word; unrepeated (V,) int64: numbers of the words that a text has at most once, 0 for all other ids. An id that is ruled out
    cannot begin a longer word either: "churchyard" after "church", if it has no id of its own.
    """
    found, size = torch.zeros(len(words), width, dtype=torch.bool, device=words.device), words.shape[1]
    for n in range(1, min(REPEATED, (size + 1) // 2) + 1):
        end = words[:, size - 2 * n + 1 :]  # a1 … an a1 … a(n-1)
        again = (counts >= 2 * n - 1) & begins[end[:, 0]] & (end[:, : n - 1] == end[:, n:]).all(1)
        last = end[:, n - 1 : n].clamp_max(width - 1)
        found.scatter_(1, last, found.gather(1, last) | again[:, None])
    whole = torch.ones_like(words, dtype=torch.bool)  # not "church" in "churchyard", where the word continues
    whole[:, :-1] = begins[words[:, 1:]]
    whole &= torch.arange(size, device=words.device) >= size - counts[:, None]
    used = torch.zeros(len(words), len(unrepeated), dtype=torch.bool, device=words.device)  # by number: there are fewer words than ids
    used.scatter_(1, torch.where(whole, unrepeated[words], 0), True)
    used[:, 0] = False
    return found | used[:, unrepeated[:width]]


def word_numbers(words: Sequence[Sequence[int]], size: int) -> Tensor:
    """`repetition_mask`'s numbers (size,) int64 of words, each given by its ids."""
    numbers = torch.zeros(size, dtype=torch.long)
    numbers[[i for ids in words for i in ids]] = torch.tensor(
        [number for number, ids in enumerate(words, 1) for _ in ids], dtype=torch.long
    )
    return numbers


def _descending(x: Tensor) -> Tensor:
    """Sorted along the last dimension; numpy's sort takes a twentieth of torch's time on a CPU."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)
    return x.sort(dim=-1, descending=True).values


def _masked(logits: Tensor, legal: Tensor | None) -> Tensor:
    return logits.float() if legal is None else logits.float().masked_fill(~legal, -torch.inf)


def require_scale(name: str, scale: float) -> float:
    if not is_number(scale) or not 0 <= scale <= MOST:
        raise UserError(f"{name} is {scale!r}; it must be a number from 0 to {MOST:,} (1 is off)")
    return float(scale)

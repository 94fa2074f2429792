"""From a prompt and a latent to ids: prefill, one choice at a time, KV cache, guidance. Knows ids, never pixels.

    choose:   logits (B, V), legal (B, V), u (B,)  ->  ids (B,)      the inverse CDF over legal ids, in id order
    generate: prompts (B, P), u (B, slots)         ->  Generated     until every row has ended

Every id is drawn inside the grammar's legal range, so nothing is repaired afterwards. Row results do not depend on what
else is in the batch beyond the rounding of the matrix products (see `BLOCK`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokun.latents import Slots
from tokun.vocabulary import IMAGE_STATES, STATES, TEXT_STATES, Vocabulary

# On a CPU rows are computed in blocks of this many, padded when fewer are asked for. Matrix libraries sum in another
# order for fewer rows; with their number fixed, a sample's logits are the same bits whatever is sampled with it.
BLOCK = 16


@dataclass(frozen=True)
class Choice:
    """How a distribution is narrowed before the latent picks from it."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest id) or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


@dataclass(frozen=True)
class Generated:
    """ids (B, T) int64 with the prompt in front and <pad> behind; log-likelihoods at temperature 1 over the legal ids."""

    ids: Tensor
    image_nll: Tensor  # (B,) nats, float64, of the sampled codes
    text_nll: Tensor  # (B,) of the sampled text and its end


def choose(logits: Tensor, legal: Tensor, u: Tensor, choice: Choice) -> Tensor:
    """The id at which the cumulative distribution over legal ids, in id order, passes u. float32."""
    logits = logits.float().masked_fill(~legal, -torch.inf)
    if choice.temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / choice.temperature  # at most 0: no temperature overflows
    probabilities = narrow(logits, choice).softmax(-1)
    cdf = probabilities.cumsum(-1)
    ids = torch.searchsorted(cdf, (u.float()[:, None] * cdf[:, -1:]).contiguous(), right=True)[:, 0]
    last = (probabilities > 0).long().cumsum(-1).argmax(-1)  # u so near 1 that rounding passes the end
    return torch.minimum(ids, last)


def narrow(logits: Tensor, choice: Choice) -> Tensor:
    """Apply top-k, then top-p (nucleus): logits (B, V) with -inf where an id is out."""
    if choice.top_k:
        kth = logits.topk(min(choice.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if choice.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the likelier ids
        out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= choice.top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


@torch.inference_mode()
def generate(
    model: Any,
    vocabulary: Vocabulary,
    prompts: Tensor,
    u: Tensor,
    slots: Slots,
    *,
    image: Choice = Choice(),
    text: Choice = Choice(),
    guidance_scale: float = 1.0,
    unguided: Tensor | None = None,
    forbid: Sequence[int] = (),
    forbid_first: Sequence[int] = (),
) -> Generated:
    """Complete every row of `prompts` (B, P) int64 to its <eos> with the uniforms `u` (B, slots.size).

    With guidance_scale != 1, codes are drawn from unguided + scale * (guided - unguided), the second prompt being
    `unguided` (B, Q). `forbid`: ids that the task rules out (a question where a caption is wanted); `forbid_first`: ids
    that may not begin a text (blanks). Neither enters the log-likelihoods, which are over what the grammar allows.
    """
    if guidance_scale != 1 and unguided is None:
        raise ValueError("guidance_scale is set, but there is no prompt without tags or caption to guide away from")
    size = BLOCK if prompts.device.type == "cpu" else len(prompts)
    blocks = []
    for i in range(0, len(prompts), size):
        rows = slice(i, i + size)
        q = None if unguided is None or guidance_scale == 1 else _pad_rows(unguided[rows], size)
        made = _generate_block(
            model,
            vocabulary,
            _pad_rows(prompts[rows], size),
            _pad_rows(u[rows], size),
            slots,
            image,
            text,
            guidance_scale,
            q,
            forbid,
            forbid_first,
        )
        n = len(prompts[rows])
        blocks.append(Generated(made.ids[:n], made.image_nll[:n], made.text_nll[:n]))
    width = max(block.ids.shape[1] for block in blocks)
    pad = vocabulary.id("<pad>")
    ids = [torch.nn.functional.pad(block.ids, (0, width - block.ids.shape[1]), value=pad) for block in blocks]
    return Generated(torch.cat(ids), torch.cat([block.image_nll for block in blocks]), torch.cat([block.text_nll for block in blocks]))


def _generate_block(
    model: Any, vocabulary: Vocabulary, prompts: Tensor, u: Tensor, slots: Slots, image: Choice, text: Choice,
    guidance_scale: float, unguided: Tensor | None, forbid: Sequence[int], forbid_first: Sequence[int],
) -> Generated:  # fmt: skip
    device = prompts.device
    B = len(prompts)
    states = torch.full((B,), STATES.index("start"), device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    for token in prompts.T:
        states, lengths = vocabulary.advance(states, lengths, token)
    n_codes = torch.full((B,), slots.n_codes, device=device)
    ruled_out, no_start = (torch.zeros(vocabulary.size, dtype=torch.bool, device=device) for _ in range(2))
    ruled_out[list(forbid)], no_start[list(forbid_first)] = True, True
    image_states, text_states = (torch.tensor([STATES.index(s) for s in kind], device=device) for kind in (IMAGE_STATES, TEXT_STATES))
    end = STATES.index("end")

    guided = Stream(model, prompts)
    free = None if unguided is None else Stream(model, unguided)
    ids = [prompts]
    image_nll = torch.zeros(B, dtype=torch.float64, device=device)
    text_nll = torch.zeros(B, dtype=torch.float64, device=device)
    while True:
        grammatical = vocabulary.legal_mask(states, lengths, n_codes)
        in_image, in_text = torch.isin(states, image_states), torch.isin(states, text_states)
        legal = grammatical & ~ruled_out & ~((in_text & (lengths == 0))[:, None] & no_start)
        slot = (torch.where(in_image, slots.image, slots.text) + lengths).clamp_max(slots.size - 1)
        logits = guided.logits[:, : vocabulary.size].float()
        drawn = logits
        if free is not None:
            base = free.logits[:, : vocabulary.size].float()
            drawn = torch.where(in_image[:, None], base + guidance_scale * (logits - base), logits)
        at = u.gather(1, slot[:, None])[:, 0]
        # all rows of a joint or drawing task are in their picture together; where they are not, both are computed
        if in_image.all():
            chosen = choose(drawn, legal, at, image)
        elif not in_image.any():
            chosen = choose(drawn, legal, at, text)
        else:
            chosen = torch.where(in_image, choose(drawn, legal, at, image), choose(drawn, legal, at, text))
        nll = -logits.masked_fill(~grammatical, -torch.inf).log_softmax(-1).gather(1, chosen[:, None])[:, 0].double()
        image_nll += torch.where(in_image, nll, 0.0)
        text_nll += torch.where(in_text, nll, 0.0)
        ids.append(chosen[:, None])
        states, lengths = vocabulary.advance(states, lengths, chosen)
        if bool((states == end).all()):
            return Generated(torch.cat(ids, 1), image_nll, text_nll)
        guided.step(chosen)
        if free is not None:
            free.step(chosen)


class Stream:
    """A batch of sequences in the model: `logits` (B, V) after the last id, `step` takes the next. KV cache inside."""

    def __init__(self, model: Any, prompts: Tensor):  # (B, P)
        self.model = model
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]

    def step(self, ids: Tensor) -> None:  # (B,)
        out = self.model(input_ids=ids[:, None], past_key_values=self.cache, use_cache=True)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]


@torch.inference_mode()
def span_nll(model: Any, vocabulary: Vocabulary, ids: Tensor, first: Tensor, n_codes: int) -> Tensor:
    """Nats of ids[first:] up to and with the end of each row's span, over legal ids, no cache: float64 (B,).

    ids (B, T) padded with <pad>; first (B,): where the scored span begins. Padding costs nothing.
    """
    logits = model(input_ids=ids).logits[:, :, : vocabulary.size].float()
    B, T = ids.shape
    states = torch.full((B,), STATES.index("start"), device=ids.device)
    lengths = torch.zeros(B, dtype=torch.long, device=ids.device)
    total = torch.zeros(B, dtype=torch.float64, device=ids.device)
    many = torch.full((B,), n_codes, device=ids.device)
    pad = vocabulary.id("<pad>")
    for t in range(T):
        live = ids[:, t] != pad
        if t > 0:
            legal = vocabulary.legal_mask(states, lengths, many)
            row = logits[:, t - 1].masked_fill(~legal, -torch.inf).log_softmax(-1).gather(1, ids[:, t : t + 1])[:, 0]
            total -= torch.where(live & (t >= first), row.double(), 0.0)
        # a row that has ended takes any legal id, and its state is put back
        token = torch.where(live, ids[:, t], vocabulary.legal.to(ids.device)[states].long().argmax(-1))
        following, longer = vocabulary.advance(states, lengths, token)
        states, lengths = torch.where(live, following, states), torch.where(live, longer, lengths)
    return total


def _pad_rows(rows: Tensor, size: int) -> Tensor:  # (b, …) -> (size, …), repeating the last row
    return rows if len(rows) == size else torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])

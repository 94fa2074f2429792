"""The grammar of a sequence: which ids may follow which. Defined once, for packing, sampling (Python and C++), scoring and vLLM.

`GRAMMAR` is a table: state -> (class of id, next state). Three rules govern the length of a span:

    a span of codes holds exactly as many codes as its picture has;
    a span of text is never empty and holds at most `max_text` pieces;
    the length of a span is the number of ids since its state was entered.

`Grammar` holds both as tensors for the ids of one vocabulary. Knows no sequence and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokun.tokenizers.vocabulary import Vocabulary

TAG_KINDS = ("style", "subject", "thing", "register", "grid")  # the order in which tags are written

_OPENING = (("<boi>", "image"), ("<boc>", "prompt"))
# state -> ((class of id, next state), …). Classes: a structure token, "text", "code", or a kind of tag.
GRAMMAR: dict[str, tuple[tuple[str, str], ...]] = {
    "start": (("<bos>", "tags"),),
    # each kind of tag at most once, in the order of TAG_KINDS
    "tags": (*((kind, kind) for kind in TAG_KINDS), *_OPENING),
    **{kind: (*((later, later) for later in TAG_KINDS[place + 1 :]), *_OPENING) for place, kind in enumerate(TAG_KINDS)},
    "image": (("code", "image"), ("<eoi>", "image_done")),
    "image_done": (("<boc>", "caption"), ("<boq>", "asked")),
    "caption": (("text", "caption"), ("<eoc>", "caption_done")),
    "caption_done": (("<eos>", "end"),),
    "asked": (("text", "asked"), ("<eoq>", "asked_done")),
    "asked_done": (("<boa>", "answer"),),
    "answer": (("text", "answer"), ("<eoa>", "answer_done")),
    "answer_done": (("<eos>", "end"),),
    "prompt": (("text", "prompt"), ("<eoc>", "prompt_done")),
    "prompt_done": (("<boi>", "drawn"), ("register", "rewrite")),
    "drawn": (("code", "drawn"), ("<eoi>", "drawn_done")),
    "drawn_done": (("<eos>", "end"),),
    "rewrite": (("<boc>", "caption"),),
    "end": (("<pad>", "end"),),
}  # fmt: skip
STATES = tuple(GRAMMAR)
START, END = STATES.index("start"), STATES.index("end")
IMAGE_STATES = ("image", "drawn")  # states whose span is a picture …
TEXT_STATES = ("caption", "prompt", "asked", "answer")  # … and those whose span is text
EMPTY, PART, FULL = range(3)  # how full a row's span is


class Tables(NamedTuple):
    """The tables for writing text. `allowed` and `ruled` have one row for each state and fill level of its span (`Grammar.case`).
    The C++ program reads these tensors directly."""

    allowed: Tensor  # (3 S, n) bool: which of the first n ids the grammar allows
    ruled: Tensor  # (3 S, n) bool: … and which of these a sampler may choose
    in_text: Tensor  # (S,) bool
    following: Tensor  # (S, V) int64: the state after an id
    limit: Tensor  # (S,) int64: the most ids of a span
    slot: Tensor  # (S,) int64: the slot of the latent that decides the first of them


class Grammar:
    """GRAMMAR over the ids of a vocabulary, on one device. S states, V ids."""

    def __init__(self, vocabulary: Vocabulary, device: torch.device | str = "cpu"):
        self.vocabulary, self.device = vocabulary, torch.device(device)
        legal = torch.zeros(len(STATES), vocabulary.size, dtype=torch.bool)
        following = torch.full((len(STATES), vocabulary.size), -1)
        for row, ways in enumerate(GRAMMAR.values()):
            for kind, target in ways:
                ids = vocabulary.ids_of(kind)
                legal[row, ids], following[row, ids] = True, STATES.index(target)
        kinds = (IMAGE_STATES, TEXT_STATES, before(IMAGE_STATES))
        in_image, in_text, may_draw = (torch.tensor([state in kind for state in STATES]) for kind in kinds)
        self.following = following.to(device)
        """(S, V) int64: the state after an id; -1 if it is illegal whatever the span's length."""
        self.allowed = by_case(vocabulary, legal, in_image, in_text).to(device)
        """(3 S, V) bool: which ids may come next, a row for each case."""
        self.in_image, self.in_text, self.may_draw = in_image.to(device), in_text.to(device), may_draw.to(device)
        """(S,) bool: the states in a picture, in a text, and those in or before a picture."""

    def on(self, device: torch.device | str) -> Grammar:
        """This grammar on a device."""
        return self if torch.device(device) == self.device else _on(self.vocabulary, torch.device(device))

    def limit(self, states: Tensor, n_codes: Tensor | int) -> Tensor:
        """The maximum span length for each of these states (…,), for pictures of `n_codes` codes."""
        return torch.where(self.in_image[states], n_codes, self.vocabulary.max_text)

    def case(self, states: Tensor, lengths: Tensor, limit: Tensor) -> Tensor:
        """The row of `allowed` for states, lengths and limits of spans (…,). native.cpp's `tokun_write` counts the same way."""
        return 3 * states + (lengths > 0) + (lengths >= limit)

    def legal_mask(self, states: Tensor, lengths: Tensor, n_codes: Tensor) -> Tensor:
        """Which ids may come next. states, lengths (ids in the current span), n_codes: int64 (B,) -> (B, V) bool."""
        return self.allowed[self.case(states, lengths, self.limit(states, n_codes))]

    def advance(self, states: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States and lengths of spans after `tokens` (B,)."""
        following = self.following[states, tokens]
        # not checked on a GPU, to avoid waiting for it
        assert following.device.type != "cpu" or (following >= 0).all(), "an illegal id was chosen"
        return following, torch.where(following == states, lengths + 1, 0)

    def step(self, state: int, length: int, token: int, n_codes: int) -> tuple[int, int]:
        """As `advance` for one row: state and length after an id; state -1 if the id is illegal there or does not exist."""
        limit = n_codes if STATES[state] in IMAGE_STATES else self.vocabulary.max_text
        if not (0 <= token < self.vocabulary.size and self._allowed[3 * state + (length > 0) + (length >= limit), token]):
            return -1, 0
        following = int(self._following[state, token])
        return following, length + 1 if following == state else 0

    @cached_property
    def _allowed(self):  # numpy reads single numbers ten times as fast
        return self.allowed.cpu().numpy()

    @cached_property
    def _following(self):
        return self.following.cpu().numpy()

    def chosen_from(self, forbid: Sequence[int], forbid_first: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
        """`Tables.allowed` and `Tables.ruled` for the first `size` ids.

        `forbid`: ids that a sampler never chooses, `forbid_first`: ids that may not begin a text. The same for every grid: `limit` says how
        many codes fill a picture.
        """
        return _chosen_from(self, tuple(forbid), tuple(forbid_first), size)


def by_case(vocabulary: Vocabulary, legal: Tensor, in_image: Tensor, in_text: Tensor) -> Tensor:
    """legal (S, V), ignoring length -> (3 S, V) for empty, partial and full spans, by the rules of length."""
    allowed, case = legal.repeat_interleave(3, 0), torch.arange(3).repeat(len(STATES))
    in_image, in_text = in_image.repeat_interleave(3), in_text.repeat_interleave(3)
    codes, text = vocabulary.is_image, torch.arange(vocabulary.size) < vocabulary.text_size
    allowed[in_image & (case == FULL)] &= ~codes
    allowed[in_image & (case != FULL)] &= codes
    allowed[in_text & (case == FULL)] &= ~text
    allowed[in_text & (case == EMPTY)] &= text
    return allowed


@lru_cache(maxsize=16)
def _on(vocabulary: Vocabulary, device: torch.device) -> Grammar:
    return Grammar(vocabulary, device)


@lru_cache(maxsize=64)
def _chosen_from(grammar: Grammar, forbid: tuple[int, ...], forbid_first: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    ruled = grammar.allowed.clone()
    ruled[:, list(forbid)] = False
    begins = 3 * grammar.in_text.nonzero() + EMPTY
    ruled[begins, torch.tensor(forbid_first, dtype=torch.long, device=grammar.device)] = False
    return grammar.allowed[:, :size].contiguous(), ruled[:, :size].contiguous()


def before(states: Sequence[str]) -> set[str]:
    """These states and those from which one of them can be reached."""
    found = set(states)
    while more := {state for state, ways in GRAMMAR.items() if any(target in found for _, target in ways)} - found:
        found |= more
    return found

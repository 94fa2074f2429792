"""One id space for words, controls and picture codes; how spans are written into a sequence and read back.

    ids:  text pieces 0 … | control tokens … | image codes 0 … K-1 | tags that an adapter has added

The only file that knows both modalities: offsets, legal ranges, the order of spans, and the grammar (`GRAMMAR`), a table
state -> (token class, next state) that packing is checked against and that sampling masks with.

Sequences (design: one story each):
    joint          <bos> [tags] <boi> codes <eoi> <boc> caption <eoc> <eos>
    text_to_image  <bos> [tags] <boc> caption <eoc> <boi> codes <eoi> <eos>
    question       <bos> [tags] <boi> codes <eoi> <boq> question <eoq> <boa> answer <eoa> <eos>
    rewrite        <bos> [tags] <boc> caption <eoc> <register:R> <boc> caption in register R <eoc> <eos>
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STRUCTURE = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<boc>", "<eoc>", "<boq>", "<eoq>", "<boa>", "<eoa>")
REGISTERS = ("plain", "poetic", "era", "social", "alt")
TAG_KINDS = ("style", "subject", "thing", "register", "grid")  # the order in which tags are written
TASKS = ("joint", "text_to_image", "question", "rewrite")

_OPENING = (("<boi>", "image"), ("<boc>", "prompt"))
# state -> ((token class, next state), …). Classes: a structure token, "text", "code", or a kind of tag.
# A "code" span holds exactly h*w codes; a "text" span at least one and at most `max_text` pieces.
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
MANY, NEAR = 100, 5  # names that an error lists: all of so many; so many of more
IMAGE_STATES = ("image", "drawn")  # those whose span is a picture …
TEXT_STATES = ("caption", "prompt", "asked", "answer")  # … and those whose span is text


@dataclass(frozen=True)
class Tags:
    """What is said about a pair ahead of it. An empty string (or None) is an absent tag."""

    style: str = ""
    subject: str = ""
    register: str = ""
    grid: tuple[int, int] | None = None  # rows, columns of codes
    thing: str = ""  # the main noun of what is shown

    def names(self) -> list[str]:
        """The control tokens, in writing order."""
        out = [f"<{kind}:{getattr(self, kind)}>" for kind in TAG_KINDS if kind != "grid" and getattr(self, kind)]
        return out + ([grid_name(self.grid)] if self.grid else [])


@dataclass(frozen=True)
class Unpacked:
    """A sequence taken apart by `Vocabulary.unpack`; what a task does not hold is None."""

    task: str
    tags: Tags
    codes: list[int] | None = None  # 0..K-1, raster order
    caption: list[int] | None = None  # text ids
    question: list[int] | None = None
    answer: list[int] | None = None
    rewritten: list[int] | None = None
    rewritten_register: str = ""


@dataclass(frozen=True)
class Packed:
    """ids of one sequence; `prompt` of them, at the front, are given and carry no loss."""

    input_ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Vocabulary:
    """Sizes and names; everything else is derived.

    text_size: number of text ids; illegal_text: those a sampler must not emit (unknown, specials);
    grids: allowed (rows, columns), the first is the default; max_text: most pieces in one text span. Where there are several
    grids, a sequence always names its own: see `bare`. appended: those of the tags whose ids stand behind the codes, since a
    generator that knew none of them went on with its other ids as they were: see `extended`.
    """

    text_size: int
    codebook_size: int
    styles: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    registers: tuple[str, ...] = REGISTERS
    grids: tuple[tuple[int, int], ...] = ((8, 8),)
    max_text: int = 64
    illegal_text: tuple[int, ...] = (0,)
    things: tuple[str, ...] = ()
    appended: tuple[str, ...] = ()
    _ids: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.grids:
            raise ValueError("a vocabulary needs at least one grid, for example ((8, 8),)")
        for name in ("text_size", "codebook_size", "max_text"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} is {size!r}; it must be an integer, at least 1")
        if any(not isinstance(i, int) or not 0 <= i < self.text_size for i in self.illegal_text):
            raise ValueError(f"illegal_text is {self.illegal_text!r}; it must hold text ids, 0 to {self.text_size - 1}")
        names = (*self._front, *self.appended)
        if strangers := set(self.appended) - set(self._tags):
            raise ValueError(f"appended names {sorted(strangers)}, which are no tags of this vocabulary")
        for name in names:
            if re.search(r"[\s<>]", name[1:-1]):
                raise ValueError(f"{name!r} cannot be a control token: no spaces or angle brackets; write wood-engraving")
        if len(set(names)) != len(names):
            raise ValueError(f"control tokens repeat: {sorted(n for n in names if names.count(n) > 1)}")
        front = len(self._front)
        self._ids.update({name: self.text_size + i + (self.codebook_size if i >= front else 0) for i, name in enumerate(names)})

    # --- ids --------------------------------------------------------------------------------------------------------

    @cached_property
    def _tags(self) -> tuple[str, ...]:
        return (
            *(f"<style:{s}>" for s in self.styles),
            *(f"<subject:{s}>" for s in self.subjects),
            *(f"<thing:{t}>" for t in self.things),
            *(f"<register:{r}>" for r in self.registers),
            *(grid_name(g) for g in self.grids),
        )

    @cached_property
    def _front(self) -> tuple[str, ...]:
        """Control tokens before the codes, in id order."""
        behind = set(self.appended)
        return (*STRUCTURE, *(tag for tag in self._tags if tag not in behind))

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Control tokens in id order."""
        return (*self._front, *self.appended)

    @property
    def added_tokens(self) -> list[str]:
        """Everything after the text pieces, in id order: controls, image codes, appended tags."""
        return [*self._front, *(f"<image:{i}>" for i in range(self.codebook_size)), *self.appended]

    @cached_property
    def code_offset(self) -> int:
        return self.text_size + len(self._front)

    @cached_property
    def code_end(self) -> int:
        """The id behind the last code."""
        return self.code_offset + self.codebook_size

    @property
    def size(self) -> int:
        return self.code_end + len(self.appended)

    def extended(
        self, *, styles: Iterable[str] = (), subjects: Iterable[str] = (), things: Iterable[str] = (), registers: Iterable[str] = ()
    ) -> Vocabulary:
        """The same ids, and behind them one for each of these words that was not known."""
        asked = {"style": styles, "subject": subjects, "thing": things, "register": registers}
        known = {kind: getattr(self, f"{kind}s") for kind in asked}
        new = {kind: tuple(dict.fromkeys(word for word in words if word and word not in known[kind])) for kind, words in asked.items()}
        appended = tuple(f"<{kind}:{word}>" for kind, words in new.items() for word in words)
        return replace(self, **{f"{kind}s": (*known[kind], *new[kind]) for kind in asked}, appended=(*self.appended, *appended))

    @property
    def default_grid(self) -> tuple[int, int]:
        return self.grids[0]

    @cached_property
    def max_codes(self) -> int:
        """The most codes of a picture of any grid."""
        return max(map(math.prod, self.grids))

    @property
    def default_register(self) -> str:
        """The one that is spoken where none is asked for: plain, where it is known."""
        return "plain" if "plain" in self.registers else self.registers[0] if self.registers else ""

    def bare(self, grid: tuple[int, int] | None = None) -> Tags:
        """The fewest tags of a sequence: none, but the grid (the default one where None) where there are several."""
        return Tags(grid=grid or self.default_grid) if len(self.grids) > 1 else Tags()

    def n_codes(self, prompt: Sequence[int]) -> int:
        """How many codes the picture of a sequence has, by the grid tag at its front; without one, those of the default grid."""
        kinds = 1 + len(TAG_KINDS)  # behind <bos>
        return next((self.codes_of[token] for token in prompt[:kinds] if token in self.codes_of), self.codes_of[None])

    @cached_property
    def codes_of(self) -> dict[int | None, int]:
        """Grid tag (None: the default) -> number of codes."""
        return {None: math.prod(self.default_grid), **{self.id(grid_name(grid)): math.prod(grid) for grid in self.grids}}

    def id(self, name: str) -> int:
        """The id of a control token such as '<boi>' or '<style:engraving>'. Raises ValueError listing its kin, or the nearest of many."""
        if name not in self._ids:
            kind, _, word = name[1:-1].partition(":")
            known = [c[len(kind) + 2 : -1] for c in self.controls if c.startswith(f"<{kind}:")]
            raise ValueError(f"{name} is not in this vocabulary; {kind} can be: {listed(word, known)}")
        return self._ids[name]

    def name(self, token: int) -> str:
        """The control token with this id."""
        return self.appended[token - self.code_end] if token >= self.code_end else self._front[token - self.text_size]

    @cached_property
    def is_image(self) -> Tensor:
        """(V,) bool: which ids are image codes."""
        ids = torch.arange(self.size)
        return (ids >= self.code_offset) & (ids < self.code_end)

    def class_of(self, token: int) -> str:
        """'text', 'code', a structure token's own name, or the kind of tag."""
        if 0 <= token < self.text_size:
            return "text"
        if self.code_offset <= token < self.code_end:
            return "code"
        if not 0 <= token < self.size:
            raise ValueError(f"id {token} is outside this vocabulary (0..{self.size - 1})")
        name = self.name(token)
        return name if name in STRUCTURE else name[1:].partition(":")[0]

    # --- pack and unpack --------------------------------------------------------------------------------------------

    def pack_joint(self, tags: Tags, codes: Sequence[int] | np.ndarray, caption: Sequence[int]) -> Packed:
        ids = [*self.prefix(tags), self.id("<boi>"), *self._codes(codes, tags), self.id("<eoi>")]
        return Packed([*ids, self.id("<boc>"), *self._text(caption), self.id("<eoc>"), self.id("<eos>")], 1)

    def pack_text_to_image(self, tags: Tags, codes: Sequence[int] | np.ndarray, caption: Sequence[int]) -> Packed:
        ids = [*self.prefix(tags), self.id("<boc>"), *self._text(caption), self.id("<eoc>")]
        return Packed([*ids, self.id("<boi>"), *self._codes(codes, tags), self.id("<eoi>"), self.id("<eos>")], 1)

    def pack_image_to_text(self, tags: Tags, codes: Sequence[int] | np.ndarray, caption: Sequence[int]) -> Packed:
        """The joint sequence with the picture given."""
        joint = self.pack_joint(tags, codes, caption)
        return Packed(joint.input_ids, joint.input_ids.index(self.id("<boc>")) + 1)

    def pack_question(self, tags: Tags, codes: Sequence[int] | np.ndarray, question: Sequence[int], answer: Sequence[int]) -> Packed:
        ids = [*self.prefix(tags), self.id("<boi>"), *self._codes(codes, tags), self.id("<eoi>")]
        ids += [self.id("<boq>"), *self._text(question), self.id("<eoq>"), self.id("<boa>")]
        return Packed([*ids, *self._text(answer), self.id("<eoa>"), self.id("<eos>")], len(ids))

    def pack_rewrite(self, tags: Tags, caption: Sequence[int], register: str, rewritten: Sequence[int]) -> Packed:
        ids = [*self.prefix(tags), self.id("<boc>"), *self._text(caption), self.id("<eoc>")]
        ids += [self.id(f"<register:{register}>"), self.id("<boc>")]
        return Packed([*ids, *self._text(rewritten), self.id("<eoc>"), self.id("<eos>")], 1)

    def prefix(self, tags: Tags) -> list[int]:
        """<bos> and the tags."""
        return [self.id("<bos>"), *(self.id(name) for name in tags.names())]

    def unpack(self, ids: Sequence[int]) -> Unpacked:
        """A whole sequence (padding behind it allowed) -> its parts. Raises ValueError where the grammar is broken."""
        spans: dict[str, list[int]] = {}
        tags: dict[str, Any] = {}
        task, state, register = "joint", "start", ""
        for position, token in enumerate(ids):
            following = self._next(state, int(token), spans, tags, position)
            kind = self.class_of(int(token))
            if kind in ("text", "code"):
                spans.setdefault(state, []).append(int(token) - (self.code_offset if kind == "code" else 0))
            elif kind in TAG_KINDS and state != "prompt_done":
                value = self.name(int(token))[1:-1].partition(":")[2]
                tags[kind] = parse_grid(value) if kind == "grid" else value
            elif state == "prompt_done":
                task = "text_to_image" if following == "drawn" else "rewrite"
                register = "" if following == "drawn" else self.name(int(token))[1:-1].partition(":")[2]
            elif following == "asked":
                task = "question"
            state = following
        if state != "end":
            raise ValueError(f"the sequence of {len(ids)} ids ends inside its {state} span; a whole one ends with <eos>")
        rewritten = spans.get("caption") if task == "rewrite" else None
        return Unpacked(
            task, Tags(**tags), spans.get("image", spans.get("drawn")), spans.get("prompt") if task != "joint" and task != "question" else spans.get("caption"),
            spans.get("asked"), spans.get("answer"), rewritten, register,
        )  # fmt: skip

    def _next(self, state: str, token: int, spans: dict[str, list[int]], tags: dict[str, Any], position: int) -> str:
        kind = self.class_of(token)
        target = dict(GRAMMAR[state]).get(kind)
        length = len(spans.get(state, ()))
        rows, columns = tags.get("grid") or self.default_grid
        full = length == rows * columns
        wrong = target is None
        if state in IMAGE_STATES:
            wrong |= (kind == "code") == full
        elif target != state and state in TEXT_STATES:
            wrong |= length == 0
        elif kind == "text":
            wrong |= length >= self.max_text or token in self.illegal_text
        if wrong:
            raise ValueError(f"id {token} ({kind}) at position {position} cannot stand in a {state} span of {length}")
        assert target is not None
        return target

    def _codes(self, codes: Sequence[int] | np.ndarray, tags: Tags) -> list[int]:
        rows, columns = tags.grid or self.default_grid
        if len(codes) != rows * columns:
            raise ValueError(f"{len(codes)} codes do not fill a grid of {rows}x{columns} ({rows * columns})")
        array = np.asarray(codes)
        if array.dtype != np.uint16:  # as shards hold them: never below 0
            array = array.astype(np.int64)
        if len(array) and not (np.maximum.reduce(array) < self.codebook_size and (array.dtype == np.uint16 or array.min() >= 0)):
            raise ValueError(f"codes lie in {array.min()}..{array.max()}, outside 0..{self.codebook_size - 1}")
        return np.add(array, self.code_offset, dtype=np.int64).tolist()

    def _text(self, ids: Sequence[int]) -> list[int]:
        if not 0 < len(ids) <= self.max_text:
            raise ValueError(f"a text span has {len(ids)} pieces; it needs 1 to {self.max_text} (data.max_caption_tokens)")
        ids = list(map(int, ids))
        if not (min(ids) >= 0 and max(ids) < self.text_size) or not self._illegal.isdisjoint(ids):
            raise ValueError(f"a text span holds ids outside the text pieces 0..{self.text_size - 1} (or {self.illegal_text})")
        return ids

    @cached_property
    def _illegal(self) -> frozenset[int]:
        return frozenset(self.illegal_text)

    # --- the grammar as tensors, for sampling -----------------------------------------------------------------------

    @cached_property
    def legal(self) -> Tensor:
        """(S, V) bool: which ids may stand in each state, span lengths aside."""
        table = torch.zeros(len(STATES), self.size, dtype=torch.bool)
        for row, state in enumerate(STATES):
            for kind, _ in GRAMMAR[state]:
                table[row, self._ids_of(kind)] = True
        return table

    @cached_property
    def following(self) -> Tensor:
        """(S, V) int64: the state after an id; -1 where it is illegal."""
        table = torch.full((len(STATES), self.size), -1)
        for row, state in enumerate(STATES):
            for kind, target in GRAMMAR[state]:
                table[row, self._ids_of(kind)] = STATES.index(target)
        return table

    def legal_mask(self, states: Tensor, lengths: Tensor, n_codes: Tensor) -> Tensor:
        """Which ids may come next. states, lengths (ids in the present span), n_codes: int64 (B,) -> (B, V) bool."""
        mask = self.legal.to(states.device)[states]
        codes = self.is_image.to(states.device)
        text_end = torch.zeros(self.size, dtype=torch.bool, device=states.device)
        text_end[[self.id("<eoc>"), self.id("<eoq>"), self.id("<eoa>")]] = True
        image = torch.isin(states, torch.tensor([STATES.index(s) for s in IMAGE_STATES], device=states.device))
        text = torch.isin(states, torch.tensor([STATES.index(s) for s in TEXT_STATES], device=states.device))
        full = (image & (lengths >= n_codes))[:, None]
        mask &= ~(full & codes)  # a full picture takes no more codes …
        mask &= ~((image[:, None] & ~full) & ~codes)  # … and an unfinished one nothing else
        mask &= ~((text & (lengths == 0))[:, None] & text_end)  # no text is empty …
        mask &= ~((text & (lengths >= self.max_text))[:, None] & ~text_end)  # … or too long
        return mask

    def advance(self, states: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States and span lengths after `tokens` (B,)."""
        following = self.following.to(states.device)[states, tokens]
        assert following.device.type != "cpu" or (following >= 0).all(), "an illegal id was chosen"  # a GPU is not waited for
        return following, torch.where(following == states, lengths + 1, torch.zeros_like(lengths))

    def _ids_of(self, kind: str) -> Tensor:
        if kind == "text":
            legal = torch.ones(self.text_size, dtype=torch.bool)
            legal[list(self.illegal_text)] = False
            return legal.nonzero()[:, 0]
        if kind == "code":
            return torch.arange(self.code_offset, self.code_end)
        if kind in TAG_KINDS:
            return torch.tensor([self._ids[c] for c in self.controls if c.startswith(f"<{kind}:")], dtype=torch.long)
        return torch.tensor([self.id(kind)])

    # --- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {
            "text_size": self.text_size, "codebook_size": self.codebook_size, "styles": list(self.styles),
            "subjects": list(self.subjects), "registers": list(self.registers), "grids": [list(g) for g in self.grids],
            "max_text": self.max_text, "illegal_text": list(self.illegal_text), **({"things": list(self.things)} if self.things else {}),
            **({"appended": list(self.appended)} if self.appended else {}),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Vocabulary:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
        values["grids"] = tuple((int(h), int(w)) for h, w in values["grids"])
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Raises FileNotFoundError or ValueError naming the file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the checkpoint is not whole. Copy it again")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a vocabulary: {error}") from error


def listed(word: str, known: Sequence[str]) -> str:
    """What there is instead of a word: all of it; of more than `MANY`, what is spelt nearly so, and how much there is."""
    if len(known) <= MANY:
        return ", ".join(known) or "nothing here"
    near = difflib.get_close_matches(word, known, n=NEAR, cutoff=0.5)
    return (
        f"{', '.join(near)} … ({len(known):,} in all)"
        if near
        else f"{', '.join(known[:NEAR])} … ({len(known):,} in all, none spelt nearly so)"
    )


def grid_name(grid: tuple[int, int]) -> str:
    return f"<grid:{grid[0]}x{grid[1]}>"


def parse_grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def tag_word(text: str) -> str:
    """Any metadata as a tag: 'Wood engraving (after a drawing)' -> 'wood-engraving-after-a-drawing'. Raises ValueError for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no tag: give a str, empty for none")
    return re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-")

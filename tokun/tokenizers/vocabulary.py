"""One id space for words, controls and picture codes.

    ids:  text pieces 0 … | control tokens … | image codes 0 … K-1 | tags that an adapter has added

The only file that knows the range of each kind of id. grammar.py says which id may follow which, sequences.py lays out sequences.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokun.tokenizers.grammar import TAG_KINDS, Grammar
from tokun.tokenizers.wordings import REGISTERS
from tokun.utils.errors import UserError

STRUCTURE = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<boc>", "<eoc>", "<boq>", "<eoq>", "<boa>", "<eoa>")
TASKS = ("joint", "text_to_image", "question", "rewrite")

Ids = TypeVar("Ids", int, np.ndarray, Tensor)
MANY, NEAR = 100, 5  # an error lists up to MANY names in full, otherwise the NEAR nearest


@dataclass(frozen=True)
class Tags:
    """The tags that precede a pair. An empty string (or None) is an absent tag."""

    style: str = ""
    subject: str = ""
    register: str = ""
    grid: tuple[int, int] | None = None  # rows, columns of codes
    thing: str = ""  # the main noun: what the picture shows

    def names(self) -> list[str]:
        """The control tokens, in the order in which they are written."""
        out = [f"<{kind}:{getattr(self, kind)}>" for kind in TAG_KINDS if kind != "grid" and getattr(self, kind)]
        return out + ([grid_name(self.grid)] if self.grid else [])

    def without_kinds(self) -> Tags:
        """The same register and grid, without style, subject and thing: a picture has to show these by itself."""
        return Tags(register=self.register, grid=self.grid)


@dataclass(frozen=True)
class Vocabulary:
    """Sizes and names; everything else is derived.

    text_size: number of text ids; illegal_text: those a sampler must not emit (unknown, specials);
    grids: allowed (rows, columns), the first is the default; max_text: most pieces in one text span. With several
    grids, a sequence always names its own: see `bare`. appended: tags whose ids follow the codes, because they were added
    to a generator that kept its other ids: see `extended`.
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
            raise UserError("a vocabulary needs at least one grid, for example ((8, 8),)")
        for name in ("text_size", "codebook_size", "max_text"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UserError(f"{name} is {size!r}; it must be an integer, at least 1")
        if any(not isinstance(i, int) or not 0 <= i < self.text_size for i in self.illegal_text):
            raise UserError(f"illegal_text is {self.illegal_text!r}; it must hold text ids, 0 to {self.text_size - 1}")
        names = (*self._front, *self.appended)
        if unknown := set(self.appended) - set(self._tags):
            raise UserError(f"appended names {sorted(unknown)}, which are not tags of this vocabulary")
        for name in names:
            if re.search(r"[\s<>]", name[1:-1]):
                raise UserError(f"{name!r} cannot be a control token: no spaces or angle brackets; write wood-engraving")
        if len(set(names)) != len(names):
            raise UserError(f"control tokens repeat: {sorted(n for n in names if names.count(n) > 1)}")
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
        """The id after the last code."""
        return self.code_offset + self.codebook_size

    @property
    def size(self) -> int:
        return self.code_end + len(self.appended)

    def extended(
        self, *, styles: Iterable[str] = (), subjects: Iterable[str] = (), things: Iterable[str] = (), registers: Iterable[str] = ()
    ) -> Vocabulary:
        """The same ids, followed by one for each of these words that is new."""
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
        """The number of codes of the largest grid."""
        return max(map(math.prod, self.grids))

    @property
    def default_register(self) -> str:
        """The register when none is requested: plain if it exists."""
        return "plain" if "plain" in self.registers else self.registers[0] if self.registers else ""

    def bare(self, grid: tuple[int, int] | None = None) -> Tags:
        """The fewest tags of a sequence: none, or only the grid (default if None) when there are several grids."""
        return Tags(grid=grid or self.default_grid) if len(self.grids) > 1 else Tags()

    def known(self, tags: Tags) -> Tags:
        """The tags without those that have no id here; an unknown register becomes the default one. The grid stays."""
        register = tags.register if tags.register in self.registers else self.default_register
        kinds = (("style", self.styles), ("subject", self.subjects), ("thing", self.things))
        return replace(tags, register=register, **{kind: "" for kind, there in kinds if getattr(tags, kind) not in there})

    def n_codes(self, prompt: Sequence[int]) -> int:
        """How many codes the picture of a sequence has, by the grid tag in its prompt; without one, by the default grid."""
        kinds = 1 + len(TAG_KINDS)  # after <bos>
        return next((self.codes_of[token] for token in prompt[:kinds] if token in self.codes_of), self.codes_of[None])

    @cached_property
    def codes_of(self) -> dict[int | None, int]:
        """Grid tag (None: the default) -> number of codes."""
        return {None: math.prod(self.default_grid), **{self.id(grid_name(grid)): math.prod(grid) for grid in self.grids}}

    def id(self, name: str) -> int:
        """The id of a control token such as '<boi>' or '<style:engraving>'.

        Raises UserError listing the known ones of its kind, or the nearest of many.
        """
        if name not in self._ids:
            kind, _, word = name[1:-1].partition(":")
            known = [c[len(kind) + 2 : -1] for c in self.controls if c.startswith(f"<{kind}:")]
            raise UserError(f"{name} is not in this vocabulary; {choices(kind, word, known)}")
        return self._ids[name]

    def name(self, token: int) -> str:
        """The control token with this id."""
        return self.appended[token - self.code_end] if token >= self.code_end else self._front[token - self.text_size]

    def ids_of_codes(self, codes: Ids) -> Ids:
        """Codes 0 … K-1 -> their ids. An int, a tensor or an array of int64; not checked."""
        return codes + self.code_offset

    def codes_of_ids(self, ids: Ids) -> Ids:
        """The ids of codes -> the codes 0 … K-1. The reverse of `ids_of_codes`."""
        return ids - self.code_offset

    def is_code(self, ids: Any) -> Any:
        """Whether each of these ids is that of a code: bool of the same shape. An int, a tensor or an array."""
        return (ids >= self.code_offset) & (ids < self.code_end)

    @property
    def code_range(self) -> slice:
        """The ids of all codes, as an index into logits."""
        return slice(self.code_offset, self.code_end)

    @cached_property
    def is_image(self) -> Tensor:
        """(V,) bool: which ids are image codes."""
        return self.is_code(torch.arange(self.size))

    def class_of(self, token: int) -> str:
        """'text', 'code', the name of a structure token, or the kind of a tag."""
        if 0 <= token < self.text_size:
            return "text"
        if self.code_offset <= token < self.code_end:
            return "code"
        if not 0 <= token < self.size:
            raise UserError(f"id {token} is outside this vocabulary (0..{self.size - 1})")
        name = self.name(token)
        return name if name in STRUCTURE else name[1:].partition(":")[0]

    @cached_property
    def illegal(self) -> frozenset[int]:
        return frozenset(self.illegal_text)

    @cached_property
    def grammar(self) -> Grammar:
        """Which id may follow which, as tables on the CPU."""
        return Grammar(self)

    def ids_of(self, kind: str) -> Tensor:
        """The ids of a class (see `class_of`), int64; for text, only the legal ones."""
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
        """The fields as plain JSON; things and appended only if there are any."""
        tree = json.loads(json.dumps({each.name: getattr(self, each.name) for each in fields(self) if each.init}))
        return {name: value for name, value in tree.items() if value or name not in ("things", "appended")}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Vocabulary:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
        values["grids"] = tuple((int(h), int(w)) for h, w in values["grids"])
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Raises FileNotFoundError or UserError naming the file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete. Copy it again")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path} is not a vocabulary: {error}") from error


def choices(kind: str, word: str, known: Sequence[str]) -> str:
    """The alternatives to an unknown word: all of them and the nearest, or if more than `MANY` those spelt most like it and the total."""
    near = difflib.get_close_matches(word, known, n=NEAR, cutoff=0.5)
    if len(known) <= MANY:
        return (f"did you mean {near[0]}? " if near else "") + f"{kind} can be: {', '.join(known) or 'nothing here'}"
    return f"{kind} can be: {', '.join(near or known[:NEAR])} … ({len(known):,} in all{'' if near else ', none spelt like it'})"


def grid_name(grid: tuple[int, int]) -> str:
    return f"<grid:{grid[0]}x{grid[1]}>"


def parse_grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def tag_word(text: str) -> str:
    """Any metadata as a tag: 'Wood engraving (after a drawing)' -> 'wood-engraving-after-a-drawing'.

    Raises UserError if it is not a str.
    """
    if not isinstance(text, str):
        raise UserError(f"{text!r} is not a tag: give a str, empty for none")
    return re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-")

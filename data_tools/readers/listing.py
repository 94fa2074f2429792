"""Listing: what a reader is told, and what it answers.

A reader opens no picture: it lists paths, short words and where the bytes lie, on disk (pipeline/disk.py), so that memory
does not grow with the collection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tokun.utils.errors import BadSample


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes within a larger file: a member of a tar. `file` is a path within SOURCE."""

    file: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of one split of a Hugging Face data set."""

    split: str
    index: int


@dataclass(frozen=True, slots=True)
class Remote:
    """A file in object storage, or the `size` bytes of it from `start` on (a member of a tar)."""

    url: str
    start: int = 0
    size: int | None = None
    """None: to its end."""
    version: str = ""
    """Changes when the file does, where the storage tells."""


@dataclass(frozen=True, slots=True)
class Found:
    """One input picture: its path within SOURCE with forward slashes, and why it may not be opened ("" when it may)."""

    path: str
    problem: str = ""
    where: Span | Row | Remote | None = None
    """Where the bytes lie; None: in a file of their own, at `path`."""
    style: str = ""
    """The picture's own style; "": the one asked for."""
    group: str | None = None
    """Pictures of one group never part in the split. "": a group of its own; None: its folder decides."""
    beside: bool = True
    """Whether words may be looked for in files beside it, and in its name."""
    sidecars: tuple[str, ...] | None = None
    """The names of the files of words in its folder that are its own: text first, then JSON. None: not looked for yet."""


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of one picture beside its pixels."""

    caption: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    subject: str = ""
    license: str = ""
    source_url: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the picture's JSON: title, author, context and the like."""
    words_from: str = field(default="", compare=False)
    """The file that the caption is from, as a path within SOURCE where it lies there."""
    raw: str = field(default="", compare=False)
    """The caption as it was found, where taking out markup and invisible characters changed more than its spaces."""

    def or_else(self, other: Words) -> Words:
        """These words, each empty one filled from `other`."""
        if other == NOTHING:
            return self
        filled = {one.name: getattr(self, one.name) or getattr(other, one.name) for one in fields(self)}
        return Words(**{**filled, "raw": self.raw if self.caption else other.raw})


NOTHING = Words()


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a reader may be told beside the source."""

    style: str = ""
    """The style asked for; "": the style that each picture brings."""
    root: Path | None = None
    """Where the paths in a table start; None: at the table's folder."""
    leave_out: Path | None = None
    """A folder that is not entered: the output, when it lies inside the source."""
    caption_column: str = ""
    """The column that holds captions; "": the first of those with a known name."""
    captions_needed: bool = False
    """Whether a table or a data set without a column of captions is refused."""
    encoding: str = "utf-8"
    """Of tables of text."""
    quoting: str = "auto"
    """Of tables of text: auto, none, csv."""
    captions: Path | None = None
    """A table of captions by the paths of this source, which come before all others."""


@dataclass(frozen=True)
class Listing:
    """What a reader found: pictures in order, words by path, rows of tables that belong to no picture, files that are not read."""

    base: Path | str
    """The folder, or the URL, where the paths of the pictures start."""
    found: Sequence[Found]
    words: Mapping[str, Words]
    unmatched: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)
    """Files below the source that are not read, each with the reason: "not read: …"."""
    notes: tuple[str, ...] = ()
    """What the user should know, in whole sentences."""


class CaptionError(BadSample):
    """A caption file is there and cannot be read: guessing another caption would mislabel the picture."""


def shown(path: str) -> str:
    """A path as text that any file can hold: bytes of a name that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

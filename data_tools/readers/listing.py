"""Listing: the options of a reader and its result.

A reader opens no picture: it lists paths, words and the location of the bytes. Lists are kept on disk (pipeline/disk.py),
so memory does not grow with the collection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data_tools.pipeline.disk import DiskList
from tokun.utils.errors import BadSample


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range in a larger file, such as a member of a tar. `file` is a path within SOURCE."""

    file: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """A row of one split of a Hugging Face data set."""

    split: str
    index: int


@dataclass(frozen=True, slots=True)
class Remote:
    """A file in object storage, or `size` bytes of it from `start` (a member of a tar)."""

    url: str
    start: int = 0
    size: int | None = None
    """None: to its end."""
    version: str = ""
    """Changes when the file does, if the storage reports it."""


@dataclass(frozen=True, slots=True)
class Found:
    """One input picture: its path within SOURCE with forward slashes, and why it must not be opened ("" if it may)."""

    path: str
    problem: str = ""
    where: Span | DatasetRow | Remote | None = None
    """Location of the bytes; None: a separate file at `path`."""
    style: str = ""
    """The picture's own style; "": the requested one."""
    group: str | None = None
    """Pictures of one group stay in one split. "": a group of its own; None: its folder is the group."""
    beside: bool = True
    """Whether to look for words in files beside it and in its name."""
    sidecars: tuple[str, ...] | None = None
    """Names of its sidecar files in its folder: text first, then JSON. None: not searched yet."""
    of_words: bool = False
    """Whether the problem is one of its words alone: a caption that is given (`Options.captions`) removes it."""
    given: bool = False
    """Whether its caption is given: words beside it only add to the given ones, and may be damaged."""


GROUPS = ("group", "book", "gutenberg_id", "object", "object_id", "artist")
"""Columns whose values are groups; the first that is present is used."""


@dataclass(frozen=True, slots=True)
class Words:
    """Caption and metadata of one picture."""

    caption: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    subject: str = ""
    license: str = ""
    source_url: str = ""
    group: str = ""
    """What it shares a split with, one of GROUPS and its value: object_id/7. "": the group of its `Found`."""
    style: str = ""
    """Its own style, as a tag."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the picture's JSON: title, author, context and the like."""
    words_from: str = field(default="", compare=False)
    """The file the caption comes from, as a path within SOURCE if it is there."""
    raw: str = field(default="", compare=False)
    """The caption as found, if removing markup and invisible characters changed more than its spaces."""

    def or_else(self, other: Words) -> Words:
        """These words, with what they lack from `other`: empty fields, registers and further fields."""
        if other == NOTHING:
            return self
        filled = {one.name: getattr(self, one.name) or getattr(other, one.name) for one in fields(self)}
        groups = sorted(filter(None, (self.group, other.group)), key=lambda one: GROUPS.index(one.partition("/")[0]))
        more = {**other.more, **self.more}
        if self.caption and "caption_origin" not in self.more:
            more.pop("caption_origin", None)  # it is that of the other caption
        raw, captions = self.raw if self.caption else other.raw, {**other.captions, **self.captions}
        return Words(**{**filled, "raw": raw, "captions": captions, "group": "".join(groups[:1]), "more": more})


NOTHING = Words()


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a reader beside the source."""

    style: str = ""
    """The requested style; "": each picture's own style."""
    root: Path | None = None
    """The folder that paths in a table are relative to; None: the table's folder."""
    leave_out: Path | None = None
    """A folder to skip: the output, if it is inside the source."""
    caption_column: str = ""
    """The caption column; "": the first with a known name."""
    captions_needed: bool = False
    """Whether a table or data set without a caption column is refused."""
    encoding: str = "utf-8"
    """The encoding of text tables."""
    quoting: str = "auto"
    """The quoting of text tables: auto, none or csv."""
    captions: Path | None = None
    """A table of captions by path in this source; it takes precedence over all other captions."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A column that is taken for the captions by its name alone, where there are other columns of text."""

    table: str
    column: str
    others: tuple[str, ...]
    better: str = ""
    """The one of the others with sentences, where the column has titles."""

    def __str__(self) -> str:
        return (
            f"Other columns of text in {self.table}: {', '.join(self.others)}. --caption-column chooses one instead of {self.column}; "
            "a column called era (titles), poetic, social or alt is read beside it."
        )


@dataclass(frozen=True)
class Listing:
    """A reader's result: pictures in order, words by path, the number of table rows without a picture, files that are not read."""

    base: Path | str
    """The folder or URL that the pictures' paths are relative to."""
    found: DiskList
    """Each a `Found`."""
    words: Mapping[str, Words]
    unmatched: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)
    """Files below the source that are not read, each with the reason: "not read: …"."""
    notes: tuple[str, ...] = ()
    """Notes for the user, as sentences."""
    guesses: tuple[Guess, ...] = ()
    """Caption columns that nobody named, one for each table."""


class CaptionError(BadSample):
    """A caption file exists but cannot be read; guessing another caption would mislabel the picture."""


def shown(path: str) -> str:
    """A path as valid UTF-8 text: other bytes of a name become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

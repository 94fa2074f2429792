"""Rows: pairs being captioned, and the blocks of rows that are captioned and stored together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.captioning import registers
from data_tools.captioning.captioned_shards import read_record
from data_tools.captioning.journals import ALL, JournalRows, sha256
from data_tools.captioning.registers import Facts
from data_tools.captioning.settings import Settings
from data_tools.readers.stored_pairs import StoredPair, read_pairs
from tokun.data.image_files import PictureError, decode_as


@dataclass
class CaptionRow:
    """One pair being captioned: its facts, the registers wanted, and the results."""

    shard: str
    number: int  # within the shard
    key: str
    wanted: tuple[str, ...]
    facts: Facts = field(default_factory=Facts)
    described: str = ""  # the description by a captioner of an earlier run
    image: Image.Image | None = None  # None: undecodable, or no stage needs it
    attempt: int = 0
    captions: dict[str, dict[str, Any]] = field(default_factory=dict)  # register -> {"text", "source", …}
    failures: dict[str, str] = field(default_factory=dict)  # register -> reason
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # of prompts and of answers, as a server counts

    def open(self, names: Iterable[str]) -> list[str]:
        """Those of these registers that are wanted and have no result yet."""
        return [name for name in names if name in self.wanted and name not in self.captions and name not in self.failures]

    def fail(self, names: Iterable[str], reason: str) -> None:
        self.failures.update(dict.fromkeys(names, reason))

    def seed(self, seed: int) -> int:
        """A separate seed for each row and attempt: 31 bits, which every server accepts."""
        return int(sha256(f"{seed}/{self.shard}/{self.number}/{self.attempt}")[:8], 16) >> 1

    def as_json(self) -> dict[str, Any]:
        tree = {"row": self.number, "key": self.key, "attempt": self.attempt, "captions": self.captions, "failures": self.failures}
        return {**tree, "tokens": self.tokens} if any(self.tokens) else tree


Block = list[CaptionRow]  # rows that are captioned and stored together: a batch for a local model, one row for a server


def open_small(pair: StoredPair, side: int) -> Image.Image | None:
    """The pair's picture in RGB, upright, on white, reduced to `side` pixels; None if it is missing or damaged."""
    try:
        image = decode_as(pair.image or b"", 3)
    except PictureError:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def earlier_description(record: dict[str, Any]) -> str:
    """The plain caption in an earlier run's record, if its model saw the picture; else ""."""
    captions, sources = record.get("captions"), record.get("caption_sources")
    if not isinstance(captions, dict) or not isinstance(sources, dict) or not isinstance(sources.get("plain"), dict):
        return ""
    text = captions.get("plain") if sources["plain"].get("source") in ("model", "endpoint") else ""
    return text if isinstance(text, str) else ""


def make_row(pair: StoredPair, number: int, before: dict[str, Any] | None, settings: Settings, *, attempt: int, looks: bool) -> CaptionRow:
    """A new row, or a row that failed `before`, for another attempt at the missing registers."""
    row = CaptionRow(pair.shard.name, number, pair.key, settings.registers)
    if before is not None:
        row.wanted, row.attempt, row.captions = tuple(before["failures"]), attempt, dict(before["captions"])
        row.tokens = list(before.get("tokens", row.tokens))
    record = read_record(pair)
    if record is None:
        row.fail(row.wanted, "damaged record")
        return row
    row.facts, row.described = registers.facts_of(record), earlier_description(record)
    row.image = open_small(pair, settings.image_side) if looks else None
    return row


@dataclass(frozen=True)
class Task:
    """The rows of one shard to caption: the first `limit`, in blocks of `size` that begin at multiples of it."""

    shard: Path
    settings: Settings
    limit: int = ALL
    size: int = 1
    attempt: int = 0
    """Rows that failed in an earlier attempt are retried."""
    looks: bool = True
    """Whether any stage needs the pictures."""

    def blocks(self, done: JournalRows, end: Callable[..., None] | None = None) -> Iterator[Block]:
        """Blocks of the rows not yet done, and separate blocks of those to retry. `end` is called at the end of the shard."""
        damaged: list[Any] = []
        count = 0
        for _, group in groupby(islice(enumerate(read_pairs(self.shard, damaged)), self.limit), lambda item: item[0] // self.size):
            new: Block = []
            again: Block = []
            for number, pair in group:
                count += 1
                before = done.get(number)
                if before is None or (before["failures"] and before["attempt"] < self.attempt):
                    row = make_row(pair, number, before, self.settings, attempt=self.attempt, looks=self.looks)
                    (new if before is None else again).append(row)
            yield from (block for block in (new, again) if block)
        if end is not None and count < self.limit:
            end(pairs=count, damaged=[str(one) for one in damaged])

"""Caption guess: the column of a table that is taken for the captions by its name alone, and the other columns of text beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.readers.listing import Guess
from data_tools.readers.table_files import CAPTION_COLUMNS, caption_of
from data_tools.readers.words import COLUMNS
from tokun.data.captions import Texts

MOST_ROWS = 200  # that are looked at
SURE = ("caption", "captions")
"""Names that can mean nothing else."""
ROLES = COLUMNS - frozenset(CAPTION_COLUMNS)
"""Columns with a meaning of their own."""
LONGER = 1.5
"""Sentences have at least so many times the words of the titles beside them."""


@dataclass
class Column:
    """The texts of one column: how many, their words, and what kind they are."""

    count: int = 0
    words: int = 0
    texts: Texts = field(default_factory=Texts)

    @property
    def mean(self) -> float:
        return self.words / self.count

    def add(self, text: str) -> None:
        self.count, self.words = self.count + 1, self.words + len(text.split())
        self.texts.add(text)

    def mostly(self, kind: int) -> bool:
        return 2 * kind > self.count


@dataclass
class TextColumns:
    """How much text is in each column of a table, by its first rows."""

    rows: int = 0
    columns: dict[str, Column] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        self.rows += 1
        for name, value in record.items() if self.rows <= MOST_ROWS else ():
            if name not in ROLES and isinstance(value, str) and caption_of(value):
                self.columns.setdefault(name, Column()).add(value)

    def guess(self, table: str) -> Guess | None:
        """The guess, or None if the captions are in a column that is named for them, in none, or in the only column of text."""
        column = next((name for name in CAPTION_COLUMNS if name in self.columns), "")
        others = {name: one for name, one in self.columns.items() if name != column and not one.mostly(one.texts.labels)}
        if not column or column in SURE or not others:
            return None
        chosen = self.columns[column]
        name, longest = max(others.items(), key=lambda item: item[1].mean)
        titles = column == "title" or chosen.mostly(chosen.texts.short)
        sentences = not longest.mostly(longest.texts.short) and longest.mean >= LONGER * chosen.mean
        return Guess(table, column, tuple(others), name if titles and sentences else "")


def in_all(guesses: Iterable[Guess], tables: Iterable[Iterable[str]]) -> tuple[Guess, ...]:
    """The guesses, without a better column that not every table has: --caption-column speaks of all of them."""
    tables = list(map(frozenset, tables))
    return tuple(one if all(one.better in columns for columns in tables) else Guess(one.table, one.column, one.others) for one in guesses)

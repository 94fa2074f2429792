"""Disk: a list and a dict on disk for data that may not fit into memory: the files of a collection and their words.

    pictures = DiskList(found for found in walk)        # in order, by number
    words = DiskDict()                                  # by path

Both use an unnamed temporary file, which disappears with them or with the process, and a few megabytes of memory regardless
of their size. Items are pickled. Pickling the container copies all items. Knows nothing of pictures.
"""

from __future__ import annotations

import pickle
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

MANY = 1000  # rows read or written at once


def open_table(key: str) -> sqlite3.Connection:
    """A database with one table, in a temporary file that SQLite creates and removes, with a cache of 2 MB."""
    base = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # the garbage collector may close it in any thread
    base.execute("PRAGMA journal_mode = OFF")  # nothing is ever rolled back,
    base.execute(f"CREATE TABLE items (key {key} PRIMARY KEY, value BLOB) WITHOUT ROWID")
    base.execute("BEGIN")  # or committed: nobody else reads it
    return base


def packed(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


class DiskList(Sequence):
    """Items in order. Equal to any sequence of equal items; a slice is a list."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self.base, self.length = open_table("INTEGER"), 0
        weakref.finalize(self, self.base.close)
        for item in items:
            self.append(item)

    def append(self, item: Any) -> None:
        self.base.execute("INSERT INTO items VALUES (?, ?)", (self.length, packed(item)))
        self.length += 1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"{index} of {self.length} items")
        return pickle.loads(self.base.execute("SELECT value FROM items WHERE key = ?", (int(index) % self.length,)).fetchone()[0])

    def __iter__(self) -> Iterator[Any]:
        return self.part(0, self.length)

    def part(self, start: int, end: int) -> Iterator[Any]:
        """The items from `start` up to `end` (exclusive), without building a list."""
        for first in range(start, end, MANY):
            rows = self.base.execute("SELECT value FROM items WHERE key >= ? AND key < ? ORDER BY key", (first, min(end, first + MANY)))
            yield from (pickle.loads(value) for (value,) in rows.fetchall())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return DiskList, (list(self),)


class DiskDict(MutableMapping):
    """Values by text key, iterated in sorted order of the keys."""

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        self.base = open_table("BLOB")
        weakref.finalize(self, self.base.close)
        self.update(items)

    @staticmethod
    def key(text: str) -> bytes:
        """Bytes that sort like the text, even for names that are not UTF-8."""
        return text.encode("utf-8", "surrogatepass")

    def __setitem__(self, text: str, value: Any) -> None:
        self.base.execute("INSERT OR REPLACE INTO items VALUES (?, ?)", (self.key(text), packed(value)))

    def __getitem__(self, text: str) -> Any:
        row = self.base.execute("SELECT value FROM items WHERE key = ?", (self.key(text),)).fetchone()
        if row is None:
            raise KeyError(text)
        return pickle.loads(row[0])

    def __delitem__(self, text: str) -> None:
        if not self.base.execute("DELETE FROM items WHERE key = ?", (self.key(text),)).rowcount:
            raise KeyError(text)

    def __len__(self) -> int:
        return self.base.execute("SELECT count(*) FROM items").fetchone()[0]

    def __iter__(self) -> Iterator[str]:
        return (text for text, _ in self.pairs())

    def pairs(self, start: str = "") -> Iterator[tuple[str, Any]]:
        """(text, value) in order, from the first that begins with `start` to the last. The dict may be written to meanwhile."""
        first, compare = self.key(start), ">="
        while rows := self.base.execute(
            f"SELECT key, value FROM items WHERE key {compare} ? ORDER BY key LIMIT {MANY}", (first,)
        ).fetchall():
            for key, value in rows:
                if not key.startswith(self.key(start)):
                    return
                yield key.decode("utf-8", "surrogatepass"), pickle.loads(value)
            first, compare = rows[-1][0], ">"

    def ordered(self) -> Iterator[Any]:
        """The values in the order of their keys."""
        return (value for _, value in self.pairs())

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return DiskDict, (dict(self.pairs()),)

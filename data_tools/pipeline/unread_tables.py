"""Unread tables: catalogues that lie in SOURCE under names that are not read, and the ways to have them read."""

from __future__ import annotations

import heapq
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence

from data_tools.pipeline.storage_backends import is_url
from data_tools.readers.folder_scan import OTHER_TABLE, TABLE_STEMS
from tokun.utils.console import home_text

SPREADSHEETS = (".ods", ".xls", ".xlsx")
MOST = 3  # that are told


def unread_tables(unread: Mapping[str, str]) -> tuple[str, ...]:
    """The paths of the first tables and spreadsheets among the files that are not read."""
    found = (path for path, reason in unread.items() if (reason == OTHER_TABLE or is_spreadsheet(path)) and not is_hidden(path))
    return tuple(heapq.nsmallest(MOST, found, key=lambda path: (path.count("/"), path)))


def is_spreadsheet(path: str) -> bool:
    return path.lower().endswith(SPREADSHEETS)


def is_hidden(path: str) -> bool:
    """Whether it is a file of a system or of a spreadsheet that is open: ._a.csv, ~$a.xlsx."""
    return posixpath.basename(path).startswith((".", "~$"))


def free_name(source: str, table: str) -> str:
    """The path under which a table would be read; "" if there are tables of these names already."""
    suffix = ".csv" if is_spreadsheet(table) else posixpath.splitext(table)[1].lower()
    places = (posixpath.join(source, f"{stem}{suffix}") for stem in TABLE_STEMS)
    return next((place for place in places if is_url(place) or not os.path.lexists(place)), "")


def as_source(command: Sequence[str], source: str, table: str) -> list[str]:
    """The arguments of prepare with the table as SOURCE in place of its folder; [] where that is not possible."""
    at = next(_places(command, source), -1)
    if at < 0 or is_url(source) or is_spreadsheet(table):
        return []
    named = any(one.partition("=")[0] == "--root" for one in command)
    root = ["--root", source] if posixpath.dirname(table) and not named else []
    return [*command[:at], posixpath.join(source, table), *root, *command[at + 1 :]]


def _places(command: Sequence[str], source: str) -> Iterator[int]:
    """Where SOURCE stands in a command, the place that is no option's value first."""
    there = [at for at, one in enumerate(command) if home_text(one) == source]
    yield from sorted(there, key=lambda at: at > 0 and command[at - 1].startswith("-"))

"""Unread tables: tables in SOURCE whose names are not those of caption tables, and the ways to have them read."""

from __future__ import annotations

import heapq
import os
import posixpath
from collections.abc import Mapping

from data_tools.pipeline.storage_backends import is_url
from data_tools.readers.folder_scan import OTHER_TABLE, TABLE_STEMS

SPREADSHEETS = (".ods", ".xls", ".xlsx")
MOST = 3  # tables that are named to the user


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
    """The path beside a table under which it would be read; "" if there are tables of these names already, or SOURCE is no folder."""
    if not (is_url(source) or os.path.isdir(source)):
        return ""
    suffix = ".csv" if is_spreadsheet(table) else posixpath.splitext(table)[1].lower()
    places = (posixpath.join(source, posixpath.dirname(table), f"{stem}{suffix}") for stem in TABLE_STEMS)
    return next((place for place in places if is_url(place) or not os.path.lexists(place)), "")

"""Refusal: the record of a source that was not prepared, since a table of captions in it cannot be read.

A manifest with a row for every file and the fault, as after any run, and a prepare.json that says that nothing was made. The next run
replaces both without --overwrite. Shards that are already there stay as they are, with their own manifest.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools import report
from data_tools.pipeline.disk import DiskDict
from data_tools.pipeline.manifest import MANIFEST, unread_row, write_rows
from data_tools.pipeline.output import RECORD, holds_no_pictures
from data_tools.pipeline.remote_lock import alone_in
from data_tools.pipeline.storage_backends import is_url, open_store
from data_tools.readers.files import find_files
from data_tools.readers.listing import shown
from data_tools.readers.table_files import TableError
from tokun.utils.errors import UserError

FAULTY, STOPPED = "caption table: ", "not read: prepare stopped at a fault of another file"


def record_refusal(source: str, out: str, error: TableError) -> str:
    """Write the manifest of a source that was refused. Returns a sentence that names it, or "" if it was not written.

    It is not written if one of the two is an address, or if `out` holds shards, is in use or cannot be written.
    """
    if is_url(source) or is_url(out) or not Path(source).exists():
        return ""
    store = open_store(out)
    with contextlib.suppress(OSError, UserError, sqlite3.Error):  # the fault is reported, with its record or without
        if not holds_no_pictures(store, store.list()):
            return ""
        with alone_in(store):
            if not holds_no_pictures(store, store.list()):  # again: another process may have written meanwhile
                return ""
            store.remove(report.NAME)  # of an earlier run that kept nothing
            record = {"refused": shown(str(error)), "kept": 0, "shards": {}}
            store.write(RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
            write_rows(store, refused_rows(source, str(error), Path(out)))
        return f"{out}/{MANIFEST} lists the files"
    return ""


def refused_rows(source: str, error: str, leave_out: Path) -> Iterator[dict[str, Any]]:
    """A row for each file below `source`, in order.

    The file whose path the error begins with has the fault as its reason; if there is none, all files have it.
    """
    given = Path(source)
    base = given if given.is_dir() else given.parent
    paths = DiskDict((path, None) for path in find_files(given, leave_out)) if given.is_dir() else [given.name]
    before = next((prefix for prefix in (f"{base}/", f"{source}/", "./") if error.startswith(prefix)), "")
    error = error.removeprefix(before)
    faulty = max((path for path in paths if error.startswith(path)), key=len, default="")
    for path in paths:
        yield unread_row(path, FAULTY + shown(error) if path == faulty or not faulty else STOPPED)

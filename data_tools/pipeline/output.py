"""Output: the folder that prepare writes. Work is done in a partial folder, resumes after a kill, and is published at the end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict
from posixpath import dirname, join
from typing import Any

from data_tools import report
from data_tools.pipeline.chunks import ROWS, Settings
from data_tools.pipeline.manifest import MANIFEST
from data_tools.pipeline.storage_backends import Store, is_url
from data_tools.readers import Listing
from data_tools.readers.listing import Guess
from data_tools.readers.table_files import column_name
from data_tools.report.counting import RECORD
from tokun.utils.errors import UserError

GIVEN = "captions_given"
"""The record's field with the name of the --captions table, or "". Another table, or one where there was none, replaces the shards."""
PARTIAL = ".prepare-partial"
PLAN = "plan.json"
PUBLISH = "publish.json"
SHARD_NAME = re.compile(r"(train|val)-\d{5,}\.tar")


def refuse_other_shards(out: Store, record: dict[str, Any], *, overwrite: bool) -> None:
    """Raise UserError unless `out` may be written: it is absent, has no shards or the same settings, or `overwrite` is given."""
    names = out.list()
    if "codes.json" in names:
        raise UserError(f"--out {out} holds code shards (codes.json), which prepare does not replace: name another folder")
    if overwrite or holds_no_pictures(out, names):
        return
    way_out = "Name another --out, or add --overwrite to replace the shards there"
    try:
        there = settings_there(out, names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--out {out} holds shards without a complete {RECORD}: from another tool, or an interrupted run. {way_out}"
        ) from error
    if (table := there.get(GIVEN)) and not record[GIVEN]:
        raise UserError(
            f"--out {out} holds shards with the captions of {table}, and none are given now: give them again (--captions). {way_out}"
        )
    changes = [
        f"{name}: {there.get(name)!r} then, {value!r} now" for name, value in record.items() if name != GIVEN and there.get(name) != value
    ]
    if changes:
        raise UserError(f"--out {out} holds shards made with other settings ({'; '.join(changes)}). {way_out}")


def settings_there(out: Store, names: Collection[str]) -> dict[str, Any]:
    """The settings that the shards in `out` were made with. Raises OSError, ValueError, KeyError or TypeError without a complete record."""
    # a run killed while publishing: its files follow the plan in the partial folder, and the record may be missing
    begun = out.exists(f"{PARTIAL}/{PLAN}") and (RECORD not in names or out.exists(f"{PARTIAL}/{PUBLISH}"))
    there = json.loads(out.read(f"{PARTIAL}/{PLAN}" if begun else RECORD))["settings"]
    return {**asdict(Settings(style="any")), **there}  # earlier versions did not store all settings


def refuse_guessed_column(out: Store, record: dict[str, Any], guesses: Sequence[Guess]) -> None:
    """Raise UserError if captions of a column that was named would be replaced by those of one that is taken by its name alone."""
    names = out.list()
    if record["caption_column"] or not guesses or holds_no_pictures(out, names):
        return
    try:
        there = settings_there(out, names)
    except (OSError, ValueError, KeyError, TypeError):  # of another tool; to be replaced
        return
    now = guesses[0].column
    if (column := there["caption_column"]) and column_name(column) != now and there["folder"] == record["folder"]:
        raise UserError(
            f"--out {out} holds shards with the captions of the column {column!r}, and none is named now, so {now} would be read: "
            f"add --caption-column {shlex.quote(column)} again, or --caption-column {now} if that is meant"
        )


def holds_no_pictures(out: Store, names: Collection[str]) -> bool:
    """Whether writing `out`, which holds these names, loses nothing: it has no shards, at most the record of a run that kept no picture."""
    if not any(map(is_ours, names)):
        return True
    return RECORD in names and not any(map(SHARD_NAME.fullmatch, names)) and not out.exists(f"{PARTIAL}/{PUBLISH}")


def is_ours(name: str) -> bool:
    return bool(SHARD_NAME.fullmatch(name)) or name in (MANIFEST, RECORD, report.NAME)


def publish(out: Store, names: list[str]) -> None:
    """Replace the old files of `out` by the new ones. The record is removed first and written last, so its absence means incomplete.

    May be killed and called again: files already moved stay, including the record.
    """
    if out.exists(f"{PARTIAL}/{RECORD}"):
        out.remove(RECORD)
    for name in out.list():
        if is_ours(name) and name not in names:
            out.remove(name)
    for name in names:
        if out.exists(f"{PARTIAL}/{name}"):
            out.move(f"{PARTIAL}/{name}", name)
    out.remove(f"{PARTIAL}/{PUBLISH}")  # first: without it the rest can be resumed; with it, all files must be there
    out.remove(PARTIAL)


def begin(aside: Store, record: dict[str, Any], listing: Listing) -> None:
    """Resume the work in `aside` if it has the same settings and files, and its rows have the same version; otherwise start over."""
    plan = json.dumps({"settings": record, "files": identity(listing), "rows": ROWS}).encode()
    if not aside.exists(PLAN) or aside.read(PLAN) != plan:
        for name in sorted(aside.list(), key=lambda name: name != PUBLISH):  # PUBLISH first, so that a part of the rest is never published
            if name != PLAN:
                aside.remove(name)
        aside.write(PLAN, plan)  # until then the old plan says whose work this was


def identity(listing: Listing) -> str:
    """A hash of the listing: paths, words, and the sizes and times of local files."""
    digest = hashlib.sha256()
    for one in listing.found:
        digest.update(repr((one, listing.words.get(one.path))).encode("utf-8", "backslashreplace"))
        if one.where is None and not one.problem and not is_url(listing.base):
            path = join(listing.base, one.path)
            beside = [join(dirname(path), name) for name in one.sidecars or ()] if one.beside else []
            digest.update(repr([stamp(path) for path in (path, *beside)]).encode())
    for path, reason in listing.unread.items():
        digest.update(repr((path, reason)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def stamp(path: str) -> tuple[int, int] | None:
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_size, there.st_mtime_ns

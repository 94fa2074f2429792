"""Journals of `caption`: its finished rows, shard by shard, and the scores of their captions.

    OUT/.caption/SHARD.jsonl          one line per batch of captioned rows, appended when it is done
    OUT/.caption/SHARD.scores.jsonl   likewise, for CLIP scores

JSON Lines and not SQLite, because rows are only appended and read all at once, and any text tool shows them.
A killed run may leave a journal without its last line; the next run resumes from the rows before it. A row is a dict:
{"row", "key", "attempt", "captions": {register: {"text", "source", "model", …}}, "failures": {register: reason}}. Knows shards and
rows, not models or prompts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.readers.stored_pairs import grouped
from tokun.data import tars
from tokun.utils.errors import UserError
from tokun.utils.files import write_text

STATE = ".caption"
ALL = sys.maxsize  # rows of a shard without a limit

JournalRows = dict[int, dict[str, Any]]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


class Journal:
    """The finished rows of one shard.

    The first line is a header (inputs and settings); each other line is a list of rows, or the end record.
    If a row was written twice, the later one counts. An incomplete last line, left by a killed process, is removed. One process at a time
    can open it. Raises UserError if another still has it open after `wait` seconds, if it is damaged, or if its header differs.
    """

    def __init__(self, path: Path, head: dict[str, Any], wait: float = 0.0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        end = time.monotonic() + wait
        while not self._locked():
            if time.monotonic() >= end:
                os.close(self.file)
                raise UserError(f"{path} is in use by another run: wait for it to finish, or name another --out")
            time.sleep(0.05)
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.ftruncate(self.file, len(whole) if whole.count(b"\n") > 1 else 0)  # a header without rows is discarded
        if whole.count(b"\n") <= 1:
            self._write(head)
        found, self.rows = read_journal(path)
        if changes := differences(found, head):
            os.close(self.file)
            raise UserError(f"{path} was started with other settings ({changes}): name another --out, or delete that file to start it over")

    def _locked(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows that belong together: after a kill, either all or none of them are there."""
        self._write(rows)
        self.rows.update((row["row"], row) for row in rows)

    def end(self, *, pairs: int, damaged: list[str]) -> None:
        """Record the number of pairs in the shard and what could not be read."""
        self._write({"pairs": pairs, "damaged": damaged})

    def _write(self, record: Any) -> None:
        data = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self.file, data) :]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self.file)
        os.close(self.file)


def read_journal(path: Path) -> tuple[dict[str, Any], JournalRows]:
    """(header of a journal with the record of the shard's end, rows); ({}, {}) if there is none yet."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, {}
    head: dict[str, Any] = {}
    rows: JournalRows = {}
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines()):
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                head.update(record)
            else:
                rows.update((int(row["row"]), row) for row in record)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"line {number + 1} of {path} is damaged: delete the file to recaption its shard") from error
    return head, rows


def differences(found: dict[str, Any], head: dict[str, Any]) -> str:
    """The differences of `found` from `head`, in words; "" if there are none."""
    flat_found, flat_head = ({**tree, **tree.get("settings", {})} for tree in (found, head))
    names = [name for name in flat_head if name != "settings" and flat_found.get(name) != flat_head[name]]
    return "; ".join(f"{name}: {flat_found.get(name)!r} then, {flat_head[name]!r} now" for name in names)


@dataclass(frozen=True)
class Folder:
    """The output folder and the paths in it."""

    out: Path

    def journal(self, shard: Path) -> Path:
        return self.out / STATE / f"{shard.stem}.jsonl"

    def scores(self, shard: Path) -> Path:
        return self.out / STATE / f"{shard.stem}.scores.jsonl"

    def stamp(self, shard: Path) -> Path:
        """The file with the hash of all inputs of the shard as last written."""
        return self.out / STATE / f"{shard.stem}.stamp"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for one process; others wait."""
        (self.out / STATE).mkdir(parents=True, exist_ok=True)
        with open(self.out / STATE / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def check(self, shards: list[Path], settings: dict[str, Any]) -> None:
        """Raise UserError if the folder holds something else, or rows of these shards made with other settings."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: name a folder")
        if not (self.out / STATE).exists() and any(self.out.glob("*.tar")):
            raise UserError(f"--out {self.out} holds shards that this tool did not write (there is no {STATE}): name another folder")
        for shard in shards:
            head, rows = read_journal(self.journal(shard))
            if rows and (changes := differences(head, {"settings": settings, "bytes": shard.stat().st_size})):
                raise UserError(
                    f"--out {self.out} was started with other settings ({changes}). Give the same ones to resume, or name another --out"
                )

    def retry_attempt(self, shards: Iterable[Path]) -> int:
        """The number of this round of retries, kept until the round is finished: it retries rows that failed in an earlier round."""
        path = self.out / STATE / "retry"
        with self.locked():
            if not path.exists():
                attempts = [row["attempt"] for shard in shards for row in read_journal(self.journal(shard))[1].values() if row["failures"]]
                write_text(path, str(1 + max(attempts, default=0)))
            return int(path.read_text())


def require_image_shards(shards: Iterable[Path], out: Path) -> None:
    """Raise UserError if a shard is in `out` itself, or among code shards."""
    for shard in shards:
        if shard.parent.resolve() == out.resolve():
            raise UserError(f"--out {out} is the folder of {shard.name} itself: name another, so that the source is not changed")
        if (shard.parent / "codes.json").exists():
            raise UserError(f"{shard.parent} holds code shards (codes.json), which have no pictures: give the image shards")


def done_rows(folder: Folder, shard: Path, *, limit: int, attempt: int, clip: bool = False) -> JournalRows | None:
    """The first `limit` rows of a shard, in order, if all of them are done; else None."""
    head, rows = read_journal(folder.journal(shard))
    rows = {number: row for number, row in sorted(rows.items()) if number < limit}
    if len(rows) < min(limit, head.get("pairs", ALL)) or any(row["failures"] and row["attempt"] < attempt for row in rows.values()):
        return None
    scored = read_journal(folder.scores(shard))[1] if clip else {}
    return None if clip and any(row["captions"] and not is_scored(row, scored) for row in rows.values()) else rows


def rows_left(folder: Folder, shard: Path, limit: int, attempt: int) -> int:
    """How many rows of a shard are still to do; only for the progress bar."""
    rows = read_journal(folder.journal(shard))[1]
    done = sum(not (row["failures"] and row["attempt"] < attempt) for number, row in rows.items() if number < limit)
    return min(limit, count_pairs(shard)) - done


def count_pairs(shard: Path) -> int:
    """The number of pairs that `read_pairs` gives, from the headers alone."""
    try:
        names, _ = tars.files(shard, Counter())
    except (UserError, OSError):
        return 0  # reported at the end
    found = grouped(names)
    return len(found.keys) - sum(map(len, found.ambiguous.values()))


def limits_of(shards: list[Path], limit: int) -> dict[Path, int]:
    """How many rows of each shard to caption: all, or the first `limit` over all shards in order."""
    if not limit:
        return dict.fromkeys(shards, ALL)
    limits, left = {}, limit
    for shard in shards:
        if left > 0:
            limits[shard] = left
            left -= count_pairs(shard)
    return limits


def texts_id(row: dict[str, Any]) -> str:
    """A short hash of a row's captions: scores of other captions do not count."""
    return sha256(json.dumps({name: entry["text"] for name, entry in row["captions"].items()}, sort_keys=True))[:16]


def is_scored(row: dict[str, Any], scored: JournalRows) -> bool:
    return scored.get(row["row"], {}).get("texts") == texts_id(row)

"""Caption results: the journals of `caption`, row by row, and the shards made from them.

    OUT/.caption/SHARD.jsonl          one line per batch of captioned rows, appended when it is done
    OUT/.caption/SHARD.scores.jsonl   the same of CLIP scores
    OUT/SHARD.tar                     made only from the source shard and its journals; written to a temporary file and renamed
    OUT/caption.json                  the settings and the counts; OUT/left-out.jsonl: the rows that --keep-best left out

A killed run may leave a journal without its last line; each shard is either complete or missing. The next run resumes from
both and ends with the same bytes as an uninterrupted run. A row is a dict: {"row", "key", "attempt", "captions":
{register: {"text", "source", "model", …}}, "failures": {register: reason}}. Knows shards and rows, not models or prompts.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import sys
import tarfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.inspect import Pair, read_pairs
from tokun.data.captions import MOST_TEXTS, alike
from tokun.data.shards import key_and_suffix
from tokun.utils.errors import UserError

RECORD = "caption.json"
LEFT_OUT = "left-out.jsonl"
STATE = ".caption"
ALL = sys.maxsize  # rows of a shard without a limit

Rows = dict[int, dict[str, Any]]
Scores = dict[int, dict[str, dict[str, float]]]  # row -> register -> {"clip", "clip_percentile"}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# journals


class Journal:
    """The finished rows of one shard. The first line is a header (inputs and settings); each other line is a list of rows, or the end record.

    If a row was written twice, the later one counts. An incomplete last line, left by a killed process, is removed. One process
    at a time can open it. Raises UserError if another has it open, if it is damaged, or if its header differs.
    """

    def __init__(self, path: Path, head: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.file)
            raise UserError(f"{path} is in use by another run: wait for it to finish, or name another --out") from error
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.ftruncate(self.file, len(whole) if whole.count(b"\n") > 1 else 0)  # a header without rows is discarded
        if whole.count(b"\n") <= 1:
            self._write(head)
        found, self.rows = read_journal(path)
        if changes := differences(found, head):
            os.close(self.file)
            raise UserError(f"{path} was started with other settings ({changes}): name another --out, or delete that file to start it over")

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


def read_journal(path: Path) -> tuple[dict[str, Any], Rows]:
    """(header of a journal with the record of the shard's end, rows); ({}, {}) if there is none yet."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, {}
    head: dict[str, Any] = {}
    rows: Rows = {}
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
                write_whole(path, str(1 + max(attempts, default=0)))
            return int(path.read_text())


def require_image_shards(shards: Iterable[Path], out: Path) -> None:
    """Raise UserError if a shard is in `out` itself, or among code shards."""
    for shard in shards:
        if shard.parent.resolve() == out.resolve():
            raise UserError(f"--out {out} is the folder of {shard.name} itself: name another, so that the source is not changed")
        if (shard.parent / "codes.json").exists():
            raise UserError(f"{shard.parent} holds code shards (codes.json), which have no pictures: give the image shards")


def write_whole(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def done_rows(folder: Folder, shard: Path, *, limit: int, attempt: int, clip: bool = False) -> Rows | None:
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
    """The number of pairs in a shard, from its headers alone; approximate if it is truncated."""
    count, last = 0, None
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in filter(tarfile.TarInfo.isfile, tar):
                key, _ = key_and_suffix(info.name)
                count, last = count + (key != last), key
    except (tarfile.TarError, OSError, EOFError):
        pass  # the readable part is captioned, and the rest is reported at the end
    return count


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


# ---------------------------------------------------------------------------------------------------------------------
# the new shards


def read_record(pair: Pair) -> dict[str, Any] | None:
    """KEY.json as a dict: empty if missing, None if damaged."""
    try:
        record = json.loads(pair.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def new_record(record: dict[str, Any], row: dict[str, Any], order: Iterable[str], scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A pair's record with the captions of its row. `caption` stays unless it is empty.

    An older caption of the same register, unless it is the source text itself, moves to `earlier_captions`.
    """
    caption = record["caption"] if isinstance(record.get("caption"), str) else ""
    captions, sources = (dict(record[name]) if isinstance(record.get(name), dict) else {} for name in ("captions", "caption_sources"))
    earlier = list(record["earlier_captions"]) if isinstance(record.get("earlier_captions"), list) else []
    new = [name for name in order if name in row["captions"]]
    for name in new:
        source = dict(row["captions"][name])
        text, before = source.pop("text"), captions.get(name)
        if before and before != text and (before != caption or name in sources):
            earlier.append({"register": name, "text": before, "source": sources.get(name)})
        captions[name], sources[name] = text, {**source, "scores": scores.get(name, {})}
    record = {**record, "captions": captions, "caption_sources": sources}
    if earlier:
        record["earlier_captions"] = earlier
    record.pop("caption_failures", None)
    if row["failures"]:
        record["caption_failures"] = row["failures"]
    if not caption.strip() and new:
        first = "plain" if "plain" in new else new[0]
        record["caption"] = captions[first]
        record["caption_source"] = {"register": first, "source": sources[first]["source"], "model": sources[first]["model"]}
    return record


def with_captions(shard: Path, rows: Rows, order: Iterable[str], scores: Scores, left_out: set[int]) -> Iterator[Pair]:
    """The pairs of a shard with their new records; rows without a result and left-out rows are skipped."""
    for number, pair in enumerate(read_pairs(shard, [])):
        if number not in rows or number in left_out:
            continue
        record = read_record(pair)
        if record is not None:  # a damaged record stays unchanged
            tree = new_record(record, rows[number], order, scores.get(number, {}))
            pair.members["json"] = json.dumps(tree, ensure_ascii=False).encode("utf-8", "backslashreplace")
        yield pair


def write_shard(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs to a temporary tar and rename it. The same pairs give the same bytes on any machine at any time."""
    aside = path.with_name(path.name + ".partial")
    with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as tar:
        for pair in pairs:
            for extension, data in pair.members.items():
                info = tarfile.TarInfo(f"{pair.key}.{extension}")
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                tar.addfile(info, io.BytesIO(data))
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def publish_shard(folder: Folder, shard: Path, rows: Rows, order: tuple[str, ...], scores: Scores, left_out: set[int]) -> None:
    """Write a shard, unless it already exists with the same inputs."""
    made_of = [shard.stat().st_size, order, sorted(rows.items()), sorted(scores.items()), sorted(left_out)]
    stamp, path = sha256(json.dumps(made_of)), folder.stamp(shard)
    if (folder.out / shard.name).exists() and path.exists() and path.read_text() == stamp:
        return
    path.unlink(missing_ok=True)  # else, after a kill, the stamp could belong to another shard's contents
    write_shard(folder.out / shard.name, with_captions(shard, rows, order, scores, left_out))
    write_whole(path, stamp)


# ---------------------------------------------------------------------------------------------------------------------
# scores relative to the whole set


def texts_id(row: dict[str, Any]) -> str:
    """A short hash of a row's captions: scores of other captions do not count."""
    return sha256(json.dumps({name: entry["text"] for name, entry in row["captions"].items()}, sort_keys=True))[:16]


def is_scored(row: dict[str, Any], scored: Rows) -> bool:
    return scored.get(row["row"], {}).get("texts") == texts_id(row)


def percentiles(values: Iterable[float]) -> list[float]:
    """For each value, the percentage of all values below it (ties count half), with one decimal."""
    values = list(values)
    ordered = sorted(values)
    return [round(50 * (bisect_left(ordered, v) + bisect_right(ordered, v)) / len(ordered), 1) for v in values]


@dataclass
class Ranking:
    """The rank of each row's captions within the whole set, by shard name, and the rows left out because of it."""

    scores: dict[str, Scores] = field(default_factory=dict)
    left_out: dict[str, set[int]] = field(default_factory=dict)
    reasons: list[dict[str, Any]] = field(default_factory=list)  # of the rows left out


def rank_rows(folder: Folder, shards: Iterable[Path], rows_of: Callable[[Path], Rows], keep_best: float) -> Ranking:
    """Percentiles of all scores within their register, and the rows left out by the share `keep_best`.

    A row ranks by the mean percentile of its captions. Rows without a score are left out as well.
    """
    result = Ranking()
    keys: dict[tuple[str, int], str] = {}  # of all rows, by shard name and number
    values: dict[str, list[tuple[str, int, float]]] = {}  # register -> (shard name, row, score)
    for shard in shards:
        scored = read_journal(folder.scores(shard))[1]
        for number, row in rows_of(shard).items():
            keys[shard.name, number] = row["key"]
            for register, value in scored[number]["scores"].items() if is_scored(row, scored) else ():
                values.setdefault(register, []).append((shard.name, number, value))
    ranks: dict[tuple[str, int], list[float]] = {}
    for register, entries in values.items():
        for (name, number, value), percentile in zip(entries, percentiles(value for _, _, value in entries)):
            result.scores.setdefault(name, {}).setdefault(number, {})[register] = {"clip": value, "clip_percentile": percentile}
            ranks.setdefault((name, number), []).append(percentile)
    if keep_best < 1:
        leave_out_worst(result, keys, {place: round(sum(each) / len(each), 3) for place, each in ranks.items()}, keep_best)
    return result


def leave_out_worst(result: Ranking, keys: dict[tuple[str, int], str], means: dict[tuple[str, int], float], keep_best: float) -> None:
    best = set(sorted(means, key=lambda place: (-means[place], place))[: math.ceil(keep_best * len(means))])
    for place, key in keys.items():
        if place not in best:
            mean = means.get(place)
            reason = "no score" if mean is None else f"not among the best {keep_best:.2%}"
            result.left_out.setdefault(place[0], set()).add(place[1])
            result.reasons.append({"shard": place[0], "key": key, "reason": reason, "clip_percentile": mean})


# ---------------------------------------------------------------------------------------------------------------------
# the end


def outcome(row: dict[str, Any]) -> str:
    """A row's outcome in a few words: captioned, or why a register is missing."""
    return "captioned" if not row["failures"] else next(iter(row["failures"].values()))


SOURCES = ("model", "endpoint", "rewriter", "template")  # of a caption


@dataclass
class Report:
    """The result of the whole run, from the journals alone."""

    rows: int = 0
    captions: int = 0  # in all registers
    outcomes: Counter[str] = field(default_factory=Counter)
    registers: dict[str, Counter[str]] = field(default_factory=dict)  # register -> {source or reason: rows}
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # of prompts, of answers
    cost: float = 0.0
    left_out: int = 0
    damaged: list[str] = field(default_factory=list)
    texts: dict[str, set[str]] = field(default_factory=dict)
    """Register -> hashes of its distinct captions, at most `MOST_TEXTS`."""

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.captions += len(row["captions"])
        self.outcomes[outcome(row)] += 1
        self.tokens = [total + more for total, more in zip(self.tokens, row.get("tokens", (0, 0)))]
        results = {**row["failures"], **{name: entry["source"] for name, entry in row["captions"].items()}}
        for register, result in results.items():
            self.registers.setdefault(register, Counter())[result] += 1
        for register, entry in row["captions"].items():
            if len(texts := self.texts.setdefault(register, set())) < MOST_TEXTS:
                texts.add(sha256(entry["text"])[:16])

    def doubts(self) -> list[str]:
        """Warnings about captions that are useless for training, as sentences: too few, only templates, nearly all alike."""
        told = []
        for name, written in self.written().items():
            if 2 * written < self.rows:
                told.append(
                    f"Only {written:,} of {self.rows:,} pictures have a {name} caption. Retry the rest with --retry-failed, or use another captioner."
                )
            if self.registers[name]["template"] == written:
                told.append(
                    f"All {written:,} {name} captions are templates filled with metadata, written without looking at the pictures. Give a captioner: --model or --endpoint."
                )
            if same := self.alike(name, written):
                told.append(f"{name}: {same}")
        return told

    def written(self) -> dict[str, int]:
        """Register -> number of its captions, sorted by name; registers without captions are left out."""
        counts = {name: sum(results[source] for source in SOURCES) for name, results in sorted(self.registers.items())}
        return {name: count for name, count in counts.items() if count}

    def alike(self, register: str, written: int) -> str:
        return alike({"kept": written, "distinct": len(self.texts[register])})

    def is_useless(self) -> bool:
        """Whether, in every register, the captions are templates and nearly all alike."""
        written = self.written()
        return bool(written) and all(
            self.registers[name]["template"] == count and self.alike(name, count) for name, count in written.items()
        )

    def as_json(self) -> dict[str, Any]:
        registers = {name: ordered(self.registers[name]) for name in sorted(self.registers)}
        tree = asdict(self) | {"distinct": {name: len(texts) for name, texts in sorted(self.texts.items())}}
        del tree["texts"]
        return {**tree, "outcomes": ordered(self.outcomes), "registers": registers}

    def table(self) -> str:
        lines = [f"{'rows':<40} {self.rows:>9,}"]
        lines += [f"  {reason:<38} {count:>9,} {count / self.rows:>7.1%}" for reason, count in ordered(self.outcomes).items()]
        for name, counts in sorted(self.registers.items()):
            lines.append(f"{name:<12} " + " · ".join(f"{result} {count:,}" for result, count in ordered(counts).items()))
        if any(self.tokens):
            price = f", cost {self.cost:,.4f}" if self.cost else ""
            lines.append(f"tokens       {self.tokens[0]:,} in prompts, {self.tokens[1]:,} in answers{price}")
        if self.left_out:
            lines.append(f"left out     {self.left_out:,} rows, each with its reason in {LEFT_OUT}")
        return "\n".join([*lines, *(f"damaged      {what}" for what in self.damaged)])


def ordered(counts: Counter[str]) -> dict[str, int]:
    """The counts, the most frequent first, ties by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def finish(
    folder: Folder, limits: dict[Path, int], settings: dict[str, Any], *,
    attempt: int, clip: str, keep_best: float, prices: tuple[float, float],
) -> Report | None:  # fmt: skip
    """Write all shards from their journals, and the record; None while other processes are still working.

    `limits`: shard -> number of its rows. `clip`: the scoring model, "" if none. `prices`: per million tokens.
    """

    def rows_of(shard: Path) -> Rows | None:
        return done_rows(folder, shard, limit=limits[shard], attempt=attempt, clip=bool(clip))

    def done(shard: Path) -> Rows:
        rows = rows_of(shard)
        assert rows is not None, f"{shard} was done a moment ago"
        return rows

    with folder.locked():
        if any(rows_of(shard) is None for shard in limits):
            return None
        stand = rank_rows(folder, limits, done, keep_best) if clip else Ranking()
        report, left = Report(left_out=len(stand.reasons)), {}
        for shard in limits:  # keeps only one shard's rows in memory
            rows, left_out = done(shard), stand.left_out.get(shard.name, set())
            publish_shard(folder, shard, rows, tuple(settings["registers"]), stand.scores.get(shard.name, {}), left_out)
            for row in rows.values():
                report.add(row)
            report.damaged += read_journal(folder.journal(shard))[0].get("damaged", [])
            left[shard.name] = len(rows) - len(left_out)
        report.cost = sum(count * price for count, price in zip(report.tokens, prices)) / 1e6
        write_end(folder, stand.reasons, {"settings": settings, "clip": clip, **report.as_json(), "shards": left})
    return report


def write_end(folder: Folder, reasons: list[dict[str, Any]], record: dict[str, Any]) -> None:
    if reasons:
        write_whole(folder.out / LEFT_OUT, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in reasons))
    else:
        (folder.out / LEFT_OUT).unlink(missing_ok=True)
    write_whole(folder.out / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    (folder.out / STATE / "retry").unlink(missing_ok=True)

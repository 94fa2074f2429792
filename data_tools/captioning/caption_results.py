"""The end of `caption`: once every row is done, the counts of what became of them, and the shards.

    OUT/caption.json                  the settings and the counts
    OUT/left-out.jsonl                the rows that --keep-best left out

From the journals alone (journals.py), so a run that was killed ends with the same files as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.captioning.captioned_shards import publish_shard
from data_tools.captioning.journals import STATE, Folder, JournalRows, done_rows, read_journal
from data_tools.captioning.ranking import Ranking, rank_rows
from tokun.data.captions import Texts, alike
from tokun.utils.files import write_text

RECORD = "caption.json"
LEFT_OUT = "left-out.jsonl"


def outcome(row: dict[str, Any]) -> str:
    """A row's outcome in a few words: captioned, or why a register is missing."""
    return "captioned" if not row["failures"] else next(iter(row["failures"].values()))


SOURCES = ("model", "endpoint", "rewriter", "template")  # of a caption


@dataclass
class CaptionReport:
    """The result of the whole run, computed from the journals alone."""

    rows: int = 0
    captions: int = 0  # in all registers
    outcomes: Counter[str] = field(default_factory=Counter)
    registers: dict[str, Counter[str]] = field(default_factory=dict)  # register -> {source or reason: rows}
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # of prompts, of answers
    cost: float = 0.0
    left_out: int = 0
    damaged: list[str] = field(default_factory=list)
    texts: dict[str, Texts] = field(default_factory=dict)
    """Of each register."""

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.captions += len(row["captions"])
        self.outcomes[outcome(row)] += 1
        self.tokens = [total + more for total, more in zip(self.tokens, row.get("tokens", (0, 0)))]
        results = {**row["failures"], **{name: entry["source"] for name, entry in row["captions"].items()}}
        for register, result in results.items():
            self.registers.setdefault(register, Counter())[result] += 1
        for register, entry in row["captions"].items():
            self.texts.setdefault(register, Texts()).add(entry["text"])

    def doubts(self) -> list[str]:
        """Warnings about captions that are useless for training, as sentences: too few, only templates, nearly all alike."""
        doubts = []
        for name, written in self.written().items():
            if 2 * written < self.rows:
                doubts.append(
                    f"Only {written:,} of {self.rows:,} pictures have a {name} caption. "
                    "Retry the rest with --retry-failed, or use another captioner."
                )
            if self.registers[name]["template"] == written:
                doubts.append(
                    f"All {written:,} {name} captions are templates filled with metadata, written without looking at the pictures. "
                    "Give a captioner: --model or --endpoint."
                )
            if same := self.alike(name, written):
                doubts.append(f"{name}: {same}")
        return doubts

    def written(self) -> dict[str, int]:
        """Register -> number of its captions, sorted by name; registers without captions are left out."""
        counts = {name: sum(results[source] for source in SOURCES) for name, results in sorted(self.registers.items())}
        return {name: count for name, count in counts.items() if count}

    def alike(self, register: str, written: int) -> str:
        return alike({"kept": written, **self.texts[register].counts()})

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
) -> CaptionReport | None:  # fmt: skip
    """Write all shards from their journals, and the record; None while other processes are still working.

    `limits`: shard -> number of its rows. `clip`: the scoring model, "" if none. `prices`: per million tokens.
    """

    def rows_of(shard: Path) -> JournalRows | None:
        return done_rows(folder, shard, limit=limits[shard], attempt=attempt, clip=bool(clip))

    def done(shard: Path) -> JournalRows:
        rows = rows_of(shard)
        assert rows is not None, f"{shard} was done a moment ago"
        return rows

    with folder.locked():
        if any(rows_of(shard) is None for shard in limits):
            return None
        ranking = rank_rows(folder, limits, done, keep_best) if clip else Ranking()
        report, left = CaptionReport(left_out=len(ranking.reasons)), {}
        for shard in limits:  # keeps only one shard's rows in memory
            rows, left_out = done(shard), ranking.left_out.get(shard.name, set())
            publish_shard(folder, shard, rows, tuple(settings["registers"]), ranking.scores.get(shard.name, {}), left_out)
            for row in rows.values():
                report.add(row)
            report.damaged += read_journal(folder.journal(shard))[0].get("damaged", [])
            left[shard.name] = len(rows) - len(left_out)
        report.cost = sum(count * price for count, price in zip(report.tokens, prices)) / 1e6
        write_end(folder.out, ranking.reasons, {"settings": settings, "clip": clip, **report.as_json(), "shards": left})
        (folder.out / STATE / "retry").unlink(missing_ok=True)
    return report


def write_end(out: Path, left_out: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Write the record, and what was left out, if anything was."""
    if left_out:
        write_text(out / LEFT_OUT, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in left_out))
    else:
        (out / LEFT_OUT).unlink(missing_ok=True)
    write_text(out / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

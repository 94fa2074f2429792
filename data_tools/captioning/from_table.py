"""From a table: merges captions that people wrote into image shards. Implements `data_tools.caption --from`.

    tokun caption shards/ --from captions.tsv --out described/
    tokun caption engravings/ plates/ --from descriptions.tsv --out described/ --seed 0

A row names its picture by `key` (plus `folder`, the name of the shards' folder, if several hold the same keys) or by path
(`file_name`, `path` …, as recorded by `prepare` or as in the shard). Columns are registers: the caption column is `plain`; `poetic`,
`social`, `era`, `alt` keep their names. `kind` (or `subject`) becomes the subject, `thing` the thing; rows with `use` 0 are left
out. If a cell holds a list of texts, the first is the caption, and all are kept in `captions_all`. A column `captions` may hold them by
register: {"plain": "…", "era": "…"}. Rules fill in what the table lacks: `alt` from technique and description, `thing` from the
description (text/main_noun.py, English), `era` from the earlier caption, if it differs and is in no register yet. The pictures' bytes do
not change.

Shards of one folder keep their names and order; those of several are shuffled together within each split (train-*, val-*) and written
as new shards. Each shard is written to a temporary file and renamed, with a stamp (hash) of its inputs: the same command resumes a
killed run and ends with the same bytes. Rows without a picture and pictures without a row are counted and listed in left-out.jsonl.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.captioning.caption_results import LEFT_OUT, ordered, write_end
from data_tools.captioning.captioned_shards import read_record, write_unless_same
from data_tools.captioning.described_rows import DescribedRows, Options, described_record
from data_tools.captioning.journals import STATE, Folder
from data_tools.captioning.merge_plan import MergePlan, make_plan, sources
from data_tools.readers.stored_pairs import StoredPair
from data_tools.readers.table_files import TableError
from tokun.data.captions import alike
from tokun.utils.errors import UserError, reading
from tokun.utils.files import write_text
from tokun.utils.lock import alone_in

LAYOUT, NESTED = 2, 3  # version of the output, part of the stamp: of a table of texts, and of one that holds lists or other values, too
NAMED = 3  # left-out items named in the report; left-out.jsonl lists all


@dataclass
class MergeReport:
    """The result."""

    table: str
    rows: int
    pictures: int
    written: int = 0
    shards: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    subjects: int = 0
    things: int = 0
    with_thing: int = 0
    read_as: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)
    several: int = 0
    no_text: dict[str, int] = field(default_factory=dict)
    first_no_text: dict[str, str] = field(default_factory=dict)
    alike: str = ""
    damaged: list[str] = field(default_factory=list)
    named: dict[str, list[str]] = field(default_factory=dict)

    def text(self, out: Path) -> str:
        columns = ", ".join(f"{register} from {column}" for register, column in self.columns.items())
        lines = [
            f"{'table':<12} {self.table}: {self.rows:,} rows, {self.read_as}; {columns}",
            f"{'pictures':<12} {self.pictures:,}, {self.written:,} of them written to {len(self.shards):,} shards",
            f"{'registers':<12} " + " · ".join(f"{name} {count:,}" for name, count in self.registers.items()),
            f"{'tags':<12} {self.subjects:,} subjects · {self.things:,} things, on {self.with_thing:,} pictures",
        ]
        if self.unused_columns:
            lines.append(f"{'no captions':<12} columns {', '.join(self.unused_columns)}: what prepare took from them stays")
        if self.several:
            rows = "row holds several texts in a cell" if self.several == 1 else "rows hold several texts in a cell"
            lines.append(
                f"{'several':<12} {self.several:,} {rows}: the first is the caption; all are kept in captions_all, and not trained on"
            )
        for column, count in self.no_text.items():
            lines.append(f"{'no text':<12} {count:,} × in column {column}, the first in {self.first_no_text[column]}: not read")
        for reason, count in self.left_out.items():
            some = ", ".join(self.named[reason]) + (" …" if count > len(self.named[reason]) else "")
            lines.append(f"{'left out':<12} {count:,} × {reason}: {some}")
        if self.left_out:
            lines.append(f"{'':<12} all are listed in {out / LEFT_OUT}")
        if self.alike:
            lines.append(f"{'WARNING':<12} {self.alike}")
        return "\n".join([*lines, *(f"{'damaged':<12} {what}" for what in self.damaged)])


def merge(paths: Iterable[str | Path], table: Path, out: Path, options: Options, *, progress: bool = False) -> MergeReport:
    """Write the shards of `paths` with the captions of `table` into `out`.

    Raises TableError, UserError or FileNotFoundError, with the way out: the table or a shard cannot be read, `out` holds something
    else, or no row belongs to a picture.
    """
    shards = sources(paths, out)
    rows = DescribedRows.read(table, options)
    folder = Folder(out)
    folder.check([], {})
    with alone_in(out, option="--out"):
        plan = make_plan(shards, rows, options, progress=progress)
        if not any(plan.row):
            raise TableError(no_match_reason(rows, plan))
        (out / STATE).mkdir(exist_ok=True)
        begin(out, shards, rows, options)
        report = report_of(plan, rows)
        write_all(folder, plan, rows, options, report, progress=progress)
        inputs = {"from": {"table": report.table, "sha256": rows.fingerprint}, "settings": asdict(options)}
        write_end(out, plan.left_out, {**inputs, **asdict(report)})
    return report


def report_of(plan: MergePlan, rows: DescribedRows) -> MergeReport:
    report = MergeReport(
        Path(rows.table.name).name,
        len(rows.table),
        plan.pictures,
        len(plan.key),
        read_as=rows.table.how,
        columns={**rows.columns.texts, **rows.sources},
        unused_columns=[name for name in rows.columns.unused if name not in rows.sources.values()],
        several=rows.several,
        no_text=dict(rows.odd),
        first_no_text=rows.first_odd,
        damaged=plan.damaged,
        things=len({one.thing for one in plan.facts} - {""}),
        with_thing=sum(bool(one.thing) for one in plan.facts),
        subjects=len({one.subject for one in plan.facts} - {""}),
    )
    report.registers = ordered(Counter(name for one in plan.facts for name in one.registers))
    for one in plan.left_out:
        report.left_out[one["reason"]] = report.left_out.get(one["reason"], 0) + 1
        names = report.named.setdefault(one["reason"], [])
        if len(names) < NAMED:
            names.append(f"line {one['line']} ({one['row']})" if "line" in one else one["key"])
    described = [one for one in plan.facts if "plain" in one.registers]
    times, labels = Counter(one.plain for one in described), sum(one.label for one in described)
    report.alike = alike({"kept": len(described), "distinct": len(times), "most": max(times.values(), default=0), "labels": labels})
    return report


def no_match_reason(rows: DescribedRows, plan: MergePlan) -> str:
    row = next(iter(rows.by_id.values()), None)
    if row is None:
        return f"{rows.table.name} has a header but no rows"
    reasons = Counter(one["reason"] for one in plan.left_out)
    if plan.named:
        return f"{rows.table.name}: no picture is left ({', '.join(f'{count:,} × {reason}' for reason, count in reasons.items())})"
    first = next((one for one in plan.left_out if "key" in one), {"shard": plan.shards[0].name, "key": ""})
    what = rows.columns.keys or rows.columns.paths
    return (
        f"{rows.table.name}: no row belongs to a picture. Its {what} is like {row.where!r} (line {row.line}), "
        f"and the first picture of {first['shard']} has the key {first['key']!r}: "
        f"write into {what} the file names that prepare was given (its manifest lists them), or the keys"
    )


def begin(out: Path, shards: list[Path], rows: DescribedRows, options: Options) -> None:
    """Record what this folder is made from. Raises UserError if it was made from something else."""
    state = out / STATE / "from.json"
    settings = {
        "layout": layout(rows), "table": Path(rows.table.name).name, "sha256": rows.fingerprint, **asdict(options),
        "shards": [[shard.resolve().parent.name, shard.name, shard.stat().st_size] for shard in shards],
    }  # fmt: skip
    if state.exists():
        with reading(state, f"Delete {out} to start over"):
            found = json.loads(state.read_text(encoding="utf-8"))
        changed = [name for name in settings if found.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"--out {out} was started with other inputs ({', '.join(changed)} differ). "
                "Give the same to resume, name another --out, or delete it"
            )
    else:
        write_text(state, json.dumps(settings, indent=1) + "\n")


def layout(rows: DescribedRows) -> int:
    return NESTED if rows.nested else LAYOUT


def write_all(folder: Folder, plan: MergePlan, rows: DescribedRows, options: Options, report: MergeReport, *, progress: bool) -> None:
    """Write every shard that does not already exist with the same inputs, and count the contents of all."""
    prefixed = plan.several and len(set(plan.key)) < len(plan.key)

    def pairs(numbers: list[int], bar: Any) -> Iterator[StoredPair]:
        for number in numbers:
            pair, where = plan.pair(number), plan.row[number]
            record = read_record(pair) or {}
            if where:
                record = described_record(record, rows.by_id[where], rows)
            name = plan.folders[plan.shard[number]]
            if plan.several:
                record["folder"] = name
            if prefixed:
                record["folder_key"], pair.key = pair.key, f"{re.sub('[^A-Za-z0-9_-]', '_', name)}-{pair.key}"
            pair.members["json"] = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
            bar.update()
            yield pair

    with tqdm(total=len(plan.key), desc="writing", unit="picture", disable=not progress) as bar:
        for name, numbers in plan.outputs(options):
            members = [[plan.folders[plan.shard[n]], plan.key[n], plan.places[n][1].hex()] for n in numbers]
            made_of = [layout(rows), rows.fingerprint, asdict(options), prefixed, members]
            if not write_unless_same(folder, name, made_of, pairs(numbers, bar)):
                bar.update(len(numbers))
            report.shards[name] = len(numbers)

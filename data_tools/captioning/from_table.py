"""From a table: merges captions that people wrote into image shards. Implements `data_tools.caption --from`.

    tokun caption shards/ --from captions.tsv --out described/
    tokun caption engravings/ plates/ --from descriptions.tsv --out described/ --seed 0

A row names its picture by `key` (plus `folder`, the name of the shards' folder, if several hold the same keys) or by path
(`file_name`, `path` …, as recorded by `prepare` or as in the shard). Columns are registers: the caption column is `plain`; `poetic`,
`social`, `era`, `alt` keep their names. `kind` (or `subject`) becomes the subject, `thing` the thing; rows with `use` 0 are left
out. Rules fill in what the table lacks: `alt` from technique and description, `thing` from the description (text/main_noun.py,
English), `era` from the earlier caption, if it differs. The pictures' bytes do not change.

Shards of one folder keep their names and order; those of several are shuffled together within each split (train-*, val-*) and written
as new shards. Each shard is written to a temporary file and renamed, with a stamp (hash) of its inputs: the same command resumes a
killed run and ends with the same bytes. Rows without a picture and pictures without a row are counted and listed in left-out.jsonl.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.captioning import registers
from data_tools.captioning.caption_results import (
    LEFT_OUT,
    RECORD,
    STATE,
    Folder,
    new_record,
    read_record,
    require_image_shards,
    sha256,
    write_shard,
    write_whole,
)
from data_tools.inspect import IMAGE_EXTENSIONS, Pair, find_shards, read_pairs
from data_tools.pipeline.disk import DiskDict
from data_tools.tables import CAPTION_COLUMNS, PATH_COLUMNS, Table, TableError, caption_column, read_table
from data_tools.text.main_noun import Lexicon
from tokun.data.captions import alike
from tokun.data.shards import key_and_suffix
from tokun.utils.errors import UserError, reading
from tokun.utils.lock import alone_in

LAYOUT = 1  # version of the output, part of the stamp
KEY_COLUMNS = ("key", "__key__")
KINDS = ("kind", "subject")
NO = frozenset({"0", "0.0", "false", "no"})
PATHS_IN_RECORD = ("path", "source_file", "file_name")
NAMED = 3  # left-out items named in the report; left-out.jsonl lists all


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings that decide the output, beside the table and the shards."""

    caption_column: str = ""
    """The column of the plain caption; "": the first known column."""
    encoding: str = "utf-8"
    quoting: str = "auto"
    seed: int = 0
    """Seed of the order in which several folders are mixed."""
    shard_size: int = 1000
    """Pictures per shard when several folders are mixed."""
    min_things: int = 20
    """Fewest pictures for a thing to be kept."""
    keep_undescribed: bool = False
    """Keep pictures without a row, unchanged."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "min_things"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more")


# ---------------------------------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Columns:
    """The role of each column."""

    texts: dict[str, str]
    """register -> its column"""
    keys: str
    """The column with the picture's key; "" if paths name the pictures."""
    paths: str
    folder: str
    kind: str
    thing: str
    unused: tuple[str, ...]

    @classmethod
    def of(cls, table: Table, wanted: str) -> Columns:
        """Raises TableError if no column names pictures, or none holds captions."""

        def first(names: Iterable[str]) -> str:
            return next((name for name in names if name in table.columns), "")

        texts = {name: name for name in registers.REGISTERS if name in table.columns}
        if wanted or not texts or ("plain" not in texts and first(CAPTION_COLUMNS)):
            texts["plain"] = caption_column(table, wanted)
        keys, paths = first(KEY_COLUMNS), first(PATH_COLUMNS)
        if not keys and not paths:
            raise TableError(
                f"{table.name} names no pictures: its columns are {', '.join(table.columns)}. Add a column key (the member's key in the shard), "
                f"or a column of paths ({', '.join(PATH_COLUMNS[:4])} …)"
            )
        known = {*texts.values(), keys or paths, "use", first(["folder"]), first(KINDS), first(["thing"])}
        order = ("plain", *registers.REGISTERS)
        return cls(
            {name: texts[name] for name in dict.fromkeys(order) if name in texts}, keys, "" if keys else paths, first(["folder"]) if keys else "",
            first(KINDS), first(["thing"]), tuple(name for name in table.columns if name not in known),
        )  # fmt: skip


@dataclass(frozen=True)
class Described:
    """What one row says about its picture."""

    line: int
    use: bool
    texts: dict[str, str]
    kind: str
    thing: str
    where: str
    """Folder and key, or path, as in the row."""


@dataclass
class Rows:
    """A table's rows by the picture they name, and the lexicon learnt from all of them."""

    table: Table
    columns: Columns
    fingerprint: str
    """SHA-256 of the file, in hexadecimal."""
    by_id: DiskDict = field(default_factory=DiskDict)  # key, folder/key or path -> Described
    by_name: DiskDict = field(default_factory=DiskDict)  # last part of a path -> [paths]
    lexicon: Lexicon = field(default_factory=lambda: Lexicon(Counter(), Counter(), Counter()))
    things: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path, options: Options) -> Rows:
        """Raises TableError if the table cannot be read, or two rows name the same picture."""
        table = read_table(path, encoding=options.encoding, quoting=options.quoting)
        columns = Columns.of(table, options.caption_column)
        rows = cls(table, columns, hashlib.sha256(path.read_bytes()).hexdigest())
        for row in table:
            rows.add(row.line, row.values)
        rows.lexicon = Lexicon.learn(plain for one in rows.by_id.values() if (plain := one.texts.get("plain")))
        found = Counter(rows.thing_of(one) for one in rows.by_id.values() if one.use)
        rows.things = frozenset(thing for thing, count in found.items() if thing and (columns.thing or count >= options.min_things))
        return rows

    def add(self, line: int, values: dict[str, Any]) -> None:
        c = self.columns
        name = values[c.keys or c.paths]
        if name is None:
            raise TableError(
                f"{self.table.name}, line {line}: {c.keys or c.paths} is empty, so the picture is unknown. Fill it in, or remove the row"
            )
        name = str(name) if c.keys else clean_path(str(name))
        where = f"{values[c.folder]}/{name}" if c.folder and values[c.folder] is not None else name
        if before := self.by_id.get(where):
            raise TableError(
                f"{self.table.name}, lines {before.line} and {line} are both about {where}: keep one row per picture, with a column for each register"
            )
        texts = {register: " ".join(str(values[column]).split()) for register, column in c.texts.items() if values[column] is not None}
        use = str(values.get("use", 1)).strip().lower() not in NO
        kind, thing = (str(values[column]).strip() if column and values[column] is not None else "" for column in (c.kind, c.thing))
        self.by_id[where] = Described(line, use, texts, kind, thing, where)
        if c.paths:
            last = where.rpartition("/")[2]
            self.by_name[last] = [*self.by_name.get(last, []), where]

    def thing_of(self, row: Described) -> str:
        return row.thing or (self.lexicon.thing(row.texts["plain"]) if "plain" in row.texts else "")

    def find(self, folder: str, pair: Pair) -> Described | None:
        """The row of a picture. Raises TableError if two rows may apply."""
        if self.columns.keys:
            return self.by_id.get(f"{folder}/{pair.key}" if self.columns.folder else pair.key) or (
                self.by_id.get(pair.key) if self.columns.folder else None
            )
        record = read_record(pair) or {}
        own = [clean_path(record[name]) for name in PATHS_IN_RECORD if isinstance(record.get(name), str)]
        own += [f"{pair.key}.{name}" for name in IMAGE_EXTENSIONS if name in pair.members]
        for path in own:
            if row := self.by_id.get(path):
                return row
        close = sorted({row for path in own for row in self.by_name.get(path.rpartition("/")[2], []) if same_ending(row, path)})
        if len(close) > 1:
            raise TableError(
                f"{self.table.name}: rows {' and '.join(close[:2])} may both be about {own[0]}. Give paths as in the shards' JSON"
            )
        return self.by_id[close[0]] if close else None


def clean_path(path: str) -> str:
    return re.sub(r"^(?:\./)+", "", re.sub(r"/+", "/", path.strip().replace("\\", "/")))


def same_ending(one: str, other: str) -> bool:
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


# ---------------------------------------------------------------------------------------------------------------------
# the plan: which pair goes into which shard


@dataclass(frozen=True)
class Counted:
    """The facts about one new record that the report counts."""

    registers: tuple[str, ...] = ()
    subject: str = ""
    thing: str = ""
    plain: int = 0
    """A hash of the plain caption, within this process."""


@dataclass
class Plan:
    """Every source pair, in a few arrays, and where it goes."""

    shards: list[Path]
    shard: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    row: list[str] = field(default_factory=list)  # the row's name for the picture, "" without a row
    told: list[Counted] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # name of each shard's folder
    named: dict[str, int] = field(default_factory=dict)  # rows with a picture -> the shard of the first
    pictures: int = 0

    @property
    def several(self) -> bool:
        return len({shard.parent for shard in self.shards}) > 1

    def outputs(self, options: Options) -> Iterator[tuple[str, list[int]]]:
        """(name of a new shard, numbers of its pairs in order) of each shard."""
        of_shard: dict[int, list[int]] = {}
        for number, shard in enumerate(self.shard):
            of_shard.setdefault(shard, []).append(number)
        if not self.several:
            yield from ((self.shards[shard].name, numbers) for shard, numbers in of_shard.items())
            return
        splits: dict[str, list[int]] = {}
        for shard, numbers in of_shard.items():
            splits.setdefault(split_of(self.shards[shard]), []).extend(numbers)
        for split, numbers in splits.items():
            seed = [options.seed, int(sha256(split)[:8], 16)]
            mixed = [numbers[i] for i in np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).permutation(len(numbers))]
            for part, start in enumerate(range(0, len(mixed), options.shard_size)):
                yield f"{split}-{part:05d}.tar", mixed[start : start + options.shard_size]

    def pair(self, number: int) -> Pair:
        """A pair, read from its source shard."""
        shard = self.shards[self.shard[number]]
        with open(shard, "rb") as file:
            file.seek(self.start[number])
            data = file.read(self.end[number] - self.start[number])
        found = list(read_pairs_in(shard, data))
        if len(found) != 1 or found[0].key != self.key[number]:
            raise UserError(f"{shard} changed while it was being read: run again")
        return found[0]


def read_pairs_in(shard: Path, data: bytes) -> Iterator[Pair]:
    """The pairs in a part of a tar file."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        pair: Pair | None = None
        for info in tar:
            if info.isfile():
                key, extension = key_and_suffix(info.name)
                pair = pair or Pair(shard, key)
                pair.members[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
        if pair is not None:
            yield pair


def split_of(shard: Path) -> str:
    """train-00003.tar -> train"""
    return re.sub(r"[-_.]?\d+$", "", shard.stem) or "shard"


def sources(paths: Iterable[str | Path], out: Path) -> list[Path]:
    """The shards given by path, folder or pattern. Raises UserError or FileNotFoundError, with the way out."""
    found: list[Path] = []
    for path in map(Path, paths):
        path = path.expanduser()
        typed = sorted(map(Path, glob(str(path)))) if not path.exists() else []
        found += find_shards(typed or [path])
    require_image_shards(found, out)
    return list(dict.fromkeys(found))


def make_plan(shards: list[Path], rows: Rows, options: Options, *, progress: bool) -> Plan:
    """Find each pair's row. Raises TableError if a row is ambiguous."""
    plan = Plan(shards, folders=[shard.resolve().parent.name for shard in shards])
    parents = {shard.resolve().parent for shard in shards}
    if rows.columns.folder and len({parent.name for parent in parents}) < len(parents):
        raise UserError(
            f"two shard folders have the same name ({', '.join(sorted(plan.folders))}), so {rows.table.name} cannot tell them apart: rename one"
        )
    twice = Counter[tuple[str, str]]()
    for number, shard in enumerate(tqdm(shards, desc="matching", unit="shard", disable=not progress)):
        damaged: list[Any] = []
        for pair in read_pairs(shard, damaged):
            plan.pictures += 1
            _match(plan, number, pair, rows, options)
            twice[str(shard.parent), pair.key] += 1
        plan.damaged += map(str, damaged)
    _refuse_twice(plan, {place for place, count in twice.items() if count > 1})
    unmatched = [one for one in rows.by_id.values() if one.where not in plan.named]
    plan.left_out += [
        {"line": one.line, "row": one.where, "reason": "row without a picture"} for one in sorted(unmatched, key=lambda one: one.line)
    ]
    return plan


def _match(plan: Plan, number: int, pair: Pair, rows: Rows, options: Options) -> None:
    """Add one pair to the plan, or to what is left out, with the reason."""
    folder = plan.folders[number]
    found = rows.find(folder, pair)
    record = read_record(pair)
    if found is not None:
        first = plan.named.setdefault(found.where, number)
        if plan.shards[first].parent != plan.shards[number].parent:
            raise TableError(
                f"{rows.table.name}, line {found.line}: {found.where} is in {plan.folders[first]} and in {plan.folders[number]}. "
                "Add a column folder to the table, with the name of the shards' folder"
            )
    reason = ""
    if pair.image is None:
        reason = "no picture in the shard"
    elif record is None:
        reason = "damaged record"
    elif found is None:
        reason = "" if options.keep_undescribed else "picture without a row"
    elif not found.use:
        reason = "use 0"
    elif not found.texts:
        reason = "row without a caption"
    if reason:
        plan.left_out.append({"shard": f"{folder}/{plan.shards[number].name}", "key": pair.key, "reason": reason})
    else:
        plan.shard.append(number)
        plan.start.append(pair.start)
        plan.end.append(pair.end)
        plan.key.append(pair.key)
        plan.row.append(found.where if found else "")
        plan.told.append(count_facts(described_record(record or {}, found, rows)) if found else Counted())


def _refuse_twice(plan: Plan, twice: set[tuple[str, str]]) -> None:
    """Remove all pairs whose key occurs several times in one folder: it is unknown which of them a row is about."""
    keep = [n for n in range(len(plan.key)) if (str(plan.shards[plan.shard[n]].parent), plan.key[n]) not in twice]
    for n in sorted(set(range(len(plan.key))) - set(keep)):
        shard = plan.shard[n]
        plan.left_out.append(
            {"shard": f"{plan.folders[shard]}/{plan.shards[shard].name}", "key": plan.key[n], "reason": "key twice in one folder"}
        )
    for name in ("shard", "start", "end", "key", "row", "told"):
        values = getattr(plan, name)
        setattr(plan, name, [values[n] for n in keep])


# ---------------------------------------------------------------------------------------------------------------------
# the new records


def described_record(record: dict[str, Any], row: Described, rows: Rows) -> dict[str, Any]:
    """A pair's record with its row's values and what the rules derive from them.

    `caption` becomes the row's plain caption, if any. The earlier caption becomes register `era` or, if the row has an `era`, moves to
    `earlier_captions`. `caption_sources` states the origin of each: table, printed or rule.
    """
    table = {"source": "table", "model": "", "table": Path(rows.table.name).name, "sha256": rows.fingerprint[:16]}
    captions = {name: {"text": text, **table, "column": rows.columns.texts[name]} for name, text in row.texts.items()}
    printed = record["caption"].strip() if isinstance(record.get("caption"), str) else ""
    there = found if isinstance(found := record.get("captions"), dict) else {}
    plain = row.texts.get("plain", "")
    if plain and printed and printed != plain and "era" not in captions and not there.get("era") and printed != there.get("plain"):
        captions["era"] = {"text": printed, "source": "printed", "model": ""}
    technique = registers.facts_of(record).technique
    if plain and "alt" not in captions:
        captions["alt"] = {"text": alt_text(technique, plain, rows.lexicon), "source": "rule", "model": ""}
    tree = new_record(record, {"captions": captions, "failures": {}}, captions, {})
    if plain:
        if printed and printed != plain and printed not in tree["captions"].values():
            tree["earlier_captions"] = [*tree.get("earlier_captions", []), {"register": "caption", "text": printed, "source": None}]
        tree["caption"] = plain
        tree.pop("caption_source", None)
    if row.kind:
        tree["subject"] = row.kind
    if (thing := rows.thing_of(row)) in rows.things:
        tree["thing"] = thing
    return tree


def count_facts(record: dict[str, Any]) -> Counted:
    return Counted(tuple(record["captions"]), str(record.get("subject", "")), str(record.get("thing", "")), hash(record.get("caption", "")))


def alt_text(technique: str, description: str, lexicon: Lexicon) -> str:
    """ "wood engraving", "A moth." -> "Wood engraving: a moth." """
    if not technique:
        return description
    return f"{technique[0].upper()}{technique[1:]}: {lexicon.lowercase_start(description)}"


# ---------------------------------------------------------------------------------------------------------------------
# the whole run


@dataclass
class Report:
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
            lines.append(f"{'not read':<12} columns {', '.join(self.unused_columns)}")
        for reason, count in self.left_out.items():
            some = ", ".join(self.named[reason]) + (" …" if count > len(self.named[reason]) else "")
            lines.append(f"{'left out':<12} {count:,} × {reason}: {some}")
        if self.left_out:
            lines.append(f"{'':<12} all are listed in {out / LEFT_OUT}")
        if self.alike:
            lines.append(f"{'WARNING':<12} {self.alike}")
        return "\n".join([*lines, *(f"{'damaged':<12} {what}" for what in self.damaged)])


def merge(paths: Iterable[str | Path], table: Path, out: Path, options: Options, *, progress: bool = False) -> Report:
    """Write the shards of `paths` with the captions of `table` into `out`.

    Raises TableError, UserError or FileNotFoundError, with the way out: the table or a shard cannot be read, `out` holds something
    else, or no row belongs to a picture.
    """
    shards = sources(paths, out)
    rows = Rows.read(table, options)
    folder = Folder(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if not (out / STATE).exists() and any(out.glob("*.tar")):
        raise UserError(f"--out {out} holds shards that this tool did not write (there is no {STATE}): name another folder")
    with alone_in(out, option="--out"):
        plan = make_plan(shards, rows, options, progress=progress)
        if not any(plan.row):
            raise TableError(no_match_reason(rows, plan))
        (out / STATE).mkdir(exist_ok=True)
        begin(out, shards, rows, options)
        report = report_of(plan, rows)
        write_all(folder, plan, rows, options, report, progress=progress)
        write_end(out, plan, rows, options, report)
    return report


def report_of(plan: Plan, rows: Rows) -> Report:
    report = Report(
        Path(rows.table.name).name, len(rows.table), plan.pictures, len(plan.key), read_as=rows.table.how, columns=rows.columns.texts,
        unused_columns=list(rows.columns.unused), damaged=plan.damaged, things=len({one.thing for one in plan.told} - {""}),
        with_thing=sum(bool(one.thing) for one in plan.told), subjects=len({one.subject for one in plan.told} - {""}),
    )  # fmt: skip
    counted = Counter(name for one in plan.told for name in one.registers)
    report.registers = {name: counted[name] for name in sorted(counted, key=lambda name: (-counted[name], name))}
    for one in plan.left_out:
        report.left_out[one["reason"]] = report.left_out.get(one["reason"], 0) + 1
        names = report.named.setdefault(one["reason"], [])
        if len(names) < NAMED:
            names.append(f"line {one['line']} ({one['row']})" if "line" in one else one["key"])
    described = [one.plain for one in plan.told if "plain" in one.registers]
    report.alike = alike({"kept": len(described), "distinct": len(set(described))})
    return report


def no_match_reason(rows: Rows, plan: Plan) -> str:
    row = next(iter(rows.by_id.values()), None)
    if row is None:
        return f"{rows.table.name} has a header but no rows"
    reasons = Counter(one["reason"] for one in plan.left_out)
    if plan.named:
        return f"{rows.table.name}: no picture is left ({', '.join(f'{count:,} × {reason}' for reason, count in reasons.items())})"
    first = next((one for one in plan.left_out if "key" in one), {"shard": plan.shards[0].name, "key": ""})
    what = rows.columns.keys or rows.columns.paths
    return (
        f"{rows.table.name}: no row belongs to a picture. Its {what} is like {row.where!r} (line {row.line}), and the first picture of "
        f"{first['shard']} has the key {first['key']!r}: give the shards' keys, or the paths in their JSON"
    )


def begin(out: Path, shards: list[Path], rows: Rows, options: Options) -> None:
    """Record what this folder is made from. Raises UserError if it was made from something else."""
    state = out / STATE / "from.json"
    settings = {
        "layout": LAYOUT, "table": Path(rows.table.name).name, "sha256": rows.fingerprint, **asdict(options),
        "shards": [[shard.resolve().parent.name, shard.name, shard.stat().st_size] for shard in shards],
    }  # fmt: skip
    if state.exists():
        with reading(state, f"Delete {out} to start over"):
            found = json.loads(state.read_text(encoding="utf-8"))
        changed = [name for name in settings if found.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"--out {out} was started with other inputs ({', '.join(changed)} differ). Give the same to resume, name another --out, or delete it"
            )
    else:
        write_whole(state, json.dumps(settings, indent=1) + "\n")


def write_all(folder: Folder, plan: Plan, rows: Rows, options: Options, report: Report, *, progress: bool) -> None:
    """Write every shard that does not already exist with the same inputs, and count the contents of all."""
    prefixed = plan.several and len(set(plan.key)) < len(plan.key)

    def pairs(numbers: list[int], bar: Any) -> Iterator[Pair]:
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
            path, stamp_path = folder.out / name, folder.stamp(Path(name))
            members = [[plan.folders[plan.shard[n]], plan.key[n], plan.end[n] - plan.start[n]] for n in numbers]
            stamp = sha256(json.dumps([LAYOUT, rows.fingerprint, asdict(options), prefixed, members]))
            if path.exists() and stamp_path.exists() and stamp_path.read_text() == stamp:
                bar.update(len(numbers))
            else:
                stamp_path.unlink(missing_ok=True)  # else, after a kill, the stamp could belong to another shard's contents
                write_shard(path, pairs(numbers, bar))
                write_whole(stamp_path, stamp)
            report.shards[name] = len(numbers)


def write_end(out: Path, plan: Plan, rows: Rows, options: Options, report: Report) -> None:
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in plan.left_out)
    if lines:
        write_whole(out / LEFT_OUT, lines)
    else:
        (out / LEFT_OUT).unlink(missing_ok=True)
    tree = {"from": {"table": report.table, "sha256": rows.fingerprint}, "settings": asdict(options), **asdict(report)}
    write_whole(out / RECORD, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")

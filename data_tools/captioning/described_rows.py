"""Rows that people wrote: the table of `data_tools.caption --from`, the row of each picture, and the record that results from it."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.captioning import registers
from data_tools.captioning.captioned_shards import new_record, read_record
from data_tools.pipeline.disk import DiskDict
from data_tools.readers.files import PICTURE_SUFFIXES
from data_tools.readers.stored_pairs import StoredPair
from data_tools.readers.table_files import CAPTION_COLUMNS, PATH_COLUMNS, Table, TableError, caption_column, read_table
from data_tools.readers.words import kebab, listed_in, odd_caption, texts_in
from data_tools.text.main_noun import Lexicon
from tokun.data.captions import gist, is_label
from tokun.data.sample_record import plain_of
from tokun.data.shards import IMAGE_SUFFIXES
from tokun.utils.errors import require_positive

KEY_COLUMNS = ("key", "__key__")
OBJECTS = "captions"  # a column that may hold {register: text}, as in a pair's record
KINDS = ("kind", "subject")
NO = frozenset({"0", "0.0", "false", "no"})
PATHS_IN_RECORD = ("path", "source_file", "file_name")


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
        require_positive(self, "shard_size", "min_things")


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
                f"{table.name} names no pictures: its columns are {', '.join(table.columns)}. "
                f"Add a column key (the member's key in the shard), or a column of paths ({', '.join(PATH_COLUMNS[:4])} …)"
            )
        known = {*texts.values(), keys or paths, "use", first(["folder"]), first(KINDS), first(["thing"])}
        return cls(
            texts={name: texts[name] for name in registers.REGISTERS if name in texts},
            keys=keys,
            paths="" if keys else paths,
            folder=first(["folder"]) if keys else "",
            kind=first(KINDS),
            thing=first(["thing"]),
            unused=tuple(name for name in table.columns if name not in known),
        )


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
    columns: dict[str, str] = field(default_factory=dict)
    """register -> the column that its text is read from"""
    several: tuple[str, ...] = ()
    """All texts of cells that hold several; the first of each is in `texts`."""


@dataclass
class DescribedRows:
    """A table's rows by the picture they name, and the lexicon learnt from all of them."""

    table: Table
    columns: Columns
    fingerprint: str
    """SHA-256 of the file, in hexadecimal."""
    by_id: DiskDict = field(default_factory=DiskDict)  # key, folder/key or path -> Described
    by_name: DiskDict = field(default_factory=DiskDict)  # last part of a path -> [paths]
    lexicon: Lexicon = field(default_factory=lambda: Lexicon(Counter(), Counter(), Counter()))
    things: frozenset[str] = frozenset()
    sources: dict[str, str] = field(default_factory=dict)
    """register -> the column that it is read from"""
    odd: Counter[str] = field(default_factory=Counter)
    """Cells that are neither text nor a list of texts, by column."""
    first_odd: dict[str, str] = field(default_factory=dict)
    """The first of each column, with its line."""
    several: int = 0
    """Rows with several texts in one cell."""
    stems: dict[str, str] = field(default_factory=dict)
    """row -> the picture that it names without its suffix"""
    nested: bool = False
    """Whether any cell is more than text: a list, an object, a number with a point."""

    @classmethod
    def read(cls, path: Path, options: Options) -> DescribedRows:
        """The checked rows of the table at `path`.

        Raises TableError if it cannot be read, two rows name the same picture, or every row holds other values instead of texts.
        """
        table = read_table(path, encoding=options.encoding, quoting=options.quoting)
        columns = Columns.of(table, options.caption_column)
        rows = cls(table, columns, hashlib.sha256(path.read_bytes()).hexdigest())
        for row in table:
            rows.add(row.line, row.values)
        rows.refuse_without_text()
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
        if isinstance(name, (list, tuple, dict, bool)):
            raise TableError(
                f"{self.table.name}, line {line}: {c.keys or c.paths} is {name!r:.60}, which names no picture. "
                f"Write one {'key' if c.keys else 'path'} as text"
            )
        name = str(name) if c.keys else clean_path(str(name))
        where = f"{values[c.folder]}/{name}" if c.folder and values[c.folder] is not None else name
        if before := self.by_id.get(where):
            raise TableError(
                f"{self.table.name}, lines {before.line} and {line} are both about {where}: "
                "keep one row per picture, with a column for each register"
            )
        found = self.texts_of(line, values)
        columns = {register: column for register, (column, _) in found.items()}
        self.sources = {**columns, **self.sources}
        use = str(values.get("use", 1)).strip().lower() not in NO
        kind, thing = ("".join(self.cell(line, values, column)[:1]) if column else "" for column in (c.kind, c.thing))
        several = dict.fromkeys(text for _, texts in found.values() if len(texts) > 1 for text in texts)
        self.several += bool(several)
        texts = {register: texts[0] for register, (_, texts) in found.items()}
        self.by_id[where] = Described(line, use, texts, kind, thing, where, columns, tuple(several))
        if c.paths:
            last = where.rpartition("/")[2]
            self.by_name[last] = [*self.by_name.get(last, []), where]

    def texts_of(self, line: int, values: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
        """{register: (column, its texts)} of a row.

        A cell holds a text or a list of texts; the column `captions` may hold them by register.
        """
        found, inside = {}, values.get(OBJECTS)
        if isinstance(inside, dict):
            self.nested = True
            there = {kebab(str(name)): value for name, value in inside.items() if isinstance(value, (str, list))}
            found = {register: (OBJECTS, texts) for register, value in there.items() if (texts := list(dict.fromkeys(texts_in(value))))}
        for register, column in self.columns.texts.items():
            if not (column == OBJECTS and found) and (texts := self.cell(line, values, column)):
                found[register] = column, texts
        return found

    def cell(self, line: int, values: dict[str, Any], column: str) -> list[str]:
        """The texts of a cell. Counts a value that is neither text nor a list of texts."""
        value = values[column]
        texts = list(dict.fromkeys(texts_in(value)))
        self.nested |= value is not None and (
            not isinstance(value, (str, int)) or (isinstance(value, str) and listed_in(value) is not value)
        )
        if not texts and (odd := odd_caption(values, column)):
            self.nested = True
            self.odd[column] += 1
            self.first_odd.setdefault(column, f"line {line} ({odd})")
        return texts

    def refuse_without_text(self) -> None:
        if not self.odd or any(row.texts for row in self.by_id.values()):
            return
        first = ", ".join(f"{column} of {self.first_odd[column]}" for column in self.odd)
        raise TableError(
            f"{self.table.name} holds no text in {' and '.join(self.columns.texts.values())} of its {len(self.table):,} rows, "
            f"but other values: {first}. Write the texts into columns of their own, or name a column of text with --caption-column"
        )

    def thing_of(self, row: Described) -> str:
        return row.thing or (self.lexicon.thing(row.texts["plain"]) if "plain" in row.texts else "")

    def find(self, folder: str, pair: StoredPair) -> Described | None:
        """The row of a picture. Raises TableError if two rows may apply."""
        if self.columns.keys:
            return self.by_id.get(f"{folder}/{pair.key}" if self.columns.folder else pair.key) or (
                self.by_id.get(pair.key) if self.columns.folder else None
            )
        record = read_record(pair) or {}
        own = [clean_path(record[name]) for name in PATHS_IN_RECORD if isinstance(record.get(name), str)]
        own += [f"{pair.key}.{name}" for name in IMAGE_SUFFIXES if name in pair.members]
        for path in own:
            if row := self.by_id.get(path):
                return row
        close = sorted({row for path in own for row in self.by_name.get(path.rpartition("/")[2], []) if same_ending(row, path)})
        if len(close) > 1:
            raise TableError(
                f"{self.table.name}: rows {' and '.join(close[:2])} may both be about {own[0]}. Give paths as in the shards' JSON"
            )
        return self.by_id[close[0]] if close else self.by_stem(own, f"{folder}/{pair.key}")

    def by_stem(self, own: Iterable[str], picture: str) -> Described | None:
        """The row that names a picture without its suffix, by its path or the end of it.

        Raises TableError if another picture has that row.
        """
        stems = [stem for path in own for stem, suffix in [posixpath.splitext(path)] if suffix.lower() in PICTURE_SUFFIXES]
        close = {row for stem in stems for row in self.by_name.get(stem.rpartition("/")[2], []) if same_ending(row, stem)}
        row = self.by_id[close.pop()] if len(close) == 1 else None
        if row is not None and self.stems.setdefault(row.where, picture) != picture:
            raise TableError(
                f"{self.table.name}, line {row.line}: {row.where} may be about {self.stems[row.where]} and {picture}. "
                "Write it with the picture's suffix"
            )
        return row


def clean_path(path: str) -> str:
    return re.sub(r"^(?:\./)+", "", re.sub(r"/+", "/", path.strip().replace("\\", "/")))


def same_ending(one: str, other: str) -> bool:
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


# ---------------------------------------------------------------------------------------------------------------------
# the new records


@dataclass(frozen=True)
class Counted:
    """The facts about one new record that the report counts."""

    registers: tuple[str, ...] = ()
    subject: str = ""
    thing: str = ""
    plain: int = 0
    """A hash of the plain caption's gist, within this process."""
    label: bool = False
    """Whether the plain caption says nothing but a number."""


def described_record(record: dict[str, Any], row: Described, rows: DescribedRows) -> dict[str, Any]:
    """A pair's record with its row's values and what the rules derive from them.

    `caption` becomes the row's plain caption, if any. The earlier caption becomes register `era`; if there is an `era` already, or it was
    the plain one, it moves to `earlier_captions`. If a cell holds several texts, all are kept in `captions_all`. `caption_sources` states
    the origin of each: table, printed or rule.
    """
    table = {"source": "table", "model": "", "table": Path(rows.table.name).name, "sha256": rows.fingerprint[:16]}
    captions = {name: {"text": text, **table, "column": row.columns[name]} for name, text in row.texts.items()}
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
    if row.several:
        before = found if isinstance(found := record.get("captions_all"), list) else []
        tree["captions_all"] = list(dict.fromkeys([*row.several, *(text for text in before if isinstance(text, str))]))
    if row.kind:
        tree["subject"] = row.kind
    if (thing := rows.thing_of(row)) in rows.things:
        tree["thing"] = thing
    return tree


def count_facts(record: dict[str, Any]) -> Counted:
    plain, tags = plain_of(record), (str(record.get("subject", "")), str(record.get("thing", "")))
    return Counted(tuple(record["captions"]), *tags, hash(gist(plain)), is_label(plain))


def alt_text(technique: str, description: str, lexicon: Lexicon) -> str:
    """ "wood engraving", "A moth." -> "Wood engraving: a moth." """
    if not technique:
        return description
    return f"{technique[0].upper()}{technique[1:]}: {lexicon.lowercase_start(description)}"

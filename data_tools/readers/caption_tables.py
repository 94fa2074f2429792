"""Caption tables: paths and captions, as a source (.csv, .tsv, .jsonl, .parquet) or beside pictures; table_files.py reads both strictly."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.caption_guess import TextColumns, in_all
from data_tools.readers.coco import coco_records
from data_tools.readers.files import MAX_PAGE_BYTES, PICTURE_SUFFIXES, Misplaced, as_path, listed
from data_tools.readers.listing import NOTHING, Found, Guess, Listing, Options, Words, shown
from data_tools.readers.table_files import CAPTION_COLUMNS, PATH_COLUMNS, Table, TableError, caption_column, column_name, read_table
from data_tools.readers.words import OF_REGISTERS, SUBJECTS, group_of, join_words, normal, odd_caption, path_in, style_of, words_from
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

Opener = Callable[[], BinaryIO]


class CaptionRows:
    """The rows of caption tables beside pictures, by the path that each row names.

    The first table with a row for a picture is used; several rows of one table are joined.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.words = options, DiskDict()
        self.notes: dict[str, None] = {}
        self.checked: list[Checked] = []

    def add(self, table: str, name: str, open_file: Opener | None = None, *, given: bool = False) -> None:
        """Add the rows of a table. `table` is its path within the source, `name` its location. Raises UserError.

        `given`: it was named by the user, its paths are counted from the source, and its rows without a caption are left out.
        """
        folder, own = "" if given else posixpath.dirname(table), DiskDict()
        checked = Checked(name, self.options)
        for line, record in self.records(name, open_file):
            words = replace(words_from(record, self.options.caption_column), words_from=table)
            path = as_path(path_in(record))
            checked.add(line, path, record, words)
            if path and (words.caption or not given):
                key = composed(posixpath.normpath(posixpath.join(folder, path)))
                own[key] = join_words(own.get(key), words)
        self.notes.update(dict.fromkeys(checked.notes()))
        self.checked.append(checked)
        others = 0
        for path, words in own.pairs():
            there = self.words.get(path)
            others += there is not None and bool(words.caption) and words.caption != there.caption
            if there is None:
                self.words[path] = words
        if others:
            self.notes[f"Captions of {table} that are not read, since an earlier table has others for their pictures: {others:,}."] = None

    def records(self, name: str, open_file: Opener | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, record) of each row; in JSON its number."""
        if is_json(name):
            yield from enumerate(json_records(name, open_file), start=1)
            return
        table = open_table(name, self.options, open_file)
        check_columns(table, self.options)
        if note := note_on(table, self.options):
            self.notes[note] = None
        yield from ((row.line, row.values) for row in table)

    @property
    def guesses(self) -> tuple[Guess, ...]:
        """The caption columns that nobody named."""
        return in_all((guess for one in self.checked if (guess := one.guess())), (one.columns.columns for one in self.checked))

    def elsewhere(self, path: str, found: DiskList) -> str:
        """Where the picture of a row may be, in words; "" if no picture has its name."""
        name = posixpath.basename(path).casefold()
        other = next((one.path for one in found if composed(posixpath.basename(one.path)).casefold() == name), "")
        return f" Is that {other}? Paths are counted from the table's folder." if other else ""

    def match(self, found: DiskList) -> tuple[DiskDict, int, tuple[str, ...]]:
        """({path of a picture: its words}, number of rows without a picture, notes about them).

        A row names its picture as on disk, with accents composed or decomposed; or in another case or without the suffix, if
        that can only mean one picture.
        """
        words, used = DiskDict(), DiskDict()
        loose = DiskDict()  # path that a row may name -> the picture, "" if ambiguous
        if len(self.words):
            for one in found:
                key = composed(one.path)
                if (row := self.words.get(key)) is None and (written := written_path(one.path)) != key:
                    key, row = written, self.words.get(written)
                if row is not None:
                    words[one.path], used[key] = row, True
                else:
                    for form in {key.casefold(), posixpath.splitext(key.casefold())[0]}:
                        loose[form] = "" if form in loose else one.path
        for path, row in self.words.pairs():
            if path not in used and (picture := loose.pop(path.casefold(), "")):
                words[picture], used[path] = row, True
        notes = [*self.notes, *self.match_by_name(found, words, used)]
        count = len(self.words) - len(used)
        if missing := list(islice((path for path in self.words if path not in used), 3)):
            notes.append(
                f"Caption rows without a picture: {count:,}, the first for {', '.join(missing)}.{self.elsewhere(missing[0], found)}"
            )
        return words, count, tuple(notes)

    def match_by_name(self, found: DiskList, words: DiskDict, used: DiskDict) -> Iterator[str]:
        """Match rows by file name alone, if exactly one picture has that name, whatever its folder. Yields notes about it.

        Only tables in which no path leads to a picture are matched in this way, and of them only rows whose path names no folder. A table
        is left alone unless more than half of its rows find a picture.
        """
        where = {row.words_from for path, row in self.words.pairs() if path in used}
        rows, size = DiskDict(), Counter[str]()  # file name -> the row's path, "" if several have it; rows of each table
        for path, row in self.words.pairs():
            if row.words_from not in where:
                size[row.words_from] += 1
                bare = path.removeprefix(f"{posixpath.dirname(row.words_from)}/")
                if "/" not in bare:
                    rows[bare.casefold()] = "" if bare.casefold() in rows else path
        pictures = DiskDict()
        for one in found if len(rows) else ():
            name = posixpath.basename(composed(one.path)).casefold()
            for form in {name, posixpath.splitext(name)[0]}:
                pictures[form] = "" if form in pictures else one.path
        taken = DiskDict()  # picture -> the row's path, "" if several name it
        for name, path in rows.pairs():
            if path and (picture := pictures.get(name, "")) and picture not in words:
                taken[picture] = "" if picture in taken else path
        counts = Counter(self.words[path].words_from for _, path in taken.pairs() if path)
        first: dict[str, str] = {}
        for picture, path in taken.pairs():
            table = self.words[path].words_from if path else ""
            if 2 * counts[table] > size[table]:
                words[picture], used[path] = self.words[path], True
                first.setdefault(table, f"{path} is taken for {picture}")
        for table, example in first.items():
            yield (
                f"No path in {table} leads to a picture from the table's folder; "
                f"{counts[table]:,} rows are matched by file name instead: {example}."
            )


def written_path(path: str) -> str:
    """The path of a picture as in a row that was copied from the manifest.

    Backslashes, blanks at its ends and bytes that are not UTF-8 are not written there as they are on disk.
    """
    return composed(posixpath.normpath(as_path(shown(path))))


def composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def open_table(name: str | Path, options: Options, open_file: Opener | None = None) -> Table:
    """A checked table. Raises UserError with the file, the line and the way out."""
    return read_table(name, open_file=open_file, encoding=options.encoding, quoting=options.quoting)


def check_columns(table: Table, options: Options) -> None:
    """Raise TableError unless a column holds paths and, if captions are needed, one holds captions."""
    if not set(table.columns).intersection(PATH_COLUMNS):
        raise TableError(no_path_column(table.name, table.columns))
    if options.caption_column or options.captions_needed:
        check_caption_column(table, options)


def holds_captions(name: str, options: Options) -> bool:
    """Whether it is a table with a column of paths and one of captions."""
    try:
        check_columns(open_table(name, options), replace(options, captions_needed=True))
    except (UserError, OSError):
        return False
    return True


def check_caption_column(table: Table, options: Options) -> None:
    try:
        caption_column(table, options.caption_column)
    except TableError as error:
        way_out = ". Name one of them" if options.caption_column else ", or do without captions with --allow-missing-captions"
        raise TableError(f"{error}{way_out}") from error


class Checked:
    """Counts the rows of one table that name no picture or have no text as their caption, whether there are rows at all, and the text
    in each column."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options, self.columns = name, options, TextColumns()
        self.known_columns = [column_name(options.caption_column)] if options.caption_column else list(CAPTION_COLUMNS)
        self.rows = self.captioned = self.odd = self.known = self.nameless = self.first_nameless = 0
        self.first = ""

    def add(self, line: int, path: str, record: Mapping[str, Any], words: Words) -> None:
        self.rows += 1
        if not path:
            self.nameless += 1
            self.first_nameless = self.first_nameless or line
        self.captioned += bool(words.caption or words.captions)
        self.known += any(name in record for name in self.known_columns)
        self.columns.add(record)
        if not words.caption and not words.captions:
            odd = odd_caption(record, self.options.caption_column)
            self.odd += bool(odd)
            self.first = self.first or odd

    def guess(self) -> Guess | None:
        return None if self.options.caption_column else self.columns.guess(Path(self.name).name)

    def notes(self) -> list[str]:
        """Sentences for the user.

        Raises TableError if no row names a picture, or if captions are needed and no row has text as its caption.
        """
        name = Path(self.name).name
        if not self.rows:
            return [f"{name} has no rows below its header."]
        if self.nameless == self.rows:
            raise TableError(
                f"{self.name} names no pictures: in all of its {self.rows:,} rows the path is empty. "
                "Fill in the column file_name, or, if the table contains the pictures, use --reader huggingface"
            )
        if self.odd == self.rows and self.options.captions_needed:
            raise TableError(
                f"{self.name}: the caption is no text in any of its {self.rows:,} rows, the first is {self.first}. "
                "Name a column of text with --caption-column, write the texts into a column of their own, or add --allow-missing-captions"
            )
        notes = [str(guess)] if (guess := self.guess()) else []
        if self.nameless:
            notes.append(f"Rows of {name} that name no picture: {self.nameless:,}, the first in line {self.first_nameless}.")
        if self.odd:
            notes.append(f"Rows of {name} whose caption is no text: {self.odd:,}, the first {self.first}.")
        elif self.known and not self.captioned:
            notes.append(f"All {self.rows:,} captions in {name} are empty.")
        return notes


def note_on(table: Table, options: Options) -> str:
    """A note on the columns that are read, if they are not named file_name and caption."""
    name = Path(table.name).name
    names = [column_name(options.caption_column)] if options.caption_column else [name for name in CAPTION_COLUMNS if name in table.columns]
    paths, subjects = ([known for known in columns if known in table.columns][:1] for columns in (PATH_COLUMNS, SUBJECTS))
    also = [f"the pictures' names from {paths[0]}" if paths and paths[0] not in ("file_name", "filename", "path") else ""]
    also.append(f"subjects from {subjects[0]}" if subjects and subjects != ["subject"] else "")
    also += [f"captions of the register {name} from {name}" for name in OF_REGISTERS if name in table.columns and name not in names]
    more = "".join(f", {one}" for one in also if one)
    if (not names or names == ["caption"]) and not more:
        return ""
    others = f" and, where that is empty, from {', '.join(names[1:])}; choose with --caption-column" if len(names) > 1 else ""
    return f"The captions of {name} are read from its column {names[0]}{more}{others}." if names else f"Read from {name}:{more[1:]}."


def is_json(name: str) -> bool:
    return name.lower().endswith(".json")


def json_records(name: str, open_file: Opener | None) -> Iterator[dict[str, Any]]:
    """The normalised records of captions.json or metadata.json. Raises TableError.

    The file holds a list of objects, alone or under a name; {file name: caption or object}; or COCO.
    """
    with open_file() if open_file else open(name, "rb") as file:
        data = file.read(MAX_PAGE_BYTES * 8 + 1)
    way_out = 'Write {"wolf.jpg": "A wolf."}, a list of objects with file_name and caption, or a table as captions.csv'
    if len(data) > MAX_PAGE_BYTES * 8:
        raise TableError(f"{name} cannot be read for captions: it is too large for a JSON file; write it as captions.jsonl. {way_out}")
    try:
        tree = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TableError(f"{name} cannot be read for captions: {error}. {way_out}") from error
    if isinstance(tree, dict) and isinstance(tree.get("images"), list) and isinstance(tree.get("annotations"), list):
        yield from coco_records(tree)
    elif isinstance(tree, dict) and (rows := rows_under_a_name(tree)):
        yield from rows
    elif isinstance(tree, dict):
        for path, value in tree.items():
            yield {"file_name": path, **(normal(value) if isinstance(value, dict) else {"caption": value})}
    elif isinstance(tree, list) and all(isinstance(one, dict) for one in tree):
        yield from map(normal, tree)
    else:
        raise TableError(f"{name} cannot be read for captions: it holds neither an object nor a list of objects. {way_out}")


def rows_under_a_name(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of {"data": [{"file_name": …, "caption": …}]}, whatever the list is called; [] if there is no such list, or several."""
    lists = [value for value in tree.values() if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)]
    rows = list(map(normal, lists[0])) if len(lists) == 1 else []
    return rows if any(map(path_in, rows)) else []


# ---------------------------------------------------------------------------------------------------------------------
# a table as the source


def read_manifest(source: Path, options: Options) -> Listing:
    """A table (.csv, .tsv, .jsonl or .parquet) with a path column and columns of words.

    Several rows of one picture give the first row's words, and all captions in `captions_all`. Raises UserError if no
    column holds paths, or captions are needed and no column holds them.
    """
    base = options.root or source.parent
    root = base.resolve()
    table = open_table(source, options)
    if source.suffix.lower() == ".parquet" and not set(table.columns).intersection(PATH_COLUMNS):
        with open(source, "rb") as file:
            names = need("pyarrow.parquet", extra="data").read_schema(file).names
        raise TableError(no_path_column(str(source), names))
    check_columns(table, options)
    found, words = DiskDict(), DiskDict()
    checked, misplaced = Checked(str(source), options), Misplaced(source.name, base, options.root)
    for row in table:
        name, own = path_in(row.values), replace(words_from(row.values, options.caption_column), words_from=source.name)
        checked.add(row.line, name, row.values, own)
        if name:
            one = replace(listed(base, root, name), group=group_of(row.values), style=style_of(row.values))
            if one.path not in found:
                misplaced.add(one, as_path(name))
            found.setdefault(one.path, one)
            words[one.path] = join_words(words.get(one.path), own)
    notes = [note for note in (note_on(table, options), *checked.notes(), *misplaced.notes()) if note]
    guesses = tuple(filter(None, (checked.guess(),)))
    return Listing(base, DiskList(found.ordered()), words, checked.nameless, notes=tuple(notes), guesses=guesses)


def no_path_column(source: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    if any(posixpath.splitext(name)[1] in PICTURE_SUFFIXES for name in columns):
        return (
            f"{source} has no header: its first line is {columns}. "
            "Put a line with the names of the columns above it, such as file_name and caption"
        )
    return (
        f"{source} names no pictures: its columns are {columns}, and none of {', '.join(PATH_COLUMNS)} holds paths. "
        "Rename the path column to file_name, or, if the table contains the pictures, use --reader huggingface"
    )


def with_captions(listing: Listing, options: Options) -> Listing:
    """The listing with the captions of `options.captions`, which override all others. Raises UserError."""
    if options.captions is None:
        return listing
    rows = CaptionRows(replace(options, captions_needed=True, caption_column=column_of_given(str(options.captions), options)))
    rows.add(str(options.captions), str(options.captions), given=True)
    given, missing, notes = rows.match(listing.found)
    words = DiskDict(listing.words)
    for path, own in given.pairs():
        words[path] = own.or_else(words.get(path, NOTHING))
    found: DiskList = DiskList(with_given(one) if one.path in given else one for one in listing.found)
    return replace(listing, found=found, words=words, unmatched=listing.unmatched + missing, notes=(*listing.notes, *notes))


def column_of_given(name: str, options: Options) -> str:
    """The caption column of the table that is given: the one that was asked for, or `caption`, as in the captions.csv that prepare writes.

    Raises TableError if it has neither: captions of another column must not replace those that were chosen.
    """
    wanted = options.caption_column
    if not wanted:
        return ""
    columns = (
        dict.fromkeys(key for record in json_records(name, None) for key in record) if is_json(name) else open_table(name, options).columns
    )
    for column in (column_name(wanted), "caption"):
        if column in columns:
            return column
    raise TableError(
        f"{name} has neither a column {wanted!r} (--caption-column) nor one named caption: its columns are {', '.join(columns) or 'none'}. "
        "Rename the one with the captions to caption"
    )


def with_given(one: Found) -> Found:
    """A picture whose caption is given, so that no fault of its own words matters."""
    return replace(one, given=True, problem="" if one.of_words else one.problem)

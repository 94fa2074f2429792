"""Table files: one strict reader of CSV, TSV, JSONL and Parquet for all tables with named columns.

    table = read_table("captions.tsv")
    table.columns, table.count, table.how      # ('key', 'description'), 412, 'tab separated, without quoting'
    for row in table: row.line, row.values     # 2, {'key': 'a', 'description': 'A ship.'}

The whole table is checked when it is opened, so errors show before any work is done: a quote that is not closed, a row
with more or fewer fields than the header, bytes that are not UTF-8, duplicate column names. Each is one `TableError` with
file, line, the text found and the way out. Rows are then read one by one, from the file again.

How a table is read
- `.csv`: separated by comma, semicolon, tab or |, whichever is most frequent in the header; quoted as in RFC 4180. If a quoted cell
  spans several lines and one of them looks like a row of its own, a quote was probably forgotten, and the table is refused.
- `.tsv`, `.tab`, and CSV separated by tabs: read literally, quotes included, as in IANA's text/tab-separated-values, unless
  something shows that fields are quoted: all names of the header are in quotes; or a field that begins and ends with a quote
  contains doubled ones; or some lines differ from the header in their number of fields and quoting explains all of them.
  `quoting` overrides this.
- `.jsonl`, `.ndjson`: one object per line; a missing name is no value. `.parquet`: columns of bytes are skipped.
- Column names are compared in lower case with underscores. An empty cell, nan, null, none and <NA> are None.

Why not pandas or pyarrow.csv: after a forgotten quote both read the following rows as one cell without an error, and both remove the
quotes of a TSV that is not quoted, so captions would be lost or changed unseen. Knows nothing of pictures or registers.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".parquet")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "description", "prompt", "sentence", "title", "alt_text")
"""Columns that hold a caption; the first one present is used."""
PATH_COLUMNS = (
    "image_path", "file_name", "filename", "file_path", "filepath", "image_file", "path", "file", "image", "img_path", "img",
    "image_name", "image_filename", "img_name", "img_file", "picture", "picture_path", "photo",
)  # fmt: skip
NO_VALUES = frozenset({"", "nan", "<na>", "none", "null"})
NO_CAPTIONS = NO_VALUES | {"na", "n/a", "#n/a", "#na", "-nan", "#n/a n/a"}
"""Cells without a caption: NO_VALUES and what else spreadsheets and pandas write into empty cells. Keys and paths may be called na."""
QUOTING = ("auto", "none", "csv")
ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
SHOWN = 80  # characters of a faulty line in an error
MOST_CHARACTERS = 1 << 20  # in one cell


class TableError(UserError):
    """A fault in a table: what, where and the way out, in one line."""


@dataclass(frozen=True)
class Row:
    """One row: the line it begins on (in Parquet its number, from 1) and its values by column."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A checked table. Each iteration reads the rows from the file again."""

    name: str
    columns: tuple[str, ...]
    """Column names in lower case with underscores, in the file's order."""
    count: int
    """Number of rows."""
    how: str
    """How it was read, in words, for messages."""
    rows: Callable[[], Iterator[Row]] = field(repr=False)
    not_text: tuple[str, ...] = ()
    """Columns of bytes, which are not read."""

    def __iter__(self) -> Iterator[Row]:
        return self.rows()

    def __len__(self) -> int:
        return self.count


def read_table(
    path: str | Path,
    *,
    open_file: Callable[[], BinaryIO] | None = None,
    encoding: str = "utf-8",
    quoting: str = "auto",
    separator: str = "",
) -> Table:
    """Check a table and return it. Its suffix determines its format.

    open_file: opens it for reading bytes from the start, if it is not a local file of this name. encoding: of CSV, TSV and JSONL.
    quoting: auto, none (fields are taken literally) or csv, for text. separator: of fields; "": from suffix and header.
    Raises TableError (a UserError) if the table cannot be read, OSError if the file is missing.
    """
    path = Path(path)
    if quoting not in QUOTING:
        raise UserError(f"quoting {quoting!r} is unknown: give {', '.join(QUOTING)}")
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise UserError(f"encoding {encoding!r} is unknown: give utf-8, utf-16, cp1252, latin-1 …") from error
    opener = open_file or (lambda: path.open("rb"))
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(str(path), opener)
    text = _Text(str(path), opener, encoding)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl(text)
    if suffix not in TABLE_SUFFIXES and not separator:
        raise TableError(f"{path} is not a table of a known format: its name must end in one of {', '.join(TABLE_SUFFIXES)}")
    return _separated(text, separator or ("\t" if suffix in (".tsv", ".tab") else ""), quoting)


def column_name(name: Any) -> str:
    """ "File Name" -> "file_name"."""
    return re.sub(r"[\s\-]+", "_", str(name).strip().lower())


def value_of(value: Any) -> Any:
    """None for an empty text, nan, null, none and <NA>; else the value unchanged."""
    if isinstance(value, str):
        return None if value.strip().lower() in NO_VALUES else value
    return None if isinstance(value, float) and math.isnan(value) else value


def caption_of(value: Any) -> Any:
    """As `value_of`, and None for every text that stands for an empty cell."""
    return None if isinstance(value, str) and value.strip().lower() in NO_CAPTIONS else value_of(value)


def separator_in(head: str) -> str:
    """The separator of a CSV by its first line: comma, semicolon, tab or |, whichever is most frequent."""
    return max(",;\t|", key=head.count)


def caption_column(table: Table, wanted: str = "", *, known: Iterable[str] = CAPTION_COLUMNS) -> str:
    """The column with the captions: `wanted`, or the first known name present. Raises TableError that lists the columns."""
    if wanted:
        if column_name(wanted) in table.columns:
            return column_name(wanted)
        raise TableError(f"{table.name} has no column {wanted!r} (--caption-column): its columns are {', '.join(table.columns)}")
    for name in known:
        if name in table.columns:
            return name
    raise TableError(
        f"{table.name} has no caption column with a known name ({', '.join(known)}): its columns are {', '.join(table.columns)}"
        f"{' (' + ', '.join(table.not_text) + ': bytes, not text)' if table.not_text else ''}. Name the right one with --caption-column"
    )


# ---------------------------------------------------------------------------------------------------------------------
# text


@dataclass(frozen=True)
class _Text:
    """A text file that can be read line by line repeatedly."""

    name: str
    open: Callable[[], BinaryIO]
    encoding: str

    def lines(self) -> Iterator[str]:
        """The lines with their line ends: line feeds, or carriage returns in a file without line feeds."""
        with self.open() as binary:
            start = binary.read(1 << 16)
        self.refuse_marks(start)
        end = "\r" if b"\r" in start and b"\n" not in start else "\n"
        marked = start.startswith(codecs.BOM_UTF8)  # it is UTF-8, whatever encoding was given for the tables
        encoding = "utf-8-sig" if marked or codecs.lookup(self.encoding).name == "utf-8" else self.encoding
        try:
            with io.TextIOWrapper(self.open(), encoding=encoding, newline=end) as file:
                for number, line in enumerate(file, start=1):
                    if "\0" in line:
                        way_out = "save the table as UTF-8 text, or, if it is UTF-16, name that: --encoding utf-16-le"
                        raise self.error(number, "contains a zero byte, so it is not text", way_out)
                    yield line
        except UnicodeError as error:
            raise self.undecodable(error) from error

    def refuse_marks(self, start: bytes) -> None:
        """Refuse UTF-16, which its first bytes show; it would decode to nonsense."""
        utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if utf16 and "16" not in self.encoding and "32" not in self.encoding:
            raise TableError(f"{self.name} is not {self.encoding}: it begins like UTF-16. Save it as UTF-8, or give --encoding utf-16")

    def undecodable(self, error: UnicodeError) -> TableError:
        """The error with the faulty line, found by reading the bytes again."""
        with self.open() as binary:
            for number, line in enumerate(binary, start=1):
                try:
                    line.decode(self.encoding)
                except UnicodeError as here:
                    at = getattr(here, "start", 0)
                    what = f"is not {self.encoding}: byte 0x{line[at]:02x} after {_shown(line[:at].decode(self.encoding, 'replace'))}"
                    guess = f" (as cp1252 it reads {_shown(line[max(0, at - 20) : at + 20].decode('cp1252', 'replace'))})"
                    return self.error(number, what + guess, "save the table as UTF-8, or name its encoding: --encoding cp1252")
        return TableError(f"{self.name} is not {self.encoding} ({error}): save it as UTF-8, or name its encoding with --encoding")

    def error(self, line: int, what: str, way_out: str) -> TableError:
        return TableError(f"{self.name}, line {line}: {what}. {way_out[0].upper()}{way_out[1:]}")


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def _names(text_error: Callable[[str, str], TableError], head: Iterable[Any]) -> tuple[str, ...]:
    """The names of a header, checked to be distinct."""
    written = list(head)
    names = tuple(map(column_name, written))
    for index, name in enumerate(names):
        if not name:
            raise text_error(f"column {index + 1} of {len(names)} has no name", "name it, or remove it")
        if name in names[:index]:
            first = written[names.index(name)]
            raise text_error(f"two columns have the same name, {first!r} and {written[index]!r}", "rename or remove one of them")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# CSV and TSV


def _separated(text: _Text, separator: str, quoting: str) -> Table:
    first = next(text.lines(), "")
    separator = separator or separator_in(first)
    quoted = quoting == "csv" or (quoting == "auto" and (separator != "\t" or _is_quoted_tsv(text)))
    fields = _quoted_fields if quoted else _plain_fields

    head = next(fields(text, separator), None)
    if head is None:
        raise TableError(f"{text.name} is empty: the first line of a table must name its columns")
    names = _names(lambda what, way: text.error(head[0], what, way), head[1])

    def rows() -> Iterator[Row]:
        for line, cells in itertools.islice(fields(text, separator), 1, None):
            yield Row(line, {name: _cell(cell, quoted) for name, cell in zip(names, cells)})

    how = {",": "comma", ";": "semicolon", "\t": "tab"}.get(separator, repr(separator))
    return Table(text.name, names, sum(1 for _ in rows()), f"{how} separated, {'quoted' if quoted else 'without quoting'}", rows)


def _cell(cell: str, quoted: bool) -> str | None:
    return None if not quoted and cell == '""' else value_of(cell)


def _plain_fields(text: _Text, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of a table without quoting, without blank lines. Raises TableError for a row that does not fit the header."""
    wanted = 0
    for number, line in enumerate(text.lines(), start=1):
        if line.strip():
            cells = line.rstrip("\r\n").split(separator)
            wanted = wanted or len(cells)
            _check_count(text, number, number, cells, wanted, separator, quoted=False)
            yield number, cells


def _quoted_fields(text: _Text, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of a quoted table, as `_plain_fields`."""
    taken: list[str] = []  # the lines of the current row

    def lines() -> Iterator[str]:
        for line in text.lines():
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=separator, strict=True)
    limit = csv.field_size_limit()
    wanted, start = 0, 1
    while True:
        try:
            csv.field_size_limit(MOST_CHARACTERS)
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _quote_error(text, start, start + len(taken) - 1, taken, error) from error
        finally:
            csv.field_size_limit(limit)
        if cells and any(line.strip() for line in taken):
            wanted = wanted or len(cells)
            _check_count(text, start, start + len(taken) - 1, cells, wanted, separator, quoted=True)
            _check_swallowed(text, start, taken, wanted, separator)
            yield start, cells
        start += len(taken)
        taken.clear()


def _quote_error(text: _Text, start: int, end: int, taken: list[str], error: csv.Error) -> TableError:
    if "new-line" in str(error):
        way_out = "save the table with one kind of line end"
        return text.error(start, f"contains a carriage return without a line feed, an old line end: {_shown(taken[0])}", way_out)
    if "field limit" in str(error) and len(taken) == 1 and taken[0].count('"') % 2 == 0:
        what = f"has a field of more than {MOST_CHARACTERS:,} characters: {_shown(taken[0])}"
        return text.error(start, what, "shorten it, or remove the row: no caption is that long")
    if "end of data" in str(error) or "field limit" in str(error):
        what = f"a quote is not closed: {_shown(taken[0])}"
    elif end > start:
        what = f"a quote is not closed before line {end}: {_shown(taken[0])}"
    else:
        what = f"text follows a closing quote: {_shown(taken[0])}"
    return text.error(
        start, what, "close the field with a quote and double the quotes inside it, or, for a table without quoting, give --quoting none"
    )


def _check_count(text: _Text, line: int, end: int, cells: list[str], wanted: int, separator: str, *, quoted: bool) -> None:
    """Raise TableError unless the row from `line` to `end` has as many fields as wanted."""
    if len(cells) == wanted:
        return
    sign = {"\t": "tab", ",": "comma", ";": "semicolon"}.get(separator, separator)
    what = f"{len(cells)} fields where the header has {wanted}: {_shown(separator.join(cells))}"
    if others := _also_wrong(text, end, wanted, separator, quoted=quoted):
        what += f" ({others})"
    more = (
        f"leave no space between the {sign} and the opening quote"
        if quoted and any(cell.startswith(' "') for cell in cells)
        else f"put a field that contains a {sign} in double quotes"
        if quoted
        else f"a field cannot contain a {sign}: remove it, or quote all fields that do"
    )
    raise text.error(
        line,
        what,
        more
        if len(cells) > wanted
        else f"give every row all fields, empty ones too, and no line break outside of quotes ({sign}s separate)",
    )


def _also_wrong(text: _Text, end: int, wanted: int, separator: str, *, quoted: bool) -> str:
    """Which rows after line `end` have a wrong number of fields too, in words; "" for none.

    Looks only as far as the quotes can be followed.
    """
    found, start = [], end + 1
    lines = itertools.islice(text.lines(), end, None)
    rows = csv.reader(lines, delimiter=separator) if quoted else None
    try:
        for number, cells in enumerate(rows or (one.rstrip("\r\n").split(separator) for one in lines), start=end + 1):
            if len(cells) not in (0, wanted) and any(cells):
                found.append(start)
            start = (end + rows.line_num if rows else number) + 1
    except (csv.Error, TableError):
        pass
    if not found:
        return ""
    some = ", ".join(map(str, found[:5])) + (" …" if len(found) > 5 else "")
    return f"so have {len(found):,} more: line{'s' if len(found) > 1 else ''} {some}"


def _check_swallowed(text: _Text, start: int, taken: list[str], wanted: int, separator: str) -> None:
    """Refuse a cell over several lines if a later line has the header's number of fields and begins like the row itself."""
    own = _shape(taken[0].split(separator)[0])
    for number, line in enumerate(taken[1:], start=start + 1):
        cells = line.rstrip("\r\n").split(separator)
        if wanted > 1 and len(cells) == wanted and _shape(cells[0]) == own:
            what = f"the quote that opens here includes line {number}, which looks like a row of its own: {_shown(line)}"
            raise text.error(start, what, "close the field with a quote on its own line, or double the quotes inside a field")


def _shape(cell: str) -> str:
    """What the first cells of neighbouring rows share: a path's suffix, or everything but the digits."""
    cell = cell.strip().strip('"')
    suffix = re.search(r"\.[A-Za-z]{2,5}$", cell)
    return suffix[0].lower() if suffix else re.sub(r"\d+", "0", cell)


def _is_quoted_tsv(text: _Text) -> bool:
    """Whether the fields of a tab-separated table are quoted (see above); False unless something shows it."""
    wanted, fits, any_enclosed = 0, True, False
    for line in text.lines():
        if not line.strip():
            continue
        cells = line.rstrip("\r\n").split("\t")
        enclosed = [bool(ENCLOSED.fullmatch(cell)) for cell in cells]
        if not wanted:
            wanted = len(cells)
            if all(enclosed):
                return True
        any_enclosed |= '"' in line
        fits &= len(cells) == wanted
        if any(here and '""' in cell[1:-1] for here, cell in zip(enclosed, cells)):
            return True
    if fits or not any_enclosed:
        return False
    try:
        for _ in _quoted_fields(text, "\t"):
            pass
    except TableError:
        return False  # the row that does not fit is then reported as it is
    return True


# ---------------------------------------------------------------------------------------------------------------------
# JSONL and Parquet


def _jsonl(text: _Text) -> Table:
    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(text.lines(), start=1):
            if line.strip():
                yield number, _json_object(text, number, line)

    columns: dict[str, None] = {}
    count = 0
    for _, tree in objects():
        columns.update(dict.fromkeys(tree))
        count += 1
    if not count:
        raise TableError(f'{text.name} is empty: each line must be a JSON object, {{"file_name": …, "caption": …}}')

    def rows() -> Iterator[Row]:
        for number, tree in objects():
            yield Row(number, {name: value_of(tree.get(name)) for name in columns})

    return Table(text.name, tuple(columns), count, "one JSON object per line", rows)


def _json_object(text: _Text, number: int, line: str) -> dict[str, Any]:
    """A line's object by column name. Raises TableError if it is not an object or repeats a name."""
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        twice.extend(name for index, name in enumerate(names) if name in names[:index])
        return dict(items)

    try:
        tree = json.loads(line, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise text.error(number, f"is not valid JSON ({what}): {_shown(line)}", "write one JSON object per line") from error
    if not isinstance(tree, Mapping):
        raise text.error(number, f"is not a JSON object: {_shown(line)}", 'write one object per line, {"file_name": …, "caption": …}')
    if twice:
        raise text.error(number, f"the name {twice[0]!r} appears twice: {_shown(line)}", "rename or remove one of them")
    return dict(zip(_names(lambda what, way: text.error(number, what, way), tree), tree.values()))


def _parquet(name: str, opener: Callable[[], BinaryIO]) -> Table:
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    way_out = "Write it again, or as .csv, .tsv or .jsonl"

    def fault(what: str, way: str) -> TableError:
        return TableError(f"{name}: {what}. {way[0].upper()}{way[1:]}")

    def rows() -> Iterator[Row]:
        numbers = itertools.count(1)
        try:
            with opener() as binary, pq.ParquetFile(binary) as file:
                for batch in file.iter_batches(batch_size=4096, columns=written):
                    for tree in batch.to_pylist():
                        yield Row(next(numbers), {short: value_of(tree[long]) for short, long in zip(names, written)})
        except (pa.ArrowException, OSError, ValueError) as error:
            raise TableError(f"{name} is truncated or damaged: {error}. {way_out}") from error

    try:
        with opener() as binary, pq.ParquetFile(binary) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TableError(f"{name} is not a readable Parquet file: {error}. {way_out}") from error
    _names(fault, schema.names)
    written = [column.name for column in schema if not _holds_bytes(pa, column.type)]
    names = tuple(map(column_name, written))
    not_text = tuple(column_name(column.name) for column in schema if _is_bytes(pa, column.type))
    return Table(name, names, count, "Parquet", rows, not_text)


def _holds_bytes(pa: Any, kind: Any) -> bool:
    return _is_bytes(pa, kind) or (pa.types.is_struct(kind) and any(_is_bytes(pa, column.type) for column in kind))


def _is_bytes(pa: Any, kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

"""Tables: a table of paths and captions, as a source (.csv, .tsv, .jsonl, .parquet) or beside pictures."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.files import TABLE_NAMES, as_path, listed
from data_tools.readers.listing import Listing, Options, Words
from data_tools.readers.words import (
    CAPTIONS,
    COLUMNS,
    PATHS,
    column_name,
    group_of,
    join_words,
    json_object,
    normal,
    path_in,
    style_of,
    words_from,
)
from tokun.extras import need


def read_table(source: Path, table: str, words: MutableMapping[str, Words]) -> None:
    """Add {path of the picture within SOURCE: its words} of a caption table, whose paths start at its folder, to `words`: what is there stays."""
    with open(source / table, "rb") as file:
        table_words(file, table, str(source / table), words)


def table_words(file: BinaryIO, table: str, name: str, words: MutableMapping[str, Words]) -> None:
    for record in table_rows(file, name, needs=(PATHS, CAPTIONS)):
        if path := as_path(path_in(record)):
            words.setdefault(posixpath.normpath(posixpath.join(posixpath.dirname(table), path)), words_from(record))


def table_rank(table: str) -> int:
    return TABLE_NAMES.index(posixpath.basename(table))


def table_rows(binary: BinaryIO, name: str, *, needs: tuple[tuple[str, ...], ...] = ()) -> Iterator[dict[str, Any]]:
    """The normal records of a .jsonl table, or of a .csv (comma, semicolon or tab) with one column of each kind in `needs`.

    `name` tells which, and stands in what is raised: ValueError, with the way out.
    """
    try:
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            yield from json_rows(file) if name.lower().endswith((".jsonl", ".ndjson")) else csv_rows(file, needs)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{name} is no table of captions: {error}. Mend it, or rename it to go without") from error


def json_rows(file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield normal(json_object(line, where=f"line {number}"))


def csv_rows(file: TextIO, needs: tuple[tuple[str, ...], ...]) -> Iterator[dict[str, Any]]:
    header = file.readline()
    file.seek(0)
    reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
    columns = set(map(column_name, reader.fieldnames or ()))
    for wanted in needs:
        if not columns.intersection(wanted):
            raise ValueError(f"its columns are {sorted(columns)}, and none is called {' or '.join(wanted)}")
    yield from map(normal, reader)


def read_manifest(source: Path, options: Options) -> Listing:
    """A table (.csv, .tsv, .jsonl or .parquet) with a column of paths and columns of words.

    Several rows of one picture: the first row's words, and all captions in `captions_all`. Raises ValueError when no
    column holds paths.
    """
    base = options.root or source.parent
    root = base.resolve()
    found, words = DiskDict(), DiskDict()
    without = 0
    columns: dict[str, None] = {}
    for record in parquet_rows(source) if source.suffix.lower() == ".parquet" else file_rows(source):
        if not (name := path_in(record)):
            without += 1
            columns.update(dict.fromkeys(record))
            continue
        one = replace(listed(base, root, name), group=group_of(record), style=style_of(record))
        found.setdefault(one.path, one)
        words[one.path] = join_words(words.get(one.path), words_from(record))
    if without and not found:
        raise ValueError(no_path_column(source, list(columns)))
    return Listing(base, DiskList(found.ordered()), words, without)


def no_path_column(source: Path, columns: list[str]) -> str:
    return (
        f"{source} names no pictures: its columns are {columns}, and none of {', '.join(PATHS)} holds paths. "
        "Rename the column of paths to file_name, or, where pictures lie in the table itself, use --reader huggingface"
    )


def file_rows(source: Path) -> Iterator[dict[str, Any]]:
    with open(source, "rb") as file:
        yield from table_rows(file, str(source))


def parquet_rows(source: Path) -> Iterator[dict[str, Any]]:
    """The normal records of a Parquet table: only the columns that say something, and none of bytes."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    try:
        with pq.ParquetFile(source) as file:
            columns = [column for column in file.schema_arrow if column_name(column.name) in COLUMNS]
            names = [column.name for column in columns if not holds_bytes(pa, column.type)]
            if not {column_name(name) for name in names}.intersection(PATHS):
                raise LookupError(no_path_column(source, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=4096, columns=names):
                yield from map(normal, batch.to_pylist())
    except LookupError as error:
        raise ValueError(*error.args) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{source} is no Parquet file that can be read: {error}. Write it anew, or as .csv or .jsonl") from error


def holds_bytes(pa: Any, kind: Any) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or (pa.types.is_struct(kind) and any(column.name == "bytes" for column in kind))
    )

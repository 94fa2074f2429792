"""Rows of tables that people edit, read strictly: a quote that is not closed is an error with its line, and swallows no rows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator

from tokun.utils.errors import UserError

FAULTS = {"end of data": "a quote is not closed", "expected after": "text follows a closing quote"}
WAY_OUT = "Enclose the whole field in quotes, and double the quotes inside it"


def read_rows(
    lines: Iterable[str], source: object, *, separator: str, number: Callable[[int], int] = int
) -> Iterator[tuple[int, list[str]]]:
    """The rows, quoted as in RFC 4180, each with the number of its first line; empty rows are skipped.

    `number`: place of a line among `lines`, from 1 -> its number in the file. Raises UserError, with that line, for a quote that is not
    closed and for text after a closing quote.
    """
    first, reader = 1, csv.reader(lines, delimiter=separator, strict=True)
    try:
        for cells in reader:
            if cells:
                yield number(first), cells
            first = reader.line_num + 1
    except csv.Error as error:
        what = next((words for part, words in FAULTS.items() if part in str(error)), f"it cannot be read ({error})")
        raise UserError(f"{source}, line {number(first)}: {what}. {WAY_OUT}") from error

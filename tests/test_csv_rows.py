"""Promises of tokun/utils/csv_rows.py: a table that people edit is read whole, or refused with the line at fault."""

import pytest

from tokun.utils.csv_rows import read_rows
from tokun.utils.errors import UserError


def rows(text, **options):
    return list(read_rows(text.splitlines(keepends=True), "a.csv", separator=",", **options))


def test_rows_have_the_number_of_their_first_line_and_empty_ones_are_skipped():
    assert rows('a,b\n\n"x\ny",2\nz,3\n') == [(1, ["a", "b"]), (3, ["x\ny", "2"]), (5, ["z", "3"])]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('a,b\n1,2\n"3,4\n5,6\n', r"a\.csv, line 3: a quote is not closed\. Enclose the whole field in quotes"),
        ('a,b\n"1"x,2\n', r"a\.csv, line 2: text follows a closing quote"),
    ],
)
def test_a_broken_quote_is_named_with_its_line(text, told):
    with pytest.raises(UserError, match=told):
        rows(text)


def test_lines_that_were_left_out_before_are_counted():
    with pytest.raises(UserError, match=r"a\.csv, line 12:"):
        rows('a,b\n"1,2\n', number=lambda place: place + 10)

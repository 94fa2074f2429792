"""Expected errors: a user's mistake and a broken sample. Any other exception is a bug and shows its traceback.

Both are ValueErrors, so that callers' `except ValueError` still works. `tokun.utils.console` prints the first as one line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A setting, option, argument or file that the user can fix. The message gives the value, why it is wrong, and the way out."""


class BadSample(ValueError):
    """An unusable sample of a data set: broken bytes or a malformed record. Readers skip and count it."""


class MissingPackage(UserError, ImportError):
    """An optional package is not installed. The message names the extra that provides it."""


class Diverged(UserError, FloatingPointError):
    """The loss or gradient of a training is no longer finite."""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of the error's message, or its type's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:most]


@contextmanager
def reading(what: object, way_out: str = "") -> Iterator[None]:
    """Raise a ValueError (invalid JSON, UTF-8 or number) or csv.Error of the block as UserError: the user's file `what` is broken."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{what} cannot be read: {error}{way_out and '. '}{way_out}") from error

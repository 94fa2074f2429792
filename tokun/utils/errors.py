"""What may go wrong besides bugs: a user's mistake, and a sample that is broken. Any other exception is a bug and shows its traceback.

Both are ValueErrors, so that `except ValueError` of callers goes on working. `tokun.utils.console` prints the first as one line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A setting, an option, an argument or a file that its user can put right. The message gives the value, why it is wrong, and the way out."""


class BadSample(ValueError):
    """A sample of a data set that cannot be used: broken bytes, a record of another shape. Readers skip it and count it."""


class MissingPackage(UserError, ImportError):
    """An optional package that is not installed. The message names the extra that brings it."""


class Diverged(UserError, FloatingPointError):
    """Training whose loss or gradient is not finite any more."""


@contextmanager
def reading(what: object, way_out: str = "") -> Iterator[None]:
    """Within the block, a ValueError (no JSON, no UTF-8, no number) or csv.Error says that the user's file `what` is broken: raised as UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{what} cannot be read: {error}{way_out and '. '}{way_out}") from error

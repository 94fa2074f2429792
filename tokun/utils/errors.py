"""Expected errors: a user's mistake, a broken sample, and what the machine refuses. Any other exception is a bug and shows its traceback.

The first two are ValueErrors, so that callers' `except ValueError` still works. `tokun.utils.console` prints a mistake as one line.
"""

from __future__ import annotations

import csv
import errno
import socket
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


# errors of the machine or the network even if they name no file; any other without a file, such as EBADF, is a bug
LACKING = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ENOMEM", "EMFILE", "ENFILE", "EAGAIN", "EBUSY", "EACCES", "EPERM", "ENOLCK",
        "EOPNOTSUPP", "ESTALE", "EREMOTEIO", "EADDRINUSE", "EADDRNOTAVAIL", "ENETDOWN", "ENETUNREACH",
        "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN",
    )
    if hasattr(errno, name)
}  # fmt: skip


def is_mistake(error: BaseException) -> bool:
    """Whether the user can mend it: a UserError, or an OSError that names a file, says what is lacking (a full disk, a host that does not
    answer), or was raised with a message instead of the system's number."""
    if not isinstance(error, OSError) or isinstance(error, UserError):
        return isinstance(error, UserError)
    told = error.errno is None or error.filename is not None or error.errno in LACKING
    return told or isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of the error's message, or its type's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:most]


def require_positive(settings: object, *names: str) -> None:
    """Raise UserError, with the option's name, unless each of these settings is 1 or more."""
    for name in names:
        if (value := getattr(settings, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be 1 or more")


@contextmanager
def reading(what: object, way_out: str = "") -> Iterator[None]:
    """Raise a ValueError (invalid JSON, UTF-8 or number) or csv.Error of the block as UserError: the user's file `what` is broken."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(f"{what} cannot be read: {error}{way_out and '. '}{way_out}") from error

"""How a command reads paths and exits: a user's mistake prints one line, anything else a traceback. Knows no command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tokun.utils.errors import UserError

MISTAKES = (UserError, OSError)  # OSError: a missing file, a full disk, a host that does not answer


def home_path(text: str) -> Path:
    """A path as typed, with a leading ~ expanded: the shell does not expand it after an =."""
    return Path(os.path.expanduser(text))  # unlike Path.expanduser, leaves ~name of no user as it is


def home_text(text: str) -> str:
    """As `home_path`, for text that may also be an address such as s3://…, which `Path` would change."""
    return os.path.expanduser(text)


def status(name: str, main: Callable[[], object]) -> int:
    """Call `main` and return its exit status: its result if that is a number, else 0.

    MISTAKES print one line `name: …` to stderr and give status 2; Ctrl-C does the same with status 130. With TOKUN_TRACEBACK set,
    both are raised. Any other exception is a bug and propagates.
    """
    try:
        found = main()
    except KeyboardInterrupt:
        if os.environ.get("TOKUN_TRACEBACK"):
            raise
        print(
            f"\n{name}: stopped by Ctrl-C. Finished shards and batches and saved states are kept; the same command resumes after them and redoes only the unfinished part",
            file=sys.stderr,
        )
        return 130
    except MISTAKES as error:
        if os.environ.get("TOKUN_TRACEBACK"):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return found if isinstance(found, int) else 0


def run(name: str, main: Callable[[], object]) -> None:
    """Run `main` and exit with its status if that is not 0."""
    if code := status(name, main):
        sys.exit(code)

"""How a command reads a path and how it ends: a user's mistake is one line, anything else a traceback. Knows no command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tokun.utils.errors import UserError

MISTAKES = (UserError, OSError)  # the latter: a file that is missing, a full disk, a host that does not answer


def home_path(text: str) -> Path:
    """A path as it was typed, ~ at its start as the home folder: behind an = the shell leaves it as it is."""
    return Path(text).expanduser()


def home_text(text: str) -> str:
    """`home_path`, for what may be an address or a name as well, which `Path` would change: s3://…"""
    return os.path.expanduser(text)


def status(name: str, main: Callable[[], object]) -> int:
    """Call `main`. Returns its exit status: what it returns where that is a number, else 0.

    What it raises of MISTAKES becomes the line `name: …` on stderr and status 2, Ctrl-C one with status 130; with TOKUN_TRACEBACK set,
    both are raised. Any other exception is a bug and passes through.
    """
    try:
        found = main()
    except KeyboardInterrupt:
        if os.environ.get("TOKUN_TRACEBACK"):
            raise
        print(
            f"\n{name}: stopped by Ctrl-C. Whole shards, their finished batches and saved states are kept, and the same command goes on behind them; what was being made is made again",
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
    """End the process with `status` where it is not 0."""
    if code := status(name, main):
        sys.exit(code)

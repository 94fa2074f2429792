"""How a command reads a path and how it ends: a user's mistake is one line, anything else a traceback. Knows no command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def home_path(text: str) -> Path:
    """A path as it was typed, ~ at its start as the home folder: behind an = the shell leaves it as it is."""
    return Path(text).expanduser()


MISTAKES = (ValueError, OSError, FloatingPointError, ImportError)


def run(name: str, main: Callable[[], object]) -> None:
    """Call `main`. What it raises of MISTAKES becomes the line `name: …` and status 1, Ctrl-C one with status 130; with TOKUN_TRACEBACK
    set, it is raised."""
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("TOKUN_TRACEBACK"):
            raise
        print(
            f"\n{name}: stopped by Ctrl-C. Whole shards, their finished batches and saved states are kept, and the same command goes on behind them; what was being made is made again",
            file=sys.stderr,
        )
        sys.exit(130)
    except MISTAKES as error:
        if os.environ.get("TOKUN_TRACEBACK"):
            raise
        sys.exit(f"{name}: {error}")

"""The launchers (deepspeed, torchrun, accelerate) that started this process: are they still there, and a last line below their own.

A launcher that is stopped prints lines and tracebacks of its own when the processes that it started have ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

_OPEN: list[Any] = []
NAMES = {"deepspeed", "torchrun", "accelerate"}
MODULES = {
    "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch",
    "accelerate.commands.launch",
}  # fmt: skip
# waits, at most a minute, until the processes $2, $3 … have ended, and prints $1.
# The shell that was started ends at once, so no launcher waits for it.
AFTER = r"""
alive() {
  state=$(ps -o stat= -p "$1" 2>/dev/null || cut -d ' ' -f 3 "/proc/$1/stat" 2>/dev/null)
  case $state in ''|Z*) return 1;; esac
}
( trap '' INT TERM HUP
  said=$1; turns=0; shift
  for process; do
    while alive "$process" && [ $turns -lt 300 ]; do sleep 0.2; turns=$((turns + 1)); done
  done
  printf '%s\n' "$said" >&2 ) &
"""


def launchers() -> list[Any]:
    """The launchers above this process as `psutil.Process`, the nearest first; none without psutil, which comes with accelerate."""
    try:
        import psutil
    except ImportError:
        return []
    found = []
    try:
        for process in psutil.Process().parents():
            words = process.cmdline()[:5]
            if not any(Path(word).name in NAMES or word in MODULES for word in words):
                break
            found.append(process)
    except psutil.Error:
        pass
    return found


def environment() -> Mapping[str, str]:
    """The environment in which the command was typed: the outermost launcher's, which may have changed it for this process;
    without one, its own."""
    if found := launchers():
        import psutil

        try:
            return found[-1].environ()
        except (psutil.Error, OSError):
            pass
    return os.environ


def gone(found: list[Any]) -> bool:
    """Whether one of these launchers has ended: what it had started has another parent then."""
    import psutil

    try:
        return os.getppid() != found[0].pid or any(below.ppid() != above.pid for below, above in pairwise(found))
    except psutil.Error:
        return True


def say_last(text: str) -> None:
    """Print a line to stderr: at once, or below the last lines of the launchers that are about to end."""
    sys.stdout.flush()
    if found := launchers():
        command = ["/bin/sh", "-c", AFTER, "sh", text, *(str(process.pid) for process in found)]
        subprocess.run(command, stdin=subprocess.DEVNULL, start_new_session=True, check=False)
    else:
        print(text, file=sys.stderr, flush=True)


def hush() -> None:
    """Show nothing more of this process: what other packages print while it ends would bury its last line."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = open(os.devnull, "w")  # noqa: SIM115  until the process has ended
    sys.stdout = sys.stderr = nowhere
    _OPEN.append(nowhere)

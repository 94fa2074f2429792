"""A kill before each change of the disk, one after another: what survives them survives a kill at any moment between its steps."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Killed(BaseException):
    """What a process that was killed raises here instead of ending: no handler of errors may catch it."""


class _Disk:
    """Counts the changes below a folder (files opened to be written, renamed, removed; folders made, removed), and refuses those from
    one of them on: a dead process does not tidy up either. Python calls it before each of them (an audit hook, which stays for good)."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")

    def __init__(self) -> None:
        self.folder, self.left, self.fell = "", -1, False
        sys.addaudithook(self.before)

    def before(self, event: str, arguments: tuple) -> None:
        if self.left < 0 or not (event in self.CHANGES or (event == "open" and _writes(arguments))):
            return
        within = isinstance(arguments[0], int) or (
            event in ("os.remove", "os.rmdir") and arguments[-1] != -1
        )  # of a file or folder that is open
        if not within and not os.path.realpath(os.fsdecode(arguments[0])).startswith(self.folder):
            return
        if self.left == 0:
            self.fell = True
            raise Killed(f"before {event} {arguments[0]}")
        self.left -= 1


def _writes(arguments: tuple) -> bool:
    path, _, flags = arguments
    return not isinstance(path, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


_disk: list[_Disk] = []


def dies(action: Callable[[], object], below: Path, change: int) -> bool:
    """Do `action`, in this process alone, up to that change of the disk (0: the first) under the folder `below`. False: it had fewer."""
    if not _disk:
        _disk.append(_Disk())
    disk = _disk[0]
    disk.folder, disk.left, disk.fell = os.path.realpath(below), change, False
    try:
        action()
    except Killed:
        pass
    finally:
        disk.left = -1
    return disk.fell


def kills(action: Callable[[], object], below: Path) -> Iterator[int]:
    """Do `action` again and again, killed before its change 0, 1, 2 ..., until it ends by itself; hands out the number behind each kill.
    What is handed it must set up the next. Fails where nothing was killed."""
    change = 0
    while dies(action, below, change):
        yield change
        change += 1
    if not change:
        pytest.fail(f"{action} changes nothing below {below}")

"""A folder lock for one process, or one job of several. It names its holder and is released even when the holder is killed.

The lock is `flock` on `FOLDER/.lock`, which the kernel releases when the process ends, however it ends. The file names the holder. The
other processes of a job hold `FOLDER/.lock-RANK`, so that a job whose first process has ended is still seen. Jobs are told apart by their
launcher's address. Where there is no flock (Windows, some network folders), the file itself is the lock; it is stale when its holder is
gone from this machine, even if another process has its pid.

Why not filelock: it knows neither the holder, whom the message names, nor the other processes of a job.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokun.utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
LOCKS = re.compile(r"\.lock(-[0-9]+)?")  # of all ranks; other names with this beginning are a user's
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
WAIT = 5.0  # seconds to wait for a lock whose holder is gone (a child that it forked releases it as soon as it runs) or unknown


@dataclass
class _Held:
    descriptor: int
    times: int
    made: bool  # `hold` created the folder


_held: dict[str, _Held] = {}  # this process's locks, by path


class InUse(UserError):
    """Another process is using the folder."""


@contextmanager
def alone_in(folder: Path, *, option: str = "out", rank: int = 0) -> Iterator[None]:
    """Lock the folder within the block. See `hold`."""
    path = hold(folder, option=option, rank=rank)
    try:
        yield
    finally:
        release(path)


def hold(folder: Path, *, option: str = "out", rank: int = 0) -> Path:
    """Lock the folder for this process and return the lock's path, for `release`. A process may lock a folder several times.

    `rank` is this process's rank in its job, whose processes share the folder. `option` is the option that chooses another folder.
    Raises InUse (a UserError) naming the holder's process, host, command and start time.
    """
    path = folder.resolve() / (f"{NAME}-{rank}" if rank else NAME)
    if (own := _held.get(str(path))) is not None:
        own.times += 1
        return path
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, folder, option)
    except OSError as error:
        if error.errno in READ_ONLY:
            raise UserError(f"{folder} cannot be written ({error.strerror}): choose another folder with {option}") from error
        raise
    try:
        _write_holder(descriptor, folder)
    except BaseException:
        os.close(descriptor)
        raise
    _held[str(path)] = _Held(descriptor, 1, made)
    try:
        _refuse_other_jobs(path, folder, option)
    except BaseException:
        release(path)
        raise
    return path


def _refuse_other_jobs(own: Path, folder: Path, option: str) -> None:
    """Raise InUse if a process of another job holds a lock in the folder. Remove locks that nobody holds."""
    end = time.monotonic() + WAIT
    for path in sorted(path for path in own.parent.glob(f"{NAME}*") if LOCKS.fullmatch(path.name)):
        while path != own and (holder := _holder_of(path)) is not None and holder.get("job") != _job():
            if time.monotonic() > end:
                raise InUse(in_use(folder, holder, option))
            time.sleep(0.02)


def _holder_of(path: Path) -> dict[str, Any] | None:
    """The holder of a lock. If nobody holds it, remove its file and return None."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if fcntl is None:
            raise OSError("no flock here")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):
            os.unlink(path)
    except BlockingIOError:
        return _read(descriptor)
    except OSError:  # no flock on this disk
        holder = _read(descriptor)
        return holder if holder and not is_gone(holder) else None
    finally:
        os.close(descriptor)
    return None


def _job() -> str:
    """The job of this process: its launcher's address, or the process itself."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return f"{address}:{port}" if address and port else f"{socket.gethostname()}:{os.getpid()}"


def _write_holder(descriptor: int, folder: Path) -> None:
    """Write this process into the lock as its holder."""
    before = _read(descriptor)
    if before and before.get("host") != socket.gethostname():
        print(
            f"{folder} was left by process {before.get('pid')} on {before.get('host')}, which did not exit cleanly. If it still runs "
            "there (on some disks "
            "locks do not reach other machines), stop one of the two",
            file=sys.stderr,
        )
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(this_process()).encode())


def release(path: Path) -> None:
    """Release a lock of `hold`. When this process no longer holds it, remove its file, and also the folder if `hold` created it and it
    is empty: a command that only reported a mistake leaves nothing behind."""
    own = _held.get(str(path))
    if own is None:
        return
    own.times -= 1
    if own.times:
        return
    del _held[str(path)]
    try:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is held: a waiting process checks again (`_locked`)
            if own.made:
                path.parent.rmdir()  # refused if it is not empty
    finally:
        os.close(own.descriptor)


def _locked(path: Path, folder: Path, option: str) -> int:
    end = time.monotonic() + WAIT
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # its holder may have exited and removed an empty folder
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder was removed just now
            if time.monotonic() > end:
                raise
            continue
        try:
            if fcntl is None:
                raise OSError("no flock here")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(descriptor)
            os.close(descriptor)
            # unknown: another process of this job is checking the lock, or its holder is just signing
            if (not holder or is_gone(holder)) and time.monotonic() < end:
                time.sleep(0.02)
                continue
            raise InUse(in_use(folder, holder, option)) from None
        except OSError:  # no flock on this disk
            holder = _read(descriptor)
            if holder and not is_gone(holder):
                os.close(descriptor)
                raise InUse(f"{in_use(folder, holder, option)}. If that process no longer runs, delete {path}") from None
            return descriptor
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its holder exited and removed it meanwhile


def in_use(folder: object, holder: dict[str, Any], option: str) -> str:
    who = (
        f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')} ({holder.get('command')})"
        if holder
        else "another process"
    )
    return f"{folder} is in use by {who}: wait until it ends, stop it, or choose another folder with {option}"


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that no longer runs: its pid is free, or was given to another process since."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    # another container or machine of the same name, or this one before it was restarted
    if holder.get("machine", _machine()) != _machine():
        return False
    now = _started(holder["pid"])  # "" for one that is free, and for another user's where /proc is hidden
    if now and "started" in holder and holder["started"] != now:
        return True
    if holder["pid"] == os.getpid():
        return not holder.get("started")  # else it is this very process
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):  # no system has such a number
        return True
    except OSError:
        return False
    return False


def this_process() -> dict[str, Any]:
    command = shlex.join([os.path.basename(sys.executable or "python"), *sys.argv])
    return {
        "pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname(), "machine": _machine(),
        "job": _job(), "command": command[:300], "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def _machine() -> str:
    """The running system and the set of process ids that this process sees, on Linux; "" elsewhere. A pid means something only within
    it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in ticks since the system's start, on Linux; "" elsewhere and for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, 1 << 16))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _close_in_child() -> None:
    """In a forked child: close the lock, which is the parent's alone and would otherwise outlive it."""
    for own in _held.values():
        with contextlib.suppress(OSError):
            os.close(own.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)

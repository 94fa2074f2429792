"""Atomic writes: directories are written aside and renamed, also in a background thread; trainer states by step, the best checkpoints,
stage records.

Knows folders and names. All it knows of their contents is that tensors keep changing during training: `snapshot` copies them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tokun.utils.errors import UserError, first_line
from tokun.utils.files import fsync, write_text


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`. It replaces `target` when the block succeeds; otherwise nothing changes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(target)
    aside, old = target.with_name(target.name + ".partial"), _old(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    yield aside
    sync(aside)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(aside, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def write_errors_reported(say: Callable[[str], None], target: Path) -> Iterator[None]:
    """Report a failed write within the block and carry on: a disk that is full for a while does not end the run."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if its writer cannot write
        shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
        say(f"could not write {target} ({error}): going on, will try again later")


def require_writable(folder: Path, *, option: str = "out") -> None:
    """Create the folder and check that a file can be written in it. Raises UserError with the reason."""
    probe = folder / f".writable-{socket.gethostname()}-{os.getpid()}"  # several processes may ask at once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{option}={folder} cannot be written ({error.strerror or error}): choose another folder with {option}=…"
        ) from error


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError when the disk of `folder` has fewer than `needed` bytes free, before hours of work are lost."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:.2f} GiB left, the trainer states alone need {needed / 2**30:.2f} GiB: "
            "free some, choose another disk with out=…, or keep fewer states (train.keep_last)"
        )


def sync(folder: Path) -> None:
    """Flush every file below `folder` to disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def require_safetensors(folder: Path) -> None:
    """Raise UserError when the weights are a pickle: by content, or by name where there is no safetensors file."""
    weights = sorted(folder.glob("*.safetensors"))
    pickled = [path for path in weights if is_pickle(path)]
    if not weights:
        pickled = [path for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
    if pickled:
        raise UserError(
            f"{pickled[0]} is a pickle, which can run any code when it is read: only safetensors are read here. "
            "Get a safetensors copy of the checkpoint, "
            "or, if you trust it, convert its weights with safetensors.torch.save_file"
        )


def is_pickle(path: Path) -> bool:
    """Whether `torch.save` or `pickle.dump` wrote the file. Safetensors begin with eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] != b"{" and (head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"))


def remove_partial(folder: Path) -> None:
    """Remove directories in `folder` that a killed process left half written."""
    for path in folder.glob("*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def recover_directory(target: Path) -> None:
    """Restore the old folder if a run was killed between the two renames of `whole_directory`."""
    old = _old(target)
    if old.exists() and not target.exists():
        os.rename(old, target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")  # hidden: a user's own copy beside it may be called target.old


def snapshot(tree: Any) -> Any:
    """The same tree of dicts, lists and tuples with every tensor copied to the CPU. Tensors that share storage still do."""
    copies: dict[Any, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, dict):
            return {k: copied(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(copied, value))
        return value

    return copied(tree)


class Writer:
    """Writes whole directories in a background thread, one at a time and in order. A failed write is reported, not raised.

    The data must not change meanwhile: pass a `snapshot`. The process waits for the thread before it exits.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.pool, self.pending = say, ThreadPoolExecutor(1, thread_name_prefix="tokun-writer"), Future[None]()
        self.pending.set_result(None)

    def put(self, target: Path, write: Callable[[Path], object], then: Callable[[], object]) -> None:
        """Let `write(folder)` fill what becomes `target`, then call `then`. Waits for the previous write: at most one is pending."""
        self.wait()
        self.pending = self.pool.submit(self._write, target, write, then)

    def _write(self, target: Path, write: Callable[[Path], object], then: Callable[[], object]) -> None:
        with write_errors_reported(self.say, target), whole_directory(target) as folder:
            write(folder)
        then()

    def wait(self) -> None:
        """Wait until everything is on disk. Re-raises errors of the thread, except failed writes."""
        self.pending.result()

    def close(self) -> None:
        self.pool.shutdown()


def read_part(path: Path, **options: Any) -> Any:
    """Read a file of a trainer state: JSON, or `torch.load` with these options. Raises UserError if it is damaged."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        return torch.load(path, weights_only=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, FileNotFoundError) as error:  # a truncated file
        raise UserError(
            f"the trainer state {path.parent} is damaged ({path.name}: {type(error).__name__}: {first_line(error, 200)}). It was "
            "intact when it was written: check the disk. Delete it, and the same command resumes from the previous state, "
            "or from the beginning"
        ) from error


class TrainerStates:
    """`folder/step-00000500/`: what a stage needs to resume from step 500. The last `keep` are kept."""

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder, self.keep = folder, max(1, keep)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := re.fullmatch(r"step-(\d{8})", p.name)))

    def latest(self) -> int | None:
        return self.steps()[-1] if self.steps() else None

    def prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class BestCheckpoints:
    """`folder/step-00000400/`: the `keep` checkpoints of lowest loss, each with a record of its step, loss and settings."""

    RECORD = "best.json"

    def __init__(self, folder: Path, *, keep: int):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def records(self) -> list[dict[str, Any]]:
        """Records of the checkpoints on disk, best first."""
        found = [read_record(path / self.RECORD) for path in self.folder.glob("step-????????")]
        return sorted((r for r in found if r is not None), key=lambda r: (r["loss"], r["step"]))

    def wants(self, step: int, loss: float) -> bool:
        """Whether this checkpoint is among the `keep` best. Ties go to the earlier one."""
        better = [r for r in self.records() if r["step"] != step and (r["loss"], r["step"]) < (loss, step)]
        return math.isfinite(loss) and len(better) < self.keep

    @contextmanager
    def put(self, step: int, loss: float, settings: dict[str, Any]) -> Iterator[Path]:
        """Yield a folder to fill. After the block it is among the best, and checkpoints that no longer are get deleted."""
        with whole_directory(self.path(step)) as folder:
            yield folder
            write_record(folder / self.RECORD, {"step": step, "loss": loss, "settings": settings})
        for record in self.records()[self.keep :]:
            shutil.rmtree(self.path(record["step"]), ignore_errors=True)


# --- stage records --------------------------------------------------------------------------------------------------


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a finished stage, or None if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def require_same(path: Path, made_with: dict[str, Any], asked: dict[str, Any], *, option: str = "out") -> None:
    """Raise UserError naming the settings in which a result on disk differs from those requested. `option` chooses another folder."""
    old, new = _flatten(made_with), _flatten(asked)
    differing = [f"{k}: {_difference(k, old.get(k), new.get(k))}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if differing:
        shown = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
        raise UserError(
            f"{path} was made with other settings ({shown}). Choose another folder with {option}=…, "
            f"restore the old settings, or delete {path}"
        )


def _difference(name: str, old: Any, new: Any) -> str:
    if name.rpartition(".")[2] in OF_FILES and old and new:
        return "the files are not those that it was made with"
    return f"{old!r} there, {new!r} here"


OF_FILES = {"shards", "pairs", "files"}  # settings that are recorded as `files_fingerprint`


def files_fingerprint(paths: list[Path]) -> str:
    """A short digest of names and sizes: enough to notice other shards without reading them."""
    text = "\n".join(f"{p.name} {p.stat().st_size}" for p in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{name}" if prefix else str(name)).items()}

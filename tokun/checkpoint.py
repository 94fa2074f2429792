"""Files that are whole or not there: directories written aside and renamed, trainer states by step, stage records.

Knows folders and names, never what is inside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well it takes target's place, else nothing changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    yield aside
    sync(aside)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(aside, target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


SAVE_ERRORS = (OSError, RuntimeError)  # torch.save raises RuntimeError where its writer cannot write


@contextmanager
def survived(say: Callable[[str], None], target: Path) -> Iterator[None]:
    """Within the block a write that fails is told and forgotten: a run does not end because its disk is full for a while."""
    try:
        yield
    except SAVE_ERRORS as error:
        shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
        say(f"could not write {target} ({error}): going on, and trying again later")


def require_writable(folder: Path) -> None:
    """Make the folder, and a file in it. Raises ValueError with the reason where that cannot be."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out={folder} cannot be written ({error.strerror or error}): choose another folder with out=…") from error


def require_space(folder: Path, needed: int) -> None:
    """Raise ValueError when the disk of `folder` has less than `needed` bytes left, before hours are spent."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 2**30:.2f} GiB left, the trainer states alone need {needed / 2**30:.2f} GiB: "
            "free some, choose another disk with out=…, or keep fewer states (train.keep_last)"
        )


def sync(folder: Path) -> None:
    """Until every file below `folder` is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def recover_directory(target: Path) -> None:
    """Put back the old folder when a run was killed between the two renames of `whole_directory`."""
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        os.rename(old, target)


def write_text(path: Path, text: str) -> None:
    """Write a small file aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    _fsync(aside)
    os.replace(aside, path)


class TrainerStates:
    """`folder/step-00000500/`: what a stage needs to go on from step 500. The last `keep` are kept."""

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


# --- stage records --------------------------------------------------------------------------------------------------


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record that a finished stage left, or None. A broken record counts as none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None


def require_same(path: Path, made_with: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError naming every setting in which a result on disk differs from what is asked for now."""
    old, new = _flatten(made_with), _flatten(asked)
    differing = [f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if differing:
        shown = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
        raise ValueError(
            f"{path} was made with other settings ({shown}). Choose another folder with out=…, set them back, or delete {path}"
        )


def files_fingerprint(paths: list[Path]) -> str:
    """A short digest of names and sizes: enough to notice that the shards are others, without reading them."""
    text = "\n".join(f"{p.name} {p.stat().st_size}" for p in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{name}" if prefix else str(name)).items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Experiment tracking: Weights & Biases (online or offline), TensorBoard, or nothing.

One interface for all three. Knows numbers, pictures and words; knows no model and no loop. Tracking never ends a
training run: failed calls (network, full disk) are counted, and the first gives a warning.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import secrets
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokun.utils.errors import UserError, first_line
from tokun.utils.files import write_text
from tokun.utils.optional_packages import need

KINDS = ("wandb", "tensorboard", "none")
WANDB_ID_FILE = "wandb_id.txt"
LONGEST_CAPTION = 4000  # characters; longer than any caption, shorter than what a tracker's server refuses


class Tracker:
    """The interface. A subclass overrides `_write_*` and `_close`, and lists the exceptions that do not end a run.

    `step` is the training step of the values; logging a step again, as a resumed run does, loses nothing.
    """

    run_id: str | None = None  # for a later `make_tracker(resume_id=...)`, if the tracker has ids
    failures = 0  # calls that did not reach the tracker
    quiet = False  # whether failures go unreported
    survivable: tuple[type[Exception], ...] = (OSError,)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log numbers by name. Values are anything that `float` takes, such as a tensor of one element."""
        numbers = {name: float(value) for name, value in metrics.items()}
        with self._surviving(f"the metrics of step {step}"):
            self._write_numbers(numbers, step)

    def log_image(self, name: str, image: Image.Image, *, step: int, caption: str = "") -> None:
        """Log one picture with its caption."""
        with self._surviving(f"the picture {name!r} of step {step}"):
            self._write_pictures({name: (image, _safe(caption))}, {}, step)

    def log_grid(self, name: str, grid: Image.Image, images: Sequence[Image.Image], captions: Sequence[str], *, step: int) -> None:
        """Log the whole page as one picture `name`, and each picture with its caption as `name/pairs`.

        Raises UserError if the numbers of pictures and captions differ.
        """
        if len(images) != len(captions):
            raise UserError(f"{len(images)} pictures but {len(captions)} captions for {name!r}: give each picture one")
        captions = [_safe(caption) for caption in captions]
        listing = _safe("\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, start=1)))
        with self._surviving(f"the grid {name!r} of step {step}"):
            self._write_pictures({name: (grid, listing)}, {f"{name}/pairs": list(zip(images, captions))}, step)

    def finish(self, *, stopped: bool = False) -> None:
        """Write what is pending and close. Prints how many calls failed, if any, unless the run was stopped.

        A launcher that is asked to stop ends the tracker's own processes first.
        """
        self.quiet = stopped
        with self._surviving("the end of the run"):
            self._close()
        if self.failures and not stopped:
            print(f"tracking: {self.failures} calls failed; their data is missing from the run")

    def _write_numbers(self, numbers: dict[str, float], step: int) -> None: ...

    def _write_pictures(
        self, single: dict[str, tuple[Image.Image, str]], listed: dict[str, list[tuple[Image.Image, str]]], step: int
    ) -> None: ...

    def _close(self) -> None: ...

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except self.survivable as error:
            self.failures += 1
            if self.failures == 1 and not self.quiet:
                warnings.warn(
                    f"{type(self).__name__} could not write {what}: {type(error).__name__}: {error}. "
                    "Training continues; further failures are only counted.",
                    RuntimeWarning,
                    stacklevel=4,
                )


class NullTracker(Tracker):
    """Accepts everything and writes nothing: for all but the main process, and for untracked runs."""


class WandbTracker(Tracker):
    """A Weights & Biases run. Online if a key is found, else offline; respects WANDB_MODE; never asks for a key.

    The run's id is stored in `directory/wandb_id.txt`, so that the next start in the same directory continues the run.
    `step` is logged as a metric and used as the axis of all others: W&B drops values if its own step counter goes
    backwards, as when a run resumes from a checkpoint older than its last log.
    """

    def __init__(self, *, project: str, name: str | None, directory: Path, config: dict, resume_id: str | None = None):
        self._wandb = wandb = need("wandb", extra="train")
        self.survivable = _wandb_failures(wandb)
        directory.mkdir(parents=True, exist_ok=True)
        id_file = directory / WANDB_ID_FILE
        known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else ""
        self.run_id = resume_id or known or secrets.token_hex(4)
        write_text(id_file, self.run_id + "\n")  # whole: half an id would start another run

        def start(mode: str):
            # quiet: its banner repeats our line. Offline it prints nothing else; online it reports a lost network
            settings = wandb.Settings(quiet=True, silent=mode == "offline")
            run: dict[str, Any] = {"project": project, "name": name, "id": self.run_id, "config": _plain(config)}
            return wandb.init(**run, dir=str(directory), resume="allow", mode=mode, settings=settings)

        mode, reason = _wandb_mode(wandb)
        try:
            self._run = start(mode)
        except self.survivable as error:
            if mode != "online":
                raise
            mode, reason = "offline", f"online failed: {first_line(error)}"
            wandb.teardown()  # its service still holds the id of the run that failed to start
            self._run = start(mode)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            # one folder per start of the run: the shell expands the pattern, so it is outside the quotes
            parts = f"{shlex.quote(str(Path(self._run.dir).parent.parent))}/offline-run-*-{self.run_id}"
            print(
                f"W&B offline ({reason}), run {self.run_id}; nothing is sent, and tracking.kind=none keeps no log at all; "
                f"upload it with: wandb sync {parts}"
            )
        else:
            print(f"W&B {mode} ({reason}), run {self.run_id}" + (f": {self._run.url}" if mode == "online" else ""))

    def _write_numbers(self, numbers: dict[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def _write_pictures(self, single, listed, step: int) -> None:
        def wrapped(pair: tuple[Image.Image, str]):
            return self._wandb.Image(pair[0], caption=pair[1])

        pictures = {name: wrapped(pair) for name, pair in single.items()}
        lists = {name: [wrapped(pair) for pair in of_one_size(pairs)] for name, pairs in listed.items()}
        self._run.log({**pictures, **lists, "step": step})

    def _close(self) -> None:
        if self.quiet:
            logging.getLogger("asyncio").setLevel(logging.ERROR)  # which warns of each line that its service no longer reads
        self._run.finish()


def of_one_size(pairs: Sequence[tuple[Image.Image, str]]) -> list[tuple[Image.Image, str]]:
    """The pictures in the middle of white ones as large as the largest: W&B distorts a list of several shapes."""
    size = max((picture.width for picture, _ in pairs), default=0), max((picture.height for picture, _ in pairs), default=0)

    def padded(picture: Image.Image) -> Image.Image:
        if picture.size == size:
            return picture
        white = Image.new(picture.mode, size, "white")
        white.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
        return white

    return [(padded(picture), caption) for picture, caption in pairs]


class TensorBoardTracker(Tracker):
    """Event files in `directory`. A caption is a text with the same tag as its picture.

    The file is opened at the first log, with that step as `purge_step`: TensorBoard then hides what an interrupted run
    had logged from that step on, and a resumed run shows one value per step.
    """

    def __init__(self, *, name: str | None, directory: Path, config: dict):
        need("tensorboard", extra="train")  # torch would only report a missing module
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._SummaryWriter, self._directory, self._writer = SummaryWriter, directory, None
        self._about = json.dumps({"name": name, **_plain(config)}, indent=2, ensure_ascii=False)
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(directory))}")

    def _at(self, step: int):
        if self._writer is None:
            self._writer = self._SummaryWriter(str(self._directory), purge_step=step)
            indented = "\n".join("    " + line for line in self._about.splitlines())  # Markdown for verbatim text
            self._writer.add_text("config", indented, step)
        return self._writer

    def _write_numbers(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._at(step).add_scalar(name, value, step)

    def _write_pictures(self, single, listed, step: int) -> None:
        numbered = {f"{name}/{k:02d}": pair for name, pairs in listed.items() for k, pair in enumerate(pairs)}
        for name, (image, caption) in {**single, **numbered}.items():
            self._at(step).add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            if caption:
                self._at(step).add_text(name, caption, step)
        self._at(step).flush()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def make_tracker(
    kind: str,
    *,
    project: str,
    name: str | None,
    directory: Path | str,
    config: dict,
    resume_id: str | None = None,
    main_process: bool = True,
) -> Tracker:
    """A tracker of kind 'wandb', 'tensorboard' or 'none'; always a NullTracker outside the main process.

    `directory` holds the run's files and is created if needed. `config` is the settings to show; values that JSON
    cannot represent are shown as text. `resume_id` takes precedence over the W&B id of an earlier run in `directory`.
    Raises UserError for another kind, ImportError naming the extra if the package is missing.
    """
    if kind not in KINDS:
        raise UserError(f"unknown tracker {kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "none" or not main_process:
        return NullTracker()
    directory = Path(directory)
    if kind == "tensorboard":
        return TensorBoardTracker(name=name, directory=directory, config=config)
    return WandbTracker(project=project, name=name, directory=directory, config=config, resume_id=resume_id)


def _safe(caption: str) -> str:
    """Text that every tracker can encode and store: lone surrogates and nulls become U+FFFD; very long text is truncated."""
    caption = "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in caption[: LONGEST_CAPTION + 1])
    return caption if len(caption) <= LONGEST_CAPTION else caption[: LONGEST_CAPTION - 1] + "…"


def _plain(config: Mapping) -> dict:
    return json.loads(json.dumps(config, default=str))


def _wandb_mode(wandb) -> tuple[str, str]:
    """The mode to start in, and why. Decided here, because `wandb.init` asks for a key on a terminal."""
    wished = os.environ.get("WANDB_MODE")
    if wished and wished not in ("online", "run"):  # "run" and "dryrun" are old names
        return ("offline" if wished == "dryrun" else wished), f"WANDB_MODE={wished}"
    if not wished and (configured := wandb.setup().settings.mode) not in ("online", "run", None):
        return ("offline" if configured == "dryrun" else configured), "as in the W&B settings"
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:
            key = wandb.login(prompt=False)
        else:  # before W&B 0.31 `login` always asks; this looks in the same places without asking
            key = wandb.api.api_key
    except wandb.errors.Error as error:
        return "offline", f"the key could not be used: {first_line(error)}"
    return ("online", "a key was found") if key else ("offline", "no key: `wandb login` or WANDB_API_KEY gives one")


def _wandb_failures(wandb) -> tuple[type[Exception], ...]:
    """W&B's errors, the system's (full disk, lost service or network), and those of W&B's service mailbox."""
    mailbox = sys.modules.get("wandb.sdk.mailbox")
    names = ("HandleAbandonedError", "MailboxClosedError")
    return (wandb.errors.Error, OSError, *(getattr(mailbox, name) for name in names if hasattr(mailbox, name)))

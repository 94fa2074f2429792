"""The training loop: batch, step, log, evaluate, stop, save, sample.

A kind of training is a subclass of `Stage`. Its constructor creates model, optimizer and data; its hooks define a step, and what is logged,
evaluated and saved. `train(stage)` does the rest: it resumes, follows the schedule and the clock, writes trainer states, and stops on
request. The hooks read `self.step` (steps done; within `take_step` the number of this step), `self.window` and `self.clock`.

    class Distilling(Stage):                        # or EngineStage (distributed_stage.py), with engine, average and trainer states
        name = "distilling"
        def describe(self): ...                     # the line logged at the start
        def batches(self, start): ...               # an iterator, from step `start` on
        def take_step(self, batch, lr): ...         # forward, backward, update
        def figures(self): ...                      # what is logged (step_log.py)
        def snapshot(self): ...                     # a trainer state …
        def restore(self, folder): ...              # … and back

Batches sampled from the model itself (reinforcement learning) come from a generator function: the loop asks for a batch only after the
previous step has changed the weights, unless `batches` wraps it in `data.prefetch`. For exact resume, a batch and a step must be
functions of the weights and of `step_seed(seed, step, rank)` alone: seed torch's generators with it before drawing anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from tokun.models.partitioned_parameters import collective_device, own_share
from tokun.training import optim
from tokun.training.run import Run
from tokun.training.step_log import Window, log_step
from tokun.utils import checkpoint
from tokun.utils.errors import Diverged


@dataclass(frozen=True)
class Schedule:
    """Length of a training, learning rate, and intervals. Intervals are in steps, 0: never."""

    steps: int
    lr: float
    warmup_steps: int
    log_every: int
    save_every: int
    eval_every: int = 0
    sample_every: int = 0
    max_minutes: float = 0.0
    min_lr_ratio: float = 0.05
    lr_hold: float = 0.0

    @classmethod
    def of(cls, section: Any, **changes: Any) -> Schedule:
        """From a section of the config with settings of these names, such as `train`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(section, name) for name in names if hasattr(section, name)} | changes)

    def lr_at(self, step: int, done: float) -> float:
        """The learning rate of a step, when the share `done` of the training is complete."""
        return self.lr * optim.warmup_cosine(step, progress=done, warmup=self.warmup_steps, min_ratio=self.min_lr_ratio, hold=self.lr_hold)

    def stopped_by(self, step: int) -> str:
        """What ended a training after `step` steps, as in its record."""
        return "steps" if step >= self.steps else f"max_minutes {self.max_minutes:g}"

    def ended(self, step: int) -> str:
        """The words for the end of a training after `step` steps."""
        if step >= self.steps:
            return f"finished after {step:,} steps"
        return f"finished after {step:,} of {self.steps:,} steps ({self.stopped_by(step)})"


class Clock:
    """Seconds of training, including earlier starts (`before`)."""

    def __init__(self, before: float = 0.0) -> None:
        self.before, self.start = before, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start


class Stage(ABC):
    """One kind of training, as `train` sees it. Each process has its own, and each hook is called in all processes together."""

    name: ClassVar[str]  # in log lines and errors; with underscores, the folder of its trainer states

    def __init__(self, run: Run, schedule: Schedule) -> None:
        self.run, self.schedule = run, schedule
        self.step, self.clock, self.window = 0, Clock(), Window()

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_")

    @abstractmethod
    def describe(self) -> str:
        """The line logged before the first step: sizes of model and data."""

    @abstractmethod
    def batches(self, start: int) -> Generator[Any, None, None]:
        """The batches of steps `start`, `start + 1`, …; closed when the training ends."""

    @abstractmethod
    def take_step(self, batch: Any, lr: float) -> None:
        """Forward, backward, update."""

    @abstractmethod
    def figures(self) -> tuple[dict[str, float], str]:
        """Figures of the last step and of `self.window`: metrics by name, and a short text for the progress bar."""

    @abstractmethod
    def snapshot(self) -> Callable[[Path], object]:
        """Copy the contents of a trainer state; returns a function that writes the copies into a folder.

        Only the first process calls it, in the background.
        """

    @abstractmethod
    def restore(self, folder: Path) -> float:
        """Resume from such a folder. Returns the seconds spent until then. Raises UserError if its settings differ."""

    def measure_start(self) -> str:
        """Measure and log before the first step of a training; not called where it is resumed. Returns a line to print; "" for none."""
        return ""

    def evaluate(self) -> str:
        """Evaluate and log the result. Returns a line to print; "" for none."""
        return ""

    def sample(self) -> None:
        """Draw samples and log them, if the schedule has `sample_every`."""
        raise NotImplementedError(f"{self.name} does not draw samples")

    def disk_bytes(self) -> int:
        """Disk space that trainer states and the like will need."""
        return 0

    def batch_keys(self) -> Sequence[str]:
        """The keys of this step's batch, for the report of a non-finite loss."""
        return []

    def require_finite(self, value: Tensor | float, **what: str) -> None:
        """Raise Diverged if the loss of this step (or the value named `what`) is not finite."""
        require_finite(self.run, value, self.step, self.name, self.batch_keys, **what)


def train(stage: Stage) -> None:
    """Run the stage, from its last trainer state to the end of its schedule.

    Raises Preempted when the run was asked to stop (after it has saved), Diverged for a non-finite loss, UserError for a
    trainer state with other settings or too little disk space. All writes are complete when it returns or raises.
    """
    run, schedule = stage.run, stage.schedule
    states = run.states(stage.folder)
    _resume(stage, states)
    run.say(f"{stage.name}: {stage.describe()}")
    if run.rank == 0:
        checkpoint.require_space(run.out, stage.disk_bytes())
    if stage.step == 0 and (line := stage.measure_start()):
        run.say(f"{stage.name}: {line}")
    bar = tqdm(
        total=schedule.steps, initial=stage.step, desc=stage.name, unit="step", disable=run.rank != 0, dynamic_ncols=True, mininterval=0.5
    )
    try:
        stage.window = Window()
        with bar, contextlib.closing(stage.batches(stage.step)) as batches:
            while (done := share_done(run, schedule, stage.step, stage.clock.seconds())) < 1:
                began = time.monotonic()
                batch = next(batches)
                stage.window.waited += time.monotonic() - began
                stage.take_step(batch, schedule.lr_at(stage.step, done))
                stage.step += 1
                stage.window.steps += 1
                bar.update(1)
                _after_step(stage, states, bar)
    finally:
        run.writer.wait()


def _resume(stage: Stage, states: checkpoint.TrainerStates) -> None:
    spent = 0.0
    if (latest := states.latest()) is not None:
        spent = stage.restore(states.path(latest))
        stage.step = latest
        stage.run.say(f"{stage.name}: resuming at step {latest}")
    stage.clock = Clock(spent)


def _after_step(stage: Stage, states: checkpoint.TrainerStates, bar: tqdm) -> None:
    """Do what is due after a step. A trainer state is saved after the evaluation, so that a resumed run does not repeat it."""
    run, schedule, step = stage.run, stage.schedule, stage.step

    def due(every: int) -> bool:
        return every > 0 and step % every == 0

    if due(schedule.log_every) or step == 1:
        log_step(stage, bar)
    if due(schedule.eval_every):
        line = stage.evaluate()
        if line and run.rank == 0:
            bar.write(f"  step {step}: {line}")
        stage.window = Window()
    run.stop_if_asked(lambda: save(stage, states))
    if due(schedule.save_every):
        save(stage, states)
    if due(schedule.sample_every):
        stage.sample()
        stage.window = Window()


def save(stage: Stage, states: checkpoint.TrainerStates) -> None:
    """Write a trainer state of this step in the writer's thread."""
    run = stage.run
    run.writer.wait()  # before copying: only one set of copies is kept in memory
    write = stage.snapshot()
    if run.rank == 0:
        run.writer.put(states.path(stage.step), write, then=states.prune)


def share_done(run: Run, schedule: Schedule, step: int, seconds: float) -> float:
    """The completed share of the training, 0..1: by steps, or by time if that runs out first (the same in all processes)."""
    done = step / schedule.steps
    if schedule.max_minutes > 0:
        elapsed = torch.tensor(seconds / (60 * schedule.max_minutes))
        if run.world > 1:
            elapsed = elapsed.to(collective_device())
            dist.broadcast(elapsed, 0)
        done = max(done, elapsed.item())
    return done


@contextlib.contextmanager
def averaged(module: nn.Module, ema: optim.Ema, refresh: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block the module has its averaged weights; its own are restored on exit. `refresh` is called after both changes."""
    trained = {name: p for name, p in module.named_parameters() if name in ema.shadow}
    own = {name: own_share(p).detach().clone() for name, p in trained.items()}
    ema.copy_to(module)
    refresh()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in trained.items():
                own_share(p).copy_(own[name])
        refresh()


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one process for one step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def seed_device(seed: int, device: torch.device) -> None:
    """torch.manual_seed for the CPU and this device only: the original seeds every kind of device, which takes most of a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def require_finite(run: Run, value: Tensor | float, step: int, stage: str, keys: Callable[[], Sequence[str]], what: str = "loss") -> None:
    """If the value is not finite, write the batch's keys into the run's folder and raise Diverged."""
    value = float(value.detach()) if isinstance(value, Tensor) else value
    if not math.isfinite(value):
        listed = run.out / f"non_finite_{stage.replace(' ', '_')}_step{step}_rank{run.rank}.json"
        checkpoint.write_text(listed, json.dumps(list(keys()), indent=1))
        raise Diverged(
            f"{stage}: the {what} is {value} at step {step}. The batch's keys are in {listed}. The last trainer state is intact: "
            "start again with a lower learning rate (lr), a smaller max_grad_norm, or in full precision (precision=no)"
        )


def batches_keys(batches: Any, step: int) -> list[str]:
    """The keys of the samples in a step's batch of `data.ImageBatches` or `data.TokenBatches`."""
    return [batches.samples.index.key(batches.order[position]) for position in batches.positions(step)]

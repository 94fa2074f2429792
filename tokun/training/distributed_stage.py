"""A stage whose model trains under an `Engine`: averaged weights, gradient spikes, trainer states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tokun.config import SamplingConfig
from tokun.inference.folders import ABOUT, SAMPLING
from tokun.models.generator import uncompiled
from tokun.training import health, optim, step_log
from tokun.training.engine import Engine
from tokun.training.loop import Schedule, Stage, averaged
from tokun.training.resume_settings import AVERAGE_KEYS, figures_line, require_same, require_same_but_retry, stopped_early
from tokun.training.run import Run
from tokun.utils import checkpoint


def result_folder(run: Run) -> Path:
    """Where a trained generator is written: `out/checkpoint`; with `adapter.rank`, `out/adapter`."""
    return run.out / ("adapter" if run.config.adapter.rank else "checkpoint")


def is_finished(run: Run, name: str, target: Path, settings: dict[str, Any], *, but: Set[str] = frozenset()) -> bool:
    """Whether the stage `name` has already written `target` with the same settings (`but`: training settings that may differ); its trainer
    states are then removed. Raises UserError if it was written with others."""
    run.recover(target)
    record = checkpoint.read_record(target / "training.json")
    if record is None:
        return False
    require_same(target, record["settings"], settings, but=but)
    differs = stopped_early(record, run.config.train, target) + other_sampling(target, run.config.sampling)
    run.say(f"{name}: {target} already exists and matches{differs}")
    run.remove_states(name)
    return True


def other_sampling(target: Path, asked: SamplingConfig) -> str:
    """The message for a finished checkpoint or adapter whose sampling defaults differ from `asked`; the stage is not repeated."""
    path = target / (ABOUT if (target / ABOUT).is_file() else SAMPLING)
    own = (checkpoint.read_record(path) or {}).get("defaults", {})
    differ = [
        f"{key} {own[key]}, not {value}"
        for key, value in asdict(asked).items()
        if key in own and key not in ("n", "seed") and own[key] != value
    ]
    if not differ:
        return ""
    return (
        f". It keeps its own sampling defaults: {'; '.join(differ)}. "
        f"To change them, edit {path}, or give others when you sample (tokun sample --help)"
    )


class EngineStage(Stage):
    """A subclass creates the model and its engine and calls `super().__init__`.

    Its `take_step` runs forward and backward passes, then `update`.

    A trainer state is engine.pt (weights and optimizer, for any engine and number of processes), ema.pt (with an average) and state.json.
    """

    def __init__(self, run: Run, schedule: Schedule, *, model: Any, engine: Engine, settings: dict[str, Any], average: bool = True) -> None:
        """settings: as in the stage's record; a trainer state with others is refused. `average`: whether to average the weights."""
        super().__init__(run, schedule)
        train = self.train = run.config.train
        self.model, self.engine, self.settings = model, engine, settings
        self.ema = optim.Ema(model, train.ema_decay, every=train.ema_every) if average else None
        self.spikes = health.Spikes(train.spike_factor)
        self.held_before: dict[str, float] = {}  # held-out figures before the first step, where they were measured
        self.logged: dict[str, float] = {}  # figures of the last step that was logged

    def start_measured(self, held: dict[str, float]) -> str:
        """Keep and log the held-out figures from before the first step. Returns a line with these figures."""
        self.held_before = held
        self.run.tracker.log({f"val/{name}": value for name, value in held.items()}, step=0)
        return f"held out before training: {figures_line(held)}"

    def update(self) -> float:
        """Clip the gradients and take the optimizer's step, or skip a spike.

        Returns the norm before clipping. Raises Diverged if it is not finite.
        """
        norm = self.engine.norm()
        self.require_finite(norm, what="gradient norm")
        if self.spikes.is_spike(norm):
            self.engine.skip()
        else:
            self.engine.step()
            if self.ema is not None:
                self.ema.update(self.model)
        return norm

    def update_figures(self, norm: float, lr: float, *, items: int) -> dict[str, float]:
        """What is logged of the last update. `items`: how many the data holds."""
        epoch = self.step * self.train.batch_size / items
        return step_log.of_update(lr=lr, norm=norm, spikes=self.spikes.count, epoch=epoch, device=self.engine.device)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, and its layers run uncompiled."""
        assert self.ema is not None
        with averaged(self.model, self.ema, self.engine.refresh), uncompiled(self.model):
            yield

    def take_average(self) -> None:
        """Replace the model's weights by their average."""
        assert self.ema is not None
        self.ema.copy_to(self.model)
        self.engine.refresh()

    def record(self, **more: Any) -> dict[str, Any]:
        """What `training.json` holds of every such stage, with what it holds of this one."""
        return {
            "settings": self.settings, "steps": self.step, "stopped_by": self.schedule.stopped_by(self.step),
            "seconds": round(self.clock.seconds()), "train": self.logged,
            **({"val_before": self.held_before} if self.held_before else {}), **more,
        }  # fmt: skip

    def snapshot(self) -> Callable[[Path], object]:
        parts = {"engine.pt": self.engine.state()}  # all processes gather, the first writes
        if self.ema is not None:
            average = self.ema.state_dict()
            parts["ema.pt"] = checkpoint.snapshot(average) if self.run.rank == 0 else average
        record = {
            "settings": self.settings, "spent": self.clock.seconds(), "world": self.run.world, "spikes": self.spikes.state_dict(),
            **({"held_before": self.held_before} if self.held_before else {}),
        }  # fmt: skip

        def write(folder: Path) -> None:
            for name, part in parts.items():
                torch.save(part, folder / name)
            checkpoint.write_record(folder / "state.json", record)

        return write

    def restore(self, folder: Path) -> float:
        saved = checkpoint.read_part(folder / "state.json")
        require_same_but_retry(folder, saved["settings"], self.settings, but=AVERAGE_KEYS if self.ema is None else frozenset())
        self.engine.load(folder)
        if self.ema is not None:  # older states may have one that the stage no longer uses
            self.ema.load_state_dict(checkpoint.read_part(folder / "ema.pt", map_location="cpu"))
        if "spikes" in saved:  # older states have none
            self.spikes.load_state_dict(saved["spikes"])
        self.held_before = saved.get("held_before", {})  # runs that did not measure have none
        return saved["spent"]

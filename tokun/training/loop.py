"""The training loop."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokun.models.shares import own_share
from tokun.training import optim
from tokun.training.run import Run
from tokun.utils import checkpoint


def finish_writing(stage: Callable[[Run], Path]) -> Callable[[Run], Path]:
    """The stage, behind which nothing is still being written, however it ends."""

    @functools.wraps(stage)
    def whole(run: Run) -> Path:
        try:
            return stage(run)
        finally:
            run.writer.wait()

    return whole


class Clock:
    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def lap(self) -> float:
        now = time.monotonic()
        self.last, before = now, self.last
        return max(now - before, 1e-9)


class averaged:
    """Within the block the module holds its averaged weights; behind it, its own again. `refresh` is told of both changes."""

    def __init__(self, module: nn.Module, ema: optim.Ema, refresh: Callable[[], None] = lambda: None):
        self.module, self.ema, self.refresh = module, ema, refresh

    def __enter__(self) -> None:
        self.own = {name: own_share(p).detach().clone() for name, p in self.module.named_parameters()}
        self.ema.copy_to(self.module)
        self.refresh()

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, p in self.module.named_parameters():
            own_share(p).copy_(self.own[name])
        self.refresh()


def share_done(run: Run, step: int, steps: int, seconds: float, max_minutes: float) -> float:
    """How much of the training is done, 0..1: by steps, or by time where that runs out first (all processes agree)."""
    progress = step / steps
    if max_minutes > 0:
        elapsed = torch.tensor(seconds / (60 * max_minutes))
        if run.world > 1:
            device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
            elapsed = elapsed.to(device)
            dist.broadcast(elapsed, 0)
        progress = max(progress, elapsed.item())
    return progress


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def seed_device(seed: int, device: torch.device) -> None:
    """torch.manual_seed for the CPU and this device alone: it goes to every kind of device there is, which takes most of a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def require_finite(run: Run, value: Tensor | float, step: int, stage: str, keys: Callable[[], Sequence[str]], what: str = "loss") -> None:
    value = float(value.detach()) if isinstance(value, Tensor) else value
    if not math.isfinite(value):
        listed = run.out / f"non_finite_{stage.replace(' ', '_')}_step{step}_rank{run.rank}.json"
        checkpoint.write_text(listed, json.dumps(list(keys()), indent=1))
        raise FloatingPointError(
            f"{stage}: the {what} is {value} at step {step}. The batch's keys are in {listed}. The last trainer state is whole: "
            "start again with a lower learning rate (lr), a smaller max_grad_norm, or in full precision (precision=no)"
        )


def batches_keys(batches: Any, step: int) -> list[str]:
    return [batches.samples.index.key(batches.order[position]) for position in batches.positions(step)]

"""What a training step logs: losses, learning rate, gradient norm, speed, memory, passes over the data, under the names in the tracker.

The loop calls `log_step` every `log_every` steps, and asks the stage for its figures. A stage hands its numbers to the functions below,
which name them; they know no stage. GRPO's figures are its own (`GrpoStage.summary` in `tokun.align.grpo`). Held-out figures (`val/…`) are
logged by each stage's `evaluate`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokun.training import health
from tokun.training.resume_settings import figures_line

if TYPE_CHECKING:
    from tokun.training.loop import Stage

Figures = tuple[dict[str, float], str]  # metrics by their names in the tracker, and the words for the progress bar


class Window:
    """Counts since the last logging, evaluation or sampling, so that throughput excludes these."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.steps = 0
        self.waited = 0.0  # seconds waiting for batches
        self.counts: defaultdict[str, float] = defaultdict(float)  # totals of the stage, such as tokens

    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)


def log_step(stage: Stage, bar: tqdm) -> None:
    """Log the stage's figures of its last step and window, show a few in the progress bar, and begin a new window."""
    figures, words = stage.figures()
    stage.window = Window()
    stage.run.tracker.log(figures, step=stage.step)
    bar.set_postfix_str(words)


def of_update(*, lr: float, norm: float, spikes: int, epoch: float, device: torch.device) -> dict[str, float]:
    """What every update under an engine logs. norm: of the gradients before clipping; epoch: passes over the data so far."""
    return {
        "train/lr": lr, "train/grad_norm": norm, "train/skipped_spikes": spikes, "train/epoch": epoch,
        "train/peak_memory_gb": health.peak_memory(device) / 2**30,
    }  # fmt: skip


def of_generator(window: Window, losses: Mapping[str, float], *, weights: tuple[float, float], flops: float, rate: float) -> Figures:
    """The generator's own figures.

    losses: means over all processes by name, in nats a token: image_sum, text_sum, z_sum; others are logged as train/NAME_loss
    weights: of the first two
    flops: operations a token
    rate: operations a second that the processes can do together
    """
    found, seconds = dict(losses), window.seconds()
    image, text, z = (found.pop(name) for name in ("image_sum", "text_sum", "z_sum"))
    tokens, width = window.counts["tokens"], window.counts["width"]
    figures = {
        "train/loss": weights[0] * image + weights[1] * text, "train/image_loss": image, "train/text_loss": text, "train/z": z,
        "train/tokens_per_second": tokens / seconds, "train/data_wait": window.waited / seconds, "train/padding": 1 - tokens / width,
        "train/mfu": flops * tokens / seconds / rate, **{f"train/{name.removesuffix('_sum')}_loss": value for name, value in found.items()},
    }  # fmt: skip
    return figures, f"image {image:.3f} text {text:.3f} {tokens / seconds:.0f} tok/s"


def of_samples(skipped: Mapping[str, int], cut_captions: int) -> dict[str, float]:
    """Samples that were left out, by reason, and captions that were cut to the longest length."""
    return {"train/skipped": sum(skipped.values()), "train/cut_captions": cut_captions}


def of_fine_tuning(window: Window, found: Mapping[str, float]) -> Figures:
    """The figures of learning from preferences or from text alone. found: those of the last step, over all processes."""
    figures = {f"train/{name}": value for name, value in found.items()}
    return figures | {"train/items_per_second": window.counts["items"] / window.seconds()}, figures_line(dict(found))


def of_image_tokenizer(
    window: Window, last: Mapping[str, Any], *, batch_size: int, codebook_size: int, skipped: Mapping[str, int]
) -> Figures:
    """The image tokenizer's figures: the terms of its loss at the last step, the share of codes that the batch used, pictures a second."""
    figures = {name: value.item() if isinstance(value, Tensor) else value for name, value in last.items() if name != "codes"}
    figures |= {
        "batch_usage": last["codes"].unique().numel() / codebook_size,
        "images_per_second": batch_size * window.steps / window.seconds(),
        "skipped": sum(skipped.values()),
    }
    words = f"loss {figures['loss']:.3f} l1 {figures['l1']:.3f} {figures['images_per_second']:.0f} img/s"
    return {f"image_tokenizer/{name}": value for name, value in figures.items()}, words

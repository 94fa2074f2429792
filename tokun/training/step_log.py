"""What a training step logs: losses, learning rate, gradient norm, speed, memory, passes over the data, under the names in the tracker.

The loop calls `log_step` every `log_every` steps. Each stage's `figures` returns its own: those of the generator, of fine-tuning and of the
image tokenizer are below, those of GRPO in `tokun.align.grpo`. Held-out figures (`val/…`) are logged by each stage's `evaluate`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from tokun.training import health
from tokun.training.resume_settings import figures_line

if TYPE_CHECKING:
    from tokun.training.fine_tuning import TuningStage
    from tokun.training.generator import GeneratorStage
    from tokun.training.image_tokenizer import ImageTokenizerStage
    from tokun.training.loop import Stage


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


def of_generator(stage: GeneratorStage) -> tuple[dict[str, float], str]:
    """The generator's figures, and the words for the progress bar. Losses are of the last step, in nats a token, over all processes (a collective call)."""
    run, train, samples = stage.run, stage.train, stage.training_batches.samples
    losses_here, norm, lr = stage.last
    if run.world > 1:
        dist.all_reduce(losses_here)
    image, text, z = losses_here.tolist()
    window, seconds = stage.window, stage.window.seconds()
    tokens, width = window.counts["tokens"], window.counts["width"]
    figures = {
        "train/loss": train.image_weight * image + train.text_weight * text, "train/image_loss": image, "train/text_loss": text, "train/z": z,
        "train/lr": lr, "train/grad_norm": norm, "train/tokens_per_second": tokens / seconds, "train/data_wait": window.waited / seconds,
        "train/padding": 1 - tokens / width, "train/mfu": stage.flops * tokens / seconds / (stage.rate * run.world),
        "train/skipped_spikes": stage.spikes.count, "train/peak_memory_gb": health.peak_memory(stage.engine.device) / 2**30,
        "train/epoch": stage.step * train.batch_size / len(samples), "train/skipped": sum(samples.index.skipped.values()),
        "train/cut_captions": stage.training_batches.cut_captions,
    }  # fmt: skip
    return figures, f"image {image:.3f} text {text:.3f} {tokens / seconds:.0f} tok/s"


def of_fine_tuning(stage: TuningStage) -> tuple[dict[str, float], str]:
    """The figures of learning from preferences or from text alone. Losses are of the last step, over all processes (a collective call)."""
    total, norm, lr = stage.last
    if stage.run.world > 1:
        dist.all_reduce(total)
    found = stage.figures_of(dict(zip(stage.sums, total.tolist(), strict=True)))
    figures = {f"train/{name}": value for name, value in found.items()} | {
        "train/lr": lr, "train/grad_norm": norm, "train/skipped_spikes": stage.spikes.count, "train/epoch": stage.step * stage.train.batch_size / len(stage.items),
        "train/items_per_second": stage.window.counts["items"] / stage.window.seconds(), "train/peak_memory_gb": health.peak_memory(stage.engine.device) / 2**30,
    }  # fmt: skip
    return figures, figures_line(found)


def of_image_tokenizer(stage: ImageTokenizerStage) -> tuple[dict[str, float], str]:
    """The image tokenizer's figures: the terms of its loss at the last step, the share of codes that the batch used, pictures a second."""
    figures = {name: value.item() if isinstance(value, Tensor) else value for name, value in stage.last.items() if name != "codes"}
    figures |= {
        "batch_usage": stage.last["codes"].unique().numel() / stage.model.codebook_size,
        "images_per_second": stage.train.batch_size * stage.window.steps / stage.window.seconds(),
        "skipped": sum(stage.samples.index.skipped.values()),
    }
    words = f"loss {figures['loss']:.3f} l1 {figures['l1']:.3f} {figures['images_per_second']:.0f} img/s"
    return {f"image_tokenizer/{name}": value for name, value in figures.items()}, words

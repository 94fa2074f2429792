"""How the generator is evaluated: held-out losses, sampled pairs, and the closing lines about both. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tokun import data
from tokun.config import TrainConfig
from tokun.inference import decoder
from tokun.inference.model import Pair, Tokun
from tokun.models import losses
from tokun.render.grids import captioned_grid, save_page
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training.engine import Engine
from tokun.training.run import Run
from tokun.training.start_report import gain_lines, noise_of
from tokun.training.token_loss import TokenLoss

Losses = dict[str, float]  # held-out nats by name: image_loss, text_loss


def held_out_batches(run: Run, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> list[data.TokenBatch]:
    """At most twelve full batches of held-out pairs; none without held-out shards."""
    paths = sorted((run.out / "codes").glob("val-*.tar"))
    if not paths:
        return []
    samples = data.CodeSamples(paths, cache_file=run.index("codes-val"))
    size = min(32, len(samples))
    as_they_are: dict[str, Any] = {"seed": 0, "task_mix": {"joint": 1.0}, "tag_dropout": 0.0, "views": False}
    batches = data.TokenBatches(samples, vocabulary, encode, batch_size=size, **as_they_are)
    return [batches(step) for step in range(min(12, max(1, len(samples) // size)))]


@torch.no_grad()
def evaluate_generator(engine: Engine, model: Any, batches: Sequence[data.TokenBatch], token_loss: TokenLoss) -> Losses:
    """Held-out nats per image token and per text token, with softmax over the full vocabulary."""
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in token_loss(engine, model, batch.input_ids, batch.labels)[1].items():
            totals[name] = totals.get(name, 0.0) + value.item()
    model.train(was_training)
    counts = losses.term_counts(totals["image_count"], totals["text_count"])
    return {f"{name.removesuffix('_sum')}_loss": totals[name] / n for name, n in zip(losses.TERMS, counts, strict=True) if name != "z_sum"}


def weighted(held: Losses, train: TrainConfig) -> float:
    """The held-out loss that decides which step is best."""
    return train.image_weight * held["image_loss"] + train.text_weight * held["text_loss"]


def closing_lines(
    before: float | None, last: float, best: dict[str, Any] | None, train: TrainConfig, *, pictures: int, sample_best: Callable[[int], str]
) -> list[str]:
    """The closing lines about held-out losses, with the command that samples an earlier step, if that was better.

    Args:
        before, last: `weighted` losses before the first step (None: not measured) and at the end.
        best: the record of the best checkpoint that is kept, if any.
        pictures: the number of held-out pictures.
        sample_best: a step -> the lines that say where its checkpoint is and how to sample from it.
    """
    image, text = train.image_weight, train.text_weight
    sums = (
        " (image + text)" if image == text == 1 else f" ({image:g} x image + {text:g} x text: compare it only with runs of these weights)"
    )
    noise = max(image, text) * noise_of(pictures)
    lines = gain_lines(before, last, noise, (best["loss"], best["step"]) if best else None, sums=sums)
    if best and best["loss"] < last - noise:
        lines[-1] += f"\n{sample_best(best['step'])}"
    return [f"generator: {line}" for line in lines]


def log_samples(run: Run, model: Tokun, step: int) -> None:
    """Draw the run's sample seeds, save the grid in `out/samples/` and log it to the tracker."""
    was_training = model.generator.training
    model.eval()
    pairs = model.sample(run.config.sampling.seed, run.config.sampling.n)
    decoder.forget(model.generator)
    model.generator.train(was_training)
    log_page(run, "samples", pairs, [pair.caption for pair in pairs], step, file="step")
    run.tracker.log({"samples/pmi": float(np.mean([pair.pmi for pair in pairs]))}, step=step)


def log_page(
    run: Run, name: str, pairs: Sequence[Pair], captions: Sequence[str], step: int, *, file: str, columns: int | None = None
) -> None:
    """Save a page of pairs in `out/samples/` and log it to the tracker as `name`."""
    images = [pair.image for pair in pairs]
    grid = captioned_grid(images, captions, columns=columns)
    folder = run.out / "samples"
    folder.mkdir(exist_ok=True)
    save_page(grid, folder / f"{file}-{step:08d}.png")
    run.tracker.log_grid(name, grid, images, captions, step=step)

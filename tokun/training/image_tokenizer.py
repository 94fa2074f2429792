"""The second stage: trains the VQ-VAE on pictures, writes `out/image_tokenizer`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokun import data
from tokun.config import Config
from tokun.data import cropping
from tokun.models import losses
from tokun.models.generator import can_compile, count_parameters
from tokun.tokenizers.image import ImageTokenizer
from tokun.training import loop, optim, step_log
from tokun.training.engine import make_accelerator
from tokun.training.gan import Gan
from tokun.training.image_shapes import held_out_pictures, shape_options, shape_settings, shapes_line, sizes_line, unseen_pictures
from tokun.training.initial_checkpoint import starting_model
from tokun.training.reconstruction import gate, gate_problems, inspect_image_tokenizer
from tokun.training.resume_settings import GATE_KEYS, LOGGING_KEYS, idle_in, require_same_but_retry, started_from, stopped_early, without
from tokun.training.run import Run, states_on_disk
from tokun.training.start_report import colour_line, style_key_line, tags_line, verdict
from tokun.utils import checkpoint


def train_image_tokenizer(run: Run) -> Path:
    """Train the VQ-VAE on the run's image shards -> `out/image_tokenizer`. Stops the run if it has collapsed."""
    config, target = run.config, run.out / "image_tokenizer"
    train, codebook_size = config.image_tokenizer_train, config.image_tokenizer.codebook_size
    settings = _settings(config)
    run.recover(target)
    record = checkpoint.read_record(target / "stage.json")
    if record is not None:
        checkpoint.require_same(target, record["settings"], settings)
        run.say(
            f"image tokenizer: {target} already exists and matches. {drawing_line(record['figures'])}{stopped_early(record, train, target)}"
        )
        run.remove_states("image_tokenizer")
        figures = record["figures"]
    else:
        if run.rank == 0 and (line := style_key_line(config)):
            run.say(line)
        figures = _take_from_start(run, settings, target) if config.start else _train(run, settings, target)
    gate(figures, train, codebook_size, start=config.start, sheet=target / "reconstructions.png")
    return target


def _train(run: Run, settings: dict[str, Any], target: Path) -> dict[str, float]:
    stage = ImageTokenizerStage(run, settings)
    loop.train(stage)
    return stage.finish(target)


def _settings(config: Config) -> dict[str, Any]:
    """The settings in the stage's record."""
    train = config.image_tokenizer_train
    return {
        "image_tokenizer": dataclasses.asdict(config.image_tokenizer),
        "image_tokenizer_train": without(dataclasses.asdict(train), LOGGING_KEYS | GATE_KEYS | {"compile"} | idle_in(vars(train))),
        "seed": config.seed,
        "shards": checkpoint.files_fingerprint(data.expand_shards(config.data.train)),
        **shape_settings(config),
        **started_from(config),
    }


def _take_from_start(run: Run, settings: dict[str, Any], target: Path) -> dict[str, float]:
    """Copy the image tokenizer of `start` to `target` and evaluate it on this run's pictures. Returns its figures."""
    if run.rank == 0:
        run.say(tags_line(run.config))
        if run.config.image_tokenizer.image_channels == 1:
            shards = data.expand_shards(run.config.data.train)
            _warn_of_colour(run, data.ShardIndex(shards, need=(), one_of=data.IMAGE_SUFFIXES, cache_file=run.index("images")))
        run.say(f"image tokenizer: evaluating that of {run.config.start} on these pictures …")
    model = starting_model(run.config).image_tokenizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = unseen_pictures(run.config)
    figures, sheet = inspect_image_tokenizer(model.to(device), pictures, device)
    if run.rank == 0:
        _write(
            target, model, sheet, {"settings": settings, "figures": figures, "steps": 0, "stopped_by": "steps", "seconds": 0, "skipped": {}}
        )
    run.tracker.log_image("image_tokenizer/reconstructions", sheet, step=0)
    train, sheet_path = run.config.image_tokenizer_train, target / "reconstructions.png"
    problems = gate_problems(figures, train, model.codebook_size)
    run.say(f"image tokenizer: {verdict(figures, train, sheet_path, problems, pictures=sum(map(len, pictures)))}")
    run.wait()
    return figures


def drawing_line(figures: dict[str, float]) -> str:
    """The figures of reconstructions in words."""
    return (
        f"Reconstructions at {figures['psnr']:.1f} dB, {figures['usage']:.0%} of the codes in use (perplexity {figures['perplexity']:.0f})"
    )


def _write(target: Path, model: ImageTokenizer, sheet: Image.Image, record: dict[str, Any]) -> None:
    with checkpoint.whole_directory(target) as folder:
        model.cpu().save(folder)
        sheet.save(folder / "reconstructions.png")
        checkpoint.write_record(folder / "stage.json", record | {"fingerprint": model.fingerprint()})


class ImageTokenizerStage(loop.Stage):
    """Trains model and adversary on pictures. A trainer state is state.pt."""

    name = "image tokenizer"

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        config, train = run.config, run.config.image_tokenizer_train
        super().__init__(run, loop.Schedule.of(train))
        self.config, self.train, self.settings = config, train, settings
        self.accelerator = make_accelerator(train.precision)
        self.device = self.accelerator.device
        self.samples = _open_pictures(run)
        self.training_batches = data.ImageBatches(
            self.samples, batch_size=train.batch_size, scale=train.crop_scale, seed=config.seed,
            rank=run.rank, world=run.world, threads=config.data.num_workers,
        )  # fmt: skip
        self.held_out = held_out_pictures(config)
        torch.manual_seed(config.seed)
        # channels last: 10 % faster on CPUs, and on GPUs in half precision
        self.model = ImageTokenizer(config.image_tokenizer).to(self.device).to(memory_format=torch.channels_last)
        self.ema = optim.Ema(self.model, train.ema_decay)
        compiled = train.compile and can_compile(self.device)
        if compiled:
            run.say("image tokenizer: preparing; compiling takes the first step half a minute or more …")
        self.perceptual = losses.make_perceptual(train.perceptual, train.perceptual_weights, compiled=compiled).to(self.device)
        discriminator = losses.PatchDiscriminator(config.image_tokenizer.image_channels).to(self.device) if train.gan_weight > 0 else None
        optimizer = optim.make_adamw(self.model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.adversary = Gan(discriminator, train, self.accelerator) if discriminator is not None else None

    def describe(self) -> str:
        grids = ", ".join(self.config.data.grids) or cropping.grid_text(self.model.grid)
        return (
            f"{count_parameters(self.model) / 1e6:.2f}M parameters, {len(self.samples)} pictures, {sizes_line(self.config)} -> "
            f"{grids} codes of {self.model.codebook_size}, {self.run.world} process(es) on {self.device}"
        )

    def batches(self, start: int) -> Generator[Tensor, None, None]:
        return data.prefetch(self.training_batches, start)

    def batch_keys(self) -> Sequence[str]:
        return loop.batches_keys(self.training_batches, self.step)

    def take_step(self, batch: Tensor, lr: float) -> None:
        torch.manual_seed(loop.step_seed(self.config.seed, self.step, 0))  # dead codes get the same replacements on every run
        images = batch.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        loss, terms, out = self.loss(images)
        self.require_finite(loss)
        optim.set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm))
        self.require_finite(norm, what="gradient norm")
        self.optimizer.step()
        self.ema.update(self.model)
        if self.adversary:
            terms |= self.adversary.train_step(self.step, images, out.images.detach(), lr / self.train.lr)
        self.last = {**terms, "loss": loss, "codes": out.codes, "lr": lr, "grad_norm": norm}

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
        """images (B, C, H, W) in [-1, 1] -> the loss, its unweighted terms, and the model's output."""
        train = self.train
        self.wrapped.train()
        with self.accelerator.autocast():
            out = self.wrapped(images)
            difference = out.images.float() - images
            l1, mse = difference.abs().mean(), difference.square().mean()
            distance = self.perceptual(out.images, images) if train.perceptual_weight > 0 else images.new_zeros(())
        lines = losses.line_loss(out.images, images) if train.line_weight > 0 else images.new_zeros(())
        base = train.l1_weight * l1 + train.mse_weight * mse + train.perceptual_weight * distance.float() + train.line_weight * lines
        loss = base + out.quantizer_loss.float()
        terms = {"l1": l1, "mse": mse, "perceptual": distance, "line": lines, "quantizer": out.quantizer_loss}
        if self.adversary and self.adversary.active(self.step):
            extra, more = self.adversary.decoder_loss(base, out.images, self.model.decoder.last.weight)
            loss, terms = loss + extra, terms | more
        return loss, terms, out

    def figures(self) -> tuple[dict[str, float], str]:
        return step_log.of_image_tokenizer(
            self.window,
            self.last,
            batch_size=self.train.batch_size,
            codebook_size=self.model.codebook_size,
            skipped=self.samples.index.skipped,
        )

    def evaluate(self) -> str:
        if self.run.rank != 0:
            return ""
        with loop.averaged(self.model, self.ema):
            figures, sheet = inspect_image_tokenizer(self.model, self.held_out, self.device)
        self._log_held_out(figures, sheet)
        return drawing_line(figures)

    def _log_held_out(self, figures: dict[str, float], sheet: Image.Image) -> None:
        self.run.tracker.log({f"image_tokenizer/val_{name}": value for name, value in figures.items()}, step=self.step)
        self.run.tracker.log_image("image_tokenizer/reconstructions", sheet, step=self.step)

    def disk_bytes(self) -> int:
        """Weights, two moments and the average for the model; the same without the average for the discriminator."""
        sizes = [count_parameters(self.model), count_parameters(self.adversary.module) if self.adversary else 0]
        return 4 * (4 * sizes[0] + 3 * sizes[1]) * states_on_disk(self.config)

    def snapshot(self) -> Callable[[Path], object]:
        if self.run.rank != 0:
            return lambda _folder: None
        copies = checkpoint.snapshot({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema.state_dict(),
            "adversary": self.adversary.state_dict() if self.adversary else {},
            "spent": self.clock.seconds(), "settings": json.dumps(self.settings),
        })  # fmt: skip
        return lambda folder: torch.save(copies, folder / "state.pt")

    def restore(self, folder: Path) -> float:
        state = checkpoint.read_part(folder / "state.pt", map_location=self.device)
        require_same_but_retry(folder, json.loads(state["settings"]), self.settings)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        if self.adversary:
            self.adversary.load_state_dict(state["adversary"])
        return state["spent"]

    def finish(self, target: Path) -> dict[str, float]:
        """Write the averaged weights and the record to `target`. Returns the figures on held-out pictures."""
        run, model = self.run, self.model
        self.ema.copy_to(model)
        model.eval().float()
        model.reindex()
        figures, sheet = inspect_image_tokenizer(model, self.held_out, self.device)
        skipped = self.samples.index.skipped
        if run.rank == 0:
            record = {"settings": self.settings, "figures": figures, "steps": self.step, "stopped_by": self.schedule.stopped_by(self.step)}
            _write(target, model, sheet, record | {"seconds": round(self.clock.seconds()), "skipped": dict(skipped)})
            run.remove_states("image_tokenizer")
        self._log_held_out(figures, sheet)
        if skipped:
            run.say(f"image tokenizer: skipped {self.samples.index.skipped_summary()}")
        run.say(f"image tokenizer: {self.schedule.ended(self.step)}. {drawing_line(figures)}")
        run.wait()
        return figures


def _open_pictures(run: Run) -> data.ImageSamples:
    config, model = run.config, run.config.image_tokenizer
    samples = data.ImageSamples.open(
        config.data.train, image_size=model.image_size, channels=model.image_channels, cache_gb=config.data.cache_gb / run.world,
        max_scale=config.image_tokenizer_train.crop_scale[1], cache_file=run.index("images"), **shape_options(config),
    )  # fmt: skip
    if run.rank == 0:
        _warn_of_colour(run, samples.index)
    if config.data.grids:
        if run.rank == 0:
            run.say(shapes_line(samples))
        run.wait()  # the other processes read the sizes that the first one cached
    return samples


def _warn_of_colour(run: Run, index: data.ShardIndex) -> None:
    if warning := colour_line(run.config, index):
        run.say(warning)

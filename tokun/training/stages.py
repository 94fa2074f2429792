"""The training stages, each a function of a Run: text tokenizer, image tokenizer, codes, generator.

Every stage leaves a record of the settings it was made with. Its result is reused when the record matches, refused when
it does not, and a stage that was killed goes on from its last trainer state. What a step computes is a pure function of
(config, step), unless max_minutes shapes the schedule, so nothing but weights, optimizer and the step number has to be saved.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import socket
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from tokun import config as configs
from tokun import data
from tokun.config import Config
from tokun.data import framing, mirror
from tokun.inference import decoder
from tokun.inference.latents import Slots
from tokun.inference.model import TEXT_TOKENIZER, Tokun, load
from tokun.inference.model_card import model_card
from tokun.inference.tags import count_tags
from tokun.models import losses
from tokun.models.generator import (
    add_dropout,
    can_compile,
    compile_layers,
    count_parameters,
    flops_per_token,
    head_is_last,
    intermediate_size,
    lose_in_forward,
    loss_chunk,
    make_generator,
    start_from,
    start_from_codebook,
    tune_for,
    uncompiled,
)
from tokun.models.shares import own_share
from tokun.render.grids import captioned_grid, pair_sheet, to_pil
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.text import PretrainedTextTokenizer, TextTokenizer, normalize
from tokun.tokenizers.vocabulary import REGISTERS, Vocabulary, tag_word
from tokun.training import health, optim
from tokun.training.engine import Engine, deepspeed_settings, make_accelerator
from tokun.training.tracking import Tracker, make_tracker
from tokun.utils import checkpoint, lock


@dataclass
class Run:
    """One training run: its settings, its folder, its tracker, its place among the processes."""

    config: Config
    out: Path
    tracker: Tracker
    rank: int
    world: int
    deepspeed: bool  # the generator runs under a DeepSpeed engine
    stop: health.StopRequest
    writer: checkpoint.Writer
    let_go: Callable[[], object] = lambda: None  # of the run's folder

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process. All of them ask together."""
        if self.world == 1:
            return flag
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def stop_if_asked(self, save: Callable[[], object] = lambda: None) -> None:
        """Save and raise Preempted when any process was asked to stop (SIGTERM)."""
        if self.any(self.stop.asked):
            save()
            self.writer.wait()
            raise health.Preempted

    def close(self) -> None:
        self.writer.close()
        self.stop.close()
        self.tracker.finish()
        self.let_go()

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def recover(self, target: Path) -> None:
        """Put back what a kill between two renames left aside; every process calls it before it reads a stage's record."""
        if self.rank == 0:
            checkpoint.recover_directory(target)
        self.wait()

    def say(self, message: str) -> None:
        if self.rank == 0:
            tqdm.write(message)

    def index(self, shards: str) -> Path:
        """Where the index of these shards is kept between openings. Safe to delete."""
        return self.out / "cache" / f"{shards}.index"

    def states(self, stage: str) -> checkpoint.TrainerStates:
        if self.rank == 0:
            checkpoint.remove_partial(self.out / "state" / stage)
        return checkpoint.TrainerStates(self.out / "state" / stage, keep=self.config.train.keep_last)

    def forget(self, stage: str) -> None:
        """Remove the trainer states of a stage that is finished: gigabytes, and a kill may have left some of them."""
        if self.rank == 0:
            self.states(stage).clear()


def open_run(config: Config, *, deepspeed: bool = False) -> Run:
    """Check what the last stage will ask for, make the run's folder, start its tracker. Every process calls it.

    Raises ValueError for settings that a later stage would refuse, before the first one has spent an hour, and for a folder that another run holds.
    """
    out = Path(config.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = deepspeed and bool(config.train.deepspeed)
    _check_ahead(config, world, deepspeed)
    if config.threads:
        torch.set_num_threads(config.threads)
    held = hold_out(config)
    if rank == 0 and not (out / "config.yaml").exists():  # that of an earlier run stays until every stage has agreed to this one
        write_config(out, config)
    tracker = make_tracker(
        config.tracking.kind,
        project=config.tracking.project,
        name=config.tracking.name or out.name,
        directory=out / "tracking",
        config=configs.to_dict(config),
        main_process=rank == 0,
    )
    run = Run(config, out, tracker, rank, world, deepspeed, health.StopRequest(), checkpoint.Writer(tqdm.write))
    if held is not None:
        run.let_go = weakref.finalize(run, lock.let_go, held)  # also where it is never closed
    run.wait()
    _require_shared(out)
    return run


def hold_out(config: Config) -> Path | None:
    """The first process of a run makes its folder and holds it until the run ends, for all of them. Raises ValueError where another run holds it."""
    if int(os.environ.get("RANK", 0)):
        return None
    checkpoint.require_writable(Path(config.out))
    return lock.hold(Path(config.out), option="out=…")


def _require_shared(out: Path, *, seconds: float = 30.0) -> None:
    """Raise ValueError where this process does not see what the first one has written; network folders may take a while."""
    end = time.monotonic() + seconds
    while not (out / "config.yaml").is_file():
        if time.monotonic() > end:
            raise ValueError(
                f"out={out} on {socket.gethostname()} does not hold the config.yaml that the first process has written: all nodes must see one "
                "folder there (docs/clusters.md); only data may be copied to each"
            )
        if out.is_dir():
            os.listdir(out)  # has a network folder look again
        time.sleep(0.5)


def write_config(out: Path, config: Config) -> None:
    checkpoint.write_text(out / "config.yaml", yaml.safe_dump(configs.to_dict(config), sort_keys=False))


def _check_ahead(config: Config, world: int, deepspeed: bool) -> None:
    train = config.train
    data.check_batch(config.image_tokenizer_train.batch_size, world, "image_tokenizer_train.batch_size")
    data.check_batch(train.batch_size, world, "train.batch_size")
    micro = _micro_batch(train, world)
    data.check_task_mix(train.task_mix)
    shares = {
        "train.word_dropout": train.word_dropout,
        "train.tag_dropout": train.tag_dropout,
        "train.plain_share": train.plain_share,
        "generator.dropout": config.generator.dropout,
        "train.lr_hold": train.lr_hold,
        "image_tokenizer_train.lr_hold": config.image_tokenizer_train.lr_hold,
    }
    for name, value in shares.items():
        if not 0 <= value <= 1 or (
            value == 1 and name.endswith(("dropout", "lr_hold")) and name.startswith(("generator", "train.lr", "image"))
        ):
            raise ValueError(f"{name} is {value}; it is a share between 0 and 1")
    if deepspeed:
        deepspeed_settings(train, micro=micro, accumulation=train.batch_size // world // micro)
    if config.start and not any(
        (Path(config.out) / part).is_dir() for part in ("checkpoint", "state/generator")
    ):  # later it is not asked for again
        _check_start(config)
    if train.ema_every < 1:
        raise ValueError(f"train.ema_every is {train.ema_every}; it is a number of steps, 1 or more")
    if train.keep_best and not config.data.val:
        raise ValueError(
            f"train.keep_best is {train.keep_best}, but which checkpoint is best only held-out pictures can tell: name them with data.val, or set keep_best to 0"
        )
    weights = config.image_tokenizer_train.perceptual_weights
    if weights and config.image_tokenizer_train.perceptual_weight > 0 and not Path(weights).is_file():
        raise FileNotFoundError(
            f"image_tokenizer_train.perceptual_weights {weights} does not exist; name a SqueezeNet file, or set image_tokenizer_train.perceptual=none"
        )


def _check_start(config: Config) -> None:
    """Raises ValueError where the checkpoint to start from cannot be read, or is of another shape than the config's."""
    if config.generator.pretrained:
        raise ValueError(f"start {config.start} and generator.pretrained {config.generator.pretrained} exclude each other: set one of them")
    model = starting_model(config)
    asked, found = config.generator, model.generator.config.to_dict()  # of another architecture some are None
    names = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "tie_embeddings": "tie_word_embeddings",
    }
    shape = {
        f"image_tokenizer.{k}": (v, getattr(model.image_tokenizer.config, k)) for k, v in dataclasses.asdict(config.image_tokenizer).items()
    }
    for name in ("hidden_size", "head_dim", *names):
        shape[f"generator.{name}"] = getattr(asked, name), found.get(names.get(name, name))
    shape["generator.intermediate_size"] = intermediate_size(asked), found.get("intermediate_size")
    other = [f"{name} is {mine}, the checkpoint's {its}" for name, (mine, its) in shape.items() if mine != its]
    if other:
        raise ValueError(
            f"start {config.start} is of another shape than this config: {'; '.join(other)}. Set them alike, or choose the config it was trained with"
        )


def starting_model(config: Config) -> Tokun:
    """The checkpoint that `config.start` names, on the CPU. Raises as `tokun.load` does."""
    return load(None if config.start == "bundled" else config.start, device="cpu")


def _micro_batch(train: configs.TrainConfig, world: int) -> int:
    """Samples of one process and one forward pass."""
    share = train.batch_size // world
    micro = train.micro_batch_size or share
    if micro < 1 or train.batch_size % world or share % micro:
        raise ValueError(
            f"train.batch_size {train.batch_size} is not processes ({world}) x micro_batch_size ({micro}) x a whole number of accumulation steps"
        )
    return micro


# --- image tokenizer ------------------------------------------------------------------------------------------------

BROKEN_RECORD = (OSError, ValueError, TypeError, KeyError, AttributeError)  # what a JSON of another shape leads to
LOGGING_KEYS = {"log_every", "eval_every", "save_every", "sample_every", "keep_last", "keep_best", "max_minutes"}
RETRY_KEYS = {"lr", "max_grad_norm", "precision"}  # may change when a run goes on from a trainer state
GATE_KEYS = {"min_usage", "min_perplexity", "min_psnr"}


def _written_to_the_end(stage: Callable[[Run], Path]) -> Callable[[Run], Path]:
    """The stage, behind which nothing is still being written, however it ends."""

    @functools.wraps(stage)
    def whole(run: Run) -> Path:
        try:
            return stage(run)
        finally:
            run.writer.wait()

    return whole


@_written_to_the_end
def train_image_tokenizer(run: Run) -> Path:
    """Train the VQ-VAE on the run's image shards -> `out/image_tokenizer`. Stops the run when it has collapsed."""
    config, target = run.config, run.out / "image_tokenizer"
    train, model_config = config.image_tokenizer_train, config.image_tokenizer
    paths = data.expand_shards(config.data.train)
    asked = {
        "image_tokenizer": dataclasses.asdict(model_config),
        "image_tokenizer_train": _without(dataclasses.asdict(train), LOGGING_KEYS | GATE_KEYS | {"compile"} | _as_before(train)),
        "seed": config.seed,
        "shards": checkpoint.files_fingerprint(paths),
        **_shapes_asked(config),
        **_started(config),
    }
    run.recover(target)
    record = checkpoint.read_record(target / "stage.json")
    if record is not None:
        checkpoint.require_same(target, record["settings"], asked)
        run.say(f"image tokenizer: {target} is there and matches. " + _line(record["figures"]) + _stopped_early(record, train, target))
        run.forget("image_tokenizer")
        _gate(record["figures"], train, model_config.codebook_size)
        return target
    if config.start:
        return _take_image_tokenizer(run, asked)

    accelerator = make_accelerator(train.precision)
    device = accelerator.device
    samples = data.ImageSamples.open(
        config.data.train, image_size=model_config.image_size, channels=model_config.image_channels,
        cache_gb=config.data.cache_gb / run.world, max_scale=train.crop_scale[1], kept=run.index("images"), **_shapes(config),
    )  # fmt: skip
    if config.data.grids:
        if run.rank == 0:
            run.say(_shapes_line(samples))
        run.wait()  # the others find the sizes where the first process has kept them
    batches = data.ImageBatches(
        samples, batch_size=train.batch_size, scale=train.crop_scale, seed=config.seed,
        rank=run.rank, world=run.world, threads=config.data.num_workers,
    )  # fmt: skip
    held_out = _held_out_pictures(config)

    torch.manual_seed(config.seed)
    model = ImageTokenizer(model_config).to(
        device, memory_format=torch.channels_last
    )  # a tenth faster, on CPUs and in half precision on GPUs
    ema = optim.Ema(model, train.ema_decay)
    perceptual = losses.make_perceptual(train.perceptual, train.perceptual_weights, compiled=train.compile and can_compile(device)).to(
        device
    )
    discriminator = losses.PatchDiscriminator(model_config.image_channels).to(device) if train.gan_weight > 0 else None
    optimizer = optim.make_adamw(model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    adversary = _Adversary.make(discriminator, train, accelerator)

    states = run.states("image_tokenizer")
    step, spent = 0, 0.0
    if (latest := states.latest()) is not None:
        state = torch.load(states.path(latest) / "state.pt", map_location=device, weights_only=True)
        _require_same_but_retry(states.path(latest), json.loads(state["settings"]), asked)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        adversary.load_state_dict(state["adversary"])
        step, spent = latest, state["spent"]
        run.say(f"image tokenizer: resuming at step {step}")
    run.say(
        f"image tokenizer: {_millions(model)} parameters, {len(samples)} pictures, {_pixels(config)} -> "
        f"{', '.join(config.data.grids) or framing.grid_text(model.grid)} codes of {model_config.codebook_size}, {run.world} process(es) on {device}"
    )

    def save() -> None:
        if run.rank != 0:
            return
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict(),
            "adversary": adversary.state_dict(), "spent": spent + clock.seconds(), "settings": json.dumps(asked),
        }  # fmt: skip
        run.writer.wait()  # before the copies are made: one set of them is enough
        copies = checkpoint.snapshot(state)
        run.writer.put(states.path(step), lambda folder: torch.save(copies, folder / "state.pt"), then=states.prune)

    if run.rank == 0:  # weights, two moments and the average, for the model, and all but the average for the discriminator
        sizes = [count_parameters(model), count_parameters(discriminator) if discriminator is not None else 0]
        checkpoint.require_space(run.out, 4 * (4 * sizes[0] + 3 * sizes[1]) * train_states(config))
    clock, logged_at = _Clock(), step
    stream = data.prefetch(batches, step)
    bar = tqdm(total=train.steps, initial=step, desc="image tokenizer", unit="step", disable=run.rank != 0, dynamic_ncols=True)
    done = False
    while not done:
        progress = _progress(run, step, train.steps, spent + clock.seconds(), train.max_minutes)
        if progress >= 1:
            break
        lr = train.lr * optim.warmup_cosine(step, progress=progress, warmup=train.warmup_steps, hold=train.lr_hold)
        optim.set_lr(optimizer, lr)
        torch.manual_seed(_step_seed(config.seed, step, 0))  # dead codes are replaced by the same vectors on every run
        images = next(stream).to(device, non_blocking=True, memory_format=torch.channels_last)
        wrapped.train()
        with accelerator.autocast():
            out = wrapped(images)
            difference = out.images.float() - images
            l1, mse = difference.abs().mean(), difference.square().mean()
            distance = perceptual(out.images, images) if train.perceptual_weight > 0 else images.new_zeros(())
        lines = losses.line_loss(out.images, images) if train.line_weight > 0 else images.new_zeros(())
        base = train.l1_weight * l1 + train.mse_weight * mse + train.perceptual_weight * distance.float() + train.line_weight * lines
        loss = base + out.quantizer_loss.float()
        terms = {"l1": l1, "mse": mse, "perceptual": distance, "line": lines, "quantizer": out.quantizer_loss}
        if adversary.active(step):
            extra, more = adversary.decoder_loss(base, out.images, model.decoder.last.weight)
            loss, terms = loss + extra, terms | more
        _require_finite(run, loss, step, "image tokenizer", lambda s=step: batches_keys(batches, s))
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), train.max_grad_norm))
        _require_finite(run, norm, step, "image tokenizer", lambda s=step: batches_keys(batches, s), what="gradient norm")
        optimizer.step()
        ema.update(model)
        terms |= adversary.train_step(step, images, out.images.detach(), lr / train.lr)
        step += 1
        bar.update(1)
        run.stop_if_asked(save)

        if step % train.log_every == 0 or step == 1:
            figures = {f"image_tokenizer/{k}": v.item() for k, v in terms.items()}
            rate = train.batch_size * (step - logged_at) / clock.lap()
            logged_at = step
            figures |= {
                "image_tokenizer/loss": loss.item(), "image_tokenizer/lr": lr, "image_tokenizer/grad_norm": norm,
                "image_tokenizer/batch_usage": out.codes.unique().numel() / model.codebook_size,
                "image_tokenizer/images_per_second": rate, "image_tokenizer/skipped": sum(samples.index.skipped.values()),
            }  # fmt: skip
            run.tracker.log(figures, step=step)
            bar.set_postfix_str(f"loss {loss.item():.3f} l1 {l1.item():.3f} {rate:.0f} img/s")
        if step % train.save_every == 0:
            save()
        if step % train.eval_every == 0 and run.rank == 0:
            with _averaged(model, ema):
                figures, sheet = inspect_image_tokenizer(model, held_out, device)
            run.tracker.log({f"image_tokenizer/val_{k}": v for k, v in figures.items()}, step=step)
            run.tracker.log_image("image_tokenizer/reconstructions", sheet, step=step)
            bar.write(f"  step {step}: " + _line(figures))
    bar.close()
    stream.close()

    ema.copy_to(model)
    model.eval().float()
    model.reindex()
    figures, sheet = inspect_image_tokenizer(model, held_out, device)
    if run.rank == 0:
        with checkpoint.whole_directory(target) as folder:
            model.cpu().save(folder)
            sheet.save(folder / "reconstructions.png")
            checkpoint.write_record(
                folder / "stage.json",
                {"settings": asked, "figures": figures, "steps": step, "stopped_by": _stopped_by(step, train),
                 "seconds": round(spent + clock.seconds()), "fingerprint": model.fingerprint(), "skipped": dict(samples.index.skipped)},
            )  # fmt: skip
        run.writer.wait()
        run.forget("image_tokenizer")
    run.tracker.log({f"image_tokenizer/val_{k}": v for k, v in figures.items()}, step=step)
    run.tracker.log_image("image_tokenizer/reconstructions", sheet, step=step)
    if samples.index.skipped:
        run.say(f"image tokenizer: skipped {samples.index.told()}")
    run.say(f"image tokenizer: finished after {step} steps. " + _line(figures))
    run.wait()
    _gate(figures, train, model_config.codebook_size)
    return target


def _take_image_tokenizer(run: Run, asked: dict[str, Any]) -> Path:
    """The image tokenizer of `start` -> `out/image_tokenizer`, measured on this run's pictures. Stops the run where it cannot draw them."""
    config, target = run.config, run.out / "image_tokenizer"
    model = starting_model(config).image_tokenizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures, sheet = inspect_image_tokenizer(model.to(device), _held_out_pictures(config), device)
    if run.rank == 0:
        with checkpoint.whole_directory(target) as folder:
            model.cpu().save(folder)
            sheet.save(folder / "reconstructions.png")
            record = {
                "settings": asked,
                "figures": figures,
                "steps": 0,
                "stopped_by": "steps",
                "seconds": 0,
                "fingerprint": model.fingerprint(),
                "skipped": {},
            }
            checkpoint.write_record(folder / "stage.json", record)
    run.tracker.log_image("image_tokenizer/reconstructions", sheet, step=0)
    run.say(f"image tokenizer: that of {config.start}. " + _line(figures))
    run.wait()
    _gate(figures, config.image_tokenizer_train, config.image_tokenizer.codebook_size)
    return target


@torch.no_grad()
def inspect_image_tokenizer(model: ImageTokenizer, images: Tensor | Sequence[Tensor], device: torch.device) -> tuple[dict[str, float], Any]:
    """Figures over pictures (n, C, H, W), or several such of other shapes: psnr (dB) and those of `code_figures`; and a sheet of sixteen, of each shape alike."""
    groups = [images] if isinstance(images, Tensor) else images
    codes, decibels, pairs = [], [], []
    model.eval()
    for group in groups:
        outputs = []
        for batch in group.split(64):
            c = model.encode(batch.to(device))
            codes.append(c.flatten().cpu())
            outputs.append(model.decode(c, (batch.shape[2] // model.config.downsample, batch.shape[3] // model.config.downsample)).cpu())
        reconstructed = torch.cat(outputs)
        decibels.append(psnr(group, reconstructed))
        pairs.append([(to_pil(group[i]), to_pil(reconstructed[i])) for i in range(min(16, len(group)))])
    figures = {"psnr": torch.cat(decibels).mean().item(), **code_figures(torch.cat(codes), model.codebook_size)}
    in_turn = [own[i] for i in range(16) for own in pairs if i < len(own)]  # the first of each shape, then the second
    return figures, pair_sheet(in_turn[:16])


def psnr(images: Tensor, reconstructed: Tensor) -> Tensor:
    """(n, C, H, W) in [-1, 1], twice -> (n,) dB."""
    mse = ((reconstructed - images) / 2).square().mean((1, 2, 3))  # pixel values in 0..1
    return -10 * mse.clamp_min(1e-10).log10()


def code_figures(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """codes int64, of any shape -> usage (share of codes used), perplexity, dead_codes, and codes_seen, their number."""
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).float()
    p = counts / counts.sum()
    return {
        "usage": (counts > 0).float().mean().item(),
        "perplexity": (-(p * (p + 1e-12).log()).sum()).exp().item(),
        "dead_codes": float((counts == 0).sum()),
        "codes_seen": counts.sum().item(),
    }


def _gate(figures: dict[str, float], train: configs.ImageTokenizerTrainConfig, codebook_size: int) -> None:
    """Stop before the generator when the image tokenizer is not worth training on."""
    if problems := gate_problems(figures, train, codebook_size):
        raise ValueError(
            "the image tokenizer has collapsed or is not trained: " + "; ".join(problems) + ". A generator cannot be better than its "
            "codes. Train longer (image_tokenizer_train.steps), use a smaller codebook (image_tokenizer.codebook_size), "
            "or lower the gate on purpose (image_tokenizer_train.min_usage / min_perplexity / min_psnr)"
        )


def gate_problems(figures: dict[str, float], train: configs.ImageTokenizerTrainConfig, codebook_size: int) -> list[str]:
    """What speaks against training a generator on a tokenizer with these figures; empty: nothing."""
    reach = min(1.0, figures["codes_seen"] / (4 * codebook_size))  # few held-out pictures cannot use every code
    problems = []
    if figures["usage"] < train.min_usage * reach:
        problems.append(f"only {figures['usage']:.1%} of the codebook is used (the gate asks for {train.min_usage * reach:.1%})")
    if figures["perplexity"] < train.min_perplexity * reach * codebook_size:
        problems.append(
            f"code perplexity is {figures['perplexity']:.1f} of {codebook_size} (the gate asks for {train.min_perplexity * reach:.1%})"
        )
    if figures["psnr"] < train.min_psnr:
        problems.append(f"PSNR is {figures['psnr']:.1f} dB (the gate asks for {train.min_psnr:.1f})")
    return problems


class _Adversary:
    """The discriminator with its optimizer, or nothing at all behind the same calls."""

    @staticmethod
    def make(discriminator: nn.Module | None, train: configs.ImageTokenizerTrainConfig, accelerator: Any) -> _Adversary:
        return _Adversary() if discriminator is None else _Gan(discriminator, train, accelerator)

    def active(self, step: int) -> bool:
        return False

    def decoder_loss(self, base: Tensor, fake: Tensor, last: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError("never active")

    def train_step(self, step: int, real: Tensor, fake: Tensor, lr_factor: float) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class _Gan(_Adversary):
    def __init__(self, discriminator: nn.Module, train: configs.ImageTokenizerTrainConfig, accelerator: Any):
        self.train, self.accelerator, self.module = train, accelerator, discriminator
        self.optimizer = torch.optim.AdamW(discriminator.parameters(), lr=train.gan_lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
        self.wrapped, self.optimizer = accelerator.prepare(discriminator, self.optimizer)

    def active(self, step: int) -> bool:
        return step >= self.train.gan_start

    def decoder_loss(self, base: Tensor, fake: Tensor, last: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.module.requires_grad_(False)  # the decoder's step leaves no gradient in the discriminator
        adversarial = losses.adversarial_loss(self.module(fake.float()))
        weight = losses.adaptive_weight(base, adversarial, last)
        self.module.requires_grad_(True)
        return self.train.gan_weight * weight * adversarial, {"adversarial": adversarial, "adaptive_weight": weight}

    def train_step(self, step: int, real: Tensor, fake: Tensor, lr_factor: float) -> dict[str, Tensor]:
        if step < self.train.gan_start - 500:  # the discriminator starts a little before its gradient counts
            return {}
        optim.set_lr(self.optimizer, self.train.gan_lr * lr_factor)
        with self.accelerator.autocast():
            both = self.wrapped(torch.cat([real, fake.float()]))
            loss = losses.discriminator_loss(*both.chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.optimizer.step()
        return {"discriminator": loss}

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


# --- text tokenizer -------------------------------------------------------------------------------------------------


def train_text_tokenizer(run: Run) -> Path:
    """Train sentencepiece on the training captions (or take the pretrained LM's own) -> `out/text_tokenizer`."""
    config, target = run.config, run.out / "text_tokenizer"
    paths = data.expand_shards(config.data.train)
    asked = {
        "text_tokenizer": dataclasses.asdict(config.text_tokenizer), "pretrained": config.generator.pretrained,
        "caption_key": config.data.caption_key, "shards": checkpoint.files_fingerprint(paths), **_started(config),
    }  # fmt: skip
    run.recover(target)
    record = checkpoint.read_record(target / "stage.json")
    if record is not None:
        checkpoint.require_same(target, record["settings"], asked)
        run.say(f"text tokenizer: {target} is there and matches")
    elif run.rank == 0:
        tokenizer: TextTokenizer | PretrainedTextTokenizer
        if config.start:
            tokenizer = starting_model(config).text_tokenizer
        elif config.generator.pretrained:
            tokenizer = PretrainedTextTokenizer.from_pretrained(config.generator.pretrained)
        else:
            tokenizer = TextTokenizer.train(_texts(paths, config), vocab_size=config.text_tokenizer.vocab_size)
        with checkpoint.whole_directory(target) as folder:
            tokenizer.save(folder / TEXT_TOKENIZER)
            checkpoint.write_record(
                folder / "stage.json", {"settings": asked, "size": tokenizer.size, "fingerprint": tokenizer.fingerprint()}
            )
        run.say(f"text tokenizer: {tokenizer.size} pieces")
    run.wait()
    return target


def load_text_tokenizer(run: Run) -> TextTokenizer | PretrainedTextTokenizer:
    path = run.out / "text_tokenizer" / TEXT_TOKENIZER
    return PretrainedTextTokenizer.load(path) if path.is_dir() else TextTokenizer.load(path)


def _texts(paths: list[Path], config: Config) -> Iterator[str]:
    """Every text that the generator will read: captions in all registers, questions and answers."""
    index = data.ShardIndex(paths)
    for i in range(len(index)):
        try:
            tree = index.read_json(i)
            texts = [*_captions(tree, config).values(), *(str(q[k]) for q in tree.get("questions", []) for k in ("question", "answer"))]
        except BROKEN_RECORD:
            continue  # counted where the sample is encoded
        yield from texts


def _captions(tree: dict[str, Any], config: Config) -> dict[str, str]:
    """register -> normalised caption of a sample's JSON; empty ones are left out."""
    found = {**tree.get("captions", {}), "plain": tree.get(config.data.caption_key, "")}
    return {register: text for register, raw in found.items() if (text := normalize(str(raw or "")))}


# --- codes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodesTask:
    """One image shard that becomes one code shard, on its own and in any process that reaches both."""

    source: Path
    shard: Path
    tokenizer: Path
    config: Config
    prefix: str


def run_codes_task(task: CodesTask) -> dict[str, int]:
    """Encode the shard unless it is there. Returns how many samples were left out, by reason."""
    if task.shard.is_file():
        return {}
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    return encode_shard(task.source, task.shard, _tokenizer_on(task.tokenizer, device), task.config, device, prefix=task.prefix)


@functools.lru_cache(maxsize=1)
def _tokenizer_on(folder: Path, device: torch.device) -> ImageTokenizer:
    return ImageTokenizer.load(folder).to(device)


def codes_tasks(run: Run) -> list[CodesTask]:
    """What `encode_shards` has to do, in order. Raises ValueError when the folder holds codes of other settings or another tokenizer."""
    config, target = run.config, run.out / "codes"
    sources = _codes_sources(config)
    tokenizer = ImageTokenizer.load(run.out / "image_tokenizer")
    asked = _codes_asked(config, tokenizer, sources)
    record = checkpoint.read_record(target / "codes.json")
    if record is not None:
        require_codes_of(target, tokenizer)
        checkpoint.require_same(target, record["settings"], asked)
        return []
    begun = checkpoint.read_record(target / "begun.json")
    if begun is not None:
        checkpoint.require_same(target, begun, asked)
    elif run.rank == 0:
        checkpoint.write_record(target / "begun.json", asked)
    run.wait()
    return [
        CodesTask(path, target / f"{split}-{number:05d}.tar", run.out / "image_tokenizer", config, f"{split}{number:05d}-")
        for split, paths in sources.items()
        for number, path in enumerate(paths)
    ]


def _codes_sources(config: Config) -> dict[str, list[Path]]:
    return {"train": data.expand_shards(config.data.train), "val": data.expand_shards(config.data.val) if config.data.val else []}


def _codes_asked(config: Config, tokenizer: ImageTokenizer, sources: dict[str, list[Path]]) -> dict[str, Any]:
    d, left_out = config.data, {"batch_size"} | ({"positions", "mirror"} if _plain_crops(config) else set())
    return {
        "fingerprint": tokenizer.fingerprint(), "codes": _without(dataclasses.asdict(config.codes), left_out), "seed": config.seed,
        "keys": [d.style, d.style_key, d.subject_key, d.caption_key, *([d.thing_key] if d.thing_key != configs.DataConfig.thing_key else [])],
        "shards": checkpoint.files_fingerprint([p for paths in sources.values() for p in paths]), **_shapes_asked(config),
    }  # fmt: skip


def encode_shards(run: Run) -> Path:
    """Image shards -> code shards `out/codes/{train,val}-*.tar` and `codes.json`. Goes on behind the last whole shard."""
    config, target = run.config, run.out / "codes"
    tasks = codes_tasks(run)
    if not tasks:
        run.say(f"codes: {target} is there and matches ({checkpoint.read_record(target / 'codes.json')['counts']})")
        return target
    for task in tqdm(tasks[run.rank :: run.world], desc="codes", unit="shard", disable=run.rank != 0, dynamic_ncols=True):
        if run.world == 1:  # alone; several processes have different numbers of shards, and meet behind the last
            run.stop_if_asked()
        if skipped := run_codes_task(task):
            tqdm.write(f"codes: {task.source.name}: skipped {skipped}")
    tokenizer, sources = ImageTokenizer.load(run.out / "image_tokenizer"), _codes_sources(config)
    asked = _codes_asked(config, tokenizer, sources)
    run.wait()
    if run.rank == 0:
        counts: dict[str, int] = {}
        skips = {p.stem: json.loads(p.read_text()) for p in sorted(target.glob("*.skipped"))}
        grids, held = configs.parse_grids(config.data.grids) or (tokenizer.grid,), {}
        for split in sources:
            if not sources[split]:
                continue
            index = data.CodeSamples(sorted(target.glob(f"{split}-*.tar")), kept=run.index(f"codes-{split}")).index
            counts[split] = len(index)
            if split == "train":
                held = _count_held(map(index.read_json, range(len(index))), grids)
        checkpoint.write_record(
            target / "codes.json",
            {"fingerprint": asked["fingerprint"], "grid": list(grids[0]), "grids": [list(grid) for grid in grids], "fit": config.data.fit if config.data.grids else "crop",
             "codebook_size": tokenizer.codebook_size, "views": config.codes.views, "counts": counts, "skipped": skips, **held, "settings": asked},
        )  # fmt: skip
        total = sum((Counter(s) for s in skips.values()), Counter())
        run.say(f"codes: {counts} samples of {config.codes.views} views" + (f", skipped {dict(total)}" if total else ""))
    run.wait()
    return target


def _count_held(records: Iterable[dict[str, Any]], grids: Sequence[framing.Grid]) -> dict[str, Any]:
    """What the training samples hold, as codes.json says it: `tag_counts`, `register_counts`, `grid_counts`.

    A row of tag_counts is [style, subject, count]; where there are things or several grids, it is [style, subject, thing, "HxW", count].
    Things that are too rare for a tag (`common_things`) are left out of it.
    """
    rows, registers, shapes = [], Counter[str](), Counter[str]()
    for tree in records:
        grid = framing.grid_text(tree["grid"])
        rows.append((tree["style"], tree["subject"], tree.get("thing", ""), grid))
        registers.update(
            ["plain", *(register for register, caption in tree.get("captions", {}).items() if caption and register != "plain")]
        )
        shapes[grid] += 1
    things = common_things(Counter(row[2] for row in rows if row[2]))
    rows = [(style, subject, thing if thing in things else "", grid) for style, subject, thing, grid in rows]
    wide = bool(things) or len(grids) > 1
    return {
        "tag_counts": count_tags(row if wide else row[:2] for row in rows),
        "register_counts": dict(sorted(registers.items())), "grid_counts": {framing.grid_text(grid): shapes[framing.grid_text(grid)] for grid in grids},
    }  # fmt: skip


def common_things(counts: dict[str, int]) -> set[str]:
    """The things that become tags: the MOST_THINGS most frequent of those with LEAST_OF_THING pictures."""
    often = sorted((word for word, count in counts.items() if count >= LEAST_OF_THING), key=lambda word: (-counts[word], word))
    return set(often[:MOST_THINGS])


CPU_ROWS = 16
LEAST_OF_THING, MOST_THINGS = 20, 400  # pictures that show a thing, for it to be a tag; such tags


def _plain_crops(config: Config) -> bool:
    """Whether the crops are those of before there was a choice: the records of such codes do not name it."""
    return config.codes.positions == "random" and not config.codes.mirror


def encode_shard(
    source: Path, shard: Path, tokenizer: ImageTokenizer, config: Config, device: torch.device, prefix: str = ""
) -> dict[str, int]:
    """One image shard -> one code shard. Samples that cannot be used are left out; returns how many, by reason, and writes
    the same beside the shard (`NAME.skipped`, JSON). A shard without one usable sample becomes an empty one."""
    c, m = config.codes, tokenizer.config
    samples = data.ImageSamples(
        data.ShardIndex([source], one_of=data.IMAGE_SUFFIXES, may_be_empty=True),
        m.image_size,
        m.image_channels,
        0,
        max(2.0, c.crop_scale[1]),
        **_shapes(config),
    )
    skipped = samples.index.skipped
    if samples.index.named:
        tqdm.write(f"codes: {source.name}: left out {samples.index.told()}")
    # as many together whatever is left of the shard, so that the codes are the same bits in any company
    rows = c.batch_size if device.type == "cuda" else CPU_ROWS

    several = bool(config.data.grids)

    def load(i: int) -> str | _Views:
        """One sample with its views, or why it is left out. Runs in a thread: decoding and resizing wait for nobody."""
        try:
            tree, framed = samples.index.read_json(i), samples.framed(i)
            captions = _captions(tree, config)
        except BROKEN_RECORD:
            return "broken sample"
        if "plain" not in captions:
            return "no caption"
        d = config.data
        tree |= {
            "caption": captions["plain"], "captions": captions, "style": tag_word(str(tree.get(d.style_key) or tree.get("style") or d.style)),
            "subject": tag_word(str(tree.get(d.subject_key) or tree.get("subject") or "")), "grid": list(framed.grid if several else tokenizer.grid),
        }  # fmt: skip
        if (thing := tag_word(str(tree.get(d.thing_key) or ""))) or "thing" in tree:
            tree["thing"] = thing
        rng, size = data.rng_for(config.seed, i, stream=3), framed.image.size
        turn = c.mirror and mirror.may_be_mirrored([captions["plain"]])
        boxes = framing.views(framed.box, c.views, c.crop_scale, rng, None if several else size, positions=c.positions, mirror=turn)
        tree["boxes"] = [[round(x, 2) for x in (box if several else box[:3])] for box in boxes]
        if several:
            tree["boxes_of"] = list(size)  # the boxes are in pixels of the picture at this width and height
        return _Views(i, tree, framed.grid, [samples.cut(framed, box) for box in boxes])

    def usable() -> Iterator[_Views]:
        for loaded in _ahead(load, range(len(samples)), threads=2):
            if isinstance(loaded, str):
                skipped[loaded] += 1
            else:
                yield loaded

    def encoded() -> Iterator[dict[str, bytes]]:
        for group in _grouped(
            usable(), max(1, c.batch_size // c.views) * len(samples.grids)
        ):  # of several grids, enough of each for a batch
            for sample, own in zip(group, _encode_views(group, tokenizer, rows=rows, device=device)):
                buffer = io.BytesIO()
                np.save(buffer, own, allow_pickle=False)
                yield {
                    "__key__": prefix + samples.index.key(sample.number), data.CODES_SUFFIX: buffer.getvalue(),
                    "json": json.dumps(sample.tree, ensure_ascii=False, sort_keys=True).encode(),
                }  # fmt: skip

    data.write_shard(shard, encoded(), beside=lambda: {".skipped": json.dumps(skipped, sort_keys=True).encode()} if skipped else {})
    return dict(skipped)


@dataclass(frozen=True)
class _Views:
    """A sample on its way into a code shard."""

    number: int
    tree: dict[str, Any]
    grid: framing.Grid
    pixels: list[np.ndarray]  # uint8 (C, H, W) each


def _encode_views(group: Sequence[_Views], tokenizer: ImageTokenizer, *, rows: int, device: torch.device) -> list[np.ndarray]:
    """uint16 (views, N) of each sample; those of one grid are encoded together."""
    found: dict[int, np.ndarray] = {}
    for grid in dict.fromkeys(sample.grid for sample in group):
        own = [sample for sample in group if sample.grid == grid]
        pixels = data.to_float(np.stack([view for sample in own for view in sample.pixels])).to(device)
        codes = tokenizer.encode(pixels, rows=rows).cpu().numpy().astype(np.uint16).reshape(len(own), len(own[0].pixels), -1)
        found |= {sample.number: one for sample, one in zip(own, codes)}
    return [found[sample.number] for sample in group]


def require_codes_of(folder: Path, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """The record of `folder`, or ValueError with both fingerprints when its codes are another tokenizer's."""
    record = checkpoint.read_record(folder / "codes.json")
    if record is None:
        raise FileNotFoundError(f"{folder / 'codes.json'} is missing: the code shards are not whole. Run the codes stage (train.py) again")
    if record["fingerprint"] != tokenizer.fingerprint():
        raise ValueError(
            f"the codes in {folder} were made by image tokenizer {record['fingerprint']}, this one is {tokenizer.fingerprint()}: "
            f"its ids mean other patches. Delete {folder} to encode again, or put the other tokenizer back"
        )
    return record


def _ahead(function: Callable[[int], Any], items: Iterable[int], *, threads: int, most: int = 64) -> Iterator[Any]:
    """Results of the function, in order, computed in threads a little ahead of their use."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


# --- generator ------------------------------------------------------------------------------------------------------

MOST_TAGS = 64  # styles and subjects that are written as tags; rarer ones stay untagged


def build_vocabulary(config: Config, text_tokenizer: Any, codes: dict[str, Any]) -> Vocabulary:
    """The id space of a run: its text pieces, the tags its training data holds, its codebook."""
    styles, subjects, things = Counter[str](), Counter[str](), Counter[str]()
    for style, subject, *more, count in codes["tag_counts"]:
        for words, word in zip((styles, subjects, things), (style, subject, *more[:1])):
            words[word] += count
    named = [tuple(sorted(sorted((w for w in words if w), key=lambda x: (-words[x], x))[:MOST_TAGS])) for words in (styles, subjects)]
    common = sorted(common_things({word: count for word, count in things.items() if word}))
    held = codes.get("register_counts")  # codes of before it was counted: all, as then
    return Vocabulary(
        text_size=text_tokenizer.size, codebook_size=codes["codebook_size"], styles=named[0], subjects=named[1],
        grids=tuple(tuple(grid) for grid in codes.get("grids", [codes["grid"]])), max_text=config.data.max_caption_tokens, illegal_text=tuple(text_tokenizer.illegal_ids),
        registers=tuple(register for register in REGISTERS if held is None or register in held), things=tuple(common),
    )  # fmt: skip


@_written_to_the_end
def train_generator(run: Run) -> Path:
    """Train the causal LM on the run's code shards -> `out/checkpoint`, the folder that users load."""
    config, target, train = run.config, run.out / "checkpoint", run.config.train
    image_tokenizer = ImageTokenizer.load(run.out / "image_tokenizer")
    codes = require_codes_of(run.out / "codes", image_tokenizer)
    text_tokenizer = load_text_tokenizer(run)
    seed = config.seed if train.seed < 0 else train.seed
    asked = {
        "generator": _without(dataclasses.asdict(config.generator), set() if config.generator.codebook_start else {"codebook_start"}), "seed": seed, "codes": codes["fingerprint"], "counts": codes["counts"],
        "codes_settings": codes["settings"], "text_tokenizer": text_tokenizer.fingerprint(), "max_caption_tokens": config.data.max_caption_tokens, **_started(config),
        "sort_window": config.data.sort_window, "train": _without(dataclasses.asdict(train), LOGGING_KEYS | {"seed", "deepspeed", "micro_batch_size", "gradient_checkpointing", "compile", "loss_chunk"} | _as_before(train)),
    }  # fmt: skip
    run.recover(target)
    record = checkpoint.read_record(target / "training.json")
    if record is not None:
        checkpoint.require_same(target, record["settings"], asked)
        run.say(f"generator: {target} is there and matches" + _stopped_early(record, train, target))
        run.forget("generator")
        return target

    vocabulary = build_vocabulary(config, text_tokenizer, codes)
    slots = Slots(vocabulary.max_codes, vocabulary.max_text)
    share, micro = train.batch_size // run.world, _micro_batch(train, run.world)
    torch.manual_seed(seed)
    model = make_generator(
        config.generator, vocab_size=vocabulary.size, max_length=slots.size + vocabulary.max_text + 16,
        pad=vocabulary.id("<pad>"), bos=vocabulary.id("<bos>"), eos=vocabulary.id("<eos>"),
    )  # fmt: skip
    if config.generator.codebook_start:
        start_from_codebook(model, image_tokenizer.vectors(), vocabulary.code_offset)
    if config.start and run.states("generator").latest() is None:
        before = starting_model(config)
        new = start_from(model, before.generator, before.vocabulary.added_tokens, vocabulary.added_tokens, text_size=vocabulary.text_size)
        run.say(f"generator: goes on from {config.start}" + (f", which did not know {', '.join(new)}" if new else ""))
    add_dropout(model, config.generator.dropout)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    tune_for(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parameters, flops = count_parameters(model), flops_per_token(model, slots.size)  # before ZeRO-3 cuts it
    compiled = train.compile and can_compile(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    token_loss = TokenLoss(model, vocabulary, rows=micro, length=slots.size, chunk=train.loss_chunk, compile=compiled, say=run.say)
    engine = Engine.make(train, model, deepspeed=run.deepspeed, micro=micro, accumulation=share // micro)
    if compiled:
        compile_layers(model)
    elif train.compile:
        run.say(
            "generator: train.compile is on, but there is no C++ compiler (g++, clang++) on this machine: going on without, more slowly"
        )
    ema = optim.Ema(model, train.ema_decay, every=train.ema_every)
    mix = dict(
        task_mix=train.task_mix, tag_dropout=train.tag_dropout, plain_share=train.plain_share, word_dropout=train.word_dropout, seed=seed
    )
    code_paths = {split: sorted((run.out / "codes").glob(f"{split}-*.tar")) for split in ("train", "val")}
    batches = data.TokenBatches(
        data.CodeSamples(code_paths["train"], kept=run.index("codes-train")), vocabulary, text_tokenizer.encode, batch_size=train.batch_size, rank=run.rank, world=run.world,
        threads=config.data.num_workers, sort_window=config.data.sort_window, **mix,
    )  # fmt: skip
    held_out = None
    if code_paths["val"]:
        val = data.CodeSamples(code_paths["val"], kept=run.index("codes-val"))
        size = min(32, len(val))
        whole = data.TokenBatches(
            val, vocabulary, text_tokenizer.encode, batch_size=size, seed=0, task_mix={"joint": 1.0}, tag_dropout=0.0, views=False
        )
        held_out = [whole(step) for step in range(min(12, max(1, len(val) // size)))]

    spikes = health.Spikes(train.spike_factor)
    best = checkpoint.BestCheckpoints(run.out / "best", keep=train.keep_best)
    if run.rank == 0:
        checkpoint.remove_partial(best.folder)
    for kept in best.records():
        _require_same_but_retry(best.path(kept["step"]), kept["settings"], asked)
    states = run.states("generator")
    step, spent = 0, 0.0
    if (latest := states.latest()) is not None:
        saved = json.loads((states.path(latest) / "state.json").read_text())
        _require_same_but_retry(states.path(latest), saved["settings"], asked)
        engine.load(states.path(latest))
        ema.load_state_dict(torch.load(states.path(latest) / "ema.pt", map_location="cpu", weights_only=True))
        if "spikes" in saved:  # states of before there was such a measure have none
            spikes.load_state_dict(saved["spikes"])
        step, spent = latest, saved["spent"]
        run.say(f"generator: resuming at step {step}")
    run.say(
        f"generator: {parameters / 1e6:.2f}M parameters, vocabulary {vocabulary.size} ({vocabulary.text_size} text + {len(vocabulary.controls)} control + "
        f"{vocabulary.codebook_size} image), {len(batches.samples)} samples, {run.world} process(es), {engine}"
    )
    if run.rank == 0:  # weights, two moments, the average
        weights = 4 * parameters
        checkpoint.require_space(run.out, 4 * weights * train_states(config) + weights * (train.keep_best + 1 if train.keep_best else 0))
    rate = health.matmul_rate(engine.device, torch.bfloat16 if train.precision == "bf16" else torch.float32)
    clock = _Clock()

    def save() -> None:
        run.writer.wait()  # before the copies are made: one set of them is enough
        parts = {"engine.pt": engine.state(), "ema.pt": ema.state_dict()}  # all processes gather, the first one writes
        if run.rank != 0:
            return
        parts["ema.pt"] = checkpoint.snapshot(parts["ema.pt"])
        record = {"settings": asked, "spent": spent + clock.seconds(), "world": run.world, "spikes": spikes.state_dict()}

        def write(folder: Path) -> None:
            for name, part in parts.items():
                torch.save(part, folder / name)
            checkpoint.write_record(folder / "state.json", record)

        run.writer.put(states.path(step), write, then=states.prune)

    tasks = tasks_of(batches.samples, train.task_mix)

    def as_checkpoint(generator: nn.Module) -> Tokun:
        return Tokun(
            image_tokenizer.to(engine.device),
            text_tokenizer,
            vocabulary,
            generator,
            config.sampling,
            [tuple(c) for c in codes["tag_counts"]],
            tasks,
            fit=codes.get("fit", ""),
        )

    def record_of(held: dict[str, float]) -> dict[str, Any]:
        return {
            "settings": asked, "steps": step, "stopped_by": _stopped_by(step, train), "seconds": round(spent + clock.seconds()), "train": figures, "val": held,
            "parameters": parameters, "image_tokenizer": checkpoint.read_record(run.out / "image_tokenizer" / "stage.json")["figures"],
        }  # fmt: skip

    def keep_if_best(held: dict[str, float]) -> None:
        loss = train.image_weight * held["image_loss"] + train.text_weight * held["text_loss"]
        if not run.any(run.rank == 0 and best.wants(step, loss)):
            return
        generator = engine.whole_model()
        if run.rank == 0:
            with checkpoint.survived(run.say, best.path(step)), best.put(step, loss, asked) as folder:
                as_checkpoint(generator).save(folder, card=model_card(config, record_of(held)))

    stream = data.prefetch(
        batches, step, burst=max(1, min(16, 2**18 // (share * slots.size)))
    )  # a quarter of a million positions are some megabytes
    bar = tqdm(total=train.steps, initial=step, desc="generator", unit="step", disable=run.rank != 0, dynamic_ncols=True, mininterval=0.5)
    tokens, width, waited, figures = 0.0, 0, 0.0, {}
    while True:
        progress = _progress(run, step, train.steps, spent + clock.seconds(), train.max_minutes)
        if progress >= 1:
            break
        lr = train.lr * optim.warmup_cosine(
            step, progress=progress, warmup=train.warmup_steps, min_ratio=train.min_lr_ratio, hold=train.lr_hold
        )
        engine.set_lr(lr)
        before = time.monotonic()
        batch = next(stream)
        waited += time.monotonic() - before
        sums = _global_sums(run, batch, engine.device)
        means = torch.stack([1 / sums["image"], 1 / sums["text"], 1 / (sums["image"] + sums["text"])])
        weights = means * means.new_tensor([train.image_weight, train.text_weight, train.z_loss])
        _seed_device(_step_seed(seed, step, run.rank), engine.device)  # dropout is a function of (seed, step, rank)
        if not model.training:  # walking over all modules takes as long as a small kernel
            model.train()
        logged = torch.zeros(3, device=engine.device)
        for number in range(share // micro):
            rows = slice(number * micro, (number + 1) * micro)
            with engine.micro_batch(last=number == share // micro - 1):
                loss, parts = token_loss(engine, engine.model, batch.input_ids[rows], batch.labels[rows], weights)
                _require_finite(run, loss, step, "generator", lambda s=step: batches_keys(batches, s))
                engine.backward(loss * run.world)  # the engine averages over processes; the sums are global already
            logged += means * torch.stack([parts[name].detach() for name in losses.LOSS_SUMS])
        norm = engine.norm()
        _require_finite(run, norm, step, "generator", lambda s=step: batches_keys(batches, s), what="gradient norm")
        if spikes.is_spike(norm):
            engine.skip()
        else:
            engine.step()
            ema.update(model)
        step += 1
        tokens += float(sums["tokens"])
        width += batch.input_ids.numel() * run.world  # about: the other processes' rows may be a token longer
        bar.update(1)
        if step % train.log_every == 0 or step == 1:
            if run.world > 1:
                dist.all_reduce(logged)
            seconds = clock.lap()
            image, text, z = logged.tolist()
            figures = {
                "train/loss": train.image_weight * image + train.text_weight * text, "train/image_loss": image, "train/text_loss": text, "train/z": z,
                "train/lr": lr, "train/grad_norm": norm, "train/tokens_per_second": tokens / seconds, "train/data_wait": waited / seconds, "train/padding": 1 - tokens / width,
                "train/mfu": flops * tokens / seconds / (rate * run.world), "train/skipped_spikes": spikes.count,
                "train/peak_memory_gb": health.peak_memory(engine.device) / 2**30,
                "train/epoch": step * train.batch_size / len(batches.samples), "train/skipped": sum(batches.samples.index.skipped.values()),
                "train/cut_captions": batches.cut_captions,
            }  # fmt: skip
            run.tracker.log(figures, step=step)
            bar.set_postfix_str(f"image {image:.3f} text {text:.3f} {tokens / seconds:.0f} tok/s")
            tokens = width = waited = 0
        if held_out and step % train.eval_every == 0:
            with _averaged(model, ema, engine.refresh), uncompiled(model):
                held = evaluate_generator(engine, model, held_out, token_loss)
                with engine.autocast():
                    held["attention_logit_max"] = health.attention_logit_max(model, held_out[0].input_ids[:4].to(engine.device))
                keep_if_best(held)
            run.tracker.log({f"val/{k}": v for k, v in held.items()}, step=step)
            if run.rank == 0:
                bar.write(f"  step {step}: held out " + _line(held))
            clock.lap()
            tokens = width = waited = 0
        run.stop_if_asked(save)
        if step % train.save_every == 0:  # behind the evaluation: a run that goes on from here has it behind it, too
            save()
        if step % train.sample_every == 0 and config.sampling.n > 0:
            with _averaged(model, ema, engine.refresh), uncompiled(model):
                whole = engine.whole_model()
                if run.rank == 0:
                    log_samples(run, as_checkpoint(whole), step)
            clock.lap()
            tokens = width = waited = 0
    bar.close()
    stream.close()
    ema.copy_to(model)
    engine.refresh()
    model.eval()
    with uncompiled(model):
        held = evaluate_generator(engine, model, held_out, token_loss) if held_out else {}
    generator = engine.whole_model()
    if run.rank == 0:
        whole = as_checkpoint(generator.float().eval())
        record = record_of(held) | {"best": [{k: r[k] for k in ("step", "loss")} for r in best.records()]}
        with checkpoint.whole_directory(target) as folder:
            whole.save(folder, card=model_card(config, record))
            checkpoint.write_record(folder / "training.json", record)
        if config.sampling.n > 0:
            with uncompiled(generator):
                log_samples(run, whole, step)
        run.writer.wait()
        run.forget("generator")
        run.say(f"generator: finished after {step} steps, {record['seconds'] / 60:.1f} minutes. {_line(held)}")
        for top in record["best"][:1]:
            run.say(
                f"generator: lowest held-out loss {top['loss']:.4f} at step {top['step']}; its averaged weights: {best.path(top['step'])}"
            )
        run.say(f"checkpoint: {target}\n  python sample.py --checkpoint {target} --seed 42 --n 16")
    run.wait()
    return target


def tasks_of(samples: data.CodeSamples, task_mix: dict[str, float]) -> tuple[str, ...]:
    """The tasks that are trained: those with a share whose fields the first two hundred samples hold."""
    records = [samples.whole_record(i) for i in range(min(200, len(samples)))]
    held = {"question": any(r.questions for r in records), "rewrite": any(len(r.captions) > 1 for r in records)}
    return tuple(task for task, share in task_mix.items() if share > 0 and held.get(task, True))


@torch.no_grad()
def evaluate_generator(engine: Engine, model: Any, batches: Sequence[data.TokenBatch], token_loss: TokenLoss) -> dict[str, float]:
    """Held-out nats per image token and per text token, over full-vocabulary softmax."""
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in token_loss(engine, model, batch.input_ids, batch.labels)[1].items():
            totals[name] = totals.get(name, 0.0) + value.item()
    model.train(was_training)
    return {"image_loss": totals["image_sum"] / totals["image_count"], "text_loss": totals["text_sum"] / totals["text_count"]}


class TokenLoss:
    """The generator's loss of a micro batch: over all of its logits at once, or chunk by chunk where they would be the memory's peak."""

    def __init__(
        self, model: Any, vocabulary: Vocabulary, *, rows: int, length: int, chunk: int, compile: bool, say: Callable[[str], None]
    ):
        self.size, self.is_image = vocabulary.size, vocabulary.is_image
        self.losses = _compiled_for_training(losses.next_token_losses) if compile else losses.next_token_losses
        chunk = loss_chunk(chunk, positions=rows * length, size=self.size, device="cuda" if torch.cuda.is_available() else "cpu")
        self.inside = head_is_last(model)  # the model's forward pass
        if self.inside:
            lose_in_forward(model, size=self.size, chunk=chunk, token_losses=self.losses)
        elif chunk:
            say(f"generator: {type(model).__name__} does more to its logits than its output embedding: the loss takes all of them at once")

    def __call__(
        self, engine: Engine, model: Any, input_ids: Tensor, labels: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """input_ids and labels (B, T) on the CPU, weights (3,) of `losses.LOSS_SUMS` on the engine's device (none: all one) -> the loss,
        and the parts of `losses.next_token_losses`. `model` is the engine's own where gradients are wanted, else the bare one."""
        ids = input_ids.to(engine.device, non_blocking=True)
        self.is_image = is_image = self.is_image.to(engine.device)
        weights = torch.ones(len(losses.LOSS_SUMS), device=engine.device) if weights is None else weights
        if self.inside:
            targets = (t.to(engine.device, non_blocking=True) for t in labelled(labels))  # found on the CPU: the device need not wait
            with engine.autocast():
                return model(input_ids=ids, use_cache=False, targets=(*targets, is_image, weights))
        with engine.autocast():
            logits = model(input_ids=ids, use_cache=False).logits[..., : self.size]
        parts = self.losses(logits, labels.to(engine.device, non_blocking=True), is_image)
        return losses.weighted_loss(parts, weights), parts


def labelled(labels: Tensor, *, multiple: int = 64) -> tuple[Tensor, Tensor]:
    """labels (B, T) -> where there is one, as positions (N,) into the flattened batch, and these labels (N,).

    N is filled up to a multiple by position 0 without a label: a number that no step before had costs as much as its logits do, since a
    CPU's matrix products (oneDNN) are made anew for it.
    """
    flat = labels.flatten()
    positions = (flat != losses.IGNORE).nonzero()[:, 0]
    filling = -len(positions) % multiple
    return F.pad(positions, (0, filling)), F.pad(flat[positions], (0, filling), value=losses.IGNORE)


def _compiled_for_training(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled where gradients are wanted; evaluation is too short to compile for."""
    fast = torch.compile(function, dynamic=True)
    return lambda *arguments: (fast if torch.is_grad_enabled() else function)(*arguments)


def log_samples(run: Run, model: Tokun, step: int) -> None:
    """Draw the run's sample seeds, keep the grid in `out/samples/`, stream it to the tracker."""
    was_training = model.generator.training
    model.eval()
    pairs = model.sample(run.config.sampling.seed, run.config.sampling.n)
    decoder.forget(model.generator)
    model.generator.train(was_training)
    captions = [pair.caption for pair in pairs]
    grid = captioned_grid([pair.image for pair in pairs], captions)
    folder = run.out / "samples"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"step-{step:08d}.png")
    run.tracker.log_grid("samples", grid, [pair.image for pair in pairs], captions, step=step)
    run.tracker.log({"samples/pmi": float(np.mean([pair.pmi for pair in pairs]))}, step=step)


def _global_sums(run: Run, batch: data.TokenBatch, device: torch.device) -> dict[str, Tensor]:
    """Counts over the whole global batch, no less than one: image targets, text targets, and all tokens that are not padding."""
    counts = torch.tensor(batch.counts, dtype=torch.float32, device=device)
    if run.world > 1:
        dist.all_reduce(counts)
    counts = counts.clamp_min(1)
    return {"image": counts[0], "text": counts[1], "tokens": counts[2]}


# --- what stages share ----------------------------------------------------------------------------------------------


def train_states(config: Config) -> int:
    """How many trainer states lie on the disk at once, with the one that is being written."""
    return config.train.keep_last + 1


class _Clock:
    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def lap(self) -> float:
        now = time.monotonic()
        self.last, before = now, self.last
        return max(now - before, 1e-9)


class _averaged:
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


def _progress(run: Run, step: int, steps: int, seconds: float, max_minutes: float) -> float:
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


def _stopped_by(step: int, train: Any) -> str:
    return "steps" if step >= train.steps else f"max_minutes {train.max_minutes:g}"


def _stopped_early(record: dict[str, Any], train: Any, target: Path) -> str:
    """What to say of a finished stage whose time ran out, when more time is given now."""
    before = record.get("stopped_by", "steps")
    if before in ("steps", f"max_minutes {train.max_minutes:g}"):
        return ""
    return f". It was stopped by {before} after {record['steps']} of {train.steps} steps; to train it longer choose another out=, or delete {target}"


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _seed_device(seed: int, device: torch.device) -> None:
    """torch.manual_seed for the CPU and this device alone: it goes to every kind of device there is, which takes most of a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _require_finite(run: Run, value: Tensor | float, step: int, stage: str, keys: Callable[[], Sequence[str]], what: str = "loss") -> None:
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


def _held_out_pictures(config: Config, n: int = 256) -> list[Tensor]:
    """Held-out pictures as they are framed, (k, C, H, W) for each grid."""
    m = config.image_tokenizer
    pattern = config.data.val or config.data.train
    return data.first_frames(data.ImageSamples.open(pattern, image_size=m.image_size, channels=m.image_channels, **_shapes(config)), n)


def _shapes(config: Config) -> dict[str, Any]:
    """What `data.ImageSamples` is told of the shapes of pictures."""
    return {"grids": configs.parse_grids(config.data.grids), "downsample": config.image_tokenizer.downsample, "fit": config.data.fit}


def _shapes_asked(config: Config) -> dict[str, Any]:
    """What a stage's record says of the shapes of pictures: nothing where all are squares, as before there were others."""
    return {"grids": config.data.grids, "fit": config.data.fit} if config.data.grids else {}


def _shapes_line(samples: data.ImageSamples) -> str:
    counts = Counter(samples.shapes.tolist())
    return "image tokenizer: pictures by grid: " + ", ".join(
        f"{framing.grid_text(grid)} {counts[number]}" for number, grid in enumerate(samples.grids)
    )


def _pixels(config: Config) -> str:
    """The sizes of the pictures, height x width where they are no squares."""
    f = config.image_tokenizer.downsample
    return (
        ", ".join(f"{rows * f}x{columns * f}" for rows, columns in configs.parse_grids(config.data.grids)) + " px"
        if config.data.grids
        else f"{config.image_tokenizer.image_size} px"
    )


def _require_same_but_retry(path: Path, made_with: dict[str, Any], asked: dict[str, Any]) -> None:
    """`require_same` for trainer states: what the advice after a non-finite loss names may have changed."""

    def strip(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: _without(v, RETRY_KEYS) if k in ("train", "image_tokenizer_train") else v for k, v in tree.items()}

    checkpoint.require_same(path, strip(made_with), strip(asked))


def _as_before(train: configs.TrainConfig | configs.ImageTokenizerTrainConfig) -> set[str]:
    """Settings that runs of before they were there have none of, and which change nothing as they stand."""
    return {name for name, idle in {"ema_every": 1, "word_dropout": 0.0, "lr_hold": 0.0}.items() if getattr(train, name, None) == idle}


def _started(config: Config) -> dict[str, str]:
    """What a stage's record says of the checkpoint that the run goes on from."""
    return {"start": config.start} if config.start else {}


def _without(tree: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {k: v for k, v in tree.items() if k not in keys}


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M"


def _line(figures: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in figures.items())

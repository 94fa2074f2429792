"""The second stage: the VQ-VAE, pictures in, `out/image_tokenizer` out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from tokun import data
from tokun.data import framing
from tokun.models import losses
from tokun.models.generator import (
    can_compile,
    count_parameters,
)
from tokun.tokenizers.image import ImageTokenizer
from tokun.training import loop, optim
from tokun.training.engine import make_accelerator
from tokun.training.gan import Adversary
from tokun.training.loop import Clock, averaged, batches_keys, finish_writing, share_done, step_seed
from tokun.training.reconstruction import gate, inspect_image_tokenizer
from tokun.training.records import (
    GATE_KEYS,
    LOGGING_KEYS,
    figures_line,
    idle_settings,
    require_same_but_retry,
    started_from,
    stopped_by,
    stopped_early,
    without,
)
from tokun.training.run import Run, starting_model, states_on_disk
from tokun.training.shapes import held_out_pictures, shape_options, shapes_asked, shapes_line, sizes_line
from tokun.utils import checkpoint


@finish_writing
def train_image_tokenizer(run: Run) -> Path:
    """Train the VQ-VAE on the run's image shards -> `out/image_tokenizer`. Stops the run when it has collapsed."""
    config, target = run.config, run.out / "image_tokenizer"
    train, model_config = config.image_tokenizer_train, config.image_tokenizer
    paths = data.expand_shards(config.data.train)
    asked = {
        "image_tokenizer": dataclasses.asdict(model_config),
        "image_tokenizer_train": without(dataclasses.asdict(train), LOGGING_KEYS | GATE_KEYS | {"compile"} | idle_settings(train)),
        "seed": config.seed,
        "shards": checkpoint.files_fingerprint(paths),
        **shapes_asked(config),
        **started_from(config),
    }
    run.recover(target)
    record = checkpoint.read_record(target / "stage.json")
    if record is not None:
        checkpoint.require_same(target, record["settings"], asked)
        run.say(
            f"image tokenizer: {target} is there and matches. " + figures_line(record["figures"]) + stopped_early(record, train, target)
        )
        run.forget("image_tokenizer")
        gate(record["figures"], train, model_config.codebook_size)
        return target
    if config.start:
        return _take_image_tokenizer(run, asked)

    accelerator = make_accelerator(train.precision)
    device = accelerator.device
    samples = data.ImageSamples.open(
        config.data.train, image_size=model_config.image_size, channels=model_config.image_channels,
        cache_gb=config.data.cache_gb / run.world, max_scale=train.crop_scale[1], kept=run.index("images"), **shape_options(config),
    )  # fmt: skip
    if config.data.grids:
        if run.rank == 0:
            run.say(shapes_line(samples))
        run.wait()  # the others find the sizes where the first process has kept them
    batches = data.ImageBatches(
        samples, batch_size=train.batch_size, scale=train.crop_scale, seed=config.seed,
        rank=run.rank, world=run.world, threads=config.data.num_workers,
    )  # fmt: skip
    held_out = held_out_pictures(config)

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
    adversary = Adversary.make(discriminator, train, accelerator)

    states = run.states("image_tokenizer")
    step, spent = 0, 0.0
    if (latest := states.latest()) is not None:
        state = torch.load(states.path(latest) / "state.pt", map_location=device, weights_only=True)
        require_same_but_retry(states.path(latest), json.loads(state["settings"]), asked)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        adversary.load_state_dict(state["adversary"])
        step, spent = latest, state["spent"]
        run.say(f"image tokenizer: resuming at step {step}")
    run.say(
        f"image tokenizer: {_millions(model)} parameters, {len(samples)} pictures, {sizes_line(config)} -> "
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
        checkpoint.require_space(run.out, 4 * (4 * sizes[0] + 3 * sizes[1]) * states_on_disk(config))
    clock, logged_at = Clock(), step
    stream = data.prefetch(batches, step)
    bar = tqdm(total=train.steps, initial=step, desc="image tokenizer", unit="step", disable=run.rank != 0, dynamic_ncols=True)
    done = False
    while not done:
        progress = share_done(run, step, train.steps, spent + clock.seconds(), train.max_minutes)
        if progress >= 1:
            break
        lr = train.lr * optim.warmup_cosine(step, progress=progress, warmup=train.warmup_steps, hold=train.lr_hold)
        optim.set_lr(optimizer, lr)
        torch.manual_seed(step_seed(config.seed, step, 0))  # dead codes are replaced by the same vectors on every run
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
        loop.require_finite(run, loss, step, "image tokenizer", lambda s=step: batches_keys(batches, s))
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), train.max_grad_norm))
        loop.require_finite(run, norm, step, "image tokenizer", lambda s=step: batches_keys(batches, s), what="gradient norm")
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
            with averaged(model, ema):
                figures, sheet = inspect_image_tokenizer(model, held_out, device)
            run.tracker.log({f"image_tokenizer/val_{k}": v for k, v in figures.items()}, step=step)
            run.tracker.log_image("image_tokenizer/reconstructions", sheet, step=step)
            bar.write(f"  step {step}: " + figures_line(figures))
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
                {"settings": asked, "figures": figures, "steps": step, "stopped_by": stopped_by(step, train),
                 "seconds": round(spent + clock.seconds()), "fingerprint": model.fingerprint(), "skipped": dict(samples.index.skipped)},
            )  # fmt: skip
        run.writer.wait()
        run.forget("image_tokenizer")
    run.tracker.log({f"image_tokenizer/val_{k}": v for k, v in figures.items()}, step=step)
    run.tracker.log_image("image_tokenizer/reconstructions", sheet, step=step)
    if samples.index.skipped:
        run.say(f"image tokenizer: skipped {samples.index.told()}")
    run.say(f"image tokenizer: finished after {step} steps. " + figures_line(figures))
    run.wait()
    gate(figures, train, model_config.codebook_size)
    return target


def _take_image_tokenizer(run: Run, asked: dict[str, Any]) -> Path:
    """The image tokenizer of `start` -> `out/image_tokenizer`, measured on this run's pictures. Stops the run where it cannot draw them."""
    config, target = run.config, run.out / "image_tokenizer"
    model = starting_model(config).image_tokenizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures, sheet = inspect_image_tokenizer(model.to(device), held_out_pictures(config), device)
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
    run.say(f"image tokenizer: that of {config.start}. " + figures_line(figures))
    run.wait()
    gate(figures, config.image_tokenizer_train, config.image_tokenizer.codebook_size)
    return target


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M"

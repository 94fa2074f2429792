"""The fourth stage: the causal LM, code shards in, `out/checkpoint` out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from tokun import data
from tokun.config import Config
from tokun.inference import decoder
from tokun.inference.latents import Slots
from tokun.inference.model import Tokun
from tokun.inference.model_card import model_card
from tokun.models import losses
from tokun.models.generator import (
    add_dropout,
    can_compile,
    compile_layers,
    count_parameters,
    flops_per_token,
    make_generator,
    start_from,
    start_from_codebook,
    tune_for,
    uncompiled,
)
from tokun.render.grids import captioned_grid
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.vocabulary import REGISTERS, Vocabulary
from tokun.training import health, loop, optim
from tokun.training.codes import common_things, require_codes_of
from tokun.training.engine import Engine
from tokun.training.loop import Clock, averaged, batches_keys, finish_writing, seed_device, share_done, step_seed
from tokun.training.records import (
    LOGGING_KEYS,
    figures_line,
    idle_settings,
    require_same_but_retry,
    started_from,
    stopped_by,
    stopped_early,
    without,
)
from tokun.training.run import Run, micro_batch, starting_model, states_on_disk
from tokun.training.text_tokenizer import load_text_tokenizer
from tokun.training.token_loss import TokenLoss
from tokun.utils import checkpoint

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


@finish_writing
def train_generator(run: Run) -> Path:
    """Train the causal LM on the run's code shards -> `out/checkpoint`, the folder that users load."""
    config, target, train = run.config, run.out / "checkpoint", run.config.train
    image_tokenizer = ImageTokenizer.load(run.out / "image_tokenizer")
    codes = require_codes_of(run.out / "codes", image_tokenizer)
    text_tokenizer = load_text_tokenizer(run)
    seed = config.seed if train.seed < 0 else train.seed
    asked = {
        "generator": without(dataclasses.asdict(config.generator), set() if config.generator.codebook_start else {"codebook_start"}), "seed": seed, "codes": codes["fingerprint"], "counts": codes["counts"],
        "codes_settings": codes["settings"], "text_tokenizer": text_tokenizer.fingerprint(), "max_caption_tokens": config.data.max_caption_tokens, **started_from(config),
        "sort_window": config.data.sort_window, "train": without(dataclasses.asdict(train), LOGGING_KEYS | {"seed", "deepspeed", "micro_batch_size", "gradient_checkpointing", "compile", "loss_chunk"} | idle_settings(train)),
    }  # fmt: skip
    run.recover(target)
    record = checkpoint.read_record(target / "training.json")
    if record is not None:
        checkpoint.require_same(target, record["settings"], asked)
        run.say(f"generator: {target} is there and matches" + stopped_early(record, train, target))
        run.forget("generator")
        return target

    vocabulary = build_vocabulary(config, text_tokenizer, codes)
    slots = Slots(vocabulary.max_codes, vocabulary.max_text)
    share, micro = train.batch_size // run.world, micro_batch(train, run.world)
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
        require_same_but_retry(best.path(kept["step"]), kept["settings"], asked)
    states = run.states("generator")
    step, spent = 0, 0.0
    if (latest := states.latest()) is not None:
        saved = json.loads((states.path(latest) / "state.json").read_text())
        require_same_but_retry(states.path(latest), saved["settings"], asked)
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
        checkpoint.require_space(run.out, 4 * weights * states_on_disk(config) + weights * (train.keep_best + 1 if train.keep_best else 0))
    rate = health.matmul_rate(engine.device, torch.bfloat16 if train.precision == "bf16" else torch.float32)
    clock = Clock()

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
            "settings": asked, "steps": step, "stopped_by": stopped_by(step, train), "seconds": round(spent + clock.seconds()), "train": figures, "val": held,
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
        progress = share_done(run, step, train.steps, spent + clock.seconds(), train.max_minutes)
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
        seed_device(step_seed(seed, step, run.rank), engine.device)  # dropout is a function of (seed, step, rank)
        if not model.training:  # walking over all modules takes as long as a small kernel
            model.train()
        logged = torch.zeros(3, device=engine.device)
        for number in range(share // micro):
            rows = slice(number * micro, (number + 1) * micro)
            with engine.micro_batch(last=number == share // micro - 1):
                loss, parts = token_loss(engine, engine.model, batch.input_ids[rows], batch.labels[rows], weights)
                loop.require_finite(run, loss, step, "generator", lambda s=step: batches_keys(batches, s))
                engine.backward(loss * run.world)  # the engine averages over processes; the sums are global already
            logged += means * torch.stack([parts[name].detach() for name in losses.LOSS_SUMS])
        norm = engine.norm()
        loop.require_finite(run, norm, step, "generator", lambda s=step: batches_keys(batches, s), what="gradient norm")
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
            with averaged(model, ema, engine.refresh), uncompiled(model):
                held = evaluate_generator(engine, model, held_out, token_loss)
                with engine.autocast():
                    held["attention_logit_max"] = health.attention_logit_max(model, held_out[0].input_ids[:4].to(engine.device))
                keep_if_best(held)
            run.tracker.log({f"val/{k}": v for k, v in held.items()}, step=step)
            if run.rank == 0:
                bar.write(f"  step {step}: held out " + figures_line(held))
            clock.lap()
            tokens = width = waited = 0
        run.stop_if_asked(save)
        if step % train.save_every == 0:  # behind the evaluation: a run that goes on from here has it behind it, too
            save()
        if step % train.sample_every == 0 and config.sampling.n > 0:
            with averaged(model, ema, engine.refresh), uncompiled(model):
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
        run.say(f"generator: finished after {step} steps, {record['seconds'] / 60:.1f} minutes. {figures_line(held)}")
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

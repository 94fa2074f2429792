"""The fourth stage: trains the causal LM on code shards, writes `out/checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokun import data
from tokun.config import Config, TrainConfig
from tokun.inference.adapters import fingerprint
from tokun.inference.checkpoint_folder import read_settings
from tokun.inference.folders import GENERATOR, MATCHING, SAMPLING, is_bundled, resolve
from tokun.inference.latents import Slots
from tokun.inference.model import Tokun
from tokun.inference.model_card import model_card
from tokun.models import feature_alignment, losses
from tokun.models.generator import (
    add_dropout,
    can_compile,
    compile_layers,
    count_parameters,
    depth_of,
    flops_per_token,
    make_generator,
    start_from,
    start_from_codebook,
    tune_for,
    uncompiled,
)
from tokun.tokenizers import sequences
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.text import PretrainedTextTokenizer, TextTokenizer
from tokun.tokenizers.vocabulary import REGISTERS, Vocabulary
from tokun.training import adapters, health, loop, step_log
from tokun.training.codes import common_things, require_codes_of
from tokun.training.distributed_stage import EngineStage, is_finished, result_folder
from tokun.training.engine import Engine, summed
from tokun.training.feature_alignment import Targets
from tokun.training.feature_alignment import targets as alignment_targets
from tokun.training.generator_evaluation import closing_lines, evaluate_generator, held_out_batches, log_samples, weighted
from tokun.training.initial_checkpoint import starting_model
from tokun.training.resume_settings import change_line, figures_line, recorded, require_same_but_retry, started_from, without
from tokun.training.run import Run, micro_batch, states_on_disk
from tokun.training.start_report import time_line, too_few_held_out
from tokun.training.text_tokenizer import load_text_tokenizer
from tokun.training.token_loss import TokenLoss
from tokun.utils import checkpoint
from tokun.utils.console import typed_path

MOST_TAGS = 64  # styles and subjects that become tags; rarer ones stay untagged


def build_vocabulary(config: Config, text_tokenizer: Any, codes: dict[str, Any]) -> Vocabulary:
    """The id space of a run: its text pieces, the tags in its training data, its codebook."""
    styles, subjects, things = Counter[str](), Counter[str](), Counter[str]()
    for style, subject, *more, count in codes["tag_counts"]:
        for words, word in zip((styles, subjects, things), (style, subject, *more[:1])):
            words[word] += count
    named = [tuple(sorted(sorted((w for w in words if w), key=lambda x: (-words[x], x))[:MOST_TAGS])) for words in (styles, subjects)]
    common = sorted(common_things({word: count for word, count in things.items() if word}))
    held = codes.get("register_counts")  # older records do not count them: use all
    return Vocabulary(
        text_size=text_tokenizer.size, codebook_size=codes["codebook_size"], styles=named[0], subjects=named[1],
        grids=tuple(tuple(grid) for grid in codes.get("grids", [codes["grid"]])),
        max_text=config.data.max_caption_tokens, illegal_text=tuple(text_tokenizer.illegal_ids),
        registers=tuple(register for register in REGISTERS if held is None or register in held), things=tuple(common),
    )  # fmt: skip


def train_generator(run: Run) -> Path:
    """Train the causal LM on the run's code shards -> `out/checkpoint`, the folder that users load; with `adapter.rank`, `out/adapter`."""
    target, parts = result_folder(run), Parts.of(run)
    settings = _settings(run.config, parts)
    if is_finished(run, "generator", target, settings):
        run.say(where_to(target, run.config))
        return target
    stage = GeneratorStage(run, parts, settings)
    loop.train(stage)
    stage.finish(target)
    return target


@dataclasses.dataclass(frozen=True)
class Parts:
    """The results of the earlier stages."""

    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer | PretrainedTextTokenizer
    codes: dict[str, Any]  # the record of the code shards
    vocabulary: Vocabulary
    base: str = ""  # the fingerprint of an adapter's base

    @classmethod
    def of(cls, run: Run) -> Parts:
        image_tokenizer = ImageTokenizer.load(run.out / "image_tokenizer")
        codes = require_codes_of(run.out / "codes", image_tokenizer)
        text_tokenizer = load_text_tokenizer(run)
        vocabulary, base = build_vocabulary(run.config, text_tokenizer, codes), ""
        if run.config.adapter.rank:
            before = starting_model(run.config)
            base = fingerprint(before.generator, before.vocabulary)
            vocabulary = adapters.vocabulary_of(before, vocabulary, new_tags=run.config.adapter.new_tags)
        return cls(image_tokenizer, text_tokenizer, codes, vocabulary, base)

    @property
    def slots(self) -> Slots:
        return Slots(self.vocabulary.max_codes, self.vocabulary.max_text)

    def checkpoint(self, generator: nn.Module, config: Config, tasks: Sequence[str], device: torch.device) -> Tokun:
        """The whole model, as users load it."""
        tags = [tuple(c) for c in self.codes["tag_counts"]]
        asked = tuple(self.codes.get("question_wordings", ())) if "question" in tasks else ()
        return Tokun(
            self.image_tokenizer.to(device), self.text_tokenizer, self.vocabulary, generator, config.sampling, tags, tuple(tasks),
            fit=self.codes.get("fit", ""), unrepeated_words=self.unrepeated_words(config.start), question_wordings=asked,
        )  # fmt: skip

    def unrepeated_words(self, start: str) -> tuple[str, ...]:
        """The unrepeated words of the codes' record, which include those of the checkpoint `start`; for an older record, the latter."""
        if "unrepeated_words" in self.codes or not start:
            return tuple(self.codes.get("unrepeated_words", ()))
        return tuple(read_settings(resolve(start) / SAMPLING).unrepeated_words)


def steps_of(train: TrainConfig, pictures: int) -> int:
    """The steps of a training on so many pictures: `steps`, or fewer with `passes`."""
    if not train.passes:
        return train.steps
    return min(train.steps, max(2 * train.warmup_steps, math.ceil(train.passes * pictures / train.batch_size)))


def training_seed(config: Config) -> int:
    """The seed of the generator's initial weights, order, dropout and tasks."""
    return config.seed if config.train.seed < 0 else config.train.seed


def _settings(config: Config, parts: Parts) -> dict[str, Any]:
    """The settings in the stage's record."""
    idle = set() if config.generator.codebook_start else {"codebook_start"}
    return {
        "generator": without(dataclasses.asdict(config.generator), idle), "seed": training_seed(config),
        "codes": parts.codes["fingerprint"], "counts": parts.codes["counts"], "codes_settings": parts.codes["settings"],
        "text_tokenizer": parts.text_tokenizer.fingerprint(),
        "max_caption_tokens": config.data.max_caption_tokens, "sort_window": config.data.sort_window, **started_from(config, parts.base),
        **recorded(config),
    }  # fmt: skip


def _make_model(run: Run, parts: Parts) -> tuple[Any, adapters.Tuned | None]:
    """The causal LM with initial weights, dropout and kernels, on the CPU; and its adapter, if any."""
    config, tuned = run.config, None
    torch.manual_seed(training_seed(config))
    if config.adapter.rank:
        tuned = adapters.attach(config, starting_model(config), parts.vocabulary)
        tuned.say(run.say)
    model = _first_weights(run, parts) if tuned is None else tuned.generator
    add_dropout(model, config.generator.dropout)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    tune_for(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model, tuned


def _first_weights(run: Run, parts: Parts) -> Any:
    """Initial weights from torch's global generator, or from the checkpoint that `start` names."""
    config, v = run.config, parts.vocabulary
    model = make_generator(
        config.generator, vocab_size=v.size, max_length=sequences.most_positions(v),
        pad=v.id("<pad>"), bos=v.id("<bos>"), eos=v.id("<eos>"),
    )  # fmt: skip
    if config.generator.codebook_start:
        start_from_codebook(model, parts.image_tokenizer.vectors(), v.code_offset)
    if config.start and run.states("generator").latest() is None:
        before = starting_model(config)
        new = start_from(model, before.generator, before.vocabulary.added_tokens, v.added_tokens, text_size=v.text_size)
        grown = config.generator.num_layers - depth_of(before.generator)
        run.say(
            f"generator: starting from {config.start}"
            + (f"; layers added: {grown}" if grown else "")
            + (f"; new tags: {', '.join(new)}" if new else "")
        )
    return model


def _training_batches(run: Run, parts: Parts) -> data.TokenBatches:
    config, train = run.config, run.config.train
    samples = data.CodeSamples(sorted((run.out / "codes").glob("train-*.tar")), cache_file=run.index("codes-train"))
    return data.TokenBatches(
        samples, parts.vocabulary, parts.text_tokenizer.encode, batch_size=train.batch_size, rank=run.rank, world=run.world,
        threads=config.data.num_workers, sort_window=config.data.sort_window, seed=training_seed(config), task_mix=train.task_mix,
        tag_dropout=train.tag_dropout, plain_share=train.plain_share, word_dropout=train.word_dropout, untagged_share=train.untagged_share,
    )  # fmt: skip


class GeneratorStage(EngineStage):
    """Trains the causal LM on batches of packed sequences, and keeps the checkpoints of lowest held-out loss."""

    name = "generator"

    def __init__(self, run: Run, parts: Parts, settings: dict[str, Any]) -> None:
        self.config, self.train, self.parts = run.config, run.config.train, parts
        train = self.train
        self.micro, self.seed = micro_batch(train, run.world), training_seed(run.config)
        self.accumulation = train.batch_size // run.world // self.micro
        model, self.tuned = _make_model(run, parts)
        self.trained = self.tuned.size if self.tuned else count_parameters(model)
        self.parameters, self.flops = count_parameters(model), flops_per_token(model, parts.slots.size)  # before ZeRO-3 partitions it
        targets = self._align(run, model)
        if train.compile:
            run.say("generator: preparing; compiling takes the first step half a minute to some minutes …")
        compiled = train.compile and can_compile(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.token_loss = TokenLoss(
            model, parts.vocabulary, rows=self.micro, length=parts.slots.size, chunk=train.loss_chunk, compile=compiled, say=run.say
        )
        engine = Engine.make(train, model, deepspeed=run.deepspeed, micro=self.micro, accumulation=self.accumulation)
        if compiled:
            compile_layers(model)
        elif train.compile:
            run.say("generator: train.compile is on, but this machine has no C++ compiler (g++, clang++): training uncompiled, more slowly")
        if targets:
            model.alignment.watch(feature_alignment.watched_layer(model, train.align_layer))
        self.held_out = held_out_batches(run, parts.vocabulary, parts.text_tokenizer.encode)
        schedule = loop.Schedule.of(
            train,
            steps=steps_of(train, parts.codes["counts"]["train"]),
            eval_every=train.eval_every if self.held_out else 0,
            sample_every=train.sample_every if run.config.sampling.n > 0 else 0,
        )
        super().__init__(run, schedule, model=model, engine=engine, settings=settings)
        self.targets = targets
        self.training_batches = _training_batches(run, parts)
        self.tasks = tasks_of(self.training_batches.samples, train.task_mix, parts.codes)
        self.best = self._open_best()
        self.rate = health.matmul_rate(engine.device, torch.bfloat16 if train.precision == "bf16" else torch.float32)

    def _align(self, run: Run, model: Any) -> Targets | None:
        """With `train.align_weight`, give the model its alignment head. Returns the head's targets."""
        if not self.train.align_weight:
            return None
        feature_alignment.attach(model)
        return alignment_targets(run, self.parts.image_tokenizer, self.parts.codes["fingerprint"], self.parts.vocabulary)

    def _open_best(self) -> checkpoint.BestCheckpoints:
        if self.train.keep_best and not self.held_out:
            self.run.say("generator: train.keep_best needs held-out pictures: set data.val")
        best = checkpoint.BestCheckpoints(self.run.out / "best", keep=self.train.keep_best)
        if self.run.rank == 0:
            checkpoint.remove_partial(best.folder)
        for kept in best.records():
            require_same_but_retry(best.path(kept["step"]), kept["settings"], self.settings)
        return best

    @property
    def few(self) -> str:
        """The warning about a held-out set that is too small; "" for none."""
        return too_few_held_out(self.parts.codes["counts"].get("val", 0))

    def describe(self) -> str:
        v = self.parts.vocabulary
        return (
            f"{self.parameters / 1e6:.2f}M parameters, vocabulary {v.size} ({v.text_size} text + {len(v.controls)} control + "
            f"{v.codebook_size} image), {len(self.training_batches.samples)} samples, {self.run.world} process(es), {self.engine}\n"
            + time_line(
                steps=self.schedule.steps, batch_size=self.train.batch_size, pictures=len(self.training_batches.samples),
                max_minutes=self.train.max_minutes, going_on=bool(self.config.start), name="train",
                by_passes=self.schedule.steps < self.train.steps, adapter=bool(self.config.adapter.rank),
            )
            + (f"\ngenerator: {self.few}" if self.few else "")
        )  # fmt: skip

    def disk_bytes(self) -> int:
        """Trainer states of weights, two moments and the average, plus the best checkpoints."""
        weights, kept = 4 * self.trained, self.train.keep_best
        return 4 * weights * states_on_disk(self.config) + weights * (kept + 1 if kept else 0)

    def batches(self, start: int) -> Generator[data.TokenBatch, None, None]:
        positions = self.train.batch_size // self.run.world * self.parts.slots.size
        return data.prefetch(self.training_batches, start, burst=max(1, min(16, 2**18 // positions)))  # of some megabytes

    def batch_keys(self) -> Sequence[str]:
        return loop.batches_keys(self.training_batches, self.step)

    def take_step(self, batch: data.TokenBatch, lr: float) -> None:
        train, engine = self.train, self.engine
        engine.set_lr(lr)
        image, text, tokens = _global(self.run, batch.counts, engine.device)  # image targets, text targets, all tokens except padding
        means = torch.stack([1 / count for count in losses.term_counts(image, text)])
        weights = means * means.new_tensor([getattr(train, term.weight) for term in losses.TERMS.values()])
        loop.seed_device(loop.step_seed(self.seed, self.step, self.run.rank), engine.device)  # dropout is a function of (seed, step, rank)
        if not self.model.training:  # visiting all modules takes as long as a small kernel
            self.model.train()
        if self.targets:
            means = torch.cat([means, 1 / _global(self.run, [self.targets.count(batch.input_ids)], engine.device)])
        names = (*losses.TERMS, *(["align_sum"] if self.targets else []))
        losses_here = torch.zeros(len(names), device=engine.device)
        for number in range(self.accumulation):
            rows = slice(number * self.micro, (number + 1) * self.micro)
            with engine.micro_batch(last=number == self.accumulation - 1):
                ids = batch.input_ids[rows]
                aligned = (*self.targets(ids), train.align_weight * means[-1]) if self.targets else ()
                loss, parts = self.token_loss(engine, engine.model, ids, batch.labels[rows], weights, aligned)
                self.require_finite(loss)
                # the engine averages over processes, but the loss is already a share of the global mean
                engine.backward(loss * self.run.world)
            losses_here += means * torch.stack([parts[name].detach() for name in names])
        norm = self.update()
        self.window.counts["tokens"] += float(tokens)
        # approximately: other processes' rows may be a token longer
        self.window.counts["width"] += batch.input_ids.numel() * self.run.world
        self.last = names, losses_here, norm, lr

    def figures(self) -> tuple[dict[str, float], str]:
        names, losses_here, norm, lr = self.last
        train, batches = self.train, self.training_batches
        weights, rate = (train.image_weight, train.text_weight), self.rate * self.run.world
        found = dict(zip(names, summed(losses_here, self.run.world).tolist(), strict=True))
        own, words = step_log.of_generator(self.window, found, weights=weights, flops=self.flops, rate=rate)
        skipped = step_log.of_samples(batches.samples.index.skipped, batches.cut_captions)
        self.logged = own | self.update_figures(norm, lr, items=len(batches.samples)) | skipped
        return self.logged, words

    def measure_start(self) -> str:
        """The held-out losses of the checkpoint that the run starts from."""
        if not self.config.start or not self.held_out:
            return ""
        with uncompiled(self.model):  # nothing is averaged yet
            return self.start_measured(evaluate_generator(self.engine, self.model, self.held_out, self.token_loss))

    def evaluate(self) -> str:
        with self.averaged():
            held = evaluate_generator(self.engine, self.model, self.held_out, self.token_loss)
            with self.engine.autocast_bare():
                held["attention_logit_max"] = health.attention_logit_max(self.model, self.held_out[0].input_ids[:4].to(self.engine.device))
            self._keep_if_best(held)
        self.run.tracker.log({f"val/{name}": value for name, value in held.items()}, step=self.step)
        return f"held out {figures_line(held)}"

    def sample(self) -> None:
        with self.averaged():
            whole = self._whole()
            if whole is not None:
                log_samples(self.run, whole, self.step)

    def _whole(self) -> Tokun | None:
        """The model as users load it, with the current weights. A collective call; only the first process gets it."""
        if self.tuned is None:
            generator = self.engine.whole_model()
            if generator is None:
                return None
            return self.parts.checkpoint(feature_alignment.without_head(generator), self.config, self.tasks, self.engine.device)
        tensors = self.tuned.tensors()
        if self.run.rank > 0:
            return None
        tags = [tuple(c) for c in self.parts.codes["tag_counts"]]
        asked = tuple(self.parts.codes.get("question_wordings", ())) if "question" in self.tasks else None
        adapter = self.tuned.adapter(tensors, tag_counts=tags, tasks=self.tasks, question_wordings=asked)
        return self.tuned.model(adapter).to(self.engine.device)

    def _save(self, whole: Tokun, folder: Path, record: dict[str, Any]) -> None:
        """Write the checkpoint, or the active adapter, to a folder."""
        if self.tuned is None:
            whole.save(folder, card=model_card(self.config, record))
            return
        counts = self.parts.codes["counts"]
        about = f"Trained on {counts['train']:,} pictures with captions" + (f", {counts['val']:,} held out." if counts.get("val") else ".")
        self.tuned.write(whole, folder, adapters.card(self.config, record, self.tuned, about=about, figures=adapters.held_out_rows(record)))

    def _record(self, held: dict[str, float]) -> dict[str, Any]:
        image_tokenizer = checkpoint.read_record(self.run.out / "image_tokenizer" / "stage.json")
        assert image_tokenizer is not None, "the stage before has ended"
        return self.record(
            planned=self.schedule.steps, val=held, parameters=self.parameters, trained=self.trained,
            image_tokenizer=image_tokenizer["figures"],
        )  # fmt: skip

    def _loss_of(self, held: dict[str, float]) -> float:
        return weighted(held, self.train)

    def _keep_if_best(self, held: dict[str, float]) -> None:
        loss = self._loss_of(held)
        run, best = self.run, self.best
        if not run.any(run.rank == 0 and best.wants(self.step, loss)):
            return
        whole = self._whole()
        if whole is not None:
            with checkpoint.write_errors_reported(run.say, best.path(self.step)), best.put(self.step, loss, self.settings) as folder:
                self._save(whole, folder, self._record(held))

    def finish(self, target: Path) -> None:
        """Write the model with its averaged weights to `target`."""
        self.take_average()
        self.model.eval()
        with uncompiled(self.model):
            held = evaluate_generator(self.engine, self.model, self.held_out, self.token_loss) if self.held_out else {}
        whole = self._whole()
        if whole is not None:
            whole.generator.float().eval()
            self._write(target, whole, held)
        self.run.wait()

    def _write(self, target: Path, whole: Tokun, held: dict[str, float]) -> None:
        run, best = self.run, self.best.records()
        record: dict[str, Any] = self._record(held) | {"best": [{k: r[k] for k in ("step", "loss")} for r in best]}
        with checkpoint.whole_directory(target) as folder:
            self._save(whole, folder, record)
            checkpoint.write_record(folder / "training.json", record)
        if self.config.sampling.n > 0:
            with uncompiled(whole.generator):
                log_samples(run, whole, self.step)
        run.remove_states("generator")
        change = f"Held out: {change_line(self.held_before, held)}" if held else "Nothing was held out"
        run.say(f"generator: {self.schedule.ended(self.step)}, {record['seconds'] / 60:.1f} minutes. {change}")
        run.say(where_to(target, self.config) + matching_command(target, self.config))
        if held:
            pictures = sum(len(batch.input_ids) for batch in self.held_out)
            before = self._loss_of(self.held_before) if self.held_before else None
            for line in closing_lines(
                before, self._loss_of(held), best[0] if best else None, self.train, pictures=pictures, sample_best=self._where_to_step
            ):
                run.say(line)
        if held and self.few:
            run.say(f"generator: {self.few}")
        if self.schedule.stopped_by(self.step) != "steps":
            share = self.step / self.schedule.steps
            run.say(
                f"generator: train.max_minutes ended it after {share:.0%} of its steps; to train longer, raise train.max_minutes "
                "and choose a new out="
            )

    def _where_to_step(self, step: int) -> str:
        path = self.best.path(step)
        return where_to(path, self.config) + matching_command(path, self.config)


def where_to(target: Path, config: Config) -> str:
    """The closing message: where the result is, and how to sample from it."""
    if not config.adapter.rank:
        return f"checkpoint: {target}\n  tokun sample --checkpoint {shlex.quote(typed_path(target))} --seed 42 --n 16"
    base = "" if is_bundled(config.start) else f"--checkpoint {shlex.quote(typed_path(config.start))} "
    return f"adapter: {target}\n  tokun sample {base}--adapter {shlex.quote(typed_path(target))} --seed 42 --n 16"


def matching_command(target: Path, config: Config) -> str:
    """The end of that message where the start has a matching head, which the new weights lack: how to train theirs from it."""
    if not config.start or config.adapter.rank:
        return ""
    try:
        start = resolve(config.start)
    except OSError:  # moved since it was read, or the Hub is out of reach
        return ""
    if not (start / MATCHING).is_dir() or layers_in(start) != layers_in(target):  # a head reads the layers of its own generator
        return ""
    key, out = config.data.caption_key, f"{typed_path(Path(config.out))}-matched"
    options = {
        "checkpoint": typed_path(target), "start": typed_path(config.start), "train": config.data.train, "val": config.data.val,
        "caption-key": "" if key == "caption" else key, "out": out,
    }  # fmt: skip
    given = " ".join(f"--{name} {shlex.quote(value)}" for name, value in options.items() if value)
    return f"\n  tokun match {given}  # a head that chooses among candidates"


def layers_in(checkpoint_folder: Path) -> int:
    config = json.loads((checkpoint_folder / GENERATOR / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config).get("num_hidden_layers", 0)


def tasks_of(samples: data.CodeSamples, task_mix: dict[str, float], codes: dict[str, Any]) -> tuple[str, ...]:
    """The tasks that are trained: those with a positive share whose fields occur.

    `codes`: the codes' record; if it is an older one, which does not count them, the first two hundred samples decide.
    """
    registers, asked = codes.get("register_counts"), codes.get("question_count")
    records = [samples.whole_record(i) for i in range(min(200, len(samples)))] if registers is None or asked is None else []
    held = {
        "question": any(r.questions for r in records) if asked is None else asked > 0,
        "rewrite": any(len(r.captions) > 1 for r in records) if registers is None else len(registers) > 1,
    }
    return tuple(task for task, share in task_mix.items() if share > 0 and held.get(task, True))


def _global(run: Run, counts: Sequence[float], device: torch.device) -> Tensor:
    """Sums of counts over all processes, at least one each: float32."""
    return summed(torch.tensor(counts, dtype=torch.float32, device=device), run.world).clamp_min(1)

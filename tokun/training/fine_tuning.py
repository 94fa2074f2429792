"""Fine-tuning a whole model on existing sequences instead of pictures: what text-only training and preferences share.

Trains all weights, or with `adapter.rank` a LoRA, under any engine. A subclass defines a batch and its loss.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokun import data
from tokun.config import Config
from tokun.inference.adapters import fingerprint
from tokun.inference.model import Tokun
from tokun.inference.model_card import changed_card, public
from tokun.models.generator import add_dropout, can_compile, compile_layers, count_parameters, tune_for, uncompiled
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.tokenizers.wordings import tasks_on
from tokun.training import adapters, loop, step_log
from tokun.training.distributed_stage import EngineStage, is_finished, result_folder
from tokun.training.engine import Engine, summed
from tokun.training.generator import training_seed, where_to
from tokun.training.resume_settings import change_line, figures_line, recorded, started_from
from tokun.training.run import Run, micro_batch, states_on_disk
from tokun.training.start_report import too_few_held_out
from tokun.utils import checkpoint


class TuningStage(EngineStage):
    """Fine-tunes the generator of `base`."""

    what: ClassVar[str]  # plural noun for the items
    sums: ClassVar[tuple[str, ...]]  # names of the sums of `loss`
    tasks: ClassVar[tuple[str, ...]] = ()  # new tasks of the result, besides the base's
    items: Sequence[Any]  # what the order shuffles; a subclass sets it
    held_out: Sequence[Any] = ()  # global batches

    def __init__(self, run: Run, base: Tokun, vocabulary: Vocabulary, settings: dict[str, Any], *, held: int) -> None:
        """held: the number of held-out items, which a subclass packs into `held_out` afterwards."""
        self.few = too_few_held_out(held, self.what)
        self.config, self.base, self.vocabulary = run.config, base, vocabulary
        train = self.train = run.config.train
        self.seed, self.micro = training_seed(run.config), micro_batch(train, run.world)
        self.accumulation = train.batch_size // run.world // self.micro
        torch.manual_seed(self.seed)
        self.tuned = adapters.attach(run.config, base, vocabulary) if run.config.adapter.rank else None
        if self.tuned:
            self.tuned.say(run.say)
        else:
            adapters.new_rows(base.generator, base.vocabulary, vocabulary)
        model = self.tuned.generator if self.tuned else base.generator
        self.parameters = count_parameters(model)
        self.trained = self.tuned.size if self.tuned else self.parameters
        add_dropout(model, run.config.generator.dropout)
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tune_for(model, device)
        self.ready(model)
        engine = Engine.make(train, model, deepspeed=run.deepspeed, micro=self.micro, accumulation=self.accumulation)
        if train.compile and can_compile(device):
            compile_layers(model)
        schedule = loop.Schedule.of(train, eval_every=train.eval_every if held else 0, sample_every=0)
        super().__init__(run, schedule, model=model, engine=engine, settings=settings)

    def ready(self, model: Any) -> None:
        """Prepare the model before the engine wraps it."""

    @abstractmethod
    def pack(self, items: Sequence[int], positions: Sequence[int]) -> Any:
        """The batch of these items, for one process; `positions`: of the stream, one per item."""

    @abstractmethod
    def loss(self, batch: Any, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows of the batch -> their part of the global batch's mean loss, and the `sums`."""

    @abstractmethod
    def figures_of(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures to log, including `loss`, from sums over a global batch."""

    def disk_bytes(self) -> int:
        return 4 * 4 * self.trained * states_on_disk(self.config)

    def describe(self) -> str:
        sizes = f"{self.trained / 1e6:.2f}M of {self.parameters / 1e6:.2f}M parameters, {len(self.items)} {self.what}"
        return f"{sizes}, {self.run.world} process(es), {self.engine}" + (f"\n{self.name}: {self.few}" if self.few else "")

    def batches(self, start: int) -> Generator[Any, None, None]:
        order = data.Order(len(self.items), self.seed)
        for step in itertools.count(start):
            positions = data.positions_of(step, self.train.batch_size, self.run.rank, self.run.world)
            yield self.pack([order[p] for p in positions], positions)

    def take_step(self, batch: Any, lr: float) -> None:
        engine = self.engine
        engine.set_lr(lr)
        loop.seed_device(loop.step_seed(self.seed, self.step, self.run.rank), engine.device)
        self.model.train()
        total = torch.zeros(len(self.sums), device=engine.device)
        for number in range(self.accumulation):
            with engine.micro_batch(last=number == self.accumulation - 1):
                loss, sums = self.loss(batch, slice(number * self.micro, (number + 1) * self.micro))
                self.require_finite(loss)
                engine.backward(loss * self.run.world)  # the engine averages over processes
            total += sums.detach()
        self.window.counts["items"] += self.train.batch_size
        self.last = total, self.update(), lr

    def figures(self) -> tuple[dict[str, float], str]:
        total, norm, lr = self.last
        sums = dict(zip(self.sums, summed(total, self.run.world).tolist(), strict=True))
        own, words = step_log.of_fine_tuning(self.window, self.figures_of(sums))
        self.logged = own | self.update_figures(norm, lr, items=len(self.items))
        return self.logged, words

    @torch.no_grad()
    def held_out_figures(self, batches: Sequence[Any]) -> dict[str, float]:
        """Figures on global batches, the same in every process."""
        if not batches:
            return {}
        self.model.eval()
        with uncompiled(self.model):
            total = functools.reduce(torch.add, (self.loss(batch, slice(None))[1] for batch in batches))
        self.model.train()
        return self.figures_of(dict(zip(self.sums, total.tolist(), strict=True)))

    def measure_start(self) -> str:
        return self.start_measured(self.held_out_figures(self.held_out)) if self.held_out else ""

    def evaluate(self) -> str:
        with self.averaged():
            found = self.held_out_figures(self.held_out)
        self.run.tracker.log({f"val/{name}": value for name, value in found.items()}, step=self.step)
        return f"held out {figures_line(found)}"

    # --- the result ---------------------------------------------------------------------------------------------------

    def whole(self) -> Tokun | None:
        """The model as users load it. A collective call; only the first process gets it."""
        tasks = tasks_on(self.base.tasks, self.tasks)
        if self.tuned:
            tensors = self.tuned.tensors()
            return self.tuned.model(self.tuned.adapter(tensors, tasks=tasks)) if self.run.rank == 0 else None
        generator = self.engine.whole_model()
        if generator is None:
            return None
        return dataclasses.replace(
            self.base, vocabulary=self.vocabulary, generator=generator.float().eval(), tasks=tasks, defaults=self.config.sampling,
            matching=None,  # it is of the weights before
        )  # fmt: skip

    def finish(self, target: Path, about: str) -> None:
        """Write the model with its averaged weights to `target`."""
        self.take_average()
        held, whole = self.held_out_figures(self.held_out), self.whole()
        if whole is not None:
            record = self.record(val=held, parameters=self.parameters, trained=self.trained)
            figures = [(f"held out: {name}", f"{value:.4g}") for name, value in held.items()]
            with checkpoint.whole_directory(target) as folder:
                if self.tuned:
                    self.tuned.write(whole, folder, adapters.card(self.config, record, self.tuned, about=about, figures=figures))
                else:
                    table = "\n".join(f"| {name} | {value} |" for name, value in figures)
                    recipe = f"{self.step} steps of {self.train.batch_size}, peak learning rate {self.train.lr:g}."
                    description = f"{about} Fine-tuned from {public(self.config.start)}: {recipe}"
                    own = f"## Figures\n\n| figure | value |\n| --- | --- |\n{table}" if figures else ""
                    whole.save(folder, card=changed_card(self.config, self.base.card, about=description, own=own))
                checkpoint.write_record(folder / "training.json", record)
            self.run.remove_states(self.folder)
            self.run.say(
                f"{self.name}: {self.schedule.ended(self.step)}, {record['seconds'] / 60:.1f} minutes. "
                f"{change_line(self.held_before, held)}"
            )
            self.run.say(where_to(target, self.config))
        self.run.wait()


def settings_of(config: Config, base: Tokun, **more: Any) -> dict[str, Any]:
    """The settings in the record of such a stage. `base`: as loaded."""
    made_on = fingerprint(base.generator, base.vocabulary)
    return {"dropout": config.generator.dropout, "seed": training_seed(config), **started_from(config, made_on), **more, **recorded(config)}


def run_stage(run: Run, name: str, settings: dict[str, Any], make: Callable[[], TuningStage], about: Callable[[TuningStage], str]) -> Path:
    """Train the stage `name` that `make` creates -> `out/adapter` or `out/checkpoint`; reuse that if it was made with the same settings."""
    target = result_folder(run)
    if is_finished(run, name, target, settings):
        return target
    stage = make()
    loop.train(stage)
    stage.finish(target, about(stage))
    return target

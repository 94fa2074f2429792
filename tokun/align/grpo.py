"""GRPO: a checkpoint learns from rewards for its own pairs (Shao et al. 2024, DeepSeekMath; for pictures SimpleAR, T2I-R1, STAGE).

    deepspeed train.py --config configs/grpo.yaml start=runs/mine out=runs/mine-grpo

A step begins with a rollout: the ordinary sampler draws groups of pairs that share their tags, their prompt or (if words are learned) their
picture. Then rewards are computed, each pair is compared with its group (`objective.advantages`), and the generator is updated once or a
few times. Engines, trainer states and trackers are those of the other stages; a killed run resumes exactly.

Why not trl's GRPOTrainer? It owns the step from the prompt to the update, and samples through `generate` or a vLLM server: text of one
temperature after a text prompt. Here a pair is decoded from a seed's latent, under a grammar (a fixed number of codes, then a caption),
with separate temperatures for codes and words, and by the C++ program if available. trl's `rollout_func` would accept our ids, but its
likelihood ratios are over the whole vocabulary at one temperature, so the first ratio would not be 1. Its rewards get texts, ours pictures.
Its states are its own, ours resume under any engine. Only its loss could be used, which is some thirty lines of `objective.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokun.align import objective, perturb, reward_hacking, rewards, rollouts
from tokun.align.objective import Chosen, Guidance
from tokun.align.policy import Policy
from tokun.config import Config
from tokun.inference import bulk, decoder
from tokun.inference.folders import is_bundled
from tokun.inference.model import Pair, Tokun
from tokun.inference.model_card import changed_card
from tokun.training import adapters, loop
from tokun.training.distributed_stage import EngineStage, is_finished, result_folder
from tokun.training.engine import Engine, summed
from tokun.training.generator import training_seed, where_to
from tokun.training.generator_evaluation import log_page, log_samples
from tokun.training.resume_settings import AVERAGE_KEYS, figures_line, recorded, without
from tokun.training.run import Run, micro_batch, states_on_disk
from tokun.utils import checkpoint
from tokun.utils.errors import UserError

EVALUATION_KEYS = {"judges", "eval_n", "eval_seed", "copies_of", "features"}  # settings without effect on training
UNUSED = ("compile", "loss_chunk", "keep_best")  # settings of config.train without effect here
RANGES = {
    "temperature": (1e-6, 1e6), "text_temperature": (1e-6, 1e6), "clip_low": (0, 1), "clip_high": (0, 1e6), "kl": (0, 1e6),
    "entropy": (0, 1e6), "least_entropy": (0, 1), "easy": (1e-6, 1), "similar": (0, 1),
}  # fmt: skip


class Collapsed(Exception):
    """The samples hardly depend on the seed any more: the run ends, and its result is kept."""


def train_grpo(run: Run) -> Path:
    """Train the generator of `config.start` on `config.grpo.rewards` -> `out/checkpoint` (with an adapter `out/adapter`) and
    `out/real/report.html`. Raises UserError for invalid settings, before anything is drawn."""
    config, target = run.config, result_folder(run)
    check(config, run.world)
    before = run.take_start()
    config.grpo = rollouts.as_sampled(config.grpo, before)
    settings = settings_of(config, before)
    if is_finished(run, GrpoStage.name, target, settings, but=AVERAGE_KEYS):
        return target
    if idle := [name for name in UNUSED if getattr(config.train, name)]:
        run.say(
            f"grpo: {', '.join(f'train.{name}' for name in idle)} have no effect here: "
            "layers run uncompiled, and no best checkpoints are kept"
        )
    if not config.grpo.judges:
        run.say(
            "grpo: no judge is named, so the report cannot tell a gain from a hacked reward. Add one that is not optimised, such as "
            "grpo.judges=[{kind: pmi_first, of: ANOTHER_CHECKPOINT}], or a small CLIP of your pictures (benchmarks/clip_judge.py)"
        )
    stage, stopped = GrpoStage(run, before, settings), ""
    try:
        loop.train(stage)
    except Collapsed as reason:
        stopped = str(reason)
        run.say(
            f"grpo: {stopped}, below grpo.least_entropy {config.grpo.least_entropy:g}: "
            "stopping before the model collapses to a single sample. "
            "Raise grpo.kl, grpo.clip_high or grpo.entropy, or lower train.lr"
        )
    stage.finish(target, stopped or stage.schedule.stopped_by(stage.step))
    return target


def check(config: Config, world: int) -> None:
    """Raise UserError for invalid settings."""
    grpo, share = config.grpo, config.train.batch_size // world
    if config.dpo.pairs or config.words.train:
        raise UserError("grpo.rewards is set together with dpo.pairs or words.train: they are separate trainings; run one after the other")
    if grpo.group_size < 2 or share % grpo.group_size:
        raise UserError(
            f"grpo.group_size is {grpo.group_size}; it must be at least 2 and divide the {share} pairs of each of {world} process(es), "
            f"of train.batch_size {config.train.batch_size}"
        )
    if grpo.learn == "text" and grpo.prompts:
        raise UserError("grpo.learn is text, but with grpo.prompts the words are given: set grpo.learn=image, or leave grpo.prompts empty")
    for name, (least, most) in RANGES.items():
        if not least <= getattr(grpo, name) <= most and not (name in rollouts.AS_SAMPLED and getattr(grpo, name) == 0):
            own = ", or 0 for the start's own" if name in rollouts.AS_SAMPLED else ""
            raise UserError(f"grpo.{name} is {getattr(grpo, name)}; it must be between {least:g} and {most:g}{own}")
    if config.adapter.rank and (config.adapter.bits or config.adapter.dropout):
        raise UserError("grpo compares with the base and samples from it: set adapter.bits=0 and adapter.dropout=0")
    perturb.changer(grpo.perturb, 0)
    known = rewards.names(grpo.judges)
    for number, reward in enumerate(grpo.rewards):
        if reward.judge and reward.judge not in known:
            raise UserError(
                f"grpo.rewards[{number}].judge is {reward.judge!r}; grpo.judges has {', '.join(known) or 'none'}: "
                "name one of them, or leave it out"
            )
    optimised = [dataclasses.replace(one, weight=1.0, judge="") for one in grpo.rewards]
    for number, judge in enumerate(grpo.judges):
        if dataclasses.replace(judge, weight=1.0, judge="") in optimised:
            raise UserError(
                f"grpo.judges[{number}] ({judge.kind}) is one of grpo.rewards: a judge must be another model, or trained on other data"
            )


def settings_of(config: Config, before: Tokun) -> dict[str, Any]:
    """The settings recorded in a trainer state and in the result."""
    identity = bulk.identity(before)
    grpo = without(dataclasses.asdict(config.grpo), EVALUATION_KEYS)
    grpo["rewards"] = {str(number): without(reward, {"judge"}) for number, reward in enumerate(grpo["rewards"])}
    return {
        "start": config.start, "started_from": {name: identity[name] for name in ("generator", "image_tokenizer")},
        "seed": training_seed(config), "grpo": grpo, **recorded(config, but=AVERAGE_KEYS),
    }  # fmt: skip


@dataclass
class Part:
    """A micro batch of a rollout, with data on its N sampled tokens, each (N,)."""

    ids: Tensor  # (B, T)
    what: Chosen
    guidance: Sequence[Guidance]
    advantage: Tensor
    weight: Tensor  # of the advantage; 0 for tokens that are not learned
    start: Tensor
    start_entropy: Tensor
    old: Tensor | None = None  # None for a single update, which computes it itself


@dataclass
class Rollout:
    """This process's pairs of one step, with their rewards."""

    pairs: list[Pair]
    values: dict[str, list[float]]


@dataclass
class Seconds:
    """Seconds spent in the parts of a step."""

    rollout: float = 0.0
    scoring: float = 0.0
    learning: float = 0.0

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        setattr(self, what, getattr(self, what) + time.monotonic() - begun)


class GrpoStage(EngineStage):
    """Trains the policy; a step is a rollout and its updates."""

    name = "grpo"

    def __init__(self, run: Run, before: Tokun, settings: dict[str, Any]):
        config, train = run.config, run.config.train
        self.config, self.grpo, self.train, self.before = config, config.grpo, train, before
        self.seed, self.share, self.micro = training_seed(config), train.batch_size // run.world, micro_batch(train, run.world)
        self.updates = self.grpo.minibatches * self.grpo.epochs
        torch.manual_seed(self.seed)
        self.policy = Policy(config, before)
        engine = Engine.make(train, self.policy.model, deepspeed=run.deepspeed, micro=self.micro, accumulation=self.share // self.micro)
        self.policy.attach_engine(engine)
        super().__init__(  # no average: the trained weights themselves draw the next rollout
            run, loop.Schedule.of(train), model=self.policy.model, engine=engine, settings=settings, average=False
        )
        self.prompts = rollouts.read_prompts(self.grpo, before)
        change = perturb.changer(self.grpo.perturb, self.seed)
        made = rewards.make(self.grpo.rewards, before)
        self.rewards = [rewards.perturbed(reward, change) if self.grpo.perturb else reward for reward in made]
        self.evaluator = reward_hacking.Evaluator(self.grpo, before, made, run.out / "real") if run.rank == 0 else None
        self.seconds, self.latest = Seconds(), Rollout([], {})

    def describe(self) -> str:
        return (
            f"{self.policy.trained / 1e6:.2f}M of {self.policy.parameters / 1e6:.2f}M parameters, "
            f"{self.train.batch_size * self.grpo.minibatches} pairs a rollout in groups of {self.grpo.group_size}, "
            f"{self.updates} update(s) each, rewards {', '.join(f'{reward.weight:g} x {reward.name}' for reward in self.rewards)}, "
            f"{self.run.world} process(es), {self.engine}"
        )

    def disk_bytes(self) -> int:
        """Trainer states: weights and two moments."""
        return 3 * 4 * self.policy.trained * states_on_disk(self.config)

    def batch_keys(self) -> Sequence[str]:
        return [f"rollout {self.step} of seed {self.seed}"]

    # --- a step ---------------------------------------------------------------------------------------------------------

    def batches(self, start: int) -> Generator[Rollout, None, None]:
        """Pairs drawn with the current weights when the loop asks for them, and their rewards."""
        if start == 0:
            self.evaluate()
        for step in itertools.count(start):
            kept = self.logged.get("train/entropy_kept", 1.0)
            if kept < self.grpo.least_entropy:
                raise Collapsed(f"entropy has fallen to {kept:.2f} of the start's")
            self.seconds = Seconds()
            with self.seconds.of("rollout"):
                pairs = self.draw(step)
            with self.seconds.of("scoring"):
                values = {reward.name: reward(pairs) for reward in self.rewards}
            self.latest = Rollout(pairs, values)
            yield self.latest

    def draw(self, step: int) -> list[Pair]:
        """This process's pairs of a rollout, minibatch by minibatch (with one process, all pairs)."""
        size, mine = self.train.batch_size, self.run.rank * self.share
        numbers = [cut * size + mine + row for cut in range(self.grpo.minibatches) for row in range(self.share)]
        rolled = size * self.grpo.minibatches
        pairs = rollouts.draw(self.policy.sampler(), self.grpo, self.prompts, seed=self.seed, step=step, numbers=numbers, size=rolled)
        self.policy.release()
        return pairs

    def take_step(self, batch: Rollout, lr: float) -> None:
        self.engine.set_lr(lr)
        with self.seconds.of("learning"):
            advantage = self.advantages(batch.values)
            parts = self.parts(batch.pairs, advantage)
            totals, norm = self.learn(parts)
        # computed at every step in every process, for the entropy check
        self.logged = self.summary(batch.values, advantage, totals) | {"train/grad_norm": norm, "train/lr": lr}

    def figures(self) -> tuple[dict[str, float], str]:
        return self.logged, f"reward {self.logged['reward/mean']:.3f} kl {self.logged['train/kl']:.4f}"

    def advantages(self, values: dict[str, list[float]]) -> Tensor:
        """The weighted sum of the advantages of each reward, normalised separately, so that units do not matter (GDPO, Liu et al. 2026)."""
        out = torch.zeros(len(next(iter(values.values()))), dtype=torch.float64)
        for reward in self.rewards:
            own = torch.tensor(values[reward.name], dtype=torch.float64)
            out += reward.weight * objective.advantages(own, self.grpo.group_size, scale=self.grpo.scale, world=self.run.world)
        return out.float()

    @torch.no_grad()
    def parts(self, pairs: Sequence[Pair], advantage: Tensor) -> list[Part]:
        """The rollout in micro batches, with likelihoods under the frozen model and, for several updates, under the current one."""
        v, device, out = self.before.vocabulary, self.engine.device, []
        similar = self.similarities(pairs)
        for first in range(0, len(pairs), self.micro):
            rows = slice(first, first + self.micro)
            ids = rollouts.packed(self.before, pairs[rows], prompted=bool(self.prompts))
            what, guidance = objective.chosen(v, ids), rollouts.guidance(self.before, self.grpo, pairs[rows], prompted=bool(self.prompts))
            own = advantage[rows].to(device)[what.rows]
            weight = torch.where(what.is_image, float(self.grpo.learn != "text"), float(self.grpo.learn != "image"))
            if similar is not None:
                similarity = similar[rows].to(device)[what.rows, what.slots.clamp_max(similar.shape[1] - 1)]
                weight = torch.where(what.is_image, weight * (1 - self.grpo.similar * similarity), weight)
            with self.engine.autocast_bare():
                start, entropy = self.likelihoods(self.before.generator, ids, what, guidance)
            part = Part(ids, what, guidance, own, weight, start, entropy)
            if self.updates > 1:
                with self.engine.autocast():
                    part.old, _ = self.likelihoods(self.engine.model, ids, what, guidance)
            out.append(part)
        return out

    def likelihoods(
        self, model: Any, ids: Tensor, what: Chosen, guidance: Sequence[Guidance], *, entropy_needs_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        temperatures = self.grpo.temperature, self.grpo.text_temperature
        return objective.likelihoods(
            model, ids, what, self.before.vocabulary, temperatures=temperatures, guidance=guidance, entropy_needs_grad=entropy_needs_grad
        )

    def similarities(self, pairs: Sequence[Pair]) -> Tensor | None:
        """(pairs, codes of the largest picture): similarity of each code to the group's others at its position; None if `similar` is 0."""
        if not self.grpo.similar:
            return None
        size, vectors = self.grpo.group_size, self.before.image_tokenizer.vectors().cpu()
        out = torch.zeros(len(pairs), self.before.vocabulary.max_codes)
        for first in range(0, len(pairs), size):
            codes = torch.tensor([pair.codes for pair in pairs[first : first + size]])
            out[first : first + size, : codes.shape[1]] = objective.similarity(codes[None], vectors)[0]
        return out

    def learn(self, parts: Sequence[Part]) -> tuple[Tensor, float]:
        """Run all updates of a rollout.

        Returns the sums of `Terms.totals` over all processes, and the last gradient norm before clipping.
        """
        each = self.share // self.micro
        totals, norm = torch.zeros(5, 2, dtype=torch.float64), 0.0
        for _ in range(self.grpo.epochs):
            for cut in range(self.grpo.minibatches):
                totals += self.gradients(parts[cut * each : (cut + 1) * each])
                norm = self.update()
        return summed(totals, self.run.world), norm

    def gradients(self, parts: Sequence[Part]) -> Tensor:
        """Forward and backward passes of one update. Returns the sums of `Terms.totals`."""
        train, grpo = self.train, self.grpo
        counts = torch.stack([torch.stack([part.what.is_image.sum(), (~part.what.is_image).sum()]) for part in parts]).sum(0).double()
        image, text = summed(counts.cpu(), self.run.world).clamp_min(1).tolist()
        totals = torch.zeros(5, 2, dtype=torch.float64)
        for number, part in enumerate(parts):
            share = torch.where(part.what.is_image, train.image_weight / image, train.text_weight / text)
            with self.engine.micro_batch(last=number == len(parts) - 1):
                with self.engine.autocast():
                    new, entropy = self.likelihoods(
                        self.engine.model, part.ids, part.what, part.guidance, entropy_needs_grad=grpo.entropy > 0
                    )
                old = new.detach() if part.old is None else part.old
                found = objective.terms(
                    new, entropy, old, part.start, part.advantage, part.weight * ~objective.easy(old, grpo.easy), share, part.what.is_image,
                    low=grpo.clip_low, high=grpo.clip_high, kl=grpo.kl, entropy_weight=grpo.entropy, start_entropy=part.start_entropy,
                )  # fmt: skip
                self.require_finite(found.loss)
                # the engine averages over processes, but the loss is already a share of the global mean
                self.engine.backward(found.loss * self.run.world)
            totals += found.totals().cpu()
        return totals

    # --- logging --------------------------------------------------------------------------------------------------------

    def summary(self, values: dict[str, list[float]], advantage: Tensor, totals: Tensor) -> dict[str, float]:
        """The figures of a step, over all processes; times are this process's.

        KL, clipping and entropy are those of the learned kinds. The KL of a kind that is not learned shows how far it has changed with
        them.
        """
        each = {name: torch.tensor(found, dtype=torch.float64) for name, found in values.items()}
        n, s = len(advantage) * self.run.world, self.seconds
        sums = torch.stack([torch.stack([x.sum(), x.square().sum()]) for x in each.values()])
        idle = (advantage.view(-1, self.grpo.group_size).abs().amax(1) < 1e-6).double().sum()
        sums, idle = summed(sums, self.run.world), summed(idle, self.run.world).item()
        out = {}
        for name, (total, squares) in zip(each, sums.tolist()):
            out |= {f"reward/{name}": total / n, f"reward/{name}_spread": max(0.0, squares / n - (total / n) ** 2) ** 0.5}
        learned = {"both": slice(None), "image": slice(0, 1), "text": slice(1, 2)}[self.grpo.learn]
        kl, entropy, start_entropy, clipped, count = totals[:, learned].sum(1).tolist()
        kl_image, kl_text = (totals[0] / totals[-1].clamp_min(1)).tolist()
        entropy_image, entropy_text = (totals[1] / totals[-1].clamp_min(1)).tolist()
        tokens, whole = totals[-1].sum().item() / self.grpo.epochs, s.rollout + s.scoring + s.learning
        return out | {
            "reward/mean": sum(reward.weight * out[f"reward/{reward.name}"] for reward in self.rewards),
            "train/idle_groups": idle / (n / self.grpo.group_size), "train/kl": kl / count, "train/clipped": clipped / count,
            "train/kl_image": kl_image, "train/kl_text": kl_text, "train/entropy_image": entropy_image, "train/entropy_text": entropy_text,
            "train/entropy_kept": entropy / max(start_entropy, 1e-9),
            "time/rollout_share": s.rollout / whole, "time/scoring_share": s.scoring / whole, "time/step": whole,
            "time/rollout_tokens_per_second": tokens / s.rollout, "time/learning_tokens_per_second": tokens / s.learning,
        }  # fmt: skip

    def sample(self) -> None:
        """Log the first two groups of the rollout, each pair with its rewards."""
        if self.run.rank > 0:
            return
        some = self.latest.pairs[: 2 * self.grpo.group_size]
        scores = [", ".join(f"{name} {found[i]:.3g}" for name, found in self.latest.values.items()) for i in range(len(some))]
        texts = [f"{pair.caption} ({values})" for pair, values in zip(some, scores)]
        log_page(self.run, "rollouts", some, texts, self.step, file="rollout", columns=self.grpo.group_size)

    def evaluate(self) -> str:
        """Score held-out pairs of the current model with rewards and judges."""
        whole = self.policy.whole()
        if self.evaluator is None or whole is None:
            return ""
        held = self.evaluator.evaluate(whole, self.prompts, self.step)
        decoder.forget(whole.generator)
        self.run.tracker.log({f"real/{name}": value for name, value in held.items()}, step=self.step)
        return figures_line(held)

    # --- the result -----------------------------------------------------------------------------------------------------

    def finish(self, target: Path, stopped_by: str) -> None:
        """Write the checkpoint or adapter, and the report on whether the gain is real. A collective call."""
        self.evaluate()
        whole = self.policy.whole()
        if self.evaluator is not None and whole is not None:
            whole.eval()
            report = self.evaluator.report(whole, self.prompts, self.step)
            record = self.record(stopped_by=stopped_by, real=report, parameters=self.policy.parameters, trained=self.policy.trained)
            with checkpoint.whole_directory(target) as folder:
                self.policy.write(whole, folder, self.card(record))
                checkpoint.write_record(folder / "training.json", record)
            if self.config.sampling.n > 0:
                log_samples(self.run, whole, self.step)
            self.run.remove_states(self.folder)
            self.run.say(reward_hacking.lines(report))
            self.run.say(f"grpo: {self.run.out / 'real' / 'report.html'} shows whether the gain is real. " + where_to(target, self.config))
        self.run.wait()

    def card(self, record: dict[str, Any]) -> str:
        """The card of the adapter, or of the start as this training changed it."""
        g, t = self.grpo, self.train
        mix = ", ".join(f"{reward.weight:g} x {reward.kind}" for reward in g.rewards)
        start = "the bundled model" if is_bundled(self.config.start) else Path(self.config.start).name
        about = (
            f"GRPO from {start}: {record['steps']} rollouts of {t.batch_size * g.minibatches} pairs in groups of {g.group_size}, "
            f"rewards {mix}, learning rate {t.lr:g}, KL {g.kl:g}, {record['seconds'] / 60:.0f} minutes. {record['real']['verdict']}"
        )
        if self.policy.tuned:
            return adapters.card(self.config, record, self.policy.tuned, about=about)
        return changed_card(self.config, self.before.card, about=about)

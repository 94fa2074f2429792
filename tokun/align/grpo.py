"""GRPO: a checkpoint learns from rewards of its own pairs (Shao et al. 2024, DeepSeekMath; for pictures SimpleAR, T2I-R1, STAGE).

    deepspeed train.py --config configs/grpo.yaml start=runs/mine out=runs/mine-grpo

A step is a rollout: groups of pairs that share their tags or their prompt are drawn by the sampler that users have, rewards are measured,
each pair is compared with its group (`objective.advantages`), and the generator is updated once or a few times. Around it are the engines,
trainer states and trackers of the other stages; a run that was killed goes on exactly where it was.

Why not trl's GRPOTrainer? It owns the step from the prompt to the update, and draws through `generate` or a vLLM server: text of one
temperature behind a text prompt. Here a pair is read off a seed's latent, under a grammar (so many codes, then a caption), with a temperature
of codes and one of words, and by the C++ program where there is one. Its `rollout_func` would take our ids, but the likelihoods that it takes
ratios of are over the whole vocabulary at one temperature, so that the first ratio would not be 1; its rewards get texts, ours pictures; its
states are its own, ours go on under any engine. What is left of it is the loss of `objective.py`, some thirty lines.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokun.align import objective, perturb, real, rewards, rollouts
from tokun.align.objective import Chosen
from tokun.config import Config
from tokun.inference import decoder, many
from tokun.inference.model import Pair, Tokun
from tokun.models.generator import tune_for
from tokun.models.shares import gathered, is_cut, own_share
from tokun.render.grids import captioned_grid
from tokun.training import optim, stages
from tokun.training.engine import Engine
from tokun.training.stages import Run
from tokun.utils import checkpoint

STAGE = "grpo"
NOT_RECORDED = {"deepspeed", "micro_batch_size", "gradient_checkpointing", "compile", "loss_chunk"}


def train_grpo(run: Run) -> Path:
    """Train the generator of `config.start` on `config.grpo.rewards` -> `out/checkpoint`, and `out/real/report.html`. Raises ValueError for
    settings that cannot be, before anything is drawn."""
    config, target = run.config, run.out / "checkpoint"
    check(config, run.world)
    before = stages.starting_model(config)
    asked = settings_of(config, before)
    run.recover(target)
    if (record := checkpoint.read_record(target / "training.json")) is not None:
        checkpoint.require_same(target, record["settings"], asked)
        run.say(f"grpo: {target} is there and matches")
        run.forget(STAGE)
        return target
    trainer = Trainer(run, before, asked)
    try:
        trainer.train()
    finally:
        run.writer.wait()
    run.wait()
    return target


def check(config: Config, world: int) -> None:
    """Raises ValueError for what no run can do."""
    grpo, share = config.grpo, config.train.batch_size // world
    if not config.start:
        raise ValueError(
            "grpo.rewards is set, but start is empty: name the checkpoint that is to be trained on (start=runs/mine, or bundled)"
        )
    if grpo.group_size < 2 or share % grpo.group_size:
        raise ValueError(
            f"grpo.group_size is {grpo.group_size}; it must be at least 2 and divide the {share} pairs that each of {world} process(es) "
            f"has of train.batch_size {config.train.batch_size}"
        )
    if grpo.learn == "text" and grpo.prompts:
        raise ValueError("grpo.learn is text, but with grpo.prompts the words are given: set learn=image, or leave prompts out")
    for name, least, most in (("temperature", 1e-6, 1e6), ("text_temperature", 1e-6, 1e6), ("clip_low", 0, 1), ("clip_high", 0, 1e6), ("kl", 0, 1e6),
                              ("entropy", 0, 1e6), ("least_entropy", 0, 1), ("easy", 1e-6, 1), ("similar", 0, 1)):  # fmt: skip
        if not least <= getattr(grpo, name) <= most:
            raise ValueError(f"grpo.{name} is {getattr(grpo, name)}; it must lie between {least:g} and {most:g}")
    perturb.changer(grpo.perturb, 0)
    optimised = [dataclasses.replace(one, weight=1.0) for one in grpo.rewards]
    for number, judge in enumerate(grpo.judges):
        if dataclasses.replace(judge, weight=1.0) in optimised:
            raise ValueError(
                f"grpo.judges[{number}] ({judge.kind}) is one of grpo.rewards: a judge must be another model, or learn from other data"
            )


def settings_of(config: Config, before: Tokun) -> dict[str, Any]:
    """What a trainer state and the result were made with."""
    started = many.identity(before)
    train = {k: v for k, v in dataclasses.asdict(config.train).items() if k not in stages.LOGGING_KEYS | NOT_RECORDED}
    grpo = {k: v for k, v in dataclasses.asdict(config.grpo).items() if k not in ("judges", "eval_n", "eval_seed", "copies_of", "features")}
    grpo["rewards"] = {str(number): reward for number, reward in enumerate(grpo["rewards"])}
    started = {k: started[k] for k in ("generator", "image_tokenizer")}
    return {"start": config.start, "seed": config.seed, "started_from": started, "train": train, "grpo": grpo}


@dataclass
class Part:
    """A micro batch of a rollout, and what is known of its tokens, all (N,)."""

    ids: Tensor  # (B, T)
    what: Chosen
    advantage: Tensor
    weight: Tensor
    start: Tensor
    start_entropy: Tensor
    old: Tensor | None = None  # None where there is one update only: then it is what the update itself finds


@dataclass
class Seconds:
    """Where the time of a step goes."""

    rollout: float = 0.0
    scoring: float = 0.0
    learning: float = 0.0

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        setattr(self, what, getattr(self, what) + time.monotonic() - begun)


class Trainer:
    """One GRPO run in one process."""

    def __init__(self, run: Run, before: Tokun, asked: dict[str, Any]):
        config, train = run.config, run.config.train
        self.run, self.asked, self.config, self.grpo, self.train_config = run, asked, config, config.grpo, train
        self.seed = config.seed if train.seed < 0 else train.seed
        self.share, self.micro = train.batch_size // run.world, stages._micro_batch(train, run.world)
        self.updates = self.grpo.minibatches * self.grpo.epochs
        torch.manual_seed(self.seed)
        model = copy.deepcopy(before.generator)
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tune_for(model, device)
        model.train(train.gradient_checkpointing)  # without dropout: the first ratio is 1
        self.parameters = sum(p.numel() for p in model.parameters())
        self.engine = Engine.make(train, model, deepspeed=run.deepspeed, micro=self.micro, accumulation=self.share // self.micro)
        self.model = model
        self.before = before.to(self.engine.device)
        self.before.generator.requires_grad_(False)
        self.prompts = rollouts.read_prompts(self.grpo, self.before)
        change = perturb.changer(self.grpo.perturb, self.seed)
        made = rewards.make(self.grpo.rewards, self.before)
        self.rewards = [rewards.perturbed(reward, change) if self.grpo.perturb else reward for reward in made]
        self.court = real.Court(self.grpo, self.before, made, run.out / "real") if run.rank == 0 else None
        self.sampler_copy: nn.Module | None = None
        self.drawer: Tokun | None = None
        self.step, self.spent, self.figures = 0, 0.0, dict[str, float]()
        self.clock = stages._Clock()

    # --- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        run, train, states = self.run, self.train_config, self.run.states(STAGE)
        if (latest := states.latest()) is not None:
            saved = json.loads((states.path(latest) / "state.json").read_text())
            stages._require_same_but_retry(states.path(latest), saved["settings"], self.asked)
            self.engine.load(states.path(latest))
            self.step, self.spent = latest, saved["spent"]
            run.say(f"grpo: resuming at step {latest}")
        each = train.batch_size * self.grpo.minibatches
        run.say(
            f"grpo: {self.parameters / 1e6:.2f}M parameters, {each} pairs a rollout in groups of {self.grpo.group_size}, {self.updates} update(s) each, "
            f"rewards {', '.join(f'{r.weight:g} x {r.name}' for r in self.rewards)}, {run.world} process(es), {self.engine}"
        )
        if run.rank == 0:
            checkpoint.require_space(run.out, 12 * self.parameters * stages.train_states(self.config) + 4 * self.parameters)
        if self.step == 0:
            self.judge(0)
        bar = tqdm(total=train.steps, initial=self.step, desc="grpo", unit="step", disable=run.rank != 0, dynamic_ncols=True)
        stopped = ""
        while (progress := self.progress()) < 1:
            lr = train.lr * optim.warmup_cosine(
                self.step, progress=progress, warmup=train.warmup_steps, min_ratio=train.min_lr_ratio, hold=train.lr_hold
            )
            self.engine.set_lr(lr)
            self.one_step(lr)
            bar.update(1)
            bar.set_postfix_str(f"reward {self.figures['reward/mean']:.3f} kl {self.figures['train/kl']:.4f}")
            stopped = self.collapsed()
            if self.step % train.eval_every == 0 and self.step < train.steps:
                self.judge(self.step)
            run.stop_if_asked(self.save)
            if stopped:
                break
            if self.step % train.save_every == 0:
                self.save()
        bar.close()
        self.finish(stopped or stages._stopped_by(self.step, train))

    def progress(self) -> float:
        return stages._progress(
            self.run, self.step, self.train_config.steps, self.spent + self.clock.seconds(), self.train_config.max_minutes
        )

    def collapsed(self) -> str:
        """Why the run should end, or nothing. All processes see the same figures."""
        kept = self.figures["train/entropy_kept"]
        if kept >= self.grpo.least_entropy:
            return ""
        self.run.say(
            f"grpo: entropy has fallen to {kept:.2f} of the start's, below grpo.least_entropy {self.grpo.least_entropy:g}: stopping before the model "
            "says one thing only. Raise grpo.kl, grpo.clip_high or grpo.entropy, or lower train.lr"
        )
        return f"entropy {kept:.2f} of the start's"

    # --- a step ---------------------------------------------------------------------------------------------------------

    def one_step(self, lr: float) -> None:
        seconds = Seconds()
        with seconds.of("rollout"):
            pairs = self.draw()
        with seconds.of("scoring"):
            values = {reward.name: reward(pairs) for reward in self.rewards}
            advantage = self.advantages(values)
        with seconds.of("learning"):
            parts = self.parts(pairs, advantage)
            totals, norm = self.learn(parts)
        self.step += 1
        # the bar and the watch on entropy want the figures of every step, in every process
        self.figures = self.summary(values, advantage, totals, norm, seconds, parts) | {"train/lr": lr}
        if self.step % self.train_config.log_every == 0 or self.step == 1:
            self.run.tracker.log(self.figures, step=self.step)
        if self.step % self.train_config.sample_every == 0 and self.run.rank == 0:
            self.show(pairs, values)

    def draw(self) -> list[Pair]:
        """This process's pairs of the rollout, minibatch by minibatch; in one process they are all."""
        size = self.train_config.batch_size
        numbers = [cut * size + self.run.rank * self.share + row for cut in range(self.grpo.minibatches) for row in range(self.share)]
        drawer = self.tokun(self.sampler())
        rolled = size * self.grpo.minibatches
        pairs = rollouts.draw(drawer, self.grpo, self.prompts, seed=self.seed, step=self.step, numbers=numbers, size=rolled)
        decoder.forget(drawer.generator)  # torch's fused optimizer changes weights unseen: the next rollout would be drawn by these
        return pairs

    def advantages(self, values: dict[str, list[float]]) -> Tensor:
        """The weighted sum of each reward's own advantages: what is compared is in its own spread, whatever its unit (GDPO, Liu et al. 2026)."""
        out = torch.zeros(len(next(iter(values.values()))), dtype=torch.float64)
        for reward in self.rewards:
            own = torch.tensor(values[reward.name], dtype=torch.float64)
            out += reward.weight * objective.advantages(own, self.grpo.group_size, scale=self.grpo.scale, world=self.run.world)
        return out.float()

    @torch.no_grad()
    def parts(self, pairs: Sequence[Pair], advantage: Tensor) -> list[Part]:
        """The rollout in micro batches, with the likelihoods of the frozen model and, where several updates follow, of the present one."""
        v, device, out = self.before.vocabulary, self.engine.device, []
        held_back = self.alike(pairs)
        for first in range(0, len(pairs), self.micro):
            rows = slice(first, first + self.micro)
            ids = rollouts.sequences(self.before, pairs[rows], prompted=bool(self.prompts))
            what = objective.chosen(v, ids, self.grpo.learn)
            own = advantage[rows].to(device)[what.rows]
            weight = torch.ones_like(own)
            if held_back is not None:
                apart = held_back[rows].to(device)[what.rows, what.slots.clamp_max(held_back.shape[1] - 1)]
                weight = torch.where(what.is_image, 1 - self.grpo.similar * apart, weight)
            with self.precision():
                start, entropy = objective.likelihoods(self.before.generator, ids, what, v, temperatures=self.temperatures)
            part = Part(ids, what, own, weight, start, entropy)
            if self.updates > 1:
                with self.engine.autocast():
                    part.old, _ = objective.likelihoods(self.engine.model, ids, what, v, temperatures=self.temperatures)
            out.append(part)
        return out

    def alike(self, pairs: Sequence[Pair]) -> Tensor | None:
        """(pairs, codes of the largest picture): how much each code looks like the group's others at its place; None where nobody asks."""
        if not self.grpo.similar:
            return None
        size, vectors = self.grpo.group_size, self.before.image_tokenizer.vectors().cpu()
        out = torch.zeros(len(pairs), self.before.vocabulary.max_codes)
        for first in range(0, len(pairs), size):
            codes = torch.tensor([pair.codes for pair in pairs[first : first + size]])
            out[first : first + size, : codes.shape[1]] = objective.alike(codes[None], vectors)[0]
        return out

    def learn(self, parts: Sequence[Part]) -> tuple[Tensor, float]:
        """All updates of a rollout -> the sums of `Terms.totals` over all processes, and the last gradient's norm before clipping."""
        each = self.share // self.micro
        totals, norm = torch.zeros(6, dtype=torch.float64), 0.0
        for _ in range(self.grpo.epochs):
            for cut in range(self.grpo.minibatches):
                totals += self.update(parts[cut * each : (cut + 1) * each])
                norm = self.engine.norm()
                self.require_finite(norm, "gradient norm")
                self.engine.step()
        return objective.summed(totals, self.run.world), norm

    def update(self, parts: Sequence[Part]) -> Tensor:
        """Forward and backward of one update."""
        train, grpo = self.train_config, self.grpo
        counts = torch.stack([torch.stack([part.what.is_image.sum(), (~part.what.is_image).sum()]) for part in parts]).sum(0).double()
        image, text = objective.summed(counts.cpu(), self.run.world).clamp_min(1).tolist()
        totals = torch.zeros(6, dtype=torch.float64)
        for number, part in enumerate(parts):
            share = torch.where(part.what.is_image, train.image_weight / image, train.text_weight / text)
            with self.engine.micro_batch(last=number == len(parts) - 1):
                with self.engine.autocast():
                    new, entropy = objective.likelihoods(
                        self.engine.model,
                        part.ids,
                        part.what,
                        self.before.vocabulary,
                        temperatures=self.temperatures,
                        moved=grpo.entropy > 0,
                    )
                old = new.detach() if part.old is None else part.old
                found = objective.terms(
                    new, entropy, old, part.start, part.advantage, part.weight * ~objective.easy(old, grpo.easy), share, part.what.is_image,
                    low=grpo.clip_low, high=grpo.clip_high, kl=grpo.kl, entropy_weight=grpo.entropy, start_entropy=part.start_entropy,
                )  # fmt: skip
                self.require_finite(float(found.loss.detach()), "loss")
                self.engine.backward(found.loss * self.run.world)  # the engine averages over processes; the counts are global already
            totals += found.totals().cpu()
        return totals

    def require_finite(self, value: float, what: str) -> None:
        keys = [f"rollout {self.step} of seed {self.seed}"]
        stages._require_finite(self.run, value, self.step, STAGE, lambda: keys, what=what)

    @property
    def temperatures(self) -> tuple[float, float]:
        return self.grpo.temperature, self.grpo.text_temperature

    def precision(self) -> Any:
        """The frozen model computes as the other does, also where a DeepSpeed engine casts by itself."""
        return torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.train_config.precision == "bf16")

    # --- the model, whole -------------------------------------------------------------------------------------------------

    def sampler(self) -> nn.Module:
        """The model with whole weights in every process: itself, or, where ZeRO-3 has cut it, a copy."""
        if not any(map(is_cut, self.model.parameters())):
            return self.model
        if self.sampler_copy is None:
            self.sampler_copy = copy.deepcopy(self.before.generator)
        with torch.no_grad():
            for (_, there), (_, parameter) in zip(self.sampler_copy.named_parameters(), self.model.named_parameters(), strict=True):
                there.copy_(gathered(own_share(parameter), parameter))
        return self.sampler_copy

    def tokun(self, generator: nn.Module) -> Tokun:
        """The start with this generator; its tables are made once."""
        if self.drawer is None:
            self.drawer = copy.copy(self.before)
        self.drawer.generator = generator
        return self.drawer

    # --- what is told and kept --------------------------------------------------------------------------------------------

    def summary(
        self, values: dict[str, list[float]], advantage: Tensor, totals: Tensor, norm: float, seconds: Seconds, parts: Sequence[Part]
    ) -> dict[str, float]:
        """The figures of a step, over all processes."""
        each = {name: torch.tensor(found, dtype=torch.float64) for name, found in values.items()}
        n = len(advantage) * self.run.world
        sums = torch.stack([torch.stack([x.sum(), x.square().sum()]) for x in each.values()])
        started = torch.stack([part.start_entropy.double().sum().cpu() for part in parts]).sum() * self.grpo.epochs
        idle = (advantage.view(-1, self.grpo.group_size).abs().amax(1) < 1e-6).double().sum()
        sums, (started, idle) = (
            objective.summed(sums, self.run.world),
            objective.summed(torch.stack([started, idle]), self.run.world).tolist(),
        )
        out = {}
        for name, (total, squares) in zip(each, sums.tolist()):
            out |= {f"reward/{name}": total / n, f"reward/{name}_spread": max(0.0, squares / n - (total / n) ** 2) ** 0.5}
        kl, image_entropy, text_entropy, clipped, image, text = totals.tolist()
        tokens, whole = (image + text) / self.grpo.epochs, seconds.rollout + seconds.scoring + seconds.learning
        return out | {
            "reward/mean": sum(reward.weight * out[f"reward/{reward.name}"] for reward in self.rewards),
            "train/idle_groups": idle / (n / self.grpo.group_size), "train/kl": kl / (image + text), "train/clipped": clipped / (image + text),
            "train/entropy_image": image_entropy / max(1, image), "train/entropy_text": text_entropy / max(1, text),
            "train/entropy_kept": (image_entropy + text_entropy) / max(started, 1e-9), "train/grad_norm": norm,
            "time/rollout_share": seconds.rollout / whole, "time/scoring_share": seconds.scoring / whole,
            "time/rollout_tokens_per_second": tokens / seconds.rollout, "time/learning_tokens_per_second": tokens / seconds.learning,
            "time/step": whole,
        }  # fmt: skip

    def show(self, pairs: Sequence[Pair], values: dict[str, list[float]]) -> None:
        """The first groups of the rollout, each pair with its rewards, to the tracker."""
        some = pairs[: 2 * self.grpo.group_size]
        texts = [f"{pair.caption} ({', '.join(f'{name} {found[i]:.3g}' for name, found in values.items())})" for i, pair in enumerate(some)]
        grid = captioned_grid([pair.image for pair in some], texts, columns=self.grpo.group_size)
        folder = self.run.out / "samples"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"rollout-{self.step:08d}.png")
        self.run.tracker.log_grid("rollouts", grid, [pair.image for pair in some], texts, step=self.step)

    def judge(self, step: int) -> None:
        """Held-out pairs of the model as it is, by rewards and judges. Not again where a run goes on and it was done."""
        whole = self.engine.whole_model()
        if self.court is not None and whole is not None:
            held = self.court.hear(self.tokun(whole), self.prompts, step)
            decoder.forget(whole)
            self.run.tracker.log({f"real/{name}": value for name, value in held.items()}, step=step)
            if step:
                self.run.say(f"  step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in held.items()))
        self.clock.lap()

    def save(self) -> None:
        self.run.writer.wait()
        parts = {"engine.pt": self.engine.state()}
        if self.run.rank != 0:
            return
        record = {"settings": self.asked, "spent": self.spent + self.clock.seconds(), "world": self.run.world}
        states = self.run.states(STAGE)

        def write(folder: Path) -> None:
            for name, part in parts.items():
                torch.save(part, folder / name)
            checkpoint.write_record(folder / "state.json", record)

        self.run.writer.put(states.path(self.step), write, then=states.prune)

    def finish(self, stopped_by: str) -> None:
        """The checkpoint, the report of what is real, and the end of the trainer states."""
        self.judge(self.step)
        generator = self.engine.whole_model()
        if self.run.rank != 0 or self.court is None or generator is None:
            return
        whole = self.tokun(generator.float()).eval()
        report = self.court.report(whole, self.prompts, self.step)
        record = {
            "settings": self.asked, "steps": self.step, "stopped_by": stopped_by, "seconds": round(self.spent + self.clock.seconds()),
            "train": self.figures, "real": report, "parameters": self.parameters,
        }  # fmt: skip
        target = self.run.out / "checkpoint"
        with checkpoint.whole_directory(target) as folder:
            whole.save(folder, card=card(self.config, self.before.card, record))
            checkpoint.write_record(folder / "training.json", record)
        if self.config.sampling.n > 0:
            stages.log_samples(self.run, whole, self.step)
        self.run.writer.wait()
        self.run.forget(STAGE)
        self.run.say(real.lines(report))
        self.run.say(
            f"grpo: {target}; {self.run.out / 'real' / 'report.html'} says what is real\n  python sample.py --checkpoint {target} --seed 42 --n 16"
        )


def card(config: Config, before: str, record: dict[str, Any]) -> str:
    """The start's card, and what was done since."""
    g, t = config.grpo, config.train
    mix = ", ".join(f"{reward.weight:g} x {reward.kind}" for reward in g.rewards)
    told = (
        f"\n## Post-training\n\nGRPO from {'the bundled model' if config.start == 'bundled' else Path(config.start).name}: {record['steps']} rollouts of {t.batch_size * g.minibatches} pairs in groups of "
        f"{g.group_size}, rewards {mix}, learning rate {t.lr:g}, KL {g.kl:g}, {record['seconds'] / 60:.0f} minutes. {record['real']['verdict']}\n"
    )
    return (before.rstrip() + "\n" if before else "") + told

"""Promises of tokun/training/loop.py, by the smallest stage there is: one number, and batches drawn from it, as in GRPO."""

import json
import time

import pytest
import torch

from tokun.config import from_dict
from tokun.training import loop
from tokun.training.health import Preempted, StopRequest
from tokun.training.loop import Schedule, Stage, step_seed
from tokun.training.run import Run
from tokun.training.tracking import NullTracker
from tokun.utils.checkpoint import Writer


class Drifting(Stage):
    """The weight goes to the mean of what is drawn around it."""

    name = "drifting number"

    def __init__(self, run, *, stop_at=0, broken_at=-1, **schedule):
        super().__init__(run, Schedule(**{"steps": 6, "lr": 0.5, "warmup_steps": 2, "log_every": 2, "save_every": 100} | schedule))
        self.weight, self.stop_at, self.broken_at = torch.zeros(()), stop_at, broken_at
        self.seen, self.called, self.windows = [], [], []

    def describe(self):
        return "one number"

    def batches(self, start):
        step = start
        while True:
            torch.manual_seed(step_seed(7, step, self.run.rank))
            yield self.weight + torch.randn(4)
            step += 1

    def take_step(self, batch, lr):
        self.require_finite(torch.tensor(torch.nan if self.step == self.broken_at else 1.0))
        self.weight = self.weight + lr * (batch.mean() - self.weight)
        self.seen.append(batch.clone())
        self.run.stop.asked |= self.step + 1 == self.stop_at

    def batch_keys(self):
        return ["a prompt", "another"]

    def figures(self):
        self.called.append(("log", self.step))
        self.windows.append((self.window.steps, self.window.seconds()))
        return {"weight": float(self.weight)}, ""

    def evaluate(self):
        self.called.append(("evaluate", self.step))
        time.sleep(0.2)
        return ""

    def sample(self):
        self.called.append(("sample", self.step))

    def snapshot(self):
        self.called.append(("save", self.step))
        state = {"weight": self.weight.clone(), "spent": self.clock.seconds()}
        return lambda folder: torch.save(state, folder / "state.pt")

    def restore(self, folder):
        state = torch.load(folder / "state.pt", weights_only=True)
        self.weight = state["weight"]
        return state["spent"]


@pytest.fixture
def run(tmp_path):
    run = Run(from_dict({}), tmp_path, NullTracker(), 0, 1, False, StopRequest(), Writer(print))
    yield run
    run.close()


def test_a_stage_whose_batches_come_from_its_own_weights_goes_on_exactly(run):
    whole, stopped = Drifting(run), Drifting(run, stop_at=3)
    loop.train(whole)
    with pytest.raises(Preempted):
        loop.train(stopped)
    assert [path.name for path in (run.out / "state" / "drifting_number").iterdir()] == ["step-00000003"]
    run.stop.asked, again = False, Drifting(run)
    loop.train(again)
    assert len(stopped.seen) == len(again.seen) == 3 and again.clock.before > 0
    assert torch.equal(torch.stack(stopped.seen + again.seen), torch.stack(whole.seen)) and torch.equal(again.weight, whole.weight)


def test_everything_is_done_when_it_is_due_and_saved_behind_the_evaluation(run):
    stage = Drifting(run, log_every=2, eval_every=3, save_every=3, sample_every=6)
    loop.train(stage)
    assert stage.called == [
        ("log", 1), ("log", 2), ("evaluate", 3), ("save", 3), ("log", 4), ("log", 6), ("evaluate", 6), ("save", 6), ("sample", 6),
    ]  # fmt: skip
    stage = Drifting(run, log_every=100, steps=8)
    loop.train(stage)
    assert stage.called == [] and stage.step == 8  # it has gone on from the state of step 6


def test_an_evaluation_is_no_part_of_the_pace(run):
    stage = Drifting(run, log_every=3, eval_every=2)
    loop.train(stage)
    assert [steps for steps, _ in stage.windows] == [1, 1, 2]  # since the step, evaluation or figures before
    assert max(seconds for _, seconds in stage.windows) < 0.2 < stage.clock.seconds()


def test_time_that_runs_out_ends_the_training_and_is_said(run):
    stage = Drifting(run, steps=10**9, max_minutes=0.001)
    loop.train(stage)
    assert (
        0 < stage.step < 10**9
        and stage.schedule.stopped_by(stage.step) == "max_minutes 0.001"
        and stage.schedule.stopped_by(10**9) == "steps"
    )


def test_a_loss_that_is_not_finite_ends_it_and_names_the_batch(run):
    with pytest.raises(FloatingPointError, match="drifting number: the loss is nan at step 2"):
        loop.train(Drifting(run, broken_at=2))
    assert json.loads((run.out / "non_finite_drifting_number_step2_rank0.json").read_text()) == ["a prompt", "another"]


def test_a_schedule_takes_what_a_section_of_the_config_has():
    config = from_dict({"train": {"steps": 9, "lr": 0.25, "lr_hold": 0.5, "min_lr_ratio": 0.0, "warmup_steps": 1}})
    schedule = Schedule.of(config.train, eval_every=0)
    assert (schedule.steps, schedule.lr_hold, schedule.eval_every, schedule.sample_every) == (9, 0.5, 0, config.train.sample_every)
    assert schedule.lr_at(4, 0.5) == 0.25 and schedule.lr_at(9, 1.0) == 0.0
    images = Schedule.of(config.image_tokenizer_train)
    assert images.sample_every == 0 and images.min_lr_ratio == 0.05  # it has neither setting

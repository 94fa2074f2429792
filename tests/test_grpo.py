"""Promises of tokun/align/grpo.py and reward_hacking.py: a checkpoint learns from a reward, goes on exactly, and a hacked one is caught."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tokun
from benchmarks.zero import largest_difference
from tests.launchers import forked
from tests.small_runs import ROOT, needs, write_tree
from tokun.align import grpo, policy, reward_hacking, rollouts
from tokun.config import from_dict, load_config
from tokun.training import initial_checkpoint
from tokun.training.health import Preempted
from tokun.training.run import open_run

pytestmark = needs("accelerate", reason="training needs the extra 'train'")

TREE = {
    "threads": 1,
    "train": {"steps": 3, "batch_size": 8, "lr": 3e-3, "warmup_steps": 1, "weight_decay": 0.0, "precision": "no", "log_every": 1,
              "save_every": 1, "eval_every": 100, "sample_every": 100, "max_grad_norm": 1.0},
    "grpo": {"rewards": [{"kind": "tests.test_grpo:paper"}], "judges": [{"kind": "tests.test_grpo:lines"}], "group_size": 4,
             "eval_n": 4, "kl": 0.0, "least_entropy": 0.0, "temperature": 1.0, "text_temperature": 1.0,
             "guidance_scale": 1.0, "text_guidance_scale": 1.0},
    "sampling": {"n": 0},
    "tracking": {"kind": "none"},
}  # fmt: skip


def paper(pairs):
    """How white the picture is: a blank page wins."""
    return [float(np.asarray(pair.image, float).mean()) / 255 for pair in pairs]


def lines(pairs):
    """What the reward should have looked for: how much of the picture is neither ground nor flat."""
    return [float(np.asarray(pair.image, float).std()) / 255 for pair in pairs]


def broken(pairs):
    return [float("nan")] * len(pairs)


def write(folder: Path, start: Path, **changes) -> Path:
    return write_tree(folder / "grpo.yaml", TREE | {"start": str(start)}, **changes)


class Noted:
    """A run in this process, with what its tracker was told by step."""

    def __init__(self, config: Path, *overrides: str, stop_at: int = 0, deepspeed: bool = False):
        self.run = open_run(load_config(config, overrides), deepspeed=deepspeed)
        self.told: dict[int, dict[str, float]] = {}
        log = self.run.tracker.log

        def note(metrics, *, step):
            self.told.setdefault(step, {}).update(metrics)
            if step == stop_at and "train/kl" in metrics:
                self.run.stop.asked = True
            log(metrics, step=step)

        self.run.tracker.log = note
        self.stopped = False
        try:
            grpo.train_grpo(self.run)
        except Preempted:
            self.stopped = True
        self.run.close()
        self.out = self.run.out

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "checkpoint" / "generator" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(checkpoint_folder, tmp_path_factory) -> Noted:
    """Three rollouts of two updates each."""
    return Noted(write(tmp_path_factory.mktemp("whole"), checkpoint_folder, grpo__minibatches=2, grpo__kl=0.01))


def test_a_run_leaves_a_checkpoint_that_draws_and_says_what_it_learned_from(whole, checkpoint_folder):
    model = tokun.load(whole.out, device="cpu")
    assert len(model.sample(1, n=2)) == 2 and "GRPO from checkpoint: 3 rollouts of 16 pairs in groups of 4" in model.card
    before = load_file(checkpoint_folder / "generator" / "model.safetensors")
    assert any(not torch.equal(weight, before[name]) for name, weight in whole.weights().items())
    record = json.loads((whole.out / "checkpoint" / "training.json").read_text())
    assert record["steps"] == 3 and record["stopped_by"] == "steps" and record["settings"]["grpo"]["group_size"] == 4
    assert not (whole.out / "state").exists() or not list((whole.out / "state").rglob("engine.pt"))


def test_what_is_watched_is_told_at_every_step(whole):
    for step in (1, 2, 3):
        told = whole.told[step]
        assert told["reward/mean"] == told["reward/tests.test_grpo:paper"] and 0 < told["reward/mean"] < 1
        assert 0 < told["reward/tests.test_grpo:paper_spread"] < 0.5
        assert told["train/kl"] >= 0 and 0 <= told["train/clipped"] <= 1 and told["train/grad_norm"] > 0
        assert told["train/entropy_image"] > 0 and told["train/entropy_text"] > 0 and 0 < told["time/rollout_share"] < 1
        assert told["time/rollout_tokens_per_second"] > 0 < told["time/learning_tokens_per_second"]
    assert whole.told[1]["train/entropy_kept"] == pytest.approx(1, abs=0.05)
    assert "real/rewards/tests.test_grpo:paper" in whole.told[0] and "real/diversity" in whole.told[3]


def test_stopped_and_typed_again_it_ends_in_the_same_weights(whole, checkpoint_folder, tmp_path):
    config = write(tmp_path, checkpoint_folder, grpo__minibatches=2, grpo__kl=0.01)
    assert Noted(config, stop_at=2).stopped
    resumed = Noted(config)
    assert sorted(step for step, told in resumed.told.items() if "train/kl" in told) == [3]
    assert all(torch.equal(weight, whole.weights()[name]) for name, weight in resumed.weights().items())


@pytest.mark.slow
def test_an_adapter_learns_too_and_goes_on_exactly(checkpoint_folder, tmp_path):
    """Small matrices on a frozen base: what is written loads beside it, and stopped in between it is the same."""
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    configs = [write(folder, checkpoint_folder) for folder in folders]
    done = Noted(configs[0], "adapter.rank=2", "adapter.alpha=8")
    assert Noted(configs[1], "adapter.rank=2", "adapter.alpha=8", stop_at=2).stopped
    resumed = Noted(configs[1], "adapter.rank=2", "adapter.alpha=8")
    one, two = (load_file(run.out / "adapter" / "adapter_model.safetensors") for run in (done, resumed))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert done.told[1]["train/entropy_kept"] == pytest.approx(1, abs=0.05) and done.told[3]["train/kl"] > 0
    base, adapted = tokun.load(checkpoint_folder, device="cpu"), tokun.load(checkpoint_folder, adapter=done.out, device="cpu")
    assert any(a.codes != b.codes for a, b in zip(base.sample(1, n=4), adapted.sample(1, n=4)))


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(whole, checkpoint_folder, tmp_path):
    shutil.copytree(whole.out, tmp_path / "run")
    config = write(tmp_path, checkpoint_folder, grpo__minibatches=2, grpo__kl=0.01)
    older = json.loads((tmp_path / "run" / "checkpoint" / "training.json").read_text())
    older["settings"]["train"]["ema_decay"] = 0.999  # of a run that kept an average
    (tmp_path / "run" / "checkpoint" / "training.json").write_text(json.dumps(older))
    assert not Noted(config).told
    with pytest.raises(ValueError, match=r"made with other settings .*grpo.kl: 0.01 there, 0.5 here"):
        Noted(config, "grpo.kl=0.5")


@pytest.mark.slow
def test_a_reward_that_a_white_page_wins_is_reached_and_called_hacked(checkpoint_folder, tmp_path):
    """The deliberate hack: whiter is what was asked for, and lines are what the judge looks for."""
    done = Noted(
        write(
            tmp_path,
            checkpoint_folder,
            train__steps=12,
            train__batch_size=16,
            train__lr=1e-2,
            train__save_every=100,
            grpo__learn="image",
            grpo__eval_n=24,
        )
    )
    report = json.loads((done.out / "real" / "report.json").read_text())
    reward, judge = report["rewards"]["tests.test_grpo:paper"], report["judges"]["tests.test_grpo:lines"]
    assert reward["low"] > 0 and judge["rise"] < reward["rise"]
    assert reward["verdict"] == report["whole"] == "hacked" and report["verdict"].startswith("Verdict: hacked")
    page = (done.out / "real" / "report.html").read_text()
    assert "Verdict: hacked" in page and page.count("data:image/png") == 2
    assert "| reward tests.test_grpo:paper |" in (done.out / "real" / "report.md").read_text()
    assert {path.name for path in (done.out / "real" / "viewer").iterdir()} == {"before", "after"}


def record(reward, judge, *, diversity=1.0, near=0.0):
    n = len(reward)
    return {"asked": {"n": n}, "rewards": {"r": list(reward)}, "judges": {"j": list(judge)} if judge is not None else {},
            "diversity": diversity, "near_copies": near, "alike": 0.0}  # fmt: skip


def test_the_verdict_is_real_only_where_a_judge_rises_with_the_reward():
    rng = np.random.default_rng(0)
    flat, up = rng.normal(0, 1, 64), rng.normal(2, 1, 64)
    cases = {"real": (up, up), "hacked": (up, flat), "no gain": (flat, up)}
    for word, (reward, judge) in cases.items():
        found = reward_hacking.compare(record(flat, flat), record(reward, judge))
        assert found["whole"] == word, word
    assert reward_hacking.compare(record(flat, up), record(up, flat))["whole"] == "hacked"
    assert reward_hacking.compare(record(flat, None), record(up, None))["whole"] == "not judged"
    less = reward_hacking.compare(record(flat, flat), record(up, up, diversity=0.5, near=0.25))
    assert less["verdict"] == "Verdict: real (less varied: 0.50 of before; more near copies of training pictures: 25.0% (before 0.0%))."


def risen(rewards, judges):
    """A record in which these rewards and judges have risen by 2, and the others have not: the values by name, True for a rise."""
    values = np.random.default_rng(0).normal(0, 1, 64)
    rows = {
        kind: {name: list(values + 2 * rose) for name, rose in found.items()} for kind, found in (("rewards", rewards), ("judges", judges))
    }
    return {"asked": {"n": 64}, **rows, "diversity": 1.0, "near_copies": 0.0, "alike": 0.0}


def test_a_hacked_reward_does_not_hide_behind_the_judge_of_another():
    names = {"white": 1, "fits": 1}, {"of white": 0, "of fits": 1}
    before, after = risen(*(dict.fromkeys(one, 0) for one in names)), risen(*names)
    told = reward_hacking.compare(before, after, {"white": "of white", "fits": "of fits"})
    assert {name: row["verdict"] for name, row in told["rewards"].items()} == {"white": "hacked", "fits": "real"} and told[
        "whole"
    ] == "hacked"
    half = reward_hacking.compare(before, after, {"fits": "of fits"})
    assert half["rewards"]["white"]["verdict"] == half["whole"] == "hacked", "of the judges that no other reward names, none rose"
    alone = [{**one, "judges": {"of fits": one["judges"]["of fits"]}} for one in (before, after)]
    last = reward_hacking.compare(*alone, {"fits": "of fits"})
    assert {name: row["verdict"] for name, row in last["rewards"].items()} == {"white": "not judged", "fits": "real"}
    assert last["whole"] == "not judged", "no judge is left for the white page"
    assert reward_hacking.compare(before, after, {"white": "never measured"})["whole"] == "not told apart"
    assert reward_hacking.compare(before, after)["whole"] == "not told apart"
    assert reward_hacking.compare(before, risen(names[0], dict.fromkeys(names[1], 1)))["whole"] == "real"


def test_a_rewards_judge_is_one_of_the_judges(checkpoint_folder, tmp_path):
    named = [{"kind": "tests.test_grpo:paper", "judge": "pmi"}]
    with pytest.raises(ValueError, match=r"grpo\.rewards\[0\]\.judge is 'pmi'; grpo\.judges has tests\.test_grpo:lines"):
        Noted(write(tmp_path, checkpoint_folder, grpo__rewards=named))


def test_rollouts_are_drawn_as_the_start_is_sampled_unless_asked_otherwise(tiny_model):
    start = tiny_model.defaults
    found = rollouts.as_sampled(from_dict({"grpo": {"guidance_scale": 2.0}}).grpo, tiny_model)
    assert (found.temperature, found.text_temperature, found.text_guidance_scale) == (
        start.temperature,
        start.text_temperature,
        start.text_guidance_scale,
    )
    assert found.guidance_scale == 2.0 and rollouts.as_sampled(found, tiny_model) == found


def test_a_run_with_the_shipped_settings_learns_what_the_start_samples(checkpoint_folder, tmp_path):
    folder = tmp_path / "start"
    shutil.copytree(checkpoint_folder, folder)
    settings = json.loads((folder / "sampling.json").read_text())
    own = {"temperature": 0.9, "text_temperature": 0.5, "guidance_scale": 2.0, "text_guidance_scale": 3.0}
    (folder / "sampling.json").write_text(json.dumps(settings | {"defaults": settings["defaults"] | own}))
    done = Noted(write(tmp_path, folder, train__steps=1, **{f"grpo__{name}": 0.0 for name in own}))
    record = json.loads((done.out / "checkpoint" / "training.json").read_text())
    assert {name: record["settings"]["grpo"][name] for name in own} == own and done.told


def test_pairs_of_a_group_share_their_tags_and_nothing_else(tiny_model):
    config = from_dict({"grpo": {"group_size": 4}}).grpo
    draw = lambda numbers: rollouts.draw(tiny_model, config, rollouts.Prompts([], []), seed=1, step=2, numbers=numbers, size=8)  # noqa: E731
    pairs = draw(range(8))
    assert len({pair.tags for pair in pairs[:4]}) == 1 and len({tuple(pair.codes) for pair in pairs}) == 8
    assert [pair.codes for pair in draw(range(4, 8))] == [pair.codes for pair in pairs[4:]]
    assert [pair.index for pair in pairs] == list(range(16, 24))


def test_if_words_are_learned_a_group_is_one_picture_with_several_captions(tiny_model):
    """The picture is drawn as the checkpoint draws it; likelihoods of the words are those of pairs with that picture given."""
    config = from_dict({"grpo": {"group_size": 4, "learn": "text", "guidance_scale": 7.0, "text_guidance_scale": 1.5}}).grpo
    draw = lambda numbers: rollouts.draw(tiny_model, config, rollouts.Prompts([], []), seed=1, step=2, numbers=numbers, size=8)  # noqa: E731
    pairs = draw(range(8))
    own = tiny_model.sample(1, indices=[16, 20])
    assert [pair.codes for pair in pairs] == [own[0].codes] * 4 + [own[1].codes] * 4 and pairs[0].tags == own[0].tags
    assert len({pair.caption for pair in pairs}) > 4 and [pair.index for pair in pairs] == list(range(16, 24))
    assert [pair.caption_ids for pair in draw(range(4, 8))] == [pair.caption_ids for pair in pairs[4:]]
    nll = tiny_model.caption_nll([pair.tags for pair in pairs], [pair.caption_ids for pair in pairs], [pair.codes for pair in pairs])
    assert [pair.caption_nll for pair in pairs] == pytest.approx(nll, rel=1e-4)


def length(pairs):
    """Short captions win."""
    return [-float(len(pair.caption_ids)) for pair in pairs]


@pytest.mark.slow
def test_what_is_not_learned_is_kept_near_the_start(checkpoint_folder, tmp_path):
    """Only words are learned, but the same weights draw the pictures: the KL holds the codes, too."""

    def moved(kl: float) -> float:
        (tmp_path / f"kl{kl:g}").mkdir()
        more = {
            "grpo__rewards": [{"kind": "tests.test_grpo:length"}],
            "grpo__learn": "text",
            "train__steps": 20,
            "train__lr": 1e-3,
        }
        return Noted(write(tmp_path / f"kl{kl:g}", checkpoint_folder, grpo__kl=kl, **more)).told[20]["train/kl_image"]

    free, held = moved(0.0), moved(30.0)
    assert 0 < held < 0.7 * free


def test_groups_of_a_prompt_draw_the_same_description(shaped_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("A disc.\nA square.\n\nA disc.\nA star on a field.\n")
    config = from_dict({"grpo": {"group_size": 2, "prompts": str(tmp_path / "prompts.txt")}}).grpo
    prompts = rollouts.read_prompts(config, shaped_model)
    assert (prompts.train, prompts.held_out) == (["A disc.", "A square."], ["A star on a field."])
    pairs = rollouts.draw(shaped_model, config, prompts, seed=1, step=0, numbers=range(4), size=4)
    assert [pair.caption for pair in pairs[::2]] == [pair.caption for pair in pairs[1::2]]
    assert {pair.caption for pair in pairs} == {"A disc.", "A square."}


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"grpo__group_size": 3}, "grpo.group_size is 3; it must be at least 2 and divide the 8 pairs"),
        ({"grpo__rewards": [{"kind": "tests.test_grpo:broken"}]}, "reward tests.test_grpo:broken gave nan for pair 0"),
        ({"grpo__judges": [{"kind": "tests.test_grpo:paper"}]}, r"grpo.judges\[0\] .* is one of grpo.rewards"),
        ({"grpo__clip_low": 1.5}, "grpo.clip_low is 1.5; it must be between 0 and 1"),
        ({"grpo__perturb": ["blur"]}, "grpo.perturb names blur"),
        ({"grpo__prompts": "nowhere.txt", "grpo__learn": "text"}, "with grpo.prompts the words are given"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(checkpoint_folder, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        Noted(write(tmp_path, checkpoint_folder, **changes))


def test_without_a_start_there_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(ValueError, match=r"grpo\.rewards is set, which needs a trained model"):
        Noted(write(tmp_path, Path("")), "start=")


PEERS = {"easy": 0.05, "similar": 1.0, "entropy": 1.0, "scale": "batch", "perturb": ["noise"], "kl": 1.0}


@pytest.mark.slow
def test_each_option_of_the_peers_changes_what_is_learned(checkpoint_folder, tmp_path):
    """Easy tokens left out, similar codes moved less, entropy held, whole batches' spread, perturbed pictures, distance from the start: by
    the gradient of the second of two epochs, of which small micro batches change nothing."""

    def norm(name: str, micro: int = 8, **options) -> float:
        (tmp_path / name).mkdir()
        options = {f"grpo__{option}": value for option, value in options.items()}
        more = {"train__steps": 1, "train__micro_batch_size": micro, "grpo__epochs": 2}
        done = Noted(write(tmp_path / name, checkpoint_folder, **more | options))
        assert (done.out / "checkpoint").is_dir()
        return done.told[1]["train/grad_norm"]

    off = norm("off")
    assert off > 0 and norm("once", epochs=1) != pytest.approx(off, rel=1e-3)
    for option, value in PEERS.items():
        assert norm(option, **{option: value}) != pytest.approx(off, rel=1e-3), option
    whole, cut = norm("whole", **PEERS), norm("cut", micro=2, **PEERS)
    assert cut == pytest.approx(whole, rel=1e-3) and whole != pytest.approx(off, rel=1e-3)


def test_held_out_pairs_are_drawn_once_for_the_curve_and_the_report(checkpoint_folder, tmp_path, monkeypatch):
    drawn, draw = [], rollouts.held_out_pairs
    monkeypatch.setattr(rollouts, "held_out_pairs", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    done = Noted(write(tmp_path, checkpoint_folder, train__steps=2, train__eval_every=1))
    assert len(drawn) == 3, "before, after the first step, at the end"
    assert (done.out / "real" / "before.png").is_file() and (done.out / "real" / "viewer" / "after").is_dir()


def test_settings_that_do_nothing_are_named_at_the_start(checkpoint_folder, tmp_path, capsys):
    Noted(write(tmp_path, checkpoint_folder, train__steps=1, train__compile=True, train__loss_chunk=64))
    assert "train.compile, train.loss_chunk have no effect here" in "".join(capsys.readouterr())


def test_a_checkpoint_of_weights_trained_in_bf16_leaves_them_as_they_are(tiny_model):
    """DeepSpeed trains on with the very module that is written."""
    config = from_dict({"start": "x", "sampling": {"temperature": 0.6}})
    trained = policy.Policy(config, tiny_model)
    module = trained.model.bfloat16()
    trained.engine = SimpleNamespace(whole_model=lambda: module)
    whole = trained.whole()
    assert module.dtype == torch.bfloat16 and whole.generator.dtype == torch.float32
    assert whole.defaults == config.sampling and tiny_model.defaults != config.sampling, "the run's sampling defaults"
    for own, written in zip(module.parameters(), whole.generator.parameters(), strict=True):
        assert torch.equal(own.float(), written)


@pytest.mark.slow
def test_no_average_is_kept_and_a_run_begun_with_one_goes_on(whole, checkpoint_folder, tmp_path):
    """Trainer states once held an average that nobody read, and settings that change nothing."""
    config = write(tmp_path, checkpoint_folder, grpo__minibatches=2, grpo__kl=0.01)
    assert Noted(config, stop_at=2).stopped
    (state,) = (tmp_path / "run" / "state" / "grpo").glob("step-*2")
    assert {path.name for path in state.iterdir()} == {"engine.pt", "state.json"}
    torch.save({"step": torch.tensor(4)}, state / "ema.pt")
    record = json.loads((state / "state.json").read_text())
    assert not {"ema_decay", "ema_every"} & record["settings"]["train"].keys()
    record["settings"]["train"] |= {"ema_decay": 0.999, "ema_every": 1, "word_dropout": 0.0, "lr_hold": 0.0}
    (state / "state.json").write_text(json.dumps(record))
    resumed = Noted(config)
    assert all(torch.equal(weight, whole.weights()[name]) for name, weight in resumed.weights().items())


def test_the_start_is_read_once(checkpoint_folder, tmp_path, monkeypatch):
    """With an adapter, too, whose evaluations need the base as its files hold it."""
    read, load = [], initial_checkpoint.load
    monkeypatch.setattr(initial_checkpoint, "load", lambda *arguments, **options: read.append(arguments) or load(*arguments, **options))
    few = {"train__steps": 1, "train__eval_every": 1}
    done = Noted(write(tmp_path, checkpoint_folder, **few), "adapter.rank=2")
    assert len(read) == 1 and (done.out / "adapter").is_dir()


def test_descriptions_are_learned_to_be_drawn(shaped_folder, tmp_path):
    """Pictures of several shapes, to prompts; judged by held-out ones."""
    (tmp_path / "prompts.txt").write_text("".join(f"A {what}.\n" for what in ("disc", "square", "star", "ship", "tree")))
    options = {"grpo__prompts": str(tmp_path / "prompts.txt"), "grpo__similar": 0.5, "train__steps": 2}
    done = Noted(write(tmp_path, shaped_folder, **options))
    assert done.told[2]["train/grad_norm"] > 0 and done.told[2]["train/entropy_text"] == 0
    assert json.loads((done.out / "real" / "report.json").read_text())["rewards"]["tests.test_grpo:paper"]["n"] == 4
    assert tokun.load(done.out, device="cpu").sample(1, n=1, prompt="A ship.")[0].caption == "A ship."


def test_it_stops_where_entropy_has_fallen_too_far(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo.GrpoStage, "summary", lambda self, *_: {"train/entropy_kept": 0.1, "reward/mean": 0.0, "train/kl": 0.0})
    done = Noted(write(tmp_path, checkpoint_folder, grpo__least_entropy=0.5, train__steps=5))
    assert json.loads((done.out / "checkpoint" / "training.json").read_text())["stopped_by"] == "entropy has fallen to 0.10 of the start's"


ENGINES = {
    "ddp": (),
    "zero2": (),
    "zero3": (),
    "zero3 adapter": ("adapter.rank=2",),
}  # zero1: by the real launcher, in test_launch.py
SPREAD = {"grpo__kl": 0.01, "grpo__minibatches": 2}
COMPARED = ("reward/tests.test_grpo:paper", "train/kl", "train/entropy_image", "train/grad_norm")


def engine_file(how: str) -> str:
    return "" if how == "ddp" else str(ROOT / f"configs/deepspeed/{how.partition(' ')[0]}.json")


def learn_in_turn(folder: Path) -> None:
    """In each of two processes: a run by every engine; the first one writes what its tracker was told."""
    from tokun.training import engine

    engine.start_processes()
    told = {
        how: Noted(folder / "grpo.yaml", f"out={folder / how}", f"train.deepspeed={engine_file(how)}", *more, deepspeed=how != "ddp").told
        for how, more in ENGINES.items()
    }
    engine.wait_for_processes()
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "told.json").write_text(json.dumps(told))
    engine.end_processes()


@pytest.fixture(scope="module")
def told_by_engine(checkpoint_folder, tmp_path_factory) -> dict:
    """By engine, what the tracker of two processes was told, and of one process alone."""
    pytest.importorskip("deepspeed", reason="ZeRO needs the extra 'train'")
    folder = tmp_path_factory.mktemp("engines")
    config = write(folder, checkpoint_folder, **SPREAD)
    alone = {more: Noted(config, f"out={folder / f'alone{len(more)}'}", *more).told for more in set(ENGINES.values())}
    forked(folder, 2, work=learn_in_turn)
    two = {
        how: {int(step): told for step, told in by_step.items()} for how, by_step in json.loads((folder / "told.json").read_text()).items()
    }
    return {how: (two[how], alone[more], folder / how) for how, more in ENGINES.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ENGINES)
def test_two_processes_have_the_losses_of_one(told_by_engine, how):
    two, one, out = told_by_engine[how]
    for name in COMPARED:
        theirs, mine = ({str(step): told[name] for step, told in run.items() if name in told} for run in (two, one))
        assert mine and theirs.keys() == mine.keys() and largest_difference(theirs, mine) < 1e-3, (how, name)
    assert (out / ("adapter" if "adapter" in how else "checkpoint") / "training.json").is_file()

"""Nothing is lost: killed, asked to stop, out of disk, and started again, a run ends with the weights of one left alone."""

import json
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tokun
from tests.small_runs import assert_same_weights, needs, run_stages, start_fork, take_over, write_config
from tokun import data
from tokun.cli import train as command
from tokun.config import load_config
from tokun.training import health, loop, resume_settings
from tokun.training.run import open_run
from tokun.training.stages import STAGES
from tokun.utils import console
from tokun.utils.checkpoint import BestCheckpoints
from tokun.utils.errors import UserError

pytestmark = needs("accelerate", reason="training needs the extra 'train'")


def test_two_runs_of_one_seed_end_in_the_same_weights(finished, tmp_path, small_shards):
    assert_same_weights(finished[1], run_stages(write_config(tmp_path, small_shards)))


class Killed(Exception):
    pass


def run_until(config: Path, monkeypatch, step: int, stage: str = "") -> None:
    """Run the stages, and be killed where the loss of that step (of that stage) is looked at."""
    check = loop.require_finite

    def stop(run, value, at, where, keys, **more):
        if at == step and where == (stage or where):
            raise Killed
        check(run, value, at, where, keys, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "require_finite", stop)
        with pytest.raises(Killed):
            run_stages(config)


@pytest.mark.parametrize(("stage", "at"), [("image tokenizer", 5), ("generator", 5)])
def test_resumed_equals_uninterrupted(finished, tmp_path, small_shards, monkeypatch, stage, at):
    config = write_config(tmp_path, small_shards)
    if stage == "generator":
        take_over(finished[1], tmp_path / "run")
    run_until(config, monkeypatch, at, stage)
    assert_same_weights(finished[1], run_stages(config))


def test_without_a_discriminator_resumed_equals_uninterrupted(tmp_path, small_shards, monkeypatch):
    found = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, small_shards, image_tokenizer_train__gan_weight=0.0)
        if name == "killed":
            run_until(config, monkeypatch, 5, "image tokenizer")
            states = [torch.load(path, weights_only=True) for path in (tmp_path / name / "run/state/image_tokenizer").glob("*/state.pt")]
            assert states and all(state["adversary"] == {} for state in states), "as every version has written it"
        run = open_run(load_config(config))
        for stage in STAGES[:2]:
            stage(run)
        run.close()
        found.append(load_file(run.out / "image_tokenizer" / "model.safetensors"))
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][part], found[1][part]) for part in found[0])


def test_a_trainer_state_holds_what_it_always_held_so_that_a_run_begun_before_goes_on(finished, tmp_path, small_shards, monkeypatch):
    """Files and keys as every version has written them; the figures in them are those of the tests around."""
    config, states = write_config(tmp_path, small_shards), tmp_path / "run" / "state"
    run_until(config, monkeypatch, 3, "image tokenizer")
    (folder,) = (states / "image_tokenizer").iterdir()
    state = torch.load(folder / "state.pt", weights_only=True)
    assert folder.name == "step-00000002" and [path.name for path in folder.iterdir()] == ["state.pt"]
    assert set(state) == {"model", "optimizer", "ema", "adversary", "spent", "settings"} and set(state["adversary"]) == {
        "module",
        "optimizer",
    }
    assert set(json.loads(state["settings"])) == {"image_tokenizer", "image_tokenizer_train", "seed", "shards"}
    shutil.rmtree(tmp_path / "run")
    take_over(finished[1], tmp_path / "run")
    run_until(config, monkeypatch, 3, "generator")
    (folder,) = (states / "generator").iterdir()
    assert {path.name for path in folder.iterdir()} == {"engine.pt", "ema.pt", "state.json"}
    assert set(torch.load(folder / "engine.pt", weights_only=True)) == {"model", "optimizer"}
    record = json.loads((folder / "state.json").read_text())
    for name in ("engine.pt", "ema.pt", "state.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"trainer state .*{folder.name} is damaged \({name}: .*Delete it"):
            run_stages(config)
        (folder / name).write_bytes(content)
    assert set(record) == {"settings", "spent", "world", "spikes"} and {"generator", "train", "seed", "codes"} <= set(record["settings"])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_under_muon_resumed_equals_uninterrupted(finished, tmp_path, small_shards, monkeypatch):
    outs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        take_over(finished[1], tmp_path / name / "run")
        config = write_config(tmp_path / name, small_shards, train__optimizer="muon")
        if name == "killed":
            run_until(config, monkeypatch, 5)
        outs.append(run_stages(config))
    assert_same_weights(*outs)


@pytest.mark.parametrize("stage", ["image_tokenizer", "generator"])
def test_killed_in_a_stage_and_started_again_it_finishes_with_the_same_weights(finished, tmp_path, small_shards, stage):
    config = write_config(tmp_path, small_shards)
    if stage == "generator":
        take_over(finished[1], tmp_path / "run")
    process = start_and_wait(tmp_path, config, stage, 5)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list((tmp_path / "run" / "state" / stage).iterdir())
    assert_same_weights(finished[1], run_stages(config))


@pytest.mark.parametrize(("number", "by", "status"), [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "Ctrl-C", 130)], ids=["TERM", "INT"])
def test_asked_to_stop_it_saves_ends_well_and_goes_on_to_the_same_weights(finished, tmp_path, small_shards, number, by, status):
    """SIGTERM, as a cluster's scheduler sends it, or Ctrl-C, to the command while it trains the generator. Its last line says so."""
    config = write_config(tmp_path, small_shards, train__save_every=1000)
    take_over(finished[1], tmp_path / "run")
    process = start_and_wait(tmp_path, config, "generator", 2)  # it is looked at while the third runs
    os.kill(process.pid, number)
    (tmp_path / "go").touch()
    process.join(120)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == status and said.splitlines()[-1].startswith(f"train: asked to stop ({by}). Everything is saved"), said
    assert [path.name for path in (tmp_path / "run" / "state" / "generator").iterdir()] == ["step-00000003"]
    assert_same_weights(finished[1], run_stages(config))


def start_and_wait(folder: Path, config: Path, stage: str, step: int) -> BaseProcess:
    """The command, in a process of its own that stands still where the loss of that step is looked at, until the file `go` is there."""
    process = start_fork(folder / "said.txt", train_and_wait, ["--config", str(config)], stage.replace("_", " "), step, folder)
    while process.is_alive() and not (folder / "there").exists():
        time.sleep(0.01)
    assert process.is_alive(), (folder / "said.txt").read_text()
    return process


def train_and_wait(argv: list[str], stage: str, step: int, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    check = loop.require_finite

    def stand_still(run, value, at, where, keys, **more):
        if (where, at) == (stage, step):
            (folder / "there").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        check(run, value, at, where, keys, **more)

    loop.require_finite = stand_still
    console.run("train.py", lambda: command.main(argv))


def test_asked_to_stop_in_an_earlier_stage_it_saves_that_and_goes_on(finished, tmp_path, small_shards, monkeypatch):
    config, prefetch = write_config(tmp_path, small_shards, image_tokenizer_train__save_every=1000), data.prefetch

    def signalled(make, start, **options):
        for number, batch in enumerate(prefetch(make, start, **options)):
            if isinstance(make, data.ImageBatches) and number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(data, "prefetch", signalled)
    with pytest.raises(health.Preempted):
        run_stages(config)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "state" / "image_tokenizer").iterdir()] == ["step-00000003"]
    assert_same_weights(finished[1], run_stages(config))


def test_a_disk_that_fills_up_later_does_not_end_the_run(finished, tmp_path, small_shards, monkeypatch, capsys):
    save, failures = torch.save, []

    def fails_twice(*args, **options):
        if len(failures) < 2:
            failures.append(1)
            raise OSError(28, "No space left on device")
        save(*args, **options)

    monkeypatch.setattr(torch, "save", fails_twice)
    out = run_stages(write_config(tmp_path, small_shards, train__save_every=2))
    assert len(failures) == 2 and "No space left" in capsys.readouterr().out
    assert_same_weights(finished[1], out)


@pytest.mark.skipif(os.name == "nt" or (os.geteuid() == 0 and not Path("/proc").is_dir()), reason="needs a place that cannot be written")
def test_a_place_that_cannot_be_written_or_is_too_small_is_told_before_training(tmp_path, small_shards, monkeypatch):
    with pytest.raises(ValueError, match="cannot be written"):
        open_run(load_config(write_config(tmp_path, small_shards), ["out=/proc/nothing"]))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    with pytest.raises(ValueError, match="GiB left, the trainer states alone need"):
        run_stages(write_config(tmp_path, small_shards))


def test_the_best_checkpoints_are_whole_those_of_lowest_loss_and_the_same_after_a_kill(finished, tmp_path, small_shards, monkeypatch):
    take_over(finished[1], tmp_path / "run")
    config = write_config(tmp_path, small_shards, train__keep_best=2, train__eval_every=2)
    out = tmp_path / "run"
    run_until(config, monkeypatch, 5)
    before = {record["step"]: record["loss"] for record in BestCheckpoints(out / "best", keep=2).records()}
    assert before.keys() == {2, 4}
    assert_same_weights(finished[1], run_stages(config))
    records = BestCheckpoints(out / "best", keep=2).records()
    training = json.loads((out / "checkpoint" / "training.json").read_text())
    assert [{k: r[k] for k in ("step", "loss")} for r in records] == training["best"] and len(records) == 2
    assert records[0]["loss"] <= min(before.values()) and all(before.get(r["step"], r["loss"]) == r["loss"] for r in records)
    tokun.load(out / "best" / f"step-{records[0]['step']:08d}")
    with pytest.raises(ValueError, match="warmup_steps"):
        shutil.rmtree(out / "checkpoint")
        run_stages(config, "train.warmup_steps=3")


def test_killed_between_code_shards_it_goes_on_and_writes_the_same_bytes(finished, tmp_path, small_shards):
    """What a kill leaves in the two short stages: half a tokenizer folder, some whole small_shards, one begun."""
    out = tmp_path / "run"
    shutil.copytree(finished[1], out, ignore=shutil.ignore_patterns("checkpoint", "text_tokenizer", "samples"))
    (out / "text_tokenizer.partial").mkdir()
    (out / "text_tokenizer.partial" / "text_tokenizer.model").write_bytes(b"half")
    (out / "codes" / "codes.json").unlink()
    begun = out / "codes" / "train-00001.tar"
    begun.rename(begun.with_name(begun.name + ".partial")).write_bytes(b"half a shard")
    kept = (out / "codes" / "train-00000.tar").stat().st_mtime_ns
    (out / "state" / "image_tokenizer" / "step-00000008").mkdir(parents=True)  # and of a finished stage, killed while it tidied up
    run_stages(write_config(tmp_path, small_shards))
    assert_same_weights(finished[1], out)
    assert (out / "codes" / "train-00000.tar").stat().st_mtime_ns == kept
    for shard in sorted((finished[1] / "codes").glob("*.tar")):
        assert (out / "codes" / shard.name).read_bytes() == shard.read_bytes()
    assert not list(out.rglob("*.partial"))
    (out / "state" / "generator" / "step-00000008").mkdir(parents=True)
    run_stages(write_config(tmp_path, small_shards))
    assert not list(out.glob("state/*"))


def test_a_state_of_an_adapter_names_the_adapter_where_there_is_none_now(tmp_path):
    """Not the weights that it started from, whose fingerprint only runs with an adapter record."""
    with_adapter = {"start": "bundled", resume_settings.START: "f" * 64, "adapter": {"rank": 8}}
    with pytest.raises(UserError, match=r"other settings \(adapter\.rank: 8 there, None here\)"):
        resume_settings.require_same(tmp_path, with_adapter, {"start": "bundled"})
    with pytest.raises(UserError, match="started from other weights"):
        resume_settings.require_same(tmp_path, with_adapter, with_adapter | {resume_settings.START: "0" * 64})
    resume_settings.require_same(tmp_path, with_adapter, dict(with_adapter))

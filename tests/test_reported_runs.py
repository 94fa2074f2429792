"""What users of other tools have reported in public of runs: resuming, trackers, uploads. Each case says what it was about."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch

from tests.small_runs import run_stages, take_over, write_config
from tokun.inference import hub
from tokun.inference.folders import resolve
from tokun.inference.load import load
from tokun.training import loop, tracking
from tokun.utils import checkpoint


class Stub:
    """As much of a stage as resuming asks for: its trainer state is one tensor."""

    name = "stub"

    def __init__(self, folder):
        self.run, self.step = SimpleNamespace(say=lambda line: None), 0
        self.states = checkpoint.TrainerStates(folder, keep=2)

    def restore(self, folder):
        checkpoint.read_part(folder / "state.pt")
        return 7.0


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "gone"])
def test_a_damaged_trainer_state_is_one_line_with_the_way_out(tmp_path, damage):
    """PytorchStreamReader failed reading zip archive; Ran out of input: a state that a full or failing disk has cut."""
    stage = Stub(tmp_path)
    path = stage.states.path(40) / "state.pt"
    path.parent.mkdir(parents=True)
    torch.save({"weights": torch.arange(1000.0)}, path)
    loop._resume(stage, stage.states)
    assert stage.step == 40
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content)), "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=r"trainer state .* is damaged .*Delete it, and the same command resumes"):
        loop._resume(stage, stage.states)


def test_what_fails_behind_the_reading_of_a_trainer_state_is_not_called_damage(tmp_path):
    """size mismatch for weight: the file was whole, and to delete it would have been the wrong advice."""

    class Other(Stub):
        def restore(self, folder):
            state = checkpoint.read_part(folder / "state.pt")
            torch.nn.Linear(2, 3).load_state_dict(state)
            return 7.0

    stage = Other(tmp_path)
    path = stage.states.path(40) / "state.pt"
    path.parent.mkdir(parents=True)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        loop._resume(stage, stage.states)


def test_a_run_whose_data_has_changed_is_refused_with_what_differs(finished, tmp_path, small_shards):
    """Resumed over other shards, the order of samples was another, and nothing said so."""
    config = write_config(tmp_path, small_shards)
    take_over(finished[1], tmp_path / "run")
    with pytest.raises(ValueError, match="shards"):
        run_stages(config, f"data.train={small_shards}/val-*.tar")


def test_a_metric_that_is_not_a_number_ends_no_run(tmp_path):
    """Logging NaN or infinity of a diverged step broke the tracker's JSON."""
    tracker = tracking.make_tracker("none", project="p", name="n", directory=tmp_path, config={})
    tracker.log({"loss": float("nan"), "norm": float("inf")}, step=1)
    tracker.finish()


@pytest.mark.parametrize("folder", ["my prints [v1]", "a, b", "it's mine"])
def test_the_printed_line_to_upload_an_offline_run_can_be_pasted(tmp_path, monkeypatch, capsys, folder):
    """wandb sync with a path of blanks: two arguments, and neither exists."""
    wandb = pytest.importorskip("wandb")
    run = SimpleNamespace(
        dir=str(tmp_path / folder / "wandb" / "offline-run-1-abc" / "files"),
        define_metric=lambda *a, **k: None,
        finish=lambda **k: None,
        id="abc",
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    tracking.make_tracker("wandb", project="p", name="n", directory=tmp_path / folder, config={})
    line = capsys.readouterr().out.partition("wandb sync ")[2].strip()
    (pattern,) = shlex.split(line)
    assert pattern.startswith(f"{tmp_path / folder / 'wandb'}/offline-run-*-")


def test_a_folder_with_trainer_states_is_not_taken_for_a_checkpoint(tmp_path, checkpoint_folder):
    """push_to_hub of a run's folder uploaded gigabytes of optimizer states; loading it failed with a missing config."""
    (tmp_path / "run" / "state" / "generator").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="Has its training finished"):
        resolve(tmp_path / "run")
    (tmp_path / "run" / "checkpoint").symlink_to(checkpoint_folder, target_is_directory=True)
    assert resolve(tmp_path / "run") == tmp_path / "run" / "checkpoint", "a run's folder holds its checkpoint"
    model = load(checkpoint_folder, device="cpu")
    with pytest.raises(ValueError, match=r"holds .*state"):
        hub.save_pretrained(model, tmp_path / "run")


@pytest.mark.parametrize("name", ["", "a/b/c", "https://huggingface.co/a/b", "a b", None])
def test_what_is_no_name_on_the_hub_is_told_before_anything_is_uploaded(tiny_model, name, monkeypatch):
    """Repo id must be in the form 'repo_name' or 'namespace/repo_name': after the weights were written."""
    monkeypatch.setattr(hub, "save_pretrained", lambda *a, **k: pytest.fail("it was written"))
    with pytest.raises((ValueError, OSError)):
        tiny_model.push_to_hub(name)


def test_a_checkpoint_of_pickles_is_refused(tmp_path, checkpoint_folder):
    """pytorch_model.bin from a stranger: loading it runs its code."""
    import shutil

    copy = shutil.copytree(checkpoint_folder, tmp_path / "c")
    (copy / "generator" / "model.safetensors").rename(copy / "generator" / "pytorch_model.bin")
    with pytest.raises((ValueError, FileNotFoundError), match="safetensors"):
        load(copy, device="cpu")


def test_sampling_json_of_a_later_version_is_told_and_not_half_read(tmp_path, checkpoint_folder):
    """unexpected keyword argument, far from where it came from."""
    import shutil

    copy = shutil.copytree(checkpoint_folder, tmp_path / "c")
    settings = json.loads((copy / "sampling.json").read_text())
    settings["defaults"]["of_a_later_version"] = 1
    (copy / "sampling.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"sampling\.json cannot be read"):
        load(copy, device="cpu")

"""Under the launchers: the real deepspeed command, one process and two."""

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import tokun
from benchmarks.zero import Case, free_port, largest_difference, launch, make_out, train_case
from tests import test_grpo
from tests.launchers import ZERO1, deepspeed, forked, in_a_terminal
from tests.small_runs import ROOT, needs, preference_tree, take_over, write_config, write_tree
from tokun.config import TrainConfig
from tokun.inference import preferences
from tokun.training import engine
from tokun.training.engine import deepspeed_settings, first_host, idle_gpus, slurm_processes
from tokun.training.run import require_shared_folder

pytestmark = [
    needs("accelerate", reason="training needs the extra 'train'"),
    pytest.mark.timeout(600),  # a launch is a minute where others use the processors too
]


STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def launched(finished, tmp_path_factory, small_shards) -> dict[str, Any]:
    """Trainings of one generator from the same codes, each with a spike at its second step: in this process, in two with the environment
    that the deepspeed launcher gives them, then in one; whole ones, and ones that are stopped and go on elsewhere. By name what
    benchmarks.zero.train_case returns, and `weights`. The launcher itself starts one process in test_ctrl_c_in_a_terminal_ends_in_our_line,
    two in `two_launched`."""
    pytest.importorskip("deepspeed", reason="the deepspeed launcher needs the extra 'train'")
    if torch.cuda.is_available():
        pytest.skip("this test is about machines without GPUs")
    folder, found = tmp_path_factory.mktemp("launched"), {}
    often = {"train__save_every": 100, "train__eval_every": STOP, "train__sample_every": STOP, "train__log_every": 1}
    config = write_config(folder, small_shards, generator__dropout=0.0, train__steps=STEPS, sampling__n=0, **often)

    def case(name: str, json: str = "", *, goes_on: str = "", stopped: bool = False, overrides: tuple[str, ...] = ()) -> Case:
        out, settings = folder / name, str(ROOT / f"configs/deepspeed/{json}.json") if json else ""
        if goes_on:
            shutil.copytree(folder / goes_on, out, symlinks=True)
        else:
            make_out(out, finished[1])
        return Case(name, str(config), str(out), settings, stop_at=stopped * STOP, spikes=(2,), overrides=overrides)

    def keep(results: dict[str, Any]) -> None:
        for name, result in results.items():
            weights = folder / name / "checkpoint" / "generator" / "model.safetensors"
            found[name] = result | {"weights": load_file(weights) if weights.is_file() else {}}

    def here(*cases: Case) -> None:
        keep({c.name: train_case(c) for c in cases})

    here(case("plain"), case("1 stopped", stopped=True))
    two = [
        case("2 ddp"), case("2 zero1 stopped", "zero1", stopped=True), case("2 zero2", "zero2"),
        case("2 zero3 stopped", "zero3", stopped=True, overrides=("sampling.n=1",)),
        case("1 -> 2 ddp", goes_on="1 stopped"),
    ]  # fmt: skip
    keep(launch(two, folder / "two", processes=2, start=forked))
    one = [case("1 zero1", "zero1"), case("2 -> 1 zero3-offload", "zero3-offload", goes_on="2 zero3 stopped")]
    keep(launch(one, folder / "one", processes=1, start=forked))
    here(case("2 zero1 -> plain", goes_on="2 zero1 stopped"))
    return found


def test_under_deepspeed_the_generator_learns_what_it_learns_without(launched):
    assert launched["1 zero1"]["said"].startswith("DeepSpeed ZeRO-1")
    assert_near(launched["1 zero1"]["weights"], launched["plain"]["weights"])


def test_one_process_of_eight_samples_and_two_of_four_have_the_same_losses(launched):
    assert launched["2 ddp"]["losses"].keys() == launched["plain"]["losses"].keys()
    assert largest_difference(launched["2 ddp"]["losses"], launched["plain"]["losses"]) < 1e-5


@pytest.mark.parametrize("name", ["2 zero1 stopped", "2 zero2", "2 zero3 stopped"])
def test_every_zero_stage_learns_what_one_process_learns(launched, name):
    """Losses, held-out losses of the averaged weights, and the weights that are saved: whole, by the same names."""
    plain, zero = launched["plain"], launched[name]
    assert zero["said"].startswith(f"DeepSpeed ZeRO-{name[6]}") and len(zero["losses"]) >= STOP - 1
    assert largest_difference(zero["losses"], plain["losses"]) < 1e-3
    if not zero["stopped"]:
        assert zero["held_out"].keys() == plain["held_out"].keys() == {str(STOP), str(STEPS)}
        assert largest_difference(zero["held_out"], plain["held_out"]) < 1e-3
        assert_near(zero["weights"], plain["weights"])


def test_zero_cuts_among_two_processes_what_it_promises_to_cut(launched):
    whole = launched["plain"]["bytes"]
    for name, cut in {
        "2 zero1 stopped": ("moments",), "2 zero2": ("moments", "gradients"), "2 zero3 stopped": ("moments", "gradients", "parameters"),
    }.items():  # fmt: skip
        held = launched[name]["bytes"]
        assert all(held[kind] < 0.6 * whole[kind] for kind in cut), (name, held, whole)
    assert launched["2 zero2"]["bytes"]["parameters"] == whole["parameters"]


@pytest.mark.parametrize("name", ["plain", "2 ddp", "1 zero1", "2 zero1 stopped", "2 zero2", "2 zero3 stopped"])
def test_a_spike_is_skipped_under_every_engine(launched, name):
    """Counted, and not stepped: the curves above are compared with one that skips the same step."""
    assert launched[name]["skipped"] == 1


@pytest.mark.parametrize("name", ["1 -> 2 ddp", "2 -> 1 zero3-offload", "2 zero1 -> plain"])
def test_stopped_it_goes_on_with_another_number_of_processes_and_another_engine(launched, name):
    """The same global batches in the same order: the losses behind the stop are those of the run that was never stopped."""
    plain, resumed = launched["plain"], launched[name]
    assert all(launched[stopped]["stopped"] for stopped in ("1 stopped", "2 zero1 stopped", "2 zero3 stopped"))
    assert sorted(map(int, resumed["losses"])) == list(range(STOP + 1, STEPS + 1))
    assert largest_difference(resumed["losses"], plain["losses"]) < (1e-5 if "ddp" in name else 1e-3)
    assert_near(resumed["weights"], plain["weights"])


def assert_near(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys() and others
    for name, weight in others.items():
        torch.testing.assert_close(some[name], weight, atol=1e-3, rtol=1e-2)


SRUN = {
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


def test_under_srun_a_process_finds_the_others_as_under_torchrun():
    found = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "32345"}
    assert slurm_processes(SRUN) == found
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert SRUN | own | slurm_processes(SRUN | own) == SRUN | found | own
    assert slurm_processes(SRUN | {"WORLD_SIZE": "16"}) == {}  # srun torchrun …: the inner launcher has spoken
    assert slurm_processes({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == {} == slurm_processes({})  # a batch script, no srun


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_ctrl_c_in_a_terminal_ends_in_our_line(finished, tmp_path, small_shards, launcher):
    """It was buried under the tracebacks of the launcher, and of Weights & Biases, whose own process the launcher ends first."""
    never = dict.fromkeys(("train__steps", "train__eval_every", "train__sample_every", "train__save_every"), 10**6)
    config = write_config(tmp_path, small_shards, tracking__kind="wandb", **never)
    take_over(finished[1], tmp_path / "run")
    command = [sys.executable]
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="the deepspeed launcher needs the extra 'train'")
        command += [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1", "--master_port", str(free_port())]
    said = in_a_terminal([*command, "train.py", "--config", str(config)], until="tok/s")
    last = [line for line in said.splitlines() if line.strip()][-1]
    assert last.startswith("train: asked to stop (") and "Everything is saved" in last, said[-3000:]
    assert list((tmp_path / "run" / "state" / "generator").iterdir())


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[07-09,12],x1", "gpu07"),
        ("rack2-n[3,5]", "rack2-n3"),
        ("n[1-2].cluster", "n1.cluster"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        first_host("")


@pytest.mark.parametrize(
    ("env", "gpus", "visible", "said"),
    [
        (
            {"WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0"},
            8,
            1,
            r"machine of 8 GPUs \(CUDA_VISIBLE_DEVICES=0\): the others are idle.*--num_gpus 8",
        ),
        ({"WORLD_SIZE": "1"}, 0, 2, "nproc_per_node=2"),  # no /dev/nvidia* to count, but torch sees them
        ({"WORLD_SIZE": "8"}, 8, 0, "torch .* sees none.*on the CPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, 0, r"sees none \(CUDA_VISIBLE_DEVICES=\)"),
        ({"SLURM_NTASKS": "16"}, 8, 8, "16 tasks, but 1 process.*srun"),
        ({"WORLD_SIZE": "1"}, 0, 0, "--num_gpus 2"),
        ({"WORLD_SIZE": "8"}, 8, 8, ""),
        ({"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, 8, 2, ""),  # two were asked for
        ({}, 8, 8, ""),  # plain python: one process is what was typed
        ({}, 0, 0, ""),
        ({"WORLD_SIZE": "2"}, 0, 0, ""),
    ],
)
def test_idle_gpus_are_told_of(env, gpus, visible, said):
    warning = idle_gpus(env, gpus=gpus, visible=visible)
    assert re.search(said, warning) if said else warning == ""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"CUDA_VISIBLE_DEVICES": "3"}, ""),  # one of a shared node's eight, by Slurm or by hand
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c"}, ""),
        ({"SLURM_GPUS_ON_NODE": "1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "2"}, r"given 2 of the machine's 8 GPUs: .*nproc_per_node=2"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "machine of 8 GPUs.*--num_gpus 8"),
        ({}, "machine of 8 GPUs.*--num_gpus 8"),  # deepspeed --num_gpus 1: the launcher itself has hidden the others
    ],
)
def test_only_gpus_that_the_job_may_use_are_called_idle(typed, said):
    """Under the deepspeed launcher, which sets CUDA_VISIBLE_DEVICES of its processes. To unset it would take other users' GPUs."""
    warning = idle_gpus({"WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "3"}, gpus=8, visible=1, typed=typed)
    assert re.search(said, warning) if said else warning == ""
    assert "unset" not in warning and ("--num_gpus" in warning) == ("of 8 GPUs" in warning)


def test_a_node_that_does_not_see_the_run_s_folder_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="all nodes must share this folder"):
        require_shared_folder(tmp_path, seconds=0)
    (tmp_path / "config.yaml").touch()
    require_shared_folder(tmp_path, seconds=0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, "bf16 or no"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "without ZeRO"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to nvme"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 9.0}, "leave it out of the JSON"),
    ],
)
def test_what_a_deepspeed_json_cannot_have_is_refused_with_the_way_out(tmp_path, settings, match):
    (tmp_path / "own.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=match):
        deepspeed_settings(TrainConfig(deepspeed=str(tmp_path / "own.json")), micro=2, accumulation=1)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_every_zero_json_is_taken_and_muon_refused_with_it(name):
    path = str(ROOT / f"configs/deepspeed/{name}.json")
    settings = deepspeed_settings(TrainConfig(deepspeed=path, max_grad_norm=0.5), micro=2, accumulation=3)
    assert settings["gradient_accumulation_steps"] == 3 and settings["gradient_clipping"] == 0.5
    with pytest.raises(ValueError, match=r"zero0\.json"):
        deepspeed_settings(TrainConfig(deepspeed=path, optimizer="muon"), micro=2, accumulation=3)


@pytest.fixture(scope="module")
def two_launched(tiny_model, checkpoint_folder, small_shards, tmp_path_factory) -> Path:
    """A folder with three runs of one launch by the real launcher, which takes longer to start than what they do: preferences in `dpo`,
    rewards in `grpo`, and in `run` the whole story by train.py as it is typed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "pairs.jsonl").write_text(preferences.lines(tiny_model.best_and_worst(3, 6, 2)))
    dpo = write_tree(folder / "dpo.yaml", preference_tree(checkpoint_folder, folder / "pairs.jsonl"))
    rewarded = test_grpo.write(folder, checkpoint_folder, **test_grpo.SPREAD, tracking__kind="tensorboard")
    story = write_config(folder, small_shards)
    runs = [[str(dpo), ZERO1, f"out={folder / 'dpo'}"], [str(rewarded), ZERO1, f"out={folder / 'grpo'}"], [str(story), ZERO1]]
    (folder / "runs.json").write_text(json.dumps(runs))
    deepspeed("--module", "tests.several", str(folder / "runs.json"), processes=2)
    return folder


def test_two_processes_tell_the_whole_story_from_pictures_to_pairs(finished, two_launched):
    """Same global batches as one process, so every weight that is not re-drawn by the quantizer stays near."""
    out = two_launched / "run"
    one, two = (json.loads((o / "image_tokenizer" / "stage.json").read_text())["figures"] for o in (finished[1], out))
    assert two["psnr"] == pytest.approx(one["psnr"], abs=0.5)
    first, second = (json.loads((o / "checkpoint" / "training.json").read_text())["val"] for o in (finished[1], out))
    assert second["text_loss"] == pytest.approx(first["text_loss"], rel=0.05)
    image, caption = tokun.load(out)(42)
    assert image.size == (32, 32) and caption


def test_the_real_launcher_leaves_an_adapter_that_loads(two_launched, checkpoint_folder):
    assert tokun.load(checkpoint_folder, adapter=two_launched / "dpo").sample(1, 1)


def test_under_the_real_launcher_rewards_are_learned_as_by_one_process(two_launched, checkpoint_folder, tmp_path):
    one = test_grpo.Noted(test_grpo.write(tmp_path, checkpoint_folder, **test_grpo.SPREAD))
    two = curves(two_launched / "grpo" / "tracking")
    for name in test_grpo.COMPARED:
        mine = {str(step): told[name] for step, told in one.told.items() if name in told}
        assert two[name].keys() == mine.keys() and largest_difference(two[name], mine) < 1e-3, name
    assert (two_launched / "grpo" / "checkpoint" / "training.json").is_file()


def curves(folder: Path) -> dict[str, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: {str(e.step): e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


STEPS_OF_128_MIB = """
import resource
import numpy as np
from tokun.utils.memory import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        held = [np.ones(2**17) for _ in range(128)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_memory()
faults()
print(given_back, faults())
"""


@pytest.mark.parametrize("has_cuda", [False, True])
def test_training_computes_on_nvidias_gpus_or_the_cpu(monkeypatch, has_cuda):
    """accelerate alone would take the GPU of a Mac."""
    import accelerate

    from tokun.training import engine

    asked = mock.Mock(return_value=mock.Mock(num_processes=1))
    monkeypatch.setattr(accelerate, "Accelerator", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    made = engine.make_accelerator("no")
    asked.assert_called_once_with(mixed_precision="no", cpu=not has_cuda)
    assert has_cuda or made.state.device == torch.device("cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such settings")
def test_memory_of_a_step_is_kept_for_the_next_one():
    told = subprocess.run([sys.executable, "-c", STEPS_OF_128_MIB], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    given_back, kept = map(int, told.split())
    assert kept < given_back / 20


def test_where_the_c_library_is_another_one_nothing_is_done(monkeypatch):
    monkeypatch.setattr("tokun.utils.memory.platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("tokun.utils.memory.ctypes.CDLL", None)
    engine.keep_memory()

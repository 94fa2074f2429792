"""The whole story at the smallest size: train, resume, skip, refuse. Real stages, real shards, real processes."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tokun
from data_tools import toy
from tokun import stages
from tokun.config import from_dict, load_config
from tokun.image_tokenizer import ImageTokenizer

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "data": {"max_caption_tokens": 32},
    "text_tokenizer": {"vocab_size": 360},
    "image_tokenizer": {"image_size": 32, "channels": [16, 32], "blocks": 1, "codebook_size": 32, "latent_dim": 16},
    "image_tokenizer_train": {
        "steps": 8, "batch_size": 8, "perceptual": "none", "perceptual_weight": 0.0, "precision": "no", "gan_weight": 0.1, "gan_start": 4,
        "log_every": 1, "save_every": 2, "eval_every": 4, "min_psnr": 0.0, "min_usage": 0.0, "min_perplexity": 0.0,
    },
    "codes": {"views": 2, "batch_size": 16},
    "generator": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "dropout": 0.1},
    "train": {"steps": 8, "batch_size": 8, "precision": "no", "log_every": 1, "save_every": 2, "eval_every": 4, "sample_every": 8, "warmup_steps": 2},
    "sampling": {"n": 2},
    "tracking": {"kind": "none"},
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.write_shards(folder, 48, 0, 32, "train", shard_size=32)
    toy.write_shards(folder, 16, 1, 32, "val")
    return folder


def write_config(folder: Path, shards: Path, **changes) -> Path:
    tree = json.loads(json.dumps(SMALL)) | {"out": str(folder / "run"), "threads": 1}
    tree["data"] |= {"train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar")}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable,), timeout: int = 200) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [*launcher, "train.py", "--config", str(config), *overrides], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def run_stages(config_path: Path, *overrides: str) -> Path:
    run = stages.open_run(load_config(config_path, overrides))
    for stage in (stages.train_text_tokenizer, stages.train_image_tokenizer, stages.encode_shards, stages.train_generator):
        stage(run)
    return run.out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, shards)
    return config, run_stages(config)


def weights(out: Path) -> dict[str, torch.Tensor]:
    image = load_file(out / "image_tokenizer" / "model.safetensors")
    generator = load_file(out / "checkpoint" / "generator" / "model.safetensors")
    return {f"image.{k}": v for k, v in image.items()} | {f"generator.{k}": v for k, v in generator.items()}


def assert_same_weights(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing, differing[:5]


def test_pictures_in_checkpoint_out_and_pairs_from_it(finished):
    model = tokun.load(finished[1])
    image, caption = model(42)
    assert image.size == (32, 32) and caption
    card = (finished[1] / "checkpoint" / "README.md").read_text()
    assert "Figures" in card and "dB" in card
    assert list((finished[1] / "samples").glob("step-*.png"))


def test_finished_stages_are_skipped_and_leave_every_file_as_it_was(finished):
    config, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "config.yaml"}
    run_stages(config)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "config.yaml"}


@pytest.mark.parametrize(
    ("override", "named"),
    [("image_tokenizer.codebook_size=64", "codebook_size"), ("text_tokenizer.vocab_size=380", "vocab_size"), ("train.lr=0.5", "lr")],
)
def test_a_result_of_other_settings_is_refused_by_the_setting_that_differs(finished, override, named):
    with pytest.raises(ValueError, match=named):
        run_stages(finished[0], override)


def test_two_runs_of_one_seed_end_in_the_same_weights(finished, tmp_path, shards):
    assert_same_weights(finished[1], run_stages(write_config(tmp_path, shards)))


class Killed(Exception):
    pass


@pytest.mark.parametrize(("stage", "at"), [("image tokenizer", 5), ("generator", 5)])
def test_resumed_equals_uninterrupted(finished, tmp_path, shards, monkeypatch, stage, at):
    config = write_config(tmp_path, shards)
    check = stages._require_finite

    def stop(run, value, step, where, keys, **more):
        if where == stage and step == at:
            raise Killed
        check(run, value, step, where, keys, **more)

    monkeypatch.setattr(stages, "_require_finite", stop)
    with pytest.raises(Killed):
        run_stages(config)
    monkeypatch.setattr(stages, "_require_finite", check)
    assert_same_weights(finished[1], run_stages(config))


def test_accumulated_micro_batches_give_the_whole_batchs_weights(finished, tmp_path, shards):
    out = tmp_path / "run"
    for part in ("text_tokenizer", "image_tokenizer", "codes"):
        shutil.copytree(finished[1] / part, out / part)
    config = write_config(tmp_path, shards, generator__dropout=0.0)
    whole = load_file(run_stages(config) / "checkpoint" / "generator" / "model.safetensors")
    shutil.rmtree(out / "checkpoint")
    split = load_file(run_stages(config, "train.micro_batch_size=2") / "checkpoint" / "generator" / "model.safetensors")
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=2e-4, rtol=1e-3)


def test_codes_of_another_tokenizer_are_refused_with_both_fingerprints(finished, tmp_path):
    codes = tmp_path / "codes"
    shutil.copytree(finished[1] / "codes", codes)
    config = from_dict({"image_tokenizer": SMALL["image_tokenizer"]})
    other = ImageTokenizer(config.image_tokenizer)
    own = ImageTokenizer.load(finished[1] / "image_tokenizer")
    assert stages.require_codes_of(codes, own)["counts"]["train"] == 48
    with pytest.raises(ValueError, match=other.fingerprint()) as caught:
        stages.require_codes_of(codes, other)
    assert own.fingerprint() in str(caught.value)
    (codes / "codes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"codes\.json"):
        stages.require_codes_of(codes, own)


def test_a_collapsed_tokenizer_stops_the_run_with_an_explanation(tmp_path, shards):
    config = write_config(tmp_path, shards, image_tokenizer_train__min_psnr=60.0, image_tokenizer_train__steps=2)
    for _ in range(2):  # when it has just been trained, and when it is found finished
        with pytest.raises(ValueError, match=r"PSNR is .* dB"):
            run_stages(config)
    assert not (tmp_path / "run" / "codes").exists()


def test_a_non_finite_loss_stops_the_run_and_names_its_batch(finished, tmp_path, shards):
    config = write_config(tmp_path, shards, image_tokenizer_train__lr=1e30, image_tokenizer_train__max_grad_norm=1e30)
    with pytest.raises(FloatingPointError, match="non_finite_image_tokenizer"):
        run_stages(config)
    (listed,) = (tmp_path / "run").glob("non_finite_*.json")
    assert len(json.loads(listed.read_text())) == 8


def test_a_corrupt_member_is_skipped_and_counted(finished, tmp_path, shards):
    mine = tmp_path / "shards"
    shutil.copytree(shards, mine)
    shard = mine / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    png = data.index(b"\x89PNG")
    data[png : png + 64] = bytes(64)
    shard.write_bytes(bytes(data))
    out = run_stages(write_config(tmp_path, mine))
    record = json.loads((out / "codes" / "codes.json").read_text())
    assert record["counts"]["train"] == 47
    assert json.loads((out / "image_tokenizer" / "stage.json").read_text())["skipped"]["broken picture"] > 0


def test_a_shard_without_one_usable_sample_is_counted_and_not_fatal(finished, tmp_path, shards):
    mine = tmp_path / "shards"
    shutil.copytree(shards, mine)
    with tarfile.open(mine / "train-00002.tar", "w") as tar:
        info = tarfile.TarInfo("lonely.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    out = run_stages(write_config(tmp_path, mine))
    record = json.loads((out / "codes" / "codes.json").read_text())
    assert record["counts"]["train"] == 48
    assert record["skipped"] == {"train-00002": {"incomplete sample": 1}}


def test_a_run_stopped_by_its_minutes_says_so_when_more_are_given(tmp_path, shards, capsys):
    config = write_config(tmp_path, shards)
    out = run_stages(config, "train.max_minutes=0.0001")
    assert json.loads((out / "checkpoint" / "training.json").read_text())["stopped_by"] == "max_minutes 0.0001"
    run_stages(config, "train.max_minutes=0.0001")
    assert "was stopped by" not in capsys.readouterr().out
    run_stages(config)
    assert "was stopped by max_minutes 0.0001" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_under_muon_resumed_equals_uninterrupted(finished, tmp_path, shards, monkeypatch):
    outs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        for part in ("text_tokenizer", "image_tokenizer", "codes"):
            shutil.copytree(finished[1] / part, tmp_path / name / "run" / part)
        config = write_config(tmp_path / name, shards, train__optimizer="muon")
        if name == "killed":
            with monkeypatch.context() as patch:
                check = stages._require_finite

                def stop(run, value, step, where, keys, *, check=check, **more):
                    if step == 5:
                        raise Killed
                    check(run, value, step, where, keys, **more)

                patch.setattr(stages, "_require_finite", stop)
                with pytest.raises(Killed):
                    run_stages(config)
        outs.append(run_stages(config))
    assert_same_weights(*outs)


EARLY = [
    ("train.batch_size=8", 3, False, "train.batch_size"),
    ("train.micro_batch_size=3", 1, False, "micro_batch_size"),
    ("train.task_mix={painting: 1}", 1, False, "painting"),
    ("train.tag_dropout=2.0", 1, False, "tag_dropout"),
    ("generator.dropout=1.0", 1, False, "generator.dropout"),
    ("train.deepspeed=nowhere.json", 1, True, "nowhere.json"),
    ("train.deepspeed=configs/deepspeed/zero1.json", 1, True, "zero0"),
    ("image_tokenizer_train.perceptual_weights=nowhere.pt", 1, False, "nowhere.pt"),
]


@pytest.mark.parametrize(("override", "world", "deepspeed", "named"), EARLY)
def test_what_a_late_stage_would_refuse_is_refused_before_the_first(tmp_path, shards, monkeypatch, override, world, deepspeed, named):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.chdir(ROOT)
    more = {"image_tokenizer_train__perceptual": "squeezenet", "image_tokenizer_train__perceptual_weight": 0.1} if "weights" in override else {}
    config = load_config(write_config(tmp_path, shards, train__optimizer="muon", image_tokenizer_train__batch_size=24, **more), [override])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        stages.open_run(config, deepspeed=deepspeed)
    assert not (tmp_path / "run").exists()


MISTAKES = [
    ("train.batchsize=1", "train.batch_size"),
    ("data.train=nowhere/train-*.tar", "nowhere/train-*.tar"),
    ("train.batch_size=0", "batch_size"),
    ("train.task_mix={painting: 1}", "painting"),
    ("image_tokenizer.downsample=16", "downsample"),
]


@pytest.mark.parametrize(("override", "named"), MISTAKES)
def test_a_users_mistake_is_named(tmp_path, shards, finished, override, named):
    out = tmp_path / "run"
    for part in ("text_tokenizer", "image_tokenizer", "codes"):
        shutil.copytree(finished[1] / part, out / part)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        run_stages(write_config(tmp_path, shards), override)


def test_a_users_mistake_is_one_line_at_the_console(finished):
    done = train(finished[0], "train.batchsize=1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "train.batch_size" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("stage", ["image_tokenizer", "generator"])
def test_killed_in_a_stage_and_started_again_it_finishes_with_the_same_weights(finished, tmp_path, shards, stage):
    config = write_config(tmp_path, shards)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(config)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "state" / stage).glob("step-????????")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = train(config)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_weights(finished[1], tmp_path / "run")


@pytest.mark.parametrize("stage", ["image_tokenizer", "generator"])
def test_asked_to_stop_it_saves_ends_well_and_goes_on_to_the_same_weights(finished, tmp_path, shards, stage):
    """SIGTERM, as a cluster's scheduler sends it."""
    config = write_config(tmp_path, shards, train__save_every=1000, image_tokenizer_train__save_every=1000)
    states, command = tmp_path / "run" / "state" / stage, [sys.executable, "-c", SLOW_STEPS, "--config", str(config)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, cwd=ROOT, env=env | {"STAGE": stage}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if "at the third step" in line:
                process.send_signal(signal.SIGTERM)
                break
        said = process.stdout.read()
    assert process.returncode == 0 and "asked to stop" in said, said
    assert [path.name for path in states.iterdir()] == ["step-00000003"]
    assert train(config).returncode == 0
    assert_same_weights(finished[1], tmp_path / "run")


SLOW_STEPS = """
import os, sys, time
import train
from tokun import data, stages
prefetch = data.prefetch
kind = {"image_tokenizer": data.ImageBatches, "generator": data.TokenBatches}[os.environ["STAGE"]]
def slow(make, start, **options):
    for number, batch in enumerate(prefetch(make, start, **options)):
        if isinstance(make, kind) and number == 2:
            print("at the third step", flush=True)
            time.sleep(3)
        yield batch
data.prefetch = slow
train.main(sys.argv[1:])
"""


def test_a_disk_that_fills_up_later_does_not_end_the_run(finished, tmp_path, shards, monkeypatch, capsys):
    save, failures = torch.save, []

    def fails_twice(*args, **options):
        if len(failures) < 2:
            failures.append(1)
            raise OSError(28, "No space left on device")
        save(*args, **options)

    monkeypatch.setattr(torch, "save", fails_twice)
    out = run_stages(write_config(tmp_path, shards, train__save_every=2))
    assert len(failures) == 2 and "No space left" in capsys.readouterr().out
    assert_same_weights(finished[1], out)


@pytest.mark.skipif(os.name == "nt" or (os.geteuid() == 0 and not Path("/proc").is_dir()), reason="needs a place that cannot be written")
def test_a_place_that_cannot_be_written_or_is_too_small_is_told_before_training(tmp_path, shards, monkeypatch):
    with pytest.raises(ValueError, match="cannot be written"):
        stages.open_run(load_config(write_config(tmp_path, shards), ["out=/proc/nothing"]))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    with pytest.raises(ValueError, match="GiB left, the trainer states alone need"):
        run_stages(write_config(tmp_path, shards))


def test_a_spike_is_skipped_and_counted(finished, tmp_path, shards, monkeypatch):
    monkeypatch.setattr("tokun.health.Spikes.is_spike", lambda self, norm: setattr(self, "count", self.count + 1) or True)
    out = run_stages(write_config(tmp_path, shards))
    record = json.loads((out / "checkpoint" / "training.json").read_text())
    assert record["train"]["train/skipped_spikes"] == 8
    assert any(not torch.equal(one, other) for one, other in zip(weights(out).values(), weights(finished[1]).values(), strict=True))


def test_health_is_tracked(finished):
    record = json.loads((finished[1] / "checkpoint" / "training.json").read_text())
    figures = record["train"]
    assert 0 < figures["train/mfu"] < 1.5 and 0 <= figures["train/padding"] < 0.5 and figures["train/peak_memory_gb"] > 0.05
    assert figures["train/skipped_spikes"] == 0 and 0 <= figures["train/data_wait"] <= 1


def test_killed_between_code_shards_it_goes_on_and_writes_the_same_bytes(finished, tmp_path, shards):
    """What a kill leaves in the two short stages: half a tokenizer folder, some whole shards, one begun."""
    out = tmp_path / "run"
    shutil.copytree(finished[1], out, ignore=shutil.ignore_patterns("checkpoint", "text_tokenizer", "samples"))
    (out / "text_tokenizer.partial").mkdir()
    (out / "text_tokenizer.partial" / "text_tokenizer.model").write_bytes(b"half")
    (out / "codes" / "codes.json").unlink()
    begun = out / "codes" / "train-00001.tar"
    begun.rename(begun.with_name(begun.name + ".partial")).write_bytes(b"half a shard")
    kept = (out / "codes" / "train-00000.tar").stat().st_mtime_ns
    run_stages(write_config(tmp_path, shards))
    assert_same_weights(finished[1], out)
    assert (out / "codes" / "train-00000.tar").stat().st_mtime_ns == kept
    for shard in sorted((finished[1] / "codes").glob("*.tar")):
        assert (out / "codes" / shard.name).read_bytes() == shard.read_bytes()
    assert not list(out.rglob("*.partial"))


def deepspeed(config: Path, *overrides: str, processes: int) -> subprocess.CompletedProcess:
    """The real launcher; skips where it cannot run."""
    pytest.importorskip("deepspeed", reason="the deepspeed launcher needs the extra 'train'")
    launcher = Path(sys.executable).with_name("deepspeed")
    if torch.cuda.is_available():
        pytest.skip("this test is about machines without GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    zero1 = f"train.deepspeed={ROOT / 'configs/deepspeed/zero1.json'}"
    command = (sys.executable, str(launcher), "--num_gpus", str(processes), "--master_port", port)
    done = train(config, zero1, *overrides, launcher=command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{processes} process(es), DeepSpeed ZeRO-1" in done.stdout + done.stderr
    return done


def test_under_deepspeed_the_generator_learns_what_it_learns_without(finished, tmp_path, shards):
    out = tmp_path / "run"
    for part in ("text_tokenizer", "image_tokenizer", "codes"):
        shutil.copytree(finished[1] / part, out / part)
    config = write_config(tmp_path, shards, generator__dropout=0.0)
    run_stages(config)
    plain = load_file(out / "checkpoint" / "generator" / "model.safetensors")
    shutil.rmtree(out / "checkpoint")
    deepspeed(config, processes=1)
    zero = load_file(out / "checkpoint" / "generator" / "model.safetensors")
    for name in plain:
        torch.testing.assert_close(zero[name], plain[name], atol=1e-3, rtol=1e-2)


def test_two_processes_tell_the_whole_story_from_pictures_to_pairs(finished, tmp_path, shards):
    """Same global batches as one process, so every weight that is not re-drawn by the quantizer stays near."""
    config = write_config(tmp_path, shards)
    deepspeed(config, processes=2)
    out = tmp_path / "run"
    one, two = (json.loads((o / "image_tokenizer" / "stage.json").read_text())["figures"] for o in (finished[1], out))
    assert two["psnr"] == pytest.approx(one["psnr"], abs=0.5)
    first, second = (json.loads((o / "checkpoint" / "training.json").read_text())["val"] for o in (finished[1], out))
    assert second["text_loss"] == pytest.approx(first["text_loss"], rel=0.05)
    image, caption = tokun.load(out)(42)
    assert image.size == (32, 32) and caption

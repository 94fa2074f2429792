"""Under the launchers: the real deepspeed command, one process and two."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokun
from tests.small_runs import ROOT, run_stages, train, write_config

pytest.importorskip("accelerate", reason="training needs the extra 'train'")


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


def test_under_deepspeed_the_generator_learns_what_it_learns_without(finished, tmp_path, small_shards):
    out = tmp_path / "run"
    for part in ("text_tokenizer", "image_tokenizer", "codes"):
        shutil.copytree(finished[1] / part, out / part)
    config = write_config(tmp_path, small_shards, generator__dropout=0.0)
    run_stages(config)
    plain = load_file(out / "checkpoint" / "generator" / "model.safetensors")
    shutil.rmtree(out / "checkpoint")
    deepspeed(config, processes=1)
    zero = load_file(out / "checkpoint" / "generator" / "model.safetensors")
    for name in plain:
        torch.testing.assert_close(zero[name], plain[name], atol=1e-3, rtol=1e-2)


def test_two_processes_tell_the_whole_story_from_pictures_to_pairs(finished, tmp_path, small_shards):
    """Same global batches as one process, so every weight that is not re-drawn by the quantizer stays near."""
    config = write_config(tmp_path, small_shards)
    deepspeed(config, processes=2)
    out = tmp_path / "run"
    one, two = (json.loads((o / "image_tokenizer" / "stage.json").read_text())["figures"] for o in (finished[1], out))
    assert two["psnr"] == pytest.approx(one["psnr"], abs=0.5)
    first, second = (json.loads((o / "checkpoint" / "training.json").read_text())["val"] for o in (finished[1], out))
    assert second["text_loss"] == pytest.approx(first["text_loss"], rel=0.05)
    image, caption = tokun.load(out)(42)
    assert image.size == (32, 32) and caption

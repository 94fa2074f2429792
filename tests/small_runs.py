"""The smallest whole run, for the tests that train: its settings, and how it is started and compared."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
import yaml
from safetensors.torch import load_file

from tokun.config import load_config
from tokun.training.run import open_run
from tokun.training.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "data": {"max_caption_tokens": 32, "sort_window": 32},  # of four steps: the default packs thousands of samples ahead
    "text_tokenizer": {"vocab_size": 360},
    "image_tokenizer": {"image_size": 32, "channels": [16, 32], "blocks": 1, "codebook_size": 32, "latent_dim": 16},
    "image_tokenizer_train": {
        "steps": 8, "batch_size": 8, "perceptual": "none", "perceptual_weight": 0.0, "precision": "no", "gan_weight": 0.1, "gan_start": 4,
        "log_every": 1, "save_every": 2, "eval_every": 4, "min_psnr": 0.0, "min_usage": 0.0, "min_perplexity": 0.0,
    },
    "codes": {"views": 2, "batch_size": 16},
    "generator": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "dropout": 0.1},
    "train": {"steps": 8, "batch_size": 8, "precision": "no", "log_every": 1, "save_every": 2, "eval_every": 4, "sample_every": 8,
        "warmup_steps": 2},
    "sampling": {"n": 2},
    "tracking": {"kind": "none"},
}  # fmt: skip


def needs(module: str, reason: str) -> pytest.MarkDecorator:
    """For tests of an optional package that takes seconds to import: it is looked for, and imported when they run."""
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=reason)


def write_config(folder: Path, shards: Path, **changes) -> Path:
    tree = json.loads(json.dumps(SMALL)) | {"threads": 1}
    tree["data"] |= {"train": str(shards / "train-*.tar"), "val": str(shards / "val-*.tar")}
    return write_tree(folder / "small.yaml", tree, **changes)


def preference_tree(start: Path, pairs: Path, *, steps: int = 5) -> dict[str, Any]:
    """The config of a small adapter that learns preferences."""
    train = {
        "steps": steps, "batch_size": 4, "precision": "no", "lr": 0.01, "warmup_steps": 1, "weight_decay": 0.0, "log_every": 1,
        "save_every": 100,
        "eval_every": 100,
    }  # fmt: skip
    return {
        "start": str(start), "threads": 1, "tracking": {"kind": "none"}, "generator": {"dropout": 0.0},
        "adapter": {"rank": 2, "alpha": 4.0},
        "dpo": {"pairs": str(pairs), "beta": 0.5}, "train": train,
    }  # fmt: skip


def write_tree(path: Path, tree: dict[str, Any], **changes) -> Path:
    """The config `tree` as YAML, its run beside it, with `section__name=value` changed."""
    tree = json.loads(json.dumps(tree)) | {"out": str(path.parent / "run")}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable,), timeout: int = 200) -> subprocess.CompletedProcess:
    return run([*launcher, "train.py", "--config", str(config), *overrides], timeout=timeout)


def run(command: Sequence[str], timeout: int = 200) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([*command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def start_fork(said: Path, target: Callable[..., Any], *arguments: Any, **env: str) -> BaseProcess:
    """`target(*arguments)` in a process of its own: it is signalled, killed and ends as any other, but is forked from this one, since to
    import torch takes longer than what most tests do. What it says goes to the file `said`."""
    process = multiprocessing.get_context("fork").Process(target=_in_fork, args=(said, target, arguments, env))
    process.start()
    return process


def _in_fork(said: Path, target: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str]) -> None:
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115 (as long as it lives)
    warnings.resetwarnings()  # pytest's are for the code under test
    os.environ |= env
    tqdm.tqdm.set_lock(
        threading.RLock()
    )  # its own is shared with all forks: one that is killed while it writes would stop every other's bar
    if accelerate := sys.modules.get("accelerate.state"):
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)  # what earlier tests left: one process
    target(*arguments)


def take_over(source: Path, out: Path, parts: tuple[str, ...] = ("text_tokenizer", "image_tokenizer", "codes")) -> None:
    """The stages before the generator, as another run has finished them."""
    for part in parts:
        shutil.copytree(source / part, out / part)


def run_stages(config_path: Path, *overrides: str) -> Path:
    run = open_run(load_config(config_path, overrides))
    for stage in STAGES:
        stage(run)
    return run.out


def weights(out: Path) -> dict[str, torch.Tensor]:
    image = load_file(out / "image_tokenizer" / "model.safetensors")
    generator = load_file(out / "checkpoint" / "generator" / "model.safetensors")
    return {f"image.{k}": v for k, v in image.items()} | {f"generator.{k}": v for k, v in generator.items()}


def assert_same_weights(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing, differing[:5]

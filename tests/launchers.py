"""Processes as launchers start them: the real deepspeed command, and forks of this process with the environment that it gives."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.zero import free_port, worker
from tests.small_runs import ROOT, run, start_fork

ZERO1 = f"train.deepspeed={ROOT / 'configs/deepspeed/zero1.json'}"


def deepspeed(*arguments: str, processes: int) -> subprocess.CompletedProcess:
    """The real launcher, of a script with `arguments`; skips where it cannot run."""
    pytest.importorskip("deepspeed", reason="the deepspeed launcher needs the extra 'train'")
    launcher = Path(sys.executable).with_name("deepspeed")
    if torch.cuda.is_available():
        pytest.skip("this test is about machines without GPUs")
    port = free_port()
    command = (sys.executable, str(launcher), "--num_gpus", str(processes), "--master_port", str(port))
    done = run([*command, *arguments], timeout=500)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")), "66 MiB of memory a process, for good"
    assert "deepspeed_shm_comm" not in done.stdout + done.stderr, "a kernel that training never calls, compiled for a minute"
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{processes} process(es), DeepSpeed ZeRO-1" in done.stdout + done.stderr
    return done


def forked(folder: Path, processes: int, *, work: Callable[[Path], None] = worker) -> None:
    """The workers of benchmarks.zero, or others, with the environment that the launchers give."""
    for module in ("deepspeed", "torch._dynamo"):  # which take seconds to import: once, not in every fork
        importlib.import_module(module)
    world, port = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}, str(free_port())
    said = [folder / f"said-{rank}.txt" for rank in range(processes)]
    ranks = [start_fork(path, work, folder, **world, MASTER_PORT=port, RANK=str(r), LOCAL_RANK=str(r)) for r, path in enumerate(said)]
    for process in ranks:
        process.join(400)
        process.kill()
    assert all(process.exitcode == 0 for process in ranks), "".join(path.read_text()[-3000:] for path in said)

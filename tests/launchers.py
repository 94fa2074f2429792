"""Processes as launchers start them: the real deepspeed command, and forks of this process with the environment that it gives."""

import fcntl
import importlib
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
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


def in_a_terminal(command: Sequence[str], *, until: str, timeout: float = 500) -> str:
    """What a command says in a terminal of its own in which Ctrl-C is typed, a second after it has said `until`."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(theirs)
    said, typed, end = b"", False, time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    said += os.read(ours, 65536)
                except OSError:  # nobody has it open any longer
                    break
            if not typed and until.encode() in said:
                time.sleep(1)
                typed = bool(os.write(ours, b"\x03"))
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert typed and time.monotonic() < end, said.decode()
    return said.decode().replace("\r", "\n")


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

"""Simulates two machines on one: two connected network namespaces, with the launchers of a real cluster in each. Needs root and `ip`.

    sudo python -m benchmarks.two_hosts

1. torchrun on both hosts, ZeRO-2, from pictures to a checkpoint.
2. `deepspeed --no_ssh` on both, ZeRO-3, from the codes of 1; one host is lost (SIGKILL) during training. The other exits with an
   error, and the same command on it alone resumes from the last trainer state.
3. srun's environment on both (no Slurm: its variables are set by hand), DDP, from the codes of 1.

Each must end with the held-out loss of a single uninterrupted process on the same codes; the difference is printed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokun.utils import console

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {"tokun-a": "10.77.0.1", "tokun-b": "10.77.0.2"}
PORT = 29500


@contextmanager
def cable() -> Iterator[None]:
    """Two namespaces that reach only each other, over a pair of virtual interfaces named like the hosts."""
    a, b = HOSTS
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
        for host, address in HOSTS.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", host)
            for device in (host, "lo"):
                ip("-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def start(host: str, *command: str, log: Path, **env: str) -> subprocess.Popen:
    """Start a command on a host, in its own process group."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": host}
    with log.open("w") as out:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *command], cwd=ROOT, env=os.environ | own | env, stdout=out, stderr=out, start_new_session=True
        )


def torchrun(rank: int, *arguments: str) -> list[str]:
    place = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", f"--master_addr={HOSTS['tokun-a']}", f"--master_port={PORT}"]
    return [sys.executable, "-m", "torch.distributed.run", *place, "train.py", *arguments]


def deepspeed(rank: int, hostfile: Path, *arguments: str) -> list[str]:
    place = ["--no_ssh", f"--node_rank={rank}", f"--master_addr={HOSTS['tokun-a']}", f"--master_port={PORT}"]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [sys.executable, launcher, f"--hostfile={hostfile}", *place, "train.py", *arguments]


def srun(rank: int) -> dict[str, str]:
    """srun's environment for two tasks on two nodes. The node names cannot be resolved here, so the first one's address is given."""
    return {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "tokun-[a,b]", "MASTER_ADDR": HOSTS["tokun-a"],
    }  # fmt: skip


def both_end_well(processes: list[subprocess.Popen], folder: Path) -> None:
    for process in processes:
        if process.wait(timeout=900) != 0:
            kill(processes)
            raise RuntimeError("\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log"))))


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def held_out(out: Path) -> float:
    val = json.loads((out / "checkpoint" / "training.json").read_text())["val"]
    return val["image_loss"] + val["text_loss"]


def lose_a_host(processes: list[subprocess.Popen], states: Path) -> int:
    """SIGKILL all processes of the second host once there is a trainer state. Returns the other's exit status."""
    while not list(states.glob("step-????????")):
        if processes[0].poll() is not None:
            raise RuntimeError(f"it ended with {processes[0].returncode} before it saved a trainer state in {states}")
        time.sleep(0.05)
    kill(processes[1:])
    return processes[0].wait(timeout=900)


def main() -> None:
    from benchmarks.zero import make_out
    from data_tools import toy
    from tests import small_runs

    with tempfile.TemporaryDirectory() as name, cable():
        folder = Path(name)
        toy.write_shards(folder, 48, 0, 32, "train", shard_size=32)
        toy.write_shards(folder, 16, 1, 32, "val")
        config = small_runs.write_config(folder, folder, generator__dropout=0.0, train__steps=40, train__save_every=5, sampling__n=1)

        def arguments(out: str, stage: int | None) -> list[str]:
            json = f"configs/deepspeed/zero{stage}.json" if stage is not None else ""
            return ["--config", str(config), f"out={folder / out}", f"train.deepspeed={json}"]

        def on_both(commands: list[list[str]], **kind: dict[str, str]) -> list[subprocess.Popen]:
            logs = [folder / f"{host}.log" for host in HOSTS]
            return [start(host, *c, log=log, **kind.get(host, {})) for host, c, log in zip(HOSTS, commands, logs)]

        both_end_well(on_both([torchrun(rank, *arguments("torchrun", 2)) for rank in (0, 1)]), folder)
        make_out(folder / "alone", folder / "torchrun")
        alone = [sys.executable, "train.py", *arguments("alone", None)]
        both_end_well([start("tokun-a", *alone, log=folder / "alone.log")], folder)
        show("torchrun, ZeRO-2, from pictures to a checkpoint", held_out(folder / "torchrun"), held_out(folder / "alone"))

        hostfile = folder / "hosts"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in HOSTS.values()))
        make_out(folder / "lost", folder / "torchrun")
        running = on_both([deepspeed(rank, hostfile, *arguments("lost", 3)) for rank in (0, 1)])
        status = lose_a_host(running, folder / "lost" / "state" / "generator")
        again = [sys.executable, "train.py", *arguments("lost", None)]
        both_end_well([start("tokun-a", *again, log=folder / "again.log")], folder)
        resumed = [line for line in (folder / "again.log").read_text().splitlines() if "resuming" in line]
        print(f"a host was lost: the other ended with status {status}; alone: {resumed[0]}")
        show("deepspeed --no_ssh, ZeRO-3, a host lost, resumed alone", held_out(folder / "lost"), held_out(folder / "alone"))

        make_out(folder / "srun", folder / "torchrun")
        command = [sys.executable, "train.py", *arguments("srun", None)]
        both_end_well(on_both([command, command], **{host: srun(rank) for rank, host in enumerate(HOSTS)}), folder)
        show("srun's environment, DDP", held_out(folder / "srun"), held_out(folder / "alone"))


def show(what: str, found: float, expected: float) -> None:
    print(f"{what}: held-out loss {found:.6f}, one process {expected:.6f}, difference {abs(found - expected):.1e}", flush=True)


if __name__ == "__main__":
    console.run("benchmarks/two_hosts.py", main)

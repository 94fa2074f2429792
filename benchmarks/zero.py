"""Does ZeRO leave the training unchanged, and does it partition memory as promised? Loss curves and bytes per process, on CPUs.

    python -m benchmarks.zero                          DDP and every JSON of configs/deepspeed, 1 and 2 processes, 50 steps each
    python -m benchmarks.zero --steps 20 --hidden 64   faster

Trains the generator from the codes of a toy run, float32, no dropout, once in a plain process (the reference), then
under the real `deepspeed` launcher with one process and with two. Prints the largest difference of the losses, and the memory of
parameters, float32 master copies, gradients and moments in one process, by storage.

With `launch`, the same worker trains several `Case`s in one launch for tests/test_launch.py, there in processes forked from the test's.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokun.utils import console

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("text_tokenizer", "image_tokenizer", "codes")


@dataclasses.dataclass
class Case:
    """One training of the generator within a launch."""

    name: str
    config: str  # a YAML file
    out: str  # its own folder; holds the PARTS of an earlier run
    deepspeed: str = ""  # a JSON file; empty: DDP
    stop_at: int = 0  # request a stop, as SIGTERM does, after this step has been logged; 0: never
    spikes: tuple[int, ...] = ()  # steps whose gradient is treated as a spike
    overrides: tuple[str, ...] = ()


def make_out(out: Path, source: Path) -> str:
    """Make a run's folder that continues from the codes of another run."""
    out.mkdir(parents=True)
    for part in PARTS:
        (out / part).symlink_to((source / part).resolve())
    return str(out)


def launch(
    cases: Sequence[Case], folder: Path, *, processes: int, start: Callable[[Path, int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Train the cases, one after the other, in `processes` started by the deepspeed launcher, or by `start(folder, processes)`, which must
    run `worker(folder)` in each. Returns the results of `train_case` by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    (start or by_deepspeed)(folder, processes)
    return json.loads((folder / "results.json").read_text())


def by_deepspeed(folder: Path, processes: int, *, timeout: float = 600) -> None:
    """Run the worker under the real launcher. Raises RuntimeError with its output if it fails."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        sys.executable,
        str(launcher),
        "--num_gpus",
        str(processes),
        "--master_port",
        str(free_port()),
        "--module",
        "benchmarks.zero",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, "--worker", str(folder)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"the launcher ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_case(case: Case) -> dict[str, Any]:
    """Train the last stage of a case (the generator, preferences or words) in this process and its peers. Returns `losses` and `held_out`
    (by step), `bytes` (of this process, by kind), `skipped` (spikes), `stopped`, and `said`: a description of the engine."""
    from tokun.config import load_config
    from tokun.training.health import Preempted
    from tokun.training.run import open_run
    from tokun.training.stages import stages_of

    overrides = [f"out={case.out}", f"train.deepspeed={case.deepspeed}", *case.overrides]
    run = open_run(load_config(case.config, overrides), deepspeed=bool(case.deepspeed))
    watch = Watch(run, case)
    stopped = False
    try:
        with watch:
            stages_of(run.config)[-1](run)
    except Preempted:
        stopped = True
    run.close()
    gc.collect()
    noted = {name: getattr(watch, name) for name in ("losses", "held_out", "bytes", "skipped", "said")}
    return noted | {"stopped": stopped}


class Watch:
    """Wraps a training: records each loss, measures the engine's tensors when it has gradients, requests the stop, simulates spikes."""

    def __init__(self, run: Any, case: Case):
        self.run, self.case = run, case
        self.losses: dict[str, float] = {}
        self.held_out: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.said, self.skipped = "", 0
        self._log = run.tracker.log
        run.tracker.log = self.note

    def note(self, metrics: dict[str, float], *, step: int) -> None:
        if "train/loss" in metrics:
            self.losses[str(step)] = float(metrics["train/loss"])
            self.skipped = int(metrics["train/skipped_spikes"])
            if step == self.case.stop_at:
                self.run.stop.asked = True
        if "val/image_loss" in metrics:
            self.held_out[str(step)] = float(metrics["val/image_loss"] + metrics["val/text_loss"])
        self._log(metrics, step=step)

    def __enter__(self) -> None:
        from tokun.training import health
        from tokun.training.engine import Engine

        self._make, self._is_spike, self._rate = Engine.make, health.Spikes.is_spike, health.matmul_rate
        health.matmul_rate = lambda *_: 1.0  # utilisation is not needed here

        def make(*args: Any, **options: Any) -> Any:
            engine = self._make(*args, **options)
            self.said, norm = str(engine), engine.norm

            def weigh_and_norm() -> float:
                if len(self.losses) == 1:  # the optimizer has its moments after the first step
                    self.bytes = weigh(engine)
                return norm()

            engine.norm = weigh_and_norm
            return engine

        def is_spike(spikes: Any, norm: float) -> bool:
            spikes.norms.append(norm)  # saved with the run: the number of steps so far
            spikes.count += len(spikes.norms) in self.case.spikes
            return len(spikes.norms) in self.case.spikes

        Engine.make, health.Spikes.is_spike = staticmethod(make), is_spike

    def __exit__(self, *_: object) -> None:
        from tokun.training import health
        from tokun.training.engine import Engine

        Engine.make, health.Spikes.is_spike, health.matmul_rate = staticmethod(self._make), self._is_spike, self._rate


def weigh(engine: Any) -> dict[str, int]:
    """Bytes of this process's parameters, master copies, gradients and moments between backward pass and step. Each storage counts only
    once, in the first of these; communication buckets do not count."""
    zero = getattr(engine, "zero", None)
    stage = getattr(engine, "stage", 0)
    inner = zero.optimizer if stage else getattr(engine.optimizer, "optimizer", engine.optimizer)
    parameters = list(engine.plain.parameters())
    kinds: dict[str, Iterator[Tensor]] = {
        "parameters": (getattr(p, "ds_tensor", p) for p in parameters),
        "master": iter(zero.flat_weights() if stage else ()),
        "gradients": gradients(parameters, zero.zero if stage else None),
        "moments": (m for state in inner.state.values() for m in state.values() if torch.is_tensor(m) and m.ndim),
    }
    seen: set[int] = set()
    return {kind: sum(new_bytes(tensor, seen) for tensor in tensors) for kind, tensors in kinds.items()}


def gradients(parameters: Sequence[Tensor], zero: Any) -> Iterator[Tensor]:
    yield from (p.grad for p in parameters if p.grad is not None)
    for group in getattr(zero, "averaged_gradients", {}).values():
        yield from (g for g in group or () if g is not None)
    for flat in getattr(zero, "single_partition_of_fp32_groups", None) or getattr(zero, "fp32_partitioned_groups_flat", ()):
        if flat.grad is not None:  # offloaded gradients are there
            yield flat.grad


def new_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


def worker(folder: Path) -> None:
    from tokun.training import engine

    engine.start_processes()
    results = {case["name"]: train_case(Case(**case)) for case in json.loads((folder / "cases.json").read_text())}
    engine.wait_for_processes()
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "results.json").write_text(json.dumps(results))
    engine.end_processes()


def largest_difference(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of two loss curves over their common steps."""
    return max(abs(one[step] - other[step]) for step in one.keys() & other.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=128, help="width of the generator (%(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), steps=args.steps, hidden=args.hidden)


def measure(folder: Path, *, steps: int, hidden: int) -> None:
    from data_tools import toy
    from tests import small_runs

    toy.write_shards(folder, 96, 0, 32, "train", shard_size=32)
    toy.write_shards(folder, 16, 1, 32, "val")
    quiet = {f"train__{every}_every": 10**6 for every in ("save", "eval", "sample")}
    config = small_runs.write_config(
        folder, folder, generator__dropout=0.0, generator__hidden_size=hidden, train__steps=steps, sampling__n=0, **quiet
    )
    source = small_runs.run_stages(config)
    plain = train_case(Case("plain", str(config), make_out(folder / "plain", source)))
    print(f"{'':>24}{'largest difference':>20}{'parameters':>12}{'master':>10}{'gradients':>11}{'moments':>10}   MB in process 0")
    show("plain, 1 process", plain, plain)
    names = ("", "zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
    for processes in (1, 2):
        cases = [
            Case(
                name,
                str(config),
                make_out(folder / f"{processes}-{name}", source),
                str(ROOT / f"configs/deepspeed/{name}.json") if name else "",
            )
            for name in names[processes == 1 :]
        ]
        for name, result in launch(cases, folder / f"{processes}", processes=processes).items():
            show(f"{name or 'DDP'}, {processes} process(es)", result, plain)


def show(name: str, result: dict[str, Any], plain: dict[str, Any]) -> None:
    b = {kind: size / 1e6 for kind, size in result["bytes"].items()}
    print(
        f"{name:>24}{largest_difference(result['losses'], plain['losses']):>20.1e}"
        f"{b['parameters']:>12.2f}{b['master']:>10.2f}{b['gradients']:>11.2f}{b['moments']:>10.2f}",
        flush=True,
    )


if __name__ == "__main__":
    console.run("benchmarks/zero.py", main)

"""Speed of this checkout and of another one, in turns: sampling, a step of both trained stages, preparing pictures.

    git worktree add ../before SOME_COMMIT
    python benchmarks/beside.py sampling --beside ../before --checkpoint ../before/tokun/bundled/engraving --samples 16
    python benchmarks/beside.py image_tokenizer,generator --beside ../before --config ../before/configs/tiny.yaml train.compile=false
    python benchmarks/beside.py prepare --beside ../before --pictures my_pictures/

Each checkout works in its own process (`prepare`: one a turn) and does the same: one call of `sample`, one training step of the real stage,
paused at its prefetcher with a few batches that it gets again and again, one run of `data_tools.prepare`. They take turns, so that other
load on the machine affects both. Printed are medians of seconds by the clock and of processor time, and the median of the ratios within a
turn with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tokun.utils import console

ROOT = Path(__file__).resolve().parents[1]
BATCHES = 8
WARM_UP = 2  # turns that are not counted
STAGES = ("image_tokenizer", "generator")  # in the order in which a run calls the prefetcher
SMALL = ("out={out}", "tracking.kind=none", "threads={threads}", "image_tokenizer_train.min_psnr=0", "image_tokenizer_train.min_usage=0",
         "image_tokenizer_train.min_perplexity=0", "sampling.n=0", "train.steps=100000")  # fmt: skip
TURNS = """
import json, sys, time
def turns():
    began = None
    while True:
        if began is not None:
            print("TURN", json.dumps([time.perf_counter() - began[0], time.process_time() - began[1]]), flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        began = time.perf_counter(), time.process_time()
        yield
"""
SAMPLING = """
import torch, tokun
torch.set_num_threads(int(sys.argv[1]))
model = tokun.load(sys.argv[2], device="cpu")
model.sample(0, int(sys.argv[3]))
for seed, _ in enumerate(turns(), 1):
    model.sample(seed, int(sys.argv[3]))
"""
STAGE = """
from tokun import data
prefetch, before = data.prefetch, [int(sys.argv[1])]
def held(make, start, **options):
    if before[0]:
        before[0] -= 1
        yield from prefetch(make, start, **options)
        return
    batches = [make(step) for step in range(int(sys.argv[2]))]
    for step, _ in enumerate(turns()):
        yield batches[step % len(batches)]
data.prefetch = held
import train
train.main(sys.argv[3:])
"""


def environment(checkout: Path) -> dict[str, str]:
    """Of a process of this checkout; modules are compiled once."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(checkout), "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Side:
    """A checkout that works in a process of its own, a turn whenever it is asked for one."""

    def __init__(self, checkout: Path, script: str, *arguments: str):
        command = [sys.executable, "-c", TURNS + script, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(checkout), cwd=checkout
        )

    def __call__(self) -> tuple[float, float]:
        """Seconds of a turn by the clock, and of processor time."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("TURN"):
                clock, processor = json.loads(line[5:])
                return clock, processor
        raise SystemExit("a process ended; its output is above")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Preparing:
    """Runs of `data_tools.prepare`, each into a folder of its own."""

    def __init__(self, checkout: Path, pictures: Path, folder: Path):
        self.checkout, self.pictures, self.folder, self.runs = checkout, pictures, folder, 0

    def __call__(self) -> tuple[float, float]:
        self.runs += 1
        options = ["--out", str(self.folder / str(self.runs)), "--style", "engraving", "--workers", "1"]
        command = [sys.executable, "-m", "data_tools.prepare", str(self.pictures), *options]
        began, spent = time.perf_counter(), children()
        subprocess.run(command, cwd=self.checkout, env=environment(self.checkout), stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - began, children() - spent

    def close(self) -> None:
        pass


def children() -> float:
    """Processor seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def side(what: str, checkout: Path, folder: Path, args: argparse.Namespace) -> Side | Preparing:
    if what == "sampling":
        return Side(checkout, SAMPLING, str(args.threads), str(args.checkpoint.resolve()), str(args.samples))
    if what == "prepare":
        return Preparing(checkout, args.pictures.resolve(), folder)
    settings = [setting.format(out=folder, threads=args.threads) for setting in SMALL]
    settings += ["image_tokenizer_train.steps=2"] if what == "generator" else []
    ours = args.ours if checkout == ROOT else []
    arguments = ["--config", str(args.config.resolve()), *settings, *args.overrides, *ours]
    return Side(checkout, STAGE, str(STAGES.index(what)), str(BATCHES), *arguments)


def compare(what: str, ours: Callable[[], tuple[float, float]], other: Callable[[], tuple[float, float]], turns: int) -> None:
    found: list[tuple[Sequence[float], Sequence[float]]] = []
    for number in range(WARM_UP + turns):
        if number % 2:
            mine, its = ours(), other()
        else:
            its, mine = other(), ours()
        found.append((mine, its))
    found = found[WARM_UP:]
    for name, of in (("this checkout", 0), ("the other one", 1)):
        clock, processor = (statistics.median(turn[of][k] for turn in found) for k in (0, 1))
        print(f"{what}: {name}: {clock:.3f} s a turn, {processor:.3f} s of processor time")
    for name, k in (("clock", 0), ("processor time", 1)):
        low, middle, high = statistics.quantiles([its[k] / mine[k] for mine, its in found], n=4)
        print(
            f"{what}: by {name} this checkout is {middle:.3f} times as fast (quartiles {low:.3f} to {high:.3f}, {len(found)} turns)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="sampling, image_tokenizer, generator, prepare, or several with a comma between them")
    parser.add_argument("--beside", required=True, type=Path, help="another checkout of tokun")
    parser.add_argument("--turns", type=int, default=20, help="turns to measure, after two warm-up turns (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="sampling: a folder that both can load")
    parser.add_argument("--samples", type=int, default=16, help="sampling: pairs a turn")
    parser.add_argument("--pictures", type=Path, help="prepare: a folder of pictures, each with a text beside it")
    parser.add_argument("--config", type=Path, help="the stages: a config that both know, with its pictures (data.train or data.toy)")
    parser.add_argument("--ours", action="append", default=[], metavar="a.b=c", help="a setting only for this checkout; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings for both")
    args = parser.parse_intermixed_args()
    for what in args.what.split(","):
        if what not in ("sampling", "prepare", *STAGES):
            raise console.UserError(f"{what!r} cannot be compared; choose sampling, prepare, {', '.join(STAGES)}")
        with tempfile.TemporaryDirectory() as folder:
            sides = [
                side(what, checkout, Path(folder) / name, args) for checkout, name in ((ROOT, "ours"), (args.beside.resolve(), "other"))
            ]
            compare(what, *sides, args.turns)
            for one in sides:
                one.close()


if __name__ == "__main__":
    console.run("benchmarks/beside.py", main)

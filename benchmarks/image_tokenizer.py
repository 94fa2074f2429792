"""The image tokenizer's training step in this checkout and in another one, in turns.

    git worktree add ../before SOME_COMMIT
    python benchmarks/image_tokenizer.py --beside ../before --config configs/engraving-cpu.yaml --ours image_tokenizer_train.compile=true \\
        data.train='shards/train-*.tar' image_tokenizer.image_size=128 image_tokenizer_train.perceptual_weights=squeezenet1_1.safetensors

Each runs the real stage (`train_image_tokenizer`) in its own process, paused before each step, so that other load on the machine affects
both. Both get the same few batches repeatedly, so reading pictures is not counted. Prints medians of seconds by the clock and of processor
time, the median of the ratios within a turn with its quartiles, and both losses over the same steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokun.utils import console

BATCHES = 8
HELD = """
import json, sys, time
import torch
sys.path.insert(0, sys.argv[1])
from tokun import config, data
from tokun.models import losses
from tokun.training import loop
from tokun.training.image_tokenizer import train_image_tokenizer
from tokun.training.run import open_run
losses_seen = []
require = loop.require_finite
def watch(run, value, *args, **kwargs):
    if not kwargs:
        losses_seen.append(float(value.detach()))
    return require(run, value, *args, **kwargs)
loop.require_finite = watch
def held(make, start, **options):
    batches, began = [make(step) for step in range(int(sys.argv[2]))], None
    for step in range(10**9):
        now = (time.perf_counter(), time.process_time())
        if began is not None:
            print("STEP", json.dumps([a - b for a, b in zip(now, began)] + losses_seen[-1:]), flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        began = (time.perf_counter(), time.process_time())
        yield batches[step % len(batches)]
data.prefetch = held
train_image_tokenizer(open_run(config.load_config(sys.argv[3], sys.argv[4:])))
"""


class Side:
    """One checkout's stage in a process, paused before each step."""

    def __init__(self, checkout: Path, config: Path, overrides: Sequence[str], out: str):
        command = [sys.executable, "-c", HELD, str(checkout), str(BATCHES), str(config), *overrides, f"out={out}", "tracking.kind=none"]
        environment = os.environ | {"PYTHONPATH": str(checkout), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout)

    def step(self) -> tuple[float, float, float]:
        """Seconds by the clock, seconds of processor time, loss."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP"):
                return tuple(json.loads(line[5:]))
        raise SystemExit("a training process ended; its output is above")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", required=True, type=Path, help="another checkout of tokun")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=30, help="turns to measure, after three warm-up turns (%(default)s)")
    parser.add_argument("--ours", action="append", default=[], metavar="a.b=c", help="a setting only for this checkout; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings for both")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = Side(Path(__file__).resolve().parents[1], args.config.resolve(), [*args.overrides, *args.ours], f"{folder}/ours")
        other = Side(args.beside.resolve(), args.config.resolve(), args.overrides, f"{folder}/other")
        turns = [(ours.step(), other.step()) for _ in range(3 + args.steps)][3:]
        ours.close()
        other.close()
    for name, side in (("this checkout", 0), (str(args.beside), 1)):
        clock, processor = (statistics.median(turn[side][k] for turn in turns) for k in (0, 1))
        print(
            f"{name}: {clock:.3f} s a step, {processor:.3f} s of processor time; loss {turns[0][side][2]:.4f} -> {turns[-1][side][2]:.4f}"
        )
    for name, k in (("clock", 0), ("processor time", 1)):
        low, middle, high = statistics.quantiles([turn[1][k] / turn[0][k] for turn in turns], n=4)
        print(f"{name}: this checkout is {middle:.2f} times as fast (quartiles {low:.2f} to {high:.2f}, {len(turns)} turns)")


if __name__ == "__main__":
    console.run("benchmarks/image_tokenizer.py", main)

"""Kills (SIGKILL) a small run at random moments, restarts it, and compares with an uninterrupted run: are the final weights the same?

    python benchmarks/kills.py --times 20
    python benchmarks/kills.py --times 20 --seed 1 --out KILLS train.loss_chunk=64      # other moments, other settings

The run is the real `train.py` in its own process: text tokenizer, image tokenizer with its discriminator, code shards, generator, on
pictures drawn by code; float32, one thread. The kills are distributed over the four stages in turn: the files on disk show which stage
is running, and it is killed at a moment uniform over the time that the stage took in the uninterrupted run. A run is killed twice in
each stage, in order, then finishes and is compared, and the next one begins. Prints each kill, the state on disk after it, and the
number of kills per stage by that state (a stage may be over before its kill), and exits with status 1 if any weight differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_tools import toy  # noqa: E402
from tokun.utils import console  # noqa: E402
from tokun.utils.checkpoint import TrainerStates  # noqa: E402

SETTINGS = {
    "threads": 1,
    "data": {"max_caption_tokens": 32, "sort_window": 64},
    "text_tokenizer": {"vocab_size": 360},
    "image_tokenizer": {"image_size": 32, "channels": [16, 32], "blocks": 1, "codebook_size": 32, "latent_dim": 16},
    "image_tokenizer_train": {
        "steps": 80, "batch_size": 8, "perceptual": "none", "perceptual_weight": 0.0, "precision": "no", "gan_weight": 0.1, "gan_start": 40,
        "save_every": 5, "eval_every": 40, "min_psnr": 0.0, "min_usage": 0.0, "min_perplexity": 0.0,
    },
    "codes": {"views": 2, "batch_size": 16},
    "generator": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "dropout": 0.1},
    "train": {"steps": 80, "batch_size": 8, "precision": "no", "save_every": 5, "eval_every": 20, "sample_every": 1000, "keep_best": 1},
    "sampling": {"n": 0},
    "tracking": {"kind": "none"},
}  # fmt: skip
STAGES = ("text tokenizer", "image tokenizer", "codes", "generator")
ORDER = ("start", *STAGES, "finished")
PER_STAGE = 2  # kills per stage of a run
POLL = 0.01  # seconds between two checks of the disk
WEIGHTS = ("image_tokenizer/model.safetensors", "checkpoint/generator/model.safetensors")


def start(config: Path, out: Path, overrides: list[str]) -> subprocess.Popen:
    """Start the run in its own process, with its output in `out`.log."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), f"out={out}", *overrides]
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, out: Path) -> None:
    if process.wait():
        raise RuntimeError(f"train.py ended with status {process.returncode}:\n{Path(f'{out}.log').read_text()[-3000:]}")


def stage_of(out: Path) -> str:
    """The current stage of a run, by its files on disk: one of ORDER."""
    ends = ("config.yaml", "text_tokenizer/stage.json", "image_tokenizer/stage.json", "codes/codes.json", "checkpoint/training.json")
    done = [(out / end).is_file() for end in ends]
    return ORDER[(*done, False).index(False)]


def stopped_at(out: Path) -> str:
    """The stage of a stopped run, and the trainer state that it would resume from."""
    stage = stage_of(out)
    if stage not in ("image tokenizer", "generator"):
        return stage
    return f"{stage}, state {TrainerStates(out / 'state' / stage.replace(' ', '_')).latest()}"


def timed_stages(process: subprocess.Popen, out: Path) -> dict[str, float]:
    """Seconds that each stage of an uninterrupted run takes."""
    seconds, before = Counter[str](), time.monotonic()
    while process.poll() is None:
        time.sleep(POLL)
        stage, now = stage_of(out), time.monotonic()
        seconds[stage] += now - before
        before = now
    finish(process, out)
    return seconds


def changed(out: Path) -> int:
    """The last time of a change in the folder; a starting run creates a file there before its first stage."""
    return out.stat().st_mtime_ns if out.is_dir() else 0


def killed_in(stage: str, after: float, config: Path, out: Path, overrides: list[str]) -> bool:
    """Start the run, and kill it `after` seconds after it was seen in that stage or a later one. False if it has finished by then."""
    before, process = changed(out), start(config, out, overrides)
    while process.poll() is None and (changed(out) == before or ORDER.index(stage_of(out)) < ORDER.index(stage)):
        time.sleep(POLL)
    try:
        process.wait(after)
        finish(process, out)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def half_written(out: Path) -> list[str]:
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*.partial"))


def differing(one: Path, other: Path) -> list[str]:
    """Weight files with different bytes."""
    return [name for name in WEIGHTS if (one / name).read_bytes() != (other / name).read_bytes()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, help="an empty folder; default: a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args(argv)
    folder = args.out or Path(tempfile.mkdtemp(prefix="tokun-kills-"))
    toy.write_shards(folder / "shards", 64, 0, 32, "train")
    toy.write_shards(folder / "shards", 32, 1, 32, "val")
    tree = SETTINGS | {"data": SETTINGS["data"] | {split: str(folder / "shards" / f"{split}-*.tar") for split in ("train", "val")}}
    config = folder / "kills.yaml"
    config.write_text(yaml.safe_dump(tree))

    took = timed_stages(start(config, folder / "alone", args.overrides), folder / "alone")
    print("left alone: " + ", ".join(f"{stage} {took[stage]:.1f} s" for stage in STAGES), flush=True)
    rng, kills, runs, bad, where = random.Random(args.seed), 0, 0, [], Counter[str]()
    while kills < args.times or runs == 0:
        out = folder / f"killed-{runs}"
        dealt = [STAGES[i % len(STAGES)] for i in range(min(PER_STAGE * len(STAGES), args.times - kills))]
        for stage in sorted(dealt, key=STAGES.index):
            after = rng.uniform(0, took[stage])
            if not killed_in(stage, after, config, out, args.overrides):
                break
            kills += 1
            where[stage_of(out)] += 1
            print(
                f"kill {kills:3}, {after:5.2f} s into {stage}: {stopped_at(out)}; half written: "
                f"{', '.join(half_written(out)) or 'nothing'}",
                flush=True,
            )
        finish(start(config, out, args.overrides), out)
        others = differing(folder / "alone", out)
        left = half_written(out)
        bad += others
        runs += 1
        print(
            f"run {runs} is finished: {'DIFFERENT ' + str(others) if others else 'the same weights'}; left over: "
            f"{', '.join(left) or 'nothing'}"
        )
    print(
        f"{kills} kills ({', '.join(f'{n} in {name}' for name, n in where.items())}) in {runs} run(s): "
        f"{'DIFFERENT' if bad else 'the same'} weights"
    )
    if not args.out:
        shutil.rmtree(folder)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    console.run("benchmarks/kills.py", main)

"""A small run, killed (SIGKILL) at random moments and started again, beside the same run left alone: are the final weights the same?

    python benchmarks/kills.py --times 20
    python benchmarks/kills.py --times 20 --seed 1 --out KILLS train.loss_chunk=64      # other moments, other settings

The run is the real `train.py` in a process of its own: text tokenizer, image tokenizer with its discriminator, code shards, generator,
on pictures drawn by code; float32, one thread. It is killed at moments that are even over the time that the run left alone takes (or a
shorter one that a later start took); a run that is finished by then counts no kill, is compared, and another one begins. Prints each
kill and what lay on the disk behind it, and ends with status 1 if one weight differs.
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
from tokun.checkpoint import TrainerStates, read_record  # noqa: E402

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
WEIGHTS = ("image_tokenizer/model.safetensors", "checkpoint/generator/model.safetensors")


def start(config: Path, out: Path, overrides: list[str]) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), f"out={out}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, seconds: float | None = None) -> None:
    """Raises subprocess.TimeoutExpired where the run is not finished after so many seconds."""
    said, _ = process.communicate(timeout=seconds)
    if process.returncode:
        raise RuntimeError(f"train.py ended with status {process.returncode}:\n{said[-3000:]}")


def standing(out: Path) -> str:
    """Where a run is, by what lies on its disk."""
    if (out / "checkpoint" / "training.json").is_file():
        return "finished"
    if read_record(out / "codes" / "codes.json") is not None:
        return f"generator, state {TrainerStates(out / 'state' / 'generator').latest()}"
    if read_record(out / "image_tokenizer" / "stage.json") is not None:
        return "codes"
    if read_record(out / "text_tokenizer" / "stage.json") is not None:
        return f"image tokenizer, state {TrainerStates(out / 'state' / 'image_tokenizer').latest()}"
    return "text tokenizer"


def half_written(out: Path) -> list[str]:
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*.partial"))


def differing(one: Path, other: Path) -> list[str]:
    """Files of weights that are not the same bytes."""
    return [name for name in WEIGHTS if (one / name).read_bytes() != (other / name).read_bytes()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="an empty folder; none: a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args(argv)
    folder = args.out or Path(tempfile.mkdtemp(prefix="tokun-kills-"))
    toy.write_shards(folder / "shards", 64, 0, 32, "train")
    toy.write_shards(folder / "shards", 32, 1, 32, "val")
    tree = SETTINGS | {"data": SETTINGS["data"] | {split: str(folder / "shards" / f"{split}-*.tar") for split in ("train", "val")}}
    config = folder / "kills.yaml"
    config.write_text(yaml.safe_dump(tree))

    began = time.monotonic()
    finish(start(config, folder / "alone", args.overrides))
    whole = time.monotonic() - began
    print(f"left alone: {whole:.1f} s", flush=True)
    rng, kills, runs, bad, where = random.Random(args.seed), 0, 0, [], Counter[str]()
    while kills < args.times or runs == 0:
        out = folder / f"killed-{runs}"
        while True:
            process, began = start(config, out, args.overrides), time.monotonic()
            after = rng.uniform(0, whole) if kills < args.times else None
            try:
                finish(process, after)
                whole = min(whole, time.monotonic() - began)  # the machine may have had more to do before
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            kills += 1
            where[standing(out).partition(",")[0]] += 1
            print(f"kill {kills:3} after {after:5.1f} s: {standing(out)}; half written: {', '.join(half_written(out)) or 'nothing'}", flush=True)
        others = differing(folder / "alone", out)
        left = half_written(out)
        bad += others
        runs += 1
        print(f"run {runs} is finished: {'DIFFERENT ' + str(others) if others else 'the same weights'}; left over: {', '.join(left) or 'nothing'}")
    print(f"{kills} kills ({', '.join(f'{n} in {name}' for name, n in where.items())}) in {runs} run(s): {'DIFFERENT' if bad else 'the same'} weights")
    if not args.out:
        shutil.rmtree(folder)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

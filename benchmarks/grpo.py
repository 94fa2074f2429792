"""GRPO for some minutes on any checkpoint, and its results: rewards and judges before and after, variety, copies, entropy, time by phase.

    python benchmarks/grpo.py --minutes 60 --judge runs/clip_judge --out runs/grpo-60
    python benchmarks/grpo.py --start runs/mine --minutes 10 --copies-of 'shards/train-*.tar' grpo.kl=0.05 'grpo.rewards=[{kind: pmi}]' …
    python benchmarks/grpo.py … --vary grpo.easy=0.95 --vary grpo.similar=1.0 --vary grpo.scale=none     one run per change, and one without

Settings are those of configs/grpo.yaml and the arguments after the options (a.b=c). The judge is the folder of a CLIP that is not a reward
(benchmarks/clip_judge.py): how often it ranks the own caption first of sixteen. The same command resumes a killed run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from tokun.align.grpo import train_grpo
from tokun.config import load_config
from tokun.evaluate.figures import number
from tokun.training.run import open_run
from tokun.utils import checkpoint, console

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "grpo.yaml"
TOLD = "figures.jsonl"  # one line per step
MEANS = {
    "rollout, share of a step": "time/rollout_share", "scoring, share of a step": "time/scoring_share", "seconds a step": "time/step",
    "tokens a second of rollout": "time/rollout_tokens_per_second", "tokens a second of learning": "time/learning_tokens_per_second",
    "clipped tokens": "train/clipped", "groups that are all alike": "train/idle_groups",
}  # fmt: skip
LAST = {
    "KL to the start, nats a token": "train/kl", "entropy of codes": "train/entropy_image", "entropy of words": "train/entropy_text",
    "entropy kept of the start's": "train/entropy_kept",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="bundled", help="the checkpoint (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each run (%(default)s)")
    parser.add_argument("--judge", action="append", default=[], help="the folder of a CLIP that is not optimised; may be repeated")
    parser.add_argument("--copies-of", default="", help="image shards to search for near copies")
    parser.add_argument("--features", default="", help="weights of SqueezeNet 1.1, for diversity")
    parser.add_argument("--vary", action="append", default=[], metavar="a.b=c", help="an additional run with this change")
    parser.add_argument("--out", type=Path, default=Path("runs/grpo-benchmark"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args(argv)
    judges = json.dumps([{"kind": "clip_first", "of": folder} for folder in args.judge])
    common = [
        f"start={args.start}", "tracking.kind=none", f"train.max_minutes={args.minutes}", "train.steps=1000000", f"grpo.judges={judges}",
        f"grpo.copies_of={args.copies_of}", f"grpo.features={args.features}", *args.overrides,
    ]  # fmt: skip
    columns = {}
    for change in ["", *args.vary]:
        out = args.out / (re.sub(r"[^\w.-]+", "-", change) or "as-it-is")
        columns[change or "as it is"] = column(out, run(out, [*common, *([change] if change else [])]))
    text = table(columns)
    checkpoint.write_text(args.out / "table.md", text + "\n")
    print(text)


def run(out: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Train or resume; returns the figures of all steps."""
    job = open_run(load_config(CONFIG, [*overrides, f"out={out}"]))
    log = job.tracker.log

    def note(metrics: dict[str, float], *, step: int) -> None:
        with (out / TOLD).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{name: float(value) for name, value in metrics.items()}}) + "\n")
        log(metrics, step=step)

    job.tracker.log = note
    try:
        train_grpo(job)
    finally:
        job.close()
    told = {(row["step"], "train/kl" in row): row for row in map(json.loads, (out / TOLD).read_text().splitlines())}
    return [row for (_, is_step), row in sorted(told.items()) if is_step]


def column(out: Path, steps: list[dict[str, float]]) -> dict[str, str]:
    """One run's figures as text."""
    report = json.loads((out / "real" / "report.json").read_text())
    found = {"verdict": report["verdict"].removeprefix("Verdict: "), "rollouts": str(len(steps))}
    for kind, rows in (("reward", report["rewards"]), ("judge", report["judges"])):
        for name, row in rows.items():
            found[f"{kind} {name}"] = (
                f"{number(row['before'])} -> {number(row['after'])} ({row['low']:+.3g} to {row['high']:+.3g}, n {row['n']})"
            )
    for name, values in report["sets"].items():
        if values["before"] is not None:
            found[name.replace("_", " ")] = f"{number(values['before'])} -> {number(values['after'])}"
    found |= {what: number(float(np.mean([step[name] for step in steps]))) for what, name in MEANS.items()}
    return found | {what: number(steps[-1][name]) for what, name in LAST.items()}


def table(columns: dict[str, dict[str, Any]]) -> str:
    """Markdown, a column for each run."""
    names = list(dict.fromkeys(name for found in columns.values() for name in found))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(found.get(name, "") for found in columns.values()) + " |" for name in names)])


if __name__ == "__main__":
    console.run("benchmarks/grpo.py", main)

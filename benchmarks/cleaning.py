"""Does prepare keep exactly the usable engravings? Compared with pictures labelled by hand.

    python benchmarks/cleaning.py --shared ../shared --labels benchmarks/labels.tsv

Runs `python -m data_tools.prepare` with its defaults on each raw book, and on a folder of the labelled pairs from the shards, and
reads the manifests: kept pictures count as judged usable, rejected and ambiguous ones do not. Prints precision and recall with
95 % intervals (Wilson, "Probable inference", JASA 1927), and the errors by reason and by name. `--random 600` also prints how many
of 600 random pairs from the shards, nearly all good, are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from tokun.utils import console
from tokun.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SET = "# set:"  # begins a section of the labels
SHARDS = ("engravings", "engravings-128")


@dataclass(frozen=True)
class Label:
    """One line of the labels: `path` is raw-books/NUMBER/FILE or FOLDER/SHARD#KEY within shared/data; `set` is its section."""

    path: str
    usable: bool
    kind: str
    note: str
    set: str


@dataclass(frozen=True)
class Verdict:
    """One picture's result in the manifest."""

    status: str
    reason: str
    caption: str


def read_labels(path: Path) -> list[Label]:
    """Raises UserError for a line without four columns or a label that is neither 0 nor 1, and for a path given twice."""
    labels: dict[str, Label] = {}
    part = "all"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            part = line.removeprefix(SET).strip() if line.startswith(SET) else part
            continue
        cells = line.split("\t")
        if len(cells) != 4 or cells[1] not in ("0", "1") or cells[0] in labels:
            raise UserError(f"{path}, line {number}: {line!r} must be a new path, 0 or 1, kind and note, separated by tabs")
        labels[cells[0]] = Label(cells[0], cells[1] == "1", cells[2], cells[3], part)
    return list(labels.values())


def prepare(source: Path, out: Path) -> dict[str, Verdict]:
    """Run prepare and read its manifest: {path within the source: verdict}."""
    options = ["--style", "engraving", "--val", "0", "--workers", "1"]  # no validation split, whose similarity check does not matter here
    command = [sys.executable, "-m", "data_tools.prepare", str(source.resolve()), "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2 or not (out / "manifest.parquet").is_file():
        raise RuntimeError(f"prepare failed on {source}: {done.stderr[-2000:]}")
    rows = pq.read_table(out / "manifest.parquet", columns=["path", "status", "reason", "caption"]).to_pylist()
    return {row["path"]: Verdict(row["status"], row["reason"] or "", row["caption"] or "") for row in rows}


def judge_books(data: Path, numbers: set[str], out: Path) -> dict[str, Verdict]:
    verdicts = {}
    for number in sorted(numbers):
        for path, verdict in prepare(data / "raw-books" / number, out / number).items():
            verdicts[f"raw-books/{number}/{path}"] = verdict
    return verdicts


def judge_pairs(data: Path, paths: list[str], out: Path) -> dict[str, Verdict]:
    """Prepare a folder with the pairs, each picture with its JSON."""
    source, wanted = out / "pairs", defaultdict(set)
    source.mkdir(parents=True)
    for path in paths:
        shard, _, key = path.partition("#")
        wanted[shard].add(key)
    for shard, keys in wanted.items():
        with tarfile.open(data / shard) as tar:
            for member in tar:
                if member.name.partition(".")[0] in keys:
                    (source / member.name).write_bytes(tar.extractfile(member).read())
    found = prepare(source, out / "pairs-out")
    return {path: found[f"{path.partition('#')[2]}.webp"] for path in paths}


def random_pairs(data: Path, count: int, seed: int) -> list[str]:
    paths = []
    for folder in SHARDS:
        for shard in sorted((data / folder).glob("*.tar")):
            with tarfile.open(shard) as tar:
                paths += [f"{folder}/{shard.name}#{name.partition('.')[0]}" for name in tar.getnames() if name.endswith(".webp")]
    return sorted(random.Random(seed).sample(paths, count))


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    if not total:
        return 0.0, 1.0
    share, square = hits / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def shown(name: str, hits: int, total: int) -> str:
    low, high = wilson(hits, total)
    return f"{name:<24} {hits / max(1, total):.3f}   95 % {low:.3f} to {high:.3f}   ({hits} of {total})"


def figures(labels: list[Label], verdicts: dict[str, Verdict]) -> dict[str, int]:
    kept = {label.path for label in labels if verdicts[label.path].status == "kept"}
    usable = {label.path for label in labels if label.usable}
    return {"pictures": len(labels), "usable": len(usable), "kept": len(kept), "both": len(kept & usable)}


def print_figures(name: str, labels: list[Label], verdicts: dict[str, Verdict]) -> None:
    made = figures(labels, verdicts)
    print(f"{name}: {made['pictures']} pictures, {made['usable']} of them usable")
    print("  " + shown("precision", made["both"], made["kept"]))
    print("  " + shown("recall", made["both"], made["usable"]))


def print_wrong(labels: list[Label], verdicts: dict[str, Verdict]) -> None:
    kept = [label for label in labels if verdicts[label.path].status == "kept" and not label.usable]
    lost = [label for label in labels if verdicts[label.path].status != "kept" and label.usable]
    print(f"\nkept and not usable: {len(kept)}, by kind: {dict(Counter(label.kind for label in kept))}")
    for label in kept:
        print(f"  {label.path}  {label.kind}  {label.note}  “{verdicts[label.path].caption[:60]}”")
    reasons = Counter(f"{verdicts[label.path].status}: {verdicts[label.path].reason.partition(' of ')[0]}" for label in lost)
    print(f"usable and not kept: {len(lost)}, by reason: {dict(reasons)}")
    for label in lost:
        verdict = verdicts[label.path]
        print(f"  {label.path}  {verdict.status}: {verdict.reason}  “{verdict.caption[:60]}”")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--labels", type=Path, default=ROOT / "benchmarks" / "labels.tsv")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="also prepare N random pairs of the shards")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    data, labels = args.shared / "data", read_labels(args.labels)
    books = [label for label in labels if label.path.startswith("raw-books/")]
    pairs = [label for label in labels if "#" in label.path]
    with tempfile.TemporaryDirectory() as folder:
        verdicts = judge_books(data, {label.path.split("/")[1] for label in books}, Path(folder))
        verdicts |= judge_pairs(data, [label.path for label in pairs], Path(folder) / "labelled")
        drawn = random_pairs(data, args.random, seed=1)
        others = judge_pairs(data, drawn, Path(folder) / "random") if drawn else {}
    if unlabelled := sorted(path for path in verdicts if path not in {label.path for label in labels}):
        print(f"without a label, not counted: {', '.join(unlabelled)}")
    parts = {name: [label for label in labels if label.set == name] for name in dict.fromkeys(label.set for label in labels)}
    parts["all"] = labels
    for name, part in parts.items():
        print_figures(name, part, verdicts)
    print_wrong(labels, verdicts)
    if others:
        left_out = Counter(f"{one.status}: {one.reason.partition(' of ')[0]}" for one in others.values() if one.status != "kept")
        print("\n" + shown("kept of random pairs", len(others) - left_out.total(), len(others)))
        print("  " + ", ".join(f"{reason} {count}" for reason, count in left_out.most_common()))
    if args.out:
        args.out.write_text(json.dumps({name: figures(part, verdicts) for name, part in parts.items()}, indent=1) + "\n")


if __name__ == "__main__":
    console.run("benchmarks/cleaning.py", main)

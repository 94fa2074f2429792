"""Drawings from descriptions, under a byte limit, scored as in a competition ("Drawing with LLMs", Kaggle 2025).

    tokun drawings --descriptions held-out.txt --vqa google/paligemma2-3b-mix-448 --aesthetic head.safetensors --out report
    tokun drawings … --checkpoint runs/grpo --against runs/mine --best-of 8 --reward svg --max-bytes 10000

Each description is drawn (the best of --best-of by --reward, which is not a judge), written as SVG, rendered at 384 px, and slightly
perturbed before it is judged: a crop, JPEG. Scores: P(yes) for the description, or P of the right answers in a table of questions; the
aesthetic score divided by ten; and F-beta of both with beta 0.5. A judge that is not named gives no score. The report also has the likeness
of drawing and picture, and the bytes; with --against, the same for another checkpoint, and the paired differences. The competition's
questions and judge settings were hidden, so scores are not comparable.

    descriptions    a text file with one per line, image shards, or a TSV with the columns description, question, answer (yes or no)
    OUT             table.md, figures.json, NAME/000000.svg …; a killed run keeps finished drawings
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

import tokun
from tokun.align import drawing_rewards, perturb, rewards
from tokun.align.rollouts import texts_of
from tokun.evaluate import figures
from tokun.evaluate.figures import Figure
from tokun.evaluate.judges import AESTHETIC_CLIP, BETA, Aesthetic, Own, Vqa, f_beta
from tokun.inference import bulk
from tokun.inference.conditional_generation import require_task
from tokun.render.svg import LEAST_BYTES, rendered, to_svg
from tokun.tokenizers.wordings import SHOWS
from tokun.utils import checkpoint, console
from tokun.utils.csv_rows import read_rows
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from tokun.inference.model import Tokun

SIDE = 384  # px at which drawings are judged
ANSWERS = ("yes", "no")
OWN = "own"


@dataclass(frozen=True)
class Described:
    """A description to draw, and the questions about it."""

    text: str
    asked: tuple[tuple[str, str], ...]  # question, yes or no


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    checkpoint.require_writable(args.out, option="--out")
    described = read(args.descriptions, args.n)
    judges = Judges(args)
    found = {name: judged(Path(name).name or "model", which, described, judges, args) for name, which in named(args)}
    rooms = {name: summary(scores, args.seed) for name, scores in found.items()}
    if len(found) == 2:
        new, old = found.values()
        rooms["difference"] = [
            figures.mean(key, [a - b for a, b in zip(new[key], old[key])], note="paired over descriptions", seed=args.seed)
            for key in new
            if key in old
        ]
    text = figures.table(rooms)
    checkpoint.write_text(args.out / "table.md", text + "\n")
    asked = {name: str(value) for name, value in vars(args).items()}
    kept = {room: [figures.as_dict(figure) for figure in some] for room, some in rooms.items()}
    checkpoint.write_record(args.out / "figures.json", {"asked": asked, "figures": kept, "scores": found})
    print(text)


def named(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """(name in the table, checkpoint) of each model."""
    models = [(args.checkpoint or "bundled", args.checkpoint)]
    return models + ([(args.against, args.against)] if args.against else [])


class Judges:
    """The judges named on the command line."""

    def __init__(self, args: argparse.Namespace):
        device = args.device or "cpu"
        start = start_of(args) if args.vqa == OWN else None
        self.vqa = Own(start) if start else Vqa(args.vqa, device=device) if args.vqa else None
        self.own = bulk.identity(start)["generator"] if start else ""  # which model answers
        self.aesthetic = Aesthetic(args.aesthetic, args.clip or AESTHETIC_CLIP, device=device) if args.aesthetic else None

    def __call__(self, image: Image.Image, described: Described) -> dict[str, float]:
        out: dict[str, float] = {}
        if self.vqa is not None:
            yes = self.vqa.yes([image] * len(described.asked), [question for question, _ in described.asked])
            out["right answers"] = float(np.mean([p if answer == "yes" else 1 - p for p, (_, answer) in zip(yes, described.asked)]))
        if self.aesthetic is not None:
            out["aesthetic"] = self.aesthetic.score([image])[0] / 10
        if len(out) == 2:
            out["F-beta"] = f_beta(out["right answers"], max(0.0, out["aesthetic"]), BETA)
        return out


def start_of(args: argparse.Namespace) -> Tokun:
    """The model that --vqa own asks: --against, else --checkpoint, so that both are judged by the one that was not trained."""
    _, which = named(args)[-1]
    return tokun.load(which, device=args.device)


def judged(
    name: str, which: str | None, described: Sequence[Described], judges: Judges, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Scores by name, one per description. Results of the same model and settings in the folder are reused."""
    model = tokun.load(which, device=args.device)
    require_task(model, "text_to_image")
    folder = args.out / name
    checkpoint.require_writable(folder, option="--out")
    asked = {
        **bulk.identity(model),
        **{key: str(getattr(args, key)) for key in ("seed", "best_of", "reward", "max_bytes", "vqa", "aesthetic", "clip")},
        **({"vqa_generator": judges.own} if judges.own else {}),
    }
    if (there := checkpoint.read_record(folder / "asked.json")) is not None:
        checkpoint.require_same(folder, there, json.loads(json.dumps(asked)), option="--out")
    checkpoint.write_record(folder / "asked.json", asked)
    reward = dataclasses.replace(rewards.parse(args.reward), max_bytes=args.max_bytes)
    (score,) = rewards.make([reward], model, "--reward")
    found: list[dict[str, float]] = []
    for number, one in enumerate(tqdm(described, desc=name, unit="drawing")):
        kept = folder / f"{number:06d}.json"
        record = checkpoint.read_record(kept)
        about = {"description": one.text, "questions": [list(asked) for asked in one.asked]}
        if record is None or any(record[key] != value for key, value in about.items()):
            record = {**about, **drawn(model, one, score, judges, folder / f"{number:06d}.svg", args)}
            checkpoint.write_record(kept, record)
        found.append(record["scores"])
    return {key: [scores[key] for scores in found] for key in found[0]}


def drawn(model: Tokun, one: Described, score: rewards.Checked, judges: Judges, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Draw a description, write the SVG, and judge its rendering."""
    (pair,) = model.best_of(args.seed, 1, args.best_of, score=score, prompt=one.text)
    text = to_svg(pair.image, args.max_bytes)
    checkpoint.write_text(path, text)
    shown = rendered(text, SIDE)
    (changed,) = perturb.changer(["crop", "jpeg"], args.seed)([dataclasses.replace(pair, image=shown)])
    scores = judges(changed.image, one)
    scores |= {"likeness": drawing_rewards.likeness(pair.image, shown), "kilobytes": len(text.encode()) / 1000}
    return {"scores": scores, "index": pair.index}


def summary(scores: dict[str, list[float]], seed: int) -> list[Figure]:
    return [figures.mean(name, values, better="less" if name == "kilobytes" else "more", seed=seed) for name, values in scores.items()]


def read(source: str, n: int = 0) -> list[Described]:
    """The first n descriptions (0: all). Raises UserError for an empty file, a broken table, and a question without an answer."""
    if not source.endswith(".tsv"):
        return [Described(text, ((SHOWS.format(text), "yes"),)) for text in texts_of(source, "--descriptions")][: n or None]
    asked: dict[str, list[tuple[str, str]]] = {}
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 ({error}). Save it as UTF-8") from error
    rows = read_rows(io.StringIO(text, newline=""), source, separator="\t")
    _, columns = next(rows, (1, []))
    if missing := {"description", "question", "answer"} - set(columns):
        raise UserError(f"{source} has no column {', '.join(sorted(missing))}; it needs description, question, answer")
    for line, cells in rows:
        if len(cells) != len(columns):
            raise UserError(
                f"{source}, line {line}: {len(cells)} fields where the header has {len(columns)}. "
                "Give every row all fields, separated by tabs"
            )
        row = dict(zip(columns, cells))
        question, answer = row["question"].strip(), row["answer"].strip().lower()
        if not question or answer not in ANSWERS:
            raise UserError(f"{source}, line {line}: question {question!r} has the answer {answer!r}; it must be yes or no")
        asked.setdefault(row["description"], []).append((question, answer))
    if not asked:
        raise UserError(f"{source} holds no question")
    return [Described(text, tuple(some)) for text, some in asked.items()][: n or None]


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.align.drawings", __doc__)
    add = parser.add_argument
    add("--checkpoint", default=None, help="a folder or a Hub id; default: the bundled model")
    add("--against", default="", help="another one to compare with, such as the start of a training; bundled for the bundled model")
    add("--descriptions", required=True, help="a text file, image shards, or a TSV of questions")
    add("--n", type=int, default=0, help="use the first N descriptions (0: all)")
    add("--max-bytes", type=int, default=10_000, help="limit of an SVG (%(default)s)")
    add("--best-of", type=int, default=1, help="candidates for each description (%(default)s)")
    add(
        "--reward",
        default="svg",
        help="reward that chooses among them: a kind of tokun/align/rewards.py, KIND=MODEL, or module:function (%(default)s)",
    )
    add(
        "--vqa",
        default="",
        help=f"a judge that answers questions: a transformers id or folder, or {OWN}: the model of --against itself, or of --checkpoint",
    )
    add("--aesthetic", default="", help="a judge: the file of an aesthetic head")
    add("--clip", default="", help="the CLIP model of that head (default: its own)")
    add("--seed", type=int, default=42, help="of the drawings")
    add("--device", default=None, help="cpu, cuda, cuda:1 …; default: a GPU if there is one")
    add("--out", type=console.home_path, default=Path("outputs/drawings"), help="the folder of the report and the drawings")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.max_bytes < LEAST_BYTES:
        parser.error(f"--max-bytes {args.max_bytes} is too low: a picture takes at least {LEAST_BYTES} bytes")
    if args.against and Path(args.against).name == Path(args.checkpoint or "bundled").name:
        parser.error("--against and --checkpoint end in the same name, so they would share a folder in --out: rename one")
    return args


if __name__ == "__main__":
    console.run("tokun.align.drawings", main)

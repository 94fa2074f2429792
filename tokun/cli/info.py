"""What a checkpoint is, in about ten lines: sizes, shapes, tags, tasks, defaults, figures of its card.

    tokun info                      the bundled model
    tokun info runs/mine            a checkpoint, a run's folder, an adapter
    tokun info name/model --json    of the Hugging Face Hub; everything, for programs

Reads the folder's JSON files and its card, and no weights.
"""

from __future__ import annotations

import argparse
import json

from tokun.inference.description import describe
from tokun.utils import console


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    found = describe(args.checkpoint)
    print(json.dumps(found.record(), ensure_ascii=False, indent=1) if args.json else "\n".join(found.lines()))


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.cli.info", __doc__)
    parser.add_argument(
        "checkpoint", nargs="?", default=None, metavar="CHECKPOINT",
        help="the folder of a checkpoint, a run or an adapter, or a Hugging Face Hub id; default: the bundled model",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything as JSON: all tags, all figures")
    return parser


if __name__ == "__main__":
    console.run("tokun info", main)

"""Commands for adapters: describe one, or merge it with its base into one checkpoint.

tokun adapters show runs/mine-lora
tokun adapters merge bundled runs/mine-lora --out merged      sample.py --checkpoint merged draws the same samples
"""

from __future__ import annotations

import argparse

from tokun.inference import adapters
from tokun.inference.load import load
from tokun.utils import console
from tokun.utils.console import home_path


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.adapters", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("show", help="describe an adapter")
    merging = commands.add_parser("merge", help="merge the adapter into its base and write an ordinary checkpoint")
    merging.add_argument("base", help="a checkpoint's folder or Hub id, or bundled")
    for command in (shown, merging):
        command.add_argument("adapter", help="the adapter's folder, its run's folder, or a Hub id")
    merging.add_argument("--out", type=home_path, required=True, help="a new folder")
    merging.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of the saved weights (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.command == "show":
        print(adapters.described(adapters.read(args.adapter)))
        return
    model = load(args.base, device="cpu", adapter=args.adapter)
    target = model.save_pretrained(args.out, dtype=args.dtype)
    print(f"{args.base} with {model.adapter}: {target}")


if __name__ == "__main__":
    console.run("tokun.adapters", main)

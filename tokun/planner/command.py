"""The command: options, the printed plan, and a measured step to compare with it."""

from __future__ import annotations

import argparse

import torch

from tokun.config import Config, load_config
from tokun.planner.gpus import GPUS, taken_as
from tokun.planner.measure import measure_memory
from tokun.planner.memory import planned_memory
from tokun.planner.plan import make_plan
from tokun.training.adapters import starts_from_base
from tokun.utils import console
from tokun.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan's options, for train.py and for this module."""
    add = parser.add_argument_group("plan").add_argument
    add("--gpu", default="H100", help=f"one of {', '.join(GPUS)} (%(default)s)")
    add("--gpus", type=int, default=1, help="how many (%(default)s)")
    add("--samples", type=int, default=0, help="training pairs; 0: counted in the shards, if they exist")
    add(
        "--caption-tokens", type=float, default=0.0,
        help="mean length of a caption; 0: measured on the run's shards, else half of the longest",
    )  # fmt: skip
    add("--mfu", type=float, default=0.4, help="share of the peak FLOPs reached (%(default)s)")
    add("--disk", type=float, default=2e9, help="bytes per second when writing trainer states (%(default)s)")
    add(
        "--measure", type=int, default=0, metavar="N",
        help="also run a real training step of N samples on this machine, and compare its memory",
    )  # fmt: skip
    add("--restart", type=float, default=600.0, help="seconds from a failure to the next step (%(default)s)")


def main_plan(config: Config, args: argparse.Namespace) -> None:
    """Print the plan of a config with the options of `add_arguments`, and with --measure the memory of a real step.

    Raises UserError for a training that it cannot plan.
    """
    if starts_from_base(config):
        raise UserError(
            "--plan covers only the training of a whole model on pictures: "
            "its formulas know neither adapters nor the drawing and scoring of rewards. "
            "Set adapter.rank=0 and leave dpo.pairs, words.train and grpo.rewards empty"
        )
    options = {name: getattr(args, name) for name in ("gpu", "gpus", "samples", "caption_tokens", "mfu", "disk", "restart")}
    plan = make_plan(config, **options)
    if note := taken_as(args.gpu):
        print(note)
    print(plan)
    if args.measure:
        real = measure_memory(config, micro=args.measure)
        on = "cuda" if torch.cuda.is_available() else "cpu"
        planned = planned_memory(config, micro=args.measure, gpu=on == "cuda")
        print(f"\nmeasured here ({on}), one step of {args.measure} samples:")
        for term, size in real.items():
            print(f"  {term:<17}{size / 2**20:12,.1f} MiB, planned {planned[term] / 2**20:12,.1f} MiB ({planned[term] / size - 1:+.1%})")


def make_parser() -> argparse.ArgumentParser:
    from tokun import planner

    parser = console.make_parser("python -m tokun.planner", planner.__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, for example configs/ladder/1.3b.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's, for example train.micro_batch_size=4"
    )
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    main_plan(load_config(args.config, args.overrides), args)

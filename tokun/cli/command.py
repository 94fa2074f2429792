"""`tokun COMMAND …`: finds the command, imports its module and calls it."""

from __future__ import annotations

import argparse
import difflib
import sys
from importlib import import_module

import tokun
from tokun.cli.commands import COMMANDS
from tokun.utils import console
from tokun.utils.errors import UserError

ABOUT = """One seed, one sequence: a picture in an art style and the caption that describes it, from one model.

    tokun sample --seed 42 --n 16                          sixteen pairs of the bundled model
    tokun prepare my_pictures/ --style engraving --out shards/
    tokun train --config finetune start=bundled data.train='shards/train-*.tar' data.val='shards/val-*.tar' out=runs/mine
    tokun info runs/mine
"""
MORE = """`tokun COMMAND --help` lists a command's options and their defaults. Completion in the shell: tokun completion --help.
TOKUN_TRACEBACK=1 shows the traceback of an error that is otherwise told on one line."""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status; its own --help and mistakes in its options exit at once."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0].startswith("-"):
        make_parser().parse_args(arguments or ["--help"])  # --help and --version exit, anything else is an error
        raise UserError("name a command: tokun --help lists them")
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean tokun {near[0]}? " if near else ""
        raise UserError(f"there is no command {name!r}: {hint}tokun --help lists {', '.join(COMMANDS)}")
    typed = f"tokun {name}"
    with console.typed_as(typed):
        if COMMANDS[name].parser and {"-h", "--help"} & set(rest):
            import_module(COMMANDS[name].parser).parse(rest)  # prints the help and exits, without the module that does the work
        module = import_module(COMMANDS[name].module)
        return console.status(typed, lambda: module.main(rest))


def make_parser() -> argparse.ArgumentParser:
    """The parser of `tokun` itself: its commands by name and line, not their options."""
    parser = console.make_parser("tokun", ABOUT, epilog=MORE)
    parser.add_argument("--version", action="version", version=f"tokun {tokun.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.about, add_help=False)
    return parser


def script() -> None:
    """What the console script `tokun` calls."""
    console.run("tokun", main)

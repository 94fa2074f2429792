"""Print the script that completes `tokun` in a shell: commands, options, their choices, files.

    tokun completion bash > ~/.local/share/bash-completion/completions/tokun
    tokun completion zsh > ~/.zfunc/_tokun                 ~/.zshrc: fpath+=~/.zfunc; autoload -U compinit; compinit
    tokun completion fish > ~/.config/fish/completions/tokun.fish
    tokun completion tcsh > ~/.tokun.tcsh                  ~/.tcshrc: source ~/.tokun.tcsh

The script, made by shtab, is text that runs without Python. Write it again after an update.
"""

from __future__ import annotations

import argparse
from importlib import import_module

import shtab

from tokun.cli.commands import COMMANDS
from tokun.utils import console

SHELLS = ("bash", "zsh", "fish", "tcsh")
PLACES = ("checkpoint", "adapter", "config", "source")  # arguments that may name a file or folder, besides those of the type of a path


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    print(shtab.complete(whole_parser(), args.shell))


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.cli.completion", __doc__)
    parser.add_argument("shell", choices=SHELLS, help="of which shell")
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """The parser of `tokun` with the options of every command; of one whose extra is not installed, the name alone."""
    parser = argparse.ArgumentParser(prog="tokun", description="one seed, one sequence")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command")
    for name, command in COMMANDS.items():
        try:
            own = [import_module(command.parser or command.module).make_parser()]
        except ImportError:
            own = []
        made = commands.add_parser(name, help=command.about, parents=own, add_help=not own)
        complete_files(made)
    return parser


def complete_files(parser: argparse.ArgumentParser) -> None:
    """Have arguments that name a file or folder completed by the shell's own."""
    for action in parser._actions:  # noqa: SLF001  argparse has no public list of a parser's arguments
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for own in action.choices.values():
                complete_files(own)
        elif action.choices is None and (action.type in (console.home_path, console.home_text) or action.dest in PLACES):
            action.complete = shtab.FILE  # type: ignore[attr-defined]


if __name__ == "__main__":
    console.run("tokun completion", main)

"""How a command reads its arguments and exits: a user's mistake prints one line, anything else a traceback. Knows no command."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tokun.utils import launcher
from tokun.utils.errors import UserError, is_mistake

_TYPED: ContextVar[str] = ContextVar("typed", default="")
_STOPPED: list[str] = []


@contextmanager
def typed_as(name: str) -> Iterator[None]:
    """Within the block, parsers of `make_parser` are called `name`, such as "tokun prepare"."""
    token = _TYPED.set(name)
    try:
        yield
    finally:
        _TYPED.reset(token)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves line breaks of the description alone and shows every default that says something:
    no None, no empty text, no flag that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        silent = action.default in (None, "", False, argparse.SUPPRESS) or action.default == [] or action.nargs == 0
        optional = bool(action.option_strings) or action.nargs in (argparse.OPTIONAL, argparse.ZERO_OR_MORE)
        if silent or not optional or told == argparse.SUPPRESS or "%(default)" in told or _names(told, action.default):
            return action.help
        return f"{told} (%(default)s)".strip()


def _names(told: str, default: object) -> bool:
    """Whether the help names its default in its own words: in brackets, such as (0.3) or (yes)."""
    return f"({default})" in told or (default is True and "(yes)" in told)


class Parser(argparse.ArgumentParser):
    """A parser that suggests quotes if words follow an option's value."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        found, left = self.parse_known_args(arguments, namespace)
        if left:
            told = f"unrecognized arguments: {' '.join(left)}"
            if unquoted := self.unquoted(arguments, left):
                self.exit(
                    2, f"{self.prog}: error: {told}. If the value of {unquoted[0]} has spaces, put quotes around it: {' '.join(unquoted)}\n"
                )
            self.error(told)
        return found

    def unquoted(self, arguments: Sequence[str], left: Sequence[str]) -> tuple[str, str] | None:
        """The option whose value is followed by further words, and the quoted value, or '…' if its end is unclear."""
        options = set(self.options_of_text())
        for at, typed in enumerate(arguments):
            name, joined, value = typed.partition("=")
            named = {name} & options or {one for one in options if len(name) > 2 and one.startswith(name)}
            words = list(itertools.takewhile(lambda one: not one.startswith("-"), arguments[at + 1 :]))
            value, *more = [value, *words] if joined else words or [""]
            if len(named) == 1 and set(more) & set(left):
                return named.pop(), shlex.quote(" ".join([value, *more])) if set(more) <= set(left) else "'…'"
        return None

    def options_of_text(self) -> Iterator[str]:
        """The long options that take one text, which may have spaces; those of subcommands too."""
        for action in self._actions:
            if isinstance(action.choices, Mapping):
                for one in action.choices.values():
                    yield from one.options_of_text() if isinstance(one, Parser) else ()
            elif action.nargs is None and action.choices is None and _may_have_spaces(action.type):
                yield from (one for one in action.option_strings if one.startswith("--"))


def _may_have_spaces(kind: object) -> bool:
    try:
        return not callable(kind) or kind("a b") is not None
    except (argparse.ArgumentTypeError, TypeError, ValueError):  # such as a number's
        return False


def make_parser(name: str, about: str | None, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """A command's parser. `name`: as it is typed without the `tokun` command, such as "python -m data_tools.prepare"."""
    return Parser(prog=_TYPED.get() or name, description=about, epilog=epilog, formatter_class=HelpFormatter)


def typed_path(path: object) -> str:
    """A path as it is typed to mean this path, not quoted: ./ in front of what would be an option, or a home folder."""
    return f"./{path}" if str(path)[:1] in ("-", "~") else str(path)


def home_path(text: str) -> Path:
    """A path as typed, with a leading ~ expanded: the shell does not expand it after an =."""
    return Path(os.path.expanduser(text))  # unlike Path.expanduser, leaves ~name of no user as it is


def home_text(text: str) -> str:
    """As `home_path`, for text that may also be an address such as s3://…, which `Path` would change."""
    return os.path.expanduser(text)


def status(name: str, main: Callable[[], object]) -> int:
    """Call `main` and return its exit status: its result if that is a number, else 0.

    A mistake prints one line `name: …` to stderr and gives status 2; Ctrl-C does the same with status 130. With TOKUN_TRACEBACK set,
    both are raised. A reader of the output that has gone gives 141, without a word. Any other exception is a bug and propagates.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # a path that is not UTF-8 is printed as it is
    try:
        found = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        if os.environ.get("TOKUN_TRACEBACK"):
            raise
        end(
            f"\n{name}: stopped by Ctrl-C. Finished shards and batches and saved states are kept; the same command resumes after them and "
            "redoes only the unfinished part"
        )
        return 130
    except (UserError, OSError) as error:
        if os.environ.get("TOKUN_TRACEBACK") or not is_mistake(error):
            raise
        if isinstance(error, BrokenPipeError) and hasattr(select, "poll") and _nobody_reads():
            return 128 + 13  # as SIGPIPE ends other programs
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return found if isinstance(found, int) else 0


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone, as `head` does. What is printed from then on goes nowhere."""
    try:
        place = sys.stdout.fileno()
    except (OSError, ValueError):  # no file
        return False
    asked = select.poll()
    asked.register(place)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, place)
    os.close(nowhere)
    return True


def end(text: str) -> None:
    """Tell that the command was stopped, as its last line on the terminal. Of several processes of a launcher the first one does."""
    _STOPPED.append(text)
    if not int(os.environ.get("RANK", 0)):
        launcher.say_last(text)


def run(name: str, main: Callable[[], object]) -> None:
    """Run `main` and exit with its status if that is not 0. What is printed after `end` is not shown."""
    _STOPPED.clear()
    code = status(name, main)
    if _STOPPED:
        launcher.hush()
    if code:
        sys.exit(code)

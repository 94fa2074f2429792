"""What the site makes when it is built: the pages of commands, config keys, measurements and the model card. A hook of MkDocs (mkdocs.yml).

Commands are read from their own argparse parsers, config keys from the dataclasses of tokun/config.py and the comments beside them. The
pages of the repository hold both, too: `python docs/_site.py` writes them there, and a test compares. The two others are pages of the
repository that lie elsewhere.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import itertools
import re
import runpy
import sys
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "tokun" / "bundled" / "engraving"
MORE = ("python -m tokun.evaluate.viewer",)  # commands that `tokun` does not have
SHOWN_AS = {"benchmarks/README.md": "results/measurements.md", "tokun/bundled/engraving/README.md": "results/model-card.md"}


# --- parsers of commands ----------------------------------------------------------------------------------------------


class _Reached(BaseException):
    """Raised in the place of parsing, or after it. No Exception, so that no command mistakes it for one of its own."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@contextlib.contextmanager
def _parsing(instead: Callable[..., Any]) -> Iterator[None]:
    """Within the block, every parser parses by `instead`."""
    names = ("parse_args", "parse_known_args", "parse_intermixed_args")
    kept = {name: getattr(argparse.ArgumentParser, name) for name in names}
    for name in names:
        setattr(argparse.ArgumentParser, name, instead)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(argparse.ArgumentParser, name, method)


def start(words: Sequence[str]) -> None:
    """Start a command in this process, as the shell would: ["python", "-m", "data_tools.prepare", …] or ["python", "sample.py", …]."""
    what, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    kept, sys.argv = sys.argv, [what, *arguments]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module is imported already
            if words[1] == "-m":
                runpy.run_module(what, run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / what), run_name="__main__")
    finally:
        sys.argv = kept


def files_of(words: Sequence[str]) -> list[Path]:
    """The file that a command starts, or all of its package; none if it is not there."""
    path = ROOT.joinpath(*words[2].split(".")) if words[1] == "-m" else ROOT / words[1]
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path if path.suffix else path.with_suffix(".py")]
    return [file for file in found if file.is_file()]


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command of this repository. Raises LookupError for one that parses nothing, which is not started."""
    words = command.split()
    files = files_of(words)
    if not files or (files[0].is_relative_to(ROOT / "benchmarks") and "parser" not in files[0].read_text(encoding="utf-8")):
        raise LookupError(f"{command} parses no arguments")

    def reached(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Reached(parser)

    try:
        with _parsing(reached):
            start(words)
    except _Reached as found:
        return found.parser
    raise LookupError(f"{command} parses no arguments")


def parser_of_tokun(name: str) -> argparse.ArgumentParser:
    """The parser of `tokun NAME`."""
    from tokun.cli.commands import COMMANDS
    from tokun.utils import console

    with console.typed_as(f"tokun {name}"):
        return import_module(COMMANDS[name].parser or COMMANDS[name].module).make_parser()


@functools.cache
def commands() -> str:
    """The page of commands, in Markdown."""
    from tokun.cli.commands import COMMANDS

    lines = []
    for name, command in COMMANDS.items():
        script = import_module(command.parser or command.module).make_parser().prog
        also = [f"The same as `{script}`.", ""] if script.startswith("python") and "tokun.cli" not in script else []
        lines.append(_command(f"tokun {name}", parser_of_tokun(name), level=2, about=also))
    return "\n".join([*lines, *(_command(name, parser_of(name), level=2) for name in MORE)])


def _command(name: str, parser: argparse.ArgumentParser, *, level: int, about: Sequence[str] = ()) -> str:
    lines = [f"{'#' * level} `{name}`", "", *about, *_description(parser.description or "")]
    for group in parser._action_groups:  # argparse has no public list of them
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        options = [action for action in actions if not isinstance(action, argparse._SubParsersAction)]
        if options:
            named = group.title if group.title not in ("positional arguments", "options", "optional arguments") else ""
            lines += [*([f"**{named}**", ""] if named else []), *_options(parser, options), ""]
        for action in actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, below in action.choices.items():
                    lines.append(_command(f"{name} {word}", below, level=level + 1))
    if parser.epilog:
        lines += [_text(parser.epilog), ""]
    return "\n".join(lines)


def _description(text: str) -> list[str]:
    """Paragraphs as text; what is laid out by hand (examples), as it stands."""
    lines: list[str] = []
    for laid_out, blocks in itertools.groupby(text.strip().split("\n\n"), key=lambda block: bool(re.search(r"(?m)^ {2,}\S", block))):
        if laid_out:
            lines += ["```text", textwrap.dedent("\n\n".join(blocks)).strip("\n"), "```", ""]
        else:
            lines += [line for block in blocks for line in (_text(" ".join(block.split())), "")]
    return lines


def _options(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> list[str]:
    formatter = parser._get_formatter()
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for action in actions:
        value = formatter._metavar_formatter(action, action.dest.upper())(1)[0] if action.nargs != 0 else ""
        named = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{value}`"
        if action.option_strings and value and not isinstance(action, argparse.BooleanOptionalAction):
            named += f" {_text(value)}"
        told = formatter._expand_help(action) if action.help else ""
        if isinstance(action, argparse.BooleanOptionalAction):
            told = re.sub(r" \(default: \w+\)$", "", told)  # Python 3.10 adds it
        default = "" if isinstance(action, argparse._StoreFalseAction) else _default(action.default)
        rows.append(f"| {named} | {default} | {_text(' '.join(told.split()))} |")
    return rows


def _default(value: object) -> str:
    if value is None or value == "" or value == argparse.SUPPRESS or value is False or value == []:
        return ""
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "yes" if value is True else str(value)
    return f"`{shown}`"


def _text(told: str) -> str:
    """Plain text as Markdown that shows it, also inside a table. What stands in backticks is code already."""
    parts = re.split(r"(`[^`]+`)", told)
    return "".join(part if part.startswith("`") and len(part) > 1 else re.sub(r"([\\*_{}\[\]<>#|])", r"\\\1", part) for part in parts)


# --- config keys ------------------------------------------------------------------------------------------------------


def config_keys(path: Path = ROOT / "tokun" / "config.py") -> dict[str, list[tuple[str, str, str, str]]]:
    """{class: [(key, type, default, meaning)]} of the dataclasses in config.py; the meaning is the comment beside a field or above it."""
    source = path.read_text(encoding="utf-8")
    told = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# ---")
    }
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        last = node.lineno
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                lines = range(last + 1, (field.end_lineno or field.lineno) + 1)
                meaning = " ".join(told[line] for line in lines if line in told)
                found.setdefault(node.name, []).append((field.target.id, _type(field.annotation), _value(field.value), meaning))
            last = field.end_lineno or last
    return found


def _type(annotation: ast.expr) -> str:
    name = ast.unparse(annotation)
    if match := re.fullmatch(r"Literal\[(.*)\]", name):
        return " or ".join(f"`{word}`" for word in re.findall(r"'([^']*)'", match[1]))
    plain = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Fit": "`auto`, `pad` or `crop`"}
    plain |= {
        "list[str]": "list of texts",
        "list[int]": "list of whole numbers",
        "list[float]": "two numbers",
        "dict[str, float]": "shares by name",
    }
    return plain.get(name, name.replace("str | None", "text").replace("float | None", "number").replace("|", "or"))


def _value(node: ast.expr | None) -> str:
    if isinstance(node, ast.Call):  # field(default_factory=…)
        factory = next((word.value for word in node.keywords if word.arg == "default_factory"), None)
        node = (
            factory.body
            if isinstance(factory, ast.Lambda)
            else ast.List([])
            if isinstance(factory, ast.Name) and factory.id == "list"
            else factory
        )
    if node is None or isinstance(node, ast.Name):
        return ""
    value = ast.literal_eval(node)
    shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown or 'empty'}`" if shown else "empty"


def config_page() -> str:
    """The page of config keys, in Markdown."""
    from tokun import config

    keys = config_keys()
    top = [row for row in keys["Config"] if not row[1].endswith("Config")]
    sections = {name: kind for name, kind, _, _ in keys["Config"] if kind.endswith("Config")}
    lines = ["## Top level", "", *_keys("", top)]
    for name, kind in sections.items():
        about = _docstring(getattr(config, kind))
        lines += [f"## {name}", "", *([about, ""] if about else []), *_keys(f"{name}.", keys[kind])]
    lines += ["## An entry of grpo.rewards and grpo.judges", "", _docstring(config.RewardConfig), "", *_keys("", keys["RewardConfig"])]
    return "\n".join(lines)


def _docstring(kind: type) -> str:
    text = kind.__dict__.get("__doc__") or ""
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.split())


def _keys(prefix: str, rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    body = [
        f"| `{prefix}{name}` | {kind.replace('|', 'or')} | {default.replace('|', 'or')} | {_text(meaning)} |"
        for name, kind, default, meaning in rows
    ]
    return ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *body, ""]


# --- pages that lie elsewhere -----------------------------------------------------------------------------------------


def measurements() -> str:
    """benchmarks/README.md without its title."""
    return _nested((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").partition("\n")[2])


def model_card() -> str:
    """The bundled model's card without front matter and title."""
    text = (CARD / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\A---\n.*?\n---\n\s*# [^\n]*\n", "", text, flags=re.DOTALL)


def _nested(text: str) -> str:
    """What stands inside a list item of "- " lies four spaces in, as Python-Markdown wants it."""
    return re.sub(r"(?m)^ {2}(?=\S)", "    ", text)


# --- hooks ------------------------------------------------------------------------------------------------------------

MARKED = re.compile(r"<!-- made: ([\w-]+) -->\n(.*?)<!-- /made -->", re.DOTALL)
MADE = {"commands": commands, "config": config_page, "measurements": measurements, "model-card": model_card}


def on_config(config: Any) -> Any:
    """The checkout that holds these pages is the one that they describe. (MkDocs restores the path that a loading hook changes.)"""
    sys.path.insert(0, str(ROOT))
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """What stands between the two marks is for readers of the repository; the site has the page itself there, and links to that page."""
    up = "../" * page.file.src_uri.count("/")
    for file, shown in SHOWN_AS.items():
        markdown = markdown.replace(f"]({up}../{file}", f"]({up}{shown}")
    return MARKED.sub(lambda match: MADE[match[1]](), markdown)


def pages_in_repository() -> dict[Path, str]:
    """The pages of config keys and commands, as they should stand in the repository, whatever the machine is."""
    paths = {ROOT / "docs" / "reference" / name: MADE[made] for name, made in (("cli.md", "commands"), ("config.md", "config"))}

    def filled(path: Path, made: Callable[[], str]) -> str:
        return MARKED.sub(
            lambda match: f"<!-- made: {match[1]} -->\n\n{made().strip()}\n\n<!-- /made -->", path.read_text(encoding="utf-8")
        )

    return {path: filled(path, made) for path, made in paths.items()}


def on_files(files: Any, config: Any) -> Any:
    """The model card's sheets, beside its page."""
    from mkdocs.structure.files import File

    for sheet in sorted((CARD / "sheets").glob("*.png")):
        files.append(File.generated(config, f"results/sheets/{sheet.name}", abs_src_path=str(sheet)))
    return files


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for page, text in pages_in_repository().items():
        page.write_text(text, encoding="utf-8")

"""Reads and scores the answers to a viewer's sheet: `python -m tokun.evaluate.viewer score KEY ANSWERS [NAMES]`.

ANSWERS has a line for each picture: `1 b`, `1: B`, `1) b`, `1,b`, or a table with the header `number,answer,name` as the page writes it
(also with semicolons or tabs, as spreadsheets write it). NAMES, from the first pass, has the number and what can be named, or an empty line
(or -, ?, nothing, none, no). A picture without an answer is an error; with --missing-wrong it counts as wrong.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokun.evaluate.figures import Figure, share, skipped, table
from tokun.evaluate.recognition import words
from tokun.utils import console
from tokun.utils.console import home_path
from tokun.utils.csv_rows import read_rows
from tokun.utils.errors import UserError, reading

LINE = re.compile(r"\W*(?:no\.?\s*|nr\.?\s*)?(\d+)(?:\W+(.*))?", re.IGNORECASE)  # a number, separators, and the rest
CHOICE = re.compile(r"\W*([a-z])\b\W*", re.IGNORECASE)
SEPARATORS = (",", ";", "\t")  # of a table; spreadsheets write ; where the comma is the decimal point
NOTHING = frozenset({"", "nothing", "none", "no", "unclear", "unknown"})


def main(argv: list[str] | None = None) -> None:
    parser = console.make_parser("python -m tokun.evaluate.viewer", __doc__)
    score_command = parser.add_subparsers(dest="command", required=True).add_parser("score", help="score an answer file")
    score_command.add_argument("key", type=home_path)
    score_command.add_argument("answers", type=home_path)
    score_command.add_argument("names", type=home_path, nargs="?", default=None)
    score_command.add_argument(
        "--missing-wrong", action="store_true", help="count pictures without an answer as wrong instead of raising an error"
    )
    args = parser.parse_args(argv)
    key = read_key(args.key)
    answers, names = read_answers(args.answers)
    if args.names is not None:
        names |= read_names(args.names)
    print(table({str(key.get("of", "viewer")): score(key, answers, names, missing_wrong=args.missing_wrong)}))


def score(key: dict[str, Any], answers: dict[int, str], names: dict[int, str], *, missing_wrong: bool = False) -> list[Figure]:
    """The key, letters and names by number -> figures.
    Raises UserError for missing answers and for numbers and letters that are not on the sheet."""
    pictures = {row["number"]: row for row in key["pictures"]}
    require_known(pictures, answers, names)
    if (missing := sorted(pictures.keys() - answers.keys())) and not missing_wrong:
        raise UserError(
            f"{len(missing)} of {len(pictures)} pictures have no answer: {_listed(missing)}. Answer each (guesses count), or count them "
            "as wrong with --missing-wrong"
        )
    right = {number: answers.get(number) == row["right"] for number, row in pictures.items()}
    note = f"chance {1 / len(pictures[min(pictures)]['options']):.0%}" + (f"; {len(missing)} without an answer" if missing else "")
    found = [share("right caption of four", list(right.values()), better="more", note=note), *named(pictures, names)]
    kinds: dict[str, list[bool]] = defaultdict(list)
    for number, row in pictures.items():
        kinds[row["kind"] or "no kind"].append(right[number])
    return found + [
        share(f"right, {kind}", hits, better="more") for kind, hits in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def named(pictures: dict[int, dict[str, Any]], names: dict[int, str]) -> list[Figure]:
    """How often something could be named, and how often with a word of the own caption."""
    if not names:
        return [skipped("something nameable", "no names were given", len(pictures))]
    if missing := sorted(pictures.keys() - names.keys()):
        raise UserError(
            f"{len(missing)} of {len(pictures)} pictures have no line of names: {_listed(missing)}. "
            "Leave the line empty if nothing can be named"
        )
    given = {number: names[number] for number in pictures}
    agree = [bool(words(given[number]) & words(row["options"]["abcd".index(row["right"])])) for number, row in pictures.items()]
    return [
        share("something nameable", [bool(name) for name in given.values()], better="more", note="a name was given, right or wrong"),
        share("named in a word of the own caption", agree, better="more", note="exact words; synonyms do not count"),
    ]


def require_known(pictures: dict[int, dict[str, Any]], answers: dict[int, str], names: dict[int, str]) -> None:
    if unknown := sorted((answers.keys() | names.keys()) - pictures.keys()):
        raise UserError(
            f"no picture has the number {_listed(unknown)}; the key has {min(pictures)} to {max(pictures)}: is it another sheet's?"
        )
    letters = "abcd"[: len(pictures[min(pictures)]["options"])]
    if wrong := [f"{number} {letter}" for number, letter in answers.items() if letter not in letters]:
        raise UserError(f"{_listed(wrong)}: the captions have the letters {letters[0]} to {letters[-1]}")


# --- files ----------------------------------------------------------------------------------------------------------


def read_key(path: Path) -> dict[str, Any]:
    """The key written by `viewer.write`. Raises FileNotFoundError, or UserError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the key, OUT/viewer-keys/NAME.json")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        if all({"number", "right", "kind", "options"} <= row.keys() for row in key["pictures"]) and key["pictures"]:
            return key
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(f"{path} is not the key of a viewer's sheet: name OUT/viewer-keys/NAME.json (the key comes first, then the answers)")


def read_answers(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Letters by number and, if the file is a table with them, names by number. Raises UserError that names unreadable lines."""
    lines = _lines(path)
    answers: dict[int, str] = {}
    if lines and re.match(r"\W*number\W", lines[0][1] + ",", re.IGNORECASE):
        return _read_table(path, lines)
    for where, number, rest in _numbered(path, lines):
        if rest:
            _put(answers, number, _letter(path, where, rest), path)
    return answers, {}


def read_names(path: Path) -> dict[int, str]:
    """What was named, by number; '' for nothing."""
    names: dict[int, str] = {}
    for _, number, rest in _numbered(path, _lines(path)):
        _put(names, number, _name(rest), path)
    return names


def _read_table(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[dict[int, str], dict[int, str]]:
    first = lines[0][1]
    separator = max(SEPARATORS, key=first.count)
    found = read_rows([line for _, line in lines], path, separator=separator, number=lambda place: lines[place - 1][0])
    header, *rows = [cells for _, cells in found]
    columns = {name.strip().lower(): i for i, name in enumerate(header)}
    if "number" not in columns:
        raise UserError(
            f"{path}: the header {first!r} has no column `number`; write number,answer,name, separated by commas, semicolons or tabs"
        )
    answers: dict[int, str] = {}
    names: dict[int, str] = {}
    for (where, line), row in zip(lines[1:], rows):
        cells = {name: row[i].strip() if i < len(row) else "" for name, i in columns.items()}
        if not cells["number"].isdecimal():
            raise UserError(f"{path}, line {where}: {line!r} has no picture number")
        if cells.get("answer"):
            _put(answers, int(cells["number"]), _letter(path, where, cells["answer"]), path)
        if "name" in cells:
            _put(names, int(cells["number"]), _name(cells["name"]), path)
    return answers, names


def _lines(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the file with the answers")
    with reading(path, "Save it as UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    return [(where, line.strip()) for where, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]


def _numbered(path: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, int, str]]:
    """(line, number of the picture, the rest) of each."""
    found = []
    for where, line in lines:
        match = LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}, line {where}: {line!r} does not begin with a picture number; write `1 b`")
        found.append((where, int(match[1]), (match[2] or "").strip()))
    return found


def _letter(path: Path, where: int, text: str) -> str:
    match = CHOICE.fullmatch(text)
    if match is None:
        raise UserError(f"{path}, line {where}: {text!r} is not a letter; write `1 b`, and put names into a separate file")
    return match[1].lower()


def _name(text: str) -> str:
    text = text.strip().strip("\"'")
    return "" if re.sub(r"\W+", " ", text.lower()).strip() in NOTHING else text


def _put(found: dict[int, str], number: int, value: str, path: Path) -> None:
    if found.setdefault(number, value) != value:
        raise UserError(f"{path} answers picture {number} twice: {found[number]!r} and {value!r}; keep one")


def _listed(items: Sequence[object], most: int = 12) -> str:
    return ", ".join(map(str, items[:most])) + (" …" if len(items) > most else "")

"""Plain values, as from YAML or JSON, become dataclasses, their fields checked by their type hints. Knows no setting.

Why not pydantic: for an unknown key it says "Extra inputs are not permitted" and does not name the nearest; YAML needs cases of its own
(`no` for "no", 1e-3 as text). Adding both takes as many lines as `build`, and one more dependency.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

import yaml

from tokun.utils.errors import UserError


def override(tree: dict[str, Any], text: str, cls: type) -> None:
    """Set a value of the tree of a `cls` from `a.b=c`, c being YAML, or as typed where the setting is text.
    Raises UserError for another form."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r} is not of the form a.b=c, for example train.lr=3e-4")
    try:
        parsed = value if _is_literal(cls, key, value) else yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: {value!r} is not a YAML value: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {text!r}: {parent!r} is a value, not a section")
    tree[last] = parsed


def _is_literal(cls: type, key: str, value: str) -> bool:
    """Whether the value of a setting that is text is taken as typed: a path may contain what means something in YAML ({a,b}, #, a line
    break). Only a quoted text and null are read as YAML."""
    hint: Any = cls
    for name in key.split("."):
        hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint is str and value.strip().lower() != "null" and not (value[:1] == value[-1:] and value[:1] in ("'", '"'))


def build(cls: type, tree: Any, *, where: str, key: str = "") -> Any:
    """A tree of plain values -> a dataclass, its fields checked by their type hints. `where` begins every error, `key` is the section's
    name.

    Raises UserError naming an unknown key and the nearest one, or a value and the type it should have."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: {key or 'the file'} is {tree!r}, but it must be a section with keys of its own")
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)
            raise UserError(
                f"{where}: unknown key {_join(key, name)!r}. The nearest is {_join(key, near[0])!r}; this section knows: {', '.join(hints)}"
            )
    return cls(**{n: _value(hints[n], v, key=_join(key, n), where=where) for n, v in tree.items()})


def _value(hint: Any, value: Any, *, key: str, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        value = {} if value is None else value  # a section with every line commented out
        return build(hint, value, key=key, where=where)
    if origin is Literal:
        if value is False and "no" in args:  # YAML reads a bare `no` as false
            value = "no"
        if value not in args:
            raise UserError(f"{where}: {key} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: {key} is {value!r}; it must be a list such as [1, 2]")
        return [_value(args[0], v, key=f"{key}[{i}]", where=where) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} is {value!r}; it must be a mapping such as {{joint: 1.0}}")
        return {str(k): _value(args[1], v, key=f"{key}.{k}", where=where) for k, v in value.items()}
    assert not isinstance(origin, types.UnionType)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and value is None:
        value = ""
    if type(value) is not hint:
        name = getattr(hint, "__name__", hint)
        raise UserError(f"{where}: {key} is {value!r} ({type(value).__name__}); it must be a {name}")
    return value


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)

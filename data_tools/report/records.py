"""What the JSON of all pairs says: the type of every field, licences, languages, counts by split.

It is counted in the report's own pass over the shards (counting.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

SPLITS = {"train": "train", "val": "validation"}  # by the first word of a shard's name
SCALARS = {bool: "bool", int: "int64", float: "float64", str: "string"}
MOST_FIELDS = 256  # of an object; one with more, such as names that are data, has no type


@dataclass
class Records:
    """What the JSON of all pairs says."""

    fields: dict[str, Any] = field(default_factory=dict)  # name -> type, see `merged`
    suffixes: set[str] = field(default_factory=set)
    licences: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)  # by split
    bytes: Counter[str] = field(default_factory=Counter)
    _last: Any = None  # the type of the record before

    def add(self, record: dict[str, Any], split: str) -> None:
        """`split`: as SPLITS names it."""
        if (kind := kind_of(record)) != self._last:  # most records have the fields of the one before
            fields = merged(self.fields, kind)
            self.fields, self._last = fields if isinstance(fields, dict) else self.fields, kind
        self.licences[str(record.get("license") or "")] += 1
        self.languages[str(record.get("language") or "")] += 1
        self.pairs[split] += 1


def kind_of(value: Any) -> Any:
    """The type of a JSON value: a name of Arrow's, [type] for a list, {name: type} for an object; "null" if it has no value."""
    if type(value) in SCALARS:
        return SCALARS[type(value)]
    if isinstance(value, list):
        return [reduce(merged, map(kind_of, value), "null")]
    if isinstance(value, dict):
        return {str(name): kind_of(one) for name, one in value.items()} if len(value) <= MOST_FIELDS else "json"
    return "null"


def merged(one: Any, other: Any) -> Any:
    """A type for the values of both; "json" where there is none."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    if isinstance(one, dict) and isinstance(other, dict):
        names = list(dict.fromkeys((*one, *other)))
        return {name: merged(one.get(name, "null"), other.get(name, "null")) for name in names} if len(names) <= MOST_FIELDS else "json"
    if isinstance(one, list) and isinstance(other, list):
        return [merged(one[0], other[0])]
    if {str(one), str(other)} == {"int64", "float64"}:
        return "float64"
    return "json"

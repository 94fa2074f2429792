"""The tags of samples: requested, or drawn by the latent with their joint frequencies in training. Knows no model.

rows of counts:   (style, subject, count), or (style, subject, thing, "HxW", count)
latent:           slot 0 draws style and subject, slot 1 the thing given these, slot 2 the grid given all three
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np

from tokun.data.cropping import nearest_grid
from tokun.tokenizers.vocabulary import Tags, Vocabulary, parse_grid
from tokun.utils.errors import UserError

TagCount = tuple[str, str, int] | tuple[str, str, str, str, int]
TagCounts = list[TagCount]  # joint counts in training
RARE = 24  # with fewer pictures, shapes are drawn from those of the whole style and subject, or of the subject
SHAPES = {"wide": (4, 3), "tall": (3, 4), "square": (1, 1)}  # width and height
Counts = list[tuple[Any, float]]
Known = tuple[str, str, str, tuple[int, int] | None, float]  # style, subject, thing, grid, count; "" and None: untagged


def read_counts(rows: Iterable[Sequence[Any]]) -> TagCounts:
    """Counts from JSON rows. Raises UserError for invalid ones."""
    out: TagCounts = []
    for row in rows:
        match list(row):
            case [str(style), str(subject), count]:
                out.append((style, subject, int(count)))
            case [str(style), str(subject), str(thing), str(grid), count] if not grid or re.fullmatch(r"\d+x\d+", grid):
                out.append((style, subject, thing, grid, int(count)))
            case _:
                raise UserError(f"{row!r} is not a row of tag counts: style, subject, count, or style, subject, thing, HxW, count")
    return out


def settings_json(settings: dict[str, Any]) -> str:
    """Settings as JSON. Each row of `tag_counts`, and all words and wordings, take one line, since there are thousands."""
    rows = ",\n  ".join(json.dumps(row) for row in settings["tag_counts"])
    long = {name: json.dumps(settings.get(name)) for name in ("unrepeated_words", "question_wordings")}
    long["tag_counts"] = f"[\n  {rows}\n ]"
    text = json.dumps({name: [] if name in long else value for name, value in settings.items()}, indent=1)
    for name, written in long.items():
        text = text.replace(f'"{name}": []', f'"{name}": {written}', 1)
    return text + "\n"


def count_tags(samples: Iterable[tuple[str, ...]]) -> TagCounts:
    """(style, subject), or (style, subject, thing, "HxW"), of every training sample -> counts, most frequent first."""
    return read_counts((*words, n) for words, n in sorted(Counter(samples).items(), key=lambda item: (-item[1], item[0])))


def with_subjects_of(own: TagCounts, other: TagCounts) -> TagCounts:
    """The styles and shapes of `own`, each with the subjects and things of `other`. For counts without subjects, as an adapter may have."""
    shapes: Counter[tuple[str, str]] = Counter()
    for row in own:
        shapes[row[0], "" if len(row) == 3 else row[3]] += row[-1]
    things: Counter[tuple[str, str]] = Counter()
    for row in other:
        things[row[1], "" if len(row) == 3 else row[2]] += row[-1]
    return [(style, subject, thing, grid, count * n) for (style, grid), n in shapes.items() for (subject, thing), count in things.items()]


class InverseCdf:
    """The inverse of the distribution function of counts."""

    def __init__(self, counts: Counts) -> None:
        self.values, self.sums = [value for value, _ in counts], np.cumsum([n for _, n in counts]).tolist()

    def at(self, u: float) -> Any:
        """The value drawn by u in [0, 1); None without counts."""
        return self.values[min(bisect_right(self.sums, u * self.sums[-1]), len(self.values) - 1)] if self.values else None


class Frequencies:
    """Counts in the vocabulary's tags. Rare words have no tag: they are counted, but stay untagged as in training."""

    def __init__(self, counts: TagCounts, vocabulary: Vocabulary):
        self.counts, self.vocabulary, v = counts, vocabulary, vocabulary
        split = ((c[0], c[1], *(("", "") if len(c) == 3 else c[2:4]), c[-1]) for c in counts)
        things = {thing: thing for thing in v.things}
        rows = ((style, subject, things.get(thing, ""), parse_grid(text) if text else None, n) for style, subject, thing, text, n in split)
        self.rows: list[Known] = [row for row in rows if row[3] is None or row[3] in v.grids]
        self.by_pair: dict[tuple[str, str], list[Known]] = {}
        for row in self.rows:
            self.by_pair.setdefault(row[:2], []).append(row)
        self.made: dict[tuple[Any, ...], InverseCdf] = {}  # cache, by what is drawn and what is given
        self.likelihoods: Mapping[tuple[str, str], float] | None = None

    def given(self, likelihoods: Mapping[tuple[str, str], float]) -> Frequencies:
        """The same counts, where styles, subjects and things are drawn by count times the likelihood of (subject, thing), 0 for others.
        Shapes are still drawn by counts alone."""
        out = copy(self)
        out.made, out.likelihoods = {}, likelihoods
        return out

    def subjects_and_things(self, wanted: Tags) -> dict[tuple[str, str], float]:
        """(subject, thing) -> count, of what occurs with the requested tags."""
        return {pair: n for pair, n in _summed(self._fitting(wanted), lambda row: row[1:3]) if not wanted.thing or pair[1] == wanted.thing}

    def draw(self, u: Sequence[float], wanted: Tags) -> Tags:
        """The wanted tags, and others drawn by the tag slots of a latent, u (TAG_SLOTS,) in [0, 1)."""
        v, (first, second, third, _) = self.vocabulary, u
        style, subject = self._inverse(self._pairs, wanted).at(first) or ("", "")
        style, subject = wanted.style or style, wanted.subject or subject
        thing = wanted.thing or self._inverse(self._things, style, subject, wanted.grid).at(second) or ""
        grid = wanted.grid or self._inverse(self._grids, style, subject, thing).at(third) or v.default_grid
        return Tags(
            style if style in v.styles else "", subject if subject in v.subjects else "", wanted.register or v.default_register, grid, thing
        )

    def draw_all(self, rows: Iterable[Sequence[float]], wanted: Tags) -> list[Tags]:
        """`draw` for each row of tag slots."""
        return [self.draw(row, wanted) for row in rows]

    def _inverse(self, counts: Callable[..., Counts], *given: Any) -> InverseCdf:
        """Cached inverse CDF of `counts(*given)`."""
        key = counts.__name__, *given
        if key not in self.made:
            self.made[key] = InverseCdf(counts(*given))
        return self.made[key]

    def _pairs(self, wanted: Tags) -> Counts:
        """Styles and subjects that occur with the requested tags."""
        return _summed(self._weighted(self._fitting(wanted)), lambda row: row[:2])

    def _fitting(self, wanted: Tags) -> list[Known]:
        """Rows that have the requested tags. If none do, the shape is ignored; with a thing, then the style, then the thing."""
        asked = {0: wanted.style, 1: wanted.subject, 2: wanted.thing, 3: wanted.grid}
        for left_out in ((), (3,), (0, 3), (2, 3))[: 4 if wanted.thing else 2]:
            kept = [(place, value) for place, value in asked.items() if value and place not in left_out]
            if found := [row for row in self.rows if all(row[place] == value for place, value in kept)]:
                return found
        return []

    def _weighted(self, rows: list[Known]) -> list[Known]:
        """The rows with their counts times their likelihoods, if there are any; unchanged if none of them is likely at all."""
        if self.likelihoods is None:
            return rows
        found = [(*row[:4], row[4] * self.likelihoods.get(row[1:3], 0.0)) for row in rows]
        return found if any(row[4] > 0 for row in found) else rows

    def _things(self, style: str, subject: str, grid: tuple[int, int] | None) -> Counts:
        own = self.by_pair.get((style, subject), [])
        return _summed(self._weighted([row for row in own if grid is not None and row[3] == grid] or own), lambda row: row[2])

    def _grids(self, style: str, subject: str, thing: str) -> Counts:
        """Shapes of the thing or, if it is rare, of its style and subject, of its subject, or of all; from the tallest to the widest."""
        own, found = self.by_pair.get((style, subject), []), []
        for rows in ([row for row in own if row[2] == thing], own, [row for row in self.rows if row[1] == subject], self.rows):
            found = [row for row in rows if row[3] is not None] or found
            if sum(row[4] for row in found) >= RARE:
                break
        return sorted(_summed(found, lambda row: row[3]), key=lambda item: item[0][1] / item[0][0])


def _summed(rows: list[Known], key: Callable[[Known], Any]) -> Counts:
    """Counts summed by `key`, most frequent first."""
    sums: dict[Any, float] = {}
    for row in rows:
        sums[key(row)] = sums.get(key(row), 0) + row[4]
    return sorted(sums.items(), key=lambda item: (-item[1], item[0]))


def grid_of(aspect: str, vocabulary: Vocabulary) -> tuple[int, int] | None:
    """The requested grid: "16x12" (rows x columns, one of the vocabulary's), or the nearest one to "4:3" (width : height), "wide", "tall"
    or "square". None for "". Raises UserError for another text or an unknown grid."""
    if not isinstance(aspect, str):
        raise UserError(f"aspect is {aspect!r}; give a str, empty for none")
    text, grids = aspect.strip().lower(), vocabulary.grids
    there = f"this model's grids (rows x columns) are {', '.join(f'{rows}x{columns}' for rows, columns in grids)}"
    if not text:
        return None
    if match := re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text, re.ASCII):
        grid = int(match[1]), int(match[2])
        if grid not in grids:
            raise UserError(
                f"aspect is {aspect!r}, a grid that this model does not know; {there}. For the nearest shape give width:height, such as 4:3"
            )
        return grid
    if match := re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?):(\d{1,6}(?:\.\d{1,6})?)", text, re.ASCII):
        width, height = float(match[1]), float(match[2])
    else:
        width, height = SHAPES.get(text, (0, 0))
    if not width or not height:
        raise UserError(f"aspect is {aspect!r}; it must be width:height (4:3), wide, tall, square, or a grid; {there}")
    alike = [grid for grid in grids if text in SHAPES and (grid[1] > grid[0]) - (grid[1] < grid[0]) == (width > height) - (width < height)]
    grids = alike or grids
    return grids[nearest_grid(width, height, grids)]  # "wide" is never square if any grid is wide

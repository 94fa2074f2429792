"""Ranking: the CLIP score of each caption relative to the whole set, and the rows that --keep-best leaves out."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.captioning.captioned_shards import Scores
from data_tools.captioning.journals import Folder, JournalRows, is_scored, read_journal


def percentiles(values: Iterable[float]) -> list[float]:
    """For each value, the percentage of all values below it (ties count half), with one decimal."""
    values = list(values)
    ordered = sorted(values)
    return [round(50 * (bisect_left(ordered, v) + bisect_right(ordered, v)) / len(ordered), 1) for v in values]


@dataclass
class Ranking:
    """The rank of each row's captions within the whole set, by shard name, and the rows left out because of it."""

    scores: dict[str, Scores] = field(default_factory=dict)
    left_out: dict[str, set[int]] = field(default_factory=dict)
    reasons: list[dict[str, Any]] = field(default_factory=list)  # of the rows left out


def rank_rows(folder: Folder, shards: Iterable[Path], rows_of: Callable[[Path], JournalRows], keep_best: float) -> Ranking:
    """Percentiles of all scores within their register, and the rows left out by the share `keep_best`.

    A row ranks by the mean percentile of its captions. Rows without a score are left out as well.
    """
    result = Ranking()
    keys: dict[tuple[str, int], str] = {}  # of all rows, by shard name and number
    values: dict[str, list[tuple[str, int, float]]] = {}  # register -> (shard name, row, score)
    for shard in shards:
        scored = read_journal(folder.scores(shard))[1]
        for number, row in rows_of(shard).items():
            keys[shard.name, number] = row["key"]
            for register, value in scored[number]["scores"].items() if is_scored(row, scored) else ():
                values.setdefault(register, []).append((shard.name, number, value))
    ranks: dict[tuple[str, int], list[float]] = {}
    for register, entries in values.items():
        for (name, number, value), percentile in zip(entries, percentiles(value for _, _, value in entries)):
            result.scores.setdefault(name, {}).setdefault(number, {})[register] = {"clip": value, "clip_percentile": percentile}
            ranks.setdefault((name, number), []).append(percentile)
    if keep_best < 1:
        leave_out_worst(result, keys, {place: round(sum(each) / len(each), 3) for place, each in ranks.items()}, keep_best)
    return result


def leave_out_worst(result: Ranking, keys: dict[tuple[str, int], str], means: dict[tuple[str, int], float], keep_best: float) -> None:
    best = set(sorted(means, key=lambda place: (-means[place], place))[: math.ceil(keep_best * len(means))])
    for place, key in keys.items():
        if place not in best:
            mean = means.get(place)
            reason = "no score" if mean is None else f"not among the best {keep_best:.2%}"
            result.left_out.setdefault(place[0], set()).add(place[1])
            result.reasons.append({"shard": place[0], "key": key, "reason": reason, "clip_percentile": mean})

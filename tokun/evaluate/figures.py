"""A measured value with its interval and number of cases, independent of what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    n: int
    """Number of cases."""
    low: float = math.nan
    high: float = math.nan
    """The 95 % interval; nan if not estimated."""
    better: str = ""
    """'more' or 'less'; empty if neither."""
    note: str = ""
    """Features, judge, chance level."""


def mean(name: str, values: Sequence[float] | np.ndarray, *, better: str = "", note: str = "", seed: int = 0) -> Figure:
    """The mean over cases, with a bootstrap interval over the cases."""
    array = np.asarray(values, np.float64)
    low, high = bootstrap(array, np.mean, seed=seed)
    return Figure(name, float(array.mean()), len(array), low, high, better, note)


def share(name: str, hits: Sequence[bool] | np.ndarray, *, better: str = "", note: str = "") -> Figure:
    """A share of cases, with Wilson's interval (E. B. Wilson, 1927), which stays inside 0 to 1."""
    n, z = len(hits), 1.96
    p = float(np.mean(hits))
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return Figure(name, p, n, max(0.0, low), min(1.0, high), better, note)  # rounding could exceed 0 and 1


def bootstrap(cases: np.ndarray, statistic: Callable[[np.ndarray], float], *, times: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of `statistic` over cases resampled with replacement."""
    rng = np.random.default_rng(seed)
    found = [statistic(cases[rng.integers(0, len(cases), len(cases))]) for _ in range(times)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def skipped(name: str, reason: str, n: int = 0) -> Figure:
    """A placeholder for a figure that could not be measured."""
    return Figure(name, math.nan, n, note=f"skipped: {reason}")


# --- the table ------------------------------------------------------------------------------------------------------

COLUMNS = ("figure", "value", "95 % interval", "n", "better", "note")


def table(rooms: Mapping[str, Sequence[Figure]]) -> str:
    """All figures as one Markdown table with aligned columns; figure names are prefixed with their room's name."""
    rows = [COLUMNS, *(_cells(room, figure) for room, figures in rooms.items() for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def as_dict(figure: Figure) -> dict[str, Any]:
    """As plain JSON, with None for nan."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(figure).items()}


def _cells(room: str, figure: Figure) -> tuple[str, ...]:
    interval = f"{number(figure.low)} to {number(figure.high)}" if math.isfinite(figure.low) else ""
    note = figure.note.replace("|", "/").replace("\n", " ")
    return (f"{room}: {figure.name}", number(figure.value), interval, str(figure.n), figure.better, note)


def number(value: float) -> str:
    """Four significant digits, or a dash."""
    return f"{value:.4g}" if math.isfinite(value) else "–"

"""Plots of the evaluation, as PNG files. Knows numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokun.utils.optional_packages import need


def code_histogram(counts: Mapping[str, np.ndarray], path: Path) -> None:
    """How often each code occurs, most frequent first: name -> counts (K,)."""
    figure, axes = _page()
    for name, count in counts.items():
        axes.plot(np.sort(count)[::-1] / count.sum(), label=name)
    axes.set(xlabel="codes, most frequent first", ylabel="share", yscale="log")
    axes.legend()
    figure.savefig(path)


def spectra(curves: Mapping[str, np.ndarray], frequencies: np.ndarray, band: float, path: Path) -> None:
    """Mean power by spatial frequency: name -> (bins,). Frequencies from `band` on are hatching."""
    figure, axes = _page()
    for name, curve in curves.items():
        axes.plot(frequencies, curve, label=name)
    axes.axvspan(band, frequencies[-1], alpha=0.1, label="hatching")
    axes.set(xlabel="cycles per pixel", ylabel="power", yscale="log")
    axes.legend()
    figure.savefig(path)


def position_map(values: np.ndarray, title: str, path: Path) -> None:
    """One number for each position of the grid: (rows, columns)."""
    figure, axes = _page()
    figure.colorbar(axes.imshow(values))
    axes.set(title=title)
    figure.savefig(path)


def ranks(found: Mapping[str, np.ndarray], candidates: int, path: Path) -> None:
    """Ranks of the own caption among `candidates`, by PMI: name -> ranks (n,), from 1."""
    figure, axes = _page()
    width = 0.8 / len(found)
    for number, (name, own) in enumerate(found.items()):
        share = np.bincount(own, minlength=candidates + 1)[1:] / len(own)
        axes.bar(np.arange(1, candidates + 1) + (number - (len(found) - 1) / 2) * width, share, width, label=name)
    axes.axhline(1 / candidates, color="black", linestyle="dotted", label="chance")
    axes.set(xlabel=f"rank of the own caption among {candidates}", ylabel="share of pictures")
    axes.legend()
    figure.savefig(path)


def _page() -> tuple[Any, Any]:
    figure = need("matplotlib.figure", extra="eval").Figure(figsize=(6, 4), dpi=150, layout="constrained")
    return figure, figure.subplots()

"""Promises of `python -m benchmarks.adapters pooled`: several runs on books are put together picture by picture."""

import argparse

import numpy as np
import pytest

from benchmarks import adapters
from tokun.utils.errors import UserError

NAMES = ("base", "LoRA, lowest", "LoRA, at the end", "all weights, lr 0.0001, lowest")


def write_run(folder, keys, base, **changes):
    folder.mkdir()
    arrays = {"book keys": np.array(keys), "rest keys": np.array(["other"])}
    for name in NAMES:
        for kind in ("image", "text", "both"):
            arrays |= {f"{name}/book {kind}": np.array(base) + changes.get(name, 0.0), f"{name}/rest {kind}": np.array([1.0])}
    np.savez(folder / "scores.npz", **arrays)


def rows_of(printed: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in printed.splitlines()]
    return {row[0]: row[1:] for row in cells[2:]}


def test_a_picture_of_several_runs_counts_once_by_its_mean(tmp_path, capsys):
    write_run(tmp_path / "a", ["one", "two"], [4.0, 5.0], **{"LoRA, lowest": -0.2, NAMES[3]: -0.1})
    write_run(tmp_path / "b", ["two"], [5.0], **{"LoRA, lowest": -0.4, NAMES[3]: -0.1})
    adapters.on_several_books(argparse.Namespace(runs=[tmp_path / "a", tmp_path / "b"]))
    rows = rows_of(capsys.readouterr().out)
    assert rows["LoRA, lowest minus base"][2] == "-0.2500 (-0.3000 to -0.2000), 2", (
        "-0.2 of the one, the mean of -0.2 and -0.4 of the other"
    )
    assert rows[f"LoRA, lowest minus {NAMES[3]}"][2] == "-0.1500 (-0.2000 to -0.1000), 2"
    assert rows["LoRA, at the end minus base"][2].startswith("+0.0000") and rows["LoRA, lowest minus base"][5].startswith("+0.0000")


def test_a_run_that_has_not_finished_is_named(tmp_path):
    (tmp_path / "begun").mkdir()
    with pytest.raises(UserError, match=r"begun has no scores\.npz"):
        adapters.on_several_books(argparse.Namespace(runs=[tmp_path / "begun"]))

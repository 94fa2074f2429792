"""sample.py as people type it: files, promises, and clear words for mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import sample
from tokun.model import BUNDLED, load

ROOT = Path(__file__).resolve().parent.parent
needs_bundle = pytest.mark.skipif(not BUNDLED.is_dir(), reason="no checkpoint is bundled in this checkout")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_grid_single_pictures_and_a_record_of_every_sample_are_written(checkpoint_folder, tmp_path, capsys):
    sample.main(["--checkpoint", str(checkpoint_folder), "--seed", "7", "--n", "3", "--out", str(tmp_path)])
    found = records(tmp_path)
    assert [r["index"] for r in found] == [0, 1, 2] and all(r["seed"] == 7 and r["caption"].strip() for r in found)
    assert {"tags", "image_nll", "caption_nll", "pmi", "codes"} <= found[0].keys()
    for index in range(3):
        with Image.open(tmp_path / f"000007-{index:02d}.png") as picture:
            assert picture.size == (32, 32)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 150
    printed = capsys.readouterr().out
    assert all(r["caption"] in printed for r in found)


@pytest.mark.parametrize("batch_size", ["1", "3", "16"])
def test_the_first_of_many_are_the_few_for_any_batch_size(checkpoint_folder, tmp_path, batch_size):
    common = ["--checkpoint", str(checkpoint_folder), "--seed", "42"]
    sample.main([*common, "--n", "6", "--out", str(tmp_path / "many")])
    sample.main([*common, "--n", "4", "--batch-size", batch_size, "--out", str(tmp_path / "few")])
    keep = ("codes", "caption_ids", "caption", "tags")
    many, few = ([{k: r[k] for k in keep} for r in records(tmp_path / name)] for name in ("many", "few"))
    assert many[:4] == few


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--checkpoint", "no/such/folder/at/all"], "neither a folder"),
        (["--style", "cubism"], "engraving"),
        (["--temperature", "-1"], "temperature"),
        (["--seed", "-3"], "seed"),
        (["--top-p", "0"], "top_p"),
        (["--prompt", "   "], "prompt"),
    ],
)
def test_a_mistake_is_named(checkpoint_folder, tmp_path, arguments, named):
    checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", str(checkpoint_folder)]
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        sample.main([*checkpoint, "--n", "1", "--out", str(tmp_path), *arguments])


@needs_bundle
def test_the_bundled_model_gives_sixteen_captioned_pictures_and_keeps_its_seed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "sample.py", "--seed", "42", "--n", "16", "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = records(tmp_path)
    assert len(found) == 16 and all(r["caption"].strip() for r in found)
    model = load()
    few = model.sample(42, 4, batch_size=3)
    assert [p.codes for p in few] == [r["codes"] for r in found[:4]]
    assert [p.caption_ids for p in few] == [r["caption_ids"] for r in found[:4]]


@needs_bundle
def test_the_bundle_is_small_and_holds_no_pickle():
    files = [p for p in BUNDLED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") <= 48 * 2**20
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert (BUNDLED / "README.md").is_file()

"""benchmarks/bundle.py: what ships with the package loads, is small, says what it is, and holds nothing of the machine it was made on."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tokun
from benchmarks import bundle
from tokun.config import load_config
from tokun.inference.model import BUNDLED, Tokun
from tokun.utils.errors import UserError

needs_bundle = pytest.mark.skipif(not BUNDLED.is_dir(), reason="no checkpoint is bundled in this checkout")


@pytest.fixture
def checkpoint(shaped_model, tmp_path):
    """A folder with no training record, as one taken from a run that goes on."""
    shaped_model.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def config(shaped_model, tmp_path):
    """The recipe of that checkpoint."""
    g, t = shaped_model.generator.config, shaped_model.image_tokenizer.config
    tree = {
        "data": {"grids": [f"{rows}x{columns}" for rows, columns in shaped_model.grids]},
        "image_tokenizer": {"image_size": t.image_size, "codebook_size": t.codebook_size, "channels": list(t.channels)},
        "generator": {"hidden_size": g.hidden_size, "num_layers": g.num_hidden_layers, "num_heads": g.num_attention_heads,
            "num_kv_heads": g.num_key_value_heads},
        "train": {"task_mix": dict.fromkeys(shaped_model.tasks, 0.5), "lr_hold": 0.85},
        "sampling": {"temperature": 0.75},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def make(checkpoint, config, out, *options):
    bundle.main([str(checkpoint), "--config", str(config), "--out", str(out), "--steps", "1200", "--hours", "7", *options])


def test_a_folder_and_what_nobody_recorded_make_a_bundle(checkpoint, config, tmp_path):
    (tmp_path / "books.tsv").write_text("gutenberg_id\ttitle\tsplit\n7\tA\ttrain\n3\tB\tval\n", encoding="utf-8")
    (tmp_path / "table.md").write_text("| own figure | 12.5 |\n", encoding="utf-8")
    options = [
        "--tokenizer-steps",
        "300",
        "--tokenizer-hours",
        "1.5",
        "--sources",
        str(tmp_path / "books.tsv"),
        "--table",
        str(tmp_path / "table.md"),
    ]
    make(checkpoint, config, tmp_path / "new", *options)
    made, before = tokun.load(tmp_path / "new"), tokun.load(checkpoint)
    assert made.defaults.temperature == 0.75 and made.tasks == before.tasks and made.vocabulary == before.vocabulary
    weights = load_file(tmp_path / "new" / "generator" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert made.image_tokenizer.fingerprint() == before.image_tokenizer.fingerprint()
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    for said in (
        "1,200 steps",
        "7 hours",
        "300 steps",
        "1.5 hours",
        "The 1 training books by their Gutenberg numbers: 7.",
        "own figure | 12.5",
        "5 shapes (4x4,",
        "held for 85%",
    ):
        assert said in card, said
    assert str(tmp_path) not in card and not re.search(r"\n{4,}", card)


def test_what_nobody_told_is_asked_for(checkpoint, config, tmp_path):
    with pytest.raises(UserError, match="--steps and --hours"):
        bundle.main([str(checkpoint), "--config", str(config), "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("setting", "named"),
    [("generator.num_layers=9", "generator"), ("image_tokenizer.codebook_size=8", "image tokenizer"), ("data.grids=[4x4]", "grids"),
     ("train.task_mix={joint: 1.0}", "tasks")],
)  # fmt: skip
def test_the_recipe_of_another_model_is_refused(checkpoint, config, setting, named):
    with pytest.raises(UserError, match=f"the checkpoint's {named} is"):
        bundle.require_shapes(tokun.load(checkpoint), load_config(str(config), [setting]))


def sharpened(model: Tokun, folder, *, encoder: float = 1.0) -> str:
    """A checkpoint as tokun.sharpen writes it after a second sharpening: another decoder, "from" the first. Returns the new fingerprint."""
    model.save(folder)
    copy = tokun.load(folder)
    with torch.no_grad():
        copy.image_tokenizer.decoder.last.weight.mul_(1.5)
        next(copy.image_tokenizer.encoder.parameters()).mul_(encoder)
    copy.save(folder)
    record = {"recipe": {"batch_size": 16}, "from": "0" * 64, "steps": 40, "seconds": 1800}
    (folder / "sharpened.json").write_text(json.dumps(record), encoding="utf-8")
    return copy.image_tokenizer.fingerprint()


def test_a_sharpened_decoder_is_taken_where_it_draws_the_same_codes(shaped_model, checkpoint, config, tmp_path):
    new = sharpened(shaped_model, tmp_path / "sharp")
    make(checkpoint, config, tmp_path / "new", "--sharpened", str(tmp_path / "sharp"))
    assert tokun.load(tmp_path / "new").image_tokenizer.fingerprint() == new
    assert "40 steps of 16 pictures against a discriminator" in (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    sharpened(shaped_model, tmp_path / "other", encoder=1.5)
    with pytest.raises(UserError, match="from another image tokenizer"):
        make(checkpoint, config, tmp_path / "newer", "--sharpened", str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": "/root/x"}', True),
        ("see /home/me/x", True),
        ("https://example.org/data/1", False),
        ("data/described/train-*.tar", False),
    ],
)
def test_paths_of_a_machine_are_found(tmp_path, text, found):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert bundle.machine_paths(tmp_path) == (["config.json"] if found else [])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("`python -m tokun.evaluate --shards '/home/me/data/val-*.tar' --features /home/me/models/squeezenet.safetensors`",
         "`python -m tokun.evaluate --shards 'val-*.tar' --features squeezenet.safetensors`"),
        ("| 1/2 | see https://example.org/a/b, runs/mine/report |", "| 1/2 | see https://example.org/a/b, runs/mine/report |"),
        ("--out=/home/me/report", "--out=report"),
    ],
)  # fmt: skip
def test_a_table_keeps_no_folder_of_the_machine(text, left):
    assert bundle.without_folders(text) == left


@needs_bundle
def test_the_bundle_that_is_there_holds_no_path_of_a_machine_and_no_record_of_a_run():
    assert bundle.machine_paths(BUNDLED) == []
    named = {p.relative_to(BUNDLED).as_posix() for p in BUNDLED.rglob("*") if p.is_file()}
    rest = {name for name in named if not name.startswith("sheets/")}
    assert rest == {
        "README.md", "sampling.json", "vocabulary.json", "text_tokenizer.model", "image_tokenizer/config.json",
        "image_tokenizer/model.safetensors", "matching/config.json", "matching/model.safetensors",
        *(f"generator/{name}" for name in ("config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
                                           "tokenizer.json", "tokenizer_config.json")),
    }  # fmt: skip


@needs_bundle
def test_whatever_the_bundle_is_its_card_names_its_shapes_and_its_tasks():
    model, card = tokun.load(), (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert all(f"{rows}x{columns}" in card for rows, columns in model.grids)
    assert all(task in card for task in model.tasks) and str(model.vocabulary.codebook_size) in card
    assert model.tag_counts and set(asdict(model.defaults)) >= {"temperature", "text_temperature"}


def test_sheets_laid_again_leave_the_others_on_the_card(tmp_path):
    (tmp_path / "README.md").write_text("# A model\n", encoding="utf-8")
    for folder, names in (("all", ("samples", "nearest", "doctor")), ("again", ("samples",))):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("L", (8, 8), 255 if folder == "all" else 0).save(tmp_path / folder / f"{name}.png")
        bundle.main(["--sheets", str(tmp_path / folder), "--out", str(tmp_path)])
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert [card.count(f"![{name}]") for name in bundle.SHEETS] == [1, 1, 1]
    with Image.open(tmp_path / "sheets" / "samples.png") as laid:
        assert laid.convert("L").getextrema() == (0, 0)

"""benchmarks/ablations.py: every change is a setting that there is, and the table says what was measured."""

import json

import pytest

from benchmarks import variants
from benchmarks.ablations import GENERATOR, HOME, STEPS, TOKENIZER, VARIANT, table
from tokun import data
from tokun.config import load_config
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags, Vocabulary


@pytest.mark.parametrize("name", [*GENERATOR, *TOKENIZER])
def test_every_change_changes_a_setting_of_the_config(name):
    path, changes = HOME / "configs" / "engraving-cpu.yaml", {**GENERATOR, **TOKENIZER}[name]
    assert (load_config(path, changes) != load_config(path, [])) == bool(changes)


def test_the_table_gives_means_and_ranges_over_seeds(tmp_path):
    for folder, line in {
        "a": {"name": "baseline", "seed": 0, "image_loss": 6.0, "pmi_first": 0.25},
        "b": {"name": "baseline", "seed": 1, "image_loss": 6.5, "pmi_first": 0.5},
        "c": {"name": "AdamW", "seed": 0, "image_loss": 7.0},
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "line.json").write_text(json.dumps(line))
    head, _, baseline, adamw = table(tmp_path).splitlines()
    assert head == "| change | seeds | nats an image token | PMI first of 16 |"
    assert baseline == "| baseline | 2 | 6.25 (6 to 6.5) | 0.375 (0.25 to 0.5) |"
    assert adamw == "| AdamW | 1 | 7 |  |"


def test_rows_with_a_variant_or_more_steps_are_rows_of_the_table():
    assert set(VARIANT) | set(STEPS) <= set(GENERATOR)
    assert set(VARIANT.values()) <= set(variants.VARIANTS)


@pytest.mark.parametrize("task", ["pack_joint", "pack_text_to_image"])
def test_pictures_alone_end_with_their_picture_under_their_subject(monkeypatch, task):
    v = Vocabulary(text_size=9, codebook_size=4, styles=("etching",), subjects=("dog",), grids=((2, 2),), max_text=8)
    batches = type("Batches", (), {"vocabulary": v})()
    monkeypatch.setattr(
        data.TokenBatches, "pack", lambda self, record, rng: getattr(sequences, task)(v, Tags("etching", "dog"), [3, 0, 1, 2], [5, 6])
    )
    stock = data.TokenBatches.pack
    with variants.applied("pictures"):
        ids = data.TokenBatches.pack(batches, None, None).input_ids
    assert ids == [v.id("<bos>"), v.id("<subject:dog>"), v.id("<boi>"), *(v.code_offset + code for code in (3, 0, 1, 2)), v.id("<eoi>")]
    assert data.TokenBatches.pack is stock

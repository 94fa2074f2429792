"""Words alone: a table of descriptions and captions teaches a register."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tokun
from data_tools import toy
from tests.small_runs import needs
from tokun.cli import train
from tokun.config import from_dict
from tokun.data.tokens import OtherWords
from tokun.tokenizers import sequences
from tokun.training.run import open_run
from tokun.training.text_only import WordsStage, pack_rows, read_rows, train_words

pytestmark = needs("accelerate", reason="training needs the extra 'train'")


def rows(first: int, count: int) -> list[dict[str, str]]:
    """Toy captions, and the same as a studio would post them."""
    texts = [toy.draw(5, i, 32)[1]["captions"]["plain"] for i in range(first, first + count)]
    return [{"description": text, "caption": f"{text.split()[0]} {text.split()[-1]}"} for text in texts]


def settings(out: Path, base: Path, table: Path, **words) -> dict:
    return {
        "out": str(out), "start": str(base), "threads": 1, "tracking": {"kind": "none"}, "generator": {"dropout": 0.0},
        "adapter": {"rank": 4, "alpha": 8.0},
        "words": {"train": str(table), "val": str(table.with_name("val.tsv")), "register": "studio", **words},
        "train": {"steps": 30, "batch_size": 8, "precision": "no", "lr": 0.02, "warmup_steps": 2, "weight_decay": 0.0, "ema_decay": 0.5,
            "log_every": 5, "eval_every": 15},
    }  # fmt: skip


@pytest.fixture
def table(tmp_path) -> Path:
    for name, (first, count) in {"train": (0, 24), "val": (100, 8)}.items():
        lines = ["description\tcaption", *(f"{row['description']}\t{row['caption']}" for row in rows(first, count))]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "train.tsv"


def test_a_table_teaches_a_register_that_the_base_did_not_know(checkpoint_folder, table, tmp_path, capsys):
    tree = settings(tmp_path / "run", checkpoint_folder, table)
    base = tokun.load(checkpoint_folder)
    with pytest.raises(ValueError, match="<register:studio> is not in this vocabulary"):
        base.rewrite("a house", "studio")
    config = from_dict(tree)
    train.train(config, launched=False)
    record = json.loads((tmp_path / "run" / "adapter" / "training.json").read_text())
    assert record["val"]["loss"] < 4.5, "6 nats a token at the start"
    model = tokun.load(checkpoint_folder, adapter=tmp_path / "run")
    assert model.vocabulary.appended == ("<register:studio>",)
    (said,) = model.rewrite("a house", "studio", temperature=0.0)
    assert said.register == "studio" and said.ids
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "adapter").iterdir()}
    assert "words: 8 held-out rows are few: their loss is a rough guide (64 or more tell steps apart)" in capsys.readouterr().out
    train.train(from_dict(tree), launched=False)
    said = capsys.readouterr()
    assert "adapter already exists and matches" in said.out + said.err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "adapter").iterdir()} == written


def test_a_whole_model_has_the_runs_sampling_defaults_and_a_finished_one_says_that_it_keeps_them(
    checkpoint_folder, table, tmp_path, capsys
):
    tree = settings(tmp_path / "run", checkpoint_folder, table) | {"adapter": {}, "sampling": {"n": 0, "temperature": 0.6, "top_p": 1.0}}
    tree["train"] |= {"steps": 2, "eval_every": 10}
    train.train(from_dict(tree), launched=False)
    base, made = tokun.load(checkpoint_folder), tokun.load(tmp_path / "run")
    assert (made.defaults.temperature, made.defaults.top_p) == (0.6, 1.0)
    assert made.defaults.text_temperature == base.defaults.text_temperature
    for asked, told in (
        (0.6, "matches\n"),
        (0.9, "matches. It keeps its own sampling defaults: temperature 0.6, not 0.9. To change them, edit "),
    ):
        tree["sampling"]["temperature"] = asked
        capsys.readouterr()
        train.train(from_dict(tree), launched=False)
        said = capsys.readouterr()
        assert told in said.out + said.err


def test_only_the_caption_is_learnt(tiny_model):
    v = tiny_model.vocabulary
    (packed,) = pack_rows([("a house", "a ship and a tree")], tiny_model, v, "poetic")
    assert sequences.unpack(v, packed.input_ids).task == "rewrite"
    assert packed.input_ids[packed.prompt :] == [*tiny_model.encode_text("a ship and a tree"), v.id("<eoc>"), v.id("<eos>")]


def test_words_of_the_caption_alone_are_dropped_where_they_are_read(tiny_model):
    v, stage = tiny_model.vocabulary, object.__new__(WordsStage)
    stage.items = pack_rows([("a house and two ships", "a ship and a tree on a light ground")], tiny_model, v, "poetic")
    stage.seed, stage.other = 3, OtherWords(v, 0.5)
    (packed,), drawn = stage.items, [stage.row(0, position) for position in range(20)]
    ids = np.array(packed.input_ids)
    words = (np.arange(len(ids)) >= packed.prompt) & (ids < v.text_size)
    assert all((row.input_ids == ids).all() and (row.read[~words] == ids[~words]).all() for row in drawn)
    assert 0.3 < np.mean([(row.read != ids)[words].mean() for row in drawn]) < 0.7
    assert (stage.row(0, 7).read == drawn[7].read).all() and (drawn[7].read != drawn[8].read).any()


def test_of_a_list_of_texts_the_first_is_read_and_what_is_no_text_is_no_words(tmp_path):
    """Both became the words of Python's notation: "['A ship.', 'Plate 4']"."""
    lines = [{"description": ["A ship.", "Plate 4"], "caption": "At sea."}, {"description": {"en": "A ship."}, "caption": "At sea."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_rows(tmp_path / "rows.jsonl", "description", "caption") == [("A ship.", "At sea.")]


def test_a_table_without_its_columns_or_register_is_told_so(checkpoint_folder, table, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"no row with both .description. and .caption.*its columns are text"):
        read_rows(tmp_path / "rows.jsonl", "description", "caption")
    run = open_run(from_dict(settings(tmp_path / "run", checkpoint_folder, table, register="")))
    with pytest.raises(ValueError, match=r"words\.register is empty"):
        train_words(run)
    run.close()
    with pytest.raises(ValueError, match="separate trainings; run one after the other"):
        tree = settings(tmp_path / "both", checkpoint_folder, table) | {"dpo": {"pairs": "p.jsonl"}}
        train.train(from_dict(tree), launched=False)

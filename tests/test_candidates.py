"""Which of several candidates is kept: the scores, and where a checkpoint's own number of candidates counts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.test_sample import records, run
from tokun.cli import sample
from tokun.evaluate import coherence
from tokun.inference import bulk, candidates
from tokun.inference.load import load
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags


def bare(pair):
    return Tags(register=pair.tags.register, grid=pair.tags.grid)


def test_both_orders_of_a_pair_are_scored_in_one_pass_each(shaped_model):
    model = replace(shaped_model, tasks=())
    pairs = model.sample(3, 5)
    tags, codes, captions = [p.tags for p in pairs], [p.codes for p in pairs], [p.caption_ids for p in pairs]
    drawn, written = zip(*model.pair_nll(tags, codes, captions, batch_size=2))
    assert drawn == pytest.approx(model.image_nll(tags, codes), abs=1e-3)
    assert written == pytest.approx(model.caption_nll(tags, captions, codes), abs=1e-3)
    prompted, alone = zip(*model.pair_nll(tags, codes, captions, caption_first=True))
    assert alone == pytest.approx(model.caption_nll(tags, captions), abs=1e-3)
    v = model.vocabulary
    for one, nats in zip(pairs, prompted):
        prompt = sequences.image_prompt(v, one.tags, one.caption_ids)
        whole = [*prompt, *sequences.picture(v, one.tags, one.codes)[1:]]
        assert nats == pytest.approx(model.span_nll([sequences.Packed(whole, len(prompt))])[0], abs=1e-3)


def test_pmi_both_is_the_mean_of_both_directions_without_tags(shaped_model):
    model = replace(shaped_model, tasks=("joint", "text_to_image"))
    pairs = model.sample(3, 4)
    tags, codes, captions = [bare(p) for p in pairs], [p.codes for p in pairs], [p.caption_ids for p in pairs]
    words = model.pmi(tags, captions, codes)
    drawn = model.image_nll(tags, codes)
    prompted = [nats for nats, _ in model.pair_nll(tags, codes, captions, caption_first=True)]
    expected = [(w + i - p) / 2 for w, i, p in zip(words, drawn, prompted)]
    assert candidates.pmi_both(model, pairs) == pytest.approx(expected, abs=1e-4)
    without = replace(model, tasks=("joint",))
    assert candidates.pmi_both(without, pairs) == pytest.approx(words, abs=1e-4)


def test_pmi_both_does_not_look_at_style_subject_and_thing(shaped_model):
    pairs = shaped_model.sample(3, 3)
    others = [replace(pair, tags=replace(pair.tags, style="", subject="", thing="")) for pair in pairs]
    assert candidates.pmi_both(shaped_model, pairs) == candidates.pmi_both(shaped_model, others)


@pytest.fixture
def choosing_folder(checkpoint_folder, tmp_path):
    """A checkpoint that asks for the best of three."""
    shutil.copytree(checkpoint_folder, tmp_path / "choosing")
    path = tmp_path / "choosing" / "sampling.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["defaults"]["best_of"] = 3
    path.write_text(json.dumps(tree), encoding="utf-8")
    return tmp_path / "choosing"


def test_single_pictures_are_the_best_of_as_many_as_the_checkpoint_asks_for(choosing_folder, tmp_path, capsys):
    model = load(choosing_folder, device="cpu")
    chosen = [pair.index for pair in model.best_of(5, 2, 3)]
    run(choosing_folder, tmp_path / "out", "--seed", "5", "--n", "2")
    assert [r["index"] for r in records(tmp_path / "out")] == chosen
    assert [r["file_name"] for r in records(tmp_path / "out")] == ["000005-00.png", "000005-01.png"], "by the number of the choice"
    said = capsys.readouterr().out
    assert "5-00  " in said and "5-01  " in said
    picture, caption = model(5)
    assert (picture.tobytes(), caption) == next((p.image.tobytes(), p.caption) for p in model.best_of(5, 1, 3))
    run(choosing_folder, tmp_path / "asked", "--seed", "5", "--n", "2", "--best-of", "1")
    assert [r["index"] for r in records(tmp_path / "asked")] == [0, 1]
    run(choosing_folder, tmp_path / "reward", "--seed", "5", "--n", "2", "--reward", "likelihood")
    assert [r["index"] // 3 for r in records(tmp_path / "reward")] == [0, 1]


def test_shards_and_other_directions_are_as_drawn(choosing_folder, tmp_path):
    run(choosing_folder, tmp_path / "shards", "--seed", "5", "--n", "2", "--shard-size", "2")
    record = json.loads((tmp_path / "shards" / "samples.json").read_text(encoding="utf-8"))
    assert record["n"] == 2
    run(choosing_folder, tmp_path / "way", "--interpolate", "5", "6", "--steps", "3")
    model = load(choosing_folder, device="cpu")
    assert records(tmp_path / "way")[0]["codes"] == model.sample(5, 1)[0].codes


@pytest.mark.parametrize("option", [["--pairs", "pairs.jsonl"], ["--reward", "likelihood"]])
def test_a_choice_without_candidates_is_refused(checkpoint_folder, tmp_path, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="say how many with --best-of"):
        run(checkpoint_folder, tmp_path / "out", "--n", "1", *option)


@pytest.mark.parametrize("number", [0, 10_001, 2.5, "three"])
def test_a_checkpoint_that_asks_for_an_impossible_number_is_refused(choosing_folder, number):
    path = choosing_folder / "sampling.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["defaults"]["best_of"] = number
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ValueError, match="best-of is"):
        load(choosing_folder, device="cpu")


def test_the_number_is_listed_in_the_help(choosing_folder, capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--checkpoint", str(choosing_folder), "--help"])
    assert "best_of 3" in capsys.readouterr().out


def test_how_many_candidates_a_checkpoint_asks_for_does_not_make_its_samples_others(choosing_folder, checkpoint_folder):
    """An unfinished folder of shards is gone on with."""
    assert bulk.identity(load(choosing_folder, device="cpu")) == bulk.identity(load(checkpoint_folder, device="cpu"))


def test_the_rank_by_both_directions_is_that_of_the_score(shaped_model):
    model = replace(shaped_model, tasks=("joint", "text_to_image"))
    pairs = model.sample(3, 5)
    rows = np.array([[i, *(j for j in range(5) if j != i)] for i in range(5)])
    bare = [replace(pair, tags=Tags(register=pair.tags.register, grid=pair.tags.grid)) for pair in pairs]
    table = coherence.pmi_of(model, bare, rows) - coherence.drawn_nats(model, bare, rows)
    for i, row in enumerate(rows):
        mixed = [replace(pairs[i], caption_ids=pairs[j].caption_ids) for j in row]
        scores = np.array(candidates.pmi_both(model, mixed)) * 2
        assert table[i] - table[i, 0] == pytest.approx(scores - scores[0], abs=1e-3)

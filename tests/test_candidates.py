"""Which of several candidates is kept: the scores, and where a checkpoint's own number of candidates counts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import tokun
from tests.test_sample import records, run
from tokun.cli import sample
from tokun.config import from_dict
from tokun.data import ShardIndex
from tokun.evaluate import coherence
from tokun.inference import bulk, candidates, sampling
from tokun.inference import model as module
from tokun.inference.load import load
from tokun.tokenizers import sequences
from tokun.utils.errors import UserError


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
    tags, codes, captions = [p.tags.without_kinds() for p in pairs], [p.codes for p in pairs], [p.caption_ids for p in pairs]
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
    (picture, caption), (best,) = model(5), model.best_of(5, 1, 3)
    assert (picture.tobytes(), caption) == (best.image.tobytes(), best.caption)
    run(choosing_folder, tmp_path / "asked", "--seed", "5", "--n", "2", "--best-of", "1")
    assert [r["index"] for r in records(tmp_path / "asked")] == [0, 1]
    run(choosing_folder, tmp_path / "reward", "--seed", "5", "--n", "2", "--reward", "likelihood")
    surest = model.best_of(5, 2, 3, lambda pairs: [-p.caption_nll for p in pairs])
    assert [r["index"] for r in records(tmp_path / "reward")] == [p.index for p in surest]
    run(choosing_folder, tmp_path / "pairs", "--seed", "5", "--n", "2", "--pairs", str(tmp_path / "p.jsonl"))
    assert [r["file_name"] for r in records(tmp_path / "pairs")] == ["000005-00.png", "000005-01.png"]


def test_shards_and_other_directions_are_as_drawn(choosing_folder, tmp_path):
    run(choosing_folder, tmp_path / "shards", "--seed", "5", "--n", "2", "--shard-size", "2")
    model = load(choosing_folder, device="cpu")
    index = ShardIndex([tmp_path / "shards" / "samples-00000.tar"], need=("json",)).usable()
    assert [index.read_json(i)["codes"] for i in range(len(index))] == [pair.codes for pair in model.sample(5, 2)]
    run(choosing_folder, tmp_path / "way", "--interpolate", "5", "6", "--steps", "3")
    assert records(tmp_path / "way")[0]["codes"] == model.sample(5, 1)[0].codes


@pytest.mark.parametrize("option", [["--pairs", "pairs.jsonl"], ["--reward", "likelihood"], ["--clip", "folder"]])
def test_a_choice_without_candidates_is_refused(checkpoint_folder, tmp_path, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="say how many with --best-of"):
        run(checkpoint_folder, tmp_path / "out", "--n", "1", *option)


@pytest.mark.parametrize("option", [["--pairs", "p.jsonl"], ["--reward", "pmi"], ["--clip", "folder"]])
def test_a_choice_of_shards_is_refused(choosing_folder, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        run(choosing_folder, tmp_path / "out", "--n", "2", "--shard-size", "2", *option)
    assert "shards hold single draws" in capsys.readouterr().err


def test_choices_are_written_a_few_at_a_time_and_gone_on_with_after_a_kill(choosing_folder, tmp_path, monkeypatch):
    asked = ["--seed", "5", "--n", "3", "--batch-size", "4"]
    run(choosing_folder, tmp_path / "whole", *asked)
    own, calls = candidates.best_of, []

    def dies(*given, first, **options):
        calls.append(first)
        if first == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return own(*given, first=first, **options)

    monkeypatch.setattr(candidates, "best_of", dies)
    with pytest.raises(KeyboardInterrupt):
        run(choosing_folder, tmp_path / "killed", *asked)
    run(choosing_folder, tmp_path / "killed", *asked)
    assert calls == [0, 1, 1, 2], "four candidates at a time are those of one pair; a finished one is not drawn again"
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert [r["file_name"] for r in records(tmp_path / "whole")] == [f"000005-0{k}.png" for k in range(3)]


def test_choices_beside_single_draws_of_the_same_folder_replace_nothing(choosing_folder, tmp_path):
    run(choosing_folder, tmp_path / "out", "--seed", "5", "--n", "3", "--best-of", "1")
    single = records(tmp_path / "out")
    run(choosing_folder, tmp_path / "out", "--seed", "5", "--n", "3")
    assert records(tmp_path / "out" / "earlier" / "1") == single != records(tmp_path / "out")


def test_a_pipeline_keeps_the_best_unless_it_is_told_otherwise(choosing_folder):
    pipe, model = tokun.pipeline(choosing_folder), load(choosing_folder, device="cpu")
    seed = next(seed for seed in range(20) if model.best_of(seed, 1, 3)[0].index)
    (best,), (first,) = model.best_of(seed, 1, 3), model.sample(seed, 1)
    assert pipe(seed)["caption"] == model(seed)[1] == best.caption != first.caption == pipe(seed, best_of=1)["caption"]


def test_the_first_candidate_is_watched_in_every_batch(shaped_model):
    seed = next(s for s in range(40) if len({len(p.codes) for p in shaped_model.sample(s, 2)}) == 2)
    first, _ = shaped_model.sample(seed, 2)
    seen = []
    shaped_model.best_of(seed, 1, 2, batch_size=1, watch=lambda codes, words: seen.append((list(codes), list(words))))
    assert len(seen) > len(first.codes) and all(codes == first.codes[: len(codes)] for codes, _ in seen)
    assert seen[-1] == (first.codes, first.caption_ids)


@pytest.mark.parametrize("number", [0, 10_001, 2.5, "three"])
def test_a_checkpoint_that_asks_for_an_impossible_number_is_refused(choosing_folder, number):
    path = choosing_folder / "sampling.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["defaults"]["best_of"] = number
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ValueError, match=r"sampling.json: defaults.best_of is .*; it must be a whole number from 1 to 10,000"):
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
    bare = [replace(pair, tags=pair.tags.without_kinds()) for pair in pairs]
    table = coherence.pmi_of(model, bare, rows) - coherence.drawn_nats(model, bare, rows)
    for i, row in enumerate(rows):
        mixed = [replace(pairs[i], caption_ids=pairs[j].caption_ids) for j in row]
        scores = np.array(candidates.pmi_both(model, mixed)) * 2
        assert table[i] - table[i, 0] == pytest.approx(scores - scores[0], abs=1e-3)


def test_no_pairs_have_no_scores(tiny_model):
    assert candidates.pmi_both(tiny_model, []) == []


def test_sequences_are_scored_fewer_at_a_time_where_their_logits_are_many(shaped_model, monkeypatch):
    pairs = shaped_model.sample(3, 5)
    at_once, sizes, own = candidates.pmi_both(shaped_model, pairs), [], sampling.token_nll
    tags = [p.tags.without_kinds() for p in pairs]
    longest = max(len(sequences.pair_to_score(shaped_model.vocabulary, t, p.codes, p.caption_ids)) for t, p in zip(tags, pairs))
    monkeypatch.setattr(module, "MOST_LOGITS", 2 * shaped_model.generator.config.vocab_size * longest)
    monkeypatch.setattr(sampling, "token_nll", lambda model, v, ids, begin: sizes.append(len(ids)) or own(model, v, ids, begin))
    assert candidates.pmi_both(shaped_model, pairs) == pytest.approx(at_once, abs=1e-3)
    assert sizes == [2, 2, 1] * 2, "in both orders"


def test_the_rank_by_both_directions_is_of_a_few_pairs(shaped_model, monkeypatch):
    monkeypatch.setattr(coherence, "DRAWN", 3)
    alone, both = coherence.without_tags(replace(shaped_model, tasks=()), shaped_model.sample(3, 5), "generated", 0)
    assert (alone.n, both.n) == (5, 3)


def test_a_config_that_asks_for_too_many_is_refused():
    with pytest.raises(UserError, match=r"sampling.best_of is 20000; it must be at most 10,000"):
        from_dict({"sampling": {"best_of": 20_000}})
    with pytest.raises(UserError, match=r"sampling.best_of is 0; it must be at least 1"):
        from_dict({"sampling": {"best_of": 0}})

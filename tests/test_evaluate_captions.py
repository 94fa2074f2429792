"""The figures of words, of coherence and of other models' opinions: fast ways against slow ones, extremes, chance, every loader."""

import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests import test_captioners, test_clip
from tokun.evaluate import captions as caption_figures
from tokun.evaluate import coherence, judges
from tokun.evaluate.held_out_pairs import RealPair, read_pairs
from tokun.inference import conditional_generation
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags, tag_word
from tokun.utils.errors import UserError

TEXTS = [
    "A ship on the open sea", "Two horses before an old mill", "Portrait of a lady with a fan", "The cathedral of Amiens from the west",
    "Fishermen mending their nets", "A street in Cairo", "View of the harbour at night", "The fox and the grapes in a garden",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tiny_model):
    return tiny_model.sample(3, n=8, text_temperature=1.0)


@pytest.fixture(scope="module")
def held_out(tiny_model, toy_shards) -> list[RealPair]:
    return read_pairs(tiny_model, str(toy_shards / "train-*.tar"), limit=12)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> str:
    pytest.importorskip("open_clip", reason="open_clip is not installed (extra 'clip')")
    return test_clip.tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


def test_captions_of_held_out_pictures_are_written_as_the_checkpoint_writes_them(tiny_model, held_out, monkeypatch):
    monkeypatch.setattr(tiny_model, "defaults", replace(tiny_model.defaults, text_temperature=1.0, text_guidance_scale=4.0))
    (guided,) = caption_figures.captions_for(tiny_model, held_out[:1], 5)
    (own,) = conditional_generation.caption(tiny_model, held_out[0].image, seed=5)
    assert guided == own.text
    monkeypatch.setattr(tiny_model.defaults, "text_guidance_scale", 1.0)
    assert caption_figures.captions_for(tiny_model, held_out[:12], 5)[0] != guided


def test_subjects_are_named_as_the_model_answers(tiny_model, held_out, monkeypatch):
    assert caption_figures.subjects_named(tiny_model, held_out) == [], "of a model without questions nothing is said"
    monkeypatch.setattr(tiny_model, "tasks", ("joint", "question"))
    answers = [tiny_model.ask(pair.image, "What is its subject?", temperature=0.0)[0].text for pair in held_out]
    assert caption_figures.answers_to(tiny_model, "What is its subject?", held_out) == answers
    told = [
        replace(pair, tags=replace(pair.tags, subject=tag_word(answer) if i % 3 else ""))
        for i, (pair, answer) in enumerate(zip(held_out, answers))
    ]
    (all_right,) = caption_figures.subjects_named(tiny_model, told)
    assert (all_right.value, all_right.n) == (1.0, sum(bool(pair.tags.subject) for pair in told)) and all_right.n > 0
    wrong = [replace(pair, tags=replace(pair.tags, subject="a-comet")) for pair in held_out]
    (other_questions,) = caption_figures.subjects_named(tiny_model, wrong)
    assert math.isnan(other_questions.value) and "no answer to 'What is its subject?' is a subject" in other_questions.note
    monkeypatch.setattr(caption_figures, "answers_to", lambda model, _, pairs: [model.subjects[0]] * len(pairs))
    (none_right,) = caption_figures.subjects_named(tiny_model, wrong)
    assert (none_right.value, none_right.n) == (0.0, len(held_out)) and "commonest is 100.0%" in none_right.note


def test_questions_are_answered_as_the_model_answers_and_told_wording_by_wording(tiny_model, held_out, monkeypatch):
    assert caption_figures.questions_answered(tiny_model, held_out) == [], "of a model without questions nothing is said"
    monkeypatch.setattr(tiny_model, "tasks", ("joint", "question"))
    questions = ["Is this a moth?", "How many are there in all of it?"] * (len(held_out) // 2) + ["Is this a moth?"] * (len(held_out) % 2)
    answers = [tiny_model.ask(pair.image, question, temperature=0.0)[0].text for pair, question in zip(held_out, questions)]
    assert caption_figures.answers_to(tiny_model, questions, held_out) == answers
    monkeypatch.setattr(caption_figures, "answers_to", lambda model, asked, pairs: ["yes" if "moth" in text else "two" for text in asked])
    asked = [
        replace(pair, questions=(("Is this a moth?", "yes" if i % 4 else "no"), ("How many are there?", "two"), ("What is shown?", str(i))))
        for i, pair in enumerate(held_out)
    ]
    found = {figure.name.partition(": ")[2]: figure for figure in caption_figures.questions_answered(tiny_model, asked)}
    n = len(held_out)
    assert found.keys() == {"is this a moth", "how many are there"}, "what is shown has an answer of its own for each picture"
    assert found["is this a moth"].value == pytest.approx(sum(i % 4 > 0 for i in range(n)) / n) and found["how many are there"].value == 1
    assert "always 'yes': 7" in found["is this a moth"].note and "always 'two': 100.0%" in found["how many are there"].note
    pairwise = [replace(held_out[0], questions=(("Is this a moth?", "yes"), ("Is this a moth?", "no")))] * caption_figures.MOST_ASKED
    (balanced,) = caption_figures.questions_answered(tiny_model, pairwise)
    assert balanced.n == caption_figures.MOST_ASKED and 0.3 < balanced.value < 0.7, "not every second one"
    monkeypatch.setattr(tiny_model, "question_wordings", ("how many …",))
    assert [figure.name for figure in caption_figures.questions_answered(tiny_model, asked)] == [
        "question answered right, held-out: how many …"
    ]


# --- coherence --------------------------------------------------------------------------------------------------------


def test_pmi_by_shared_prefixes_is_that_of_the_model(tiny_model, pairs, held_out):
    for some in (pairs, held_out):  # with tags of their own, and all with the same
        candidates = np.array([[i, (i + 1) % len(some), (i + 3) % len(some)] for i in range(len(some))])
        fast = coherence.pmi_of(tiny_model, some, candidates)
        for i, row in enumerate(candidates):
            captions = [some[j].caption_ids for j in row]
            slow = tiny_model.pmi([some[i].tags] * 3, captions, [some[i].codes] * 3)
            assert np.allclose(fast[i], slow, atol=1e-3)
            assert fast[i].argmax() == np.argmax(slow)


def test_pmi_without_tags_withholds_style_subject_and_thing(tiny_model, held_out):
    found, both = coherence.without_tags(tiny_model, held_out, "held-out", 0)
    assert both.name.startswith("PMI in both directions, without tags, ranks the own caption first of") and both.n == len(held_out)
    assert found.name.startswith("PMI without tags ranks the own caption first of") and found.n == len(held_out)
    _, others = coherence.rivals([tuple(pair.caption_ids) for pair in held_out], 0)
    right = []
    for i, row in enumerate(others):
        candidates = [held_out[j].caption_ids for j in (i, *row)]
        tags = Tags(register=held_out[i].tags.register, grid=held_out[i].tags.grid)
        pmi = tiny_model.pmi([tags] * len(candidates), candidates, [held_out[i].codes] * len(candidates))
        right.append(pmi[0] > max(pmi[1:]))
    assert found.value == pytest.approx(np.mean(right))


def test_pmi_without_tags_is_not_told_twice_of_pairs_without_any(tiny_model, held_out, monkeypatch):
    bare = [replace(pair, tags=pair.tags.without_kinds()) for pair in held_out]
    (both,) = coherence.without_tags(replace(tiny_model, tasks=("joint", "text_to_image")), bare, "held-out", 0)
    assert both.name.startswith("PMI in both directions")
    monkeypatch.setattr(coherence, "pmi_of", lambda *_: pytest.fail("computed for nothing"))
    assert coherence.without_tags(replace(tiny_model, tasks=("joint",)), bare, "held-out", 0) == []


def test_nats_of_a_caption_do_not_depend_on_its_company(tiny_model, pairs):
    prefix = sequences.caption_prompt(tiny_model.vocabulary, pairs[0].tags, None)
    captions = [pair.caption_ids for pair in pairs]
    longest = [*captions[0], *captions[1], *captions[2]][: tiny_model.vocabulary.max_text]  # full: only its end may follow
    together = coherence.caption_nats(tiny_model, prefix, [*captions, longest], rows=4)
    assert np.allclose(together, [coherence.caption_nats(tiny_model, prefix, [c])[0] for c in [*captions, longest]], atol=1e-3)


def test_captions_that_read_alike_are_no_rivals():
    captions = ["a", "a", "a", "b", "c", "c"]
    _, others = coherence.rivals(captions, seed=0)
    assert others.shape == (6, 2)
    assert all(captions[j] != captions[i] for i, row in enumerate(others) for j in row)
    assert coherence.rivals(["a", "a"], seed=0)[1].size == 0
    own_twice = np.ones((6, 6))  # scores that know nothing
    figures = {f.name: f.value for f in coherence.ranking_figures("x", "y", own_twice, captions, 0)}
    assert figures["x ranks the own caption first of 3, y"] == 0 and figures["x finds the caption of a picture, R@1 of 6, y"] == 0


def test_scores_that_know_find_every_pair_and_shuffled_captions_score_as_chance():
    rng = np.random.default_rng(0)
    captions = list(range(260))
    knowing = rng.random((260, 260)) + np.eye(260)
    found = coherence.ranking_figures("x", "y", knowing, captions, seed=1)
    assert [figure.n for figure in found] == [260, 256, 256, 256, 256]
    assert all(figure.value == 1 for figure in found)
    shuffled = coherence.ranking_figures("x", "y", knowing[:, rng.permutation(260)], captions, seed=1)
    for figure, chance in zip(shuffled, (1 / 16, 1 / 64, 5 / 64, 1 / 64, 5 / 64)):
        assert figure.low <= chance <= figure.high and figure.note == f"chance {chance:.1%}"


def test_one_caption_for_all_leaves_nothing_to_choose(tiny_model, pairs):
    same = [replace(pair, caption_ids=pairs[0].caption_ids) for pair in pairs]
    assert coherence.measure(tiny_model, [], same, seed=0) == []


def test_every_figure_has_a_name_of_its_own_and_a_value(tiny_model, pairs, held_out, tiny_clip, tmp_path):
    found = caption_figures.measure(tiny_model, held_out, pairs, seed=0, training=[held_out[0].caption])
    found += coherence.measure(tiny_model, held_out, pairs, seed=0, clip=tiny_clip, judge=tiny_clip, out=tmp_path)
    with Image.open(tmp_path / "ranks.png") as plot:
        assert plot.size == (900, 600)
    ranks = coherence.by_pmi(tiny_model, held_out, "held-out", 0)[2]
    assert (
        np.mean(ranks == 1) == next(figure.value for figure in found if figure.name.startswith("PMI ranks the own caption first"))
        and ranks.min() >= 1
    )
    assert len({figure.name for figure in found}) == len(found)
    assert np.isfinite([figure.value for figure in found]).all()
    by_name = {figure.name: figure for figure in found}
    assert by_name["captions that training holds word for word, held-out"].value >= 1 / 12
    nats = tiny_model.caption_nll([p.tags for p in held_out], [p.caption_ids for p in held_out])
    assert by_name["held-out nats a text token, without a picture"].value == pytest.approx(
        sum(nats) / sum(len(p.caption_ids) + 1 for p in held_out)
    )
    pmi = tiny_model.pmi([p.tags for p in held_out], [p.caption_ids for p in held_out], [p.codes for p in held_out])
    assert by_name["PMI of the own caption, held-out"].value == pytest.approx(np.mean(pmi), abs=1e-3)


# --- words ------------------------------------------------------------------------------------------------------------


def test_identical_texts_agree_fully_and_those_of_other_pictures_hardly():
    found = {figure.name: figure.value for figure in caption_figures.agreement(TEXTS, TEXTS, seed=0)}
    assert found["BLEU-1"] == found["BLEU-4"] == pytest.approx(1) and found["CIDEr"] == pytest.approx(10)
    assert found["BLEU-4, chance"] == 0 and found["BLEU-1, chance"] < 0.3 and found["CIDEr, chance"] < 1


def test_bleu_clips_repeated_words_and_punishes_short_captions():
    def score(candidate, reference, n):
        return caption_figures.bleu(np.array([caption_figures.bleu_counts(candidate.split(), reference.split())]), n)

    assert score("the the the the the the the", "the cat is on the mat", 1) == pytest.approx(2 / 7)  # the paper's own example
    assert score("the cat", "the cat is on", 2) == pytest.approx(np.exp(1 - 4 / 2))
    assert score("a dog", "the cat is on", 1) == 0


def test_cider_weighs_rare_words_above_common_ones():
    real = ["the ship sails", "the horse runs", "the mill turns"]
    rare, common = (caption_figures.cider([text, *real[1:]], real)[0] for text in ("a ship", "the mouse"))
    assert rare > common == 0  # "the" stands in every reference and tells nothing


def test_looped_and_repeating_captions_are_counted():
    texts = ["A ship, a ship", "the old mill by the old mill by the river", "The quick, quick fox", "A ship at sea"]
    assert [caption_figures.loops(text) for text in texts] == [True, True, True, False]
    assert [caption_figures.repeats(text) for text in texts] == [False, True, False, False]
    assert caption_figures.distinct(["a a", "a b"], 1) == 2 / 4 and caption_figures.distinct(["a b", "a b"], 2) == 1 / 2


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("The cathedral of", True), ("A ship,", True), ("View of the cathed", True), ("", True), ("...", True), ("Plate (", True),
        ("View of the cathedral", False), ("What they are made of.", False), ("A ship at sea", False), ("Plan B", False), ("Arms", False),
    ],
)  # fmt: skip
def test_unfinished_captions_are_told_by_their_ends(text, cut):
    known = Counter(caption_figures.words("View of the cathedral. A ship at sea. Plan"))
    assert caption_figures.unfinished(text, known, no_room=False) is cut
    assert caption_figures.unfinished(text, known, no_room=True)


# --- judges -----------------------------------------------------------------------------------------------------------


def head(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(16, 1)
    sizes = [16, 12, 8, 1]
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    between = {"mlp": [nn.Dropout(0.2)], "relu": [nn.ReLU(), nn.Dropout(0.2)]}[kind]
    whole = nn.Module()
    whole.layers = nn.Sequential(linear[0], *between, linear[1], *between, linear[2])
    return whole


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_heads_of_both_layouts_and_files_score_as_their_own_network(tmp_path, pictures, tiny_clip, kind, suffix):
    network, path = head(kind), tmp_path / f"head{suffix}"
    (torch.save if suffix == ".pth" else save_file)(network.state_dict(), path)
    judge = judges.Aesthetic(str(path), tiny_clip)
    features = judge.clip.features(pictures)
    assert np.allclose(features.norm(dim=1), 1, atol=1e-5)
    own = network if kind == "linear" else network.layers
    with torch.inference_mode():
        assert judge.score(pictures) == pytest.approx(own.eval()(features)[:, 0].tolist(), abs=1e-5)


def test_heads_that_cannot_be_right_are_refused(tmp_path, pictures, tiny_clip):
    torch.save(head("relu").state_dict(), tmp_path / "relu.pth")
    with pytest.raises(ValueError, match=r"relu.pth is not an aesthetic head of linear layers.*use sac\+logos"):
        judges.load_head(tmp_path / "relu.pth")
    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "seven.pth")
    with pytest.raises(ValueError, match=r"takes 7 features, .* gives 16: give the CLIP that it was trained on"):
        judges.Aesthetic(str(tmp_path / "seven.pth"), tiny_clip).score(pictures)
    torch.save(head("mlp"), tmp_path / "whole.pth")  # a pickled network, which could run anything
    with pytest.raises(ValueError, match=r"whole.pth cannot be read as tensors"):
        judges.load_head(tmp_path / "whole.pth")
    save_file({"visual.conv1.weight": torch.zeros(4, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"it holds visual.conv1.weight"):
        judges.load_head(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="name the file of an aesthetic head"):
        judges.load_head(tmp_path / "nothing.pth")


@pytest.fixture(scope="module")
def tiny_vqa(tmp_path_factory) -> dict[str, str]:
    """A PaliGemma and a chat model that know yes and no."""
    patch, folders = pytest.MonkeyPatch(), {}
    patch.setattr(test_captioners, "WORDS", [*test_captioners.WORDS, "yes", "no", "Yes"])
    for make in (test_captioners.paligemma, test_captioners.llava):
        folders[make.__name__] = test_captioners.save(make, tmp_path_factory.mktemp("vqa") / make.__name__)
    patch.undo()
    return folders


@pytest.mark.parametrize("name", ["paligemma", "llava"])
def test_a_vqa_judge_weighs_yes_against_no_at_the_first_token(tiny_vqa, pictures, name):
    judge = judges.Vqa(tiny_vqa[name])
    questions = ["what shows the picture", "a ship", "what"]
    found = judge.yes(pictures, questions)
    vocabulary = judge.processor.tokenizer.get_vocab()
    for p, picture, question in zip(found, pictures, questions):
        with torch.inference_mode():
            shares = judge.model(**judge.inputs(picture.convert("RGB"), question)).logits[0, -1].softmax(-1)
        yes, no = float(shares[vocabulary["yes"]] + shares[vocabulary["Yes"]]), float(shares[vocabulary["no"]])
        assert p == pytest.approx(yes / (yes + no), abs=1e-5)
    assert len(set(found)) > 1


def test_vqa_models_that_cannot_answer_are_refused(tmp_path, tiny_vqa):
    with pytest.raises(ValueError, match=r"nowhere cannot be loaded as a visual question answering model: .*Give google/paligemma"):
        judges.Vqa(str(tmp_path / "nowhere"))
    plain = test_captioners.save(test_captioners.paligemma, tmp_path / "paligemma")
    with pytest.raises(ValueError, match="has no distinct tokens for yes and no"):
        judges.Vqa(plain)


def test_our_own_model_answers_only_where_it_was_trained_on_questions(tiny_model, pairs):
    with pytest.raises(ValueError, match="was not trained on the task 'question'"):
        judges.Own(replace(tiny_model, tasks=("joint",)))
    asked = replace(tiny_model, tasks=("joint", "question"))
    found = judges.measure(asked, pairs, seed=0)
    assert [figure.n for figure in found] == [8, 8] and all(0 < figure.value < 1 for figure in found)
    assert judges.measure(replace(tiny_model, tasks=("joint",)), pairs, seed=0) == []


def test_our_own_model_reads_all_questions_together_and_answers_each_as_if_alone(tiny_model, pictures, monkeypatch):
    asked = replace(tiny_model, tasks=("joint", "question"))
    judge, questions = judges.Own(asked), ["what shows the picture", "a ship", "what"]
    alone = [judge.yes([picture], [question])[0] for picture, question in zip(pictures, questions)]
    sizes, forward = [], asked.generator.forward
    monkeypatch.setattr(asked.generator, "forward", lambda **given: sizes.append(len(given["input_ids"])) or forward(**given))
    assert judge.yes(pictures[:3], questions) == pytest.approx(alone, abs=1e-6) and len(set(alone)) == 3
    assert sizes == [6], "yes and no of three pictures"


def test_f_beta_joins_answers_and_beauty_as_in_the_competition(tmp_path, tiny_model, pairs, tiny_clip, tiny_vqa):
    assert judges.f_beta(0.5, 0.5) == 0.5 and judges.f_beta(0, 1) == 0
    assert judges.f_beta(0.9, 0.3) > judges.f_beta(0.3, 0.9)  # beta 0.5 weighs the answer above the beauty
    network = nn.Linear(16, 1)
    nn.init.constant_(network.bias, 5.0)
    torch.save(network.state_dict(), tmp_path / "head.pth")
    found = judges.measure(tiny_model, pairs[:4], seed=0, clip=tiny_clip, aesthetic=str(tmp_path / "head.pth"), vqa=tiny_vqa["paligemma"])
    values = {figure.name.partition(",")[0]: figure.value for figure in found}
    assert values["aesthetic score"] == pytest.approx(5, abs=1) and 0 < values["F-beta of P(yes) and aesthetic score"] < 1


def test_scorers_are_opened_before_anything_is_measured(tiny_model, pairs, tmp_path, monkeypatch):
    pytest.importorskip("open_clip", reason="open_clip is not installed (extra 'clip')")
    monkeypatch.setattr(coherence, "by_pmi", lambda *_: pytest.fail("hours of work"))
    with pytest.raises(UserError, match=r"^--judge \S*none names no weights"):
        coherence.measure(tiny_model, [], pairs, seed=0, judge=str(tmp_path / "none"))
    monkeypatch.setattr(judges.Own, "yes", lambda *_: pytest.fail("hours of work"))
    monkeypatch.setattr(judges.Aesthetic, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(judges.Aesthetic, "score", lambda *_: pytest.fail("hours of work"))
    with pytest.raises(UserError, match="cannot be loaded as a visual question answering model"):
        judges.measure(replace(tiny_model, tasks=("question",)), pairs[:2], seed=0, aesthetic="head.pth", vqa=str(tmp_path))


# --- the judge of benchmarks/clip_judge.py ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_clip_judge_trains_goes_on_and_is_loaded(tmp_path, toy_shards, capsys):
    pytest.importorskip("open_clip", reason="open_clip is not installed (extra 'clip')")
    from benchmarks import clip_judge

    shards = str(toy_shards / "train-*.tar")
    base = ["--train", shards, "--val", shards, "--out", str(tmp_path / "judge"), "--batch-size", "8"]
    clip_judge.main([*base, "--minutes", "0.002"])
    first = torch.load(tmp_path / "judge" / "state.pt", weights_only=True)
    clip_judge.main([*base, "--minutes", str(first["spent"] / 60 + 0.002)])
    second = torch.load(tmp_path / "judge" / "state.pt", weights_only=True)
    assert second["step"] > first["step"] > 0
    said = capsys.readouterr().out
    assert f"from step {first['step']}" in said and "judge finds the own caption first of 16" in said
    clip = judges.Clip(str(tmp_path / "judge"))
    assert clip.similarities([Image.new("L", (40, 40))], ["a disc", "a star"]).shape == (1, 2)
    assert json.loads((Path(tmp_path) / "judge" / "open_clip_config.json").read_text())["model_cfg"] == clip_judge.CONFIG
    assert sorted(os.listdir(tmp_path / "judge")) == ["open_clip_config.json", "open_clip_model.safetensors", "state.pt"]
    with pytest.raises(ValueError, match="holds a judge with another --size"):
        clip_judge.main([*base, "--minutes", "9", "--size", "32"])


def test_the_clip_judge_learns_descriptions_out_of_a_table(tmp_path, toy_shards):
    from benchmarks import clip_judge
    from tokun.evaluate.held_out_pairs import described, read_table, squares

    keys = [key for key, _, _ in described(str(toy_shards), squares(32))][:4]
    rows = "".join(f'{toy_shards.name}\t{key}\t{i % 2}\tA "thing" number {i}.\n' for i, key in enumerate(keys))
    (tmp_path / "table.tsv").write_text("folder\tkey\tuse\tdescription\n" + rows)
    pictures, captions = clip_judge.read(str(toy_shards), 32, read_table(tmp_path / "table.tsv"))
    assert pictures.shape == (2, 1, 32, 32) and captions == ['A "thing" number 1.', 'A "thing" number 3.']
    (tmp_path / "other.tsv").write_text("key\tdescription\n")
    with pytest.raises(ValueError, match="has no column folder"):
        read_table(tmp_path / "other.tsv")


def test_the_package_imports_no_data_tools_and_no_script():
    for path in Path(coherence.__file__).parents[1].rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (data_tools|benchmarks|sample|train)\b", path.read_text(encoding="utf-8"), re.MULTILINE), (
            path
        )

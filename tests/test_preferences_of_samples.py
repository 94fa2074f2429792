"""Promises of `python -m benchmarks.preferences`: it draws and scores, goes on when started again, and compares like with like."""

import argparse
import json
import shutil

import numpy as np
import pytest

from benchmarks import preferences as benchmark
from tests.test_losses import random_squeezenet
from tokun.evaluate import recognition
from tokun.inference import preferences
from tokun.utils.errors import UserError


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A folder with the random weights of a network and a judge; the vectors and the two kinds of texts that it was fitted on."""
    folder = tmp_path_factory.mktemp("judge")
    random_squeezenet(folder / "net.safetensors")
    vectors = np.random.default_rng(0).normal(size=(160, 1024)).astype(np.float32)
    vectors[1::2, 0] += 9
    texts = [f"{what}, number {i}" for i in range(80) for what in ("a tree with stippling", "a large house on a dark ground")]
    recognition.save(folder / "judge.npz", recognition.fit(vectors, texts), "{}")
    return folder, vectors, texts


def test_own_words_stand_above_the_mean_and_those_of_others_below(judge):
    folder, vectors, texts = judge
    with np.load(folder / "judge.npz") as kept:
        fitted = recognition.Judge.from_arrays(kept)
    own, other = (benchmark.recognition(fitted, vectors, words, texts) for words in (texts, texts[1:] + texts[:1]))
    assert own.shape == (160,) and own.mean() > 0.5
    np.testing.assert_allclose(own, -other, atol=1e-3)


@pytest.mark.parametrize(("prompted", "each"), [(False, 2), (True, 2), (True, 3)])
def test_a_draw_that_was_killed_goes_on_with_the_same_bytes(judge, checkpoint_folder, toy_shards, tmp_path, monkeypatch, prompted, each):
    monkeypatch.setattr(benchmark, "ROWS", 4)
    asked = dict(
        checkpoint=str(checkpoint_folder), scorer=str(checkpoint_folder), judge=judge[0] / "judge.npz",
        network=str(judge[0] / "net.safetensors"), descriptions=str(toy_shards / "train-*.tar"),
        prompted=prompted, each=each, seed=3, n=10,
    )  # fmt: skip
    benchmark.draw(argparse.Namespace(**asked, out=tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_text()
    killed = tmp_path / "killed.jsonl"
    killed.write_text(whole[: len(whole) * 3 // 4])
    with pytest.raises(UserError, match="holds something else"):
        benchmark.draw(argparse.Namespace(**asked, out=killed))
    shutil.copy(tmp_path / "whole.json", tmp_path / "killed.json")
    with pytest.raises(UserError, match=r"seed: 3 .* 4"):
        benchmark.draw(argparse.Namespace(**asked | {"seed": 4}, out=killed))
    benchmark.draw(argparse.Namespace(**asked, out=killed))
    assert killed.read_text() == whole
    lines = [json.loads(line) for line in whole.splitlines()]
    assert len({json.dumps(line["sample"]["codes"]) for line in lines}) == 10
    assert all(np.isfinite(line[name]) for line in lines for name in benchmark.SCORES)
    if prompted:
        first = [lines[i // each * each]["sample"] for i in range(10)]
        assert all(one["caption"] == line["sample"]["caption"] and line["sample"]["prompted"] for one, line in zip(first, lines))
        assert all(one["tags"] == line["sample"]["tags"] for one, line in zip(first, lines)), "they differ in the rest only"
        assert len({line["sample"]["caption"] for line in lines}) == -(-10 // each)


def test_samples_of_one_subject_and_grid_or_of_one_prompt_are_compared(tiny_model, tmp_path, capsys):
    v, rng = tiny_model.vocabulary, np.random.default_rng(0)

    def sample(style, caption, **more):
        codes = rng.integers(0, tiny_model.image_tokenizer.codebook_size, v.default_grid[0] * v.default_grid[1]).tolist()
        return {"tags": {"style": style}, "caption": caption, "caption_ids": tiny_model.encode_text(caption), "codes": codes, **more}

    styles = tiny_model.styles
    free = [{"sample": sample(styles[0], "a disk"), "pmi_both": float(i), "recognition": float(i % 2)} for i in range(7)]
    asked = [
        {"sample": sample(styles[0], text, prompted=True), "pmi_both": float(i), "recognition": 0.0}
        for i, text in enumerate(("a disk", "a square", "a disk", "a square", "a disk", "alone"))
    ]
    for name, lines in (("free", free), ("asked", asked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [tmp_path / "free.jsonl", tmp_path / "asked.jsonl"]
    benchmark.pair(argparse.Namespace(files=files, held_out=1, seed=0, out=tmp_path / "made"))
    made = [json.loads(line) for name in ("held-out", "train") for line in (tmp_path / "made" / f"{name}.jsonl").read_text().splitlines()]
    assert "2 preferences of 7 samples" in capsys.readouterr().out and len(made) == 4
    place = {json.dumps(line["sample"]["codes"]): i for lines in (free, asked) for i, line in enumerate(lines)}
    found = {
        bool(prompted): {
            (place[json.dumps(one["chosen"]["codes"])], place[json.dumps(one["rejected"]["codes"])])
            for one in made if one["chosen"].get("prompted", False) == prompted
        }
        for prompted in (False, True)
    }  # fmt: skip
    assert {a for a, _ in found[False]} == {5, 3} and {b for _, b in found[False]} == {0, 2}, "by the sum of both scores"
    assert found[True] == {(4, 0), (3, 1)}, "a prompt with one sample has no preference"
    with pytest.raises(UserError, match="4 of 4 preferences"):
        benchmark.pair(argparse.Namespace(files=files, held_out=4, seed=0, out=tmp_path / "made"))
    assert len(preferences.read(str(tmp_path / "made" / "train.jsonl"), v, tiny_model.encode_text)) == 3

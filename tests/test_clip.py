"""Promises of tokun/inference/clip.py, with a real open_clip model of random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokun.cli import sample
from tokun.inference import clip as module
from tokun.inference.clip import Clip


def tiny_clip(folder: Path) -> str:
    """An open_clip model of random weights, as a folder that open_clip loads."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (extra 'clip')")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (40, 30 + 8 * i, 3), dtype=np.uint8)) for i in range(3)]


def test_clip_scores_are_cosines_that_do_not_depend_on_the_batch(tmp_path, pictures):
    clip = Clip(tiny_clip(tmp_path / "clip"), device="cpu")
    texts = [["a disc"], ["a ship on the sea", "a star"], ["the moon"]]
    together = clip.score(list(zip(pictures, texts)))
    assert [len(scores) for scores in together] == [1, 2, 1] and all(-1 <= score <= 1 for scores in together for score in scores)
    alone = [clip.score([pair])[0] for pair in zip(pictures, texts)]
    assert np.allclose(np.concatenate(together), np.concatenate(alone), atol=1e-5)


def test_a_clip_that_is_not_there_is_named_with_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--clip ViT-B-32 names no weights: give ViT-B-32:laion2b_s34b_b79k"):
        Clip("ViT-B-32")
    with pytest.raises(ValueError, match=r"--clip .* cannot be loaded by open_clip: .*Give ViT-B-32"):
        Clip(f"ViT-B-32:{tmp_path / 'nothing.pt'}")
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(
        ImportError, match=r"open_clip is not installed. It comes with the extra 'clip': in tokun's own folder, pip install -e '.\[clip\]'"
    ):
        Clip("ViT-B-32:laion2b_s34b_b79k")


def test_the_best_of_several_is_chosen_by_how_well_its_caption_fits(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)
    clip, pairs = Clip(tiny_clip(tmp_path / "clip"), device="cpu"), tiny_model.sample(2, n=6)
    alone = [clip.score([(pair.image, [pair.caption])])[0][0] for pair in pairs]
    assert clip.fit(pairs) == pytest.approx(alone, abs=1e-5)
    best = tiny_model.best_of(2, 2, 3, score=clip.fit)
    assert [pair.index for pair in best] == [max(range(i, i + 3), key=lambda j: alone[j]) for i in (0, 3)]


def test_sample_py_chooses_by_the_clip_that_it_is_given(tiny_model, checkpoint_folder, tmp_path):
    name = tiny_clip(tmp_path / "clip")
    common = ["--checkpoint", str(checkpoint_folder), "--device", "cpu", "--best-of", "3", "--n", "2", "--seed", "2"]
    sample.main([*common, "--clip", name, "--out", str(tmp_path / "out")])
    written = [json.loads(line)["index"] for line in (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == [pair.index for pair in tiny_model.best_of(2, 2, 3, score=Clip(name, device="cpu").fit)]
    with pytest.raises(ValueError, match="--clip ViT-B-32 names no weights"):
        sample.main([*common, "--clip", "ViT-B-32", "--out", str(tmp_path / "out")])

"""Promises of tokun/sharpen.py, on the tiny model and toy pictures."""

import pytest
import torch
from safetensors.torch import load_file

import tokun
from tokun import sharpen
from tokun.sharpen import Recipe

RECIPE = Recipe(steps=6, batch_size=8, perceptual="none", perceptual_weight=0.0, save_every=2)


@pytest.fixture
def shards(toy_shards):
    return str(toy_shards / "train-*.tar")


def test_codes_and_words_stay_and_pictures_change(checkpoint_folder, shards, toy_images, tmp_path, monkeypatch):
    monkeypatch.setattr(sharpen, "DISCRIMINATOR_AHEAD", 2)
    out = sharpen.sharpen(checkpoint_folder, shards, tmp_path / "sharp", RECIPE, device="cpu")
    before, after = tokun.load(checkpoint_folder, device="cpu"), tokun.load(out, device="cpu")
    assert torch.equal(before.image_tokenizer.encode(toy_images), after.image_tokenizer.encode(toy_images))
    for a, b in zip(before.sample(5, 3), after.sample(5, 3)):
        assert (a.codes, a.caption, a.pmi) == (b.codes, b.caption, b.pmi) and a.image.tobytes() != b.image.tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sharp"]


def test_killed_and_typed_again_it_ends_in_the_same_weights(checkpoint_folder, shards, tmp_path, monkeypatch):
    whole = sharpen.sharpen(checkpoint_folder, shards, tmp_path / "whole", RECIPE, device="cpu")
    learn = sharpen.Trainer.learn

    def dies(self, real):
        if self.step == 5:
            raise KeyboardInterrupt
        return learn(self, real)

    monkeypatch.setattr(sharpen.Trainer, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        sharpen.sharpen(checkpoint_folder, shards, tmp_path / "killed", RECIPE, device="cpu")
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(sharpen.Trainer, "learn", learn)
    with pytest.raises(ValueError, match="gan_weight"):
        sharpen.sharpen(checkpoint_folder, shards, tmp_path / "killed", Recipe(**{**RECIPE.__dict__, "gan_weight": 0.1}), device="cpu")
    again = sharpen.sharpen(checkpoint_folder, shards, tmp_path / "killed", RECIPE, device="cpu")
    one, two = (load_file(folder / "image_tokenizer" / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_that_is_there_is_not_overwritten(checkpoint_folder, shards, tmp_path):
    with pytest.raises(ValueError, match="already exists"):
        sharpen.sharpen(checkpoint_folder, shards, tmp_path, RECIPE)

"""Promises of tokun/sharpen.py, on the tiny model and toy pictures."""

from dataclasses import replace

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


@pytest.mark.parametrize("code_noise", [0.0, 0.5])
def test_killed_and_typed_again_it_ends_in_the_same_weights(checkpoint_folder, shards, tmp_path, monkeypatch, code_noise):
    recipe = replace(RECIPE, code_noise=code_noise)
    whole = sharpen.sharpen(checkpoint_folder, shards, tmp_path / "whole", recipe, device="cpu")
    learn = sharpen.Trainer.learn

    def dies(self, real):
        if self.step == 5:
            raise KeyboardInterrupt
        return learn(self, real)

    monkeypatch.setattr(sharpen.Trainer, "learn", dies)
    with pytest.raises(KeyboardInterrupt):
        sharpen.sharpen(checkpoint_folder, shards, tmp_path / "killed", recipe, device="cpu")
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(sharpen.Trainer, "learn", learn)
    with pytest.raises(ValueError, match="gan_weight"):
        sharpen.sharpen(checkpoint_folder, shards, tmp_path / "killed", replace(recipe, gan_weight=0.1), device="cpu")
    again = sharpen.sharpen(checkpoint_folder, shards, tmp_path / "killed", recipe, device="cpu")
    one, two = (load_file(folder / "image_tokenizer" / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_generator_draws_up_to_a_share_of_the_codes_anew_in_half_of_the_pictures(tiny_model, checkpoint_folder, shards, tmp_path):
    n = tiny_model.vocabulary.max_codes
    codes = torch.randint(tiny_model.vocabulary.codebook_size, (400, n), generator=torch.Generator().manual_seed(0))
    drawn = sharpen.ResampledCodes(tiny_model, 0.6)(codes, tiny_model.grids[0], torch.Generator().manual_seed(1))
    assert ((drawn >= 0) & (drawn < tiny_model.vocabulary.codebook_size)).all()
    other = (drawn != codes).float().mean(1)
    assert 0.4 < (other == 0).float().mean() < 0.75 and 0.08 < other.mean() < 0.16, "half of half of 0.6, less what comes out the same"
    again = sharpen.ResampledCodes(tiny_model, 0.6)(codes, tiny_model.grids[0], torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    with pytest.raises(ValueError, match=r"--code-noise is 1\.5"):
        sharpen.sharpen(checkpoint_folder, shards, tmp_path / "sharp", replace(RECIPE, code_noise=1.5), device="cpu")


def test_a_checkpoint_that_is_there_is_not_overwritten(checkpoint_folder, shards, tmp_path):
    with pytest.raises(ValueError, match="already exists"):
        sharpen.sharpen(checkpoint_folder, shards, tmp_path, RECIPE)

"""Promises of tokun/tokenizers/image.py. Tiny networks, drawn pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from data_tools import toy
from tokun.config import ImageTokenizerConfig
from tokun.data import to_float
from tokun.tokenizers.image import ImageTokenizer, fsq_levels

QUANTIZERS = ("VectorQuantize", "FSQ", "LFQ", "SimVQ")
BASE = dict(
    image_size=32, downsample=8, stem=4, channels=[16, 16], blocks=1, attention=True, latent_dim=8, codebook_size=64, codebook_dim=4
)


def pictures(n=12, side=32, channels=1):
    images = torch.stack([to_float(np.array(toy.draw(3, i, side)[0]))[None] for i in range(n)])
    return images if channels == 1 else torch.cat([images, -images, images.flip(2)], 1)


def make(images, **changes):
    """A tokenizer whose codebook the first batch has placed, as training does."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**{**BASE, **changes}))
    tokenizer.train()(images)
    return tokenizer.eval()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantizer_is_one_word_and_each_encodes_decodes_and_learns(quantizer):
    images = pictures()
    tokenizer = make(images, quantizer=quantizer)
    codes = tokenizer.encode(images)
    assert codes.shape == (12, 16) and codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 64
    assert codes.unique().numel() > 1
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    tokenizer.train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    errors = []
    for _ in range(25):
        out = tokenizer(images)
        error = (out.images - images).square().mean()
        optimizer.zero_grad()
        (error + out.quantizer_loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert out.quantizer_loss.ndim == 0 and tokenizer.encoder.layers[1].weight.grad.abs().sum() > 0  # straight through
    assert np.mean(errors[-3:]) < 0.8 * errors[0]


def test_codes_by_index_learn_as_the_librarys_one_hot_matrices_do():
    images, ours, its = pictures(), make(pictures()), make(pictures())
    its.quantizer._codebook.__class__ = Codebook
    its.load_state_dict(ours.state_dict())
    for tokenizer in (ours, its):
        tokenizer.train()
        optimizer = torch.optim.SGD(tokenizer.parameters(), 0.1)
        for step in range(12):
            torch.manual_seed(step)  # dead codes are drawn anew
            out = tokenizer(images)
            optimizer.zero_grad()
            ((out.images - images).square().mean() + out.quantizer_loss).backward()
            optimizer.step()
    assert torch.equal(ours.eval().encode(images), its.eval().encode(images))
    for (name, a), b in zip(ours.state_dict().items(), its.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
    assert type(ours.quantizer._codebook).__name__ == "IndexedCodebook"


@pytest.mark.parametrize(
    ("changes", "side", "grid"),
    [
        ({}, 64, (8, 8)),
        ({"image_channels": 3}, 64, (8, 8)),
        ({"downsample": 16, "channels": [8, 16, 16]}, 64, (4, 4)),
        ({"downsample": 16, "stem": 8}, 128, (8, 8)),
        ({"attention": False, "stem": 2, "channels": [8, 8, 8]}, 128, (16, 16)),
        ({"quantizer": "FSQ", "image_channels": 3}, 128, (16, 16)),
    ],
)
def test_sizes_channels_and_grids(changes, side, grid):
    images = pictures(3, side, changes.get("image_channels", 1))
    tokenizer = make(images, image_size=side, **changes)
    assert tokenizer.grid == grid
    codes = tokenizer.encode(images)
    assert codes.shape == (3, grid[0] * grid[1])
    assert tokenizer.decode(codes).shape == images.shape


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_forward_is_decode_of_encode(quantizer):
    images = pictures()
    tokenizer = make(images, quantizer=quantizer)
    tokenizer.reindex()
    with torch.no_grad():
        out = tokenizer(images)
    codes = tokenizer.encode(images)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(tokenizer.decode(codes), out.images.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_encoding_a_batch_is_encoding_one_by_one():
    images = pictures()
    tokenizer = make(images)
    assert torch.equal(tokenizer.encode(images), torch.cat([tokenizer.encode(image[None]) for image in images]))
    codes = tokenizer.encode(images)
    torch.testing.assert_close(tokenizer.decode(codes), torch.cat([tokenizer.decode(c[None]) for c in codes]))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_encoding_changes_nothing_in_training_or_out_of_it(quantizer):
    images = pictures()
    tokenizer = make(images, quantizer=quantizer).train()
    before = tokenizer.fingerprint()
    codes = tokenizer.encode(images)
    tokenizer.decode(codes)
    assert tokenizer.training and tokenizer.fingerprint() == before
    assert torch.equal(tokenizer.eval().encode(images), codes)


def test_other_aspect_ratios_and_sizes_need_no_new_model():
    tokenizer = make(pictures())
    wide = torch.cat([pictures(2), pictures(2).flip(3)], 3)  # (2, 1, 32, 64)
    codes = tokenizer.encode(wide)
    assert codes.shape == (2, 4 * 8)
    assert tokenizer.decode(codes, (4, 8)).shape == wide.shape


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_reindexing_changes_no_picture_and_makes_neighbours_alike(quantizer):
    images = pictures()
    tokenizer = make(images, quantizer=quantizer)
    before = tokenizer.decode(tokenizer.encode(images))
    tokenizer.reindex()
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(codes), before)
    assert torch.equal(tokenizer.order[tokenizer.rank], torch.arange(64))
    vectors = tokenizer.vectors_of(tokenizer.order[None])[0]  # (K, D) by public id
    neighbours = (vectors[1:] - vectors[:-1]).norm(dim=1).mean()
    anyone = torch.cdist(vectors, vectors).sum() / (64 * 63)
    assert neighbours < anyone
    order = tokenizer.order.clone()
    tokenizer.reindex()
    assert torch.equal(tokenizer.order, order)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_saved_then_loaded_is_the_same_tokenizer(quantizer, tmp_path):
    images = pictures()
    tokenizer = make(images, quantizer=quantizer)
    tokenizer.reindex()
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert not loaded.training and loaded.config == tokenizer.config
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_fingerprints_differ_after_any_weight_buffer_or_setting_changes():
    tokenizer = make(pictures())
    prints = {tokenizer.fingerprint()}
    with torch.no_grad():
        tokenizer.decoder.last.bias[0] += 1e-6
    prints.add(tokenizer.fingerprint())
    tokenizer.reindex()
    prints.add(tokenizer.fingerprint())
    tokenizer.config.image_size = 64
    prints.add(tokenizer.fingerprint())
    assert len(prints) == 4


@pytest.fixture
def saved(tmp_path):
    make(pictures()).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "garbage"])
def test_a_broken_file_is_named(saved, name, damage):
    path = saved / name
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-20])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError, match=name.replace(".", r"\.")):
        ImageTokenizer.load(saved)


def test_weights_of_another_shape_are_refused(saved):
    tree = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**tree, "latent_dim": 4}))
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold these weights"):
        ImageTokenizer.load(saved)
    (saved / "config.json").write_text(json.dumps({**tree, "depth": 4}))
    with pytest.raises(ValueError, match=r"config\.json is not an image tokenizer's config"):
        ImageTokenizer.load(saved)
    shutil.rmtree(saved)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        ImageTokenizer.load(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"downsample": 16}, "downsample 16 is not stem 4 x 2"),
        ({"image_size": 36}, "image_size 36 is not a multiple"),
        ({"image_channels": 4}, "image_channels is 4"),
        ({"codebook_size": 4}, "codebook_size is 4"),
        ({"codebook_size": 65537}, "codebook_size is 65537"),
        ({"codebook_size": 100, "quantizer": "FSQ"}, "not a power of two, which FSQ needs"),
        ({"codebook_size": 100, "quantizer": "LFQ"}, "not a power of two, which LFQ needs"),
        ({"channels": [16, 18]}, "multiple of 4"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(changes, words):
    with pytest.raises(ValueError, match=words):
        ImageTokenizer(ImageTokenizerConfig(**{**BASE, **changes}))


def test_bad_images_and_codes_are_refused():
    tokenizer = make(pictures())
    for shape in [(1, 3, 32, 32), (1, 1, 30, 32), (1, 32, 32)]:
        with pytest.raises(ValueError, match="multiples of 8"):
            tokenizer.encode(torch.zeros(shape))
    for codes, words in [(torch.zeros(1, 15), "needs"), (torch.full((1, 16), 64), "outside 0"), (torch.full((1, 16), -1), "outside 0")]:
        with pytest.raises(ValueError, match=words):
            tokenizer.decode(codes.long())


def test_fsq_levels_multiply_to_every_codebook_size():
    for bits in range(3, 17):
        levels = fsq_levels(2**bits)
        assert np.prod(levels) == 2**bits and set(levels) <= {4, 8}

"""Promises of feature_alignment.py in tokun/models and tokun/training: what a picture shows is predicted while it is drawn.

The head leaves no trace."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokun
from tests.launchers import forked
from tests.small_runs import assert_same_weights, needs, run_stages, take_over, write_config
from tests.test_losses import random_squeezenet
from tests.test_resume import run_until
from tokun import data
from tokun.models import feature_alignment
from tokun.tokenizers import sequences
from tokun.tokenizers.image import ImageTokenizer
from tokun.training import engine
from tokun.training.feature_alignment import FeatureExtractor, Targets

pytestmark = needs("accelerate", reason="training needs the extra 'train'")


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return random_squeezenet(tmp_path_factory.mktemp("network") / "net.safetensors")


def config_of(folder: Path, finished, small_shards: Path, network: Path, **changes) -> Path:
    """A run whose codes are another's, with an aligned generator."""
    folder.mkdir(parents=True, exist_ok=True)
    take_over(finished[1], folder / "run")
    more = {"train__align_weight": 1.0, "train__align_features": str(network), "train__sample_every": 100}
    return write_config(folder, small_shards, **(more | changes))


@pytest.fixture(scope="module")
def aligned(finished, small_shards, network, tmp_path_factory) -> Path:
    return run_stages(
        config_of(
            tmp_path_factory.mktemp("aligned"), finished, small_shards, network, train__steps=80, train__lr=1e-2, generator__dropout=0.0
        )
    )


def aligned_loss(out: Path) -> float:
    return json.loads((out / "checkpoint" / "training.json").read_text())["train"]["train/align_loss"]


def test_it_is_learned_by_the_layers_below_the_watched_one(tiny_model):
    """One batch, learned by heart: 1 - cosine is some 1 before; layers above the watched one have no part in it."""
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model.generator).train()
    head = feature_alignment.attach(model)
    head.watch(feature_alignment.watched_layer(model, 1))
    ids, positions = torch.randint(4, 60, (4, 12)), torch.arange(0, 48, 2)
    targets = torch.randn(24, feature_alignment.WHOLE), torch.randn(24, feature_alignment.PLACE)
    optimizer, found = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(60):
        model(input_ids=ids)
        loss = head(positions, *targets) / 24
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert 0.9 < found[0] < 1.1 and found[-1] < 0.2
    first, second = model.base_model.layers
    assert first.mlp.up_proj.weight.grad.abs().sum() > 0 and second.mlp.up_proj.weight.grad is None


def test_its_loss_is_logged_and_changes_what_is_learned(aligned, finished):
    assert 0.5 < aligned_loss(aligned) < 1.5
    plain = load_file(finished[1] / "checkpoint" / "generator" / "model.safetensors")
    weights = load_file(aligned / "checkpoint" / "generator" / "model.safetensors")
    assert weights.keys() == plain.keys() and any(not torch.equal(weights[name], plain[name]) for name in plain)


def test_what_is_left_is_an_ordinary_checkpoint(aligned):
    weights = load_file(aligned / "checkpoint" / "generator" / "model.safetensors")
    assert not any(feature_alignment.HEAD in name for name in weights)
    assert len(tokun.load(aligned / "checkpoint").sample(1, n=2)) == 2


def test_targets_are_what_the_network_sees_in_the_decoded_picture(aligned, network):
    """Of each code: the whole picture, and the cell of 2 x 2 codes in which it lies."""
    folder = aligned / "features" / "train-00000"
    tokenizer = ImageTokenizer.load(aligned / "image_tokenizer")
    extractor = FeatureExtractor(tokenizer, str(network), torch.device("cpu"))
    extractor.read_basis(aligned / "features" / "basis.safetensors")
    record = data.CodeSamples([aligned / "codes" / "train-00000.tar"]).whole_record(0)
    whole, places = extractor.features(record.codes[1:2], record.grid)
    model = tokun.load(aligned / "checkpoint")
    found = Targets([folder], model.vocabulary)
    tags = model.wanted_tags()
    ids = sequences.pack_joint(model.vocabulary, tags, record.codes[1], model.encode_text(record.caption)).input_ids
    positions, its_whole, its_place = found(torch.tensor([ids, ids]))
    assert (
        len(positions) == 2 * record.codes.shape[1]
        and [ids[i] - model.vocabulary.code_offset for i in positions[: len(positions) // 2]] == record.codes[1].tolist()
    )
    assert torch.allclose(its_whole[0], torch.from_numpy(extractor.described("whole", whole)[0]).float(), atol=0.02)
    rows, columns = record.grid
    last = extractor.described("place", places)[0].reshape(-(-rows // 2), -(-columns // 2), -1)[-1, -1]
    assert torch.allclose(its_place[len(positions) // 2 - 1], torch.from_numpy(last).float(), atol=0.02)


def test_killed_and_typed_again_it_ends_in_the_same_weights(finished, small_shards, network, tmp_path, monkeypatch):
    whole = run_stages(config_of(tmp_path / "whole", finished, small_shards, network))
    config = config_of(tmp_path / "killed", finished, small_shards, network)
    run_until(config, monkeypatch, 5, "generator")
    assert_same_weights(whole, run_stages(config))


def align_in_two(folder: Path) -> None:
    engine.start_processes()
    run_stages(folder / "small.yaml", f"out={folder / 'two'}")
    engine.wait_for_processes()
    engine.end_processes()


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(finished, small_shards, network, tmp_path):
    """Each computes the features of half of the shards."""
    more = {"train__steps": 3, "generator__dropout": 0.0, "sampling__n": 0}
    alone = run_stages(config_of(tmp_path, finished, small_shards, network, **more))
    take_over(finished[1], tmp_path / "two")
    forked(tmp_path, 2, work=align_in_two)
    assert aligned_loss(tmp_path / "two") == pytest.approx(aligned_loss(alone), abs=1e-4)


def test_features_of_other_weights_are_refused(finished, small_shards, network, tmp_path):
    config = config_of(tmp_path, finished, small_shards, network, train__steps=1)
    out = run_stages(config)
    record = out / "features" / "features.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"network": "another"}))
    for folder in ("checkpoint", "state"):
        shutil.rmtree(out / folder, ignore_errors=True)
    with pytest.raises(ValueError, match=r"features.*network"):
        run_stages(config)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"train__align_weight": -1.0}, "train.align_weight is -1.0; it must be 0"),
        ({"train__align_layer": 3}, "train.align_layer is 3; it must be from 1 to 2"),
        ({"train__gradient_checkpointing": True}, "does not go together with train.gradient_checkpointing"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(finished, small_shards, network, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        run_stages(config_of(tmp_path, finished, small_shards, network, **changes))

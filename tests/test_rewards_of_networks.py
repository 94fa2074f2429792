"""Promises of tokun/align/image_rewards.py: rewards by networks that are made on the spot, with weights by chance."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools import toy
from tests import test_captioners
from tests.test_losses import random_squeezenet
from tokun.align import rewards
from tokun.config import RewardConfig


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    return str(random_squeezenet(tmp_path_factory.mktemp("network") / "squeezenet.safetensors"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("described")
    toy.write_shards(folder, 200, 0, 32)
    return str(folder / "train-*.tar")


@pytest.fixture(scope="module")
def pairs(tiny_model):
    """Random ones, and two real pictures at their end."""
    made = tiny_model.sample(3, n=18)
    return [*made[:16], *(replace(pair, image=toy.draw(0, i, 32)[0].convert("L")) for i, pair in enumerate(made[16:]))]


def score(model, pairs, **asked) -> list[float]:
    return rewards.make([RewardConfig(**asked)], model)[0](pairs)


def test_what_looks_like_the_shards_scores_higher_by_style_and_by_density(tiny_model, pairs, network, shards):
    for kind in ("style", "reference"):
        found = score(tiny_model, pairs, kind=kind, of=network, shards=shards, n=48)
        assert min(found[-2:]) > sum(found[:16]) / 16, kind


def test_recognition_is_a_share_and_description_its_score(tiny_model, pairs, network, shards):
    shares = score(tiny_model, pairs, kind="recognition", of=network, shards=shards, n=0)
    scores = score(tiny_model, pairs, kind="description", of=network, shards=shards, n=0)
    assert len(shares) == len(scores) == 18 and all(0 <= share <= 1 for share in shares)


def test_few_pictures_are_no_reference(tiny_model, network, shards):
    with pytest.raises(ValueError, match=r"grpo\.rewards\[0\] \(style\): shards .* hold 4 pictures; at least 16 are needed"):
        score(tiny_model, [], kind="style", of=network, shards=shards, n=4)


def test_answers_are_probabilities_by_the_model_itself_and_by_another(tiny_model, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"\(own_yes\): this model was not trained on the task 'question'"):
        score(replaced(tiny_model, ("joint",)), pairs[:2], kind="own_yes")
    own = score(replaced(tiny_model, ("joint", "question")), pairs[:2], kind="own_yes", question="Is it {}?")
    patch = pytest.MonkeyPatch()
    patch.setattr(test_captioners, "WORDS", [*test_captioners.WORDS, "yes", "no", "Yes"])
    folder: Path = test_captioners.save(test_captioners.paligemma, tmp_path / "paligemma")
    patch.undo()
    other = score(tiny_model, pairs[:2], kind="vqa", of=str(folder), question="what shows the picture")
    assert all(0 < value < 1 for value in own + other)


def replaced(model, tasks: tuple[str, ...]):
    other = copy.copy(model)
    other.tasks = tasks
    return other


def test_rewards_are_on_the_models_device(tiny_model, pairs, network, shards):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    on_gpu = copy.deepcopy(tiny_model).to("cuda")
    assert len(score(on_gpu, pairs, kind="style", of=network, shards=shards, n=32)) == len(pairs)

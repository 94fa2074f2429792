"""Picture and words come from one place: the smallest model that shows it, trained here on toy pictures.

The whole measurement, with a trained judge, is benchmarks/toy_coherence.py; here the fact judged is the ground, which
any eye can read off a picture: its corners are light or dark.
"""

import json

import numpy as np
import pytest
import torch

import tokun
from benchmarks.toy_coherence import pmi_ranks
from data_tools import toy
from tests.small_runs import needs
from tokun.config import from_dict
from tokun.training.run import open_run
from tokun.training.stages import STAGES

pytestmark = [
    needs("accelerate", reason="training needs the extra 'train'"),
    pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9"),
]

SETTINGS = {
    "data": {"max_caption_tokens": 32, "sort_window": 256},
    "text_tokenizer": {"vocab_size": 512},
    "image_tokenizer": {"image_size": 32, "channels": [32, 64], "blocks": 1, "codebook_size": 64},
    "image_tokenizer_train": {
        "steps": 200, "batch_size": 32, "lr": 3e-3, "crop_scale": [1.0, 1.0], "perceptual": "none", "perceptual_weight": 0.0,
        "line_weight": 0.0, "ema_decay": 0.98, "eval_every": 1000, "save_every": 1000, "log_every": 100,
    },
    "codes": {"views": 1},
    "generator": {"hidden_size": 128, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2, "dropout": 0.0},
    "train": {
        "steps": 200, "batch_size": 16, "optimizer": "muon", "lr": 2e-3, "warmup_steps": 20, "ema_decay": 0.98,
        "task_mix": {"joint": 0.9, "text_to_image": 0.1},
        "plain_share": 1.0, "eval_every": 1000, "save_every": 1000, "sample_every": 1000, "log_every": 100,
    },
    "sampling": {"n": 0, "temperature": 0.8, "text_temperature": 0.3},
    "tracking": {"kind": "none"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tokun.Tokun:
    folder = tmp_path_factory.mktemp("coherence")
    toy.write_shards(folder / "toy", 2048, 0, 32, "train")
    tree = json.loads(json.dumps(SETTINGS)) | {"out": str(folder / "run")}
    tree["data"]["train"] = str(folder / "toy" / "train-*.tar")
    run = open_run(from_dict(tree))
    for stage in STAGES:
        stage(run)
    return tokun.load(run.out)


@pytest.fixture(scope="module")
def pairs(model) -> list[tokun.Pair]:
    return model.sample(1000, 96)


def test_captions_name_the_ground_of_their_own_picture(pairs):
    named = [(p, toy.parse_caption(p.caption)["ground"]) for p in pairs]
    named = [(p, ground) for p, ground in named if ground]
    assert len(named) >= 30  # about two thirds of the captions name it
    right = [ground == ("light" if np.median(np.asarray(p.image)[:2]) > 128 else "dark") for p, ground in named]
    assert np.mean(right) >= 0.9


def test_the_own_caption_outranks_seven_others_by_pmi_far_above_chance(model, pairs):
    assert np.mean(pmi_ranks(model, pairs[:48], rivals=7, seed=0)) >= 0.3  # chance: 0.125

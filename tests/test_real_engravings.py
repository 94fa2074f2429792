"""Real engravings and real SqueezeNet weights through the real stages, where they lie beside the project."""

import json
import tarfile
from pathlib import Path

import pytest

import tokun
from tests.test_training import run_stages, write_config
from tokun.data import CodeSamples, ShardIndex

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
SHARD = SHARED / "data" / "engravings" / "val-00000.tar"
SQUEEZENET = SHARED / "models" / "squeezenet1_1_imagenet.safetensors"
pytestmark = pytest.mark.skipif(
    not (SHARD.is_file() and SQUEEZENET.is_file()), reason="the engravings are not beside the project (../shared)"
)


def test_real_engravings_become_a_model_with_their_techniques_as_tags(tmp_path):
    with tarfile.open(SHARD) as whole, tarfile.open(tmp_path / "train-00000.tar", "w") as part:
        for member in whole.getmembers()[:80]:
            part.addfile(member, whole.extractfile(member))
    config = write_config(tmp_path, tmp_path, data__val="", data__style_key="technique", data__subject_key="category")
    out = run_stages(
        config, "image_tokenizer_train.perceptual=squeezenet", "image_tokenizer_train.perceptual_weight=0.3",
        f"image_tokenizer_train.perceptual_weights={SQUEEZENET}", "image_tokenizer_train.steps=2", "train.steps=2",
    )  # fmt: skip
    captions = [json.loads(ShardIndex([tmp_path / "train-00000.tar"]).read(i, "json"))["caption"] for i in range(40)]
    encoded = CodeSamples(sorted((out / "codes").glob("train-*.tar")))
    assert len(encoded) == 40
    assert [" ".join(c.split()) for c in captions] == [encoded.record(i).caption for i in range(40)]
    model = tokun.load(out)
    assert "wood-engraving" in model.vocabulary.styles
    assert model.sample(1, 1, style="wood engraving")[0].tags.style == "wood-engraving"

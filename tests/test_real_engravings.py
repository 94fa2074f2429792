"""Engravings and SqueezeNet weights through the real stages: made on the spot, and real ones where they lie beside the project."""

import io
import json
import tarfile
from pathlib import Path

import pytest

import tokun
from data_tools import toy
from tests.small_runs import needs, run_stages, write_config
from tests.test_losses import random_squeezenet
from tokun.data import CodeSamples, ShardIndex

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
SHARD = SHARED / "data" / "engravings" / "val-00000.tar"
SQUEEZENET = SHARED / "models" / "squeezenet1_1_imagenet.safetensors"
pytestmark = needs("accelerate", reason="training needs the extra 'train'")


def real_engravings(path: Path) -> None:
    with tarfile.open(SHARD) as whole, tarfile.open(path, "w") as part:
        for member in whole.getmembers()[:80]:
            part.addfile(member, whole.extractfile(member))


def made_engravings(path: Path) -> None:
    """Toy pictures with the records of the real ones: a printed caption, a technique, a category."""
    with tarfile.open(path, "w") as tar:
        for number in range(40):
            picture, record = toy.draw(5, number, 32)
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", lossless=True)
            record = {
                "caption": f"{record['captions']['plain']}  Plate {number}.", "category": ("sea", "satire")[number % 2],
                "technique": ("wood engraving", "engraving or line illustration (unspecified)")[number % 3 > 1],
            }  # fmt: skip
            for suffix, data in (("webp", buffer.getvalue()), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"train-{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    "kind",
    [
        "made",  # of random weights and toy pictures: all that the real ones promise
        pytest.param(
            "real",
            marks=pytest.mark.skipif(
                not (SHARD.is_file() and SQUEEZENET.is_file()), reason="the engravings are not beside the project (../shared)"
            ),
        ),
    ],
)
def test_engravings_become_a_model_with_their_techniques_as_tags(kind, tmp_path):
    (made_engravings if kind == "made" else real_engravings)(tmp_path / "train-00000.tar")
    network = random_squeezenet(tmp_path / "squeezenet.safetensors") if kind == "made" else SQUEEZENET
    config = write_config(tmp_path, tmp_path, data__val="", data__style_key="technique", data__subject_key="category")
    out = run_stages(
        config, "image_tokenizer_train.perceptual=squeezenet", "image_tokenizer_train.perceptual_weight=0.3",
        f"image_tokenizer_train.perceptual_weights={network}", "image_tokenizer_train.steps=2", "train.steps=2",
    )  # fmt: skip
    shard = ShardIndex([tmp_path / "train-00000.tar"])
    captions = [json.loads(shard.read(i, "json"))["caption"] for i in range(40)]
    encoded = CodeSamples(sorted((out / "codes").glob("train-*.tar")))
    assert len(encoded) == 40
    assert [" ".join(c.split()) for c in captions] == [encoded.record(i).caption for i in range(40)]
    model = tokun.load(out)
    assert "wood-engraving" in model.vocabulary.styles
    assert model.sample(1, 1, style="wood engraving")[0].tags.style == "wood-engraving"

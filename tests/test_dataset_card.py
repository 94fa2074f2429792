"""Promises of data_tools/report/dataset_card.py: the folder that prepare wrote is a data set that `datasets` loads as it is."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools.pipeline.chunks import Settings
from data_tools.prepare import prepare
from data_tools.report import dataset_card, write_report
from tokun.data.shards import ShardIndex

pytest.importorskip("pyarrow", reason="shards are prepared with the extra 'data'")
pytest.importorskip("jinja2", reason="shards are prepared with the extra 'data'")


def pictures(folder, count=12):
    """Pictures of two folders, some with fields that others lack; one that is damaged."""
    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8), dtype=np.uint8)).resize((96, 72), Image.Resampling.NEAREST).save(
            place / f"{index:02d}.png"
        )
        record = {"caption": f"A ship | number {index} <in> the storm."}
        if index > 5:
            record |= {"captions": {"poetic": f"O ship {index}!"}}
        (place / f"{index:02d}.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "a" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    settings = Settings(style="engraving", clean=False, side=64, val=0.5, shard_size=3, license="CC BY 4.0")
    prepare(pictures(root / "ships"), root / "shards", settings)
    return root / "shards"


def head_of(folder) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_datasets_loads_the_folder_with_its_splits_features_and_every_pair(shards, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[data]'")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    found = datasets.load_dataset(str(shards), cache_dir=str(tmp_path / "cache"))
    told = json.loads((shards / "prepare.json").read_text())["shards"]
    assert set(found) == {"train", "validation"}
    assert {split: len(found[split]) for split in found} == {
        split: sum(n for name, n in told.items() if name.startswith(prefix))
        for prefix, split in (("train", "train"), ("val", "validation"))
    }
    seen = {}
    for split, prefix in (("train", "train"), ("validation", "val")):
        assert isinstance(found[split].features["webp"], datasets.Image)
        index = ShardIndex(sorted(shards.glob(f"{prefix}-*.tar")), one_of=("webp",))
        for number, pair in enumerate(found[split]):
            record = index.read_json(number)
            assert pair["webp"].size == (record["width"], record["height"])
            assert {name: value for name, value in pair["json"].items() if name in record and name != "captions"} == {
                name: value for name, value in record.items() if name != "captions"
            }
            assert {name: text for name, text in pair["json"]["captions"].items() if text} == record["captions"]
            seen[record["path"]] = pair["json"]["captions"]["poetic"]
    assert len(seen) == 12 and None in seen.values() and "O ship 11!" in seen.values(), "fields that some pairs lack are empty there"


def test_the_card_says_what_is_in_the_folder_and_what_was_left_out(shards):
    head, text = head_of(shards), (shards / "README.md").read_text(encoding="utf-8")
    assert head["license"] == "cc-by-4.0" and head["pretty_name"] == "ships" and head["size_categories"] == ["n<1K"]
    assert sum(split["num_examples"] for split in head["dataset_info"]["splits"]) == 12
    assert "| rejected | truncated or damaged | 1 |" in text or "| rejected | not a picture that can be read | 1 |" in text
    assert "13 files were read" in text and 'load_dataset("FOLDER"' in text


def test_a_licence_is_told_only_if_one_was_given_and_another_name_as_it_is(tmp_path):
    def licensed(**given):
        records = dataset_card.Records()
        for one in given["of"]:
            records.add({"caption": "a ship", "license": one}, "train")
        return yaml.safe_load(dataset_card.head(records, "ships"))

    assert "license" not in licensed(of=["", ""])
    assert "license" not in licensed(of=["mit", "cc0-1.0"]) and "license" not in licensed(of=["mit", ""])
    other = licensed(of=["Museum's own terms"])
    assert (other["license"], other["license_name"]) == ("other", "Museum's own terms")


def test_fields_of_several_types_are_left_out_and_no_type_is_guessed():
    records = dataset_card.Records()
    records.add({"a": 1, "b": None, "c": {"x": 1}, "d": [], "e": {}}, "train")
    records.add({"a": "one", "b": None, "c": {"y": 2.5}, "d": [{"z": True}], "e": {}}, "train")
    records.add({"c": {"y": 2}, "ids": {str(i): i for i in range(1000)}}, "train")
    said = next(one for one in yaml.safe_load(dataset_card.head(records, "n"))["dataset_info"]["features"] if one["name"] == "json")
    assert said["struct"] == [
        {"name": "b", "dtype": "string"},
        {"name": "c", "struct": [{"name": "x", "dtype": "int64"}, {"name": "y", "dtype": "float64"}]},
        {"name": "d", "list": [{"name": "z", "dtype": "bool"}]},
    ]


def test_a_card_that_somebody_wrote_stays(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    write_report(folder)
    assert (folder / "README.md").read_bytes() == (shards / "README.md").read_bytes()
    (folder / "README.md").write_text("# My ships\n")
    write_report(folder)
    assert (folder / "README.md").read_text() == "# My ships\n"

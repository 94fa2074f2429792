"""Promises of image shards -> code shards: the crops, the same bits in any company, and the command."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_tools import encode, questions, toy
from data_tools.captioning.captioned_shards import new_record
from tests.fixtures import square_views
from tokun import data
from tokun.config import from_dict, load_config
from tokun.data.sample_record import words_of
from tokun.tokenizers.image import ImageTokenizer
from tokun.training import codes as stage
from tokun.training.codes import codes_tasks, encode_shard, encode_shards, run_codes_task
from tokun.training.generator import tasks_of
from tokun.training.run import open_run
from tokun.utils.errors import UserError
from tokun.utils.task_engine import open_engine

ROOT = Path(__file__).resolve().parents[1]


def boxes(views: int = 11, scale: tuple[float, float] = (1.05, 1.1), **how) -> list[data.Box]:
    return square_views(300, 220, views, scale, np.random.default_rng(0), **how)


def test_five_positions_are_the_corners_and_the_middle_at_two_ranges():
    first, *others = boxes(positions="five")
    assert first == (40, 0, 220) and len(set(others)) == 10
    for group, scale in ((others[:5], 1.1), (others[5:], 1.05)):
        side = 220 / scale
        assert [box[2] for box in group] == pytest.approx([side] * 5)
        lefts, tops = [box[0] for box in group], [box[1] for box in group]
        assert lefts == pytest.approx([40, 260 - side, 40, 260 - side, 150 - side / 2])
        assert tops == pytest.approx([0, 0, 220 - side, 220 - side, 110 - side / 2])
    assert boxes(4, positions="five") == boxes(positions="five")[:4]


def test_nothing_is_mirrored_unless_asked_and_then_about_half():
    assert all(box[2] > 0 for how in ("random", "five") for box in boxes(positions=how))
    mirrored = boxes(200, (1.0, 1.2), mirror=True)
    assert mirrored[0][2] > 0 and 60 < sum(box[2] < 0 for box in mirrored) < 140
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    assert (data.crop(image, (8, 4, -32.0), 16) == data.crop(image, (8, 4, 32.0), 16)[:, :, ::-1]).all()


@pytest.mark.parametrize(
    ("codes", "named"),
    [({"positions": "ten"}, "random or five"), ({"positions": "five", "views": 12, "crop_scale": [1.05, 1.1]}, "there are 11")],
)
def test_crops_that_cannot_be_are_refused(codes, named):
    with pytest.raises(ValueError, match=named):
        from_dict({"codes": codes})


@pytest.mark.parametrize("threads", [1, 2])
def test_codes_in_a_batch_are_those_of_one_by_one_to_the_bit(tiny_image_tokenizer, toy_images, threads):
    tokenizer, before = tiny_image_tokenizer, torch.get_num_threads()
    images = toy_images if threads == 1 else toy_images[:20]  # two threads beside other tests mostly wait for each other
    torch.set_num_threads(threads)
    try:
        together = tokenizer.encode(images, rows=16)
        alone = torch.cat([tokenizer.encode(image[None], rows=16) for image in images])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone) and len(together.unique()) > 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_image_tokenizer) -> Path:
    """Two toy shards, a finished tokenizer, and the config that names them."""
    folder = tmp_path_factory.mktemp("encode")
    toy.write_shards(folder, 40, 0, 32, "train", shard_size=20)
    (folder / "run" / "image_tokenizer").mkdir(parents=True)
    tiny_image_tokenizer.save(folder / "run" / "image_tokenizer")
    tree = {"data": {"train": str(folder / "train-*.tar"), "val": ""}, "codes": {"views": 3}, "out": str(folder / "run"), "threads": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def read(shard: Path) -> dict[str, tuple[dict, np.ndarray]]:
    with tarfile.open(shard) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    keys = [name.removesuffix(".json") for name in files if name.endswith(".json")]
    return {key: (json.loads(files[f"{key}.json"]), np.load(io.BytesIO(files[f"{key}.codes.npy"]))) for key in keys}


def test_training_reads_the_plain_caption_that_was_written_for_a_titled_picture(folder, tmp_path):
    """`tokun caption` leaves the title in `caption`; a key that the user names wins over both."""
    tokenizer = ImageTokenizer.load(folder / "run" / "image_tokenizer")
    row = {"captions": {"plain": {"text": "A ship in a storm.", "source": "model", "model": "A"}}, "failures": {}}
    titled = {"caption": "Fig. 3", "captions": {"plain": "Fig. 3", "era": "A Ship"}, "note": "Seen at sea"}
    written = new_record(titled, row, ("plain",), {})
    assert written["caption"] == "Fig. 3"
    picture = io.BytesIO()
    Image.effect_noise((32, 32), 40).save(picture, "PNG")
    members = {"png": picture.getvalue()}
    trees = [written, {**titled, "captions": {"era": "A Ship"}}, {"caption": "", "captions": {"plain": "A wolf."}}]
    row["captions"]["plain"] = {"text": "Fig. 3. A wood engraving.", "source": "template"}
    trees.append(new_record(titled, row, ("plain",), {}))
    data.write_shard(
        tmp_path / "a.tar", ({"__key__": f"{i}", **members, "json": json.dumps(tree).encode()} for i, tree in enumerate(trees))
    )

    def captions(**keys: str) -> list[str]:
        config = from_dict({"codes": {"views": 1}, "threads": 1, "data": keys})
        encode_shard(tmp_path / "a.tar", tmp_path / "codes.tar", tokenizer, config, torch.device("cpu"))
        samples = data.CodeSamples([tmp_path / "codes.tar"])
        records = [samples.record(i) for i in range(len(samples))]
        assert all(record.caption == record.captions["plain"] for record in records)
        return [record.caption for record in records]

    assert captions() == ["A ship in a storm.", "Fig. 3", "A wolf.", "Fig. 3"], "a template is not better than the source's words"
    assert captions(caption_key="note") == ["Seen at sea"] * 3
    assert [words_of(tree, "caption")[0] for tree in trees] == list(map(questions.caption_of, trees)) == captions()


@pytest.mark.parametrize("mirror", [False, True])
def test_a_sample_with_malformed_questions_is_left_out_and_counted(folder, tmp_path, mirror):
    tokenizer, picture = ImageTokenizer.load(folder / "run" / "image_tokenizer"), io.BytesIO()
    Image.effect_noise((32, 32), 40).save(picture, "PNG")
    asked = [[{"question": "What is shown?", "answer": "a ship"}], [{"question": "How many?", "answer": 2}]]
    trees = [{"caption": "A ship.", "questions": questions} for questions in asked]
    members = [{"__key__": f"{i}", "png": picture.getvalue(), "json": json.dumps(tree).encode()} for i, tree in enumerate(trees)]
    data.write_shard(tmp_path / "a.tar", members)
    config = from_dict({"codes": {"views": 1, "mirror": mirror}, "threads": 1})
    skipped = encode_shard(tmp_path / "a.tar", tmp_path / "codes.tar", tokenizer, config, torch.device("cpu"))
    assert skipped == {"broken sample": 1} and len(data.CodeSamples([tmp_path / "codes.tar"])) == 1
    held = [{**tree, "style": "", "subject": "", "grid": [2, 2]} for tree in trees]  # a code shard from before holds both
    assert stage._count_held(held, [(2, 2)])["question_wordings"] == ["what is shown"]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_code_shard_holds_the_codes_of_each_view_encoded_alone(folder, tmp_path, batch_size):
    tokenizer = ImageTokenizer.load(folder / "run" / "image_tokenizer")
    config = from_dict({"codes": {"views": 6, "positions": "five", "crop_scale": [1.0, 1.1], "batch_size": batch_size}, "threads": 1})
    encode_shard(folder / "train-00000.tar", tmp_path / "codes.tar", tokenizer, config, torch.device("cpu"))
    pictures = data.ImageSamples(data.ShardIndex([folder / "train-00000.tar"], one_of=data.IMAGE_SUFFIXES), 32, 1, 0, 2.0)
    made = read(tmp_path / "codes.tar")
    assert len(made) == 20
    for number, (record, codes) in enumerate(made.values()):
        assert codes.dtype == np.uint16 and codes.shape == (6, 16) and len(record["boxes"]) == 6
        views = [data.crop(pictures.picture(number), tuple(box), 32) for box in square_views(32, 32, 6, [1.0, 1.1], None, positions="five")]
        for view, own in zip(views, codes):
            assert (tokenizer.encode(data.to_float(np.stack([view])), rows=16)[0].numpy() == own).all()


def without_captions(shard: Path, target: Path) -> None:
    with tarfile.open(shard) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    for name in [name for name in files if name.endswith(".json")]:
        files[name] = json.dumps({k: v for k, v in json.loads(files[name]).items() if k not in ("caption", "captions")}).encode()
    with tarfile.open(target, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_held_out_pictures_without_a_caption_are_refused_before_anything_is_encoded(folder, tmp_path, monkeypatch):
    without_captions(folder / "train-00000.tar", tmp_path / "val-00000.tar")
    shutil.copytree(folder / "run" / "image_tokenizer", tmp_path / "run" / "image_tokenizer")
    overrides = [f"out={tmp_path / 'run'}", "tracking.kind=none", f"data.val={tmp_path / 'val-*.tar'}"]
    run = open_run(load_config(folder / "config.yaml", overrides))
    with pytest.raises(
        UserError, match=r"^data\.val=\S*val-\*\.tar: none of the 20 pictures has a caption: .*data\.caption_key, now caption.*data\.val= "
    ):
        encode_shards(run)
    assert not list((run.out / "codes").glob("*"))
    monkeypatch.setattr(stage, "require_captions", lambda *_: None)  # of a shard that changed meanwhile
    with pytest.raises(
        UserError, match=r"^data\.val=\S* has no usable picture: 20 no caption\. To go on, .*; then delete \S*codes and start again$"
    ):
        encode_shards(run)
    run.close()


def test_a_task_is_trained_however_late_its_first_example_comes():
    plain = {"caption": "a ship", "captions": {"plain": "a ship"}, "style": "", "subject": "", "grid": [2, 2]}
    late = plain | {"captions": {"plain": "a ship", "era": "A vessel"}, "questions": [{"question": "what?", "answer": "a ship"}]}
    mix = {"joint": 0.5, "question": 0.2, "rewrite": 0.2, "text_to_image": 0.0}
    for trees, tasks in (([plain] * 300, ("joint",)), ([plain] * 300 + [late], ("joint", "question", "rewrite"))):
        record = json.loads(json.dumps(stage._count_held(trees, [(2, 2)])))
        assert tasks_of([], mix, record) == tasks

    class Samples(list):  # of an older record, which counts nothing
        def whole_record(self, i):
            return self[i]

    seen = data.Record("k", np.zeros((1, 4), np.uint16), (2, 2), "a ship", {"plain": "a ship", "era": "A vessel"}, "", "", [])
    assert tasks_of(Samples([seen]), mix, {}) == ("joint", "rewrite")


@pytest.mark.slow
def test_the_command_writes_codes_and_goes_on_with_the_same_bytes(folder):
    command = [sys.executable, "-m", "data_tools.encode", "--config", str(folder / "config.yaml")]

    def files() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "run" / "codes").iterdir()}

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole = files()
    assert {"train-00000.tar", "train-00001.tar", "codes.json"} <= set(whole)
    (folder / "run" / "codes" / "train-00001.tar").unlink()
    (folder / "run" / "codes" / "codes.json").unlink()
    encode.main(command[3:])
    assert files() == whole


def test_tasks_that_ran_elsewhere_make_the_same_bytes(folder, tmp_path, monkeypatch):
    """As --engine does: each task is sent away whole, and the stage then finds its shards done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    overrides = ["out=run", f"data.train={os.path.relpath(folder)}/train-*.tar", "tracking.kind=none"]
    shutil.copytree(folder / "run" / "image_tokenizer", tmp_path / "run" / "image_tokenizer")
    run = open_run(load_config(folder / "config.yaml", overrides))
    tasks = [pickle.loads(pickle.dumps(task)) for task in codes_tasks(run)]
    monkeypatch.chdir(tmp_path / "elsewhere")
    with open_engine("local") as engine:
        assert [number for number, _ in engine.run(run_codes_task, tasks)] == [0, 1]
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "codes").glob("*.tar")}
    encode_shards(run)
    assert before == {path: path.stat().st_mtime_ns for path in before}, "none was encoded again"
    assert codes_tasks(run) == []
    for path in before:
        config = from_dict({"codes": {"views": 3}, "threads": 1})
        slow = tmp_path / path.name
        tokenizer = ImageTokenizer.load(folder / "run" / "image_tokenizer")
        encode_shard(folder / path.name, slow, tokenizer, config, torch.device("cpu"), prefix=f"{path.stem.replace('-', '')}-")
        assert slow.read_bytes() == path.read_bytes()

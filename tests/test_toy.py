"""Promises of the toy set: what the caption says is what is drawn, and every item is a pure function of (seed, index)."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import toy


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [toy.draw(3, index, side=32)[1] for index in range(2000)]


def stated(truth: dict) -> dict:
    """The truth, as far as the plain caption tells it."""
    ground = truth["ground"] if truth["ground_stated"] else None
    return {"shapes": truth["shapes"], "hatching": truth["hatching"], "ground": ground}


def members(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


# ---- pictures ---------------------------------------------------------------------------------------------------


def test_an_item_depends_on_seed_and_index_alone():
    forwards = [toy.draw(5, i) for i in range(20)]
    backwards = [toy.draw(5, i) for i in reversed(range(20))][::-1]
    for (image_a, record_a), (image_b, record_b) in zip(forwards, backwards):
        assert image_a.tobytes() == image_b.tobytes() and record_a == record_b
    assert forwards[0][0].tobytes() != toy.draw(6, 0)[0].tobytes()
    assert len({image.tobytes() for image, _ in forwards}) > 15


def test_the_record_is_the_same_at_every_side_and_the_picture_has_the_side():
    for side in (32, 48, 64, 128, 256):
        image, record = toy.draw(1, 2, side)
        assert image.mode == "L" and image.size == (side, side)
        assert record == toy.draw(1, 2)[1]


@pytest.mark.parametrize("side", [0, 16, 60, 272])
def test_a_side_that_cannot_be_drawn_is_refused_by_name(side):
    with pytest.raises(ValueError, match=f"got {side}"):
        toy.draw(0, 0, side)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1"):
        toy.draw(-1, 0)


def test_every_shape_hatching_and_ground_appears_as_often_as_promised(records):
    truths = [record["truth"] for record in records]
    assert {shape for truth in truths for shape in truth["shapes"]} == set(toy.SHAPES)
    assert {truth["hatching"] for truth in truths} == set(toy.HATCHINGS)
    assert {truth["ground"] for truth in truths} == set(toy.GROUNDS)
    counts = np.bincount([len(truth["shapes"]) for truth in truths], minlength=4) / len(truths)
    np.testing.assert_allclose(counts, [0, 0.6, 0.28, 0.12], atol=0.03)


def test_the_border_is_the_ground_and_the_ground_is_as_told():
    for index in range(60):
        image, record = toy.draw(4, index)
        corner = {"light": toy.PAPER, "dark": toy.INK}[record["truth"]["ground"]]
        pixels = np.asarray(image)
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == corner).all()
        assert 0.02 < (pixels != corner).mean() < 0.7  # something is drawn, and not everywhere


def test_no_shape_is_cut_off_by_the_edge():
    for index in range(300):
        pixels = np.asarray(toy.draw(9, index)[0]).astype(int)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.ptp(edge) == 0, f"item {index} touches the edge"


def test_hatching_keeps_its_phase_from_cell_to_cell():
    """The whole canvas of a hatching is one 8 x 8 patch, repeated: few codes suffice."""
    for hatching, lean in (("parallel", "left"), ("parallel", "right"), ("cross", None), ("stipple", None)):
        canvas = np.asarray(toy._hatching(hatching, lean, "light", 64, 4).reduce(4))
        cells = canvas.reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(64, 64)
        assert len(np.unique(cells, axis=0)) == 1


def test_lines_that_lean_right_are_the_mirror_of_lines_that_lean_left():
    right, left = (np.asarray(toy._hatching("parallel", lean, "dark", 64, 4)) for lean in ("right", "left"))
    assert (right == left[:, ::-1]).all() and (right != left).any()


# ---- captions ---------------------------------------------------------------------------------------------------


def test_plain_captions_are_read_back_exactly(records):
    for record in records:
        assert toy.parse_caption(record["caption"]) == stated(record["truth"]), record["caption"]


def test_poetic_captions_name_the_same_shapes_and_hatching(records):
    for record in records:
        facts = toy.parse_caption(record["captions"]["poetic"])
        assert facts["shapes"] == record["truth"]["shapes"]
        assert facts["hatching"] == record["truth"]["hatching"]
        assert facts["ground"] in (record["truth"]["ground"], None)


def test_captions_are_varied_short_and_of_few_words(records):
    captions = [record["caption"] for record in records]
    lengths = [len(caption.split()) for caption in captions]
    assert min(lengths) >= 4 and max(lengths) <= 20 and 6 <= np.median(lengths) <= 16
    words = {word.strip(".,").lower() for caption in captions for word in caption.split()}
    assert len(words) < 80
    assert len(set(captions)) > len(captions) / 2
    assert 0.6 < np.mean([record["truth"]["ground_stated"] for record in records]) < 0.73


def test_the_subject_does_not_name_the_shape(records):
    for record in records:
        scenery = toy.SCENERY & set(record["truth"]["shapes"])
        assert record["subject"] == ("scenery" if scenery else "geometry")


def test_answers_agree_with_the_truth(records):
    for record in records:
        what, hatching, number, ground = (item["answer"] for item in record["questions"])
        truth = record["truth"]
        assert toy.parse_caption(what)["shapes"] == truth["shapes"]
        assert toy.parse_caption(hatching)["hatching"] == truth["hatching"]
        assert number == toy.NUMBERS[len(truth["shapes"])]
        assert ground == truth["ground"]


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("", {"shapes": [], "hatching": None, "ground": None}),
        ("A star and", {"shapes": ["star"], "hatching": None, "ground": None}),
        ("star beside two  MOONS", {"shapes": ["moon", "moon", "star"], "hatching": None, "ground": None}),
        ("Stars in stippling", {"shapes": ["star", "star"], "hatching": "stipple", "ground": None}),
        ("In cross-hatching, in stippling.", {"shapes": [], "hatching": None, "ground": None}),
        ("A disc on a light ground on a dark ground.", {"shapes": ["disc"], "hatching": None, "ground": None}),
        ("The stardust of discord in moonlight.", {"shapes": [], "hatching": None, "ground": None}),
    ],
)
def test_malformed_captions_give_what_can_be_read(caption, facts):
    assert toy.parse_caption(caption) == facts


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_no_text_makes_the_parser_raise(text):
    assert set(toy.parse_caption(text)) == {"shapes", "hatching", "ground"}


# ---- shards -----------------------------------------------------------------------------------------------------


def test_shards_are_byte_identical_when_written_twice(tmp_path):
    one = toy.write_shards(tmp_path / "one", 25, seed=2, side=64, prefix="train", shard_size=10)
    two = toy.write_shards(tmp_path / "two", 25, seed=2, side=64, prefix="train", shard_size=10)
    assert [path.name for path in one] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_shard_holds_pictures_and_records_in_the_house_format(tmp_path):
    (path,) = toy.write_shards(tmp_path, 5, seed=2, side=64)
    files = members(path)
    assert list(files)[:2] == ["toy-2-000000.png", "toy-2-000000.json"] and len(files) == 10
    for index in range(5):
        picture, record = files[f"toy-2-{index:06d}.png"], json.loads(files[f"toy-2-{index:06d}.json"])
        image, drawn = toy.draw(2, index)
        assert Image.open(io.BytesIO(picture)).tobytes() == image.tobytes()
        assert record == {**drawn, "sha256": hashlib.sha256(picture).hexdigest()}
        assert record["captions"]["plain"] == record["caption"] and record["style"] == "engraving"


def test_an_interrupted_write_leaves_no_half_shard_and_is_taken_up_again(tmp_path, monkeypatch):
    whole = toy.write_shards(tmp_path / "whole", 20, seed=1, side=32, shard_size=10)
    draw = toy.draw

    def interrupted(seed, index, side):
        if index == 15:
            raise KeyboardInterrupt
        return draw(seed, index, side)

    monkeypatch.setattr(toy, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.write_shards(tmp_path / "cut", 20, seed=1, side=32, shard_size=10)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["train-00000.tar"]
    monkeypatch.setattr(toy, "draw", draw)
    resumed = toy.write_shards(tmp_path / "cut", 20, seed=1, side=32, shard_size=10)
    assert [path.read_bytes() for path in resumed] == [path.read_bytes() for path in whole]


def test_whole_shards_are_left_alone_and_others_are_written_anew(tmp_path):
    first, second = toy.write_shards(tmp_path, 20, seed=1, side=32, shard_size=10)
    right, untouched = second.read_bytes(), first.stat().st_mtime_ns
    for wrong in (right[:3000], b"", b"not a tar", first.read_bytes()):
        second.write_bytes(wrong)
        toy.write_shards(tmp_path, 20, seed=1, side=32, shard_size=10)
        assert second.read_bytes() == right
    assert first.stat().st_mtime_ns == untouched
    toy.write_shards(tmp_path, 20, seed=1, side=48, shard_size=10)  # another side is another set
    assert second.read_bytes() != right


def test_shards_left_over_from_a_larger_set_are_refused(tmp_path):
    toy.write_shards(tmp_path, 20, seed=1, side=32, shard_size=10)
    with pytest.raises(ValueError, match=r"train-00001\.tar is not one of the 1 shards"):
        toy.write_shards(tmp_path, 10, seed=1, side=32, shard_size=10)
    toy.write_shards(tmp_path, 10, seed=1, side=32, prefix="val", shard_size=10)  # another prefix is another set

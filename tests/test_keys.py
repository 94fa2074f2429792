"""Which files of a shard are one sample, and which samples are ambiguous: training, encode and inspect say the same."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_tools.captioning.journals import count_pairs
from data_tools.inspect import take_inventory
from data_tools.readers.stored_pairs import read_pairs
from tokun import data
from tokun.data.shards import SEVERAL, TWICE, expand_shards, key_and_suffix
from tokun.data.tars import NO_FILE


def picture(shade, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("L", (16, 16), shade).save(buffer, kind)
    return buffer.getvalue()


def words(caption):
    return json.dumps({"caption": caption}).encode()


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE, len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


WHOLE = [("z.png", picture(7)), ("z.json", words("whole"))]
AMBIGUOUS = {
    "two pictures of other kinds, words twice": (
        [("a.webp", picture(1, "WEBP")), ("a.json", words("1")), ("a.jpg", picture(2, "JPEG")), ("a.json", words("2"))],
        TWICE,
    ),
    "a whole sample twice": ([("a.png", picture(1)), ("a.json", words("1"))] * 2, TWICE),
    "apart from one another": (
        [("a.png", picture(1)), ("a.json", words("1")), ("b.png", picture(3)), ("b.json", words("3")), ("a.png", picture(2))],
        TWICE,
    ),
    "in upper case": ([("a.png", picture(1)), ("a.PNG", picture(2)), ("a.json", words("1"))], TWICE),
    "a thumbnail of another kind": ([("a.png", picture(1)), ("a.jpg", picture(2, "JPEG")), ("a.json", words("1"))], SEVERAL),
    "three pictures": (
        [("a.webp", picture(0, "WEBP")), ("a.png", picture(1)), ("a.jpeg", picture(2, "JPEG")), ("a.json", words("1"))],
        SEVERAL,
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
@pytest.mark.parametrize("kept", [False, True])
def test_an_ambiguous_sample_is_left_out_counted_and_named(case, kept, tmp_path):
    members, reason = AMBIGUOUS[case]
    path = shard(tmp_path / "train-00000.tar", [*members, *WHOLE])
    for _ in range(2):  # the second time from the index that was kept
        index = data.ShardIndex([path], one_of=data.IMAGE_SUFFIXES, cache_file=tmp_path / "kept.index" if kept else None)
        assert "a" not in {index.key(i) for i in range(len(index))} and index.key(len(index) - 1) == "z"
        assert index.read_json(len(index) - 1)["caption"] == "whole"
        assert index.skipped[reason] == 1 and f"1 {reason} (train-00000.tar/a)" in index.skipped_summary()
    inventory = take_inventory([path])
    assert [str(one) for one in inventory.damaged] == [f"train-00000.tar/a: {reason}"] and inventory.pairs == len(index), (
        "inspect says the same"
    )


UNUSUAL = {
    "pictures first, words behind them": sorted([(f"{n}.{kind}", kind) for n in range(3) for kind in ("png", "json")],
        key=lambda one: one[1], reverse=True),
    "words first, in capitals": [(f"{n}.{kind}", kind.lower()) for kind in ("JSON", "PNG") for n in (2, 0, 1)],
    "folders, and a note twice that nobody reads": [("set/", ""), ("set/1.5/", ""), ("set/1.5/0.png", "png"), ("set/1.5/0.note", ""),
        ("set/1.5/0.json", "json"), ("set/1.5/0.note", "")],
    "masks beside": [("0.mask.png", "png"), ("0.jpg", "jpg"), ("0.mask.png", "png"), ("0.json", "json")],
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_training_reads_is_no_damage_and_is_captioned(case, tmp_path):
    """Members of a sample that lie apart were called damaged by inspect, and captioned as several pairs."""
    payloads = {"png": picture(3), "jpg": picture(4, "JPEG"), "json": words("x"), "": b""}
    path = shard(tmp_path / "train-00000.tar", [(name, payloads[kind]) for name, kind in UNUSUAL[case]])
    index, inventory, damaged = data.ShardIndex([path], one_of=data.IMAGE_SUFFIXES), take_inventory([path], verify=True), []
    found = list(read_pairs(path, damaged))
    assert not index.skipped and not inventory.damaged and not damaged and inventory.pairs == len(index) == count_pairs(path)
    assert [(pair.key, pair.image, pair.members["json"]) for pair in found] == [
        (index.key(i), index.read(i, index.image_suffix(i)), index.read(i, "json")) for i in range(len(index))
    ]


def test_links_in_a_shard_are_counted_and_no_damage_of_the_rest(tmp_path):
    """GNU tar stores the second copy of a file as a link: its sample was incomplete, and nothing said why."""
    path = tmp_path / "train-00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, payload in WHOLE:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        for name, kind in (("y.png", tarfile.SYMTYPE), ("x.png", tarfile.LNKTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "z.png"
            tar.addfile(info)
    index = data.ShardIndex([path], need=("json",), one_of=data.IMAGE_SUFFIXES)
    assert len(index) == 1 and index.skipped == {NO_FILE: 2}
    damaged = []
    assert [pair.key for pair in read_pairs(path, damaged)] == ["z"] and [one.what for one in damaged] == [NO_FILE]
    with tarfile.open(path, "w") as tar:  # a folder of a long name alone, which `tarfile` reads too
        info = tarfile.TarInfo("folder/" * 30)
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    assert not take_inventory([path], verify=True).damaged


def test_a_shard_of_nothing_but_ambiguous_samples_says_so_and_names_the_first(tmp_path):
    path = shard(
        tmp_path / "train-00000.tar",
        [member for n in range(9) for member in ((f"{n}.png", picture(n)), (f"{n}.jpg", picture(n, "JPEG")), (f"{n}.json", words("x")))],
    )
    with pytest.raises(ValueError, match=r"9 ambiguous: several pictures under one key \(train-00000.tar/0, train-00000.tar/1, .*…\)"):
        data.ShardIndex([path], one_of=data.IMAGE_SUFFIXES).usable()


def test_a_mask_or_a_depth_map_beside_a_picture_is_not_taken_for_it(tmp_path):
    path = shard(
        tmp_path / "train-00000.tar",
        [("a.mask.png", picture(1)), ("a.jpg", picture(200, "JPEG")), ("a.depth.webp", picture(2, "WEBP")), ("a.json", words("1"))],
    )
    index = data.ShardIndex([path], one_of=data.IMAGE_SUFFIXES)
    assert len(index) == 1 and index.image_suffix(0) == "jpg" and not index.skipped
    assert np.asarray(data.decode_image(index.read(0, "jpg"), 1)).mean() == pytest.approx(200, abs=2)


@pytest.mark.parametrize("folder", ["set.v1/", "./a.b/c.d/", "1.0/2.0/", ""])
def test_dots_in_a_folder_belong_to_the_key(folder, tmp_path):
    path = shard(
        tmp_path / "train-00000.tar",
        [(f"{folder}{n:04}.{kind}", payload) for n in range(3) for kind, payload in (("png", picture(n)), ("json", words(str(n))))],
    )
    index = data.ShardIndex([path], one_of=data.IMAGE_SUFFIXES)
    assert [index.key(i) for i in range(len(index))] == [f"{folder.removeprefix('./')}{n:04}" for n in range(3)]
    assert [index.read_json(i)["caption"] for i in range(3)] == ["0", "1", "2"] and not index.skipped
    assert [pair.key for pair in read_pairs(path, [])] == [index.key(i) for i in range(3)]


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("0.png", "0", "png"),
        ("set.v1/0000.mask.PNG", "set.v1/0000", "mask.png"),
        ("./x/y", "x/y", ""),
        ("a/.hidden", "a/", "hidden"),
        ("map.1.codes.npy", "map", "1.codes.npy"),
    ],
)
def test_a_members_key_ends_at_the_first_dot_behind_the_last_slash(name, key, suffix):
    assert key_and_suffix(name) == (key, suffix)


@pytest.mark.parametrize("name", ["{a..b}", "{1..}", "x{..}"])
def test_braces_that_are_no_range_of_numbers_are_told_to_name_no_shard(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        expand_shards(f"{tmp_path}/nowhere/{name}.tar")

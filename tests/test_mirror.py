"""Promises of mirrored views: no lettering is turned round, and the words follow the picture."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tokun import data
from tokun.config import from_dict
from tokun.data import mirror
from tokun.data.codes import CodeSamples, Record
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training.codes import encode_shard


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("A man on the left, a dog on the Right.", "A man on the right, a dog on the Left."),
        ("LEFT of the tower", "RIGHT of the tower"),
        ("left-hand page", "right-hand page"),
        ("a right whale at a right angle, left behind", "a right whale at a right angle, left behind"),
        ("bright leftover copyright", "bright leftover copyright"),
    ],
)
def test_left_and_right_change_places_where_they_are_sides(text, other):
    assert mirror.exchange_sides(text) == other and mirror.exchange_sides(other) == text


def test_pictures_that_show_writing_are_not_mirrored():
    assert mirror.may_be_mirrored(["A moth with spread wings.", "A watchman at a gate"])
    for text in (
        "A banner over a gate",
        "An ornate initial",
        "Title page with a ship",
        "A stone with an Inscription",
        "A labelled diagram of an eye",
        "A sundial",
    ):
        assert not mirror.may_be_mirrored(["A moth.", text]), text


def shard(path, captions):
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            picture = io.BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40), np.uint8)).save(picture, "PNG")
            tree = {"caption": caption, "questions": [{"question": "What stands on the left?", "answer": "a tree"}]}
            for suffix, content in (("png", picture.getvalue()), ("json", json.dumps(tree).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_code_shards_hold_mirrored_views_of_pictures_without_writing_alone(tmp_path, tiny_image_tokenizer):
    shard(tmp_path / "train-0.tar", ["A tree on the left."] * 6 + ["A title page, a tree on the left."] * 6)
    size = tiny_image_tokenizer.config.image_size
    config = from_dict({"image_tokenizer": {"image_size": size}, "codes": {"views": 8, "mirror": True}})
    encode_shard(tmp_path / "train-0.tar", tmp_path / "codes.tar", tiny_image_tokenizer, config, torch.device("cpu"))
    samples = CodeSamples([tmp_path / "codes.tar"])
    records = [samples.record(i) for i in range(12)]
    assert all(len(record.mirrored) == 8 and not record.mirrored[0] for record in records)
    turned = [sum(record.mirrored) for record in records]
    assert 8 < sum(turned[:6]) < 34 and not any(turned[6:])


def test_the_words_of_a_mirrored_view_are_those_of_the_mirrored_picture():
    codes = np.array([[1, 2, 3, 4], [2, 1, 4, 3]], np.uint16)
    captions = {"plain": "a tree on the left", "poetic": "the lonely right"}
    record = Record("k", codes, (2, 2), captions["plain"], captions, "", "", [("left?", "no, right")], "", (False, True))
    vocabulary = Vocabulary(512, 16, grids=((2, 2),), registers=("plain", "poetic"))
    batches = data.TokenBatches(
        [record],
        vocabulary,
        lambda text: list(map(ord, text)),
        batch_size=1,
        seed=0,
        task_mix={"joint": 1, "question": 1},
        tag_dropout=0.0,
        plain_share=0.5,
    )
    found = set()
    for seed in range(200):
        parts = sequences.unpack(vocabulary, batches.pack(record, np.random.default_rng(seed)).input_ids)
        texts = (parts.caption,) if parts.task == "joint" else (parts.question, parts.answer)
        found.add((parts.codes[0], *("".join(map(chr, ids)) for ids in texts)))
    assert found == {
        (1, "a tree on the left"), (1, "the lonely right"), (2, "a tree on the right"), (2, "the lonely left"), (1, "left?", "no, right"), (2, "right?", "no, left"),
    }  # fmt: skip

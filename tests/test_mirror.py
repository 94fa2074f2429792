"""Promises of mirrored views: no lettering is turned round, and the words follow the picture."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.captioning.described_rows import alt_text
from data_tools.questions import Plan, questions_of
from data_tools.text.main_noun import Lexicon
from tokun import data
from tokun.config import from_dict
from tokun.data import mirror
from tokun.data.codes import CodeSamples, Record
from tokun.tokenizers import sequences, wordings
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


LETTERED = "A page of text, a title."


@pytest.mark.parametrize(
    ("captions", "questions", "may"),
    [
        ({"plain": "A ship."}, [], True),
        ({"plain": "A ship.", "era": "The captain's letter, from “The Book of Names”"}, [], True),
        ({"plain": "A ship.", "alt": "Wood engraving: a ship with its name at the bow."}, [], False),
        ({"plain": "A ship.", "poetic": "It wears its number proudly."}, [], False),
        ({"plain": "A ship.", "social": "Can you read the sign?"}, [], False),
        ({"plain": "A ship.", "alt": "Wood engraving: a ship."}, [], True),
        ({"plain": "A ship."}, [("What hangs over the gate?", "a banner with words")], False),
        ({"plain": "A ship."}, [("What is written here?", "nothing")], True),
        ({"plain": "A ship."}, [(wordings.SHOWS.format(LETTERED), "no"), ("Is this a coin?", "no"), ("Are there letters?", "no")], True),
        ({"plain": "A ship."}, [("Who wrote the book?", "the author of Lost Letters")], True),
    ],
)  # fmt: skip
def test_words_about_what_is_seen_decide_and_those_about_something_else_do_not(captions, questions, may):
    assert mirror.may_be_mirrored(mirror.seen_of(captions, questions)) is may


def test_no_question_and_no_alt_text_by_rule_stops_mirroring_of_itself():
    record = {"caption": "A ship in a storm.", "style": "wood-engraving", "subject": "ship", "thing": "ship"}
    words = {"plain": record["caption"], "alt": alt_text("wood engraving", record["caption"], Lexicon(Counter(), Counter(), Counter()))}
    for number in range(20):  # each wording
        asked = questions_of(record, Image.new("L", (8, 8), 255), str(number), 0, LETTERED, Plan(more=(("Is this a coin?", "no"),)))
        assert len(asked) > 6
        assert mirror.may_be_mirrored(mirror.seen_of(words, [(one["question"], one["answer"]) for one in asked]))


def shard(path, plain, **more):
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(plain):
            picture = io.BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40), np.uint8)).save(picture, "PNG")
            tree = {"caption": caption, "questions": [{"question": "What stands on the left?", "answer": "a tree"}], **more}
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


def test_an_alt_text_of_lettering_keeps_a_picture_as_it_is(tmp_path, tiny_image_tokenizer):
    shard(tmp_path / "train-0.tar", ["A tree on the left."] * 3, captions={"alt": "A tree, a title below it."})
    config = from_dict({"image_tokenizer": {"image_size": tiny_image_tokenizer.config.image_size}, "codes": {"views": 8, "mirror": True}})
    encode_shard(tmp_path / "train-0.tar", tmp_path / "codes.tar", tiny_image_tokenizer, config, torch.device("cpu"))
    samples = CodeSamples([tmp_path / "codes.tar"])
    assert not any(any(samples.record(i).mirrored) for i in range(3))


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
        (1, "a tree on the left"), (1, "the lonely right"), (2, "a tree on the right"), (2, "the lonely left"), (1, "left?", "no, right"),
        (2, "right?", "no, left"),
    }  # fmt: skip

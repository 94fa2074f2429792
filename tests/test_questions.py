"""Promises of data_tools/questions.py."""

from __future__ import annotations

import json
import tarfile

import pytest
from PIL import Image

from data_tools import questions, toy
from data_tools.inspect import read_pairs


def answers(record, image=None, key="a", seed=0, other=""):
    return {q["question"]: q["answer"] for q in questions.questions_of(record, image, key, seed, other)}


def test_only_what_is_known_is_asked():
    record = {"caption": "Two large ships near a tower.", "style": "wood-engraving", "subject": "the-sea"}
    found = answers(record, Image.new("L", (40, 40), 30))
    assert set(found.values()) == {"Two large ships near a tower.", "a wood engraving", "the sea", "two", "dark"}
    assert next(q for q, a in found.items() if a == "two").startswith("How many large ships")
    assert answers({"caption": " "}) == {} and answers({}) == {}
    assert set(answers({"caption": "A ship", "captions": {"plain": "One ship", "alt": "x"}, "style": "etching"}).values()) == {"One ship", "an etching"}
    assert answers({"caption": ""}, Image.new("L", (9, 9), 140)) == {}, "neither light nor dark"
    assert set(answers({"caption": ""}, Image.new("RGB", (9, 9), "white")).values()) == {"light"}


def test_yes_and_no_come_together():
    found = answers({"caption": "A ship"}, other="A tower")
    assert found["Does the picture show this: A ship"] == "yes" and found["Does the picture show this: A tower"] == "no"
    for alone in ({}, {"other": "A ship"}):
        assert not {"yes", "no"} & set(answers({"caption": "A ship"}, **alone).values())


@pytest.mark.parametrize(
    "caption", ["Two of the ships", "Two dogs and three cats", "He walked two miles", "two hundred men", "A ship", "Chapter two was long", "The twelve days"]
)
def test_numbers_that_count_nothing_that_is_seen_are_left_alone(caption):
    assert questions.counted(caption) == []


def test_wordings_differ_between_pictures_and_not_between_runs():
    asked = [questions.wording("what", f"key-{index}", 3) for index in range(60)]
    assert set(asked) == set(questions.WORDINGS["what"]) and asked == [questions.wording("what", f"key-{index}", 3) for index in range(60)]
    assert asked != [questions.wording("what", f"key-{index}", 4) for index in range(60)]


def test_shards_get_questions_once_and_the_rest_stays(tmp_path, capsys):
    toy.write_shards(tmp_path / "toy", 30, 0, 32, "train", shard_size=12)
    assert questions.main([str(tmp_path / "toy"), "--out", str(tmp_path / "out")]) == 0
    assert "30 pictures" in capsys.readouterr().out
    for shard in sorted((tmp_path / "toy").glob("*.tar")):
        before, after = list(read_pairs(shard, [])), list(read_pairs(tmp_path / "out" / shard.name, []))
        assert [pair.key for pair in before] == [pair.key for pair in after]
        for one, other in zip(before, after):
            old, new = json.loads(one.members["json"]), json.loads(other.members["json"])
            assert one.image == other.image and {**new, "questions": old["questions"]} == old
            assert new["questions"][: len(old["questions"])] == old["questions"] and len(new["questions"]) > len(old["questions"])
            asked = [q["question"] for q in new["questions"]]
            assert len(set(asked)) == len(asked)
        checked = [[q["answer"] for q in json.loads(pair.members["json"])["questions"] if q["answer"] in ("yes", "no")] for pair in read_pairs(tmp_path / "out" / shard.name, [])]
        assert checked[0] == [] and all(both == ["yes", "no"] for both in checked[1:])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    bytes_of = {path.name: path.read_bytes() for path in stamps}
    gone = min(stamps)
    gone.unlink()
    questions.ask([tmp_path / "toy"], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in stamps} == bytes_of
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != gone)


def test_what_cannot_be_done_is_told(tmp_path, capsys):
    toy.write_shards(tmp_path / "toy", 4, 0, 32, "train")
    assert questions.main([str(tmp_path / "toy"), "--out", str(tmp_path / "toy")]) == 1
    assert "name another" in capsys.readouterr().err
    questions.ask([tmp_path / "toy"], tmp_path / "out")
    with pytest.raises(ValueError, match="another seed"):
        questions.ask([tmp_path / "toy"], tmp_path / "out", seed=1)
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        tar.add(next((tmp_path / "toy").glob("*.tar")), arcname="a.json")  # a JSON that is none
    assert questions.ask([tmp_path / "odd.tar"], tmp_path / "odd")["damaged records"] == 1

"""Promises of tokun/data/sample_record.py: the record of a sample is read in one place, and its keys are those of the documentation."""

import re
from pathlib import Path

import pytest

from tokun.data import sample_record
from tokun.utils.errors import BadSample

FORMATS = Path(__file__).resolve().parents[1] / "docs" / "reference" / "formats.md"
OF_CODES = {"grid", "boxes", "boxes_of"}


def test_the_documentation_has_each_key_that_is_read():
    text = FORMATS.read_text(encoding="utf-8")
    table = text[text.index("`KEY.json`, as `data_tools.prepare` writes it:") : text.index("Training needs a picture")]
    documented = {key for line in table.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1] if line.count("|") > 2 else "")}
    assert sample_record.KEYS.keys() - OF_CODES <= documented
    assert all(f"`{key}`" in text for key in sample_record.KEYS)


def test_questions_are_pairs_of_texts():
    asked = {"questions": [{"question": "What is shown?", "answer": "a moth", "by": "rule"}]}
    assert sample_record.questions_of(asked) == [("What is shown?", "a moth")] and sample_record.questions_of({}) == []


@pytest.mark.parametrize(
    "questions", ["What?", {"question": "a", "answer": "b"}, ["What?"], [{"question": "a"}], [{"question": "a", "answer": 3}], None]
)
def test_other_questions_make_the_sample_a_bad_one(questions):
    with pytest.raises(BadSample, match="questions is not a list"):
        sample_record.questions_of({"questions": questions})


@pytest.mark.parametrize(
    ("read", "record", "why"),
    [
        (sample_record.captions_by_register, {"captions": ["a"]}, "captions is a list"),
        (sample_record.grid_of, {"grid": [4]}, r"grid is \[4\]"),
        (sample_record.grid_of, {}, "grid is None"),
        (sample_record.mirrored_of, {"boxes": [[1]]}, "boxes is not a list"),
    ],
)
def test_a_part_of_the_wrong_form_is_named(read, record, why):
    with pytest.raises(BadSample, match=why):
        read(record)


def test_what_is_written_from_the_picture_comes_before_a_template():
    template = {"captions": {"plain": "by rule"}, "caption_sources": {"plain": {"source": "template"}}}
    assert sample_record.plain_of({**template, "caption": "printed"}) == "printed" and sample_record.plain_of(template) == "by rule"
    assert sample_record.plain_of({"captions": {"plain": "seen"}, "caption": "printed"}) == "seen"
    assert sample_record.plain_of({"caption": "printed", "alt": "told"}, "alt") == "told"

"""Which words a caption has at most once."""

import json

from tokun import load
from tokun.data.caption_words import RepetitionCounts, words
from tokun.inference.folders import SAMPLING


def test_words_that_captions_hardly_ever_have_twice_are_found():
    often = ["A man beside a ship.", "Side by side, an owl and an Owl."] * 50
    assert RepetitionCounts(often).unrepeated() == ["and", "beside", "by", "man", "ship"]
    assert RepetitionCounts(often[:98]).unrepeated() == [], "fewer than 50 captions each say nothing"


def test_one_repetition_in_fifty_is_allowed():
    captions = ["A tall tree."] * 49
    assert "tree" in RepetitionCounts([*captions, "A tree by a tree."]).unrepeated()
    assert "tree" not in RepetitionCounts([*captions, *["A tree by a tree."] * 2]).unrepeated()


def test_words_are_in_lower_case_and_without_marks():
    assert words("The King\u2019s well-kept \u201cHat\u201d, 1863.") == ["the", "king\u2019s", "well-kept", "hat", "1863"]


def test_a_checkpoint_keeps_its_unrepeated_words_and_older_ones_have_none(tiny_model, tmp_path):
    tiny_model.unrepeated_words = ("ship", "tree")
    try:
        tiny_model.save(tmp_path / "new")
    finally:
        tiny_model.unrepeated_words = ()
    assert load(tmp_path / "new").unrepeated_words == ("ship", "tree")
    settings = json.loads((tmp_path / "new" / SAMPLING).read_text())
    del settings["unrepeated_words"]
    (tmp_path / "new" / SAMPLING).write_text(json.dumps(settings))
    assert load(tmp_path / "new").unrepeated_words == ()

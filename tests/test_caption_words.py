"""Which words a caption has at most once."""

import json

from tokun import load
from tokun.data.caption_words import RepetitionCounts, words
from tokun.inference.folders import SAMPLING
from tokun.inference.text_token_classes import after_a_letter, ids_of_words
from tokun.inference.token_choice import word_numbers


def test_words_that_captions_hardly_ever_have_twice_are_found():
    often = ["A man beside a ship.", "Side by side, an owl and an Owl."] * 50
    assert RepetitionCounts(often).unrepeated() == ["and", "beside", "by", "man", "ship"]
    assert RepetitionCounts(often[:98]).unrepeated() == [], "fewer than 50 captions each say nothing"


def test_one_repetition_in_fifty_is_allowed():
    captions = ["A tall tree."] * 49
    assert "tree" in RepetitionCounts([*captions, "A tree by a tree."]).unrepeated()
    assert "tree" not in RepetitionCounts([*captions, *["A tree by a tree."] * 2]).unrepeated()


def test_known_words_stay_unless_these_captions_repeat_them():
    captions = ["A tree by a tree."] * 50
    assert RepetitionCounts(captions).unrepeated(["ship", "tree"]) == ["by", "ship"]


def test_words_are_in_lower_case_and_without_marks():
    assert words("The King\u2019s well-kept \u201cHat\u201d, 1863.") == ["the", "king\u2019s", "well-kept", "hat", "1863"]


def test_the_ids_of_a_word_are_those_that_begin_and_end_it_in_either_case(tiny_model):
    v, tokenizer = tiny_model.vocabulary, tiny_model.text_tokenizer
    after = after_a_letter(tokenizer, v)
    spelt = {i: text[2:] for i, text in after.items() if text.startswith("a ") and text[2:].isalpha()}
    word = next(text.lower() for text in spelt.values() if text[0].isupper() and text.lower() in spelt.values())
    (ids,) = ids_of_words(after, [word, "xylographica"])
    assert sorted(ids) == sorted(i for i, text in spelt.items() if text.lower() == word) and len(ids) > 1
    assert word_numbers([ids, []], v.size).nonzero()[:, 0].tolist() == sorted(ids)


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

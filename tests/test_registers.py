"""Registers: what is asked, what is refused, and what a template says without a model."""

import json
import subprocess
import sys

import pytest

from data_tools.captioning import registers
from data_tools.captioning.registers import (
    Facts,
    ask,
    ask_json,
    echoes,
    facts_of,
    fault,
    frame,
    loops,
    parse_registers,
    read_answer,
    template,
    tidy,
)
from tokun.tokenizers import vocabulary

SHIP = Facts(
    caption="A Dutch Ship", title="The Sea. Its history", author="Wood, J. G. (John George), 1827-1889", illustrator="Doré, Gustave",
    technique="wood engraving", subject="sea",
)  # fmt: skip


def test_registers_are_those_that_the_model_knows():
    assert registers.REGISTERS == vocabulary.REGISTERS and set(registers.TEMPLATES) == set(registers.REGISTERS)


def test_registers_are_read_once_each_and_an_unknown_one_names_the_nearest():
    assert parse_registers("plain, Poetic,plain") == ("plain", "poetic")
    with pytest.raises(
        ValueError, match=r"'poetry', which is not a register: did you mean 'poetic'\? The registers are plain, poetic, era, social, alt"
    ):
        parse_registers("plain,poetry")
    with pytest.raises(ValueError, match="--registers is empty"):
        parse_registers(" ,")


def test_facts_are_read_from_the_fields_that_hold_them():
    record = {
        "caption": " A\u00ad ship\n at sea ",
        "style": "wood-engraving",
        "category": "sea",
        "artist": "Doré",
        "width": 3,
        "title": None,
    }
    assert facts_of(record) == Facts(caption="A ship at sea", technique="wood engraving", subject="sea", illustrator="Doré")
    assert facts_of({"technique": "line illustration (unspecified)"}).technique == "line illustration"
    assert not facts_of({}) and not SHIP.only([]) and SHIP.only(["subject"]) == Facts(subject="sea")


# ---------------------------------------------------------------------------------------------------------------------
# asking


def test_prompts_hold_the_facts_as_hints_and_nothing_when_there_are_none():
    seen = ask("plain", SHIP, hashtags=True)
    assert (
        seen.startswith("Write one plain sentence") and "- printed caption: A Dutch Ship\n" in seen and "use only what it bears out" in seen
    )
    blind = ask("alt", SHIP, hashtags=True, description="a ship")
    assert "- what it shows: a ship\n" in blind and "invent nothing beyond it" in blind
    assert "Known" not in ask("plain", Facts(), hashtags=True)
    assert "hashtags at the end" in ask("social", SHIP, hashtags=True) and "without hashtags" in ask("social", SHIP, hashtags=False)


def test_the_schema_asks_for_exactly_the_registers():
    tree = registers.schema(["plain", "alt"])
    assert tree["required"] == ["plain", "alt"] and tree["additionalProperties"] is False
    assert tree["properties"] == {"plain": {"type": "string"}, "alt": {"type": "string"}}
    prompt = ask_json(["plain", "alt"], SHIP, hashtags=True)
    assert "- plain: " in prompt and "- alt: " in prompt and "- poetic" not in prompt


@pytest.mark.parametrize(
    ("text", "names", "answer"),
    [
        ('{"plain": "A ship."}', ["plain"], {"plain": "A ship."}),
        ('```json\n{"plain": "A ship."}\n```', ["plain"], {"plain": "A ship."}),
        ('<think>{"no": 1}</think>Here: {"plain": "A {ship}."}', ["plain"], {"plain": "A {ship}."}),
        ("A ship.", ["plain"], {"plain": "A ship."}),
    ],
)
def test_json_is_found_in_what_models_put_around_it(text, names, answer):
    assert read_answer(text, names) == answer


@pytest.mark.parametrize("text", ["", "{", '{"plain": ', "[1]", "A ship.", '{"plain": }', '{"a":' * 100_000 + "}"])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match="answer is not a JSON object"):
        read_answer(text, ["plain", "alt"])


# ---------------------------------------------------------------------------------------------------------------------
# judging


@pytest.mark.parametrize(
    "text",
    [
        "A ship.",
        ' "A ship." ',
        "“A ship.”",
        "Caption: A ship.",
        "<think>hm</think> A ship.",
        "Sure! Here is the caption: A ship.",
        "**A ship.**",
    ],
)
def test_what_models_put_around_an_answer_is_taken_away(text):
    assert tidy(text, "plain", hashtags=True) == "A ship."


def test_honest_words_stay_as_they_are():
    for text in ['"Halt!" he cried, "or I fire!"', "Here lies a ship, and there a boat.", "The era of steam.", "Plain sailing."]:
        assert tidy(text, "plain", hashtags=True) == text


def test_hashtags_only_where_they_are_wanted():
    assert tidy("Ahoy! #sea #ship", "social", hashtags=False) == "Ahoy!"
    assert tidy("Ahoy! #sea #ship", "social", hashtags=True) == "Ahoy! #sea #ship"
    assert tidy("Plate #3", "plain", hashtags=False) == "Plate #3"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("...", "empty answer"), ("w" + " word ship" * 400, "answer too long"), ("I'm sorry, but I can't help with that.", "refusal"),
        ("a ship a ship a ship a ship", "loop"), ("ship ship ship ship", "loop"), ("haaaaaaaaaaa", "loop"),
        ("the man in the boat looks on, the man in the boat looks on", "loop"),
        ("Write one plain sentence that says what the picture shows and nothing else.", "echo of the prompt"),
        ("It says what the picture shows and nothing else", "echo of the prompt"), ("Answer with the text alone.", "echo of the prompt"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_kept_have_a_reason(text, reason):
    assert fault(text, frame(["plain"], hashtags=True)) == reason


def test_good_captions_are_kept():
    asked = frame(registers.REGISTERS, hashtags=True)
    for text in [
        "A ship.",
        "Row, row, row your boat",
        "A man, a plan, a canal: Panama",
        "A ship and a boat and a ship and a sail",
        "Plain sentence",
        "海の上の船",
    ]:
        assert fault(text, asked) == ""


def test_no_caption_of_the_toy_set_counts_as_a_loop_or_an_echo(toy_captions):
    asked = frame(registers.REGISTERS, hashtags=True)
    assert not [caption for caption in toy_captions if fault(caption, asked)]


def test_loops_and_echoes_of_nothing_are_none():
    assert not loops("") and not echoes("", "asked") and not echoes("said", "") and not echoes("the picture", "what the picture shows")


# ---------------------------------------------------------------------------------------------------------------------
# templates


def test_templates_say_what_is_known():
    told = {name: template(name, SHIP, hashtags=True) for name in registers.REGISTERS}
    assert told == {
        "plain": "A Dutch Ship. A wood engraving by Gustave Doré (sea).",
        "poetic": "A Dutch Ship, held still in a wood engraving by Gustave Doré.",
        "era": "A Dutch Ship. Wood engraving by Gustave Doré, from “The Sea. Its history”, by J. G. Wood.",
        "social": "A Dutch Ship. A wood engraving by Gustave Doré, from “The Sea. Its history”. #woodengraving #sea",
        "alt": "A wood engraving: A Dutch Ship. Subject: sea.",
    }
    assert template("social", SHIP, hashtags=False).endswith("history”.")


def test_templates_pass_over_what_is_not_known_and_say_nothing_of_nothing():
    for name in registers.REGISTERS:
        assert template(name, Facts(), hashtags=True) == "" == template(name, Facts(title="The Sea"), hashtags=True)
        for mark in ("...", ".", "—"):  # ended every run of the shard with an IndexError
            assert template(name, Facts(caption=mark), hashtags=True) == ""
        for facts in (
            Facts(caption="..", subject="sea"),
            Facts(caption="Who goes there?"),
            Facts(technique="etching"),
            Facts(subject="sea"),
            Facts(caption="An etching", technique="etching"),
        ):
            text = template(name, facts, hashtags=True)
            assert text and fault(text, "") == "" and text[0].isupper(), (name, text)
            assert not any(odd in text for odd in ("{", "[", "]", "  ", "..", "?.", ". .", ": .", " .")), (name, text)
    assert template("plain", Facts(caption="An etching of a ship", technique="etching"), hashtags=True) == "An etching of a ship."


@pytest.mark.parametrize(
    ("name", "natural"),
    [
        ("Doré, Gustave, 1832-1883", "Gustave Doré"),
        ("Gustave Doré", "Gustave Doré"),
        ("Various", ""),
        ("Reilly, C. H. (Charles), Sir", "Sir C. H. Reilly"),
    ],
)
def test_names_read_naturally(name, natural):
    assert registers.name_in_order(name) == natural


def test_titles_are_short_and_abbreviations_whole():
    assert registers.short_title("Punch, or the London Charivari. July 30, 1887") == "Punch, or the London Charivari"
    assert registers.short_title("St. Nicholas: A Magazine") == "St. Nicholas"
    assert len(registers.short_title("word " * 40)) <= 71


def test_registers_need_no_torch():
    code = "import sys, data_tools.captioning.registers, data_tools.captioning, data_tools.caption; print('torch' in sys.modules)"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.lower()) is False

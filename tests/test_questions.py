"""Promises of data_tools/questions.py."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import questions, toy
from data_tools.captioning.from_table import Options, merge
from data_tools.readers.stored_pairs import read_pairs
from data_tools.text.yes_or_no import FAMILIES, KINDS, Shown, is_no, is_this, named


def answers(record, image=None, key="a", seed=0, other=""):
    return {q["question"]: q["answer"] for q in questions.questions_of(record, image, key, seed, other)}


def test_only_what_is_known_is_asked():
    record = {"caption": "Two large ships near a tower.", "style": "wood-engraving", "subject": "the-sea"}
    found = answers(record, Image.new("L", (40, 40), 30))
    assert set(found.values()) == {"Two large ships near a tower.", "a wood engraving", "the sea", "two", "dark"}
    assert next(q for q, a in found.items() if a == "two").startswith("How many large ships")
    assert answers({"caption": " "}) == {} and answers({}) == {}
    assert set(answers({"caption": "A ship", "captions": {"plain": "One ship", "alt": "x"}, "style": "etching"}).values()) == {
        "One ship",
        "an etching",
    }
    assert answers({"caption": ""}, Image.new("L", (9, 9), 140)) == {}, "neither light nor dark"
    assert set(answers({"caption": ""}, Image.new("RGB", (9, 9), "white")).values()) == {"light"}


def test_yes_and_no_come_together():
    found = answers({"caption": "A ship"}, other="A tower")
    assert found["Does the picture show this: A ship"] == "yes" and found["Does the picture show this: A tower"] == "no"
    for alone in ({}, {"other": "A ship"}):
        assert not {"yes", "no"} & set(answers({"caption": "A ship"}, **alone).values())


@pytest.mark.parametrize(
    "caption",
    [
        "Two of the ships",
        "Two dogs and three cats",
        "He walked two miles",
        "two hundred men",
        "A ship",
        "Chapter two was long",
        "The twelve days",
    ],
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
        checked = [
            [q["answer"] for q in json.loads(pair.members["json"])["questions"] if q["answer"] in ("yes", "no")]
            for pair in read_pairs(tmp_path / "out" / shard.name, [])
        ]
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
    assert questions.main([str(tmp_path / "toy"), "--out", str(tmp_path / "toy")]) == 2
    assert "name another" in capsys.readouterr().err
    questions.ask([tmp_path / "toy"], tmp_path / "out")
    with pytest.raises(ValueError, match="another seed"):
        questions.ask([tmp_path / "toy"], tmp_path / "out", seed=1)
    (tmp_path / "out/questions.json").unlink()  # shards of another tool: nothing was asked, and nothing said
    assert questions.main([str(tmp_path / "toy"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no questions.json" in capsys.readouterr().err and not (tmp_path / "out/questions.json").exists()
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        tar.add(next((tmp_path / "toy").glob("*.tar")), arcname="a.json")  # a JSON that is none
    assert questions.ask([tmp_path / "odd.tar"], tmp_path / "odd")["damaged records"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# of described pictures

DATA = Path(__file__).parents[2] / "shared/data"


THINGS = {
    "knight": "figure", "sailor": "figure", "queen": "portrait", "bishop": "portrait", "wolf": "animal", "stag": "animal", "moth": "insect",
    "beetle": "insect",
    "owl": "bird", "crow": "bird", "fern": "plant", "thistle": "plant", "oak": "tree", "elm": "tree", "castle": "building",
    "temple": "building",
    "galley": "ship", "sloop": "ship", "abbey": "ruin", "urn": "vessel", "jug": "vessel", "clock": "machine", "loom": "machine",
    "sword": "arms", "dagger": "arms",
}  # fmt: skip
COUNTS = ("A", "A", "A", "A", "Two", "Three", "Four", "Two", "Several", "A")


def made_records(rng, n):
    """(record, picture) of n described prints: things in all numbers, techniques, light and dark."""
    for number in range(n):
        thing = list(THINGS)[rng.integers(len(THINGS))]
        count, other = COUNTS[rng.integers(len(COUNTS))], list(THINGS)[rng.integers(len(THINGS))]
        things = thing if count == "A" else {"wolf": "wolves"}.get(thing, thing + "s")
        record = {
            "caption": f"{count} {things} by {('a ' + other) if other != thing else 'the water'}, plate {number}.", "thing": thing,
            "subject": THINGS[thing],
            "style": ("wood-engraving", "etching", "woodcut")[rng.integers(3)],
        }  # fmt: skip
        tone = int(rng.choice([20, 90, 130, 240], p=[0.2, 0.2, 0.2, 0.4]))
        buffer = io.BytesIO()
        Image.fromarray(np.full((32, 32), tone, np.uint8)).save(buffer, "PNG")
        yield record, buffer.getvalue()


def made_prints(folder, n=1000):
    folder.mkdir()
    with tarfile.open(folder / "val-00000.tar", "w") as tar:
        for number, (record, picture) in enumerate(made_records(np.random.default_rng(0), n)):
            for suffix, content in (("png", picture), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


real = [
    pytest.mark.skipif(not (DATA / "descriptions.tsv").is_file(), reason="the engravings are not beside the project (../shared)"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module", params=["made", pytest.param("real", marks=real)])
def described(request, tmp_path_factory):
    """The records of prints that were described and asked: made on the spot, and real ones where they lie beside the project."""
    folder = tmp_path_factory.mktemp("asked")
    if request.param == "made":
        made_prints(folder / "described")
        questions.ask([folder / "described"], folder / "out")
        return [json.loads(pair.members["json"]) for pair in read_pairs(folder / "out/val-00000.tar", [])]
    merge([DATA / "engravings/val-00000.tar", DATA / "plates/val-00000.tar"], DATA / "descriptions.tsv", folder / "described", Options())
    questions.ask([folder / "described"], folder / "out")
    pairs = read_pairs(folder / "out/val-00000.tar", [])
    return [json.loads(pair.members["json"]) for pair in pairs]


def asked_of(records, start):
    return [
        (i, q["question"], q["answer"]) for i, record in enumerate(records) for q in record["questions"] if q["question"].startswith(start)
    ]


@pytest.mark.slow
def test_who_sees_the_question_alone_guesses_yes_or_no_at_chance(described):
    for start in ("Is this ", "Is the subject "):
        answers = asked_of(described, start)
        balance = Counter((question, answer) for _, question, answer in answers)
        assert len(answers) > 200 and len({question for _, question, _ in answers}) > 10
        assert all(balance[question, "yes"] == balance[question, "no"] for question, _ in balance)
    answers = [(q["question"], q["answer"]) for record in described for q in record["questions"] if q["answer"] in ("yes", "no")]
    heard: dict[str, Counter] = {}
    for question, answer in answers:  # who has heard every answer, and judges by the question's words (naive Bayes) …
        for word in question.split():
            heard.setdefault(word, Counter())[answer] += 1
    odds = [sum(np.log((heard[word]["yes"] + 1) / (heard[word]["no"] + 1)) for word in question.split()) for question, _ in answers]
    right = np.mean([(value > 0) == (answer == "yes") for value, (_, answer) in zip(odds, answers)])
    assert len(answers) > 3000 and abs(right - 0.5) < 0.03  # … is right as often as a coin


def test_no_other_question_has_an_answer_that_is_right_more_than_half_of_the_time(described):
    for kind in ("technique", "subject", "tone", "ground"):
        answers = Counter(answer for wording in questions.WORDINGS[kind] for _, _, answer in asked_of(described, wording))
        assert answers.total() > 20, kind
        assert max(answers.values()) <= answers.total() / 2, (kind, answers)
    numbers = Counter(answer for _, _, answer in asked_of(described, "How many"))
    assert numbers["one"] > 5 and max(numbers.values()) <= numbers.total() * 0.55


def test_splits_are_balanced_each_in_itself(tmp_path):
    toy.write_shards(tmp_path / "toy", 12, 0, 32, "train")
    toy.write_shards(tmp_path / "toy", 12, 1, 32, "val")
    questions.ask([tmp_path / "toy"], tmp_path / "both")
    for split in ("train", "val"):
        questions.ask(sorted((tmp_path / "toy").glob(f"{split}*.tar")), tmp_path / split)
        for shard in (tmp_path / split).glob("*.tar"):
            assert shard.read_bytes() == (tmp_path / "both" / shard.name).read_bytes()


def test_answers_are_true_of_the_description(described):
    for i, question, answer in asked_of(described, "Is this "):
        thing = question.removeprefix("Is this ").rstrip("?").removeprefix("a ").removeprefix("an ")
        if answer == "yes":
            assert described[i]["thing"] == thing
        else:
            assert described[i]["thing"] != thing and thing not in described[i]["caption"].lower().replace(",", "").rstrip(".").split()
    for i, question, answer in asked_of(described, "Is the subject "):
        assert (question == f"Is the subject {KINDS[described[i]['subject']]}?") == (answer == "yes")
    for start in questions.WORDINGS["thing"]:
        assert all(answer == named(described[i]["thing"]) for i, _, answer in asked_of(described, start))


def test_no_questions_come_from_the_family_of_kinds_where_it_has_others():
    family = {kind: number for number, kinds in enumerate(FAMILIES) for kind in kinds}
    name = {words: kind for kind, words in KINDS.items()}
    several = ["animal", "bird", "insect", "landscape", "street", "building", "interior", "machine", "arms", "coin"]
    kinds = np.random.default_rng(0).choice(several, 400).tolist()
    asked = is_this([Shown(kind=kind) for kind in kinds], 0)
    near = [
        family[name[question.removeprefix("Is the subject ").rstrip("?")]] == family[kind]
        for kind, questions in zip(kinds, asked) for question, answer in questions if answer == "no"
    ]  # fmt: skip
    assert len(near) == 400 and np.mean(near) > 0.9  # by chance about 0.34


# of made kinds: the test above
@pytest.mark.parametrize("described", [pytest.param("real", marks=real)], indirect=True)  # of real pictures' mixture of kinds
def test_no_questions_come_from_what_is_easily_mistaken(described):
    family = {kind: number for number, kinds in enumerate(FAMILIES) for kind in kinds}
    name = {words: kind for kind, words in KINDS.items()}
    near = [
        family[name[question.removeprefix("Is the subject ").rstrip("?")]] == family[described[i]["subject"]]
        for i, question, answer in asked_of(described, "Is the subject ") if answer == "no"
    ]  # fmt: skip
    assert np.mean(near) > 0.6  # by chance about 0.25


def test_answers_are_short(described):
    answers = [q["answer"] for record in described for q in record["questions"]]
    assert max(len(answer.split()) for answer in answers) <= 20 and np.median([len(answer.split()) for answer in answers]) <= 3


@pytest.mark.parametrize(
    ("caption", "thing", "expected"),
    [
        ("Two armed knights fighting.", "knight", ("two", "knights")),
        ("Three old men in a boat.", "man", ("three", "men")),
        ("Four sheep on a hill and two dogs.", "", ("", "")),
        ("Two hundred men on a field.", "man", ("", "")),
        ("A woman with two children.", "woman", ("two", "children")),
    ],
)
def test_the_main_thing_is_counted_first(caption, thing, expected):
    assert questions.number_of(caption, thing) == expected


def test_of_birds_nobody_asks_whether_they_are_owls_and_of_knights_not_whether_they_are_men():
    pictures = [Shown("bird", "bird"), Shown("owl", "bird"), Shown("knight", "figure"), Shown("man", "figure"), Shown("woman", "figure")]
    where = {one.thing: frozenset({one.kind}) for one in pictures}
    no = {(one.thing, thing) for one in pictures for thing in where if is_no(one, thing, where)}
    assert not {("bird", "owl"), ("owl", "bird"), ("knight", "man"), ("man", "knight")} & no
    assert {("man", "woman"), ("woman", "man"), ("owl", "man"), ("man", "owl"), ("knight", "bird")} <= no


def test_the_ground_is_what_lies_along_the_edges():
    paper = Image.new("L", (64, 64), 250)
    paper.paste(0, (12, 12, 52, 52))
    assert questions.ground(paper) == "light" and questions.ground(Image.eval(paper, lambda x: 255 - x)) == "dark"
    paper.paste(0, (0, 0, 64, 30))
    assert questions.ground(paper) == ""

"""The wordings of training questions: what is recorded, and which questions are of them."""

import itertools

import pytest

from tokun.data.question_wordings import MOST_FOLLOWING, MOST_WORDINGS, MOST_WORDS, QuestionWordings, recorded_by, wording_of, wordings_on
from tokun.inference.checkpoint_folder import read_settings
from tokun.inference.folders import BUNDLED, SAMPLING

ANIMALS = [f"animal{number}" for number in range(MOST_FOLLOWING + 1)]


def test_a_beginning_that_many_words_follow_stands_for_all_of_them():
    found = QuestionWordings(["What is shown?", "what is shown", *(f"Is this a {name}?" for name in ANIMALS)]).wordings()
    assert found == ["is this a …", "what is shown"], "the most frequent first"
    assert QuestionWordings(f"Is this a {name}?" for name in ANIMALS[1:]).wordings() == sorted(f"is this a {name}" for name in ANIMALS[1:])


def test_wordings_do_not_depend_on_the_order_of_the_questions():
    questions = ["Is this?", "Is this a moth by night?", *(f"Is this {name} by day?" for name in ANIMALS), "How many are there?"]
    every = {tuple(QuestionWordings(order).wordings()) for order in (questions, questions[::-1], questions[5:] + questions[:5])}
    assert every == {("is this …", "how many are there", "is this")}


def test_memory_and_the_record_have_bounds():
    long = " ".join(f"word{number}" for number in range(MOST_WORDS + 5))
    assert QuestionWordings([long]).wordings() == [" ".join([*long.split()[:MOST_WORDS], "…"])]
    free = QuestionWordings(" ".join(each) for each in itertools.product("abcdefghij", repeat=3))
    assert MOST_WORDINGS < 10**3 and free.wordings() == [], "too many to record: any question is tried"
    assert QuestionWordings(ANIMALS).wordings() == [] == QuestionWordings(["", "?"]).wordings()


@pytest.mark.parametrize(
    ("question", "known"),
    [("What is shown?", True), ("what is  SHOWN", True), ("What is shown here?", False), ("What is?", False), ("Who painted this?", False),
     ("Is this a moth?", True), ("Is this a large moth with spots?", True), ("Is this a?", False), ("Is this?", False)],
)  # fmt: skip
def test_a_question_is_known_by_its_words(question, known):
    assert bool(wording_of(question, ["is this a …", "what is shown"])) is known


def test_an_adapter_adds_its_own_questions_and_what_is_not_recorded_is_not_refused():
    assert wordings_on(("a", "b"), None) == ("a", "b")
    assert wordings_on(("a", "b"), ("c", "a")) == ("a", "b", "c")
    assert wordings_on((), ("c",)) == () == wordings_on(("a",), ())
    assert wordings_on((), ("c",), ("joint",)) == ("c",), "the base was taught no questions"
    assert recorded_by({"question_wordings": ["c"]}) == ("c",) and recorded_by({"question_wordings": None}) is None
    assert recorded_by({"tasks": ["joint"]}) is None and recorded_by({"tasks": ["joint", "question"]}) == () == recorded_by({})


@pytest.mark.parametrize(
    "question",
    ["What is shown?", "Is this a moth?", "How many ships are there?", "Which technique is it?", "Is the ground light or dark?",
     "What is its subject?", "Does the picture show this: a ship"],
)  # fmt: skip
def test_the_bundled_model_knows_the_questions_of_its_data_and_no_others(question):
    wordings = read_settings(BUNDLED / SAMPLING).question_wordings
    assert wording_of(question, wordings) and not wording_of("Who painted this?", wordings)

"""Which questions training data ask, in a few lines: "what is shown", "is this a …". Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokun.data.caption_words import words

OPEN = "…"  # at the end of a wording: any words may follow
MOST_FOLLOWING = 16  # different words that may follow a beginning; with more, any word may
MOST_WORDS = 12  # of a wording; what follows may be any words
MOST_WORDINGS = 500  # of a record


@dataclass
class Beginning:
    """The questions that begin with the same words."""

    count: int = 0
    ended: int = 0  # questions of these words alone
    following: dict[str, Beginning] | None = field(default_factory=dict)  # by the next word; None: any


class QuestionWordings:
    """Collects questions, in any order and number: memory holds beginnings, not questions."""

    def __init__(self, questions: Iterable[str] = ()) -> None:
        self.root = Beginning()
        for question in questions:
            self.add(question)

    def add(self, question: str) -> None:
        here, said = self.root, words(question)
        for number, word in enumerate(said):
            here.count += 1
            if here.following is None:
                return
            if number == MOST_WORDS or (word not in here.following and len(here.following) == MOST_FOLLOWING):
                here.following = None
                return
            here = here.following.setdefault(word, Beginning())
        if said:
            here.count, here.ended = here.count + 1, here.ended + 1

    def wordings(self) -> list[str]:
        """The wordings, the most frequent first; none where there are no questions, or too many different ones to record."""
        found = sorted(_wordings(self.root, ()), key=lambda each: (-each[0], each[1]))
        return [] if len(found) > MOST_WORDINGS else [wording for _, wording in found if wording != OPEN]


def _wordings(here: Beginning, before: tuple[str, ...]) -> Iterable[tuple[int, str]]:
    """(questions, wording) of each wording that begins with the words `before`."""
    if here.ended:
        yield here.ended, " ".join(before)
    if here.following is None:
        yield here.count - here.ended, " ".join((*before, OPEN))
        return
    for word, there in here.following.items():
        yield from _wordings(there, (*before, word))


def recorded_by(adapter: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The wordings in an adapter's record: None if it has no questions, () if it may have some and does not say which."""
    found, tasks = adapter.get("question_wordings", ()), adapter.get("tasks", ())
    older_without = "question_wordings" not in adapter and tasks and "question" not in tasks
    return None if found is None or older_without else tuple(map(str, found))


def wordings_on(base: tuple[str, ...], own: tuple[str, ...] | None, base_tasks: Sequence[str] = ()) -> tuple[str, ...]:
    """The wordings of a model that continued from `base` on its `own` (None: no questions): those of both, or () if either is unknown.
    `base_tasks`: what the base was trained on, () if that is not recorded."""
    if own is None or (base_tasks and "question" not in base_tasks):
        return own or base
    return tuple(dict.fromkeys((*base, *own))) if base and own else ()


def wording_of(question: str, wordings: Sequence[str]) -> str:
    """The wording that a question has, whatever its punctuation and capital letters; "" for none of these."""
    said = words(question)
    for wording in wordings:
        parts = wording.split()
        if said == parts or (parts[-1] == OPEN and len(said) >= len(parts) and said[: len(parts) - 1] == parts[:-1]):
            return wording
    return ""

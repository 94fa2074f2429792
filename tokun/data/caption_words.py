"""The words of captions, and which of them a caption has at most once. Knows no tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

WORD = re.compile(r"[^\W_]+(?:[’'-][^\W_]+)*")
LEAST_CAPTIONS = 50  # with a word, to say anything about it
MOST_REPEATED = 0.02  # share of these in which it stands twice


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return WORD.findall(text.lower())


class RepetitionCounts:
    """Counts of the captions that have a word, and of those that have it twice."""

    def __init__(self, captions: Iterable[str] = ()) -> None:
        self.found, self.repeated = Counter[str](), Counter[str]()
        for caption in captions:
            self.add(caption)

    def add(self, caption: str) -> None:
        counts = Counter(words(caption))
        self.found.update(counts.keys())
        self.repeated.update(word for word, count in counts.items() if count > 1)

    def unrepeated(self, known: Iterable[str] = ()) -> list[str]:
        """The words, in alphabetical order, that captions hardly ever have twice ("tree", "standing"; not "a" or "man"), and those of
        `known` about which these captions say nothing, since too few have them.

        Models repeat such words more often than people: "a low headland on a low headland".
        """
        frequent = {word for word, n in self.found.items() if n >= LEAST_CAPTIONS}
        return sorted({word for word in frequent if self.repeated[word] <= MOST_REPEATED * self.found[word]} | (set(known) - frequent))

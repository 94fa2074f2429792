"""Mirrored views: which pictures may be mirrored, and how their captions change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

SIDES = {"left": "right", "right": "left"}
# words for writing in a picture, which mirroring would reverse
WRITING = re.compile(
    r"\b(alphabets?|autographs?|banners?|captions?|clocks?|coins?|dials?|diagrams?|digits?|handwrit\w*|hieroglyph\w*|inscri\w*|initials?|labell?ed|labels?|"
    r"letter(?:s|ed|ing)?|maps?|medals?|monograms?|mottos?|names?|newspapers?|numbers?|numbered|numerals?|posters?|scrolls?|signs?|signatures?|"
    r"sundials?|texts?|titles?|words?|writing|written)\b",
    re.IGNORECASE,
)
# registers that describe the picture. Not `era`: a printed caption names letters, books and people that are not in it
SEEN = ("plain", "alt", "poetic", "social")
_SIDE = re.compile(r"\b(left|right)(?=\b(?!\s+(?:angles?|triangles?|whales?|behind|alone|over)\b))", re.IGNORECASE)


def seen_of(captions: Mapping[str, str], questions: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The texts that describe a picture: captions of the registers in SEEN, and answers to "What …?".

    Questions and other answers are left out: "Does the picture show this: a page of text?" is also asked of pictures without one.
    """
    yield from (captions[register] for register in SEEN if register in captions)
    yield from (str(answer) for question, answer in questions if re.match(r"what\b", str(question).strip(), re.IGNORECASE))


def may_be_mirrored(texts: Iterable[str]) -> bool:
    """Whether none of a picture's texts mentions lettering, numbers or other writing."""
    return not any(WRITING.search(text) for text in texts)


def exchange_sides(text: str) -> str:
    """The text for the mirrored picture: left and right are exchanged, capitals kept.

    "right angle", "right whale" and the verb in "left behind" stay.
    """

    def other(match: re.Match[str]) -> str:
        word = match[1]
        turned = SIDES[word.lower()]
        return turned.upper() if word.isupper() else turned.capitalize() if word[0].isupper() else turned

    return _SIDE.sub(other, text)

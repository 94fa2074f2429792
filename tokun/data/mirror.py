"""Mirrored views: which pictures may be mirrored, and what their words then say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from tokun.data.codes import Record

SIDES = {"left": "right", "right": "left"}
# words that say that a picture shows writing, which a mirror turns round
WRITING = re.compile(
    r"\b(alphabets?|autographs?|banners?|captions?|clocks?|coins?|dials?|diagrams?|digits?|handwrit\w*|hieroglyph\w*|inscri\w*|initials?|labell?ed|labels?|"
    r"letter(?:s|ed|ing)?|maps?|medals?|monograms?|mottos?|names?|newspapers?|numbers?|numbered|numerals?|posters?|scrolls?|signs?|signatures?|"
    r"sundials?|texts?|titles?|words?|writing|written)\b",
    re.IGNORECASE,
)
_SIDE = re.compile(r"\b(left|right)(?=\b(?!\s+(?:angles?|triangles?|whales?|behind|alone|over)\b))", re.IGNORECASE)


def may_be_mirrored(texts: Iterable[str]) -> bool:
    """Whether none of a picture's texts speaks of lettering, numbers or other writing."""
    return not any(WRITING.search(text) for text in texts)


def exchange_sides(text: str) -> str:
    """The text with left and right exchanged, each in its own capitals: what it says of the picture, of the mirrored picture.

    "right angle", "right whale" and the verb in "left behind" stay.
    """

    def other(match: re.Match[str]) -> str:
        word = match[1]
        turned = SIDES[word.lower()]
        return turned.upper() if word.isupper() else turned.capitalize() if word[0].isupper() else turned

    return _SIDE.sub(other, text)


def mirrored(record: Record) -> Record:
    """The record as its mirrored views need it: left and right exchanged in captions, questions and answers."""
    return dataclasses.replace(
        record,
        caption=exchange_sides(record.caption),
        captions={register: exchange_sides(text) for register, text in record.captions.items()},
        questions=[(exchange_sides(question), exchange_sides(answer)) for question, answer in record.questions],
    )

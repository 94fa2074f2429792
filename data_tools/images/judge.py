"""Judging a picture: is it a print worth keeping?

Unclear cases are ambiguous, with the reason, and never rejected. The limits below were set by eye on illustrated books of the
nineteenth century.
"""

from __future__ import annotations

import re

from data_tools.images.measure import BLANK, Look
from data_tools.pipeline.verdicts import AMBIGUOUS, REJECT, Verdict
from data_tools.text.captions import clean_caption, unmarked, without_labels


def reasons(look: Look, caption: str = "", *, min_side: int = 64, max_aspect: float = 3.2, prints: bool = True) -> list[Verdict]:
    """All objections to a picture, each reason once with its most severe kind, in a fixed order; [] is a good print.

    `caption` may be raw or cleaned; it helps to detect maps, music and initials. `prints=False` ignores colour and
    continuous tone, for paintings and photographs.
    """
    found = [*of_size(look.short, look.long, min_side, max_aspect), *of_emptiness(look)]
    if prints:
        found += of_process(look)
    found += of_kind(look)
    found += of_size_and_caption(look, caption)
    found += of_caption(caption)
    graver = {verdict.reason for verdict in found if verdict.kind == REJECT}
    return list(dict.fromkeys(one for one in found if one.kind == REJECT or one.reason not in graver))


def graded(value: float, reason: str, *, ambiguous: float, reject: float) -> list[Verdict]:
    """A verdict by two limits: none below the first, a rejection from the second."""
    if value < ambiguous:
        return []
    return [Verdict(REJECT if value >= reject else AMBIGUOUS, reason)]


def of_size(short: int, long: int, min_side: int, max_aspect: float) -> list[Verdict]:
    small = [Verdict(REJECT, "too small")] if short < min_side else []
    return small + ([Verdict(REJECT, "too long")] if long > max_aspect * short else [])


def of_emptiness(look: Look) -> list[Verdict]:
    if look.plain < BLANK:
        return [Verdict(REJECT, "blank")]
    return graded(max(look.white, look.dark), "nearly blank", ambiguous=0.945, reject=0.985)


def of_process(look: Look) -> list[Verdict]:
    """Colour plates and photographs. Half-tones of paintings are as smooth as photographs, so most are ambiguous."""
    of_inked = look.colour / max(0.05, 1 - look.white)
    colour = graded(look.colour, "colour plate", ambiguous=0.025, reject=0.25 if of_inked < 0.3 else 0.1)
    continuous = look.smooth if look.levels >= 64 else 0.0
    return colour + graded(continuous, "photograph", ambiguous=0.2, reject=0.6)


def of_kind(look: Look) -> list[Verdict]:
    if look.white < 0.5:
        return []
    if look.staves:
        return graded(look.staves, "music", ambiguous=1, reject=2)
    if look.text >= 0.6 and look.text_lines >= 6 and look.white >= 0.6:
        return [Verdict(REJECT, "text page")]
    lettering = (look.text >= 0.3 and look.text_lines >= 3) or (look.text >= 0.2 and look.text_lines >= 2 and look.white >= 0.75)
    return [Verdict(AMBIGUOUS, "text page")] if lettering else []


def of_size_and_caption(look: Look, caption: str) -> list[Verdict]:
    """Small line blocks on white: initials, unless words say what they show."""
    words = bool(clean_caption(caption).text)
    if look.white < 0.33 or look.short > 200 or look.long > 400:
        return []
    if look.long <= 128:
        return [Verdict(AMBIGUOUS if words else REJECT, "ornament or initial")]
    return [Verdict(AMBIGUOUS, "ornament or initial")] if not words and look.white >= 0.5 else []


# Captions of pictures that are not prints of a scene: a pattern for the start that rejects, and one that doubts.
CAPTION_HINTS = (
    (
        "ornament or initial",
        r"(?:(?:decorated|decorative|ornamental|historiated|illuminated)\s+)?initials?(?:\s+(?:letter\s+)?\W?[a-z])?\W*$"
        r"|(?:(?:decorated|decorative|ornamental|drop)[- ])?(?:capital|letter|cap)\s+(?:letter\s+)?\W?[a-z]\W*$"
        r"|(?:tail|head)[- ]?pieces?\W*$|colophon\W*$|decorative (?:border|image|line|break|divider)\b|printer's (?:device|mark)\b",
        r"^(?:tail|head)[- ]?piece\b|\bornamental (?:letter|initial|border)\b|\bprinter's (?:device|mark)\b"
        r"|^(?:decorations?|ornaments?|fleurons?)\W*$|^(?:banner|masthead|logo)(?:$|:)"
        # regular columns of periodicals, whose headpieces show their names
        r"|^questions and answers\W*$|^(?:our |the )?(?:letter|post-?office|puzzle|question|riddle)[- ]box\W*$"
        r"|^(?:our |the )?editor's (?:drawer|easy chair|note-?book|pocket-?book|scrap-?book|table)\b",
    ),
    (
        "map",
        r"(?:sketch |outline |general |small |large )?(?:map|chart)s?(?:\W*$| (?:of|to|showing|illustrating)\b)",
        r"\b(?:maps?|charts?|ground[- ]?plan|plan of)\b|^position of\b|^plan\W*$",
    ),
    (
        "diagram",
        r"(?:diagrams?|schem(?:a|e)s?|(?:cross|longitudinal|transverse|vertical)[- ]sections?)(?:\W*$| (?:of|to|showing|illustrating)\b)",
        r"\bdiagrams?\b|\b(?:cross|longitudinal|transverse|vertical|microscopic(?:al)?)[- ](?:sections?|details?|structure)\b"
        r"|\b(?:acrostic|rebus)\b"
        # a key of letters: "a. lung; b. heart; c. liver."
        r"|(?-i:(?:(?:^|[\s;.(])(?:[a-z]|[A-Z][a-z]{0,4}\.)[,.]\s[^,;.]{3,40}[,;.]){3})",
    ),
    ("music", r"sheet music\b", r"^(?:printed )?music\b(?:\W*$|\s*[-:—]|\s+(?:to|for)\b)|\bmusical (?:notation|score)\b"),
    (
        "text page",
        r"(?:table of contents|contents|list of illustrations|index|advertisements?)\W*$",
        r"\bfac-?simile of (?:\S+ ){0,4}(?:pages?|letters?|journal|manuscript|writing|signatures?|lines|bible|entry)\b"
        r"|\btitle[- ]?page\b|\bhandwriting\b|^(?:(?:front |back )?cover|half[- ]?title|spine)\W*$",
    ),
)
CAPTION_HINTS_COMPILED = tuple((reason, re.compile(sure, re.I), re.compile(maybe, re.I)) for reason, sure, maybe in CAPTION_HINTS)


def of_caption(caption: str) -> list[Verdict]:
    plain = unmarked(caption)
    texts = [text.strip("\"' ") for text in (plain, without_labels(plain))]
    for reason, sure, maybe in CAPTION_HINTS_COMPILED:
        if any(sure.match(text) for text in texts):
            return [Verdict(REJECT, reason)]
        if any(maybe.search(text) for text in texts):
            return [Verdict(AMBIGUOUS, reason)]
    return []

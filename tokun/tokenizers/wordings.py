"""Words: of questions that training data and evaluation share, of tags, registers and tasks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

REGISTERS = ("plain", "poetic", "era", "social", "alt")
"""The voices in which a caption may be written."""
SHOWS = "Does the picture show this: {}"
SUBJECT = "What is its subject?"


def fitting_tag(word: str, known: Sequence[str]) -> str:
    """The known tag for a word: the word itself, its singular, or the longest tag that it ends in; "" for none.

    For example, steel-engravings -> engraving.
    """
    forms = [word, *([word[:-1]] if word.endswith("s") and not word.endswith("ss") else [])]
    for form in forms:
        if form in known:
            return form
    return max((tag for tag in known for form in forms if form.endswith(f"-{tag}")), key=len, default="")


def tasks_on(base: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """The tasks of a model that continued from `base` on its `own`: those of both. A base older than task records has none: then ()."""
    return tuple(dict.fromkeys((*base, *own))) if base else ()

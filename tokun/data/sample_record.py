"""The record of a sample, KEY.json: what its keys hold, and how those that are trained on are read. Knows no torch.

Readers raise BadSample for a part of the wrong form. Which keys hold caption, style, subject and thing is a setting of `data` in a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokun.utils.errors import BadSample

# key -> what it holds. All are optional; training needs a caption. Others: docs/reference/formats.md
KEYS = {
    "caption": "text: the caption that came with the picture, or a table's plain one",
    "caption_source": "object: which register the caption was taken from, if it had none of its own",
    "captions": "object of texts: captions by register; training reads the plain one, without it `caption`",
    "caption_sources": "object of objects: who wrote each register's caption",
    "caption_failures": "object: registers that could not be written, with the reasons",
    "captions_all": "list of texts: all of a picture that came with several, the caption first",
    "earlier_captions": "list of objects with register, text and source: what `data_tools.caption` replaced",
    "style": "text: becomes a tag",
    "subject": "text: becomes a tag",
    "thing": "text: becomes a tag",
    "questions": "list of objects with the texts question and answer",
    "grid": "of code shards: [rows, columns]",
    "boxes": "of code shards: the box [left, top, width, …] of each view; a negative width is a mirrored one",
    "boxes_of": "of code shards: [width, height] of the picture in whose pixels the boxes are",
}


def plain_of(record: Mapping[str, Any], caption_key: str = "caption") -> str:
    """The plain caption, "" for none: that of `captions`, where `tokun caption` writes, else `caption`, the source text. What a template
    wrote comes last.

    A `caption_key` other than "caption" is the only key that is read. What is not text is no caption.
    """
    captions, sources = _captions_and_sources(record)
    both = (captions.get("plain"), record.get("caption"))
    found = (both[::-1] if _is_template(sources.get("plain")) else both) if caption_key == "caption" else (record.get(caption_key),)
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


def words_of(record: Mapping[str, Any], caption_key: str) -> tuple[str, bool]:
    """The caption ("" for none), and whether it is more than a template."""
    captions, sources = _captions_and_sources(record)
    plain = plain_of(record, caption_key)
    found = {**captions, "plain": plain}
    found = {register: " ".join(text.split()) for register, text in found.items() if isinstance(text, str) and text.strip()}
    if not found:
        return "", False

    def from_template(register: str) -> bool:
        written = register != "plain" or captions.get("plain") == plain
        return _is_template(sources.get(register)) and written

    return found.get("plain") or next(iter(found.values())), not all(map(from_template, found))


def _captions_and_sources(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    captions, sources = (value if isinstance(value := record.get(name), Mapping) else {} for name in ("captions", "caption_sources"))
    return captions, sources


def _is_template(source: object) -> bool:
    return isinstance(source, Mapping) and source.get("source") == "template"


def text_in(value: object) -> str:
    """The text of a field: itself, the first text of a list, "" for anything else, which never becomes words."""
    texts = value if isinstance(value, list) else [value]
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def captions_by_register(record: Mapping[str, Any]) -> dict[str, Any]:
    """register -> caption; `plain_of` says which one is the plain one. Raises BadSample if it is not a mapping."""
    if not isinstance(found := record.get("captions", {}), dict):
        raise BadSample(f"captions is a {type(found).__name__}, not a mapping of registers to captions")
    return found


def questions_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (question, answer) pairs. Raises BadSample if they are malformed."""
    pairs, found = [], record.get("questions", [])
    for one in found if isinstance(found, list) else [None]:
        match one:
            case {"question": str(question), "answer": str(answer)}:
                pairs.append((question, answer))
            case _:
                raise BadSample("questions is not a list of objects with the texts question and answer")
    return pairs


def grid_of(record: Mapping[str, Any]) -> tuple[int, int]:
    """The grid (rows, columns) of a sample of codes. Raises BadSample if there is none."""
    match record.get("grid"):
        case [int(rows), int(columns)]:
            return rows, columns
        case other:
            raise BadSample(f"grid is {other!r}, not [rows, columns]")


def mirrored_of(record: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which views are mirrored: those whose box has a negative width. Raises BadSample if the boxes are malformed."""
    try:
        return tuple(box[2] < 0 for box in record.get("boxes", []))
    except (TypeError, LookupError) as error:
        raise BadSample("boxes is not a list of boxes [left, top, width, …]") from error

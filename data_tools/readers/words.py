"""Words: a record (a table row, a picture's JSON) -> the words about one picture."""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import replace
from types import NoneType
from typing import Any

from data_tools.readers.files import PICTURE_SUFFIXES, utf8
from data_tools.readers.listing import GROUPS, Words
from data_tools.readers.table_files import CAPTION_COLUMNS, PATH_COLUMNS, caption_of, column_name
from data_tools.text.captions import plain_text, raw_of
from tokun.tokenizers.wordings import REGISTERS
from tokun.utils.errors import BadSample

MORE = ("title", "author", "artist", "illustrator", "context", "technique", "category", "date")
OF_REGISTERS = tuple(name for name in REGISTERS if name != "plain")  # columns with captions of these registers
SUBJECTS = ("subject", "label", "class", "class_name")  # columns with what a picture shows, in a word or two; numbers are none
COLUMNS = frozenset({*PATH_COLUMNS, *CAPTION_COLUMNS, *GROUPS, *MORE, *SUBJECTS, *OF_REGISTERS, "style", "license", "source_url", "url"})


ODD_CAPTION = "caption file: its caption is no text: {}"


def normal(record: dict[Any, Any]) -> dict[str, Any]:
    """A record with its column names in lower case with underscores."""
    return {column_name(name): value for name, value in record.items()}


def kebab(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def words_from(record: dict[str, Any], caption_column: str = "") -> Words:
    """Words from a normalised record; other columns are ignored. The first of several captions is the caption.

    `caption_column` is the caption column; "": the first of CAPTION_COLUMNS that is not empty.
    """
    record = without_file_name(record)
    names = (column_name(caption_column),) if caption_column else CAPTION_COLUMNS
    captions = {name: texts for name in names if (texts := texts_in(record.get(name)))}
    caption = next(iter(captions.values()), [""])[0]
    raw = next((one for name in captions for one in raw_texts_in(record.get(name)) if plain_text(one)), "")
    several = next((texts for texts in captions.values() if len(texts) > 1), [])
    more: dict[str, Any] = {name: texts[0] for name in MORE if (texts := texts_in(record.get(name))) and texts[0] != caption}
    by_register = record["captions"] if isinstance(record.get("captions"), dict) else {}
    registers = {kebab(str(key)): text for key, text in by_register.items() if isinstance(text, str)}
    registers |= {name: texts[0] for name in OF_REGISTERS if name not in captions and (texts := texts_in(record.get(name)))}
    if not caption and not caption_column:  # captions by register alone
        caption = plain_text(registers.get("plain", ""))
    if raw_registers := {key: found for key, text in registers.items() if (found := raw_of(text))}:
        more["raw_captions"] = raw_registers
    if several:
        more["captions_all"] = list(dict.fromkeys([caption, *several]))
        as_found = next(raw_texts_in(record.get(name)) for name in captions if len(captions[name]) > 1)
        if any(map(raw_of, as_found)):
            more["raw_captions_all"] = as_found
    return Words(
        caption=caption,
        raw=raw_of(raw),
        captions={key: plain_text(text) for key, text in registers.items()},
        subject=next((tag for name in SUBJECTS if re.search("[a-z]", tag := kebab("".join(texts_in(record.get(name))[:1])))), ""),
        license="".join(texts_in(record.get("license"))[:1]),
        source_url=next((utf8(url).strip() for name in ("source_url", "url") if isinstance(url := record.get(name), str) and url), ""),
        group=utf8(group_of(record) or ""),
        style=style_of(record),
        more=more,
    )


def odd_caption(record: Mapping[str, Any], caption_column: str = "") -> str:
    """The value of the caption column as written, if it is not text but {"en": …} or the like; else ""."""
    names = (column_name(caption_column),) if caption_column else CAPTION_COLUMNS
    odd = next((one for name in names if _is_odd(one := record.get(name))), None)
    return "" if odd is None else f"{odd!r:.60}"


def _is_odd(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_odd, value))
    return not isinstance(value, (str, NoneType)) and value != {}


def texts_in(value: Any) -> list[str]:
    """The plain-text lines of a text, a number or a list of texts, without empty ones."""
    return [text for one in raw_texts_in(value) if (text := plain_text(one))]


def raw_texts_in(value: Any) -> list[str]:
    """The texts in a text, a number or a list of texts, unchanged. A text may be such a list: "['A wolf.', 'A fox.']"."""
    value = listed_in(value) if isinstance(value, str) else value
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        value = [str(value)]
    return [one for one in (value if isinstance(value, (list, tuple)) else ()) if isinstance(one, str) and caption_of(one)]


def listed_in(text: str) -> str | list[Any]:
    """The texts of a list that was written into a cell, as pandas does; any other text as it is."""
    if not re.fullmatch(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", text, re.S):
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, list) and value and all(isinstance(one, str) for one in value) else text


FILE_NAME = re.compile(rf"[^\s/\\]+(?:{'|'.join(map(re.escape, sorted(PICTURE_SUFFIXES)))})", re.I)


def without_file_name(record: dict[str, Any]) -> dict[str, Any]:
    """A normalised record without the title that is only the picture's file name, as photo services write it."""
    title = record.get("title")
    if isinstance(title, str) and (FILE_NAME.fullmatch(title.strip()) or title.strip() == posixpath.basename(path_in(record) or "/")):
        return {name: value for name, value in record.items() if name != "title"}
    return record


def path_in(record: dict[str, Any]) -> str:
    """The path in a normalised record, as written; "" if there is none."""
    return next((record[name] for name in PATH_COLUMNS if isinstance(record.get(name), str) and record[name].strip()), "")


def style_of(record: dict[str, Any]) -> str:
    return kebab(record["style"]) if isinstance(record.get("style"), str) else ""


def group_of(record: dict[str, Any]) -> str | None:
    """The value of the first grouping column; None if there is none."""
    return next((f"{name}/{record[name]}" for name in GROUPS if isinstance(record.get(name), (str, int)) and record[name] != ""), None)


def join_words(words: Words | None, other: Words) -> Words:
    """The joined words of two rows of one picture, without repeated captions."""
    if words is None:
        return other
    captions: dict[str, None] = {}
    for one in (words, other):
        captions.update(dict.fromkeys(one.more.get("captions_all") or ([one.caption] if one.caption else [])))
    more = {**other.more, **words.more}
    if words.raw or other.raw or more.get("raw_captions_all"):
        as_found = [
            text
            for one in (words, other)
            for text in one.more.get("raw_captions_all") or one.more.get("captions_all") or [one.raw or one.caption]
            if text
        ]
        more["raw_captions_all"] = list(dict.fromkeys(as_found))
    return replace(words.or_else(other), more={**more, "captions_all": list(captions)} if len(captions) > 1 else more)


def json_object(text: str, *, where: str) -> dict[Any, Any]:
    """The JSON object in `text`. Raises BadSample that says where and what is wrong."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where} is not valid JSON") from error
    if not isinstance(value, dict):
        raise BadSample(f"{where} holds no JSON object")
    return value

"""Sidecars: the words of one picture, from files beside it, its table row and, on request, its file name."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import unicodedata
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from data_tools.readers.files import MAX_TEXT_BYTES, why_not_open
from data_tools.readers.folder_scan import with_sidecars
from data_tools.readers.listing import CaptionError, Found, Remote, Words
from data_tools.readers.storage import fetch
from data_tools.readers.table_files import caption_of
from data_tools.readers.words import ODD_CAPTION, json_object, normal, odd_caption, words_from
from data_tools.text.captions import plain_text, raw_of
from data_tools.text.encoding import decode_text
from tokun.utils.errors import BadSample


def find_words(source: Path, found: Found, row: Words, *, from_names: bool = False, caption_column: str = "") -> Words:
    """The words of one picture: from its text file, then its JSON, then its table `row`, then, with `from_names`, its file name.

    A given caption (`Found.given`) is in `row` and comes first. `caption_column` is the JSON field with the captions; "": the first with a
    known name. Raises CaptionError if a sidecar file exists but cannot be read, or holds a caption that is not text, unless another is
    given.
    """
    if not found.beside:
        return row
    try:
        words, odd = words_beside(source, found, caption_column)
    except CaptionError:
        if found.given:
            return row
        raise
    words = row.or_else(words) if found.given else words.or_else(row)
    if odd and not words.caption and not words.captions:
        raise CaptionError(ODD_CAPTION.format(odd))
    if words.caption or not from_names:
        return words
    return words.or_else(Words(caption=caption_from_name(found.path), words_from="the file's name"))


def words_beside(source: Path, found: Found, caption_column: str) -> tuple[Words, str]:
    """The words in the files beside a picture, and the value of a caption that is no text. Raises CaptionError."""
    words, odd = Words(), ""
    for name in with_sidecars(Path(source), found).sidecars or ():
        text, path = read_beside(source, found, name), posixpath.join(posixpath.dirname(found.path), name)
        if not name.lower().endswith(".json"):
            words = Words(caption=plain_text(caption_of(text) or ""), raw=raw_of(text))
        elif text:
            try:
                record = normal(json_object(text, where="caption file"))
            except BadSample as error:
                raise CaptionError(str(error)) from error
            words, odd = words.or_else(words_from(record, caption_column)), odd_caption(record, caption_column)
        if words.caption and not words.words_from:
            words = replace(words, words_from=path)
    return words, odd


def read_beside(source: Path, found: Found, name: str) -> str:
    """The text of a file in the picture's folder. Raises CaptionError."""
    try:
        if isinstance(found.where, Remote):
            data = fetch(posixpath.join(posixpath.dirname(found.where.url), name), 0, MAX_TEXT_BYTES + 1)
        else:
            path = posixpath.join(source, posixpath.dirname(found.path), name)
            there = os.lstat(path)
            plain = stat.S_ISREG(there.st_mode)
            if not plain and (problem := why_not_open(Path(path), source.resolve())):
                raise CaptionError(f"caption file: {problem}")
            with open(path, "rb") as file:
                # allocate no more than the file's size
                data = file.read(min(there.st_size, MAX_TEXT_BYTES) + 1 if plain else MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise CaptionError("caption file cannot be read") from error
    if len(data) > MAX_TEXT_BYTES:
        raise CaptionError("caption file is too large")
    return decode_text(data)


# Words in file names from cameras, scanners, books and web sites that do not say what a picture shows.
NO_WORDS = frozenset({
    "back", "chap", "copy", "cover", "dcim", "download", "dsc", "dscf", "dscn", "edited", "fig", "figure", "file",
    "final", "footer", "frame", "front", "frontis", "frontispiece", "full", "gif", "gopr", "header", "icon", "ill",
    "illo", "ills", "illus", "illustration", "image", "images", "img", "initial", "jpeg", "jpg", "large", "logo", "mvi",
    "new", "original", "page", "photo", "photos", "pic", "pict", "picture", "plate", "plt", "png", "pxl", "scan",
    "scanned", "screen", "screenshot", "shot", "signal", "small", "spine", "thumb", "thumbnail", "tif", "tiff", "title",
    "titlepage", "unnamed", "untitled", "vol", "webp", "whatsapp",
})  # fmt: skip


def caption_from_name(path: str) -> str:
    """The file name as words, or "" if it does not read like words: `the_wolf-02.jpg` does, `IMG_1234.jpg` does not."""
    stem = unquote(posixpath.splitext(posixpath.basename(path))[0])
    if not stem.isprintable():  # bytes that are not UTF-8, control characters
        return ""
    stem = re.sub("(?<=[a-z])(?=[A-Z])", " ", stem)  # WolfAndLamb
    tokens = re.split(r"[\s_\-.+]+", plain_text(stem).strip("_-.+ "))
    while tokens and is_counter(tokens[-1]):
        tokens.pop()
    while tokens and is_counter(tokens[0]):
        tokens.pop(0)
    real = [token for token in tokens if is_word(token)]
    letters = sum(map(len, real))
    if not any(is_descriptive(token) for token in real) or 2 * letters < sum(map(len, tokens)):
        return ""
    return " ".join(tokens)


def is_counter(token: str) -> bool:
    """Whether it is a number that is not a year: 01, 0007, 3, (2)."""
    token = token.strip("()[]")
    return token.isdigit() and not (len(token) == 4 and "1000" <= token <= "2099")


def is_word(token: str) -> bool:
    letters = token.strip("()[],'’!?&;:\"")
    if not letters or any(unicodedata.category(c)[0] not in "LM" and c not in "'’" for c in letters):
        return False
    return not letters.isascii() or bool(re.search("[aeiouy]", letters, re.IGNORECASE))


def is_descriptive(token: str) -> bool:
    """Whether a word can say what a picture shows: not a camera's prefix, two letters, or a hash of letters only."""
    word = token.strip("()[],'’!?&;:\"").lower()
    if word in NO_WORDS or re.fullmatch("[a-f]{8,}", word):
        return False
    return len(word) >= 3 or not word.isascii()

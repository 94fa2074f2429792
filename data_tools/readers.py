"""Readers: what prepare can be given -> the pictures in it, and what is said of each.

    python -m data_tools.prepare book-folder/ --reader gutenberg --style engraving --out shards/

One function for each kind of source, in the table READERS: (source, Options) -> Listing. A reader opens no picture. It
lists paths, short words and where the bytes lie, on disk (disk.py), so that memory does not grow with the collection;
`read_picture` fetches the bytes of one later, in any process. What a reader lists depends on the source alone, and its order is fixed. What may not
be opened (a link or a path that leaves the source, a damaged tar) is listed too, with the problem.
This file knows folders, tables, tar files and object storage. It knows nothing of pixels, and hands captions over as
they were found, in one plain line: cleaning.py mends them.
"""

from __future__ import annotations

import asyncio
import csv
import difflib
import io
import json
import os
import posixpath
import re
import stat
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from urllib.parse import unquote

from data_tools.cleaning import plain_text
from data_tools.disk import DiskDict, DiskList
from data_tools.gutenberg import BOOK_PAGE, Page, book_facts, decode_text, illustrations
from data_tools.pictures import PictureError
from tokun.utils.extras import need

MAX_BYTES = 256 * 2**20  # of one picture file
MAX_TEXT_BYTES = 2**20  # of one sidecar caption file
MAX_PAGE_BYTES = 32 * 2**20  # of one page of a book
MAX_TABLE_BYTES = 2**30  # of one table in object storage

# ---------------------------------------------------------------------------------------------------------------------
# what a reader is told, and what it answers


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes within a larger file: a member of a tar. `file` is a path within SOURCE."""

    file: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of one split of a Hugging Face data set."""

    split: str
    index: int


@dataclass(frozen=True, slots=True)
class Remote:
    """A file in object storage, or the `size` bytes of it from `start` on (a member of a tar)."""

    url: str
    start: int = 0
    size: int | None = None
    """None: to its end."""
    version: str = ""
    """Changes when the file does, where the storage tells."""
    sidecars: tuple[str, ...] = ()
    """The suffixes of the files of words beside it: .txt, .json."""


@dataclass(frozen=True, slots=True)
class Found:
    """One input picture: its path within SOURCE with forward slashes, and why it may not be opened ("" when it may)."""

    path: str
    problem: str = ""
    where: Span | Row | Remote | None = None
    """Where the bytes lie; None: in a file of their own, at `path`."""
    style: str = ""
    """The picture's own style; "": the one asked for."""
    group: str | None = None
    """Pictures of one group never part in the split. "": a group of its own; None: its folder decides."""
    beside: bool = True
    """Whether words may be looked for in files beside it, and in its name."""


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of one picture beside its pixels."""

    caption: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    subject: str = ""
    license: str = ""
    source_url: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the picture's JSON: title, author, context and the like."""

    def or_else(self, other: Words) -> Words:
        """These words, each empty one filled from `other`."""
        return self if other == NOTHING else Words(**{one.name: getattr(self, one.name) or getattr(other, one.name) for one in fields(self)})


NOTHING = Words()


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a reader may be told beside the source."""

    style: str = ""
    """The style asked for; "": the style that each picture brings."""
    root: Path | None = None
    """Where the paths in a table start; None: at the table's folder."""
    leave_out: Path | None = None
    """A folder that is not entered: the output, when it lies inside the source."""


@dataclass(frozen=True)
class Listing:
    """What a reader found: pictures in order, words by path, rows of tables that belong to no picture."""

    base: Path | str
    """The folder, or the URL, where the paths of the pictures start."""
    found: Sequence[Found]
    words: Mapping[str, Words]
    unmatched: int = 0


class CaptionError(ValueError):
    """A caption file is there and cannot be read: guessing another caption would mislabel the picture."""


# ---------------------------------------------------------------------------------------------------------------------
# the bytes of one picture


def read_picture(base: Path, found: Found) -> bytes:
    """The encoded bytes of one picture that a reader listed. Raises PictureError with the reason."""
    where = found.where
    if isinstance(where, Row):
        return read_row(base, where)
    try:
        if isinstance(where, Remote):
            data = fetch(where.url, where.start, MAX_BYTES + 1 if where.size is None else where.size)
            return checked(data, where.size)
        with open(posixpath.join(base, where.file if where else found.path), "rb") as file:
            size = where.size if where else os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise PictureError("file too large")
            if where:
                file.seek(where.start)
            return checked(file.read(size), size)
    except OSError as error:
        raise PictureError("cannot be read") from error


def checked(data: bytes, size: int | None) -> bytes:
    if len(data) > MAX_BYTES:
        raise PictureError("file too large")
    if size is not None and len(data) < size:
        raise PictureError("truncated or damaged")
    return data


def shown(path: str) -> str:
    """A path as text that any file can hold: bytes of a name that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------------------------------
# finding the files

PICTURE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
SIDECARS = (".txt", ".json")


def scan(source: Path, *, leave_out: Path | None = None) -> tuple[Sequence[Found], list[str]]:
    """All pictures under `source` and all caption tables, as paths within it, sorted.

    A picture is what has a picture's suffix, or a picture's first bytes under any other name. `leave_out` is a folder
    that is not entered (the output, when it lies inside the source). Raises ValueError for a table that may not be opened.
    """
    root, out = source.resolve(), leave_out.resolve() if leave_out else None
    pictures = DiskDict()
    tables: list[str] = []

    def note(path: str, problem: str) -> None:
        pictures[path] = Found(path, problem)

    def cannot_enter(error: OSError) -> None:
        note(Path(error.filename).relative_to(source).as_posix(), "folder cannot be read")

    for folder, subfolders, names in os.walk(source, onerror=cannot_enter):
        here = Path(folder)
        within = here.relative_to(source).as_posix()
        for name in list(subfolders):
            path = here / name
            if path.is_symlink():
                problem = "symlink to a folder" if path.resolve().is_relative_to(root) else "symlink leaves the source"
                note(posixpath.normpath(posixpath.join(within, name)), problem)
            elif out is None or path.resolve() != out:
                continue
            subfolders.remove(name)
        for name in names:
            suffix = posixpath.splitext(name)[1].lower()
            if suffix in SIDECARS:
                continue
            path, inside = f"{folder}/{name}", name if within == "." else f"{within}/{name}"
            problem = why_not_open(path, root)
            if name in TABLE_NAMES:
                if problem:
                    raise ValueError(f"{path} cannot be read for captions ({problem}): put the file itself there")
                tables.append(inside)
            elif suffix in PICTURE_SUFFIXES or (not problem and starts_like_a_picture(path)):
                note(inside, problem)
    return DiskList(pictures.ordered()), sorted(tables)


def find_files(base: Path, leave_out: Path | None, endings: tuple[str, ...] = ("",)) -> Iterator[str]:
    """The files under `base` with one of these endings, as the disk lists them; no link to a folder is followed."""
    out = leave_out.resolve() if leave_out else None
    for folder, subfolders, names in os.walk(base):
        here = Path(folder)
        within = here.relative_to(base).as_posix()
        subfolders[:] = [name for name in subfolders if out is None or (here / name).resolve() != out]
        yield from (name if within == "." else f"{within}/{name}" for name in names if name.lower().endswith(endings))


def why_not_open(path: str | Path, root: Path) -> str:
    """Why this file is not to be opened (a link out of the source, a pipe that would block for ever), or ""."""
    try:
        there = os.lstat(path)
        if stat.S_ISLNK(there.st_mode):
            if not Path(path).resolve(strict=True).is_relative_to(root):
                return "symlink leaves the source"
            there = os.stat(path)
        return "" if stat.S_ISREG(there.st_mode) else "not a regular file"
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return "broken symlink" if os.path.islink(path) else "cannot be read"


def starts_like_a_picture(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:  # not known to be a picture, so not ours to report
        return False
    return start.startswith(PICTURE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def as_path(text: str) -> str:
    """A path as written in a file -> one that the file system can be asked for."""
    return utf8(text).strip().replace("\\", "/")


def utf8(text: str) -> str:
    """Without halves of surrogate pairs, as JSON can hold them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def listed(base: Path, root: Path, name: str) -> Found:
    """A file that a table names, as a path within `base` (whose real place is `root`), with what forbids to open it."""
    name = as_path(name)
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.I):
        return Found(name, "a web address, not a file", beside=False)
    for start in (base.absolute(), root):
        if posixpath.isabs(name) and Path(name).is_relative_to(start):
            name = Path(name).relative_to(start).as_posix()
    name = posixpath.normpath(name)
    path = base / name
    if posixpath.isabs(name) or name.split("/")[0] == "..":
        problem = "path leaves the source"
    elif not os.path.lexists(path):
        problem = "missing file"
    elif not (problem := why_not_open(path, root)) and not Path(os.path.realpath(path)).is_relative_to(root):
        problem = "symlink leaves the source"  # of a folder on the way
    return Found(name, problem, beside=False)


# ---------------------------------------------------------------------------------------------------------------------
# words, from a record: a row of a table, the JSON of a picture

TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "captions.csv")  # where one folder has several, the first wins
PATHS = (
    "image_path", "file_name", "filename", "file_path", "filepath", "image_file", "path", "file", "image", "img_path", "img",
)  # fmt: skip
CAPTIONS = ("caption", "text", "captions", "title", "description")
GROUPS = ("group", "book", "gutenberg_id", "object", "object_id", "artist")
MORE = ("title", "author", "artist", "illustrator", "context", "technique", "category", "date")
COLUMNS = frozenset({*PATHS, *CAPTIONS, *GROUPS, *MORE, "style", "subject", "license", "source_url", "url"})


def normal(record: dict[Any, Any]) -> dict[str, Any]:
    """A record with the names of its columns in small letters and underscores."""
    return {column_name(name): value for name, value in record.items()}


def column_name(name: Any) -> str:
    return re.sub(r"[\s\-]+", "_", str(name).strip().lower())


def kebab(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def words_from(record: dict[str, Any]) -> Words:
    """Words from a normal record; other columns are left alone. Of several captions the first is the caption."""
    captions = {name: texts for name in CAPTIONS if (texts := texts_in(record.get(name)))}
    caption = next(iter(captions.values()), [""])[0]
    several = next((texts for texts in captions.values() if len(texts) > 1), [])
    more: dict[str, Any] = {name: texts[0] for name in MORE if (texts := texts_in(record.get(name))) and texts[0] != caption}
    registers = record["captions"] if isinstance(record.get("captions"), dict) else {}
    return Words(
        caption=caption,
        captions={kebab(str(key)): plain_text(text) for key, text in registers.items() if isinstance(text, str)},
        subject=kebab("".join(texts_in(record.get("subject"))[:1])),
        license="".join(texts_in(record.get("license"))[:1]),
        source_url=next((utf8(url).strip() for name in ("source_url", "url") if isinstance(url := record.get(name), str) and url), ""),
        more={**more, "captions_all": list(dict.fromkeys([caption, *several]))} if several else more,
    )


def texts_in(value: Any) -> list[str]:
    """The lines of plain text in a text, a number or a list of texts, without empty ones."""
    values = [str(value)] if isinstance(value, (str, int)) else value if isinstance(value, (list, tuple)) else []
    return [text for one in values if isinstance(one, str) and (text := plain_text(one))]


def path_in(record: dict[str, Any]) -> str:
    """The path that a normal record holds, as it is written; "" where it holds none."""
    return next((record[name] for name in PATHS if isinstance(record.get(name), str) and record[name].strip()), "")


def style_of(record: dict[str, Any]) -> str:
    return kebab(record["style"]) if isinstance(record.get("style"), str) else ""


def group_of(record: dict[str, Any]) -> str | None:
    """The first column that says what belongs together; None where there is none."""
    return next((f"{name}/{record[name]}" for name in GROUPS if isinstance(record.get(name), (str, int)) and record[name] != ""), None)


def join_words(words: Words | None, other: Words) -> Words:
    """The words of two rows of one picture, each caption once."""
    if words is None:
        return other
    captions: dict[str, None] = {}
    for one in (words, other):
        captions.update(dict.fromkeys(one.more.get("captions_all") or ([one.caption] if one.caption else [])))
    more = {**other.more, **words.more}
    return replace(words.or_else(other), more={**more, "captions_all": list(captions)} if len(captions) > 1 else more)


def read_table(source: Path, table: str, words: MutableMapping[str, Words]) -> None:
    """Add {path of the picture within SOURCE: its words} of a caption table, whose paths start at its folder, to `words`: what is there stays."""
    with open(source / table, "rb") as file:
        table_words(file, table, str(source / table), words)


def table_words(file: BinaryIO, table: str, name: str, words: MutableMapping[str, Words]) -> None:
    for record in table_rows(file, name, needs=(PATHS, CAPTIONS)):
        if path := as_path(path_in(record)):
            words.setdefault(posixpath.normpath(posixpath.join(posixpath.dirname(table), path)), words_from(record))


def unmatched(words: Mapping[str, Words], found: Iterable[Found]) -> int:
    """How many rows of tables belong to no picture."""
    return len(words) - (sum(one.path in words for one in found) if words else 0)


def table_rows(binary: BinaryIO, name: str, *, needs: tuple[tuple[str, ...], ...] = ()) -> Iterator[dict[str, Any]]:
    """The normal records of a .jsonl table, or of a .csv (comma, semicolon or tab) with one column of each kind in `needs`.

    `name` tells which, and stands in what is raised: ValueError, with the way out.
    """
    try:
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            yield from json_rows(file) if name.lower().endswith((".jsonl", ".ndjson")) else csv_rows(file, needs)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{name} is no table of captions: {error}. Mend it, or rename it to go without") from error


def json_rows(file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield normal(json_object(line, where=f"line {number}"))


def csv_rows(file: TextIO, needs: tuple[tuple[str, ...], ...]) -> Iterator[dict[str, Any]]:
    header = file.readline()
    file.seek(0)
    reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
    columns = set(map(column_name, reader.fieldnames or ()))
    for wanted in needs:
        if not columns.intersection(wanted):
            raise ValueError(f"its columns are {sorted(columns)}, and none is called {' or '.join(wanted)}")
    yield from map(normal, reader)


def json_object(text: str, *, where: str) -> dict[Any, Any]:
    """The JSON object in `text`. Raises ValueError saying where and what is wrong."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# words, from files beside the picture and from its name


def find_words(source: Path, found: Found, row: Words) -> Words:
    """The words of one picture: NAME.txt, then NAME.json, then its `row` of a table, then the file's name.

    Raises CaptionError when a sidecar file is there and cannot be read.
    """
    if not found.beside:
        return row
    words = Words(caption=plain_text(read_beside(source, found, ".txt")))
    if text := read_beside(source, found, ".json"):
        try:
            words = words.or_else(words_from(normal(json_object(text, where="caption file"))))
        except ValueError as error:
            raise CaptionError(str(error)) from error
    words = words.or_else(row)
    return words if words.caption else words.or_else(Words(caption=caption_from_name(found.path)))


def read_beside(source: Path, found: Found, suffix: str) -> str:
    """The text of a sidecar file; "" where there is none. Raises CaptionError."""
    try:
        if isinstance(found.where, Remote):
            url = posixpath.splitext(found.where.url)[0] + suffix
            data = fetch(url, 0, MAX_TEXT_BYTES + 1) if suffix in found.where.sidecars else b""
        else:
            path = posixpath.splitext(posixpath.join(source, found.path))[0] + suffix
            try:
                there = os.lstat(path)
            except (OSError, ValueError):
                return ""
            plain = stat.S_ISREG(there.st_mode)
            if not plain and (problem := why_not_open(Path(path), source.resolve())):
                raise CaptionError(f"caption file: {problem}")
            with open(path, "rb") as file:
                data = file.read(min(there.st_size, MAX_TEXT_BYTES) + 1 if plain else MAX_TEXT_BYTES + 1)  # room for no more than is there
    except OSError as error:
        raise CaptionError("caption file cannot be read") from error
    if len(data) > MAX_TEXT_BYTES:
        raise CaptionError("caption file is too large")
    return decode_text(data)


# What cameras, scanners, books and web sites call a picture: no words about what it shows.
NO_WORDS = frozenset({
    "back", "chap", "copy", "cover", "dcim", "download", "dsc", "dscf", "dscn", "edited", "fig", "figure", "file",
    "final", "footer", "frame", "front", "frontis", "frontispiece", "full", "gif", "gopr", "header", "icon", "ill",
    "illo", "ills", "illus", "illustration", "image", "images", "img", "initial", "jpeg", "jpg", "large", "logo", "mvi",
    "new", "original", "page", "photo", "photos", "pic", "pict", "picture", "plate", "plt", "png", "pxl", "scan",
    "scanned", "screen", "screenshot", "shot", "signal", "small", "spine", "thumb", "thumbnail", "tif", "tiff", "title",
    "titlepage", "unnamed", "untitled", "vol", "webp", "whatsapp",
})  # fmt: skip


def caption_from_name(path: str) -> str:
    """The file's name as words, or "" when it does not read like words: `the_wolf-02.jpg` yes, `IMG_1234.jpg` no."""
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
    if not any(is_telling(token) for token in real) or 2 * letters < sum(map(len, tokens)):
        return ""
    return " ".join(tokens)


def is_counter(token: str) -> bool:
    """A number that is no year: 01, 0007, 3, (2)."""
    token = token.strip("()[]")
    return token.isdigit() and not (len(token) == 4 and "1000" <= token <= "2099")


def is_word(token: str) -> bool:
    letters = token.strip("()[],'’!?&;:\"")
    if not letters or any(unicodedata.category(c)[0] not in "LM" and c not in "'’" for c in letters):
        return False
    return not letters.isascii() or bool(re.search("[aeiouy]", letters, re.IGNORECASE))


def is_telling(token: str) -> bool:
    """A word that can say what a picture shows: no camera's prefix, no two letters, no hash in letters only."""
    word = token.strip("()[],'’!?&;:\"").lower()
    if word in NO_WORDS or re.fullmatch("[a-f]{8,}", word):
        return False
    return len(word) >= 3 or not word.isascii()


# ---------------------------------------------------------------------------------------------------------------------
# folder, and classes


def read_folder(source: Path, options: Options) -> Listing:
    """Pictures in folders, with words in files beside them, in tables, or in their names."""
    found, tables = scan(source, leave_out=options.leave_out)
    words = DiskDict()
    for table in sorted(tables, key=table_rank):
        read_table(source, table, words)
    return Listing(source, found, words, unmatched(words, found))


def table_rank(table: str) -> int:
    return TABLE_NAMES.index(posixpath.basename(table))


CLASS_STYLES = {
    "drawing": "drawing", "engraving": "engraving", "etching": "etching", "iconography": "iconography",
    "lithograph": "lithograph", "painting": "painting", "photograph": "photograph", "sculpture": "sculpture",
    "watercolour": "watercolour", "woodcut": "woodcut", "wood-engraving": "wood-engraving",
}  # fmt: skip
COPIES = ("musemart",)  # folders that hold the same pictures once more


def class_of(path: str) -> tuple[str, str]:
    """(style, what lies between the class folder and the file) of a picture's path; ("", "") outside any folder.

    The class is the innermost folder with the name of a style, else the innermost folder.
    """
    folders = path.split("/")[:-1]
    for depth in range(len(folders), 0, -1):
        name = kebab(folders[depth - 1])
        style = CLASS_STYLES.get(name) or CLASS_STYLES.get(name.removesuffix("s"))
        if style:
            return style, "/".join(folders[depth:])
    return (kebab(folders[-1]), "") if folders else ("", "")


def read_classes(source: Path, options: Options) -> Listing:
    """A folder for each style: drawings, engraving, iconography, painting, sculpture, or any other name.

    Folders called training or validation say nothing here: the split is drawn anew, so pictures on the wrong side of
    one do no harm. Where `options.style` is given the other classes are listed but not opened. Second copies of the set
    come last, so that the first copy is the one kept.
    """
    listing = read_folder(source, options)
    turns = ((one for one in listing.found if is_copy(one) == copies) for copies in (False, True))
    return replace(listing, found=DiskList(classed(one, options.style) for turn in turns for one in turn))


def is_copy(one: Found) -> bool:
    return any(name in COPIES for name in one.path.split("/"))


def classed(one: Found, wanted: str) -> Found:
    """With the style that its folder names, and the problem of being of another than the one that is wanted."""
    style, below = class_of(one.path)
    problem = one.problem
    if not problem and not style:
        problem = "in no class folder"
    elif not problem and wanted not in ("", style):
        problem = "other style"
    return replace(one, problem=problem, style=style, group=below)


# ---------------------------------------------------------------------------------------------------------------------
# gutenberg: books (the page is read by gutenberg.py)


def read_gutenberg(source: Path, options: Options) -> Listing:
    """Illustrated books as Project Gutenberg publishes them: a page *-h.htm and its images folder, one book or many.

    Where a picture on the page links to a larger version of itself, that one is listed with its words, and the picture
    on the page as a thumbnail. Pictures outside any book are read as in a plain folder.
    """
    base = source if source.is_dir() else source.parent
    listing = read_folder(base, options)
    books: dict[str, list[str]] = {}
    for page in book_pages(base, options.leave_out) if source.is_dir() else [source.name]:
        books.setdefault(posixpath.dirname(page), []).append(page)
    if not books:
        raise FileNotFoundError(f"no books in {source}: their pages are called NUMBER-h.htm or NUMBER-h.html")
    scanned, found = (DiskDict((one.path, one) for one in listing.found) for _ in range(2))
    words = DiskDict(listing.words)
    for book, pages in sorted(books.items()):
        inside = {path: one for path, one in scanned.pairs(f"{book}/" if book else "") if book_around(path, books) == book}
        for one, said in read_book(base, sorted(pages), inside):
            if one.path in inside or one.path not in found:
                found[one.path], words[one.path] = one, said
    return Listing(base, DiskList(found.ordered()), words, listing.unmatched)


def book_pages(base: Path, leave_out: Path | None) -> list[str]:
    """The pages of books under `base`; where none is named like one, all pages that stand beside an images folder."""
    pages = list(find_files(base, leave_out, (".htm", ".html", ".html.utf8")))
    books = [page for page in pages if BOOK_PAGE.search(posixpath.basename(page))]
    return books or [page for page in pages if (base / page).parent.joinpath("images").is_dir()]


def book_around(path: str, books: dict[str, list[str]]) -> str | None:
    """The folder of the book that a picture belongs to: the nearest around it."""
    folder = posixpath.dirname(path)
    while folder not in books:
        if not folder:
            return None
        folder = posixpath.dirname(folder)
    return folder


def read_book(base: Path, pages: list[str], inside: dict[str, Found]) -> list[tuple[Found, Words]]:
    """The pictures of one book, shown or not, and the words of each. `inside` are the pictures in its folder."""
    said: dict[str, Words] = {}
    thumbnails: dict[str, str] = {}
    ornaments: set[str] = set()
    group, unread = f"book/{posixpath.dirname(pages[0])}", ""
    lower = {path.lower(): path for path in inside}
    for name in pages:
        try:
            page = read_page(base / name, base.resolve())
        except CaptionError as error:
            unread = f"book page: {error}"
            continue
        facts = book_facts(page, name)
        group = f"book/{facts['gutenberg_id']}" if facts["gutenberg_id"] else group
        ornaments.update(picture_path(name, address, inside, lower) for address in page.ornaments)
        for path, large, words in pictures_on(page, name, inside, lower, facts):
            if large:
                thumbnails.setdefault(path, large)
            said[large or path] = said[large or path].or_else(words) if (large or path) in said else words
    entries = []
    for path in sorted(inside.keys() | said.keys()):
        one = inside.get(path, Found(path, "missing file"))
        problem = one.problem
        if not problem and path not in said:
            problem = unread or ("ornament of the style sheet" if path in ornaments else "not shown in the book")
            problem = f"thumbnail of {thumbnails[path]}" if path in thumbnails else problem
        entries.append((replace(one, problem=problem, group=group, beside=False), said.get(path, Words())))
    return entries


def read_page(path: Path, root: Path) -> Page:
    """A book's page. Raises CaptionError when it cannot be read."""
    if problem := why_not_open(path, root):
        raise CaptionError(problem)
    try:
        if path.stat().st_size > MAX_PAGE_BYTES:
            raise CaptionError("too large")
        return Page(decode_text(path.read_bytes()))
    except OSError as error:
        raise CaptionError("cannot be read") from error


def pictures_on(
    page: Page, name: str, inside: dict[str, Found], lower: dict[str, str], facts: dict[str, str]
) -> Iterator[tuple[str, str, Words]]:
    """(path, path of its larger version or "", words) of each picture on a page; then of pictures that it only links to."""
    number = facts["gutenberg_id"]
    book = Words(
        source_url=f"https://www.gutenberg.org/ebooks/{number}" if number else "",
        license=plain_text(page.meta.get("dcterms.rights", "")),
        more={fact: text for fact, text in facts.items() if text},
    )
    shown_here = set()
    for one in illustrations(page, facts["title"]):
        path = picture_path(name, one.src, inside, lower)
        if not path or (one.is_link and (path not in inside or path in shown_here)):
            continue
        large = picture_path(name, one.link, inside, lower)
        large = large if large != path and large in inside and not inside[large].problem else ""
        shown_here.update((path, large))
        more = {**book.more, "context": one.context, "caption_origin": one.caption_source}
        yield path, large, replace(book, caption=one.caption, more=more)


def picture_path(page: str, address: str, inside: dict[str, Found], lower: dict[str, str]) -> str:
    """An address on a page -> the path of the picture; "" for other things and other places."""
    address = as_path(unquote(address.split("#")[0].split("?")[0]))
    if not address or posixpath.splitext(address)[1].lower() not in PICTURE_SUFFIXES or re.match(r"[a-z][a-z0-9+.-]*:|/", address, re.I):
        return ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), address))
    if path.startswith("../"):
        return ""
    return path if path in inside else lower.get(path.lower(), path)  # books made where upper and lower case are one


# ---------------------------------------------------------------------------------------------------------------------
# manifest: a table of paths


def read_manifest(source: Path, options: Options) -> Listing:
    """A table (.csv, .tsv, .jsonl or .parquet) with a column of paths and columns of words.

    Several rows of one picture: the first row's words, and all captions in `captions_all`. Raises ValueError when no
    column holds paths.
    """
    base = options.root or source.parent
    root = base.resolve()
    found, words = DiskDict(), DiskDict()
    without = 0
    columns: dict[str, None] = {}
    for record in parquet_rows(source) if source.suffix.lower() == ".parquet" else file_rows(source):
        if not (name := path_in(record)):
            without += 1
            columns.update(dict.fromkeys(record))
            continue
        one = replace(listed(base, root, name), group=group_of(record), style=style_of(record))
        found.setdefault(one.path, one)
        words[one.path] = join_words(words.get(one.path), words_from(record))
    if without and not found:
        raise ValueError(no_path_column(source, list(columns)))
    return Listing(base, DiskList(found.ordered()), words, without)


def no_path_column(source: Path, columns: list[str]) -> str:
    return (
        f"{source} names no pictures: its columns are {columns}, and none of {', '.join(PATHS)} holds paths. "
        "Rename the column of paths to file_name, or, where pictures lie in the table itself, use --reader huggingface"
    )


def file_rows(source: Path) -> Iterator[dict[str, Any]]:
    with open(source, "rb") as file:
        yield from table_rows(file, str(source))


def parquet_rows(source: Path) -> Iterator[dict[str, Any]]:
    """The normal records of a Parquet table: only the columns that say something, and none of bytes."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    try:
        with pq.ParquetFile(source) as file:
            columns = [column for column in file.schema_arrow if column_name(column.name) in COLUMNS]
            names = [column.name for column in columns if not holds_bytes(pa, column.type)]
            if not {column_name(name) for name in names}.intersection(PATHS):
                raise LookupError(no_path_column(source, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=4096, columns=names):
                yield from map(normal, batch.to_pylist())
    except LookupError as error:
        raise ValueError(*error.args) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{source} is no Parquet file that can be read: {error}. Write it anew, or as .csv or .jsonl") from error


def holds_bytes(pa: Any, kind: Any) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or (pa.types.is_struct(kind) and any(column.name == "bytes" for column in kind))
    )


# ---------------------------------------------------------------------------------------------------------------------
# coco


def read_coco(source: Path, options: Options) -> Listing:
    """A COCO captions file. An image's first caption is its caption; where it has several, all are in `captions_all`."""
    data = coco_object(source)
    captions: dict[str, list[str]] = {}
    for one in records(data["annotations"]):
        if isinstance(one.get("caption"), str):
            captions.setdefault(str(one.get("image_id")), []).append(one["caption"])
    licenses = {str(one.get("id")): str(one.get("name", "")) for one in records(data.get("licenses"))}
    images = [one for one in records(data["images"]) if isinstance(one.get("file_name"), str)]
    base = options.root or coco_folder(source, [image["file_name"] for image in images[:100]])
    root = base.resolve()
    found, words = DiskDict(), DiskDict()
    for image in images:
        one = replace(listed(base, root, image["file_name"]), group="")
        said = captions.pop(str(image.get("id")), [])
        url = next((image[name] for name in ("flickr_url", "coco_url") if isinstance(image.get(name), str)), "")
        here = words_from({"caption": said, "source_url": url, "license": licenses.get(str(image.get("license")), "")})
        words[one.path] = join_words(words.get(one.path), here)
        found.setdefault(one.path, one)
    return Listing(base, DiskList(found.ordered()), words, sum(map(len, captions.values())))


def records(value: Any) -> Iterable[dict[Any, Any]]:
    """The objects in a list of JSON; nothing where it is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def coco_object(source: Path) -> dict[str, Any]:
    """The JSON of a COCO captions file. Raises ValueError saying what it is instead."""
    way_out = "Give a captions_*.json with images (id, file_name) and annotations (image_id, caption), or a table as .csv or .jsonl"
    try:
        data = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no COCO file: it is not valid JSON. {way_out}") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in ("images", "annotations")):
        there = f"the keys {sorted(map(str, data))[:12]}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ValueError(f"{source} is no COCO file: it holds {there}, and not lists called images and annotations. {way_out}")
    if data["annotations"] and not any("caption" in one for one in records(data["annotations"])):
        raise ValueError(f"{source} is a COCO file without captions: none of its annotations has one. {way_out}")
    return data


def coco_folder(source: Path, names: list[str]) -> Path:
    """Where the pictures of a COCO file are: beside it, or in the folders of the usual layout, where most are found."""
    split = source.stem.split("_")[-1]  # captions_val2017.json -> val2017
    here = source.parent
    folders = [start / folder for start in (here, here.parent) for folder in (".", "images", split, f"images/{split}")]
    return max(folders, key=lambda folder: sum(os.path.lexists(folder / as_path(name)) for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# webdataset

TAR_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TARS = (".tar", *TAR_PACKED)
Place = Callable[[int, int], Span | Remote]


def read_webdataset(source: Path, options: Options) -> Listing:
    """Tar files of KEY.jpg with KEY.txt or KEY.json beside it: one file, or all in a folder. They are read in place."""
    base = source if source.is_dir() else source.parent
    found, words = DiskList(), DiskDict()
    for path in sorted(find_files(base, options.leave_out, TARS)) if source.is_dir() else [source.name]:
        if problem := why_not_open(base / path, base.resolve()):
            found.append(Found(path, problem))
            continue
        try:
            with open(base / path, "rb") as file:
                read_tar(file, path, lambda start, size, path=path: Span(path, start, size), found, words)
        except OSError:
            found.append(Found(path, "cannot be read"))
    return Listing(base, found, words)


class Sample:
    """Members of one key: its pictures, and what is said of them."""

    __slots__ = ("caption", "extensions", "pictures", "record")

    def __init__(self) -> None:
        self.pictures: list[Found] = []
        self.record: dict[str, Any] = {}
        self.caption = ""
        self.extensions: set[str] = set()


def read_tar(file: BinaryIO, tar_path: str, place: Place, found: DiskList, words: DiskDict) -> None:
    """Add the pictures of one open tar file, in its order, and their words. Damage is listed under the tar's own path."""
    samples: list[Sample] = []
    latest: dict[str, Sample] = {}
    damage = "compressed tar: unpack it to .tar first" if tar_path.lower().endswith(TAR_PACKED) else ""
    try:
        for tar, member in () if damage else tar_members(file):
            folder, name = posixpath.split(member.name)
            stem, _, extension = name.partition(".")
            key, extension = posixpath.join(folder, stem), extension.lower()
            if key not in latest or extension in latest[key].extensions:  # a key that comes again is another sample
                latest[key] = Sample()
                samples.append(latest[key])
            add_member(tar, member, extension, latest[key], f"{tar_path}/{as_path(member.name).removeprefix('./')}", place)
    except OSError:
        damage = "cannot be read"
    except (tarfile.TarError, ValueError, EOFError):
        damage = "damaged tar file"
    for sample in samples:
        for one in sample.pictures:
            path = one.path if one.path not in words else f"{one.path}+{len(words)}"  # the same name once more
            words[path] = Words(caption=sample.caption).or_else(words_from(sample.record))
            found.append(replace(one, path=path, group=group_of(sample.record) or "", style=style_of(sample.record)))
    if damage:
        found.append(Found(tar_path, damage))


def tar_members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar, one at a time."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        last = -1
        while (member := tar.next()) is not None:
            if member.size < 0 or member.offset <= last:
                raise tarfile.ReadError("a member before the one before")  # it would go round for ever
            last = member.offset
            tar.members.clear()  # else it remembers every one
            yield tar, member


def add_member(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: Sample, path: str, place: Place) -> None:
    """Note one member of a tar: a picture's place, or words."""
    sample.extensions.add(extension)
    if posixpath.splitext(member.name)[1].lower() in PICTURE_SUFFIXES:
        problem = "" if member.isreg() and not member.issparse() else "not a regular file"
        if member.name.startswith("/") or ".." in member.name.split("/"):
            problem = "path leaves the source"
        sample.pictures.append(Found(path, problem, where=place(member.offset_data, member.size), beside=False))
    elif member.isreg() and member.size <= MAX_TEXT_BYTES and extension in ("json", "txt", "caption", "text"):
        data = tar.extractfile(member)
        text = decode_text(data.read()) if data else ""
        if extension != "json":
            sample.caption = sample.caption or plain_text(text)
            return
        try:
            record = normal(json_object(text, where=member.name))
            sample.record = {name: value for name, value in record.items() if name in COLUMNS}
        except ValueError:  # a sample's broken JSON: its picture is then one without a caption
            return


# ---------------------------------------------------------------------------------------------------------------------
# huggingface

PICTURES = "__picture__"  # the column of pictures, whatever it was called


@lru_cache(maxsize=1)
def open_splits(source: str) -> dict[str, Any]:
    """{split: data set} of a folder written by save_to_disk, a folder of Parquet files, or an id; pictures undecoded."""
    datasets = need("datasets", extra="data")
    folder = Path(source)
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            splits = datasets.load_from_disk(source)
        elif folder.is_file():
            splits = datasets.load_dataset("parquet", data_files={"train": source})
        else:
            splits = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(f"SOURCE {source} is no data set that `datasets` can open: {error}") from error
    splits = dict(splits) if isinstance(splits, dict) else {"all": splits}
    undecoded = {}
    for name, data in splits.items():
        column = picture_column(datasets, data, source)
        undecoded[name] = data.cast_column(column, datasets.Image(decode=False)).rename_column(column, PICTURES)
    return undecoded


def picture_column(datasets: Any, data: Any, source: str) -> str:
    """The name of the column that holds pictures. Raises ValueError naming the columns there are."""
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            return name
    for name in ("image", "img", "picture", "jpg", "png", "webp"):
        feature = data.features.get(name)
        if getattr(feature, "dtype", "") in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature):
            return name
    raise ValueError(f"{source} has no column of pictures: its columns are {sorted(data.features)}. Name the one with the bytes: image")


def read_huggingface(source: Path, options: Options) -> Listing:
    """A data set by its id (owner/name) or in a local folder, through `datasets`. Its splits are not taken over."""
    found, words = DiskList(), DiskDict()
    for split, data in sorted(open_splits(source.as_posix()).items()):
        columns = [name for name in data.features if column_name(name) in COLUMNS]
        classes = {column_name(name): data.features[name].names for name in columns if hasattr(data.features[name], "names")}
        rows = iter(data.select_columns(columns)) if columns else ({} for _ in range(len(data)))
        for index, row in enumerate(rows):
            record = normal(row)
            for name, names in classes.items():
                if isinstance(record[name], int) and 0 <= record[name] < len(names):
                    record[name] = names[record[name]]
            path = f"{split}/{index:08d}"
            found.append(Found(path, where=Row(split, index), group=group_of(record) or "", style=style_of(record), beside=False))
            words[path] = words_from(record)
    return Listing(source, found, words)


def read_row(base: Path, row: Row) -> bytes:
    """The bytes of a picture in a row, or of the file that the row names within the data set. Raises PictureError."""
    value = open_splits(base.as_posix())[row.split][row.index][PICTURES] or {}
    if value.get("bytes") is not None:
        return checked(value["bytes"], None)
    if not value.get("path"):
        raise PictureError("missing file")
    local = base if base.is_dir() else base.parent if base.is_file() else None
    path = ((local or base) / value["path"]).resolve()
    if not any(path.is_relative_to(start) for start in row_folders(local)):
        raise PictureError("path leaves the source")
    return read_picture(path.parent, Found(path.name))


def row_folders(local: Path | None) -> list[Path]:
    """Where the files that rows name may lie: in a local data set's folder, and in the folders of what was downloaded."""
    datasets, hub = need("datasets", extra="data"), need("huggingface_hub.constants", extra="data")
    downloads = [Path(datasets.config.HF_DATASETS_CACHE).resolve(), Path(hub.HF_HUB_CACHE).resolve()]
    return [local.resolve(), *downloads] if local else downloads


# ---------------------------------------------------------------------------------------------------------------------
# remote: object storage and the web, through fsspec

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


def read_remote(source: Path | str, options: Options) -> Listing:
    """s3://bucket/folder and the like: pictures with their sidecars and tables, and tars, read in place.

    file:// is read as the folder or file that it is. Raises FileNotFoundError when the place cannot be listed.
    """
    fsspec, local = need("fsspec", extra="data"), need("fsspec.implementations.local", extra="data")
    url = str(source).rstrip("/")
    try:
        fs, root = fsspec.core.url_to_fs(url)
        here = isinstance(fs, local.LocalFileSystem)
        files = {} if here else {key: info for key, info in fs.find(root, detail=True).items() if info.get("type") == "file"}
    except storage_errors() as error:
        way_out = "Is the address right (s3://, gs://, https:// or another that fsspec knows), and are the keys to it set?"
        raise FileNotFoundError(f"SOURCE {url} cannot be opened: {error}. {way_out}") from error
    if here:
        path = Path(root)
        return READERS[choose_reader(path, leave_out=options.leave_out)](path, options)
    start = posixpath.dirname(root) if root in files else root.rstrip("/")
    within = {key[len(start) :].lstrip("/"): key for key in sorted(files) if key.startswith(f"{start}/")}
    found, words = DiskList(), DiskDict()
    for path, key in within.items():
        place = Remote(fs.unstrip_protocol(key), size=files[key].get("size"), version=version_of(files[key]))
        if path.lower().endswith(TARS):
            read_remote_tar(fs, key, path, place, found, words)
        elif posixpath.splitext(path)[1].lower() in PICTURE_SUFFIXES:
            sidecars = tuple(suffix for suffix in SIDECARS if posixpath.splitext(path)[0] + suffix in within)
            problem = "file too large" if (place.size or 0) > MAX_BYTES else ""
            found.append(Found(path, problem, where=replace(place, sidecars=sidecars)))
    rows = DiskDict()
    for table in sorted((path for path in within if posixpath.basename(path) in TABLE_NAMES), key=table_rank):
        read_remote_table(within[table], fs, table, rows)
    missing = unmatched(rows, found)
    rows.update(words)
    return Listing(url, found, rows, missing)


def version_of(info: dict[str, Any]) -> str:
    return str(next((info[name] for name in ("ETag", "etag", "LastModified", "mtime", "updated", "created") if info.get(name)), ""))


def read_remote_tar(fs: Any, key: str, path: str, whole: Remote, found: DiskList, words: DiskDict) -> None:
    try:
        with fs.open(key, "rb") as file:
            read_tar(file, path, lambda start, size: replace(whole, start=start, size=size), found, words)
    except storage_errors():
        found.append(Found(path, "cannot be read"))


def read_remote_table(key: str, fs: Any, table: str, words: DiskDict) -> None:
    try:
        data = fs.cat_file(key, start=0, end=MAX_TABLE_BYTES + 1)
        if len(data) > MAX_TABLE_BYTES:
            raise OSError(f"it has more than {MAX_TABLE_BYTES} bytes")
    except storage_errors() as error:
        raise ValueError(f"{key} cannot be read for captions: {error}") from error
    table_words(io.BytesIO(data), table, key, words)


def fetch(url: str, start: int, size: int) -> bytes:
    """Up to `size` bytes of a remote file. Raises OSError."""
    try:
        fs, path = need("fsspec", extra="data").core.url_to_fs(url)
        return fs.cat_file(path, start=start, end=start + size)[:size] if size else b""
    except storage_errors() as error:
        raise OSError(f"{url} cannot be read: {error}") from error


def storage_errors() -> tuple[type[BaseException], ...]:
    """What the storages behind fsspec raise: they share no base class, and only those in use are loaded."""
    others = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"), ("google.auth.exceptions", "GoogleAuthError"))
    loaded = [getattr(sys.modules[module], name) for module, name in (*others, ("gcsfs.retry", "HttpError")) if module in sys.modules]
    return (OSError, ValueError, asyncio.TimeoutError, *loaded)


# ---------------------------------------------------------------------------------------------------------------------
# the table of readers

READERS: dict[str, Callable[[Path, Options], Listing]] = {
    "folder": read_folder,
    "classes": read_classes,
    "gutenberg": read_gutenberg,
    "manifest": read_manifest,
    "coco": read_coco,
    "webdataset": read_webdataset,
    "huggingface": read_huggingface,
    "remote": read_remote,
}
FILE_READERS = {
    ".csv": "manifest", ".tsv": "manifest", ".jsonl": "manifest", ".ndjson": "manifest", ".parquet": "manifest",
    ".json": "coco", ".tar": "webdataset", ".htm": "gutenberg", ".html": "gutenberg",
}  # fmt: skip


def choose_reader(source: Path | str, name: str = "auto", *, leave_out: Path | None = None) -> str:
    """The name of the reader for `source`: the one asked for, or the one recognised.

    Raises ValueError for a name that no reader has or that does not fit, FileNotFoundError for a source that is not there.
    """
    if name != "auto" and name not in READERS:
        near = difflib.get_close_matches(name, ["auto", *READERS], n=1, cutoff=0.4)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ValueError(f"--reader {name!r} is unknown{hint}. Readers are auto, {', '.join(READERS)}")
    if URL.match(str(source)) or name == "remote":
        return check_remote(str(source), name)
    if name == "huggingface":
        return name
    source = Path(source)
    if not source.exists():
        an_id = len(source.parts) == 2 and not source.is_absolute()
        hint = f". For the data set {source} of Hugging Face add --reader huggingface" if an_id else ""
        raise FileNotFoundError(f"SOURCE {source} does not exist: give a folder of pictures{hint}")
    if name in ("folder", "classes") and not source.is_dir():
        raise FileNotFoundError(f"SOURCE {source} is a file: give a folder of pictures")
    if name in ("manifest", "coco") and not source.is_file():
        raise FileNotFoundError(f"SOURCE {source} is a folder: --reader {name} takes a file")
    if name != "auto":
        return name
    return recognise_file(source) if source.is_file() else recognise_folder(source, leave_out)


def check_remote(source: str, name: str) -> str:
    if not URL.match(source):
        raise ValueError(f"--reader remote takes an address like s3://bucket/folder, and {source} is none: leave --reader out")
    if name not in ("auto", "remote"):
        raise ValueError(
            f"--reader {name} reads what is on this machine, and {source} is an address: leave --reader out, or download it first"
        )
    return "remote"


def recognise_file(source: Path) -> str:
    suffix = source.suffix.lower()
    if suffix not in FILE_READERS:
        raise FileNotFoundError(
            f"SOURCE {source} is a file: give a folder of pictures, or a file of pictures' names ({' '.join(sorted(FILE_READERS))})"
        )
    return FILE_READERS[suffix]


def recognise_folder(source: Path, leave_out: Path | None) -> str:
    """What a folder is, by the names in it."""
    kinds: Counter[str] = Counter()
    classes, last = set(), None
    for path in find_files(source, leave_out):
        folder, name = posixpath.split(path)
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in PICTURE_SUFFIXES:
            kinds["picture"] += 1
            if folder != last:  # the files of a folder come together
                classes.add(class_of(f"{folder}/x")[0])
                last = folder
        elif name.lower().endswith(TARS):
            kinds["tar"] += 1
        elif BOOK_PAGE.search(name):
            kinds["book"] += 1
        elif suffix == ".parquet" or path in ("dataset_dict.json", "state.json"):
            kinds["data set"] += 1
    if kinds["book"]:
        return "gutenberg"
    if kinds["tar"] > kinds["picture"]:
        return "webdataset"
    if kinds["picture"]:
        return "classes" if len(classes) > 1 and classes <= set(CLASS_STYLES.values()) else "folder"
    return "huggingface" if kinds["data set"] else "folder"

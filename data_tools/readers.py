"""Readers: what prepare can be given -> the pictures in it, and what is said of each.

    python -m data_tools.prepare book-folder/ --reader gutenberg --style engraving --out shards/

One function for each kind of source, in the table READERS: (source, Options) -> Listing. A reader opens no picture. It
lists paths, short words and where the bytes lie, so that a million pictures fit in memory; `read_picture` fetches the
bytes of one later, in any process. What a reader lists depends on the source alone, and its order is fixed.
This file knows folders, tables, pages and tar files. It knows nothing of pixels.
"""

from __future__ import annotations

import csv
import difflib
import html
import json
import os
import posixpath
import re
import stat
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_tools.pictures import PictureError
from tokun.extras import need

MAX_BYTES = 256 * 2**20  # of one picture file
MAX_TEXT_BYTES = 2**20  # of one sidecar caption file
MAX_PAGE_BYTES = 64 * 2**20  # of one page of a book

# ---------------------------------------------------------------------------------------------------------------------
# finding the files

PICTURE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Span:
    """Bytes within a larger file: a member of a tar. `file` is a path within SOURCE."""

    file: str
    start: int
    size: int


@dataclass(frozen=True)
class Row:
    """A row of one split of a Hugging Face data set."""

    split: str
    index: int


@dataclass(frozen=True)
class Found:
    """One input picture: its path within SOURCE with forward slashes, and why it may not be opened ("" when it may)."""

    path: str
    problem: str = ""
    where: Span | Row | None = None
    """Where the bytes lie; None: in a file of their own, at `path`."""
    style: str = ""
    """The picture's own style; "": the one asked for."""
    group: str | None = None
    """Pictures of one group never part in the split. "": a group of its own; None: its folder decides."""
    beside: bool = True
    """Whether words may be looked for in files beside it, and in its name."""


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

    base: Path
    """The folder where the paths of the pictures start."""
    found: list[Found]
    words: dict[str, Words]
    unmatched: int = 0


def scan(source: Path, *, leave_out: Path | None = None) -> tuple[list[Found], list[str]]:
    """All pictures under `source` and all caption tables, as paths within it, sorted.

    A picture is what has a picture's suffix, or a picture's first bytes under any other name. `leave_out` is a folder
    that is not entered (the output, when it lies inside the source).
    """
    root = source.resolve()
    pictures: list[Found] = []
    tables: list[str] = []

    def cannot_enter(error: OSError) -> None:
        pictures.append(Found(Path(error.filename).relative_to(source).as_posix(), "folder cannot be read"))

    for folder, subfolders, names in os.walk(source, onerror=cannot_enter):
        here = Path(folder)
        within = here.relative_to(source).as_posix()
        for name in list(subfolders):
            path = here / name
            if path.is_symlink():
                problem = "symlink to a folder" if path.resolve().is_relative_to(root) else "symlink leaves the source"
                pictures.append(Found(posixpath.normpath(posixpath.join(within, name)), problem))
            elif leave_out is None or path.resolve() != leave_out.resolve():
                continue
            subfolders.remove(name)
        for name in names:
            path, inside = here / name, posixpath.normpath(posixpath.join(within, name))
            problem = why_not_open(path, root)
            if name in TABLE_NAMES:
                if problem:
                    raise ValueError(f"{path} cannot be read for captions ({problem}): put the file itself there")
                tables.append(inside)
            elif path.suffix.lower() in PICTURE_SUFFIXES or (not problem and starts_like_a_picture(path)):
                pictures.append(Found(inside, problem))
    return sorted(pictures, key=lambda found: found.path), sorted(tables)


def why_not_open(path: Path, root: Path) -> str:
    """Why this file is not to be opened (a link out of the source, a pipe that would block for ever), or ""."""
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            return "symlink leaves the source"
        return "" if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return "broken symlink" if path.is_symlink() else "cannot be read"


def starts_like_a_picture(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:  # not known to be a picture, so not ours to report
        return False
    return start.startswith(PICTURE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def shown(path: str) -> str:
    """A path as text that any file can hold: bytes of a name that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------------------------------
# captions

TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "captions.csv")  # where one folder has several, the first wins
PATH_COLUMNS = ("file_name", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "title", "description")


class CaptionError(ValueError):
    """A caption file is there and cannot be read: guessing another caption would mislabel the picture."""


@dataclass(frozen=True)
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
        return Words(**{name: value or getattr(other, name) for name, value in vars(self).items()})


# Known tags only, so that "2 < 3 and 5 > 4" stays. Tags inside a line leave nothing behind; the others part words.
INLINE_TAG = re.compile(r"</?(?:a|abbr|b|big|cite|code|del|em|font|i|ins|q|s|small|span|strike|strong|sub|sup|tt|u|var)\b[^<>]*>", re.I)
BLOCK_TAG = re.compile(
    r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?(?:blockquote|body|br|center|dd|div|dl|dt|figcaption|figure|h[1-6]|head|hr|"
    r"html|img|li|ol|p|pre|table|tbody|td|th|thead|tr|ul)\b[^<>]*>",
    re.I | re.S,
)


def strip_tags(text: str) -> str:
    return BLOCK_TAG.sub(" ", INLINE_TAG.sub("", text))


def clean_caption(text: str) -> str:
    """One line of plain text: no HTML tags and entities, no control characters or surplus spaces, in Unicode NFC."""
    text = strip_tags(html.unescape(strip_tags(text)))
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair, as JSON can hold it
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text if c not in "\ufeff\u00ad\u200b")
    return " ".join(unicodedata.normalize("NFC", text).split())


def kebab(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def words_from(record: dict[Any, Any]) -> Words:
    """Words from a row of a table or a JSON object, by the names of the columns; other columns are left alone."""
    texts = {str(key).strip().lower(): value for key, value in record.items() if isinstance(value, str)}
    captions = record.get("captions")
    captions = captions if isinstance(captions, dict) else {}
    return Words(
        caption=next((caption for name in CAPTION_COLUMNS if (caption := clean_caption(texts.get(name, "")))), ""),
        captions={kebab(str(key)): clean_caption(text) for key, text in captions.items() if isinstance(text, str)},
        subject=kebab(texts.get("subject", "")),
        license=clean_caption(texts.get("license", "")),
        source_url=texts.get("source_url", "").strip().encode("utf-8", "replace").decode("utf-8"),
    )


def read_table(source: Path, table: str) -> dict[str, Words]:
    """A caption table -> {path of the picture within SOURCE: its words}. Its paths start at the table's folder."""
    rows = {}
    for row in read_rows(source / table):
        names = {str(key).strip().lower(): value for key, value in row.items()}
        name = next((str(names[column]) for column in PATH_COLUMNS if names.get(column)), "")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table), name.replace("\\", "/")))
        if name:
            rows.setdefault(path, words_from(row))
    return rows


def read_rows(path: Path, *, needs: tuple[tuple[str, ...], ...] = (PATH_COLUMNS, CAPTION_COLUMNS)) -> Iterator[dict[str, Any]]:
    """The rows of a .csv (comma, semicolon or tab) or .jsonl file, which has one column of each kind in `needs`.

    Raises ValueError with the way out.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in (".jsonl", ".ndjson"):
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield json_object(line, where=f"line {number}")
                return
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
            columns = {str(name).strip().lower() for name in reader.fieldnames or ()}
            for wanted in needs:
                if not columns.intersection(wanted):
                    raise ValueError(f"its columns are {sorted(columns)}, and none is called {' or '.join(wanted)}")
            yield from reader
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of captions: {error}. Mend it, or rename it to go without") from error


def json_object(text: str, *, where: str) -> dict[Any, Any]:
    """The JSON object in `text`. Raises ValueError saying where and what is wrong."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object")
    return value


def find_words(source: Path, found: Found, row: Words) -> Words:
    """The words of one picture: NAME.txt, then NAME.json, then its `row` of a table, then the file's name.

    Raises CaptionError when a sidecar file is there and cannot be read.
    """
    if not found.beside:
        return row
    sidecar = source / found.path
    words = Words(caption=clean_caption(read_text(sidecar.with_suffix(".txt"), source)))
    text = read_text(sidecar.with_suffix(".json"), source)
    if text:
        try:
            words = words.or_else(words_from(json_object(text, where="caption file")))
        except ValueError as error:
            raise CaptionError(str(error)) from error
    return words.or_else(row).or_else(Words(caption=caption_from_name(found.path)))


def read_text(path: Path, source: Path) -> str:
    """A small text file in UTF-8, UTF-16 with its mark, or the Windows code page; "" where there is no such file."""
    if not os.path.lexists(path):
        return ""
    if problem := why_not_open(path, source.resolve()):
        raise CaptionError(f"caption file: {problem}")
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CaptionError("caption file is too large")
        data = path.read_bytes()
    except OSError as error:
        raise CaptionError("caption file cannot be read") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


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
    tokens = re.split(r"[\s_\-.+]+", clean_caption(stem).strip("_-.+ "))
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


# Words that say nothing of a picture either: of numbering, and of the links to larger versions.
LITTLE_WORDS = frozenset({
    "and", "click", "enlarge", "enlarged", "figs", "for", "here", "high", "larger", "nos", "plates", "res", "resolution", "see",
    "size", "tap", "the", "version", "view",
})  # fmt: skip
ROMAN = re.compile(r"(?=.)M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})")


def says_something(text: str) -> bool:
    """Whether a caption holds a word that can say what a picture shows: "Fig. 12" and "Plates XII and XIV" do not."""
    words = re.findall(r"[^\W\d_]+", text)
    return any(is_telling(word) and word.lower() not in LITTLE_WORDS and not ROMAN.fullmatch(word) for word in words)


# ---------------------------------------------------------------------------------------------------------------------
# the bytes of one picture


def read_picture(base: Path, found: Found) -> bytes:
    """The encoded bytes of one picture that a reader listed. Raises PictureError with the reason."""
    if isinstance(found.where, Span):
        return read_span(base, found.where)
    if isinstance(found.where, Row):
        return read_row(base, found.where)
    return read_bytes(base / found.path)


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PictureError("file too large")
        return path.read_bytes()
    except OSError as error:
        raise PictureError("cannot be read") from error


def read_span(base: Path, span: Span) -> bytes:
    if span.size > MAX_BYTES:
        raise PictureError("file too large")
    try:
        with open(base / span.file, "rb") as file:
            file.seek(span.start)
            return file.read(span.size)
    except OSError as error:
        raise PictureError("cannot be read") from error


# ---------------------------------------------------------------------------------------------------------------------
# folder, and classes


def read_folder(source: Path, options: Options) -> Listing:
    """Pictures in folders, with words in files beside them, in tables, or in their names."""
    found, tables = scan(source, leave_out=options.leave_out)
    rows: dict[str, Words] = {}
    for table in sorted(tables, key=lambda table: TABLE_NAMES.index(posixpath.basename(table))):
        rows = {**read_table(source, table), **rows}
    return Listing(source, found, rows, len(rows.keys() - {one.path for one in found}))


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

    Folders called training or validation say nothing here: the split is drawn anew. Where `options.style` is given the
    other classes are listed but not opened. Second copies of the set come last, so that the first copy is the one kept.
    """
    listing = read_folder(source, options)
    found = []
    for one in listing.found:
        style, below = class_of(one.path)
        problem = one.problem
        if not problem and not style:
            problem = "in no class folder"
        elif not problem and options.style not in ("", style):
            problem = "other style"
        found.append(replace(one, problem=problem, style=style, group=below))
    found.sort(key=lambda one: (any(name in COPIES for name in one.path.split("/")), one.path))
    return replace(listing, found=found)


# ---------------------------------------------------------------------------------------------------------------------
# manifest: a table of paths

LISTED_PATHS = (
    "image_path", "file_name", "filename", "file_path", "filepath", "image_file", "path", "file", "image", "img_path", "img",
)  # fmt: skip
GROUPS = ("group", "book", "gutenberg_id", "object", "object_id", "artist")
MORE = ("title", "author", "artist", "illustrator", "context", "technique", "category", "date")


def column_name(name: Any) -> str:
    return re.sub(r"[\s\-]+", "_", str(name).strip().lower())


def full_words(record: dict[str, Any]) -> Words:
    """Words from a record with names as `column_name` makes them. Several captions: the first is the caption."""
    captions = next((value for name in (*CAPTION_COLUMNS, "captions") if is_texts(value := record.get(name))), [])
    captions = [caption for text in captions if (caption := clean_caption(text))]
    first = {name: value[0] for name, value in record.items() if is_texts(value)}
    words = words_from({**record, **first})
    more = {name: clean_caption(str(record[name])) for name in MORE if isinstance(record.get(name), (str, int)) and record[name]}
    if len(captions) > 1:
        more["captions_all"] = captions
    url = record.get("url")
    return replace(
        words,
        caption=captions[0] if captions else words.caption,
        source_url=words.source_url or (clean_caption(url) if isinstance(url, str) else ""),
        more={name: text for name, text in more.items() if text != words.caption},
    )


def is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)


def own_style(record: dict[str, Any]) -> str:
    return kebab(record["style"]) if isinstance(record.get("style"), str) else ""


def group_of(record: dict[str, Any]) -> str | None:
    """The first column that says what belongs together; None where there is none."""
    return next((f"{name}/{record[name]}" for name in GROUPS if record.get(name) not in (None, "")), None)


def listed(base: Path, name: str) -> Found:
    """A file that a table names, as a path within `base`; with the problem where it may not be opened."""
    name = as_path(name)
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.I):
        return Found(name, "a web address, not a file", beside=False)
    root = base.resolve()
    if posixpath.isabs(name):
        for start in (base.absolute(), root):
            if Path(name).is_relative_to(start):
                name = Path(name).relative_to(start).as_posix()
    name = posixpath.normpath(name)
    path = base / name
    if posixpath.isabs(name) or name.split("/")[0] == "..":
        problem = "path leaves the source"
    elif not os.path.lexists(path):
        problem = "missing file"
    else:
        problem = why_not_open(path, root)
        if not problem and not path.resolve().is_relative_to(root):
            problem = "symlink leaves the source"
    return Found(name, problem, beside=False)


def as_path(text: str) -> str:
    """A path as written in a file -> one that the file system can be asked for."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.strip().replace("\\", "/")


def read_manifest(source: Path, options: Options) -> Listing:
    """A table (.csv, .tsv, .jsonl or .parquet) with a column of paths and columns of words.

    Several rows of one picture: the first row's words, and all captions in `captions_all`. Raises ValueError when no
    column holds paths.
    """
    base = options.root or source.parent
    found: dict[str, Found] = {}
    words: dict[str, Words] = {}
    without = 0
    columns: list[str] = []
    for row in manifest_rows(source):
        record = {column_name(name): value for name, value in row.items()}
        columns = columns or list(record)
        name = next((str(record[column]) for column in LISTED_PATHS if isinstance(record.get(column), str) and record[column].strip()), "")
        if not name:
            without += 1
            continue
        one = replace(listed(base, name), group=group_of(record), style=own_style(record))
        found.setdefault(one.path, one)
        words[one.path] = join_words(words[one.path], full_words(record)) if one.path in words else full_words(record)
    if without and not found:
        raise ValueError(no_path_column(source, columns))
    return Listing(base, sorted(found.values(), key=lambda one: one.path), words, without)


def no_path_column(source: Path, columns: list[str]) -> str:
    return (
        f"{source} names no pictures: its columns are {columns}, and none of {', '.join(LISTED_PATHS)} holds paths. "
        "Rename the column of paths to file_name, or, where pictures lie in the table itself, use --reader huggingface"
    )


def manifest_rows(source: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table; of Parquet without columns of bytes."""
    if source.suffix.lower() != ".parquet":
        yield from read_rows(source, needs=())
        return
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    try:
        file = pq.ParquetFile(source)
        types = {name: file.schema_arrow.field(name).type for name in file.schema_arrow.names}
        names = [name for name, kind in types.items() if not pa.types.is_struct(kind) and not pa.types.is_binary(kind)]
        if not {column_name(name) for name in names}.intersection(LISTED_PATHS):
            raise ValueError(no_path_column(source, list(types)))
        for batch in file.iter_batches(batch_size=4096, columns=names):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, ValueError) and "names no pictures" in str(error):
            raise
        raise ValueError(f"{source} is no Parquet file that can be read: {error}") from error


def join_words(words: Words, other: Words) -> Words:
    """The words of two rows of one picture, each caption once."""
    captions: dict[str, None] = {}
    for one in (words, other):
        captions.update(dict.fromkeys(one.more.get("captions_all") or ([one.caption] if one.caption else [])))
    joined = words.or_else(other)
    more = {**other.more, **words.more}
    return replace(joined, more={**more, "captions_all": list(captions)} if len(captions) > 1 else more)


# ---------------------------------------------------------------------------------------------------------------------
# coco


def read_coco(source: Path, options: Options) -> Listing:
    """A COCO captions file. An image's first caption is its caption; where it has several, all are in `captions_all`."""
    data = coco_object(source)
    captions: dict[Any, list[str]] = {}
    for one in data["annotations"]:
        if isinstance(one, dict) and isinstance(one.get("caption"), str):
            captions.setdefault(str(one.get("image_id")), []).append(one["caption"])
    licenses = {one.get("id"): str(one.get("name", "")) for one in data.get("licenses") or () if isinstance(one, dict)}
    images = [one for one in data["images"] if isinstance(one, dict) and isinstance(one.get("file_name"), str)]
    base = options.root or coco_folder(source, [image["file_name"] for image in images[:100]])
    found: dict[str, Found] = {}
    words: dict[str, Words] = {}
    for image in images:
        one = replace(listed(base, image["file_name"]), group="")
        said = captions.pop(str(image.get("id")), [])
        url = next((image[name] for name in ("flickr_url", "coco_url") if isinstance(image.get(name), str)), "")
        here = full_words({"caption": said or "", "source_url": url, "license": licenses.get(image.get("license"), "")})
        words[one.path] = join_words(words[one.path], here) if one.path in words else here
        found.setdefault(one.path, one)
    return Listing(base, sorted(found.values(), key=lambda one: one.path), words, sum(map(len, captions.values())))


def coco_object(source: Path) -> dict[str, Any]:
    """The JSON of a COCO captions file. Raises ValueError saying what it is instead."""
    way_out = "Give a captions_*.json with images (id, file_name) and annotations (image_id, caption)"
    try:
        data = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no COCO file: it is not valid JSON. {way_out}") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in ("images", "annotations")):
        there = f"the keys {sorted(map(str, data))[:12]}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ValueError(f"{source} is no COCO file: it holds {there}, and not lists called images and annotations. {way_out}")
    if data["annotations"] and not any(isinstance(one, dict) and "caption" in one for one in data["annotations"]):
        raise ValueError(f"{source} is a COCO file without captions: none of its annotations has one. {way_out}")
    return data


def coco_folder(source: Path, names: list[str]) -> Path:
    """Where the pictures of a COCO file are: beside it, or in the folders of the usual layout, where most are found."""
    split = source.stem.split("_")[-1]  # captions_val2017.json -> val2017
    here = source.parent
    folders = [
        here,
        here / "images",
        here / split,
        here.parent,
        here.parent / split,
        here.parent / "images",
        here.parent / "images" / split,
    ]
    return max(folders, key=lambda folder: sum(os.path.lexists(folder / as_path(name)) for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# webdataset

TAR_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def read_webdataset(source: Path, options: Options) -> Listing:
    """Tar files of KEY.jpg with KEY.txt or KEY.json beside it: one file, or all in a folder. They are read in place."""
    base = source if source.is_dir() else source.parent
    found: list[Found] = []
    words: dict[str, Words] = {}
    for path in find_files(base, options.leave_out, (".tar", *TAR_PACKED)) if source.is_dir() else [source.name]:
        if problem := why_not_open(base / path, base.resolve()):
            found.append(Found(path, problem))
        elif path.lower().endswith(TAR_PACKED):
            found.append(Found(path, "compressed tar: unpack it to .tar first"))
        else:
            read_tar(base, path, found, words)
    return Listing(base, found, words)


def find_files(base: Path, leave_out: Path | None, endings: tuple[str, ...]) -> list[str]:
    """The files under `base` with one of these endings, sorted; no link to a folder is followed."""
    paths = []
    for folder, subfolders, names in os.walk(base):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if leave_out is None or (here / name).resolve() != leave_out.resolve()]
        paths += [(here / name).relative_to(base).as_posix() for name in names if name.lower().endswith(endings)]
    return sorted(paths)


def read_tar(base: Path, tar_path: str, found: list[Found], words: dict[str, Words]) -> None:
    """Add the pictures of one tar file, in its order, and their words."""
    said: dict[str, Words] = {}
    records: dict[str, dict[str, Any]] = {}
    pictures: dict[str, tuple[str, Found]] = {}
    damage = ""
    try:
        with tarfile.open(base / tar_path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it remembers every one
                read_member(tar, member, tar_path, pictures, said, records)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        damage = "damaged tar file" if not isinstance(error, PermissionError) else "cannot be read"
    for path, (key, one) in pictures.items():
        record = records.get(key, {})
        words[path] = said.get(key, Words()).or_else(full_words(record))
        found.append(replace(one, group=group_of(record) or "", style=own_style(record)))
    if damage:
        found.append(Found(tar_path, damage))


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, tar_path: str, pictures: dict, said: dict, records: dict) -> None:
    """Note one member of a tar: a picture's place, or words. KEY is all up to the first dot after the last slash."""
    folder, name = posixpath.split(member.name)
    stem, _, extension = name.partition(".")
    key, suffix = posixpath.join(folder, stem), posixpath.splitext(name)[1].lower()
    if suffix in PICTURE_SUFFIXES:
        path = f"{tar_path}/{as_path(member.name)}"
        while path in pictures:
            path += "+"  # the same name twice in one tar
        plain = member.isreg() and not member.issparse()
        pictures[path] = (
            key,
            Found(path, "" if plain else "not a regular file", where=Span(tar_path, member.offset_data, member.size), beside=False),
        )
    elif member.isreg() and member.size <= MAX_TEXT_BYTES and extension.lower() in ("json", "txt", "caption", "text"):
        file = tar.extractfile(member)
        text = file.read().decode("utf-8-sig", "replace") if file else ""
        if extension.lower() == "json":
            try:
                records[key] = {column_name(name): value for name, value in json_object(text, where=member.name).items()}
            except ValueError:  # a pair's broken JSON: its picture is then one without a caption
                return
        else:
            said.setdefault(key, Words(caption=clean_caption(text)))


# ---------------------------------------------------------------------------------------------------------------------
# huggingface


@lru_cache(maxsize=1)
def open_splits(source: str) -> dict[str, Any]:
    """{split: data set} of a folder written by save_to_disk, a folder of Parquet files, or an id; pictures undecoded."""
    datasets = need("datasets", extra="data")
    folder = Path(source)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        splits = datasets.load_from_disk(source)
    elif folder.is_file():
        splits = datasets.load_dataset("parquet", data_files={"train": source})
    else:
        splits = datasets.load_dataset(source)
    splits = dict(splits) if isinstance(splits, dict) else {"all": splits}
    undecoded = {}
    for name, data in splits.items():
        column = picture_column(datasets, data, source)
        undecoded[name] = data.cast_column(column, datasets.Image(decode=False)).rename_column(column, PICTURES)
    return undecoded


PICTURES = "__picture__"  # the column of pictures, whatever it was called


def picture_column(datasets: Any, data: Any, source: str) -> str:
    """The name of the column that holds pictures. Raises ValueError naming the columns there are."""
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            return name
    for name in ("image", "img", "picture", "jpg", "png", "webp"):
        if name in data.features and getattr(data.features[name], "dtype", "") in ("binary", "large_binary"):
            return name
    raise ValueError(f"{source} has no column of pictures: its columns are {sorted(data.features)}")


def read_huggingface(source: Path, options: Options) -> Listing:
    """A data set by its id (owner/name) or in a local folder, through `datasets`. Its splits are not taken over."""
    try:
        splits = open_splits(source.as_posix())
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"SOURCE {source} is no data set that `datasets` can open: {error}") from error
    found: list[Found] = []
    words: dict[str, Words] = {}
    for split, data in sorted(splits.items()):
        texts = data.remove_columns([PICTURES])
        for index in range(len(data)):
            record = {column_name(name): value for name, value in texts[index].items()} if texts.column_names else {}
            path = f"{split}/{index:08d}"
            one = Found(path, where=Row(split, index), group=group_of(record) or "", style=own_style(record), beside=False)
            found.append(one)
            words[path] = full_words(record)
    return Listing(source, found, words)


def read_row(base: Path, row: Row) -> bytes:
    value = open_splits(base.as_posix())[row.split][row.index][PICTURES]
    value = {"bytes": value} if isinstance(value, bytes) else value or {}
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise PictureError("missing file")
    return read_bytes(Path(value["path"]))


# ---------------------------------------------------------------------------------------------------------------------
# gutenberg: the page of a book, read once from top to bottom

VOID_TAGS = frozenset({
    "area", "base", "basefont", "col", "embed", "frame", "input", "isindex", "link", "param", "source", "track", "wbr",
})  # fmt: skip
BLOCK_TAGS = frozenset({
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "li", "main", "nav", "ol",
    "p", "pre", "section", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
})  # fmt: skip
ENDS_BY_ITSELF = frozenset({"p", "li", "dt", "dd", "td", "th", "tr"})  # where the next one begins
HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
CAPTION_WORDS = frozenset({"cap", "capt", "capcenter", "figcap", "illcap", "imgcap", "legend"})
PAGE_NUMBER = re.compile(r"page-?n|pagenum|pgnum|pageno|folio|pagebreak", re.I)
FIGURE = re.compile(r"fig|illus|image|img|pict|plate|photo", re.I)
PLATES_HEADING = re.compile(r"illustrations|plates|engravings|pictures|woodcuts", re.I)
FRONT_MATTER = re.compile(
    r"(the )?(end|contents|table of contents|list of .*|introduction|introductory.*|preface|foreword|index|notes?|footnotes|appendix.*|"
    r"advertisements?|dedication|illustrations|(chapter|part|book|volume|vol\.?|section|canto) [\divxlc]+|by .*|"
    r".*(rights reserved|copyright|publish|& co\b|& company|limited|\bltd).*)[.:\])]*",
    re.I,
)
LARGER_LINK = re.compile(r"[(\[][^\[\]()]*\b(click|larger|enlarge|resolution|full[ -]size)\b[^\[\]()]*[)\]]", re.I)
MAX_DEPTH = 400  # of open elements: a page beyond it is broken, and its inner tags are passed over
LONGEST_CAPTION = 300  # characters of unmarked text in a figure that still pass for its caption
LONGEST_CONTEXT = 300


class Box:
    """An element that parts its text from what stands before and after. `up` is the one around it."""

    __slots__ = ("caption", "classes", "tag", "up")

    def __init__(self, tag: str, classes: str, up: Box | None) -> None:
        self.tag, self.classes, self.up = tag, classes, up
        self.caption = is_caption_class(classes)

    def chain(self) -> Iterator[Box]:
        """This box, the one around it, and so on."""
        box: Box | None = self
        while box is not None:
            yield box
            box = box.up


def is_caption_class(classes: str) -> bool:
    names = classes.lower().split()
    return any("caption" in name or name in CAPTION_WORDS for name in names)


@dataclass(frozen=True, eq=False)
class Run:
    """Text of one block, in one line."""

    text: str
    box: Box


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture on the page, as its tag and the tags around it have it."""

    src: str
    link: str
    alt: str
    title: str
    anchors: tuple[str, ...]
    box: Box


class Page(HTMLParser):
    """The page of a book as a line of runs, pictures and rules (None), in reading order. Bears any broken HTML."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.line: list[Run | Shown | None] = []
        self.links: dict[str, str] = {}  # files that the page links to -> the text of the link
        self.plates: dict[str, str] = {}  # anchor -> caption, from a list of illustrations
        self.meta: dict[str, str] = {}
        self.title = ""
        self.head: list[str] = []  # text up to the mark where the book begins
        self.styles: list[str] = []  # style sheets in the page
        self._stack: list[tuple[str, Box | None, bool, str]] = []  # tag, its box, hidden, href
        self._open: Counter[str] = Counter()
        self._box = Box("body", "", None)
        self._text: list[str] = []
        self._anchors: list[str] = []
        self._hidden = 0
        self._link_text: list[str] = []
        self._plate_links: list[tuple[str, str, int]] = []
        self._in_plates = False
        self._started = self._ended = False
        self.feed(re.sub(r"<!\[", "<! [", text))  # the parser raises AssertionError on marked sections it does not know
        self.close()
        self._flush()
        self._settle_plates()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in reversed(attrs)}
        self._anchors += [values[name] for name in ("id", "name") if values.get(name) and tag != "meta"]
        if tag == "img":
            self._picture(values)
        elif tag == "hr":
            self._flush()
            self.line.append(None)
        elif tag == "br":
            self._add("\n")
        elif tag == "meta":
            self.meta.setdefault((values.get("name") or values.get("property") or "").lower(), values.get("content", ""))
        elif tag not in VOID_TAGS and len(self._stack) < MAX_DEPTH:
            self._push(tag, values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        depth = len(self._stack)
        self.handle_starttag(tag, attrs)
        if len(self._stack) > depth:
            self._pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open[tag]:
            return
        inline = tag not in BLOCK_TAGS
        for depth in range(len(self._stack) - 1, -1, -1):
            if self._stack[depth][0] == tag:
                while len(self._stack) > depth:
                    self._pop()
                return
            if inline and self._stack[depth][0] in BLOCK_TAGS:
                return  # an inline tag does not close the block it stands in

    def handle_data(self, data: str) -> None:
        if self._open["script"] or self._open["style"]:
            self.styles += [data] if self._open["style"] else []
            return
        if self._open["title"]:
            self.title += data
        else:
            self._add(data)

    def _add(self, data: str) -> None:
        if not self._started and len(self.head) < 20_000:
            self.head.append(data)
        if self._hidden:
            return
        self._text.append(data)
        self._link_text.append(data)
        if data.strip():
            self._anchors.clear()

    def _push(self, tag: str, values: dict[str, str]) -> None:
        classes = values.get("class", "")
        box = None
        if tag in BLOCK_TAGS or is_caption_class(classes):
            self._flush()
            if (tag in ENDS_BY_ITSELF and self._box.tag == tag) or (tag in BLOCK_TAGS and self._box.tag == "p"):
                self.handle_endtag(self._box.tag)
            box = self._box = Box(tag, classes, self._box)
            if not self._started:
                self.head.append("\n")
        hidden = bool(PAGE_NUMBER.search(classes)) or "display:none" in values.get("style", "").replace(" ", "")
        self._hidden += hidden
        href = values.get("href", "") if tag == "a" else ""
        if href:
            self._link_text = []
        self._stack.append((tag, box, hidden, href))
        self._open[tag] += 1

    def _pop(self) -> None:
        tag, box, hidden, href = self._stack[-1]
        if box is not None:
            self._flush()
            assert box.up is not None
            self._box = box.up
        self._stack.pop()
        self._open[tag] -= 1
        self._hidden -= hidden
        if href:
            text = squeeze("".join(self._link_text))
            self.links.setdefault(href, text)
            if text and not says_something(text):
                self._link_to_larger(href)
            if self._in_plates and href.startswith("#"):
                self._plate_links.append((href[1:], text, len(self.line)))

    def _flush(self) -> None:
        text = squeeze("".join(self._text))
        self._text.clear()
        if not text:
            return
        if "*** START OF" in text and not self._started:
            self._started = True
            self.line = [one for one in self.line if isinstance(one, Shown)]
            return
        self._ended = self._ended or "*** END OF" in text or text.startswith("End of the Project Gutenberg")
        if self._ended:
            return
        run = Run(text, self._box)
        if is_heading(run):
            self._in_plates = bool(PLATES_HEADING.search(text))
        self.line.append(run)

    def _picture(self, values: dict[str, str]) -> None:
        anchors = tuple(self._anchors)
        self._flush()
        self._anchors.clear()
        link = next((href for tag, _, _, href in reversed(self._stack) if tag == "a" and href), "")
        self.line.append(
            Shown(values.get("src", ""), link, squeeze(values.get("alt", "")), squeeze(values.get("title", "")), anchors, self._box)
        )

    def _link_to_larger(self, href: str) -> None:
        """A link like "[Larger]" in a picture's figure is as good as a link around the picture."""
        for place in range(len(self.line) - 1, max(-1, len(self.line) - 4), -1):
            picture = self.line[place]
            if isinstance(picture, Shown):
                if not picture.link and figure_of(picture) in self._box.chain():
                    self.line[place] = replace(picture, link=href)
                return

    def _settle_plates(self) -> None:
        alone = Counter(index for _, _, index in self._plate_links)
        for anchor, text, index in self._plate_links:
            if alone[index] == 1 and index < len(self.line) and isinstance(run := self.line[index], Run):
                text = run.text
            text = re.sub(r"^\d+\W+", "", re.split(r"(?:\s*\.){3,}", text)[0])
            if says_something(text):
                self.plates.setdefault(anchor, text)


def squeeze(text: str) -> str:
    return " ".join(text.split())


def is_heading(run: Run) -> bool:
    return any(box.tag in HEADINGS for box in run.box.chain())


def is_caption(run: Run) -> bool:
    return any(box.caption or box.tag == "figcaption" for box in run.box.chain())


def figure_of(picture: Shown) -> Box | None:
    """The element that holds a picture and the text that goes with it: the outermost that is called a figure."""
    chain = [box for box, _ in zip(picture.box.chain(), range(5)) if box.tag != "body"]
    figures = [box for box in chain if box.tag in ("figure", "center") or FIGURE.search(box.classes)]
    return figures[-1] if figures else next(iter(chain), None)


def figure_runs(page: Page, at: int) -> tuple[list[Run], list[Run], int]:
    """(text below, text above, where the line goes on after) of the picture at place `at`, within its figure.

    Text above counts only where no other picture of the figure stands before.
    """
    picture = page.line[at]
    assert isinstance(picture, Shown)
    figure = figure_of(picture)
    sides: list[list[Run]] = []
    ends: list[int] = []
    for step in (1, -1):
        runs, place = [], at + step
        while 0 <= place < len(page.line) and isinstance(run := page.line[place], Run) and figure in run.box.chain():
            runs.append(run)
            place += step
        sides.append(runs[::step])
        ends.append(place)
    before = page.line[ends[1]] if ends[1] >= 0 else None
    shared = isinstance(before, Shown) and figure is not None and figure in before.box.chain()
    return sides[0], [] if shared else sides[1], ends[0]


def caption_of(page: Page, at: int) -> tuple[str, str]:
    """(caption, where it was found) of the picture at place `at` of the line; ("", "") where nothing says what it shows.

    In this order: figcaption, an element of a caption class, alt (as printed in the figure, where it is), title, the list
    of illustrations, text in the figure, a heading right beside. What only numbers or names a part of a book ("Fig. 12", "Frontispiece") is passed over. The
    picture of a single letter is an initial, and the text beside it is the story.
    """
    picture = page.line[at]
    assert isinstance(picture, Shown)
    below, above, after = figure_runs(page, at)
    beside = [page.line[after]] if after < len(page.line) else []
    marked = [run for run in (*below, *beside) if isinstance(run, Run) and is_caption(run)] or list(filter(is_caption, above))
    in_figcaption = [run for run in marked if any(box.tag == "figcaption" for box in run.box.chain())]
    initial = sum(c.isalnum() for c in picture.alt) == 1
    text = joined(below) or joined(above)
    text = text if len(text) <= LONGEST_CAPTION else ""
    candidates = [("figcaption", joined(in_figcaption)), ("caption class", joined(marked))]
    if not initial:
        candidates += [
            ("alt", as_printed(picture.alt, text)),
            ("title", picture.title),
            *(("list of illustrations", page.plates.get(anchor, "")) for anchor in picture.anchors),
            ("figure text", text),
            ("neighbouring text", heading_beside(page, at, after)),
        ]
    return next(((text, name) for name, text in candidates if says_something(text)), ("", ""))


def joined(runs: Iterable[Run]) -> str:
    return squeeze(LARGER_LINK.sub(" ", clean_caption(" ".join(run.text for run in runs))))


def as_printed(alt: str, text: str) -> str:
    """The text in the figure where it is the alt text, or goes on from it; small capitals lose their case there."""
    return text if letters(alt) and letters(text).startswith(letters(alt)) and text != text.lower() else alt


def letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def heading_beside(page: Page, at: int, after: int) -> str:
    """A heading right below the picture, else right above it, that may name it: no chapter's number, no front matter."""
    below = page.line[after] if after < len(page.line) else None
    above = page.line[at - 1] if at else None
    for run in (below, above):
        if isinstance(run, Run) and is_heading(run) and len(run.text) <= 120 and not FRONT_MATTER.fullmatch(run.text):
            return run.text
    return ""


def context_of(page: Page, at: int) -> str:
    """Up to LONGEST_CONTEXT characters of the story around a picture: the end of what stands before, the start of what follows."""
    _, above, after = figure_runs(page, at)
    follows = prose(page.line[after : after + 40], LONGEST_CONTEXT)
    first = at - len(above)
    precedes = prose(page.line[max(0, first - 40) : first][::-1], LONGEST_CONTEXT, backwards=True)
    half = LONGEST_CONTEXT // 2
    room = max(half, LONGEST_CONTEXT - len(precedes) - 1)
    follows = follows if len(follows) <= room else follows[: room + 1].rpartition(" ")[0]
    room = LONGEST_CONTEXT - len(follows) - 1
    precedes = precedes if len(precedes) <= room else precedes[-room - 1 :].partition(" ")[2]
    return f"{precedes} {follows}".strip()


def prose(line: Iterable[Run | Shown | None], length: int, *, backwards: bool = False) -> str:
    """The text of the runs that are no headings and no captions, until there is enough."""
    texts: list[str] = []
    for run in line:
        if isinstance(run, Run) and not is_heading(run) and not is_caption(run):
            texts.append(run.text)
        if sum(map(len, texts)) >= length:
            break
    return clean_caption(" ".join(texts[::-1] if backwards else texts))


# ---- the book ----


BOOK_PAGE = re.compile(r"-h\.html?$|^pg\d+-images\.html?(\.utf8)?$", re.I)
META_NAMES = {
    "title": ("dc.title", "dcterms.title", "og:title", "title"),
    "author": ("dc.creator", "dcterms.creator", "author", "marcrel.aut"),
    "illustrator": ("marcrel.ill", "dc.contributor.illustrator", "illustrator"),
}
TITLE_TAG = re.compile(
    r"(?:the )?project gutenberg(?:'s|’s)? e-?(?:book|text)(?: of)?,? (?P<title>.+?)(?:,? by (?P<author>.+?))?\.?", re.I | re.S
)


def book_facts(page: Page, name: str) -> dict[str, str]:
    """Title, author, illustrator and number of a book: from the page's meta elements, its opening block, its title."""
    head = "".join(page.head).split("*** START OF")[0].replace("\r", "")[:20_000]
    tag = TITLE_TAG.fullmatch(squeeze(page.title).removesuffix("| Project Gutenberg").strip())
    facts = {}
    for fact, names in META_NAMES.items():
        line = re.search(rf"^[ \t]*{fact}s?[ \t]*:[ \t]*(.+(?:\n[ \t]+\S.*)*)", head, re.I | re.M)
        texts = [page.meta.get(meta, "") for meta in names]
        texts += [line[1] if line else "", (tag.groupdict().get(fact) or "") if tag else ""]
        facts[fact] = next((clean for text in texts if (clean := clean_caption(text))), "")
    facts["title"] = facts["title"] or clean_caption(page.title)
    facts["illustrator"] = facts["illustrator"] or illustrator_on_title_page(page)
    number = re.search(r"(?:pg)?(\d{2,})-(?:h|images)\.", posixpath.basename(name)) or re.search(r"(?:eBook|Etext) #(\d+)", head, re.I)
    facts["gutenberg_id"] = number[1] if number else ""
    return facts


def illustrator_on_title_page(page: Page) -> str:
    for run in [one for one in page.line if isinstance(one, Run)][:60]:
        if named := re.search(
            r"(?:^|\W)(?:illustrated|illustrations|engravings|pictures) by ((?:[^\W\d_][\w.'’-]* ?){2,4})$", run.text, re.I
        ):
            return named[1].title() if named[1].isupper() else named[1]
    return ""


def read_page(path: Path, root: Path) -> Page:
    """A book's page in UTF-8, UTF-16 with its mark, or what it declares. Raises CaptionError when it cannot be read."""
    if problem := why_not_open(path, root):
        raise CaptionError(problem)
    try:
        if path.stat().st_size > MAX_PAGE_BYTES:
            raise CaptionError("too large")
        return Page(decode_page(path.read_bytes()))
    except OSError as error:
        raise CaptionError("cannot be read") from error


def decode_page(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        declared = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", data[:4096], re.I)
        name = declared[1].decode("ascii", "replace").lower() if declared else ""
    if name in ("", "us-ascii", "ascii", "iso-8859-1", "latin1", "latin-1"):
        name = "cp1252"  # what browsers take these for
    try:
        return data.decode(name, "replace")
    except LookupError:
        return data.decode("cp1252", "replace")


def read_gutenberg(source: Path, options: Options) -> Listing:
    """Illustrated books as Project Gutenberg publishes them: a page *-h.htm and its images folder, one book or many.

    Where a picture on the page links to a larger version of itself, that one is listed with its words, and the picture
    on the page as a thumbnail. Pictures outside any book are read as in a plain folder.
    """
    base = source if source.is_dir() else source.parent
    listing = read_folder(base, options)
    pages = book_pages(base, options.leave_out) if source.is_dir() else [source.name]
    if not pages:
        raise FileNotFoundError(f"no books in {source}: their pages are called NUMBER-h.htm or NUMBER-h.html")
    books: dict[str, list[str]] = {}
    for page in pages:
        books.setdefault(posixpath.dirname(page), []).append(page)
    inside: dict[str, list[Found]] = {}
    found = {one.path: one for one in listing.found}
    for one in listing.found:
        book = book_around(one.path, books)
        if book is not None:
            inside.setdefault(book, []).append(one)
    words = dict(listing.words)
    for book, names in sorted(books.items()):
        entries = read_book(base, names, {one.path: one for one in inside.get(book, [])}, taken=found)
        for one, said in entries:
            found[one.path] = one
            words[one.path] = said
    return Listing(base, sorted(found.values(), key=lambda one: one.path), words, listing.unmatched)


def book_pages(base: Path, leave_out: Path | None) -> list[str]:
    """The pages of books under `base`; where none is named like one, all pages that stand beside an images folder."""
    pages = find_files(base, leave_out, (".htm", ".html", ".html.utf8"))
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


def read_book(base: Path, names: list[str], inside: dict[str, Found], *, taken: dict[str, Found]) -> list[tuple[Found, Words]]:
    """The pictures of one book, shown or not, and the words of each."""
    shown_here: dict[str, Words] = {}
    thumbnails: dict[str, str] = {}
    ornaments: set[str] = set()
    group, unread = f"book/{posixpath.dirname(names[0])}", ""
    for name in names:
        try:
            page = read_page(base / name, base.resolve())
        except CaptionError as error:
            unread = f"book page: {error}"
            continue
        facts = book_facts(page, name)
        if facts["gutenberg_id"]:
            group = f"book/{facts['gutenberg_id']}"
        lower = {path.lower(): path for path in inside}
        ornaments.update(picture_path(name, url, inside, lower) for url in re.findall(r"url\(\s*[\"']?([^\"')]+)", "".join(page.styles)))
        for path, large, words in pictures_on(page, name, inside, facts):
            if large:
                thumbnails.setdefault(path, large)
            shown_here[large or path] = shown_here[large or path].or_else(words) if (large or path) in shown_here else words
    entries = []
    for path in sorted(inside.keys() | (shown_here.keys() - taken.keys())):
        one = inside.get(path, Found(path, "missing file"))
        problem = one.problem
        if not problem and path in thumbnails and path not in shown_here:
            problem = f"thumbnail of {thumbnails[path]}"
        elif not problem and path not in shown_here:
            problem = unread or ("ornament of the style sheet" if path in ornaments else "not shown in the book")
        entries.append((replace(one, problem=problem, group=group, beside=False), shown_here.get(path, Words())))
    return entries


def pictures_on(page: Page, name: str, inside: dict[str, Found], facts: dict[str, str]) -> Iterator[tuple[str, str, Words]]:
    """(path, path of its larger version or "", words) of each picture on a page; then of pictures that it only links to."""
    number = facts["gutenberg_id"]
    book = Words(source_url=f"https://www.gutenberg.org/ebooks/{number}" if number else "", license=page.meta.get("dcterms.rights", ""))
    fixed = {fact: text for fact, text in facts.items() if text}
    lower = {path.lower(): path for path in inside}
    linked = set()
    for at, picture in enumerate(page.line):
        if not isinstance(picture, Shown) or not (path := picture_path(name, picture.src, inside, lower)):
            continue
        large = picture_path(name, picture.link, inside, lower)
        large = large if large != path and large in inside and not inside[large].problem else ""
        linked.update((path, large))
        caption, origin = caption_of(page, at)
        if origin == "neighbouring text" and letters(caption) in letters(facts["title"]):  # a title page
            caption, origin = "", ""
        more = {**fixed, "context": context_of(page, at), "caption_source": origin}
        yield path, large, replace(book, caption=clean_caption(caption), more=more)
    for href, text in page.links.items():
        path = picture_path(name, href, inside, lower)
        if path in inside and path not in linked:
            caption = clean_caption(text) if says_something(text) else ""
            yield path, "", replace(book, caption=caption, more={**fixed, "context": "", "caption_source": "link" if caption else ""})


def picture_path(page: str, address: str, inside: dict[str, Found], lower: dict[str, str]) -> str:
    """An address on a page -> the path of the picture; "" for other things and other places."""
    address = as_path(unquote(address.split("#")[0].split("?")[0]))
    if not address or posixpath.splitext(address)[1].lower() not in PICTURE_SUFFIXES or re.match(r"[a-z][a-z0-9+.-]*:|/", address, re.I):
        return ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), address))
    if path in inside or path.startswith("../"):
        return path if path in inside else ""
    return lower.get(path.lower(), path)  # books made where upper and lower case are one


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
}
FILE_READERS = {
    ".csv": "manifest", ".tsv": "manifest", ".jsonl": "manifest", ".ndjson": "manifest", ".parquet": "manifest",
    ".json": "coco", ".tar": "webdataset", ".htm": "gutenberg", ".html": "gutenberg",
}  # fmt: skip
IN_FOLDERS = ("folder", "classes")


def choose_reader(source: Path, name: str = "auto", *, leave_out: Path | None = None) -> str:
    """The name of the reader for `source`: the one asked for, or the one recognised.

    Raises ValueError for a name that no reader has, FileNotFoundError for a source that is not there.
    """
    if name != "auto" and name not in READERS:
        near = difflib.get_close_matches(name, ["auto", *READERS], n=1, cutoff=0.4)
        raise ValueError(
            f"--reader {name!r} is unknown{f': did you mean {near[0]}?' if near else ''}. Readers are auto, {', '.join(READERS)}"
        )
    if name == "huggingface":
        return name
    if not source.exists():
        hint = (
            f". For the data set {source} of Hugging Face add --reader huggingface"
            if len(source.parts) == 2 and not source.is_absolute()
            else ""
        )
        raise FileNotFoundError(f"SOURCE {source} does not exist: give a folder of pictures{hint}")
    if name in IN_FOLDERS and not source.is_dir():
        raise FileNotFoundError(f"SOURCE {source} is a file: give a folder of pictures")
    if name in ("manifest", "coco") and not source.is_file():
        raise FileNotFoundError(f"SOURCE {source} is a folder: --reader {name} takes a file")
    if name != "auto":
        return name
    if source.is_file():
        return recognise_file(source)
    return recognise_folder(source, leave_out)


def recognise_file(source: Path) -> str:
    suffix = source.suffix.lower()
    if suffix not in FILE_READERS:
        raise FileNotFoundError(
            f"SOURCE {source} is a file: give a folder of pictures, or a file of pictures' names ({' '.join(sorted(FILE_READERS))})"
        )
    return FILE_READERS[suffix]


def recognise_folder(source: Path, leave_out: Path | None) -> str:
    """What a folder is, by the names in it."""
    if any((source / name).is_file() for name in ("dataset_dict.json", "state.json")) and not any(source.glob("*.jpg")):
        return "huggingface"
    if any(BOOK_PAGE.search(posixpath.basename(path)) for path in find_files(source, leave_out, (".htm", ".html", ".html.utf8"))):
        return "gutenberg"
    pictures = find_files(source, leave_out, tuple(PICTURE_SUFFIXES))
    if pictures:
        folders = {posixpath.dirname(path) + "/" for path in pictures}
        classes = {class_of(folder)[0] for folder in folders}
        return "classes" if len(classes) > 1 and classes <= set(CLASS_STYLES.values()) else "folder"
    if find_files(source, leave_out, (".tar", *TAR_PACKED)):
        return "webdataset"
    return "huggingface" if find_files(source, leave_out, (".parquet",)) else "folder"

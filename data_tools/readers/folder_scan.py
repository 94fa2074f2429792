"""Folder scan: every file below a folder, by kind: pictures, sidecar files, tables, tars, book pages, data sets, and the rest.

Nothing is skipped silently: a file that no reader takes is listed with the reason, "not read: …".
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_tools.pipeline.disk import DiskDict
from data_tools.readers.files import PICTURE_SUFFIXES, starts_like_a_picture, why_not_open
from data_tools.readers.listing import Found
from data_tools.readers.table_files import TABLE_SUFFIXES, TableError

TEXTS = (".txt", ".caption", ".text")  # suffixes of files with the caption of one picture; the first one present is read
SIDECARS = (*TEXTS, ".json")
TABLE_STEMS = ("metadata", "captions")  # names of caption tables beside pictures, in reading order
TABLE_KINDS = (".csv", ".jsonl", ".tsv", ".tab", ".ndjson", ".parquet", ".json")
COCO_NAME = re.compile(r"captions|annotations|coco|instances", re.I)
TAR_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TARS = (".tar", *TAR_PACKED)
PAGES = (".htm", ".html", ".html.utf8")
RECOGNISED = (
    "Captions are found in NAME.txt, NAME.caption, NAME.text or NAME.json beside NAME.jpg (NAME.jpg.txt and so on too, in upper or "
    "lower case), and in tables named metadata or captions (.csv, .tsv, .jsonl, .parquet, .json) with a column file_name and a caption "
    "column; if there is none of these, another table is read if it is the only one. "
    "Columns called era, poetic, social and alt are captions of these "
    "registers. NAME.jpg and NAME.png cannot share a NAME.txt: name it NAME.jpg.txt"
)
"""The text of --help on caption files."""

OTHER_PICTURES = (
    ".ai", ".arw", ".cr2", ".cr3", ".dcm", ".dds", ".djvu", ".dng", ".eps", ".exr", ".hdr", ".ico", ".jxl", ".nef", ".orf", ".pcx",
    ".psb", ".psd", ".raf", ".rw2", ".svg", ".svgz", ".tga", ".xcf",
)  # fmt: skip
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".xz", ".zip", ".zst")
LISTS = (".ods", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml")  # in which captions may be listed, but are not read

OTHER_WORDS = (
    ".ann", ".cap", ".doc", ".docx", ".lab", ".md", ".odt", ".rtf", ".tag", ".tags", ".xml", ".xmp", ".yaml", ".yml",
)  # fmt: skip
"""Suffixes of words that other tools write."""
SAVED = "not read: a part of a saved data set; give its folder as SOURCE"
OTHER_SUFFIX = "not read: has a picture's name, but no suffix of words that are read; write its words into NAME.txt"
ELSEWHERE = "not read: a text with the name of a picture in another folder; put it beside the picture"
NOTHING_KNOWN = "not read: neither a picture nor words for one"
OTHER_FORMAT = "not read: a picture in a format that is not read; save it as PNG or JPEG"
PACKED = "not read: compressed; unpack it"
OTHER_LIST = "not read: captions in another form; see --help for the tables that are read"
COCO_FILE = "not read: a COCO file; give it as SOURCE, or name it captions.json"
LONE_TEXT = "not read: a text without a picture of its name"
LONE_JSON = "not read: JSON without a picture of its name"
LONGER_NAME = "not read: its name is longer than its picture's; name it NAME.txt"
SECOND_WORDS = "not read: its picture has another file of words, which is read"
SHARED_WORDS = "not read: ambiguous: several pictures have its name"
OTHER_TABLE = "not read: a table without captions that are known as such, or one of several"
NO_PICTURES_IN_TABLE = "not read: a Parquet file without pictures and without a column of paths"
BROKEN_PARQUET = "not read: no Parquet file that can be opened"
LONE_PAGE = "not read: a page of no book"
NO_PAGE = "not read: a page of a book is read with --reader gutenberg"


@dataclass
class Survey:
    """The files below a folder, as relative paths. Pictures and unread files are kept on disk, as there may be many."""

    pictures: DiskDict = field(default_factory=DiskDict)
    """path -> Found, with the names of its sidecar files."""
    unread: DiskDict = field(default_factory=DiskDict)
    """path -> reason."""
    tables: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)


def survey(source: Path, *, leave_out: Path | None = None) -> Survey:
    """Everything under `source`. A picture has a picture's suffix, or a picture's first bytes under any other name.

    `leave_out` is a folder to skip (the output, if it is inside the source). Raises TableError for a caption table that must
    not be opened.
    """
    root, out = source.resolve(), leave_out.resolve() if leave_out else None
    result = Survey()

    def note(path: str, problem: str) -> None:
        result.pictures[path] = Found(path, problem)

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
        sort_folder(result, "" if within == "." else f"{within}/", folder, names, root)
    mark_elsewhere(result)
    for listed in (result.tables, result.tars, result.pages, result.parquet):
        listed.sort()
    return result


def mark_elsewhere(result: Survey) -> None:
    """Mark the texts without a picture that have the name of one in another folder: images/a.png and captions/a.txt."""
    lone: dict[str, list[str]] = {}
    for path, reason in result.unread.items():
        if reason == LONE_TEXT:
            lone.setdefault(folded_stem(posixpath.basename(path)), []).append(path)
    for picture in result.pictures:
        if not lone:
            break
        for path in lone.pop(folded_stem(posixpath.basename(picture)), ()):
            result.unread[path] = ELSEWHERE


def sort_folder(result: Survey, within: str, folder: str, names: list[str], root: Path) -> None:
    """Sort the files of one folder by kind. `within` is its path within the source, with a trailing slash."""
    problems: dict[str, str] = {}  # of pictures
    unsure: dict[str, str] = {}  # of those that only their first bytes show
    words: list[str] = []
    for name in names:
        kind = kind_of(name)
        if kind == "words":
            words.append(name)
            continue
        problem = why_not_open(f"{folder}/{name}", root)
        if kind == "table":
            if problem:
                raise TableError(f"{folder}/{name} cannot be read for captions ({problem}): put a copy of the file there")
            result.tables.append(within + name)
        elif kind == "picture":
            problems[name] = problem
        elif not kind and not problem and starts_like_a_picture(f"{folder}/{name}"):
            unsure[name] = problem
        elif kind in ("tar", "page", "parquet"):
            {"tar": result.tars, "page": result.pages, "parquet": result.parquet}[kind].append(within + name)
        else:
            result.unread[within + name] = OTHER_TABLE if kind == "other table" else why_unknown(name)
    pairs, unread = pair_words(problems, words)
    if unsure:  # a picture under another suffix, such as a camera's raw file beside its JPEG, has the words that no other picture has
        shared = {name: reason for name, reason in unread.items() if reason in (SHARED_WORDS, SECOND_WORDS)}
        more, unread = pair_words(unsure, [name for name in unread if name not in shared])
        pairs, problems, unread = pairs | more, problems | unsure, unread | shared
    others = [name for name in names if name.lower().endswith(OTHER_WORDS) and result.unread.get(within + name) == NOTHING_KNOWN]
    named = {form for name in problems for form in (folded(name), folded_stem(name))} if others else set()
    result.unread.update({within + name: OTHER_SUFFIX for name in others if folded_stem(name) in named})
    for name, problem in problems.items():
        result.pictures[within + name] = Found(within + name, problem, sidecars=pairs.get(name, ()))
    for name, reason in unread.items():
        if is_table(name) and reason == LONE_JSON:
            result.tables.append(within + name)
        elif reason == LONE_JSON and is_coco(f"{folder}/{name}"):
            result.unread[within + name] = COCO_FILE
        else:
            result.unread[within + name] = OTHER_LIST if reason == LONE_TEXT and is_list(name) else reason


def why_unknown(name: str) -> str:
    """Why a file of no known kind is not read."""
    suffix = posixpath.splitext(name.lower())[1]
    if is_list(name):
        return OTHER_LIST
    if suffix == ".arrow":
        return SAVED
    return OTHER_FORMAT if suffix in OTHER_PICTURES else PACKED if suffix in ARCHIVES else NOTHING_KNOWN


def is_list(name: str) -> bool:
    """Whether a file is named like a list of captions in a form that is not read."""
    stem, suffix = posixpath.splitext(name.lower())
    return suffix in (*LISTS, *ARCHIVES) and stem.partition(".")[0] in TABLE_STEMS


def is_coco(path: str) -> bool:
    """Whether a JSON file begins like one of COCO, by its name and its first bytes."""
    if not COCO_NAME.search(posixpath.basename(path)):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return False
    return b'"images"' in start or b'"annotations"' in start


def kind_of(name: str) -> str:
    """The kind of a file by its name alone; "" if the name does not show it."""
    lower = name.lower()
    suffix = posixpath.splitext(lower)[1]
    if suffix in SIDECARS:
        return "words"
    if lower.endswith(TARS):
        return "tar"
    if lower.endswith(PAGES):
        return "page"
    if is_table(name):
        return "table"
    if suffix == ".parquet":
        return "parquet"
    if suffix in TABLE_SUFFIXES:
        return "other table"
    return "picture" if suffix in PICTURE_SUFFIXES else ""


def is_table(path: str) -> bool:
    """Whether a file is named like a caption table."""
    stem, suffix = posixpath.splitext(posixpath.basename(path).lower())
    return stem in TABLE_STEMS and suffix in TABLE_KINDS


def table_rank(table: str) -> tuple[int, int, str]:
    """Sort key for the reading order of tables: metadata before captions."""
    stem, suffix = posixpath.splitext(posixpath.basename(table).lower())
    return TABLE_STEMS.index(stem), TABLE_KINDS.index(suffix), table


# ---------------------------------------------------------------------------------------------------------------------
# pictures and their sidecar files


def pair_words(pictures: Iterable[str], words: list[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """({picture: its sidecar files}, {sidecar file that is not read: reason}) of the names in one folder.

    A picture NAME.jpg has NAME.jpg.txt or NAME.txt, and NAME.jpg.json or NAME.json, in this order of precedence. Accents may be
    composed or decomposed, suffixes in upper case. A name in other case is accepted if it can only mean one picture. A file that
    fits two pictures, such as NAME.txt for NAME.jpg and NAME.png, is read for neither, since it is ambiguous.
    """
    if not words:
        return {}, {}
    pictures = list(pictures)
    there = index_of(words, same_name)
    pairs = {name: taken for name in pictures if (taken := own_words(name, there, same_name))}
    used = {one for taken in pairs.values() for one in taken}
    rest = [name for name in words if name not in used]
    if rest and len(pairs) < len(pictures):
        alone = [names[0] for names in index_of((name for name in pictures if name not in pairs), folded_stem).values() if len(names) == 1]
        loose = {key: names for key, names in index_of(rest, folded).items() if len(names) == 1}
        pairs.update((name, taken) for name in alone if (taken := own_words(name, loose, folded)))
        used |= {one for name in alone for one in pairs.get(name, ())}
    taken_for = {form for name in pairs for form in (same_name(name), same_name(posixpath.splitext(name)[0]))}
    stems = {same_name(posixpath.splitext(name)[0]) for name in pictures} if len(used) < len(words) else set()
    unread = {name: why_unread(name, taken_for, stems) for name in words if name not in used}
    users = Counter(one for taken in pairs.values() for one in taken)
    if shared := {one for one, count in users.items() if count > 1}:
        unread |= dict.fromkeys(sorted(shared), SHARED_WORDS)
        pairs = {name: left for name, taken in pairs.items() if (left := tuple(one for one in taken if one not in shared))}
    return pairs, unread


def why_unread(name: str, taken_for: set[str], stems: set[str]) -> str:
    stem, suffix = posixpath.splitext(name)
    if same_name(stem) in taken_for:
        return SECOND_WORDS
    if same_name(posixpath.splitext(stem)[0]) in stems and suffix.lower() in TEXTS:  # wolf.en.txt, wolf.txt.txt
        return LONGER_NAME
    return LONE_JSON if suffix.lower() == ".json" else LONE_TEXT


def index_of(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for name in sorted(names):
        index.setdefault(form(name), []).append(name)
    return index


def same_name(name: str) -> str:
    """A name normalised in its accents and in the case of its last suffix."""
    stem, suffix = posixpath.splitext(name)
    return unicodedata.normalize("NFC", stem) + (suffix.lower() if suffix.lower() in SIDECARS else unicodedata.normalize("NFC", suffix))


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def folded_stem(name: str) -> str:
    return folded(posixpath.splitext(name)[0])


def own_words(picture: str, there: Mapping[str, list[str]], form: Callable[[str], str]) -> tuple[str, ...]:
    """A picture's text file and JSON file: those with its whole name take precedence over those with its stem."""

    def first(suffixes: tuple[str, ...]) -> Iterator[str]:
        for start in (picture, posixpath.splitext(picture)[0]):
            for suffix in suffixes:
                names = there.get(form(start + suffix), ())
                yield from sorted(names, key=lambda name: (name != start + suffix, name))

    chosen = (next(first(TEXTS), ""), next(first((".json",)), ""))
    return tuple(name for name in chosen if name)


def with_sidecars(folder: Path, found: Found) -> Found:
    """A picture with the sidecar files beside it on disk, searched if they have not been yet."""
    if found.sidecars is not None:
        return found
    try:
        names = os.listdir(folder / posixpath.dirname(found.path))
    except (OSError, ValueError):
        names = []
    pictures = {posixpath.basename(found.path), *(name for name in names if kind_of(name) == "picture")}
    pairs, _ = pair_words(pictures, [name for name in names if kind_of(name) == "words"])
    return replace(found, sidecars=pairs.get(posixpath.basename(found.path), ()))

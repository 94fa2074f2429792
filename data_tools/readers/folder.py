"""Folders of pictures with words in sidecar files, in tables or in file names; and folders named by style."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from pathlib import Path

from data_tools.pipeline.disk import DiskList
from data_tools.readers.book_page import BOOK_PAGE
from data_tools.readers.caption_tables import CaptionRows, holds_captions
from data_tools.readers.files import why_not_open
from data_tools.readers.folder_scan import (
    BROKEN_PARQUET,
    LONE_PAGE,
    NO_PAGE,
    NO_PICTURES_IN_TABLE,
    OTHER_TABLE,
    Survey,
    survey,
    table_rank,
)
from data_tools.readers.huggingface import kind_of_parquet, read_huggingface
from data_tools.readers.listing import Found, Listing, Options
from data_tools.readers.table_files import TableError
from data_tools.readers.webdataset import Tars
from data_tools.readers.words import kebab


def read_folder(source: Path, options: Options) -> Listing:
    """Everything below a folder: pictures with sidecar files and tables, tar files, and Parquet files of pictures."""
    there = survey(source, leave_out=options.leave_out)
    pictures = DiskList(there.pictures.ordered())
    rows = CaptionRows(options)
    for table in sorted(there.tables, key=table_rank):
        rows.add(table, str(source / table))
    words, missing, notes = rows.match(pictures)
    guesses = rows.guesses
    tars = Tars(options, pictures, words, there.unread)
    for path in there.tars:
        tars.read(source, path)
    notes = (*notes, *tars.notes)
    if has_data_set(there, source):
        data = read_huggingface(source, options)
        for one in data.found:
            pictures.append(one)
        words.update(data.words)
        notes, guesses = (*notes, *data.notes), (*guesses, *data.guesses)
    if not there.tables and (table := only_table(there, source, options)):
        own, bare = CaptionRows(options), DiskList(one for one in pictures if not one.sidecars and one.path not in words)
        try:
            own.add(table, str(source / table))
        except TableError as error:  # perhaps a table of something else
            notes = (*notes, f"{table} is not read for captions: {error}.")
        matched, lone, more = own.match(bare)
        if len(matched):
            there.unread.pop(table)
            words.update(matched)
            missing, guesses = missing + lone, (*guesses, *own.guesses)
            notes = (
                *notes,
                f"Captions are read from {table}, which has rows for {len(matched):,} of {len(bare):,} pictures without words.",
                *more,
            )
    for page in there.pages:
        there.unread[page] = NO_PAGE if BOOK_PAGE.search(posixpath.basename(page)) else LONE_PAGE
    return Listing(source, pictures, words, missing, there.unread, notes, guesses)


def only_table(there: Survey, source: Path, options: Options) -> str:
    """The table with paths and captions under a name of its own; "" if there is none, or several."""
    others = [path for path, reason in there.unread.items() if reason == OTHER_TABLE and not posixpath.basename(path).startswith(".")]
    root = source.resolve()
    whole = [path for path in others[:MOST_TABLES] if not why_not_open(str(source / path), root)]
    found = [path for path in whole if holds_captions(str(source / path), options)]
    return found[0] if len(found) == 1 and len(others) <= MOST_TABLES else ""


def has_data_set(there: Survey, source: Path) -> bool:
    """Whether there are Parquet files of pictures; records why the others are not read."""
    reasons = {"broken": BROKEN_PARQUET, "paths": OTHER_TABLE, "nothing": NO_PICTURES_IN_TABLE}
    kinds = {path: kind_of_parquet(source / path) for path in there.parquet}
    there.unread.update({path: reasons[kind] for path, kind in kinds.items() if kind in reasons})
    return "pictures" in kinds.values()


MOST_TABLES = 20
"""Most tables under other names that are opened to find the one with captions."""

CLASS_STYLES = frozenset({
    "drawing", "engraving", "etching", "iconography", "lithograph", "painting", "photograph", "sculpture", "watercolour", "woodcut",
    "wood-engraving",
})  # fmt: skip
COPIES = ("musemart",)  # folders with second copies of the same pictures


def class_of(path: str) -> tuple[str, str]:
    """(style, path between the class folder and the file) of a picture's path; ("", "") outside any folder.

    The class is the innermost folder named like a style, else the innermost folder.
    """
    folders = path.split("/")[:-1]
    for depth in range(len(folders), 0, -1):
        name = kebab(folders[depth - 1])
        if style := next((one for one in (name, name.removesuffix("s")) if one in CLASS_STYLES), ""):
            return style, "/".join(folders[depth:])
    return (kebab(folders[-1]), "") if folders else ("", "")


def read_classes(source: Path, options: Options) -> Listing:
    """One folder per style: drawings, engraving, iconography, painting, sculpture, or any other name.

    Folders named training or validation are ignored: the split is drawn anew, so errors in theirs do no harm. With
    `options.style` the other classes are listed but not opened. Second copies come last, so that the first is kept.
    """
    listing = read_folder(source, options)
    turns = ((one for one in listing.found if is_copy(one) == copies) for copies in (False, True))
    found, notes = DiskList(classed(one, options.style) for turn in turns for one in turn), listing.notes
    if options.style:
        note = f"the folders are styles here: --style {options.style} takes one of them, and leaves out the others as other style"
        notes = (*notes, f"{note}. To give all folders this style: --reader folder --style {options.style}")
    return replace(listing, found=found, notes=notes)


def is_copy(one: Found) -> bool:
    return any(name in COPIES for name in one.path.split("/"))


def classed(one: Found, wanted: str) -> Found:
    """The picture with its folder's style, and with a problem if that is not the `wanted` one."""
    if one.where is not None:  # in a tar or a table, which give the style themselves
        return one
    style, below = class_of(one.path)
    problem = one.problem
    if not problem and not style:
        problem = "in no class folder"
    elif not problem and wanted not in ("", style):
        problem = "other style"
    return replace(one, problem=problem, style=style, group=below)

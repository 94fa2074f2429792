"""Readers: a source given to prepare -> its pictures and the words about each.

    tokun prepare book-folder/ --reader gutenberg --style engraving --out shards/

One function for each kind of source, in the table READERS: (source, Options) -> Listing. A listing depends only on the
source, and its order is fixed. `read_picture` fetches the bytes of one picture later, in any process. Readers know
nothing of pixels and return captions as found, in one plain line; text/ cleans them. Beside them are the readers of what all tools
share: table_files.py (tables with named columns) and stored_pairs.py (pairs in shards).
"""

from __future__ import annotations

import difflib
import posixpath
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.images.image_ops import PictureError
from data_tools.readers.book_page import BOOK_PAGE
from data_tools.readers.books import read_gutenberg
from data_tools.readers.caption_tables import read_manifest
from data_tools.readers.coco import read_coco
from data_tools.readers.files import MAX_TEXT_BYTES, PICTURE_SUFFIXES, find_files, read_file
from data_tools.readers.folder import CLASS_STYLES, class_of, read_classes, read_folder
from data_tools.readers.folder_scan import ARCHIVES, TAR_PACKED, TARS
from data_tools.readers.huggingface import data_files, is_saved, read_huggingface, read_row
from data_tools.readers.listing import CaptionError, DatasetRow, Found, Listing, Options, Remote, Span, Words, shown
from data_tools.readers.remote import read_remote, read_remote_picture
from data_tools.readers.sidecars import find_words
from data_tools.readers.storage import URL, local_path
from data_tools.readers.webdataset import read_webdataset
from tokun.utils.errors import UserError

__all__ = [
    "MAX_TEXT_BYTES",
    "READERS",
    "CaptionError",
    "DatasetRow",
    "Found",
    "Listing",
    "Options",
    "PictureError",
    "Remote",
    "Span",
    "Words",
    "choose_reader",
    "find_words",
    "read_picture",
    "shown",
]  # fmt: skip


def read_address(source: Path | str, options: Options) -> Listing:
    """Read an address; file:// is read as a local folder or file."""
    path = local_path(str(source).rstrip("/"))
    if path is None:
        return read_remote(source, options)
    return READERS[choose_reader(path, leave_out=options.leave_out)](path, options)


def read_tars(source: Path, options: Options) -> Listing:
    """One tar file, or a folder with tar files and whatever else it holds."""
    return read_folder(source, options) if source.is_dir() else read_webdataset(source, options)


def read_data_set(source: Path, options: Options) -> Listing:
    """A data set by id or in a local folder; a folder of Parquet files is read with whatever else it holds."""
    source = Path(source)
    parquet = source.is_dir() and not is_saved(source) and data_files(source)
    return read_folder(source, options) if parquet else read_huggingface(source, options)


READERS: dict[str, Callable[[Any, Options], Listing]] = {
    "folder": read_folder,
    "classes": read_classes,
    "gutenberg": read_gutenberg,
    "manifest": read_manifest,
    "coco": read_coco,
    "webdataset": read_tars,
    "huggingface": read_data_set,
    "remote": read_address,
}
FILE_READERS = {
    ".csv": "manifest", ".tsv": "manifest", ".jsonl": "manifest", ".ndjson": "manifest", ".parquet": "manifest",
    ".json": "coco", ".tar": "webdataset", ".htm": "gutenberg", ".html": "gutenberg",
}  # fmt: skip


def read_picture(base: Path, found: Found) -> bytes:
    """The encoded bytes of one picture that a reader listed. Raises PictureError with the reason."""
    where = found.where
    if isinstance(where, DatasetRow):
        return read_row(base, where)
    if isinstance(where, Remote):
        return read_remote_picture(where)
    return read_file(base, found)


def choose_reader(source: Path | str, name: str = "auto", *, leave_out: Path | None = None) -> str:
    """The name of the reader for `source`: the one requested, or the one detected.

    Raises UserError for an unknown or unsuitable name, FileNotFoundError for a missing source.
    """
    if name != "auto" and name not in READERS:
        near = difflib.get_close_matches(name, ["auto", *READERS], n=1, cutoff=0.4)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"--reader {name!r} is unknown{hint}. Readers are auto, {', '.join(READERS)}")
    if URL.match(str(source)) or name == "remote":
        return check_remote(str(source), name)
    if name == "huggingface":
        return name
    source = Path(source)
    if not source.exists():
        an_id = len(source.parts) == 2 and not source.is_absolute()
        hint = f". For the Hugging Face data set {source} add --reader huggingface" if an_id else ""
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
        raise UserError(f"--reader remote takes an address like s3://bucket/folder, and {source} is not one: leave out --reader")
    if name not in ("auto", "remote"):
        raise UserError(f"--reader {name} reads local files, and {source} is an address: leave out --reader, or download it first")
    return "remote"


def recognise_file(source: Path) -> str:
    suffix = source.suffix.lower()
    if suffix in ARCHIVES or source.name.lower().endswith(TAR_PACKED):
        raise FileNotFoundError(f"SOURCE {source} is compressed: unpack it, and give the folder or the .tar")
    if suffix not in FILE_READERS:
        raise FileNotFoundError(
            f"SOURCE {source} is a file: give a folder of pictures, or a table of pictures ({' '.join(sorted(FILE_READERS))})"
        )
    return FILE_READERS[suffix]


def recognise_folder(source: Path, leave_out: Path | None) -> str:
    """The reader for a folder, by the file names in it."""
    kinds: Counter[str] = Counter()
    classes, last = set(), None
    for path in find_files(source, leave_out):
        folder, name = posixpath.split(path)
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in PICTURE_SUFFIXES:
            kinds["picture"] += 1
            if folder != last:  # a folder's files come consecutively
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
        return "classes" if len(classes) > 1 and classes <= CLASS_STYLES else "folder"
    return "huggingface" if kinds["data set"] else "folder"

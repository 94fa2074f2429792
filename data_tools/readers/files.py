"""Files: the pictures below a folder, and which files must not be opened.

A link or path that leaves the source, a pipe, an unreadable folder: each is listed with its problem.
"""

from __future__ import annotations

import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from data_tools.images.image_ops import PictureError
from data_tools.readers.listing import Found, Span
from data_tools.readers.storage import URL

MISSING, OUTSIDE = "missing file", "path leaves the source"  # of a picture that a table names
MAX_BYTES = 256 * 2**20  # of one picture file
MAX_TEXT_BYTES = 2**20  # of one sidecar caption file
MAX_PAGE_BYTES = 32 * 2**20  # of one page of a book
PICTURE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


def find_files(base: Path, leave_out: Path | None) -> Iterator[str]:
    """The files under `base`, in the order of the file system; links to folders are not followed."""
    out = leave_out.resolve() if leave_out else None
    for folder, subfolders, names in os.walk(base):
        here = Path(folder)
        within = here.relative_to(base).as_posix()
        subfolders[:] = [name for name in subfolders if out is None or (here / name).resolve() != out]
        yield from (name if within == "." else f"{within}/{name}" for name in names)


def why_not_open(path: str | Path, root: Path) -> str:
    """Why this file must not be opened (a link out of the source, a pipe that would block forever), or ""."""
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
    except OSError:  # not known to be a picture, so not reported
        return False
    return start.startswith(PICTURE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def as_path(text: str) -> str:
    """A path as written in a file -> a path for the file system."""
    return utf8(text).strip().replace("\\", "/")


def utf8(text: str) -> str:
    """The text without lone surrogates, which JSON can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def listed(base: Path, root: Path, name: str) -> Found:
    """A file named in a table, as a path within `base` (resolved: `root`), with the reason not to open it, if any."""
    name = as_path(name)
    if URL.match(name):
        return Found(name, "a web address, not a file", beside=False)
    for start in (base.absolute(), root):
        if posixpath.isabs(name) and Path(name).is_relative_to(start):
            name = Path(name).relative_to(start).as_posix()
    name = given = posixpath.normpath(name)
    path = base / name
    if posixpath.isabs(name) or name.split("/")[0] == "..":
        problem = OUTSIDE
    elif not os.path.lexists(path) and not (name := as_written(base, name)):
        problem, name = MISSING, given
    elif not (problem := why_not_open(path := base / name, root)) and not Path(os.path.realpath(path)).is_relative_to(root):
        problem = "symlink leaves the source"  # a folder in the path is a link
    return Found(name, problem, beside=False)


class Misplaced:
    """Counts the pictures that are not where a table says they are."""

    def __init__(self, table: str, base: Path, root: Path | None) -> None:
        self.table, self.base, self.root = table, base, root
        self.total = self.count = 0
        self.first = ""

    def add(self, one: Found, written: str) -> None:
        self.total += 1
        if one.problem in (MISSING, OUTSIDE):
            self.count += 1
            self.first = self.first or written

    def notes(self) -> list[str]:
        """A sentence for the user, with the option that helps."""
        if not self.count:
            return []
        counted = f"from --root {self.root}" if self.root else f"from {self.base}: --root names another folder"
        note = f"Pictures that are not where {self.table} says: {self.count:,} of {self.total:,}, the first {self.first}."
        if ".." in Path(self.first).parts:
            return [f"{note} No path may contain '..': write the paths relative to one folder, and name it with --root."]
        return [f"{note} Paths are counted {counted}."]


def as_written(base: Path, name: str) -> str:
    """The path as on disk if it differs only in composed or decomposed accents; "" if there is none."""
    forms = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.lexists(base / form)), "")


def read_file(base: Path, found: Found) -> bytes:
    """The encoded bytes of a picture, from its own file or from within a larger one. Raises PictureError with the reason."""
    where = found.where
    assert where is None or isinstance(where, Span)
    try:
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

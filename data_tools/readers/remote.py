"""Object storage and the web, through fsspec: pictures with their sidecars and tables, and tars, read in place."""

from __future__ import annotations

import io
import posixpath
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.images.pictures import PictureError
from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.files import MAX_BYTES, PICTURE_SUFFIXES, SIDECARS, TABLE_NAMES, checked
from data_tools.readers.listing import Found, Listing, Options, Remote
from data_tools.readers.storage import cannot_be_opened, fetch, storage_errors
from data_tools.readers.tables import table_rank, table_words
from data_tools.readers.webdataset import TARS, read_tar
from data_tools.readers.words import unmatched
from tokun.extras import need

MAX_TABLE_BYTES = 2**30  # of one table in object storage


def read_remote(source: Path | str, options: Options) -> Listing:
    """s3://bucket/folder and the like: pictures with their sidecars and tables, and tars, read in place.

    Raises FileNotFoundError when the place cannot be listed.
    """
    url = str(source).rstrip("/")
    try:
        fs, root = need("fsspec", extra="data").core.url_to_fs(url)
        files = {key: info for key, info in fs.find(root, detail=True).items() if info.get("type") == "file"}
    except storage_errors() as error:
        raise cannot_be_opened(url, error) from error
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


def read_remote_picture(where: Remote) -> bytes:
    """The bytes of a picture in object storage. Raises PictureError."""
    try:
        data = fetch(where.url, where.start, MAX_BYTES + 1 if where.size is None else where.size)
    except OSError as error:
        raise PictureError("cannot be read") from error
    return checked(data, where.size)


def read_remote_table(key: str, fs: Any, table: str, words: DiskDict) -> None:
    try:
        data = fs.cat_file(key, start=0, end=MAX_TABLE_BYTES + 1)
        if len(data) > MAX_TABLE_BYTES:
            raise OSError(f"it has more than {MAX_TABLE_BYTES} bytes")
    except storage_errors() as error:
        raise ValueError(f"{key} cannot be read for captions: {error}") from error
    table_words(io.BytesIO(data), table, key, words)

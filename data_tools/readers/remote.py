"""Object storage and the web, through fsspec: pictures with sidecars and tables, and tars, read in place."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.images.image_ops import PictureError
from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.caption_tables import CaptionRows
from data_tools.readers.files import MAX_BYTES, checked
from data_tools.readers.folder_scan import LONE_JSON, is_table, kind_of, pair_words, table_rank, why_unknown
from data_tools.readers.listing import Found, Listing, Options, Remote
from data_tools.readers.storage import cannot_be_opened, fetch, storage_errors
from data_tools.readers.webdataset import Tars
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

MAX_TABLE_BYTES = 2**30  # of one table in object storage
REMOTE_REASONS = {
    "parquet": "not read: a Parquet file in object storage; give a data set of pictures by its id, or download it",
    "page": "not read: books are read from this machine alone",
    "other table": "not read: a table under another name than captions or metadata, in object storage",
}


def read_remote(source: Path | str, options: Options) -> Listing:
    """s3://bucket/folder and the like: pictures with sidecars and tables, and tars, read in place.

    Raises FileNotFoundError if the address cannot be listed.
    """
    url = str(source).rstrip("/")
    try:
        fs, root = need("fsspec", extra="data").core.url_to_fs(url)
        files = {key: info for key, info in fs.find(root, detail=True).items() if info.get("type") == "file"}
    except storage_errors() as error:
        raise cannot_be_opened(url, error) from error
    start = posixpath.dirname(root) if root in files else root.rstrip("/")
    within = {key[len(start) :].lstrip("/"): key for key in sorted(files) if key.startswith(f"{start}/")}
    found, words, unread = DiskList(), DiskDict(), DiskDict()
    tars = Tars(options, found, words, unread)
    rows = CaptionRows(options)
    pairs = pair_all(within, unread)
    for path, key in within.items():
        place = Remote(fs.unstrip_protocol(key), size=files[key].get("size"), version=version_of(files[key]))
        kind = kind_of(posixpath.basename(path))
        if kind == "tar":
            read_remote_tar(fs, key, path, place, tars)
        elif kind == "picture":
            problem = "file too large" if (place.size or 0) > MAX_BYTES else ""
            found.append(Found(path, problem, where=place, sidecars=pairs.get(path, ())))
        elif kind not in ("words", "table"):
            unread[path] = REMOTE_REASONS.get(kind) or why_unknown(posixpath.basename(path))
    tables = [path for path in within if is_table(path) and (kind_of(posixpath.basename(path)) == "table" or unread.get(path) == LONE_JSON)]
    for table in sorted(tables, key=table_rank):
        unread.pop(table, None)
        read_remote_table(within[table], fs, table, rows)
    matched, missing, notes = rows.match(found)
    words.update(matched)
    return Listing(url, found, words, missing, unread, (*notes, *tars.notes), rows.guesses)


def pair_all(paths: Iterable[str], unread: DiskDict) -> dict[str, tuple[str, ...]]:
    """{picture: names of its sidecar files}, folder by folder; adds the sidecar files that are not read to `unread`."""
    folders: dict[str, tuple[list[str], list[str]]] = {}
    for path in paths:
        folder, name = posixpath.split(path)
        kind = kind_of(name)
        if kind in ("picture", "words"):
            folders.setdefault(folder, ([], []))[kind == "words"].append(name)
    found: dict[str, tuple[str, ...]] = {}
    for folder, (pictures, words) in folders.items():
        pairs, rest = pair_words(pictures, words)
        found.update({posixpath.join(folder, name): taken for name, taken in pairs.items()})
        unread.update({posixpath.join(folder, name): reason for name, reason in rest.items()})
    return found


def version_of(info: dict[str, Any]) -> str:
    return str(next((info[name] for name in ("ETag", "etag", "LastModified", "mtime", "updated", "created") if info.get(name)), ""))


def read_remote_tar(fs: Any, key: str, path: str, whole: Remote, tars: Tars) -> None:
    try:
        with fs.open(key, "rb") as file:
            tars.read_open(file, path, lambda start, size: replace(whole, start=start, size=size))
    except storage_errors():
        tars.found.append(Found(path, "cannot be read"))


def read_remote_picture(where: Remote) -> bytes:
    """The bytes of a picture in object storage. Raises PictureError."""
    try:
        data = fetch(where.url, where.start, MAX_BYTES + 1 if where.size is None else where.size)
    except OSError as error:
        raise PictureError("cannot be read") from error
    return checked(data, where.size)


def read_remote_table(key: str, fs: Any, table: str, rows: CaptionRows) -> None:
    try:
        data = fs.cat_file(key, start=0, end=MAX_TABLE_BYTES + 1)
        if len(data) > MAX_TABLE_BYTES:
            raise OSError(f"it has more than {MAX_TABLE_BYTES} bytes")
    except storage_errors() as error:
        raise UserError(f"{key} cannot be read for captions: {error}") from error
    rows.add(table, key, lambda: io.BytesIO(data))

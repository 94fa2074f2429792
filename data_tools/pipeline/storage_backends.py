"""Storage backends: a folder for results, on disk or in object storage, with atomic writes.

    store = open_store("shards/")                 # or s3://bucket/shards, through fsspec
    store.write("train-00000.tar", data)

Every write goes to a temporary file, which is then renamed. Knows names and bytes, not their contents.
"""

from __future__ import annotations

import io
import os
import posixpath
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tokun.utils.optional_packages import need


def is_url(text: str | Path) -> bool:
    return "://" in str(text)


def open_store(place: str | Path) -> Store:
    """The store at a folder's path or a URL that fsspec supports. Nothing is created or opened yet."""
    return RemoteStore(str(place).rstrip("/")) if is_url(place) else Store(str(place))


@dataclass(frozen=True)
class Store:
    """A folder on this machine. Names may include folders: `aside/x.json`. Cheap to pickle."""

    place: str

    def __str__(self) -> str:
        return self.place

    def path(self, name: str) -> Path:
        return Path(self.place) / name

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def list(self, folder: str = "") -> list[str]:
        """Sorted names of the files and folders in `folder`; [] if it does not exist."""
        path = self.path(folder)
        return sorted(one.name for one in path.iterdir()) if path.is_dir() else []

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length)."""
        with open(self.path(name), "rb", buffering=0) as file:
            return [os.pread(file.fileno(), size, start) for start, size in parts]

    def write(self, name: str, data: bytes) -> None:
        self.write_from(name, io.BytesIO(data))

    def write_from(self, name: str, source: BinaryIO) -> None:
        """Write the rest of an open file."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(aside, "wb") as file:
                shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def move(self, name: str, new: str) -> None:
        os.replace(self.path(name), self.path(new))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its contents. A missing one is not an error."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class RemoteStore(Store):
    """A prefix in object storage, where an upload only appears when complete. Needs fsspec and the storage's package."""

    def files(self) -> Any:
        return need("fsspec", extra="data").core.url_to_fs(self.place)[0]

    def url(self, name: str) -> str:
        return posixpath.join(self.place, name)

    def exists(self, name: str) -> bool:
        return bool(self.files().exists(self.url(name)))

    def list(self, folder: str = "") -> list[str]:
        files = self.files()
        files.invalidate_cache()
        try:
            found = files.ls(self.url(folder).rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(name.rstrip("/")) for name in found)

    def read(self, name: str) -> bytes:
        return self.files().cat_file(self.url(name))

    def read_parts(self, name: str, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        url, files = self.url(name), self.files()
        found = files.cat_ranges(
            [url] * len(parts), [start for start, _ in parts], [start + size for start, size in parts], on_error="raise"
        )
        for one in found:
            if isinstance(one, BaseException):  # fsspec before June 2026 may return it instead of raising
                raise one
        return found

    def write(self, name: str, data: bytes) -> None:
        files = self.files()
        files.makedirs(posixpath.dirname(self.url(name)), exist_ok=True)
        files.pipe_file(self.url(name), data)

    def write_from(self, name: str, source: BinaryIO) -> None:
        files = self.files()
        files.makedirs(posixpath.dirname(self.url(name)), exist_ok=True)
        with files.open(self.url(name), "wb") as file:
            shutil.copyfileobj(source, file)

    def move(self, name: str, new: str) -> None:
        self.files().mv(self.url(name), self.url(new))

    def remove(self, name: str) -> None:
        files = self.files()
        if files.exists(self.url(name)):
            files.rm(self.url(name), recursive=True)

"""Storage: files at an address (s3://, gs://, https:// and others), through fsspec."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tokun.utils.optional_packages import need

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


def fetch(url: str, start: int, size: int) -> bytes:
    """Up to `size` bytes of a remote file. Raises OSError."""
    try:
        fs, path = need("fsspec", extra="data").core.url_to_fs(url)
        return fs.cat_file(path, start=start, end=start + size)[:size] if size else b""
    except storage_errors() as error:
        raise OSError(f"{url} cannot be read: {error}") from error


def local_path(url: str) -> Path | None:
    """The path of a file:// address; None for other addresses. Raises FileNotFoundError if fsspec does not support the address."""
    fsspec, local = need("fsspec", extra="data"), need("fsspec.implementations.local", extra="data")
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except storage_errors() as error:
        raise cannot_be_opened(url, error) from error
    return Path(root) if isinstance(fs, local.LocalFileSystem) else None


def cannot_be_opened(url: str, error: BaseException) -> FileNotFoundError:
    way_out = "Is the address right (s3://, gs://, https:// or another that fsspec supports), and are its credentials set?"
    return FileNotFoundError(f"SOURCE {url} cannot be opened: {error}. {way_out}")


def storage_errors() -> tuple[type[BaseException], ...]:
    """The exceptions of the storages behind fsspec. They share no base class, and only imported backends are listed."""
    import asyncio  # some 20 ms, which most runs of `prepare` do not need

    others = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"), ("google.auth.exceptions", "GoogleAuthError"))
    loaded = [getattr(sys.modules[module], name) for module, name in (*others, ("gcsfs.retry", "HttpError")) if module in sys.modules]
    return (OSError, ValueError, asyncio.TimeoutError, *loaded)

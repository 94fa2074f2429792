"""A gate before the demo's web server: rejects requests that Gradio accepts but the demo does not use. Knows HTTP, no models.

Gradio fetches remote files that a request names, of any size, and passes them on. It reads JSON of any length and keeps form fields of
any length in memory. Files whose upload breaks off, or whose field it does not know, stay on its disk for good. The gate only lets
uploads of one complete file through.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

UPLOADS = 64  # most uploads received at a time
IDLE = 15  # most seconds that an upload may pause
MAX_SECONDS = 600  # that an upload may take in all
MAX_BODY = 200_000  # bytes of a request other than an upload; the texts of all fields take a hundredth of that
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware. Answers 403 to addresses and bodies that name a remote file, 413 to bodies that are too long, 400 to uploads that
    are not one complete file, 408 to uploads that stop or take too long, 429 to more than UPLOADS of them at a time."""

    def __init__(self, app: Callable[..., Awaitable[None]], max_file_bytes: int):
        self.app, self.max_upload, self.uploads = app, max_file_bytes + 10_000, 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and asks_elsewhere(path):
            return await refuse(send, 403)
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        uploading = path.rstrip("/").endswith("/upload")
        body = await self.uploaded(receive) if uploading else await read(receive)
        if isinstance(body, int):
            return await refuse(send, body)
        if uploading and not is_one_file(body, dict(scope["headers"]).get(b"content-type", b"")):
            return await refuse(send, 400)
        if not uploading and names_remote_file(body):
            return await refuse(send, 403)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        await self.app(scope, lambda: pop_or(whole, receive), send)

    async def uploaded(self, receive: Receive) -> bytes | int:
        async def patiently() -> Message:
            return await asyncio.wait_for(receive(), IDLE)

        try:
            begun = [await patiently()]  # a connection that sends nothing does not count as an upload
            if self.uploads >= UPLOADS:
                return 429
            self.uploads += 1
            try:
                return await asyncio.wait_for(read(lambda: pop_or(begun, patiently), self.max_upload), MAX_SECONDS)
            finally:
                self.uploads -= 1
        except asyncio.TimeoutError:  # its name before Python 3.11
            return 408


def asks_elsewhere(path: str) -> bool:
    return any(word in path.lower() for word in ("file=http", "proxy="))


async def read(receive: Receive, most: int = MAX_BODY) -> bytes | int:
    """The whole body; or the status to answer: 413 if it is too long, 400 if it breaks off."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if message["type"] != "http.request":
            return 400
        if len(body) > most:
            return 413
    return bytes(body)


def is_one_file(body: bytes, content_type: bytes) -> bool:
    """Whether a multipart body is one file in the field that Gradio looks at, and nothing else."""
    found = re.search(rb'boundary="?([^";,\s]+)', content_type)
    if not found:
        return False
    line = b"--" + found[1]
    head = body.partition(b"\r\n\r\n")[0].lower()
    return body.startswith(line + b"\r\n") and body.count(b"\r\n" + line) == 1 and b'name="files"' in head and b"filename=" in head


async def pop_or(messages: list[Message], receive: Receive) -> Message:
    return messages.pop() if messages else await receive()


def names_remote_file(body: bytes) -> bool:
    """Whether the JSON names a file by an address, at any depth. False for a body that is not JSON."""
    try:
        waiting = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return False
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict) and isinstance(found.get("path"), str) and "://" in found["path"]:
            return True
        waiting += found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    return False


async def refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"not here"})

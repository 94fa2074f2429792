"""A Hugging Face Hub on this machine: enough of its HTTP interface for `huggingface_hub` to create a repository, commit to it (small files
in the commit, weights by LFS) and download a snapshot. Its repositories are in memory; a write needs TOKEN."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

OWNER, TOKEN = "me", "right"
LARGE = (".safetensors",)  # by LFS
ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/preupload/\w+", "preupload"),
    ("POST", r"/(?:datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "put"),
    ("POST", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/commit/\w+", "commit"),
    ("GET", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/revision/[^/]+)?", "info"),
    ("GET", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/tree/[^/]+(?:/(?P<folder>.+))?", "tree"),
    ("GET", r"/(?:datasets/)?(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)", "resolve"),
)


class LocalHub(ThreadingHTTPServer):
    """`files`: by repository ("me/name") and path. `private`: by repository. `asked`: every request, as "METHOD /path"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit_of(self, name: str) -> str:
        """A name for the contents, as a commit has one."""
        digest = hashlib.sha1()
        for path, data in sorted(self.files[name].items()):
            digest.update(path.encode() + b"\0" + hashlib.sha1(data).digest())
        return digest.hexdigest()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    serving = Thread(target=hub.serve_forever, daemon=True)
    serving.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        serving.join()


class Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def handle_one_route(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if wanted == method and found:
                given = found.groupdict()
                if method != "GET" and name != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer({"error": "Invalid username or password."}, 401)
                if given.get("name") and given["name"] not in self.server.files:
                    return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return getattr(self, f"on_{name}")(**given)
        self.answer({"error": f"no such route: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one_route

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def on_create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        prefix = "datasets/" if asked.get("type") == "dataset" else ""
        there = name in self.server.files
        self.server.files.setdefault(name, {})
        self.server.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer({"url": f"{self.server.address}/{prefix}{name}", "name": name}, 409 if there else 200)

    def on_validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def on_preupload(self, kind: str, name: str) -> None:
        paths = [one["path"] for one in json.loads(self.body)["files"]]
        self.answer({"files": [{"path": p, "uploadMode": "lfs" if p.endswith(LARGE) else "regular", "shouldIgnore": False} for p in paths]})

    def on_batch(self, name: str) -> None:
        objects = [
            {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def on_put(self, oid: str) -> None:
        good = hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self.answer({}, 200 if good else 400)

    def on_commit(self, kind: str, name: str) -> None:
        files = self.server.files[name]
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.server.commit_of(name)
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}", "hookOutput": ""})

    def on_info(self, kind: str, name: str) -> None:
        siblings = [{"rfilename": path} for path in sorted(self.server.files[name])]
        self.answer({"_id": "0", "id": name, "sha": self.server.commit_of(name), "private": False, "tags": [], "siblings": siblings})

    def on_tree(self, kind: str, name: str, folder: str | None) -> None:
        entries = []
        for path, data in sorted(self.server.files[name].items()):
            if not folder or path.startswith(f"{folder}/"):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
                if path.endswith(LARGE):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entries.append(entry)
        self.answer(entries)

    def on_resolve(self, name: str, path: str) -> None:
        data = self.server.files[name].get(path)
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else blob_id(data)
        self.answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": self.server.commit_of(name)})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def blob_id(data: bytes) -> str:
    """Git's name of a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

"""One print from a running Space, by the requests that its page makes.   python .ci/space_client.py http://127.0.0.1:7860 print.png"""

from __future__ import annotations

import base64
import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT = 1200  # seconds until the page answers, or the print is there; a quiet machine needs some twenty


def main(address: str, out: str) -> None:
    assert b"<html" in fetch(address)
    config = json.loads(fetch(f"{address}/config"))
    assert config["title"] == "tokun", config["title"]
    empty = {"textbox": ""}
    values = {part["id"]: part["props"].get("value", empty.get(part["type"])) for part in config["components"]}
    button = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "generate")
    draw = next(one for one in config["dependencies"] if [button, "click"] in one["targets"] and one["backend_fn"])
    asked = {
        "data": [values[one] for one in draw["inputs"]],
        "fn_index": draw["id"],
        "session_hash": "space",
        "event_data": None,
        "trigger_id": button,
    }
    prefix = address + config.get("api_prefix", "")
    fetch(f"{prefix}/queue/join", asked)
    shown = ""  # the last picture: the plate is drawn code by code
    for message in told(f"{prefix}/queue/data?session_hash=space"):
        shown = (re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", json.dumps(message)) or [shown])[-1]
        if message["msg"] == "process_completed":
            assert message["success"], message
            break
    assert shown, message
    Path(out).write_bytes(base64.b64decode(shown))
    print(f"one print: {out}, {Path(out).stat().st_size} bytes")


def fetch(address: str, body: Any = None) -> bytes:
    """The answer of the server, which may still be starting."""
    request = urllib.request.Request(
        address, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"} if body else {}
    )
    until = time.monotonic() + WAIT
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{address}: {error.code} {error.read()[:500]!r}") from error
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def told(address: str) -> Iterator[dict[str, Any]]:
    """The server-sent events of a session."""
    with urllib.request.urlopen(address, timeout=WAIT) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Endpoints: captions from any OpenAI-compatible server (vLLM, llama.cpp, a hosted one). Needs neither torch nor transformers.

Why not the `openai` client: its waits between retries cannot be interrupted, so Ctrl-C or a refused key would wait for all threads;
it reads answers of any size into memory; and it hides retries, which are counted here. With its retries switched off, all that
remains is one POST request, the few lines of `_post`.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tokun.utils.errors import BadSample, UserError

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})  # statuses worth a retry
FATAL = {401: "the key is not accepted", 402: "payment is required", 403: "the key lacks permission", 404: "no such model or address"}
OPTIONAL = ("response_format", "max_completion_tokens", "max_tokens", "temperature", "seed")
MAX_ANSWER_BYTES = 8 * 2**20
LONGEST_WAIT = 60.0  # seconds between two requests
MAX_MESSAGE = 300  # characters of a server's message that are quoted


class EndpointError(BadSample):
    """Why one row got no answer: a short reason, which is counted; `message` is the server's."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(reason)
        self.message = message


class EndpointRefusal(UserError):
    """An error that affects every row: a wrong key, model or address."""


@dataclass(frozen=True)
class Reply:
    """An answer, the server's token counts (0 if not given), and why the text cannot be used ("" if it can)."""

    text: str
    model: str = ""
    """The model the server reports: a hosted name may stand for many versions."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fault: str = ""


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a redirected POST would lose its body and send the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass
class Endpoint:
    """One OpenAI-compatible chat server. Thread-safe.

    Options that the server rejects (`response_format`, `seed`, …) are left out from then on and listed in `without`.
    """

    url: str
    """The server's base address (http://localhost:8000/v1) or that of its chat/completions."""
    model: str
    key: str = field(default="", repr=False)
    """Sent as a bearer token; never in a message or file."""
    timeout: float = 120.0
    """Timeout of one answer, in seconds."""
    tries: int = 6
    """Most requests for one answer."""
    pause: float = 1.0
    """Seconds before the second request, doubled before each further one."""
    without: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)  # requests, retries

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint {public_url(self.url)!r} is not a web address: give one like http://localhost:8000/v1")
        if parts.username or parts.password:
            raise UserError("--endpoint contains a user name and password: put the key into the variable of --api-key-env instead")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._address = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        self._opener = urllib.request.build_opener(NoRedirects)
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """Interrupt the waits of all threads: their answers are no longer needed."""
        self._stopped.set()

    def ask(
        self, prompt: str, *, image: Image.Image | None = None, schema: dict[str, Any] | None = None,
        seed: int = 0, temperature: float = 0.0, max_tokens: int = 512,
    ) -> Reply:  # fmt: skip
        """Send one question, with retries. Raises EndpointError for this row, EndpointRefusal if every row would fail."""
        content: Any = prompt
        if image is not None:
            content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": prompt}]
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens, "temperature": temperature, "seed": seed,
        }  # fmt: skip
        if schema is not None:
            named = {"name": "captions", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return self._retried(body, random.Random(seed))

    def _retried(self, body: dict[str, Any], rng: random.Random) -> Reply:
        tried = 0
        while True:
            sent, wait = self._without_rejected(body), None
            try:
                return read_completion(self._post(sent))
            except urllib.error.HTTPError as error:
                message, wait = self._message(error), error.headers.get("Retry-After")
                if self._leave_out(sent, error.code, message):
                    continue  # does not count as a try: the next request differs
                problem = self._error_for(error.code, message)
            except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
                late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
                problem = EndpointError("endpoint timed out" if late else "endpoint unreachable", str(error))
            except ValueError as error:
                problem = EndpointError("endpoint sent no chat completion", str(error))
            tried += 1
            if tried >= self.tries or self._stopped.wait(self._pause(tried, wait, rng)):
                raise problem
            self._count("retries")

    def _error_for(self, status: int, message: str) -> EndpointError:
        """The error to keep if a retry is worthwhile. Otherwise raises it: EndpointError or EndpointRefusal."""
        if status in FATAL:
            way_out = "" if self.key or status != 401 else ". No key was given: set the environment variable named by --api-key-env"
            reason = f"{FATAL[status]} (model {self.model}){way_out}: {message}"
            raise EndpointRefusal(f"--endpoint {public_url(self.url)} answers {status}, {reason}")
        error = EndpointError(f"endpoint answers {status}", message)
        if status not in PASSING:
            raise error
        return error

    def _pause(self, tried: int, wait: str | None, rng: random.Random) -> float:
        """Seconds until the next request: as the server asks, or doubled each time, with jitter of up to a half."""
        asked = float(wait) if wait is not None and wait.isdecimal() else 0.0  # a date is ignored
        return min(LONGEST_WAIT, max(asked, self.pause * 2 ** (tried - 1) * (1 + rng.random() / 2)))

    def _post(self, body: dict[str, Any]) -> bytes:
        self._count("requests")
        headers = {"Content-Type": "application/json", "User-Agent": "tokun"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            return response.read(MAX_ANSWER_BYTES)

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def _without_rejected(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request without the options that this server has rejected."""
        fitting = {name: value for name, value in body.items() if name not in self.without}
        if "max_tokens" in self.without and "max_completion_tokens" not in self.without:
            fitting["max_completion_tokens"] = 4096  # reasoning models count their thoughts too
        return fitting

    def _leave_out(self, sent: dict[str, Any], status: int, message: str) -> bool:
        """Whether the server rejected an optional field of this request; it is left out from now on."""
        named = message.replace("json_schema", "response_format")
        refused = [name for name in OPTIONAL if name in sent and name in named] if status in (400, 422) else []
        with self._lock:
            self.without.update(refused[:1])
        return bool(refused)

    def _message(self, error: urllib.error.HTTPError) -> str:
        """The server's error message, shortened and without the key, which some servers repeat."""
        try:
            with error:
                text = " ".join(error.read(MAX_ANSWER_BYTES).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException):
            text = ""
        return (text.replace(self.key, "***") if self.key else text)[:MAX_MESSAGE]


def read_completion(data: bytes) -> Reply:
    """The answer in a chat completion. Raises ValueError if it is not JSON, BadSample (a ValueError) if it is other JSON."""
    try:
        tree = json.loads(data)
        choice = tree["choices"][0]
        content, refused = choice["message"].get("content"), choice["message"].get("refusal")
        cut = choice.get("finish_reason") == "length"
    except (RecursionError, LookupError, TypeError, AttributeError) as error:
        raise BadSample("it is not a chat completion") from error
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    fault = "refusal" if refused else "answer truncated" if cut else ""
    asked, answered = (whole_number(tree.get("usage"), name) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(content if isinstance(content, str) else "", str(tree.get("model") or ""), asked, answered, fault)


def whole_number(tree: Any, name: str) -> int:
    value = tree.get(name) if isinstance(tree, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def public_url(url: str) -> str:
    """An address without its possibly secret parts: user name, password and query."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

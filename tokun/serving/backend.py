"""A model whose pairs are drawn by a vLLM server: the ids come over HTTP, everything else is done here.

    model = served(tokun.load("runs/engraving"), "http://localhost:8000")
    pairs = model.sample(42, n=16)          # the ids of tokun.load("runs/engraving").sample(42, n=16, guidance_scale=1)

The server is `vllm serve` with our logits processor (docs/guides/serving.md). It gets the uniforms of each pair, which determine its
choices. Likelihoods are computed here, and so are words with text guidance, captions, completions and inversions. Guidance of pictures
would need two streams per request, which vLLM does not have: it is refused.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tokun.inference.model import DrawnSequence, Tokun, Watch
from tokun.inference.token_choice import Choice, DecodingSettings
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags
from tokun.utils.errors import UserError, first_line

CLIENTS = 32  # requests at a time
START = "vllm serve CHECKPOINT/generator --logits-processors tokun.serving.processor:SpanProcessor --no-async-scheduling"


@dataclass
class Server:
    """A vLLM server with one generator. Raises UserError for an invalid address and for a server that cannot be reached."""

    url: str
    """Its address: http://localhost:8000, with or without /v1."""
    timeout: float = 300.0
    """Seconds to wait for (more of) an answer."""
    name: str = ""
    """The model's name on the server."""

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--backend {self.url!r} is not a web address: give one like http://localhost:8000")
        self.base = self.url.rstrip("/").removesuffix("/v1") + "/v1"
        with self.answer("models") as response:
            found = json.load(response)
        try:
            self.name = self.name or found["data"][0]["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"--backend {self.url} names no model at {self.base}/models: start it with `{START}`") from error

    @contextmanager
    def answer(self, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        """The open response. Raises UserError with the server's words if it refuses, or cannot be reached."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}/{path}", content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                yield response
        except urllib.error.HTTPError as error:
            reason = error.read(2000).decode("utf-8", "replace")
            raise UserError(f"--backend {self.url} answers {error.code}: {reason[:300]}") from error
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"--backend {self.url} cannot be reached ({first_line(error)}): start it with `{START}`") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--backend {self.url} does not answer as vLLM does ({first_line(error)}): start it with `{START}`") from error

    def complete(
        self, prompt: Sequence[int], most: int, extra: dict[str, Any], report: Callable[[list[int]], None] | None = None
    ) -> list[int]:
        """The ids that follow the prompt, at most `most`. `report` is called with all ids so far whenever some arrive."""
        body = {
            "model": self.name,
            "prompt": list(prompt),
            "max_tokens": most,
            "temperature": 1.0,
            "return_token_ids": True,
            "vllm_xargs": extra,
            "stream": report is not None,
        }
        if report is None:
            with self.answer("completions", body) as response:
                return list(json.load(response)["choices"][0]["token_ids"])
        ids: list[int] = []
        for more in self.streamed(body):  # outside `answer`: an error of `report` is not the server's
            ids += more
            report(ids)
        return ids

    def streamed(self, body: dict[str, Any]) -> Iterator[list[int]]:
        """The ids of an answer as they arrive."""
        with self.answer("completions", body) as response:
            for line in response:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    tree = json.loads(data)
                    if "error" in tree:
                        raise UserError(f"--backend {self.url}: {tree['error']}")
                    yield [i for choice in tree["choices"] for i in choice.get("token_ids") or []]


class Served(Tokun):
    """A Tokun whose pairs are drawn by a server. Made by `served`."""

    server: Server

    def sequences_from(
        self,
        u: Tensor,
        tags: Sequence[Tags],
        how: DecodingSettings,
        *,
        caption: list[int] | None = None,
        forced: Tensor | None = None,
        watch: Watch | None = None,
    ) -> list[DrawnSequence]:
        """As `Tokun.sequences_from`. Raises UserError for guidance of pictures, for an adapter, and for a server that cannot be reached or
        does not draw pairs of this model."""
        if forced is not None:  # the server takes no given ids
            return super().sequences_from(u, tags, how, caption=caption, forced=forced, watch=watch)
        if how.guidance_scale != 1:
            raise UserError(
                f"guidance_scale is {how.guidance_scale:g}, but a vLLM server draws pictures without guidance: "
                "leave it at 1, or draw without --backend"
            )
        if self.adapter:
            raise UserError(
                f"the adapter {self.adapter} is not on the server {self.server.url}: "
                "draw without --backend, or serve a checkpoint it is merged into"
            )
        v = self.vocabulary
        guided = how.text_guidance_scale != 1 and caption is None
        prompts = [sequences.image_prompt(v, t, caption) for t in tags]
        counts = [v.n_codes(prompt) for prompt in prompts]
        positions = self.generator.config.max_position_embeddings
        most = [
            n + 1 if guided else min(positions, sequences.longest_from(v, len(prompt), n)) - len(prompt)
            for prompt, n in zip(prompts, counts)
        ]
        extra = asked(how.image, how.text)

        def draw(row: int) -> list[int]:
            report, prompt = None, prompts[row]
            if watch is not None and row == 0:
                reporting = self._reporting(watch, len(prompt))
                report = lambda ids: reporting(torch.tensor([[*prompt, *ids]]))  # noqa: E731
            answer = self.server.complete(prompt, most[row], {**extra, "tokun_uniforms": pack(u[row])}, report)
            return self.checked([*prompt, *answer], len(prompt), counts[row], whole=not guided)

        pool = ThreadPoolExecutor(min(CLIENTS, len(prompts)))
        try:
            made = list(pool.map(draw, range(len(prompts))))
        finally:
            pool.shutdown(cancel_futures=True)
        if guided:
            made = self.worded(made, u, tags, how)
        both = self.both_nll(made)
        return [DrawnSequence(ids, drawn, written if caption is None else 0.0, 0.0) for ids, (drawn, written) in zip(made, both)]

    def checked(self, ids: list[int], prompt: int, n_codes: int, *, whole: bool) -> list[int]:
        """The ids, if they are a pair or (without `whole`) its beginning up to the end of its picture. Raises UserError otherwise."""
        v = self.vocabulary
        good = sequences.is_picture(v, ids[prompt:], n_codes)
        try:
            if good and whole:
                sequences.unpack_pair(v, ids)
        except UserError:
            good = False
        if not good:
            raise UserError(
                f"--backend {self.server.url} answered {ids[prompt : prompt + 4]} …, {len(ids) - prompt} ids, "
                f"which are no picture and words of this model: it serves another checkpoint, or was not started with `{START}`"
            )
        return ids

    def worded(self, drawn: list[list[int]], u: Tensor, tags: Sequence[Tags], how: DecodingSettings) -> list[list[int]]:
        """Write the words of drawn pictures here, with text guidance."""
        made, v = list(drawn), self.vocabulary
        for shape in sorted({(len(ids), len(t.names())) for ids, t in zip(drawn, tags)}):
            rows = [i for i, ids in enumerate(drawn) if (len(ids), len(tags[i].names())) == shape]
            alone = [sequences.prefix(v, tags[i]) for i in rows]
            out = self.generate([drawn[i] for i in rows], u[rows], how, unconditional_text=alone)
            for i, ids in zip(rows, out.ids.tolist()):
                made[i] = ids
        return made


def served(model: Tokun, url: str) -> Served:
    """The model, with its pairs drawn by the server at `url`. Pictures are drawn without guidance, and requests for it are refused. Its
    own number of candidates is 1.

    Raises UserError for a server that cannot be reached, and for a model with an adapter.
    """
    if model.adapter:
        raise UserError(f"--backend {url} knows no adapter, and the model uses {model.adapter}: leave one of them out")
    made = Served(**{each.name: getattr(model, each.name) for each in fields(Tokun)})
    made.defaults = replace(model.defaults, guidance_scale=1.0, best_of=1)
    made.server = Server(url)
    return made


def asked(image: Choice, text: Choice) -> dict[str, Any]:
    """The extra arguments of a request that determine how its ids are chosen."""
    return {
        "tokun_temperature": image.temperature,
        "tokun_text_temperature": text.temperature,
        "tokun_top_k": image.top_k,
        "tokun_top_p": image.top_p,
        "tokun_no_repeats": int(text.no_repeats),
    }


def pack(u: Tensor) -> str:
    """The uniforms (slots,) as text, for `tokun_uniforms`."""
    return base64.b64encode(u.detach().cpu().numpy().astype("<f4").tobytes()).decode()

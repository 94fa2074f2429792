"""Settings of a captioning run: those its captions depend on, and how the work is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from data_tools import captioning as captioners
from data_tools.captioning import registers
from data_tools.captioning.journals import sha256
from data_tools.captioning.registers import FACTS
from tokun.utils.errors import UserError, require_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide the captions. Stored with the rows; a folder started with other settings is refused."""

    registers: tuple[str, ...] = ("plain",)
    """The registers to write."""
    hashtags: bool = True
    """Social captions end in hashtags."""
    hints: tuple[str, ...] = FACTS
    """The metadata included in prompts."""
    model: str = ""
    """The captioner: a Hub id or folder."""
    revision: str = ""
    """Its commit or tag on the Hub."""
    shape: str = "auto"
    """caption, task or chat; auto: from the model's type."""
    task: str = ""
    """The prompt of a task model, instead of its default."""
    rewriter: str = ""
    """The language model that rewrites captions: a Hub id or folder."""
    endpoint: str = ""
    """The address of an OpenAI-compatible server."""
    endpoint_model: str = ""
    """The model's name on the server."""
    send_pictures: bool = True
    """The server gets the pictures if there is no captioner; otherwise it gets only text."""
    seed: int = 0
    temperature: float = 0.0
    max_new_tokens: int = 96
    dtype: str = "auto"
    image_side: int = 768
    """Longest side of the pictures that models get, in pixels."""

    def __post_init__(self) -> None:
        for name in self.hints:
            if name not in FACTS:
                raise UserError(f"--hints names {name!r}: give some of {', '.join(FACTS)}, or none")
        if self.rewriter and self.endpoint:
            raise UserError("--rewriter and --endpoint both rewrite captions: give only one of them")
        if self.endpoint and not self.endpoint_model:
            raise UserError("--endpoint needs --endpoint-model, the model's name on the server")
        if self.shape not in ("auto", *captioners.SHAPES):
            raise UserError(f"--shape {self.shape!r} is unknown: give auto, {', '.join(captioners.SHAPES)}")
        if self.image_side < 16:
            raise UserError(f"--image-side {self.image_side} must be 16 pixels or more")
        if not 0 <= self.temperature <= 5:
            raise UserError(f"--temperature {self.temperature} is outside 0..5")
        self.generation()

    def generation(self, device: str = "auto") -> captioners.Generation:
        return captioners.Generation(device=device, dtype=self.dtype, max_new_tokens=self.max_new_tokens)

    def recorded(self) -> dict[str, Any]:
        """As stored in the record: without passwords or local paths, with a hash of all prompts and templates."""
        tree: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        tree["endpoint"] = captioners.public_url(self.endpoint) if self.endpoint else ""
        for name in ("model", "rewriter"):
            tree[name] = captioners.short_name(tree[name]) if tree[name] else ""
        words = [registers.frame(self.registers, hashtags=self.hashtags), *(registers.TEMPLATES[name] for name in self.registers)]
        return {**tree, "prompts_sha256": sha256("\n".join(words))}


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done; this may change between runs."""

    batch_size: int = 16
    """Pictures per batch of a local model."""
    concurrency: int = 16
    """Concurrent requests to a server."""
    device: str = "auto"
    clip: str = ""
    """The open_clip model that scores captions."""
    keep_best: float = 1.0
    """Share of the pictures to keep, by CLIP score."""
    limit: int = 0
    """Rows to caption, over all shards in order; 0: all."""
    retry_failed: bool = False
    api_key: str = field(default="", repr=False)
    timeout: float = 120.0
    tries: int = 6
    pause: float = 1.0
    """Seconds before the second request for an answer; longer before each further one."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Prices per million tokens of prompts and of answers."""

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "concurrency", "tries")
        if self.limit < 0:
            raise UserError(f"--limit {self.limit} must be 0 (all) or more")
        if not 0 < self.keep_best <= 1:
            raise UserError("--keep-best takes a share above 0 and up to 100%")
        if self.keep_best < 1 and not self.clip:
            raise UserError("--keep-best needs --clip, the model that scores captions")

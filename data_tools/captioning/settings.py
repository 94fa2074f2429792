"""What is asked of a captioning run: what its captions depend on, and how the work is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from data_tools import captioning as captioners
from data_tools.captioning import registers
from data_tools.captioning.journal import sha256
from data_tools.captioning.registers import FACTS
from tokun.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the words. Kept with the rows; a folder begun with other settings is refused."""

    registers: tuple[str, ...] = ("plain",)
    """The registers to write."""
    hashtags: bool = True
    """Social captions end in hashtags."""
    hints: tuple[str, ...] = FACTS
    """The metadata that prompts tell of a picture."""
    model: str = ""
    """The captioner: a Hub id or folder."""
    revision: str = ""
    """Its commit or tag on the Hub."""
    shape: str = "auto"
    """caption, task or chat; auto: as the model's type tells."""
    task: str = ""
    """The task prompt of a task model, instead of its usual one."""
    rewriter: str = ""
    """The language model that writes registers from words: a Hub id or folder."""
    endpoint: str = ""
    """The address of an OpenAI-compatible server."""
    endpoint_model: str = ""
    """The name of the model there."""
    send_pictures: bool = True
    """The server sees the pictures, where no captioner does; else it gets words alone."""
    seed: int = 0
    temperature: float = 0.0
    max_new_tokens: int = 96
    dtype: str = "auto"
    image_side: int = 768
    """Pixels of the longer side of the pictures that models get, at most."""

    def __post_init__(self) -> None:
        for name in self.hints:
            if name not in FACTS:
                raise UserError(f"--hints names {name!r}: give some of {', '.join(FACTS)}, or none")
        if self.rewriter and self.endpoint:
            raise UserError("--rewriter and --endpoint both write registers: give one of them")
        if self.endpoint and not self.endpoint_model:
            raise UserError("--endpoint needs --endpoint-model, the name of the model there")
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
        """As it stands in the record: no password, no path of this machine, and a hash of all prompts and templates."""
        tree = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        tree["endpoint"] = captioners.public_url(self.endpoint) if self.endpoint else ""
        for name in ("model", "rewriter"):
            tree[name] = captioners.short_name(tree[name]) if tree[name] else ""
        words = [registers.frame(self.registers, hashtags=self.hashtags), *(registers.TEMPLATES[name] for name in self.registers)]
        return {**tree, "prompts_sha256": sha256("\n".join(words))}


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done, which may change from run to run."""

    batch_size: int = 16
    """Pictures at a time for a local model."""
    concurrency: int = 16
    """Requests under way at a server."""
    device: str = "auto"
    clip: str = ""
    """The open_clip model that scores captions."""
    keep_best: float = 1.0
    """Share of the pictures to keep, by their CLIP scores."""
    limit: int = 0
    """Rows to caption, of all shards in order; 0: all."""
    retry_failed: bool = False
    api_key: str = field(default="", repr=False)
    timeout: float = 120.0
    tries: int = 6
    pause: float = 1.0
    """Seconds before the second request for an answer; longer before each further one."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens in the prompt, and in the answer."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "tries"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more")
        if self.limit < 0:
            raise UserError(f"--limit {self.limit} must be 0 (all) or more")
        if not 0 < self.keep_best <= 1:
            raise UserError("--keep-best takes a share above 0 and up to 100%")
        if self.keep_best < 1 and not self.clip:
            raise UserError("--keep-best needs --clip, the model that scores captions")

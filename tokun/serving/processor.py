"""`RequestGrammar` behind vLLM's interface: a custom logits processor for its V1 model runner.

    vllm serve runs/engraving/checkpoint/generator --logits-processors tokun.serving.processor:SpanProcessor --no-async-scheduling

Extra arguments of a request (`extra_args`; `vllm_xargs` over HTTP):

    tokun_seed, tokun_index    the sample of that seed; or
    tokun_uniforms             the uniforms that choose, float32, little-endian, in base64
    tokun_temperature …        with either: `grammar.changed`; the default is the checkpoint's

A request without the first three is sampled by vLLM within the grammar, with the request's settings. Interface:
vllm.v1.sample.logits_processor, documented in vLLM's "Custom Logits Processors". docs/guides/serving.md lists what was run.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# vllm is not in the extra `all`
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality  # pyright: ignore[reportMissingImports]

from tokun.inference import latents
from tokun.inference.token_choice import DecodingSettings
from tokun.serving.grammar import RequestGrammar, RowState, changed
from tokun.utils.errors import UserError

SETTINGS = ("temperature", "text_temperature", "top_k", "top_p", "no_repeats")


class SpanProcessor(LogitsProcessor):
    """Keeps the state of each row in vLLM's batch, and masks its logits."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
        self.grammar = RequestGrammar.of_checkpoint(Path(vllm_config.model_config.model).parent)  # beside generator/
        self.rows: dict[int, RowState] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises UserError for an invalid seed or index, or another invalid extra argument of tokun's."""
        sample = sample_of(sampling_params)
        if "seed" in sample:
            latents.draw(sample["seed"], [sample["index"]], 1)
        changed(DecodingSettings(), **settings_of(sampling_params))

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow changes of the batch: requests removed, then added, then moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, written in batch_update.added:
            settings = changed(self.grammar.settings, **settings_of(params))
            self.rows[index] = self.grammar.row(prompt or [], written, **sample_of(params), settings=settings)
        for one, other, direction in batch_update.moved:
            moved, there = self.rows.pop(one, None), self.rows.pop(other, None)
            self.rows |= {} if moved is None else {other: moved}
            self.rows |= {one: there} if direction is MoveDirectionality.SWAP and there is not None else {}

    def apply(self, logits: Tensor) -> Tensor:
        places = sorted(self.rows)
        if places:
            logits[places] = self.grammar.apply(logits[places], [self.rows[place] for place in places])
        return logits


def sample_of(sampling_params: Any) -> dict[str, Any]:
    """The seed and index that a request asks for, or its uniforms, or {}."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    if "tokun_seed" in extra:
        return {"seed": extra["tokun_seed"], "index": extra.get("tokun_index", 0)}
    return {"u": unpack(extra["tokun_uniforms"])} if "tokun_uniforms" in extra else {}


def settings_of(sampling_params: Any) -> dict[str, Any]:
    """The settings of how ids are chosen that a request gives."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    return {name: extra[f"tokun_{name}"] for name in SETTINGS if f"tokun_{name}" in extra}


def unpack(text: object) -> Tensor:
    """The uniforms in `tokun_uniforms`, float32 (slots,). Raises UserError for anything else."""
    try:
        u = np.frombuffer(base64.b64decode(str(text), validate=True), "<f4").astype(np.float32)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"tokun_uniforms is not base64 of float32 numbers ({error})") from error
    if not len(u) or not ((u >= 0) & (u < 1)).all():
        raise UserError("tokun_uniforms holds no numbers, or some outside 0 … 1")
    return torch.from_numpy(u)

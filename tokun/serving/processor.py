"""`Grammar` behind vLLM's interface: a custom logits processor for its V1 model runner.

    vllm serve runs/engraving/checkpoint/generator --logits-processors tokun.serving.processor:SpanProcessor --no-async-scheduling

A request with `tokun_seed` (and `tokun_index`) in its extra arguments gets exactly that sample; others are sampled by vLLM within
the grammar, with the request's settings. Interface: vllm.v1.sample.logits_processor, documented in vLLM's "Custom Logits
Processors". Not yet run with vLLM itself: see docs/guides/serving.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality  # pyright: ignore[reportMissingImports]  # not in the extra all

from tokun.inference import latents
from tokun.serving.grammar import Grammar, RowState


class SpanProcessor(LogitsProcessor):
    """Keeps a row for each position in vLLM's batch, and masks its logits."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
        self.grammar = Grammar.of_checkpoint(Path(vllm_config.model_config.model).parent)  # beside generator/
        self.rows: dict[int, RowState] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises UserError for an invalid seed or index."""
        sample = sample_of(sampling_params)
        if sample:
            latents.draw(sample["seed"], [sample["index"]], 1)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow changes of the batch: requests removed, then added, then moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, written in batch_update.added:
            self.rows[index] = self.grammar.row(prompt or [], written, **sample_of(params))
        for one, other, direction in batch_update.moved:
            moved, there = self.rows.pop(one, None), self.rows.pop(other, None)
            self.rows |= {} if moved is None else {other: moved}
            self.rows |= {one: there} if direction is MoveDirectionality.SWAP and there is not None else {}

    def apply(self, logits: Tensor) -> Tensor:
        places = sorted(self.rows)
        if places:
            logits[places] = self.grammar.apply(logits[places], [self.rows[place] for place in places])
        return logits


def sample_of(sampling_params: Any) -> dict[str, int]:
    """The seed and index that a request asks for, or {}."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    return {"seed": extra["tokun_seed"], "index": extra.get("tokun_index", 0)} if "tokun_seed" in extra else {}

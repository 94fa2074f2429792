"""The generator's loss on a micro batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokun.models import losses
from tokun.models.generator import fuse_loss_into_forward, head_is_last, loss_chunk
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training.engine import Engine


class TokenLoss:
    """The generator's loss on a micro batch: over all its logits at once, or in chunks if the logits would dominate the memory."""

    def __init__(
        self, model: Any, vocabulary: Vocabulary, *, rows: int, length: int, chunk: int, compile: bool, say: Callable[[str], None]
    ):
        self.size, self.is_image = vocabulary.size, vocabulary.is_image
        self.losses = _compiled_for_training(losses.next_token_losses) if compile else losses.next_token_losses
        chunk = loss_chunk(chunk, positions=rows * length, size=self.size, device="cuda" if torch.cuda.is_available() else "cpu")
        self.fused = head_is_last(model)  # the loss is computed in the model's forward pass
        if self.fused:
            fuse_loss_into_forward(model, size=self.size, chunk=chunk, token_losses=self.losses)
        elif chunk:
            say(
                f"generator: {type(model).__name__} does more to its logits than its output embedding: "
                "the loss is computed over all of them at once"
            )

    def __call__(
        self, engine: Engine, model: Any, input_ids: Tensor, labels: Tensor, weights: Tensor | None = None, aligned: Sequence[Tensor] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the parts of `losses.next_token_losses`.

        model: the engine's for gradients, else the bare one
        input_ids, labels: (B, T) on the CPU
        weights: (terms,) of `losses.TERMS` on the engine's device; None: all one
        aligned: targets of the model's alignment head, and their weight
        """
        ids = input_ids.to(engine.device, non_blocking=True)
        self.is_image = is_image = self.is_image.to(engine.device)
        weights = torch.ones(len(losses.TERMS), device=engine.device) if weights is None else weights
        cast = engine.autocast if model is engine.model else engine.autocast_bare
        if self.fused:
            # computed on the CPU, so that the device need not wait
            targets = (t.to(engine.device, non_blocking=True) for t in labelled(labels))
            with cast():
                on_device = tuple(t.to(engine.device, non_blocking=True) for t in aligned)
                return model(input_ids=ids, use_cache=False, targets=(*targets, is_image, weights), aligned=on_device)
        with cast():
            logits = model(input_ids=ids, use_cache=False).logits[..., : self.size]
        parts = self.losses(logits, labels.to(engine.device, non_blocking=True), is_image)
        return losses.weighted_loss(parts, weights), parts


def labelled(labels: Tensor, *, multiple: int = 64) -> tuple[Tensor, Tensor]:
    """labels (B, T) -> positions (N,) of labels in the flattened batch, and these labels (N,).

    N is padded to a multiple by position 0 without a label: a new length costs as much as its logits, since on a CPU oneDNN
    compiles its matrix products for each.
    """
    flat = labels.flatten()
    positions = (flat != losses.IGNORE).nonzero()[:, 0]
    filling = -len(positions) % multiple
    return F.pad(positions, (0, filling)), F.pad(flat[positions], (0, filling), value=losses.IGNORE)


def _compiled_for_training(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when gradients are enabled; evaluation is too short to be worth compiling."""
    fast = torch.compile(function, dynamic=True)
    return lambda *arguments: (fast if torch.is_grad_enabled() else function)(*arguments)

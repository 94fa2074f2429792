"""Alignment of the generator's features with those of an image network.

While the generator draws a picture, a middle layer predicts the network's features of it. These features (`training.feature_alignment`) are
targets for a small head on the hidden states at every code: those of the whole picture, and those of the code's place, by cosine
similarity. REPA (Yu et al. 2025) aligns diffusion models in this way. The head is trained with the generator and is not saved with it: what
remains is an ordinary causal LM. Knows no files and no vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

WHOLE, PLACE = 128, 64  # numbers that describe a picture, and a place in it
HEAD = "alignment"  # the head's name in the generator


class AlignmentHead(nn.Module):
    """hidden states of width D -> WHOLE + PLACE numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, WHOLE + PLACE))
        self._hidden: Tensor | None = None

    def watch(self, layer: nn.Module) -> None:
        """From now on keep what the layer returns in training, for one call of `forward`. After `compile_layers`."""

        def keep(output: Any) -> Any:
            if layer.training:
                self._hidden = output[0] if isinstance(output, tuple) else output
            return output

        compiled = layer._compiled_call_impl
        if compiled is None:
            layer.register_forward_hook(lambda _layer, _inputs, output: keep(output))
        else:  # a hook would be compiled with the layer
            layer._compiled_call_impl = lambda *inputs, **options: keep(compiled(*inputs, **options))

    def forward(self, positions: Tensor, whole: Tensor, place: Tensor) -> Tensor:
        """positions (N,) into the flattened hidden states (B, T, D) of the watched layer, targets (N, WHOLE) and (N, PLACE) -> the sum of
        1 - cosine similarity over the positions, the mean of both targets."""
        assert self._hidden is not None, "the watched layer has not run"
        rows, self._hidden = self._hidden.flatten(0, 1).index_select(0, positions), None
        found = self.layers(rows).float()
        alike = F.cosine_similarity(found[:, :WHOLE], whole, dim=1) + F.cosine_similarity(found[:, WHOLE:], place, dim=1)
        return (1 - alike / 2).sum()


def attach(model: Any) -> AlignmentHead:
    """Give the generator a head, with weights from torch's global generator. Before its optimizer is made."""
    model.add_module(HEAD, AlignmentHead(model.config.hidden_size))
    return getattr(model, HEAD)


def watched_layer(model: Any, number: int) -> nn.Module:
    """Layer `number` of the generator, from 1; 0: five eighths of the way. The hidden states are those after it."""
    layers = model.base_model.layers
    return layers[(number or max(1, round(len(layers) * 5 / 8))) - 1]


def without_head(model: Any) -> Any:
    """The same generator, its weights shared, without its head: what is sampled and saved."""
    if HEAD not in model._modules:
        return model
    other = copy.copy(model)
    other._modules = {name: module for name, module in model._modules.items() if name != HEAD}
    return other

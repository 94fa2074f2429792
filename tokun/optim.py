"""Optimizers and schedules: parameter groups, AdamW, warm-up and cosine, the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and convolutions; none for norms and biases, nor for embeddings' one-dimensional kin."""
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_adamw(module: nn.Module, *, lr: float, betas: Iterable[float], weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(module, weight_decay), lr=lr, betas=tuple(betas), fused=True)


def warmup_cosine(step: int, *, progress: float, warmup: int, min_ratio: float = 0.05) -> float:
    """The factor on the learning rate: a linear warm-up over `warmup` steps, times a cosine from 1 to `min_ratio` as
    `progress` goes from 0 to 1 (share of the steps, or of the time where that runs out first)."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    return warm * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """Exponential moving average of the parameters in float32 (buffers are left alone). The decay warms up as (1 + t) / (10 + t)."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.step = 0
        self.shadow = {name: tensor.detach().clone().float() for name, tensor in _floats(module)}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        live = dict(_floats(module))
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [live[name].detach().float() for name in self.shadow], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, tensor in _floats(module):
            tensor.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step), **self.shadow}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        for name, tensor in self.shadow.items():
            tensor.copy_(state[name])


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in module.named_parameters() if p.is_floating_point()]

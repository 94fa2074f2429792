"""Optimizers and schedules: parameter groups, AdamW, Muon, warm-up and cosine, the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokun.models.partitioned_parameters import collected, own_share, share_of
from tokun.utils.errors import UserError


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and convolutions; none for norms, biases and other one-dimensional parameters."""
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_adamw(module: nn.Module, *, lr: float, betas: Iterable[float], weight_decay: float) -> torch.optim.AdamW:
    first, second = betas
    return torch.optim.AdamW(parameter_groups(module, weight_decay), lr=lr, betas=(first, second), fused=True)


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings, norms and biases, as one optimizer.

    Both parts are torch's own; the step of a matrix is scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for
    LLM training"), so one learning rate and one weight decay serve both. It needs whole matrices: DDP, or DeepSpeed without ZeRO.
    """

    def __init__(self, module: nn.Module, *, lr: float, betas: Iterable[float], weight_decay: float):
        require("muon")
        embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        head = getattr(module, "lm_head", None)
        if head is not None:
            embeddings |= {id(p) for p in head.parameters()}
        matrices = [p for p in module.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in embeddings]
        mine = {id(p) for p in matrices}
        if not matrices:
            raise UserError("Muon trains matrices, and this model has none besides its embeddings; use adamw")
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) not in mine]} for group in parameter_groups(module, weight_decay)
        ]
        super().__init__([{"params": matrices}, *groups], {"lr": lr})
        first, second = betas
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=lr, betas=(first, second), fused=True),
        ]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def require(kind: str) -> None:
    """Raise UserError if this torch lacks the optimizer."""
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"train.optimizer muon needs torch 2.9 or newer, this is {torch.__version__}: update torch, or set train.optimizer=adamw"
        )


def make_optimizer(kind: str, module: nn.Module, *, lr: float, betas: Iterable[float], weight_decay: float) -> torch.optim.Optimizer:
    """`adamw` or `muon` by name."""
    make = {"adamw": make_adamw, "muon": Muon}[kind]
    return make(module, lr=lr, betas=betas, weight_decay=weight_decay)


def warmup_cosine(step: int, *, progress: float, warmup: int, min_ratio: float = 0.05, hold: float = 0.0) -> float:
    """The factor on the learning rate: a linear warm-up over `warmup` steps, times a cosine from 1 to `min_ratio` as
    `progress` goes from `hold` to 1 (share of the steps, or of the time if that runs out first). Before `hold` the cosine stays at 1."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    fallen = max(0.0, min(1.0, progress) - hold) / (1 - hold)
    return warm * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * fallen)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """Exponential moving average of the parameters that are trained, in float32 (buffers are left alone).

    The decay warms up as (1 + t) / (10 + t). With `every` > 1 only each `every`-th update reads the weights, with the decay of all updates
    since: the average forgets as fast. Under ZeRO-3 each process averages its own share of each parameter, on the share's device; saved
    tensors are whole.
    """

    def __init__(self, module: nn.Module, decay: float, *, every: int = 1):
        assert every > 0, every
        self.decay, self.every = decay, every
        self.step = 0
        self.parameters = dict(_floats(module))
        self.shadow = {name: own_share(p).detach().clone().float() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.step += 1
        if self.step % self.every:
            return
        decay = math.prod(min(self.decay, (1 + t) / (10 + t)) for t in range(self.step - self.every + 1, self.step + 1))
        live = dict(_floats(module))
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [own_share(live[name]).detach().float() for name in self.shadow], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]  # no public name

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, p in _floats(module):
            own_share(p).copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors by name. Under ZeRO-3 it is a collective call, and only rank 0 gets them."""
        return {"step": torch.tensor(self.step), **collected(self.shadow, self.parameters)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        for name, tensor in self.shadow.items():
            tensor.copy_(share_of(state[name], self.parameters[name]))


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in module.named_parameters() if p.is_floating_point() and p.requires_grad]

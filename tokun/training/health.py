"""Monitoring of a training run: gradient spikes, the largest attention logit, utilisation, memory, requests to stop.

Knows models and numbers, no stage and no tracker.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokun.utils import launcher
from tokun.utils.errors import UserError


class Preempted(Exception):
    """The run was asked to stop and has saved what it needs to resume."""


CTRL_C = "Ctrl-C"
CAUSES = (
    "its launcher has ended",
    "SIGTERM",
    CTRL_C,
)  # of a request to stop; where several processes have several, the last of these counts


class StopRequest:
    """`asked` becomes true when SIGTERM or the first Ctrl-C arrives, and `by` names it; a second Ctrl-C raises KeyboardInterrupt.
    `agree` lets all processes have the same cause. `close` restores the signals' old handlers."""

    def __init__(self) -> None:
        self.asked, self.by, self._interrupted = False, "SIGTERM", False
        self._launchers, self._old = launcher.launchers(), {}
        # only the main thread may set handlers; elsewhere (notebooks' threads) the signals keep their defaults
        if threading.current_thread() is threading.main_thread():
            self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # elsewhere it is ignored: under nohup, in the background
                self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self.by, self._interrupted = CTRL_C, True
            if not int(os.environ.get("RANK", 0)):  # not `print`, which may be interrupted in the middle of another
                os.write(2, b"\nstops after this step and saves it. Ctrl-C again stops at once\n")
        self.asked = True

    def wanted(self) -> bool:
        """Whether to stop: this process was asked to, or its launcher has ended. Launchers do not pass every signal on."""
        if not self.asked and self._launchers and launcher.gone(self._launchers):
            self.asked, self.by = True, CAUSES[0]
        return self.asked

    def agree(self, largest: Callable[[int], int]) -> bool:
        """Whether any process is to stop.

        All of them then have the same cause. `largest`: of a number, the largest that any process has.
        """
        cause = largest(1 + CAUSES.index(self.by) if self.wanted() else 0)
        if cause:
            self.asked, self.by = True, CAUSES[cause - 1]
        return bool(cause)

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Spikes:
    """Detects spikes of the gradient norm: above `factor` times the 90 % quantile of the last `window` norms.

    Such a step is skipped (as in PaLM, section 5.1, which skips the batch). The first `warmup` steps are never spikes, and after
    `patience` spikes in a row the new level is accepted.
    """

    def __init__(self, factor: float, *, window: int = 200, warmup: int = 50, patience: int = 10) -> None:
        if factor and factor <= 1:
            raise UserError(f"train.spike_factor is {factor}; it must be 0 (off) or greater than 1, for example 5")
        self.factor, self.warmup, self.patience = factor, warmup, patience
        self.norms: deque[float] = deque(maxlen=window)
        self.count = self.row = 0

    def is_spike(self, norm: float) -> bool:
        """Whether to skip the step with this norm. Updates the state."""
        limit = self.limit()
        spike = limit is not None and norm > limit and self.row < self.patience
        self.row = self.row + 1 if spike else 0
        self.count += spike
        if not spike:
            self.norms.append(norm)
        return spike

    def limit(self) -> float | None:
        if not self.factor or len(self.norms) < self.warmup:
            return None
        return self.factor * sorted(self.norms)[int(0.9 * (len(self.norms) - 1))]

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "count": self.count, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.count, self.row = state["count"], state["row"]


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product on this device, the reference for utilisation. Measured once."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


PROBE = "tokun_probe"


@torch.no_grad()
def attention_logit_max(model: Any, input_ids: Tensor) -> float:
    """The largest attention logit (scaled, before the softmax) over all layers, heads and positions, for input_ids (B, T). Growing values
    precede divergence (Dehghani et al., 2023, section 2.1)."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: list[float] = []

    def probe(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        B, _, T, D = query.shape
        groups = query.reshape(B, key.shape[1], -1, T, D).float()  # (B, KV, H / KV, T, D)
        logits = groups @ key.float().unsqueeze(2).transpose(-1, -2) * (options.get("scaling") or D**-0.5)
        causal = torch.ones(T, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - T)
        found.append(logits.masked_fill(~causal, -torch.inf).max().item())
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(PROBE, probe)
    before = model.config._attn_implementation
    model.config._attn_implementation = PROBE
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        model.config._attn_implementation = before
    return max(found)

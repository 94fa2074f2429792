"""Memory of real training steps, to check the formulas of memory.py."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tokun.config import Config
from tokun.models.generator import add_dropout, make_generator, tune_for
from tokun.planner.sizes import generator_sizes
from tokun.training import optim
from tokun.training.engine import Engine
from tokun.training.token_loss import TokenLoss


def measure_memory(config: Config, *, micro: int) -> dict[str, float]:
    """Bytes of a real training step of `micro` random sequences of full length on this machine, using the training stage's own parts.

    weights, gradients, optimizer, ema: size of the tensors; saved: distinct storages kept for the backward pass; peak: the most
    allocated at once, by CUDA's allocator or, on a CPU, torch's profiler. A CPU, too, uses the attention of a GPU here, not the one
    for short sequences that it uses in training.
    """
    t, sizes = config.train, generator_sizes(config)
    V = sizes.shape.V
    ids, is_image = torch.randint(3, V, (micro, sizes.width)), torch.arange(V) >= V - config.image_tokenizer.codebook_size
    plain = make_generator(config.generator, vocab_size=V, max_length=2 * sizes.width, pad=0, bos=1, eos=2)
    add_dropout(plain, config.generator.dropout)
    if t.gradient_checkpointing:
        plain.gradient_checkpointing_enable()
    tune_for(plain, torch.device("cuda"))
    plain.train()
    vocabulary: Any = SimpleNamespace(size=V, is_image=is_image)  # all of it that the loss reads
    token_loss = TokenLoss(plain, vocabulary, rows=micro, length=sizes.width, chunk=t.loss_chunk, compile=False, say=print)
    engine = Engine(t, plain, micro, 1)
    device = engine.device
    own = engine.optimizer.optimizer  # without accelerate's wrapper
    ema = optim.Ema(plain, t.ema_decay)
    found: dict[str, float] = {}

    def forward() -> torch.Tensor:
        return token_loss(engine, engine.model, ids, ids, torch.tensor([1.0, 1.0, t.z_loss], device=device))[0]

    def step() -> None:
        engine.backward(forward())
        found["gradients"] = float(sum(p.grad.nbytes for p in plain.parameters()))
        engine.norm()
        engine.step()
        ema.update(plain)

    step()  # makes the optimizer's moments
    moments = [
        m for part in getattr(own, "parts", [own]) for entry in part.state.values() for m in entry.values() if torch.is_tensor(m) and m.ndim
    ]
    found["weights"] = float(sum(p.nbytes for p in plain.parameters()))
    found["optimizer"] = float(sum(m.nbytes for m in moments))
    found["ema"] = float(sum(m.nbytes for m in ema.shadow.values()))
    found["saved"] = saved_bytes(forward, exclude=plain.parameters())
    found["peak"] = found["weights"] + found["optimizer"] + found["ema"] + most_allocated(step, device)
    return found


def most_allocated(work: Callable[[], Any], device: torch.device) -> float:
    """The most bytes that `work` allocates on the device at once, besides what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    profiler: Any = record.profiler
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]")
    return float(max(itertools.accumulate(size for _, size in events), default=0))


class _Saved:
    """A tensor that autograd keeps for a backward pass, alive as long as it is kept."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Any], *, exclude: Any = ()) -> float:
    """Bytes of the distinct storages that `forward` keeps for its backward pass, except those of `exclude`."""
    own = {p.untyped_storage()._cdata for p in exclude}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()  # tensors consumed within `forward` drop out

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = forward()
    storages = {saved.tensor.untyped_storage()._cdata: saved.tensor.untyped_storage().nbytes() for saved in kept}
    total = float(sum(size for storage, size in storages.items() if storage not in own))
    del result
    return total

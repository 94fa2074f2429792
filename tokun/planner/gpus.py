"""GPUs: peak FLOPs, memory and links, from data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import takewhile

from tokun.utils.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """flops: dense bf16 peak; memory: as the driver reports it; link, network: speed to GPUs of its node and to other nodes, one way."""

    name: str
    flops: float
    memory: float
    link: float
    network: float


# Peaks without sparsity and link speeds (half of the two-way figure) from NVIDIA's data sheets: H100 (SXM), H200, HGX B200, A100 (SXM),
# L40S, L4, and the Ada architecture white paper (RTX 4090, float32 accumulation). The network is an assumption: one 400 Gb/s port a GPU on
# Hopper and Blackwell nodes, 200 Gb/s on A100 nodes, 25 Gb/s on machines with PCIe cards.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989e12, 79.6 * GIB, 450e9, 50e9),
        Gpu("H200", 989e12, 140.4 * GIB, 450e9, 50e9),
        Gpu("B200", 2250e12, 179 * GIB, 900e9, 50e9),
        Gpu("A100-80", 312e12, 80 * GIB, 300e9, 25e9),
        Gpu("A100-40", 312e12, 40 * GIB, 300e9, 25e9),
        Gpu("L40S", 362e12, 45 * GIB, 32e9, 3.1e9),
        Gpu("L4", 121e12, 22.5 * GIB, 32e9, 3.1e9),
        Gpu("RTX4090", 165e12, 24 * GIB, 32e9, 3.1e9),
    )
}
GPUS_PER_NODE = 8
USABLE = 0.92  # share of a GPU's memory for tensors; the rest is CUDA's context, NCCL's buffers and fragments


def find_gpu(name: str) -> Gpu:
    """A GPU by name. Case, blanks, hyphens, "NVIDIA" and "GB" make no difference. A name without its memory size (A100) is the first of
    that name.

    Raises UserError listing the known ones.
    """
    asked, known = _spelled(name), {_spelled(one): one for one in GPUS}
    if asked in known:
        return GPUS[known[asked]]
    if sizes := [gpu for one, gpu in GPUS.items() if asked == _spelled(one.partition("-")[0])]:
        return sizes[0]

    def likeness(one: str) -> tuple[int, float]:  # names of one series begin alike
        alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, asked))))
        return alike, difflib.SequenceMatcher(None, one, asked).ratio()

    raise UserError(f"--gpu {name} is unknown; the nearest is {known[max(known, key=likeness)]}. Known: {', '.join(GPUS)}")


def taken_as(name: str) -> str:
    """A note about a name without its memory size; "" for all others."""
    gpu = find_gpu(name)
    others = [one for one in GPUS if one != gpu.name and one.partition("-")[0] == gpu.name.partition("-")[0]]
    if not others or _spelled(name) == _spelled(gpu.name):
        return ""
    return f"--gpu {name} is taken as {gpu.name}; name {' or '.join(others)} for the other memory size"


def _spelled(name: str) -> str:
    return re.sub(r"nvidia|geforce|gb|[^a-z0-9]", "", name.lower())

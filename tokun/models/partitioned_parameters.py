"""Shares of parameters that DeepSpeed ZeRO-3 partitions among the processes, and gathering them.

A share is flat and equally long in every process; the last one is padded at its end. An unpartitioned parameter is its own share.
Knows no optimizer and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Partitioned(Tensor):
    """A parameter that DeepSpeed has partitioned, for the types alone."""

    ds_tensor: Tensor
    ds_shape: torch.Size


def is_partitioned(parameter: Tensor) -> TypeGuard[Partitioned]:
    return hasattr(parameter, "ds_tensor")


def own_share(parameter: Tensor) -> Tensor:
    """This process's share of the parameter, to read or write in place; the whole of it if it is not partitioned."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter


def whole_size(parameter: Tensor) -> torch.Size:
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def share_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of `whole`, a tensor of the parameter's full shape."""
    if not is_partitioned(parameter):
        return whole
    length, start = parameter.ds_tensor.numel(), dist.get_rank() * parameter.ds_tensor.numel()
    flat = whole.reshape(-1)[start : start + length]
    return nn.functional.pad(flat, (0, length - flat.numel()))


def gathered(share: Tensor, parameter: Tensor) -> Tensor:
    """The whole tensor, gathered from each process's share. A collective call, for the same parameter in every process. The result is on
    the collective device (a GPU under NCCL), even if shares are offloaded to the CPU."""
    if not is_partitioned(parameter):
        return share
    share = share.detach().to(collective_device())
    parts = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, share)
    return torch.cat(parts)[: whole_size(parameter).numel()].view(whole_size(parameter))


def collected(shares: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name. With partitioned parameters it is a collective call, and only rank 0 gets the tensors, on the CPU."""
    whole: dict[str, Tensor] = {}
    for name, share in shares.items():
        tensor = gathered(share, parameters[name])
        if not is_partitioned(parameters[name]):
            whole[name] = tensor
        elif dist.get_rank() == 0:
            whole[name] = tensor.cpu()
    return whole


def collective_device() -> torch.device:
    """The device of collective operations."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

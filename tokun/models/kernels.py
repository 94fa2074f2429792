"""Attention and dropout for training on a CPU, written so that torch.compile makes few passes over memory.

Each computes the same function as the stock one (dropout uses another generator), as tests verify. Knows tensors, no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast there: on GPUs, and on CPUs with instructions for them."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal self-attention of query (B, H, T, D) over key and value (B, K, T, D) -> (B, T, H, D), in the dtype of `value`.

    H is a multiple of K.

    The first half of the queries sees the first half of the keys only, which saves a quarter of the products. The backward pass
    uses the probabilities in the dtype in which they were multiplied by `value`.
    """
    return _CausalAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scale)


def _halves(length: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    middle = (length + 1) // 2
    return (0, middle), (middle, length)


class _CausalAttention(torch.autograd.Function):
    """Tensors keep their axes (B, K, H / K, T, …) up to the products.

    With axes merged earlier, the compiler would divide to index each element.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (batch, heads, length, size), kv = query.shape, key.shape[1]
        group, keys, values, queries = heads // kv, key.flatten(0, 1), value.flatten(0, 1), query.unflatten(1, (kv, heads // kv))
        outputs, parts, kept = [], [], []
        for start, end in _halves(length):
            part = queries[:, :, :, start:end].contiguous().view(batch * kv, group * (end - start), size)
            logits = torch.bmm(part, keys[:, :end].transpose(1, 2)).view(batch * kv, group, end - start, end)
            later = torch.arange(end, device=query.device) > torch.arange(start, end, device=query.device)[:, None]
            probabilities = (logits.float() * scale).masked_fill(later, -torch.inf).softmax(-1).to(value.dtype)
            output = torch.bmm(probabilities.view(batch * kv, group * (end - start), end), values[:, :end])
            outputs.append(output.view(batch, heads, end - start, size))
            parts.append(part)
            kept.append(probabilities)
        output = torch.cat(outputs, 2)
        ctx.save_for_backward(key, value, output, *parts, *kept)
        ctx.scale = scale
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        key, value, output, *saved = ctx.saved_tensors
        (batch, kv, length, size), group = key.shape, saved[-1].shape[1]
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        gradient = gradient.transpose(1, 2).to(value.dtype)
        # the term that the softmax subtracts from each row of its gradient (Dao et al. 2022, "FlashAttention", appendix B.4)
        means = (gradient.float() * output.float()).sum(-1, keepdim=True).view(batch * kv, group, length, 1)
        gradients = gradient.unflatten(1, (kv, group))
        to_query, to_key, to_value = [], [], []
        for (start, end), part, probabilities in zip(_halves(length), saved[:2], saved[2:], strict=True):
            rows = group * (end - start)
            given = gradients[:, :, :, start:end].contiguous().view(batch * kv, rows, size)
            to_logits = torch.bmm(given, values[:, :end].transpose(1, 2)).view(batch * kv, group, end - start, end).float()
            to_logits = (
                (probabilities.float() * (to_logits - means[:, :, start:end]) * ctx.scale).to(value.dtype).view(batch * kv, rows, end)
            )
            to_query.append(torch.bmm(to_logits, keys[:, :end]).view(batch, kv * group, end - start, size))
            to_key.append(torch.bmm(to_logits.transpose(1, 2), part))
            to_value.append(torch.bmm(probabilities.view(batch * kv, rows, end).transpose(1, 2), given))
        return torch.cat(to_query, 2), _joined(*to_key).view(key.shape), _joined(*to_value).view(value.shape), None


def _joined(early: Tensor, whole: Tensor) -> Tensor:  # gradients of the first keys and of all of them
    end = early.shape[1]
    return torch.cat((early + whole[:, :end], whole[:, end:]), 1)


def hashed_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout whose mask is a hash of each element's index and of `seed` (an int32 scalar): a few vector instructions an element, where
    torch's generators take 20 to 30 cycles. Meant to be compiled. The hash is Wellons' `lowbias32` (2018), with the seed mixed in twice.
    """
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) ^ seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D + seed
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    h = h ^ ((h >> 16) & 0xFFFF)
    return torch.where(h >= int((p - 0.5) * 2**32), x * (1 / (1 - p)), 0.0)

"""Decoder: a Qwen3's forward laid out for sampling, one prefill and then one id a row at a time. Knows ids, nothing of spans.

    stream = open_stream(model, prompts, capacity)        prompts (B, P) int64
    stream.logits(part)  ->  (B, ids of the part)         after the last id given
    stream.step(ids)                                      ids (B,)

The function is the model's own. What is saved is what its Hugging Face forward costs beside it: query, key and value are one
matrix product, gate and up another; the weights of the norms are multiplied into the matrices behind them; the matrices lie
as the processor's kernels want them; the cache is allocated once; the head computes only the part that is asked for. Any
other architecture goes through its own forward (`HubStream`), with the same calls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Matrix:
    """x (…, in) -> x W^T (…, out), W packed for the processor's kernels where it has any."""

    def __init__(self, weight: Tensor, rows: int):
        self.weight, self.packed = weight, None
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            with torch.inference_mode(False), torch.no_grad():
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.clone(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Layer:
    """One decoder layer's matrices."""

    def __init__(self, layer: Any, rows: int):
        attention, mlp = layer.self_attn, layer.mlp
        before = layer.input_layernorm.weight
        self.qkv = Matrix(torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]) * before, rows)
        self.out = Matrix(attention.o_proj.weight, rows)
        before = layer.post_attention_layernorm.weight
        self.gate_up = Matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * before, rows)
        self.down = Matrix(mlp.down_proj.weight, rows)
        q, k = attention.q_norm.weight, attention.k_norm.weight
        heads = attention.q_proj.out_features // len(q), attention.k_proj.out_features // len(k)
        self.qk_norm = torch.cat([q.expand(heads[0], -1) * len(q) ** -0.5, k.expand(heads[1], -1)])  # with the scale of the scores


class Decoder:
    """A Qwen3's weights and sizes. The weights are copies: make a new one when the model has learned more."""

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model is a Qwen3 as it is trained here: full attention, plain rotary positions, no adapters."""
        config = model.config
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return (
            type(model).__name__ == "Qwen3ForCausalLM"
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and rotary.get("rope_type", "default") == "default"
            and not config.attention_bias
            and config.hidden_act == "silu"
            and all(type(module) is torch.nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
        )

    @torch.no_grad()
    def __init__(self, model: Any, parts: tuple[slice, ...], rows: int):
        """`parts`: the ranges of ids whose logits will be asked for; `rows`: of a batch."""
        config = model.config
        self.heads, self.kv_heads, self.width, self.eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
        self.embedding, self.rotary = model.model.embed_tokens.weight, model.model.rotary_emb
        self.layers = [Layer(layer, rows) for layer in model.model.layers]
        head = model.lm_head.weight * model.model.norm.weight
        self.parts = {(part.start, part.stop): Matrix(head[part], rows) for part in parts}

    def norm(self, x: Tensor) -> Tensor:
        """Root mean square over the last dimension, without a weight."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * torch.rsqrt(length.square() / x.shape[-1] + self.eps).to(x.dtype)


class Stream:
    """A batch of sequences in the model, and what it remembers of them."""

    def __init__(self, decoder: Decoder, prompts: Tensor, capacity: int):
        d, like = decoder, decoder.embedding
        self.decoder, self.used = d, 0
        places = torch.arange(capacity, device=like.device)[None]
        cos, sin = (part[0] for part in d.rotary(like[:1, None], places))  # (capacity, width)
        sin = torch.cat([-sin[:, : d.width // 2], sin[:, d.width // 2 :]], -1)  # so that a rotation is two products
        self.cos, self.sin = cos[:, None], sin[:, None]  # (capacity, 1, width)
        shape = (len(d.layers), len(prompts), d.kv_heads, capacity, d.width)
        self.keys, self.values = torch.empty(shape, dtype=like.dtype, device=like.device), torch.empty(shape, dtype=like.dtype, device=like.device)
        self.hidden = self.forward(prompts)

    def step(self, ids: Tensor) -> None:
        self.hidden = self.forward(ids[:, None])

    def logits(self, part: slice) -> Tensor:
        return self.decoder.parts[part.start, part.stop](self.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) that follow what is remembered -> the last one's hidden state (B, hidden), normed."""
        d = self.decoder
        x = F.embedding(ids, d.embedding)
        for layer, keys, values in zip(d.layers, self.keys, self.values):
            x = x + layer.out(self.attend(layer, layer.qkv(d.norm(x)), keys, values))
            gate, up = layer.gate_up(d.norm(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        self.used += ids.shape[1]
        return d.norm(x[:, -1])

    def attend(self, layer: Layer, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """qkv (B, T, …) -> (B, T, heads * width). Writes the T keys and values behind those that are there."""
        d, (B, T, _) = self.decoder, qkv.shape
        H, K, first, end = d.heads, d.kv_heads, self.used, self.used + T
        qkv = qkv.view(B, T, H + 2 * K, d.width)
        qk = d.norm(qkv[:, :, : H + K]) * layer.qk_norm
        qk = torch.addcmul(qk * self.cos[first:end], qk.roll(d.width // 2, -1), self.sin[first:end])
        keys[:, :, first:end] = qk[:, :, H:].transpose(1, 2)
        values[:, :, first:end] = qkv[:, :, H + K :].transpose(1, 2)
        q = qk[:, :, :H].transpose(1, 2).reshape(B, K, -1, d.width)  # (B, kv_heads, heads / kv_heads * T, width)
        scores = q @ keys[:, :, :end].transpose(-1, -2)
        if T > 1:
            ahead = torch.ones(T, end, dtype=torch.bool, device=q.device).triu(1 + first)
            scores = scores.view(B, H, T, end).masked_fill(ahead, -torch.inf).view(B, K, -1, end)
        seen = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values[:, :, :end]
        return seen.view(B, H, T, d.width).transpose(1, 2).reshape(B, T, -1)


class HubStream:
    """The same calls over any causal LM's own forward and cache."""

    def __init__(self, model: Any, prompts: Tensor):
        self.model = model
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits[:, -1]

    def step(self, ids: Tensor) -> None:
        out = self.model(input_ids=ids[:, None], past_key_values=self.cache, use_cache=True)
        self.cache, self.last = out.past_key_values, out.logits[:, -1]

    def logits(self, part: slice) -> Tensor:
        return self.last[:, part]

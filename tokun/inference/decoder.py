"""A Qwen3's weights laid out for sampling, and the streams that read ids with them: one prefill, then one id a row at a time.

    stream = open_stream(model, [prompts (B, P)], capacity)
    stream.logits(part)  ->  (rows, ids of the part)        after the last ids given
    stream.step(ids)                                        ids (rows,)
    stream.keep(rows)                                       drops the others, which have ended (a GPU's graph keeps all rows)

The result is that of the model's own Hugging Face forward, at less cost. Query, key and value are one matrix product, gate and up
another; the weights of the norms are multiplied into the matrices behind them; the matrices have the layout of the processor's
kernels; the cache is allocated once; the head only computes the requested part. On a GPU a step is captured as a CUDA graph; on a
CPU it is one C++ program (`native`) if there is a compiler. Any other architecture uses its own forward (`HubStreams`), with the same
calls.

Several groups of prompts of different lengths can step together (for guidance: with tags and without). Their rows follow one another.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokun.inference import native
from tokun.inference.streams import SHORT, GraphStream, HubStreams, NativeStream, Stream

ROWS = (2, 4, 8, 16, 32, 64)  # numbers of rows that a CPU computes together, as far as they give the same bits
SAFE = 16  # the number used where the others do not
NATIVE_ROWS = (*range(1, 17), 24, 32, 48, 64)  # as ROWS, for the C++ program


class Matrix:
    """x (…, in) -> x W^T (…, out). W is packed for the processor's kernels if there are any."""

    def __init__(self, weight: Tensor, pack: bool = True):
        self.is_packed = pack and weight.device.type == "cpu" and can_pack(weight.dtype)
        self.weight = weight
        if self.is_packed:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.clone(), SAFE)

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and this processor have packed products of the dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class Layer:
    """One decoder layer's matrices."""

    def __init__(self, layer: Any, pack: bool = True):
        attention, mlp = layer.self_attn, layer.mlp
        before = layer.input_layernorm.weight
        self.qkv = Matrix(torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]) * before, pack)
        self.out = Matrix(attention.o_proj.weight, pack)
        before = layer.post_attention_layernorm.weight
        self.gate_up = Matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * before, pack)
        self.down = Matrix(mlp.down_proj.weight, pack)
        q, k = attention.q_norm.weight, attention.k_norm.weight
        heads = attention.q_proj.out_features // len(q), attention.k_proj.out_features // len(k)
        self.qk_norm = torch.cat([q.expand(heads[0], -1) * len(q) ** -0.5, k.expand(heads[1], -1)])  # with the scale of the scores


class TorchDecoder:
    """A Qwen3's weights and sizes. The weights are copies: `decoder_of` makes new ones when the model's weights change."""

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model is a Qwen3 as trained here (full attention, plain rotary positions, no adapters), with memory for a copy."""
        config = model.config
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return (
            type(model).__name__ == "Qwen3ForCausalLM"
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and rotary.get("rope_type", "default") == "default"
            and not config.attention_bias
            and config.hidden_act == "silu"
            and all(type(module) is torch.nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
            and has_room(model)
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, pack: bool = True):
        config = model.config
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps = torch.tensor(config.rms_norm_eps, device=model.device)
        self.embedding, self.rotary = model.model.embed_tokens.weight.detach(), model.model.rotary_emb
        self.layers = [Layer(layer, pack) for layer in model.model.layers]
        self.head = model.lm_head.weight.detach() * model.model.norm.weight
        self.heads_of: dict[tuple[int, int], Matrix] = {}

    def open(self, prompts: Sequence[Tensor], capacity: int) -> Stream:
        return (GraphStream if prompts[0].device.type == "cuda" else Stream)(self, prompts, capacity)

    def first_layer(self) -> TorchDecoder:
        """The same decoder with only its first layer."""
        first = copy.copy(self)
        first.layers = self.layers[:1]
        return first

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """hidden (B, 1, width of the model) -> (B, ids of the part)."""
        key = (part.start, part.stop)
        if key not in self.heads_of:
            self.heads_of[key] = Matrix(self.head[part])
        return self.heads_of[key](hidden)[:, 0]

    def norm(self, x: Tensor) -> Tensor:
        """x over its root mean square in the last dimension; the weight is part of the matrix that follows."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # half of F.rms_norm's time on a CPU
        return x * torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_().to(x.dtype)


class NativeDecoder:
    """A Qwen3's weights and sizes for the C++ program. The weights are copies, as a `TorchDecoder`'s."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any):
        config, norm = model.config, model.model.norm.weight
        self.embedding, self.rotary = model.model.embed_tokens.weight.detach(), model.model.rotary_emb
        layers = (Layer(layer, pack=False) for layer in model.model.layers)
        parts = ((x.qkv.weight, x.out.weight, x.gate_up.weight, x.down.weight, x.qk_norm) for x in layers)
        self.weights = native.Weights(config, parts, self.embedding, model.lm_head.weight.detach() * norm)

    def open(self, prompts: Sequence[Tensor], capacity: int) -> NativeStream:
        return NativeStream(self, prompts, capacity)

    def first_layer(self) -> NativeDecoder:
        first = copy.copy(self)
        first.weights = self.weights.first_layer()
        return first

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """hidden (B, 1, width of the model) -> (B, ids of the part), float32."""
        return self.weights.logits(hidden[:, 0], part)


_decoders: weakref.WeakKeyDictionary[Any, tuple[Any, TorchDecoder | NativeDecoder]] = weakref.WeakKeyDictionary()
_plain: weakref.WeakSet[Any] = weakref.WeakSet()


def decoder_of(model: Any) -> TorchDecoder | NativeDecoder | None:
    """The model's decoder, remade if the weights have changed; None if the model's own forward must be used."""
    stamp = [(p.data_ptr(), p._version, p.dtype) for p in model.parameters()]
    kept = _decoders.get(model)
    if kept is None or kept[0] != stamp:
        if not TorchDecoder.fits(model):
            return None
        is_native = model.device.type == "cpu" and model not in _plain and native.is_there()
        kept = _decoders[model] = (stamp, NativeDecoder(model) if is_native else TorchDecoder(model))
    return kept[1]


def forget(model: Any) -> None:
    """Free the copies of a model's weights: training needs the memory."""
    _decoders.pop(model, None)


def compile_steps(model: Any, wanted: bool = True) -> bool:
    """Use the C++ program for this model's steps on a CPU where possible, unless not `wanted`. Returns whether it is used; a warning says
    why it cannot be.

    The program sums in another order, so a sample may now and then differ from one drawn without it; its own samples are the same for
    every number of rows. No effect on a GPU.
    """
    if next(model.parameters()).device.type != "cpu":
        return False
    _decoders.pop(model, None)
    if not wanted:
        _plain.add(model)
        return False
    _plain.discard(model)
    if not TorchDecoder.fits(model):
        return _not_compiled(f"{type(model).__name__} uses its own forward")
    try:
        native.program()
    except RuntimeError as error:
        return _not_compiled(str(error))
    return is_compiled(model)


def sample_as(model: Any, other: Any) -> None:
    """Use the same step implementation as `other`."""
    _decoders.pop(model, None)
    (_plain.add if other in _plain else _plain.discard)(model)


def _not_compiled(why: str) -> bool:
    warnings.warn(f"sampling is not compiled, and slower: {why}", stacklevel=3)
    return False


def is_compiled(model: Any) -> bool:
    return isinstance(decoder_of(model), NativeDecoder)


def has_room(model: Any) -> bool:
    """Whether there is memory for copies of the weights and for a cache. Only a GPU's memory is checked."""
    device = next(model.parameters()).device
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return device.type != "cuda" or 2 * size < torch.cuda.mem_get_info(device)[0]


def open_stream(model: Any, prompts: Sequence[Tensor], capacity: int) -> Stream | HubStreams:
    """A stream that has read these groups of prompts (B, P) int64, all of one B. Its rows are the first group's, then the second's, and so
    on. `capacity`: ids that fit in a row."""
    decoder = decoder_of(model)
    if decoder is None:
        return HubStreams(model, prompts)
    return decoder.open(prompts, capacity)


def row_counts(model: Any, widths: Sequence[int]) -> tuple[int, ...]:
    """The numbers of rows that may be computed together after prompts of these widths: a row has the same bits with each of them. On a CPU
    matrix libraries may sum fewer rows in another order, so this is tried once for each shape of model, dtype and number of threads."""
    decoder = decoder_of(model)
    if next(model.parameters()).device.type != "cpu":
        return ()
    if decoder is None or (isinstance(decoder, TorchDecoder) and not decoder.layers[0].qkv.is_packed):
        return (SAFE,)
    tried = ROWS if isinstance(decoder, TorchDecoder) else NATIVE_ROWS
    like, config, good = decoder.embedding, model.config, set(tried)
    for width in {min(width, SHORT) for width in widths}:
        heads = config.num_attention_heads, config.num_key_value_heads
        key = tried, tuple(like.shape), str(like.dtype), *heads, torch.get_num_threads(), width
        if key not in _row_counts:
            _row_counts[key] = _same_bits(decoder, tried, width)
        good &= set(_row_counts[key])
    return tuple(sorted(good))


_row_counts: dict[Any, tuple[int, ...]] = {}


@torch.inference_mode()
def _same_bits(decoder: TorchDecoder | NativeDecoder, tried: Sequence[int], width: int) -> tuple[int, ...]:
    """Those of `tried` for which random prompts, and two ids after them, give the same bits as in `SAFE` rows."""
    ids = torch.randint(len(decoder.embedding), (max(tried), width + 2), generator=torch.Generator().manual_seed(0))
    first = decoder.first_layer()  # all layers have the same shape
    made = {rows: _read(first, ids[:rows], width)[: min(rows, SAFE)] for rows in tried}
    return tuple(rows for rows in tried if torch.equal(made[rows], made[SAFE][: len(made[rows])]))


def _read(decoder: TorchDecoder | NativeDecoder, ids: Tensor, width: int) -> Tensor:
    stream = decoder.open([ids[:, :width]], ids.shape[1])
    for column in ids[:, width:].T:
        stream.step(column)
    return stream.logits(slice(0, len(decoder.embedding)))

"""A Qwen3's forward laid out for sampling: one prefill, then one id a row at a time. Knows ids, nothing of spans.

    stream = open_stream(model, [prompts (B, P)], capacity)
    stream.logits(part)  ->  (rows, ids of the part)        after the last ids given
    stream.step(ids)                                        ids (rows,)
    stream.keep(rows)                                       the others have ended (on a CPU; a GPU's graph is for so many rows)

The function is the model's own. What is saved is what its Hugging Face forward costs beside it: query, key and value are one
matrix product, gate and up another; the weights of the norms are multiplied into the matrices behind them; the matrices lie
as the processor's kernels want them; the cache is allocated once; the head computes only the part that is asked for. On a
GPU a step is captured as a CUDA graph; on a CPU it is one C++ program (`native`) where there is a compiler for it. Any other
architecture goes through its own forward (`HubStream`), with the same calls.

Several groups of prompts, of different lengths, step together (guidance: with tags and without), one behind the other.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokun.inference import native

ROWS = (2, 4, 8, 16, 32, 64)  # how many rows a CPU computes together, where they come out as the same bits
SAFE = 16  # … and where they do not: always so many
SHORT = 16  # prompts shorter than this are read together
NATIVE_ROWS = (*range(1, 17), 24, 32, 48, 64)  # the same for the C++ program


class Matrix:
    """x (…, in) -> x W^T (…, out). W is packed for the processor's kernels where it has any."""

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


class Decoder:
    """A Qwen3's weights and sizes. The weights are copies: `decoder_of` makes new ones when the model has learned more."""

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model is a Qwen3 as it is trained here (full attention, plain rotary positions, no adapters), and a copy has room."""
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

    def first_layer(self) -> Decoder:
        """The same with only its first layer."""
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
        """Root mean square over the last dimension; its weight is in the matrix behind."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # half of F.rms_norm's time on a CPU
        return x * torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_().to(x.dtype)


class NativeDecoder:
    """A Qwen3's weights and sizes for the C++ program. The weights are copies, as a `Decoder`'s."""

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


_decoders: weakref.WeakKeyDictionary[Any, tuple[Any, Decoder | NativeDecoder]] = weakref.WeakKeyDictionary()
_plain: weakref.WeakSet[Any] = weakref.WeakSet()


def decoder_of(model: Any) -> Decoder | NativeDecoder | None:
    """The model's decoder, made anew when its weights have changed since; None where the model's own forward must do."""
    stamp = [(p.data_ptr(), p._version, p.dtype) for p in model.parameters()]
    kept = _decoders.get(model)
    if kept is None or kept[0] != stamp:
        if not Decoder.fits(model):
            return None
        is_native = model.device.type == "cpu" and model not in _plain and native.is_there()
        kept = _decoders[model] = (stamp, NativeDecoder(model) if is_native else Decoder(model))
    return kept[1]


def forget(model: Any) -> None:
    """Let go of the copies of a model's weights: training wants the memory back."""
    _decoders.pop(model, None)


def compile_steps(model: Any, wanted: bool = True) -> bool:
    """Whether this model's steps on a CPU are the C++ program's from now on. They are where they can be, unless not wanted; a warning says why they cannot.

    Sums come out in another order than without, so that a sample may now and then differ; among themselves they agree for every number of rows. A GPU
    has its graphs: there nothing changes.
    """
    if next(model.parameters()).device.type != "cpu":
        return False
    _decoders.pop(model, None)
    if not wanted:
        _plain.add(model)
        return False
    _plain.discard(model)
    if not Decoder.fits(model):
        return _not_compiled(f"{type(model).__name__} goes through its own forward")
    try:
        native.program()
    except RuntimeError as error:
        return _not_compiled(str(error))
    return is_compiled(model)


def sample_as(model: Any, other: Any) -> None:
    """Whether steps are the C++ program's is for `model` as it is for `other`."""
    _decoders.pop(model, None)
    (_plain.add if other in _plain else _plain.discard)(model)


def _not_compiled(why: str) -> bool:
    warnings.warn(f"sampling is not compiled, and slower: {why}", stacklevel=3)
    return False


def is_compiled(model: Any) -> bool:
    return isinstance(decoder_of(model), NativeDecoder)


def has_room(model: Any) -> bool:
    """A GPU must hold the copies of the weights beside the weights, and a cache."""
    device = next(model.parameters()).device
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return device.type != "cuda" or 2 * size < torch.cuda.mem_get_info(device)[0]


def open_stream(model: Any, prompts: Sequence[Tensor], capacity: int) -> Stream | HubStreams:
    """Groups of prompts (B, P) int64, all of one B, read; rows are the first group's, then the second's … `capacity` ids fit in a row."""
    decoder = decoder_of(model)
    if decoder is None:
        return HubStreams([HubStream(model, rows) for rows in prompts])
    return decoder.open(prompts, capacity)


class Stream:
    """Rows of ids in the model, and what each layer remembers of them: keys, then values (rows, 2 * kv heads, capacity, width)."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Tensor], capacity: int):
        d, like = decoder, decoder.embedding
        self.decoder = d
        longest = max(rows.shape[1] for rows in prompts)
        self.starts = [longest - rows.shape[1] for rows in prompts]  # shorter prompts stand at the right: all rows end together
        self.used = longest
        cos, sin = (part[0] for part in d.rotary(like[:1, None], torch.arange(capacity, device=like.device)[None]))  # (capacity, width)
        self.cos, self.sin = (
            cos[:, None],
            torch.cat([-sin[:, : d.width // 2], sin[:, d.width // 2 :]], -1)[:, None],
        )  # a rotation is two products
        shape = (sum(len(rows) for rows in prompts), 2 * d.kv_heads, capacity, d.width)
        self.caches = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in d.layers]
        self.hidden = self.prefill(prompts)

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """The last hidden states (rows, 1, …). On a CPU long prompts are read one by one: their rows do not depend on how many there are."""
        found, first = [], 0
        for ids, start in zip(prompts, self.starts):
            rows = slice(first, first + len(ids))
            if ids.device.type == "cpu" and ids.shape[1] >= SHORT:
                parts = [self.forward(ids[i : i + 1], start, [(slice(first + i, first + i + 1), start)]) for i in range(len(ids))]
                hidden = torch.cat(parts)
            else:
                hidden = self.forward(ids, start, [(rows, start)])
            found.append(hidden)
            first += len(ids)
        return torch.cat(found)

    def step(self, ids: Tensor) -> None:
        """ids (rows,): what follows."""
        each = len(ids) // len(self.starts)
        groups = [(slice(i * each, (i + 1) * each), start) for i, start in enumerate(self.starts)]
        self.hidden = self.forward(ids[:, None], self.used, groups)
        self.used += 1

    def logits(self, part: slice) -> Tensor:
        return self.decoder.logits(self.hidden, part)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64) of the only group: their part of the cache, as far as it is used."""
        self.caches, self.hidden = [self.some(cache, rows) for cache in self.caches], self.hidden[rows]

    def some(self, cache: Tensor, rows: Tensor) -> Tensor:
        out = cache.new_empty((len(rows), *cache.shape[1:]))
        out[:, :, : self.used] = cache[rows, :, : self.used]
        return out

    def only_first(self, rows: int) -> None:
        """Go on with the first group, of so many rows, alone."""
        self.starts = self.starts[:1]
        self.caches, self.hidden = [cache[:rows] for cache in self.caches], self.hidden[:rows]

    def forward(self, ids: Tensor, place: int, groups: list[tuple[slice, int]]) -> Tensor:
        """ids (B, T) of these groups' rows at places `place` … -> the last hidden states (B, 1, …), normed."""
        d, end = self.decoder, place + ids.shape[1]
        turn = self.cos[place:end], self.sin[place:end]
        rows = slice(groups[0][0].start, groups[-1][0].stop)
        x = F.embedding(ids, d.embedding)
        for layer, whole in zip(d.layers, self.caches):
            cache = whole[rows]
            qkv = layer.qkv(d.norm(x)).view(*ids.shape, -1, d.width)
            own = qkv[:, :, : d.heads + d.kv_heads]
            qk = d.norm(own) * layer.qk_norm
            torch.addcmul(qk * turn[0], qk.roll(d.width // 2, -1), turn[1], out=own)
            cache[:, :, place:end] = qkv[:, :, d.heads :].transpose(1, 2)
            x = x + layer.out(self.attend(qkv[:, :, : d.heads], cache, end, groups))
            gate, up = layer.gate_up(d.norm(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return d.norm(x[:, -1:])

    def attend(self, q: Tensor, cache: Tensor, end: int, groups: list[tuple[slice, int]]) -> Tensor:
        """q (B, T, heads, width), the rows' cache of a layer -> (B, T, heads * width). A group sees its own places from its start to `end`."""
        (B, T, H, width), K, first, seen = q.shape, self.decoder.kv_heads, groups[0][0].start, []
        q = q.view(B, K, H // K, width) if T == 1 else q.transpose(1, 2)  # the heads that share a key stand in a row: it is read once
        for rows, start in groups:
            own = slice(rows.start - first, rows.stop - first)
            keys, values = cache[own, :, start:end].split(K, 1)
            seen.append(F.scaled_dot_product_attention(q[own], keys, values, is_causal=T > 1, enable_gqa=T > 1, scale=1.0))
        out = seen[0] if len(seen) == 1 else torch.cat(seen)
        return out.reshape(B, 1, -1) if T == 1 else out.transpose(1, 2).reshape(B, T, -1)


class Step(nn.Module):
    """A step whose shapes are fixed: what a GPU replays as one graph."""

    @torch.inference_mode(False)  # parameters count their versions
    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.embedding = nn.Parameter(decoder.embedding, requires_grad=False)
        names = ("qkv", "out", "gate_up", "down")
        self.weights = nn.ParameterList(
            nn.Parameter(getattr(layer, name).weight, requires_grad=False) for layer in decoder.layers for name in names
        )
        self.qk_norms = nn.ParameterList(nn.Parameter(layer.qk_norm, requires_grad=False) for layer in decoder.layers)

    def forward(self, ids: Tensor, place: Tensor, visible: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[Tensor]) -> Tensor:
        """ids (B,) at `place` (1,) -> hidden (B, …). visible (B, 1, 1, n): 0 where a row looks at places 0 … of the caches
        (B, 2 * kv heads, at least n, width), minus infinity where it does not."""
        norm, B, H, K, width = self.decoder.norm, len(ids), self.decoder.heads, self.decoder.kv_heads, self.decoder.width
        halves = 2, width // 2
        cos, sin = (part.index_select(0, place).view(1, *halves) for part in (cos, sin))
        x = F.embedding(ids, self.embedding)
        for number, cache in enumerate(caches):
            qkv, out, gate_up, down = (self.weights[4 * number + i] for i in range(4))
            own = F.linear(norm(x), qkv).view(B, H + 2 * K, width)
            qk = (norm(own[:, : H + K]) * self.qk_norms[number]).view(B, H + K, *halves)
            qk = torch.addcmul(qk * cos, qk.flip(2), sin).view(B, H + K, width)
            cache.index_copy_(2, place, torch.cat([qk[:, H:], own[:, H + K :]], 1)[:, :, None])
            keys, values = cache[:, :, : visible.shape[-1]].split(K, 1)
            seen = F.scaled_dot_product_attention(qk[:, :H].reshape(B, K, H // K, width), keys, values, attn_mask=visible, scale=1.0)
            x = x + F.linear(seen.reshape(B, H * width), out)
            gate, up = F.linear(norm(x), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return norm(x)


class NativeStream(Stream):
    """A CPU's, by the C++ program. Rows that leave cost nothing: the others go on where they are in the cache."""

    def __init__(self, decoder: NativeDecoder, prompts: Sequence[Tensor], capacity: int):
        self.decoder, weights = decoder, decoder.weights
        longest, many = max(part.shape[1] for part in prompts), sum(len(part) for part in prompts)
        self.starts, self.used = [longest - part.shape[1] for part in prompts], longest
        starts = torch.tensor(self.starts).repeat_interleave(many // len(prompts))
        cos, sin = (part[0, :, : weights.width // 2] for part in decoder.rotary(torch.zeros(1, 1), torch.arange(capacity)[None]))
        self.rows = native.Rows(starts, cos, sin, weights.new_cache(many, capacity))
        self.hidden = self.prefill(prompts)

    def forward(self, ids: Tensor, place: int, groups: list[tuple[slice, int]]) -> Tensor:
        return self.decoder.weights.step(ids, place, self.rows[groups[0][0].start : groups[-1][0].stop])[:, None]

    def step(self, ids: Tensor) -> None:
        self.hidden = self.decoder.weights.step(ids[:, None], self.used, self.rows)[:, None]
        self.used += 1

    def draw(self, part: slice, u: Tensor, choice: Any, before: Tensor) -> tuple[Tensor, Tensor]:
        """For each row as many ids of the part as u (rows, n) has columns, each chosen from what follows the last, and read: (ids (rows, n), their
        nats added to those `before` (rows,), one by one, so that a picture drawn in two calls has the same sum)."""
        hidden, ids, nats = self.decoder.weights.draw(self.hidden[:, 0], self.used, self.rows, part, u, choice, before)
        self.hidden, self.used = hidden[:, None], self.used + ids.shape[1]
        return ids, nats

    def write(
        self, part: slice, u: Tensor, choice: Any, tables: Sequence[Tensor], states: Tensor, lengths: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """See `native.Weights.write`. Behind it the rows have ended."""
        return self.decoder.weights.write(self.hidden[:, 0], self.used, self.rows, part, u, choice, tables, states, lengths, end)

    def fork(self, rows: Tensor) -> NativeStream:
        """These rows (of all groups alike, int64) from where they are, in the same cache; this stream may go on, too."""
        other = copy.copy(self)
        other.keep(rows)
        return other

    def keep(self, rows: Tensor) -> None:
        self.rows, self.hidden = self.rows[rows], self.hidden[rows]

    def only_first(self, rows: int) -> None:
        self.starts = self.starts[:1]
        self.rows, self.hidden = self.rows[:rows], self.hidden[:rows]


class GraphStream(Stream):
    """A GPU's: steps of fixed shapes, replayed as one graph, that read their place from a tensor and look at the whole cache."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Tensor], capacity: int):
        super().__init__(decoder, prompts, capacity)
        self.fix()

    def fix(self) -> None:
        """What a step reads, for the present rows."""
        device, each = self.caches[0].device, len(self.caches[0]) // len(self.starts)
        first = torch.tensor(self.starts, device=device).repeat_interleave(each)[:, None, None, None]
        self.places = torch.arange(self.caches[0].shape[2], device=device)
        self.visible = torch.zeros(len(first), 1, 1, len(self.places), dtype=self.cos.dtype, device=device).masked_fill_(
            self.places < first, -torch.inf
        )
        self.place = torch.tensor([self.used], device=device)
        self.ids = torch.zeros(len(first), dtype=torch.long, device=device)
        self.hidden, self.fixed = self.hidden.clone(), Step(self.decoder)
        self.replay: Callable[[], None] | None = None

    def only_first(self, rows: int) -> None:
        super().only_first(rows)
        self.fix()

    def step(self, ids: Tensor) -> None:
        self.ids.copy_(ids)
        self.place.fill_(self.used)
        if self.replay is None:
            self.replay = capture(self.one) if self.ids.device.type == "cuda" else self.one
        self.replay()
        self.used += 1

    def one(self) -> None:
        """self.ids at self.place -> self.hidden."""
        visible = self.visible.masked_fill(self.places > self.place, -torch.inf)
        self.hidden.copy_(self.fixed(self.ids, self.place, visible, self.cos, self.sin, self.caches)[:, None])


def capture(one: Callable[[], None]) -> Callable[[], None]:
    """`one` as a CUDA graph; as it is, with a word, where it cannot be captured. Runs it (again and again: it must not mind)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        one()
        one()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one()
    except RuntimeError as error:
        warnings.warn(f"sampling without a CUDA graph, which is slower: {error}", stacklevel=2)
        return one
    return graph.replay


class HubStream:
    """A batch of sequences in any causal LM, through its own forward and cache."""

    def __init__(self, model: Any, prompts: Tensor):  # (B, P)
        self.model = model
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits[:, -1]

    def step(self, ids: Tensor) -> None:  # (B,)
        out = self.model(input_ids=ids[:, None], past_key_values=self.cache, use_cache=True)
        self.cache, self.last = out.past_key_values, out.logits[:, -1]


class HubStreams:
    """The calls of `Stream` over groups of them. Rows that have ended stay."""

    def __init__(self, streams: list[HubStream]):
        self.streams = streams

    def step(self, ids: Tensor) -> None:
        for stream, part in zip(self.streams, ids.chunk(len(self.streams))):
            stream.step(part)

    def logits(self, part: slice) -> Tensor:
        return torch.cat([stream.last[:, part] for stream in self.streams])

    def only_first(self, rows: int) -> None:
        self.streams = self.streams[:1]


def row_counts(model: Any, widths: Sequence[int]) -> tuple[int, ...]:
    """How many rows may be computed together behind prompts of these widths: whichever is taken, a row comes out as the same bits. On a CPU
    matrix libraries may sum in another order for fewer rows, so it is tried, once for each shape of model, dtype and number of threads."""
    decoder = decoder_of(model)
    if next(model.parameters()).device.type != "cpu":
        return ()
    if decoder is None or (isinstance(decoder, Decoder) and not decoder.layers[0].qkv.is_packed):
        return (SAFE,)
    tried = ROWS if isinstance(decoder, Decoder) else NATIVE_ROWS
    like, config, good = decoder.embedding, model.config, set(tried)
    for width in {min(width, SHORT) for width in widths}:
        key = (
            tried,
            tuple(like.shape),
            str(like.dtype),
            config.num_attention_heads,
            config.num_key_value_heads,
            torch.get_num_threads(),
            width,
        )
        if key not in _row_counts:
            _row_counts[key] = _same_bits(decoder, tried, width)
        good &= set(_row_counts[key])
    return tuple(sorted(good))


_row_counts: dict[Any, tuple[int, ...]] = {}


@torch.inference_mode()
def _same_bits(decoder: Decoder | NativeDecoder, tried: Sequence[int], width: int) -> tuple[int, ...]:
    """Those of `tried` for which random prompts, and two ids behind them, come out as they do in `SAFE` rows."""
    ids = torch.randint(len(decoder.embedding), (max(tried), width + 2), generator=torch.Generator().manual_seed(0))
    first = decoder.first_layer()  # all layers are of one shape
    made = {rows: _read(first, ids[:rows], width)[: min(rows, SAFE)] for rows in tried}
    return tuple(rows for rows in tried if torch.equal(made[rows], made[SAFE][: len(made[rows])]))


def _read(decoder: Decoder | NativeDecoder, ids: Tensor, width: int) -> Tensor:
    stream = decoder.open([ids[:, :width]], ids.shape[1])
    for column in ids[:, width:].T:
        stream.step(column)
    return stream.logits(slice(0, len(decoder.embedding)))

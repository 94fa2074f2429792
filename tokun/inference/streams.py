"""Streams: rows of ids in a model, with their caches and positions, read one id per row at a time. `decoder.open_stream` opens them.

`Stream` runs torch's kernels, `GraphStream` replays a step as a CUDA graph, `NativeStream` calls the C++ program, and `HubStreams` use a
model's own forward. The weights belong to the decoder.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokun.inference import native

if TYPE_CHECKING:
    from tokun.inference.decoder import NativeDecoder, TorchDecoder

SHORT = 16  # prompts shorter than this are read together


class Stream:
    """Rows of ids in the model, and each layer's cache of them: keys, then values (rows, 2 * kv heads, capacity, width)."""

    def __init__(self, decoder: TorchDecoder, prompts: Sequence[Tensor], capacity: int):
        d, like = decoder, decoder.embedding
        self.decoder = d
        longest = max(rows.shape[1] for rows in prompts)
        self.starts = [longest - rows.shape[1] for rows in prompts]  # prompts are right-aligned: all rows end together
        self.used = longest
        cos, sin = (part[0] for part in d.rotary(like[:1, None], torch.arange(capacity, device=like.device)[None]))  # (capacity, width)
        # a rotation is two products
        self.cos, self.sin = cos[:, None], torch.cat([-sin[:, : d.width // 2], sin[:, d.width // 2 :]], -1)[:, None]
        shape = (sum(len(rows) for rows in prompts), 2 * d.kv_heads, capacity, d.width)
        self.caches = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in d.layers]
        self.hidden = self.prefill(prompts)

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """The last hidden states (rows, 1, …). On a CPU long prompts are read one by one, so that a row does not depend on their number."""
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
        """Read the next id of each row: ids (rows,)."""
        each = len(ids) // len(self.starts)
        groups = [(slice(i * each, (i + 1) * each), start) for i, start in enumerate(self.starts)]
        self.hidden = self.forward(ids[:, None], self.used, groups)
        self.used += 1

    def logits(self, part: slice) -> Tensor:
        return self.decoder.logits(self.hidden, part)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows (int64) of the only group, and copy the used part of their cache."""
        self.caches, self.hidden = [self.some(cache, rows) for cache in self.caches], self.hidden[rows]

    def some(self, cache: Tensor, rows: Tensor) -> Tensor:
        out = cache.new_empty((len(rows), *cache.shape[1:]))
        out[:, :, : self.used] = cache[rows, :, : self.used]
        return out

    def only_first(self, rows: int) -> None:
        """Continue with the first group alone, which has this number of rows."""
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
        """q (B, T, heads, width), the rows' cache of a layer -> (B, T, heads * width).
        A group sees its own places from its start to `end`."""
        (B, T, H, width), K, first, seen = q.shape, self.decoder.kv_heads, groups[0][0].start, []
        q = q.view(B, K, H // K, width) if T == 1 else q.transpose(1, 2)  # heads that share a key are adjacent: it is read once
        for rows, start in groups:
            own = slice(rows.start - first, rows.stop - first)
            keys, values = cache[own, :, start:end].split(K, 1)
            seen.append(F.scaled_dot_product_attention(q[own], keys, values, is_causal=T > 1, enable_gqa=T > 1, scale=1.0))
        out = seen[0] if len(seen) == 1 else torch.cat(seen)
        return out.reshape(B, 1, -1) if T == 1 else out.transpose(1, 2).reshape(B, T, -1)


class Step(nn.Module):
    """A step with fixed shapes, which a GPU replays as one graph."""

    @torch.inference_mode(False)  # parameters need the version counter that inference mode omits
    def __init__(self, decoder: TorchDecoder):
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
    """A stream on a CPU by the C++ program. Removing rows costs nothing: the others keep their places in the cache."""

    def __init__(self, decoder: NativeDecoder, prompts: Sequence[Tensor], capacity: int):
        self.decoder, weights = decoder, decoder.weights
        longest, many = max(part.shape[1] for part in prompts), sum(len(part) for part in prompts)
        self.starts, self.used = [longest - part.shape[1] for part in prompts], longest
        starts = torch.tensor(self.starts).repeat_interleave(many // len(prompts))
        cos, sin = (part[0, :, : weights.width // 2] for part in decoder.rotary(torch.zeros(1, 1), torch.arange(capacity)[None]))
        self.rows = native.CachedRows(starts, cos, sin, weights.new_cache(many, capacity))
        self.hidden = self.prefill(prompts)

    def forward(self, ids: Tensor, place: int, groups: list[tuple[slice, int]]) -> Tensor:
        return self.decoder.weights.step(ids, place, self.rows[groups[0][0].start : groups[-1][0].stop])[:, None]

    def step(self, ids: Tensor) -> None:
        self.hidden = self.decoder.weights.step(ids[:, None], self.used, self.rows)[:, None]
        self.used += 1

    def draw(self, part: slice, u: Tensor, choice: Any, before: Tensor) -> tuple[Tensor, Tensor]:
        """Choose and read n ids of the part for each row, one after the other, by u (rows, n) -> (ids (rows, n), their nats added to
        `before` (rows,)). The nats are added one by one, so that a picture drawn in two calls has the same sum."""
        hidden, ids, nats = self.decoder.weights.draw(self.hidden[:, 0], self.used, self.rows, part, u, choice, before)
        self.hidden, self.used = hidden[:, None], self.used + ids.shape[1]
        return ids, nats

    def write(
        self, part: slice, u: Tensor, choice: Any, tables: Sequence[Tensor], states: Tensor, lengths: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """See `native.Weights.write`. Afterwards all rows have ended."""
        return self.decoder.weights.write(self.hidden[:, 0], self.used, self.rows, part, u, choice, tables, states, lengths, end)

    def fork(self, rows: Tensor) -> NativeStream:
        """A stream that continues these rows (int64, the same in all groups) in the same cache. This one can continue, too."""
        other = copy.copy(self)
        other.keep(rows)
        return other

    def keep(self, rows: Tensor) -> None:
        self.rows, self.hidden = self.rows[rows], self.hidden[rows]

    def only_first(self, rows: int) -> None:
        self.starts = self.starts[:1]
        self.rows, self.hidden = self.rows[:rows], self.hidden[:rows]


class GraphStream(Stream):
    """A stream on a GPU: its steps have fixed shapes and are replayed as one graph. They read their position from a tensor and attend to
    the whole cache."""

    def __init__(self, decoder: TorchDecoder, prompts: Sequence[Tensor], capacity: int):
        super().__init__(decoder, prompts, capacity)
        self.fix()

    def fix(self) -> None:
        """Allocate what a step reads, for the current rows."""
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
            self.replay = capture(self.one, self.ids.device) if self.ids.device.type == "cuda" else self.one
        self.replay()
        self.used += 1

    def one(self) -> None:
        """Read self.ids at self.place, and write self.hidden."""
        visible = self.visible.masked_fill(self.places > self.place, -torch.inf)
        self.hidden.copy_(self.fixed(self.ids, self.place, visible, self.cos, self.sin, self.caches)[:, None])


def capture(one: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`one`, which computes on the GPU `device`, as a CUDA graph; returned unchanged, with a warning, if capture fails.

    `one` is run several times: it must be safe to repeat. Streams and graphs belong to torch's current GPU, which need not be the
    model's: a graph captured on another one would be empty.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            one()
            one()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                one()
        except RuntimeError as error:
            warnings.warn(f"sampling without a CUDA graph, which is slower: {error}", stacklevel=2)
            return one

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


def cache_name(output: Mapping[str, Any]) -> str:
    """The name of a causal LM's cache of keys and values, in its output and as an argument: "cache", or "past_key_values" in earlier
    versions of transformers."""
    return "cache" if "cache" in output else "past_key_values"


class HubStreams:
    """The calls of `Stream` for any causal LM, through its own forward, with a cache for each group. Rows that have ended stay."""

    def __init__(self, model: Any, prompts: Sequence[Tensor]):  # (B, P) each
        self.model = model
        self.outputs = [model(input_ids=rows, use_cache=True, logits_to_keep=1) for rows in prompts]
        self.cache_name = cache_name(self.outputs[0])

    def step(self, ids: Tensor) -> None:
        caches = [out[self.cache_name] for out in self.outputs]
        parts = ids[:, None].chunk(len(caches))
        self.outputs = [self.model(input_ids=part, use_cache=True, **{self.cache_name: cache}) for part, cache in zip(parts, caches)]

    def logits(self, part: slice) -> Tensor:
        return torch.cat([out.logits[:, -1, part] for out in self.outputs])

    def only_first(self, rows: int) -> None:
        self.outputs = self.outputs[:1]

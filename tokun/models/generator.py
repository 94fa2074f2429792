"""The generator: a stock Hugging Face causal LM sized for a vocabulary. Knows ids, never words or pixels.

Qwen3 (qk-norm, RMSNorm, SwiGLU, GQA, rotary positions) from scratch, or any pretrained causal LM with its vocabulary
extended. `AutoModelForCausalLM.from_pretrained` loads the saved model without tokun.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokun.config import GeneratorConfig
from tokun.models import kernels, losses
from tokun.models.partitioned_parameters import is_partitioned
from tokun.utils import network_access
from tokun.utils.errors import UserError, reading


def make_generator(config: GeneratorConfig, *, vocab_size: int, max_length: int, pad: int, bos: int, eos: int) -> Any:
    """A causal LM over `vocab_size` ids in float32, for sequences up to `max_length`. Weights come from torch's global
    generator: seed it before the call. With `config.pretrained`, they are its weights, with new rows for the new ids."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    if config.pretrained:
        with reading(f"generator.pretrained {config.pretrained}"), network_access.fetched(config.pretrained, "generator.pretrained"):
            model: Any = AutoModelForCausalLM.from_pretrained(config.pretrained, dtype=torch.float32)
        limit = getattr(model.config, "max_position_embeddings", max_length)
        if limit < max_length:
            raise UserError(
                f"{config.pretrained} takes {limit} positions, the sequences here need {max_length}: use fewer codes "
                "(image_tokenizer.downsample) or shorter captions (data.max_caption_tokens)"
            )
        if vocab_size > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocab_size, mean_resizing=True)
        for settings in (model.config, model.generation_config):
            settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = pad, bos, eos
        return model
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads}")
    qwen = Qwen3Config(
        vocab_size=vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        intermediate_size=intermediate_size(config), max_position_embeddings=max_length, tie_word_embeddings=config.tie_embeddings,
        rope_theta=config.rope_theta,  # pyright: ignore[reportCallIssue]  # taken and turned into rope_parameters, as in earlier releases
        pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, use_cache=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(qwen, attn_implementation="sdpa")


def intermediate_size(config: GeneratorConfig) -> int:
    """The hidden width of an MLP."""
    return config.intermediate_size or math.ceil(config.hidden_size * 8 // 3 / 64) * 64


@torch.no_grad()
def start_from(model: nn.Module, other: nn.Module, others: Sequence[str], added: Sequence[str], *, text_size: int) -> list[str]:
    """Overwrite the weights with those of another generator of the same width and text tokenizer.

    `others` and `added` name the ids after the text pieces in the other and in this one. Ids that the other does not have keep their
    weights. Returns their names.

    This one may have more layers. Those between the other's (`grown_layers`) are copies whose outputs are 0, so that at first it computes
    the same function (block expansion: Wu et al. 2024, LLaMA Pro).
    """
    known = {name: text_size + i for i, name in enumerate(others)}
    rows = [(i, i) for i in range(text_size)] + [(text_size + i, known[name]) for i, name in enumerate(added) if name in known]
    here, there = (torch.tensor(side) for side in zip(*rows))
    parameters = dict(other.named_parameters())
    layers = grown_layers(depth_of(other), depth_of(model))
    for name, parameter in model.named_parameters():
        before, middle, rest = name.partition(".layers.")
        number, _, inner = rest.partition(".")
        source, is_new = layers[int(number)] if middle else (0, False)
        value = parameters[f"{before}{middle}{source}.{inner}" if middle else name].to(parameter)
        if is_new and name.endswith((".o_proj.weight", ".down_proj.weight")):
            parameter.zero_()
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter[here.to(parameter.device)] = value[there.to(parameter.device)]
        else:
            parameter.copy_(value)
    return [name for name in added if name not in known]


def depth_of(model: Any) -> int:
    """The number of a causal LM's layers."""
    return model.config.get_text_config().num_hidden_layers


def grown_layers(before: int, after: int) -> list[tuple[int, bool]]:
    """For each of `after` layers: the layer out of `before` that it starts from, and whether it is added.

    The added layers are spread evenly among the others, each behind the layer that it copies. 4 layers become 6: 0, 1, 1 added, 2, 3, 3
    added.
    """
    added = after - before
    behind = [math.ceil((i + 1) * before / added) - 1 for i in range(added)]
    return sorted([(i, False) for i in range(before)] + [(i, True) for i in behind])


@torch.no_grad()
def start_from_codebook(model: Any, vectors: torch.Tensor, first: int) -> None:
    """Overwrite the embeddings of ids first … first + K - 1 with the codebook's vectors (K, D), randomly projected to the model's width.

    Distances are kept up to one factor, which restores the standard deviation of the embeddings.
    """
    rows = model.get_input_embeddings().weight[first : first + len(vectors)]
    centred = (vectors - vectors.mean(0)).to(rows)
    turned = centred @ torch.randn(centred.shape[1], rows.shape[1]).to(rows)
    rows.copy_(turned * (rows.std() / turned.std()))


def add_dropout(model: Any, p: float) -> None:
    """Dropout on the embeddings and on the output of each attention and MLP, as hooks: the class stays stock.

    Active in training mode only. A hook reads `training` from its module.
    """
    if not 0 <= p < 1:
        raise UserError(f"dropout is {p}; it must be in [0, 1)")
    if p == 0:
        return

    def hook(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seed = getattr(module, "dropout_seed", None)  # set for compiled layers on a CPU
        if seed is None or not module.training:
            return F.dropout(output, p, training=module.training)
        return kernels.hashed_dropout(output, p, seed)

    model.get_input_embeddings().register_forward_hook(hook)
    for module in _residual_branches(model):
        module.register_forward_hook(hook)


def _residual_branches(model: nn.Module) -> list[nn.Module]:
    """The last linear layer of each attention and MLP."""
    return [module for name, module in model.named_modules() if name.endswith((".o_proj", ".down_proj"))]


# measured at 8 layers of width 256 and pictures of 8x16 to 24x16 codes (533 positions at most): 2.5 s of one core for a step of 32, 3.7 s
# with the fused kernel
PLAIN_POSITIONS = 1024


def tune_for(model: Any, device: torch.device) -> None:
    """Install faster kernels for the same function. Not saved with the model.

    Everywhere: RMSNorm in one kernel. On a CPU: attention by plain matrix products, whose backward pass takes a fraction
    of the fused kernel's time for sequences of up to PLAIN_POSITIONS ids; for Qwen3, without products above the diagonal.
    """
    for module in model.modules():
        if type(module).__name__ == "Qwen3RMSNorm":
            module.forward = types.MethodType(_fused_norm, module)
    config = model.config.get_text_config()
    if device.type == "cpu" and getattr(config, "max_position_embeddings", math.inf) <= PLAIN_POSITIONS:
        plain = type(model).__name__ == "Qwen3ForCausalLM" and set(config.layer_types) == {"full_attention"}
        model.set_attn_implementation(_register_attention() if plain else "eager")


ATTENTION = "tokun_causal"


@functools.cache
def _register_attention() -> str:
    """Register `kernels.causal_attention` with transformers; with a mask or a cache it falls back to SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
    ) -> Any:
        if mask is None and query.shape[2] == key.shape[2] and query.requires_grad:
            return kernels.causal_attention(query, key, value, module.scaling), None
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def _fused_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight.to(hidden_states.dtype)
    return F.rms_norm(hidden_states, (hidden_states.shape[-1],), weight, self.variance_epsilon)


def compile_layers(model: nn.Module) -> None:
    """torch.compile each decoder layer in place (one compilation serves them all). Names and weights do not change."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
    on_cpu = next(model.parameters()).device.type == "cpu"
    for layer in layers:
        layer.compile(dynamic=True, backend=_recomputing if on_cpu else "inductor")
    if on_cpu:
        _draw_dropout_seeds(model)


def _recomputing(graph: Any, inputs: Any) -> Any:
    """Inductor, with dropout's masks recomputed in the backward pass: storing one as bytes takes several times as long."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(ban_recompute_used_far_apart=False):
        return compile_fx(graph, inputs)


def _draw_dropout_seeds(model: Any) -> None:
    """Let `kernels.hashed_dropout` do the dropout of `add_dropout`: its seeds are drawn from torch's generator before each forward pass."""
    branches = _residual_branches(model)
    for module in branches:
        module.dropout_seed = torch.zeros((), dtype=torch.int32)  # neither parameter nor buffer: not saved, not synchronised by engines

    def draw(module: nn.Module, _inputs: Any) -> None:
        if module.training and branches:
            seeds = torch.randint(-(2**31), 2**31, (len(branches),), dtype=torch.int32)
            held: list[Any] = [branch.dropout_seed for branch in branches]
            torch._foreach_copy_(held, list(seeds.unbind()))  # pyright: ignore[reportPrivateImportUsage]  # no public name

    model.base_model.register_forward_pre_hook(draw)


# of float32 logits, for the automatic chunk size: on a GPU a part of its memory, on a CPU about the last-level cache
CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**25}


def loss_chunk(asked: int, *, positions: int, size: int, device: str = "cuda") -> int:
    """Positions whose logits over `size` ids are computed at once; 0: all.

    `asked`, or if that is 0 as many as fit in the device's `CHUNK_BYTES`.
    """
    chunk = asked or max(1, CHUNK_BYTES[device] // (4 * size))
    return chunk if chunk < positions else 0


@torch.no_grad()
def head_is_last(model: Any) -> bool:
    """Whether the logits are just the output embedding of the base model's last hidden states, tested on a short input.
    Some models scale or cap their logits after the head, or have a layer before it."""
    if model.get_output_embeddings() is None or model.base_model is model:
        return False
    was_training = model.training
    model.eval()
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    same = torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits)
    model.train(was_training)
    return same


def fuse_loss_into_forward(model: Any, *, size: int, chunk: int, token_losses: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Make `model(input_ids=…, targets=(positions, labels, is_image, weights))` return (loss, parts) of `losses.chunked_loss` over the
    logits of `size` ids. With chunk 0, and if ZeRO-3 partitions the head, the loss takes all logits at once.

    positions (N,) into the flattened input_ids (B, T), labels (N,): positions without a label cost no logits, and no logits are cast on
    output. Every other call is unchanged. It is an ordinary call of the model, so DDP and DeepSpeed see it. Call before `prepare`. With
    `aligned=(positions, whole, place, weight)` for its `models.feature_alignment` head, parts["align_sum"] is added to the loss with that
    weight. Not saved with the model. Needs `head_is_last`.
    """
    stock = model.forward

    @functools.wraps(stock)
    def forward(
        self: Any, *args: Any, targets: tuple[torch.Tensor, ...] | None = None, aligned: tuple[torch.Tensor, ...] = (), **kwargs: Any
    ) -> Any:
        if targets is None:
            return stock(*args, **kwargs)
        rows = self.base_model(*args, **kwargs)[0].flatten(0, 1).index_select(0, targets[0])
        found, parts = predicted(self, rows, *targets[1:])
        if aligned:
            parts = parts | {"align_sum": self.alignment(*aligned[:3])}
            found = found + aligned[3] * parts["align_sum"]
        return found, parts

    def predicted(self: Any, rows: torch.Tensor, labels: torch.Tensor, is_image: torch.Tensor, weights: torch.Tensor) -> Any:
        head = self.get_output_embeddings()
        # partitioned weights are gathered for one forward and one backward pass only
        own = 0 if any(map(is_partitioned, head.parameters())) else chunk
        if own:
            torch.clear_autocast_cache()  # free the layers' copies of their weights during the loss
        return losses.chunked_loss(rows, head, labels, is_image, weights, size=size, chunk=own, token_losses=token_losses)

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within the block the layers run uncompiled: evaluation and sampling are too short to be worth compiling."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name)


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: Any, length: int) -> float:
    """Floating-point operations of one training token (forward and backward) in a sequence of `length`.

    6 per matrix parameter (4 if it is frozen), and 6 * layers * heads * head_dim * length for causal attention (PaLM, appendix B, halved by
    the causal mask).
    """
    config = model.config
    tied = config.vocab_size * config.hidden_size
    each = [(6.0 if p.requires_grad else 4.0) * p.numel() for p in model.parameters() if p.ndim >= 2]
    table = 6.0 if model.get_input_embeddings().weight.requires_grad else 4.0
    matrices = sum(each) - (0 if config.tie_word_embeddings else table * tied)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return matrices + 6.0 * config.num_hidden_layers * config.num_attention_heads * head_dim * length

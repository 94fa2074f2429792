"""Memory of the generator's training step, from formulas of what each layer keeps for its backward pass. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokun.config import Config
from tokun.models.generator import loss_chunk
from tokun.planner.gpus import USABLE, Gpu
from tokun.planner.sizes import Shape, Sizes, generator_sizes

STAGES = ("ddp", "zero0", "zero1", "zero2", "zero3")


def layer_bytes_per_token(s: Shape, *, bf16: bool, dropout: bool, gpu: bool = True) -> int:
    """Bytes that one decoder layer keeps per token for its backward pass.

    Under autocast the residual stream and the norms are float32, and every linear layer keeps its own bfloat16 copy of its input:

        2 norms        float32 input 4H and one number each             8 H + 8
        q, k, v        three copies of the normed input                 6 H
        q-norm, k-norm float32 inputs, one number a head                4 Q + 4 K + 4 heads + 4 kv_heads
        attention      q, k, v, output in bfloat16, log-sum a head      4 Q + 4 K + 4 heads     (flash attention: nothing of T x T)
        gate, up       two copies of the normed input                   4 H
        SwiGLU         gate, silu(gate), up, their product              8 I
        dropout        two masks of a byte                              2 H

    In float32 the linear layers share one input (8 H instead of 10 H) and attention and SwiGLU take twice as much. On a CPU the norm's
    kernel is composed of parts that also keep the normed values, and masks have the dtype of what they mask. Not counted: in float32 a
    GPU has no flash attention and keeps T x T tables for each head.
    """
    a = 2 if bf16 else 4
    norms = 8 * s.H + 8 + 4 * (s.Q + s.K + s.heads + s.kv_heads) + (0 if gpu else 8 * s.H + 4 * (s.Q + s.K))
    inputs = 10 * s.H if bf16 else 8 * s.H
    attention = 2 * a * (s.Q + s.K) + 4 * s.heads
    masks = 2 * s.H * (1 if gpu else a) if dropout else 0
    return norms + inputs + attention + 4 * a * s.I + masks


def ends_bytes_per_token(s: Shape, *, bf16: bool, dropout: bool, chunked: bool = False, gpu: bool = True) -> int:
    """Bytes per token before the first and after the last layer: ids, labels and their positions, the embedding's mask, the last norm, the
    head's input (none with a chunked loss)."""
    mask = s.H * (1 if gpu else 4) if dropout else 0
    head = 0 if chunked else 2 * s.H if bf16 else 4 * s.H
    return 8 + 8 + 8 + mask + 4 * s.H + 4 + head + (0 if gpu else 4 * s.H)


def activation_bytes(
    s: Shape, *, micro: int, width: int, bf16: bool, dropout: bool, checkpointing: bool, chunk: int = 0, gpu: bool = True
) -> dict[str, float]:
    """Bytes that the forward pass of `micro` sequences of `width` ids keeps for the backward pass.

    activations              with gradient checkpointing, only each layer's float32 input
    one_layer                what a layer keeps, or recomputes
    bf16_weights             autocast's copies of the matrices that the backward pass uses
    layer_copies, all_copies copies for one layer, and for all: autocast keeps them until the forward pass ends
    logits                   float32, made from `bf16_logits`
    loss                     the additional peak of its backward pass: the gradient of gather, and the difference, exponential and
                             product of logsumexp's: four times the logits

    With a loss in chunks of `chunk` positions (`losses.chunked_loss`), the last three are for one chunk, nothing of the head is kept, and

    chunk_inputs             the hidden states of labelled positions, kept while the chunks are processed
    chunk_gradients          their gradients, made with the chunks and kept for the backward pass
    head_gradient            the gradient of the head's weights, likewise, in float32; `head_products` is what a chunk adds to it,
                             `head_copy` is autocast's copy

    Not compiled: train.compile needs less.
    """
    tokens, copy = micro * width, 2.0 if bf16 else 0.0
    layer = layer_bytes_per_token(s, bf16=bf16, dropout=dropout, gpu=gpu)
    ends = ends_bytes_per_token(s, bf16=bf16, dropout=dropout, chunked=chunk > 0, gpu=gpu)
    kept = s.L * 4 * s.H if checkpointing else s.L * layer
    rows = -(-tokens // 64) * 64  # padded as in `labelled`
    at_once, head = chunk or rows, s.V * s.H
    filling = (rows - tokens) * (0 if chunk else 2 * s.H if bf16 else 4 * s.H)
    step = {
        "activations": float(tokens * (kept + ends) + filling),
        "one_layer": float(tokens * layer),
        "logits": 4.0 * at_once * s.V,
        "loss": 16.0 * at_once * s.V,
        "bf16_weights": copy * ((0 if checkpointing else s.L * s.layer_matrices) + (0 if chunk else head)),
        "layer_copies": copy * s.layer_matrices,
        "all_copies": copy * (s.L * s.layer_matrices + head),
        "bf16_logits": copy * at_once * s.V,
    }
    made = 4.0 * tokens * s.H if chunk else 0.0
    of_head = {"head_gradient": 4.0, "head_products": 4.0 + copy, "head_copy": copy}
    return step | {"chunk_inputs": made, "chunk_gradients": made} | {k: v * head if chunk else 0.0 for k, v in of_head.items()}


def state_bytes(sizes: Sizes, *, stage: str, gpus: int, optimizer: str, bucket: float = 5e8, overlap: bool = False) -> dict[str, float]:
    """Bytes on a GPU that do not depend on the batch. Float32 throughout, including the moving average.

    ddp: DDP's buckets are a second copy of the gradients (gpus > 1). zero1, zero2: DeepSpeed keeps a master copy of its share of
    the weights, and reduces in buckets of `bucket` numbers, two with overlap_comm. zero3 also partitions the moving
    average and gathers up to 1e9 weights at a time. Offloading to CPU memory is not modelled.
    """
    P, N = float(sizes.parameters), gpus
    muon = 4 * sizes.hidden_matrices if optimizer == "muon" else 0  # one moment instead of two
    cut = int(stage[-1]) if stage.startswith("zero") else 0
    buffers = {
        "ddp": 4 * P if N > 1 else 0.0,
        "zero0": 4 * min(bucket, P),
        "zero1": 4 * bucket * (1 + overlap),
        "zero2": 4 * bucket * (1 + overlap),
    }
    return {
        "weights": 4 * P / (N if cut == 3 else 1),
        "master": 4 * P / N if cut else 0.0,
        "gradients": 4 * P / (N if cut >= 2 else 1),
        "optimizer": (8 * P - muon) / (N if cut else 1),
        "ema": 4 * P / (N if cut == 3 else 1),
        "buffers": buffers.get(stage, 4 * min(P, 1e9) + 4 * bucket),
    }


def peak_bytes(state: dict[str, float], step: dict[str, float], *, accumulation: int, checkpointing: bool) -> dict[str, float]:
    """Memory at the moments of a step that may be the peak, including the persistent state; the largest is the peak.

    Gradients appear as activations are freed, so they do not add up: at the loss there are no gradients yet (with one micro batch), and at
    the end of the backward pass hardly any activations. A chunked loss makes its gradients in the forward pass, with autocast's copy of
    the head. ZeRO's step flattens its share of the gradients. Evaluation keeps a copy of the weights while the model holds the averaged
    ones.
    """
    stays = sum(v for k, v in state.items() if k != "gradients")
    before = stays + (state["gradients"] if accumulation > 1 else 0.0) + step["activations"]
    made = step["chunk_gradients"] + step["head_gradient"]
    chunk = step["chunk_inputs"] + step["head_copy"] + made
    return {
        "forward": before + step["all_copies"] + (0.0 if made else step["logits"] + step["bf16_logits"]),
        "loss": before + step["bf16_weights"] + chunk + max(step["logits"] + step["loss"], step["bf16_logits"] + step["head_products"]),
        "layers": before + step["bf16_weights"] + made + (step["one_layer"] + step["layer_copies"] if checkpointing else 0.0),
        "backward": stays + state["gradients"] + step["one_layer"] + step["layer_copies"],
        "step": stays + state["gradients"] + state["master"],
        "evaluation": stays + state["weights"] + step["logits"],
    }


def step_kind(config: Config, sizes: Sizes, micro: int) -> dict[str, Any]:
    """The settings of a config that `activation_bytes` depends on, besides the lengths."""
    t = config.train
    chunk = loss_chunk(t.loss_chunk, positions=micro * sizes.width, size=sizes.shape.V)
    return dict(bf16=t.precision == "bf16", dropout=config.generator.dropout > 0, checkpointing=t.gradient_checkpointing, chunk=chunk)


def planned_memory(config: Config, *, micro: int, gpu: bool) -> dict[str, float]:
    """What `measure_memory` should find for one process, one micro batch and no DeepSpeed."""
    t, sizes = config.train, generator_sizes(config)
    state = state_bytes(sizes, stage="ddp", gpus=1, optimizer=t.optimizer)
    step = activation_bytes(sizes.shape, micro=micro, width=sizes.width, gpu=gpu, **step_kind(config, sizes, micro))
    moments = peak_bytes(state, step, accumulation=1, checkpointing=t.gradient_checkpointing)
    peak = max(size for moment, size in moments.items() if moment != "evaluation")  # not part of a step
    terms = {term: state[term] for term in ("weights", "gradients", "optimizer", "ema")}
    kept = 0.0 if step["head_gradient"] else step["logits"]
    return {**terms, "saved": step["activations"] + step["bf16_weights"] + kept, "peak": peak}


def largest_micro_batch(
    state: dict[str, float], step_of: Callable[[int], dict[str, float]], gpu: Gpu, *, accumulation: int, checkpointing: bool
) -> int:
    """The most sequences of full width that fit in one forward pass; 0 if not even one fits."""

    def fits(micro: int) -> bool:
        return (
            max(peak_bytes(state, step_of(micro), accumulation=accumulation, checkpointing=checkpointing).values()) <= USABLE * gpu.memory
        )

    low, high = 0, 2**20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

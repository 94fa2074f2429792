"""What a config will need before it is started: parameters, FLOPs, memory per GPU, communication, hours, failures.

    python train.py --config configs/ladder/1.3b.yaml --plan --gpu H100 --gpus 64 --samples 100000000
    python -m tokun.planner --config configs/ladder/1.3b.yaml --gpu H100 --gpus 64      the same
    python -m tokun.planner --config configs/ladder/8m.yaml --measure 4                 and the memory of a real step of 4 samples here

Needs no GPU and no data, and allocates no model: parameters are counted on torch's meta device, the image tokenizer is traced on fake
tensors, and the memory of the generator's training step follows formulas of what each layer keeps for its backward pass
(`layer_bytes_per_token`). Tests hold the formulas against real steps. What is assumed (MFU, bandwidth, failures) is printed as such.
All sizes are bytes, all times seconds, all rates per second, unless a name says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tokun import data
from tokun.config import Config, load_config, parse_grids
from tokun.inference.latents import Slots
from tokun.inference.model import TEXT_TOKENIZER
from tokun.models import losses
from tokun.models.generator import add_dropout, count_parameters, flops_per_token, loss_chunk, make_generator, tune_for
from tokun.tokenizers.image import Decoder, Encoder, ImageTokenizer
from tokun.tokenizers.text import TextTokenizer
from tokun.tokenizers.vocabulary import Tags, Vocabulary
from tokun.training import optim
from tokun.training.engine import make_accelerator
from tokun.training.generator import build_vocabulary
from tokun.training.run import micro_batch
from tokun.training.token_loss import TokenLoss
from tokun.utils import checkpoint

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """flops: dense bf16 peak; memory: as the driver reports it; link: to GPUs of its node, network: to other nodes, both one way."""

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
STAGES = ("ddp", "zero0", "zero1", "zero2", "zero3")
SHARD = 1000  # pictures in a shard, as data_tools.prepare writes them
# 419 unexpected interruptions in 54 days on 16,384 GPUs: Llama Team 2024, "The Llama 3 Herd of Models", section 3.3.4
GPU_DAYS_PER_FAILURE = 16384 * 54 / 419


def find_gpu(name: str) -> Gpu:
    """A GPU by name, upper or lower case. Raises ValueError listing the known ones."""
    known = {n.lower(): n for n in GPUS}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
        raise ValueError(f"--gpu {name} is not known; the nearest is {known[near[0]]}, all are: {', '.join(GPUS)}")
    return GPUS[known[name.lower()]]


# --- the generator: sizes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 generator, as far as memory and time depend on it. Q and K are the widths of all query and key heads together."""

    L: int  # layers
    H: int  # hidden width
    Q: int
    K: int
    heads: int
    kv_heads: int
    I: int
    V: int  # vocabulary
    layer_matrices: int  # parameters of the matrices of one layer


@dataclass(frozen=True)
class Sizes:
    """Parameters and lengths of a config's generator."""

    shape: Shape
    parameters: int
    embedding: int  # input embedding, and the head where it is not tied
    hidden_matrices: int  # what Muon moves
    flops_per_token: float  # forward and backward, recomputation not counted
    width: int  # ids of the longest sequence, as padded
    tokens_per_sample: float  # ids of a sequence with a caption of mean length
    codes: int  # ids of a picture


def generator_sizes(config: Config, *, caption_tokens: float = 0.0) -> Sizes:
    """Exact counts on the meta device. Raises ValueError with `generator.pretrained`, whose shape is not in the config."""
    if config.generator.pretrained:
        raise ValueError(
            f"generator.pretrained is {config.generator.pretrained}: the plan sizes generators trained from scratch; "
            "give their width and depth, and generator.pretrained= (empty)"
        )
    vocabulary = plan_vocabulary(config)
    slots = Slots(vocabulary.max_codes, vocabulary.max_text)
    with torch.device("meta"):
        model = make_generator(
            config.generator, vocab_size=vocabulary.size, max_length=slots.size + vocabulary.max_text + 16, pad=0, bos=1, eos=2
        )
    c, layer = model.config, model.model.layers[0]
    shape = Shape(
        c.num_hidden_layers, c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.num_attention_heads,
        c.num_key_value_heads, c.intermediate_size, c.vocab_size, sum(p.numel() for p in layer.parameters() if p.ndim == 2),
    )  # fmt: skip
    width = sequence_length(vocabulary, vocabulary.max_text)
    return Sizes(
        shape=shape, parameters=count_parameters(model), embedding=c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2),
        hidden_matrices=shape.L * shape.layer_matrices, flops_per_token=flops_per_token(model, width), width=width,
        tokens_per_sample=width - vocabulary.max_text + (caption_tokens or vocabulary.max_text / 2), codes=slots.n_codes,
    )  # fmt: skip


def plan_vocabulary(config: Config) -> Vocabulary:
    """The id space of a run: with the tags that its code shards name where they are there, else without styles and subjects."""
    codes = checkpoint.read_record(Path(config.out) / "codes" / "codes.json")
    side = config.image_tokenizer.image_size // config.image_tokenizer.downsample
    grids = parse_grids(config.data.grids) or ((side, side),)
    codes = codes or {"tag_counts": [], "codebook_size": config.image_tokenizer.codebook_size, "grid": grids[0], "grids": grids}
    return build_vocabulary(config, SimpleNamespace(size=config.text_tokenizer.vocab_size, illegal_ids=[0]), codes)


def sequence_length(vocabulary: Vocabulary, caption_tokens: int) -> int:
    """Ids that the generator reads of a joint sequence (the last one is only a label) of the largest grid, every tag given."""
    tags = Tags("style", "subject", "register", vocabulary.default_grid, "thing" if vocabulary.things else "")
    structure = ("<bos>", "<boi>", "<eoi>", "<boc>", "<eoc>", "<eos>")
    return len(structure) + len(tags.names()) + vocabulary.max_codes + caption_tokens - 1


def count_samples(config: Config) -> int:
    """Training pairs: of the run's code shards, else of `data.toy`, else of the image shards that are there; 0 where nothing is."""
    codes = checkpoint.read_record(Path(config.out) / "codes" / "codes.json")
    if codes is not None:
        return codes["counts"]["train"]
    if config.data.toy:
        return config.data.toy
    try:
        return len(data.ShardIndex(data.expand_shards(config.data.train), one_of=data.IMAGE_SUFFIXES))
    except FileNotFoundError:
        return 0


def mean_caption_tokens(config: Config, most: int = 512) -> float:
    """Mean length of the first plain captions of the run's code shards in its text tokenizer's pieces; 0 where they are not there."""
    out = Path(config.out)
    tokenizer, shards = out / "text_tokenizer" / TEXT_TOKENIZER, sorted((out / "codes").glob("train-*.tar"))
    if not tokenizer.is_file() or not shards:
        return 0.0
    encode, index = TextTokenizer.load(tokenizer).encode, data.ShardIndex(shards[:1], need=("json", data.CODES_SUFFIX))
    lengths = [min(len(encode(index.read_json(i)["caption"])), config.data.max_caption_tokens) for i in range(min(most, len(index)))]
    return sum(lengths) / len(lengths)


# --- the generator: memory of a training step -----------------------------------------------------------------------


def layer_bytes_per_token(s: Shape, *, bf16: bool, dropout: bool, gpu: bool = True) -> int:
    """What one decoder layer keeps of each token for its backward pass.

    Under autocast the residual stream and the norms are float32, and every linear layer keeps its own bfloat16 copy of its input:

        2 norms        float32 input 4H and one number each             8 H + 8
        q, k, v        three copies of the normed input                 6 H
        q-norm, k-norm float32 inputs, one number a head                4 Q + 4 K + 4 heads + 4 kv_heads
        attention      q, k, v, output in bfloat16, log-sum a head      4 Q + 4 K + 4 heads     (flash attention: nothing of T x T)
        gate, up       two copies of the normed input                   4 H
        SwiGLU         gate, silu(gate), up, their product              8 I
        dropout        two masks of a byte                              2 H

    In float32 the linear layers share one input (8 H instead of 10 H) and attention and SwiGLU take twice as much. On a CPU the norm's
    kernel is made of parts that also keep the normed values, and masks have the type of what they mask. Not counted: in float32 a GPU has no
    flash attention, and keeps tables of T x T for each head.
    """
    a = 2 if bf16 else 4
    norms = 8 * s.H + 8 + 4 * (s.Q + s.K + s.heads + s.kv_heads) + (0 if gpu else 8 * s.H + 4 * (s.Q + s.K))
    inputs = 10 * s.H if bf16 else 8 * s.H
    attention = 2 * a * (s.Q + s.K) + 4 * s.heads
    masks = 2 * s.H * (1 if gpu else a) if dropout else 0
    return norms + inputs + attention + 4 * a * s.I + masks


def ends_bytes_per_token(s: Shape, *, bf16: bool, dropout: bool, chunked: bool = False, gpu: bool = True) -> int:
    """What stands before the first and behind the last layer: ids, labels and their positions, the embedding's mask, the last norm, the
    head's input (none with a loss in chunks)."""
    mask = s.H * (1 if gpu else 4) if dropout else 0
    head = 0 if chunked else 2 * s.H if bf16 else 4 * s.H
    return 8 + 8 + 8 + mask + 4 * s.H + 4 + head + (0 if gpu else 4 * s.H)


def activation_bytes(
    s: Shape, *, micro: int, width: int, bf16: bool, dropout: bool, checkpointing: bool, chunk: int = 0, gpu: bool = True
) -> dict[str, float]:
    """What the forward pass of `micro` sequences of `width` ids leaves for the backward pass.

    activations              with gradient checkpointing only each layer's float32 input
    one_layer                what a layer keeps, or gets back while it is computed again
    bf16_weights             autocast's copies of the matrices that the backward pass uses
    layer_copies, all_copies those of one layer, and all: autocast holds on to them until the forward pass ends
    logits                   float32, made of `bf16_logits`
    loss                     the most that its backward pass holds besides: the gradient of gather, and difference, exponential and
                             product of logsumexp's, four times the logits

    With a loss in chunks of `chunk` positions (`losses.chunked_loss`) the last three are a chunk's, there is nothing of the head to keep, and

    chunk_inputs             the hidden states that have a label, which are there while the chunks are
    chunk_gradients          theirs, made with the chunks, stay for the backward pass
    head_gradient            so does that of the head's weights, in float32; `head_products` are what a chunk adds to it,
                             `head_copy` is autocast's

    Not compiled: train.compile needs less.
    """
    tokens, copy = micro * width, 2.0 if bf16 else 0.0
    layer = layer_bytes_per_token(s, bf16=bf16, dropout=dropout, gpu=gpu)
    ends = ends_bytes_per_token(s, bf16=bf16, dropout=dropout, chunked=chunk > 0, gpu=gpu)
    kept = s.L * 4 * s.H if checkpointing else s.L * layer
    rows = -(-tokens // 64) * 64  # as `labelled` fills them up
    at_once, head = chunk or rows, s.V * s.H
    filling = (rows - tokens) * (0 if chunk else 2 * s.H if bf16 else 4 * s.H)
    step = {
        "activations": float(tokens * (kept + ends) + filling), "one_layer": float(tokens * layer), "logits": 4.0 * at_once * s.V, "loss": 16.0 * at_once * s.V,
        "bf16_weights": copy * ((0 if checkpointing else s.L * s.layer_matrices) + (0 if chunk else head)),
        "layer_copies": copy * s.layer_matrices, "all_copies": copy * (s.L * s.layer_matrices + head), "bf16_logits": copy * at_once * s.V,
    }  # fmt: skip
    made = 4.0 * tokens * s.H if chunk else 0.0
    of_head = {"head_gradient": 4.0, "head_products": 4.0 + copy, "head_copy": copy}
    return step | {"chunk_inputs": made, "chunk_gradients": made} | {k: v * head if chunk else 0.0 for k, v in of_head.items()}


def state_bytes(sizes: Sizes, *, stage: str, gpus: int, optimizer: str, bucket: float = 5e8, overlap: bool = False) -> dict[str, float]:
    """What stays on a GPU, or comes anew with each step, whatever the batch. Float32 throughout, the moving average included.

    ddp: DDP's buckets are a second copy of the gradients (gpus > 1). zero1, zero2: DeepSpeed keeps a master copy of its share of
    the weights, and reduces in buckets of `bucket` numbers, two with overlap_comm. zero3 cuts the moving
    average too; up to 1e9 weights are gathered at a time. Offloading to the CPU's memory is not planned.
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
    """The moments at which a step can need most, all of what stays included; the largest of them is the peak.

    Gradients come as activations go, so they do not add up: at the loss there are none yet (with one micro batch), at the end of the
    backward pass hardly an activation. A loss in chunks makes its gradients in the forward pass, with autocast's copy of the head. ZeRO's
    step flattens its share of the gradients. Evaluation keeps the step's own weights aside while the averaged ones stand in the model.
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


# --- the same, measured ---------------------------------------------------------------------------------------------


def step_kind(config: Config, sizes: Sizes, micro: int) -> dict[str, Any]:
    """What of a config `activation_bytes` depends on, besides the lengths."""
    t = config.train
    chunk = loss_chunk(t.loss_chunk, positions=micro * sizes.width, size=sizes.shape.V)
    return dict(bf16=t.precision == "bf16", dropout=config.generator.dropout > 0, checkpointing=t.gradient_checkpointing, chunk=chunk)


def planned_memory(config: Config, *, micro: int, gpu: bool) -> dict[str, float]:
    """What `measure_memory` should find for one process, one micro batch and no DeepSpeed."""
    t, sizes = config.train, generator_sizes(config)
    state = state_bytes(sizes, stage="ddp", gpus=1, optimizer=t.optimizer)
    step = activation_bytes(sizes.shape, micro=micro, width=sizes.width, gpu=gpu, **step_kind(config, sizes, micro))
    moments = peak_bytes(state, step, accumulation=1, checkpointing=t.gradient_checkpointing)
    peak = max(size for moment, size in moments.items() if moment != "evaluation")  # no part of a step
    terms = {term: state[term] for term in ("weights", "gradients", "optimizer", "ema")}
    kept = 0.0 if step["head_gradient"] else step["logits"]
    return {**terms, "saved": step["activations"] + step["bf16_weights"] + kept, "peak": peak}


def measure_memory(config: Config, *, micro: int) -> dict[str, float]:
    """Bytes of a real training step of `micro` random sequences of full length on this machine, made of the training stage's own pieces.

    weights, gradients, optimizer, ema: of the tensors themselves; saved: distinct storages kept for the backward pass; peak: the most
    that was allocated at once, by CUDA's allocator or, on a CPU, by torch's profiler. A CPU runs the attention of a GPU too, not the one
    that short sequences get there in training.
    """
    t, sizes = config.train, generator_sizes(config)
    accelerator = make_accelerator(t.precision)
    device, V = accelerator.device, sizes.shape.V
    ids, is_image = torch.randint(3, V, (micro, sizes.width)), torch.arange(V) >= V - config.image_tokenizer.codebook_size
    plain = make_generator(config.generator, vocab_size=V, max_length=2 * sizes.width, pad=0, bos=1, eos=2)
    add_dropout(plain, config.generator.dropout)
    if t.gradient_checkpointing:
        plain.gradient_checkpointing_enable()
    tune_for(plain, torch.device("cuda"))
    plain.to(device).train()
    vocabulary = SimpleNamespace(size=V, is_image=is_image)
    token_loss = TokenLoss(plain, vocabulary, rows=micro, length=sizes.width, chunk=t.loss_chunk, compile=False, say=print)
    own = optim.make_optimizer(t.optimizer, plain, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay)
    model, optimizer = accelerator.prepare(plain, own)
    ema = optim.Ema(plain, t.ema_decay)
    found: dict[str, float] = {}

    def forward() -> torch.Tensor:
        return token_loss(accelerator, model, ids, ids, torch.tensor([1.0, 1.0, t.z_loss], device=device))[0]

    def step() -> None:
        accelerator.backward(forward())
        found["gradients"] = float(sum(p.grad.nbytes for p in plain.parameters()))
        accelerator.clip_grad_norm_(plain.parameters(), t.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
    """The most bytes that `work` holds on the device at once, besides what was there before it."""
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
    events = sorted((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    return float(max(itertools.accumulate(size for _, size in events), default=0))


# --- the image tokenizer, traced ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSizes:
    """FLOPs are of one picture; bytes too. `encode` is the forward pass that the codes stage makes."""

    parameters: int
    encode_flops: float
    step_flops: float
    saved: float
    quantizer: float  # distances to the codebook, one-hot codes and the like

    def memory(self, pictures: int, gpus: int) -> float:
        """Of a training step on one of `gpus` GPUs, with so many pictures on each: weights, gradients, AdamW's moments, average, DDP's buckets, and VGG-16."""
        return (24.0 if gpus > 1 else 20.0) * self.parameters + 59e6 + pictures * (self.saved + self.quantizer)


# the most that a quantizer's forward and backward pass hold, in float32 tables of codes x codebook: measured with codebooks of 4,096
QUANTIZER_COPIES = {"VectorQuantize": 4.0, "FSQ": 0.0, "LFQ": 7.0, "SimVQ": 1.3}


def image_tokenizer_sizes(config: Config) -> ImageSizes:
    """Trace encoder, decoder, perceptual net and discriminator over one picture of fake tensors, of the grid with the most codes.

    Backward counts twice the forward pass, once for the perceptual net, whose weights stay. The quantizer is counted by hand:
    2 x codes x codebook x width of a code.
    """
    m, t = config.image_tokenizer, config.image_tokenizer_train
    h, w = max(parse_grids(config.data.grids) or [(m.image_size // m.downsample,) * 2], key=math.prod)
    bf16, size, codes = t.precision == "bf16", (h * m.downsample, w * m.downsample), h * w
    with torch.device("meta"):
        model = ImageTokenizer(m)
    latent, picture = (1, m.latent_dim, h, w), (1, m.image_channels, *size)
    encode, encoder_saved = traced(lambda: Encoder(m), picture, bf16=bf16)
    decode, decoder_saved = traced(lambda: Decoder(m), latent, bf16=bf16)
    quantize = 2.0 * codes * m.codebook_size * (m.codebook_dim if m.quantizer == "VectorQuantize" else m.latent_dim)
    step, saved = 3 * (encode + decode) + quantize, encoder_saved + decoder_saved
    if t.perceptual_weight > 0 and t.perceptual != "none":
        flops, kept = traced(vgg16, (1, 3, *size), bf16=bf16)
        scale = 1.0 if t.perceptual == "lpips" else 0.35 / 15.5  # multiplications at 224 px: SqueezeNet 1.1 and VGG-16, torchvision's table
        step, saved = step + 3 * flops * scale, saved + kept * scale  # both pictures forward, one of them backward
    if t.gan_weight > 0:
        flops, kept = traced(lambda: losses.PatchDiscriminator(m.image_channels), picture, bf16=bf16)
        step, saved = step + 9 * flops, saved + 2 * kept  # its own step over both pictures, and the decoder's gradient through it
    return ImageSizes(
        count_parameters(model), encode + quantize, step, saved, QUANTIZER_COPIES[m.quantizer] * 4.0 * codes * m.codebook_size
    )


def vgg16() -> nn.Module:
    """The convolutions of VGG-16 (Simonyan and Zisserman 2014, configuration D) that LPIPS looks through."""
    layers: list[nn.Module] = []
    width = 3
    for out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: pooling
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)] if out else [nn.MaxPool2d(2)]
        width = out or width
    return nn.Sequential(*layers).requires_grad_(False)


def traced(make: Callable[[], nn.Module], shape: tuple[int, ...], *, bf16: bool) -> tuple[float, float]:
    """(FLOPs of the forward pass, bytes it leaves for the backward pass) of a module over one input, as a GPU would run it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), torch.device("cuda"), on_fake_gpu(bf16), FlopCounterMode(display=False) as counter:
        module, inputs = make(), torch.empty(shape).requires_grad_()
        saved = saved_bytes(lambda: module(inputs), exclude=module.parameters())
    return float(counter.get_total_flops()), saved


@contextlib.contextmanager
def on_fake_gpu(bf16: bool) -> Iterator[None]:
    """CUDA's autocast rules for fake tensors; torch.autocast itself turns off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", bf16)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


class _Saved:
    """A tensor that autograd holds for a backward pass, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Any], *, exclude: Any = ()) -> float:
    """Bytes of the distinct storages that `forward` leaves for its backward pass, the storages of `exclude` aside."""
    own = {p.untyped_storage()._cdata for p in exclude}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()  # what a part of `forward` has used up by itself is gone from it

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


# --- time, communication, failures ----------------------------------------------------------------------------------


def communication_bytes(parameters: int, *, stage: str, gpus: int, accumulation: int) -> float:
    """Bytes that each GPU sends in one step (ring algorithms, float32).

    Gradients summed everywhere 2 x 4P (ddp, zero0); scattered 4P and the new weights gathered 4P (zero1); scattered with every micro
    batch (zero2); with zero3 weights gathered for each forward and backward pass (and again where a layer is recomputed in it: the same gathering) too.
    """
    P = 4.0 * parameters * (gpus - 1) / gpus
    return {"ddp": 2 * P, "zero0": 2 * P, "zero1": 2 * P, "zero2": (accumulation + 1) * P, "zero3": 3 * accumulation * P}[stage]


def best_interval(write: float, mtbf: float) -> float:
    """Seconds of work between two checkpoints that lose least: sqrt(2 x write x mtbf) (Young 1974; Daly 2006, first order)."""
    return math.sqrt(2 * write * mtbf)


def lost_share(interval: float, write: float, mtbf: float, restart: float) -> float:
    """Share of the time that checkpoints and failures cost: writing, half an interval done again and a restart for each failure."""
    return write / (interval + write) + (interval / 2 + write + restart) / mtbf


# --- the plan -------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Every figure of a plan. `as_dict` is for programs, `str` for a terminal."""

    gpu: Gpu
    gpus: int
    mfu: float
    stage: str  # what the config runs under the deepspeed launcher: the row marked * in the table
    micro: int
    accumulation: int
    checkpointing: bool
    samples: int
    sizes: Sizes
    image: ImageSizes
    image_memory: float
    step: dict[str, float]  # bytes of one micro batch
    memory: dict[str, dict[str, Any]]  # stage -> terms, moments, peak, largest_micro_batch, communication, communication_seconds
    times: dict[str, float]
    storage: dict[str, float]
    failures: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def make_plan(
    config: Config,
    *,
    gpu: str = "H100",
    gpus: int = 1,
    samples: int = 0,
    caption_tokens: float = 0.0,
    mfu: float = 0.4,
    disk: float = 2e9,
    restart: float = 600.0,
) -> Plan:
    """The plan of a config on `gpus` GPUs named `gpu`.

    samples: training pairs (0: counted where the shards are there); caption_tokens: their mean length (0: measured on the run's
    shards, else half of data.max_caption_tokens); mfu: share of the peak that model FLOPs reach; disk: bytes a second at which a
    trainer state is written; restart: seconds from a failure to the next step.
    Raises ValueError for an unknown GPU, a batch that does not divide, or a pretrained generator.
    """
    if gpus < 1 or not 0 < mfu <= 1:
        raise ValueError(f"--gpus is {gpus} and --mfu {mfu}; at least one GPU, and a share between 0 and 1")
    card, t = find_gpu(gpu), config.train
    data.check_batch(config.image_tokenizer_train.batch_size, gpus, "image_tokenizer_train.batch_size")
    micro = micro_batch(t, gpus)
    accumulation = t.batch_size // gpus // micro
    samples = samples or count_samples(config)
    sizes = generator_sizes(config, caption_tokens=caption_tokens or mean_caption_tokens(config))
    image = image_tokenizer_sizes(config)

    def step_of(micro: int, stage: str) -> dict[str, float]:
        kind = step_kind(config, sizes, micro) | ({"chunk": 0} if stage == "zero3" else {})  # there all logits are made at once
        return activation_bytes(sizes.shape, micro=micro, width=sizes.width, **kind)

    stage, zero = deepspeed_stage(config)
    memory = {}
    for name in STAGES:
        options = zero if name == stage else {}
        state = state_bytes(sizes, stage=name, gpus=gpus, optimizer=t.optimizer, **options)
        moments = peak_bytes(state, step_of(micro, name), accumulation=accumulation, checkpointing=t.gradient_checkpointing)
        sent = communication_bytes(sizes.parameters, stage=name, gpus=gpus, accumulation=accumulation)
        memory[name] = {
            "state": state, "moments": moments, "peak": max(moments.values()), "fits": max(moments.values()) <= USABLE * card.memory,
            "largest_micro_batch": largest_micro_batch(state, functools.partial(step_of, stage=name), card, accumulation=accumulation, checkpointing=t.gradient_checkpointing),
            "communication": sent, "communication_seconds": sent / (card.link if gpus <= GPUS_PER_NODE else card.network),
        }  # fmt: skip
    times = _times(config, sizes, image, card, gpus, mfu, samples, memory[stage]["communication_seconds"])
    storage = _storage(config, sizes, image, samples)
    return Plan(
        card, gpus, mfu, stage, micro, accumulation, t.gradient_checkpointing, samples, sizes, image,
        image.memory(config.image_tokenizer_train.batch_size // gpus, gpus), step_of(micro, stage), memory, times,
        storage, _failures(gpus, times["step_seconds"], t.save_every, storage["trainer_state"] / disk, restart),
    )  # fmt: skip


def deepspeed_stage(config: Config) -> tuple[str, dict[str, Any]]:
    """('zero1', its bucket settings) of the config's DeepSpeed JSON, ('ddp', {}) without one. Raises FileNotFoundError for a missing file."""
    if not config.train.deepspeed:
        return "ddp", {}
    path = Path(config.train.deepspeed)
    if not path.is_file():
        raise FileNotFoundError(f"train.deepspeed {path} does not exist; configs/deepspeed/ holds zero1.json and others")
    zero = json.loads(path.read_text()).get("zero_optimization", {"stage": 1})
    return f"zero{zero.get('stage', 0)}", {
        "bucket": float(zero.get("reduce_bucket_size", 5e8)),
        "overlap": bool(zero.get("overlap_comm", False)),
    }


def largest_micro_batch(
    state: dict[str, float], step_of: Callable[[int], dict[str, float]], gpu: Gpu, *, accumulation: int, checkpointing: bool
) -> int:
    """The most sequences of full width that one forward pass can hold; 0 where not even one fits."""

    def fits(micro: int) -> bool:
        return (
            max(peak_bytes(state, step_of(micro), accumulation=accumulation, checkpointing=checkpointing).values()) <= USABLE * gpu.memory
        )

    low, high = 0, 2**20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _times(
    config: Config, sizes: Sizes, image: ImageSizes, gpu: Gpu, gpus: int, mfu: float, samples: int, communication: float
) -> dict[str, float]:
    t, it, rate = config.train, config.image_tokenizer_train, gpus * gpu.flops * mfu
    recomputed = 4 / 3 if t.gradient_checkpointing else 1.0
    compute = t.batch_size * sizes.width * sizes.flops_per_token * recomputed / rate
    step = compute + communication
    tokens = t.steps * t.batch_size * sizes.tokens_per_sample
    return {
        "compute_seconds": compute, "communication_seconds": communication, "step_seconds": step, "hours": t.steps * step / 3600,
        "tokens_per_step": t.batch_size * sizes.tokens_per_sample, "tokens": tokens, "tokens_per_parameter": tokens / sizes.parameters,
        "tokens_per_epoch": samples * sizes.tokens_per_sample, "epochs": t.steps * t.batch_size / samples if samples else 0.0,
        "flops": float(t.steps) * t.batch_size * sizes.width * sizes.flops_per_token,
        "image_tokenizer_hours": it.steps * it.batch_size * image.step_flops / rate / 3600,
        # the codes stage runs in float32, through TF32 kernels at half of bfloat16's peak
        "encode_hours": samples * config.codes.views * image.encode_flops / (rate / 2) / 3600,
    }  # fmt: skip


def _storage(config: Config, sizes: Sizes, image: ImageSizes, samples: int) -> dict[str, float]:
    codes = 2 * config.codes.views * sizes.codes
    npy = 512 + _blocks(128 + codes)  # a tar member: a header of 512 bytes, and its content in blocks of as many
    text = 512 + _blocks(800)  # caption, tags and source of a pair, as JSON: about 800 bytes
    moments = 4 * sizes.hidden_matrices if config.train.optimizer == "muon" else 0
    return {
        "codes_per_sample": float(codes), "code_shards": float(samples * (npy + text)), "shards": float(math.ceil(samples / SHARD)),
        "checkpoint": 4.0 * (sizes.parameters + image.parameters), "trainer_state": 16.0 * sizes.parameters - moments,
    }  # fmt: skip


def _failures(gpus: int, step: float, save_every: int, write: float, restart: float) -> dict[str, float]:
    mtbf = GPU_DAYS_PER_FAILURE / gpus * 86400
    best, now = best_interval(write, mtbf), save_every * step
    return {
        "per_day": 86400 / mtbf, "mtbf_hours": mtbf / 3600, "write_seconds": write, "restart_seconds": restart, "interval_seconds": now,
        "lost_share": lost_share(now, write, mtbf, restart), "best_interval_seconds": best, "best_save_every": max(1.0, round(best / step)),
        "best_lost_share": lost_share(best, write, mtbf, restart),
    }  # fmt: skip


def _blocks(size: int) -> int:
    return -(-size // 512) * 512


# --- what is printed ------------------------------------------------------------------------------------------------

TERMS = ("weights", "master", "gradients", "optimizer", "ema", "buffers")


def _lines(plan: Plan) -> list[str]:
    s, i, t, d, f = plan.sizes, plan.image, plan.times, plan.storage, plan.failures
    lines = [
        f"{plan.gpus} x {plan.gpu.name}: {_si(plan.gpu.flops)}FLOP/s dense bf16, {plan.gpu.memory / GIB:.1f} GiB; MFU {plan.mfu:.0%} assumed",
        "",
        f"image tokenizer    {_si(i.parameters)} parameters; {_si(i.step_flops)}FLOP a picture in training, {_si(i.encode_flops)}FLOP to encode one view",
        f"                   training {_hours(t['image_tokenizer_hours'])} with {_gib(plan.image_memory)} a GPU"
        + (f"; encoding all views {_hours(t['encode_hours'])} (GPU alone, float32)" if plan.samples else ""),
        f"generator          {_si(s.parameters)} parameters: {_si(s.embedding)} embedding, {_si(s.parameters - s.embedding)} other",
        f"sequence           {s.width} ids at most (padded), {s.tokens_per_sample:.0f} with a mean caption, {s.codes} of them codes",
        f"FLOPs              {_si(s.flops_per_token)}FLOP a training token (6 x matrices + 6 L Q T, causal), {_si(s.flops_per_token * s.width)}FLOP a sample, "
        f"{_si(t['flops'])}FLOP in all",
        f"tokens             {_si(t['tokens_per_step'])} a step, {_si(t['tokens'])} in all, {t['tokens_per_parameter']:.1f} a parameter"
        + (
            f"; {_si(t['tokens_per_epoch'])} an epoch of {plan.samples:,} samples, {t['epochs']:.2f} epochs"
            if plan.samples
            else "; give --samples for epochs"
        ),
        f"micro batch        {plan.micro} a GPU x {plan.accumulation} accumulated"
        + (", gradient checkpointing" if plan.checkpointing else ""),
        "",
        "memory of a GPU    " + "".join(f"{name + ('*' if name == plan.stage else ''):>12}" for name in STAGES),
    ]
    for term in TERMS:
        lines.append(f"  {term:<17}" + "".join(f"{_gib(plan.memory[name]['state'][term]):>12}" for name in STAGES))
    for term, words in (("activations", "activations"), ("bf16_weights", "bf16 weights"), ("logits", "logits"), ("loss", "loss, backward")):
        lines.append(f"  {words:<17}" + f"{_gib(plan.step[term]):>12}" * len(STAGES))
    rows = {
        "peak": lambda m: _gib(m["peak"]), "at": lambda m: max(m["moments"], key=m["moments"].get),
        "fits": lambda m: "yes" if m["fits"] else "NO", "largest micro": lambda m: str(m["largest_micro_batch"]),
        "sent a step": lambda m: f"{m['communication'] / 1e9:.2f} GB", "in seconds": lambda m: f"{m['communication_seconds']:.3f}",
    }  # fmt: skip
    lines += [f"  {words:<17}" + "".join(f"{value(plan.memory[name]):>12}" for name in STAGES) for words, value in rows.items()]
    lines += [
        "  (* this config; muon is refused above zero0; zero3 without the whole copy on the first GPU that samples and the final checkpoint are made from. Terms do not all meet: the peak is the largest moment)",
        "",
        f"step               {t['compute_seconds']:.3f} s of computing + {t['communication_seconds']:.3f} s of communication, not overlapped = {t['step_seconds']:.3f} s",
        f"generator          {_hours(t['hours'])} on {plan.gpus} GPU(s), {t['hours'] * plan.gpus:,.1f} GPU-hours",
        f"storage            trainer state {d['trainer_state'] / 1e9:.2f} GB, checkpoint {d['checkpoint'] / 1e9:.2f} GB; {d['codes_per_sample']:.0f} bytes of codes a picture"
        + (f", code shards {d['code_shards'] / 1e9:,.1f} GB in {d['shards']:,.0f} files" if plan.samples else ""),
        f"failures           {f['per_day']:.3f} a day ({GPU_DAYS_PER_FAILURE:,.0f} GPU-days each assumed); a trainer state, {f['write_seconds']:.1f} s to write, every {f['interval_seconds']:,.0f} s and "
        f"{f['restart_seconds']:g} s to start lose {f['lost_share']:.2%}; best every {f['best_interval_seconds']:,.0f} s (save_every {f['best_save_every']:,.0f}): {f['best_lost_share']:.2%}",
    ]
    return lines


def _si(value: float) -> str:
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def _gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def _hours(hours: float) -> str:
    return f"{hours * 60:.1f} minutes" if hours < 2 else f"{hours:,.1f} hours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan's own options, for train.py and for this module."""
    add = parser.add_argument_group("plan").add_argument
    add("--gpu", default="H100", help=f"one of {', '.join(GPUS)} (%(default)s)")
    add("--gpus", type=int, default=1, help="how many (%(default)s)")
    add("--samples", type=int, default=0, help="training pairs; 0: counted where the shards are there")
    add(
        "--caption-tokens",
        type=float,
        default=0.0,
        help="mean length of a caption; 0: measured on the run's shards, else half of the longest",
    )
    add("--mfu", type=float, default=0.4, help="share of the peak that is reached (%(default)s)")
    add("--disk", type=float, default=2e9, help="bytes a second at which trainer states are written (%(default)s)")
    add(
        "--measure",
        type=int,
        default=0,
        metavar="N",
        help="also take a real training step of N samples on this machine, and compare its memory",
    )
    add("--restart", type=float, default=600.0, help="seconds from a failure to the next step (%(default)s)")


def main_plan(config: Config, args: argparse.Namespace) -> None:
    """Print the plan of a config with the options of `add_arguments`, and what a real step took where --measure asks for one."""
    print(
        make_plan(
            config,
            gpu=args.gpu,
            gpus=args.gpus,
            samples=args.samples,
            caption_tokens=args.caption_tokens,
            mfu=args.mfu,
            disk=args.disk,
            restart=args.restart,
        )
    )
    if args.measure:
        real = measure_memory(config, micro=args.measure)
        on = "cuda" if torch.cuda.is_available() else "cpu"
        planned = planned_memory(config, micro=args.measure, gpu=on == "cuda")
        print(f"\nmeasured here ({on}), one step of {args.measure} samples:")
        for term, size in real.items():
            print(f"  {term:<17}{size / 2**20:12,.1f} MiB, planned {planned[term] / 2**20:12,.1f} MiB ({planned[term] / size - 1:+.1%})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, for example configs/ladder/1.3b.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's, for example train.micro_batch_size=4"
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    main_plan(load_config(args.config, args.overrides), args)


if __name__ == "__main__":
    main()

"""Parameters and lengths of a config's generator, counted on torch's meta device, and the size of its data if available."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from tokun import data
from tokun.config import Config, parse_grids
from tokun.inference.folders import TEXT_TOKENIZER
from tokun.models.generator import count_parameters, flops_per_token, make_generator
from tokun.tokenizers import sequences
from tokun.tokenizers.text import TextTokenizer
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training.generator import build_vocabulary
from tokun.utils import checkpoint
from tokun.utils.errors import UserError


@dataclass(frozen=True)
class Shape:
    """The shape of a Qwen3 generator, as far as it affects memory and time. Q and K are the total widths of the query and key heads."""

    L: int  # layers
    H: int  # hidden width
    Q: int
    K: int
    heads: int
    kv_heads: int
    I: int
    V: int  # vocabulary
    layer_matrices: int  # parameters in the matrices of one layer


@dataclass(frozen=True)
class Sizes:
    """Parameters and lengths of a config's generator."""

    shape: Shape
    parameters: int
    embedding: int  # input embedding, plus the head if it is not tied
    hidden_matrices: int  # parameters that Muon trains
    flops_per_token: float  # forward and backward, recomputation not counted
    width: int  # ids of the longest sequence, as padded
    tokens_per_sample: float  # ids of a sequence with a caption of mean length
    codes: int  # ids of a picture


def generator_sizes(config: Config, *, caption_tokens: float = 0.0) -> Sizes:
    """Exact counts on the meta device. Raises UserError if `generator.pretrained` is set: its shape is not in the config."""
    if config.generator.pretrained:
        raise UserError(
            f"generator.pretrained is {config.generator.pretrained}: the plan sizes generators trained from scratch; "
            "give their width and depth, and generator.pretrained= (empty)"
        )
    vocabulary = plan_vocabulary(config)
    with torch.device("meta"):
        model = make_generator(
            config.generator, vocab_size=vocabulary.size, max_length=sequences.most_positions(vocabulary), pad=0, bos=1, eos=2
        )
    c, layer = model.config, model.model.layers[0]
    shape = Shape(
        c.num_hidden_layers, c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.num_attention_heads,
        c.num_key_value_heads, c.intermediate_size, c.vocab_size, sum(p.numel() for p in layer.parameters() if p.ndim == 2),
    )  # fmt: skip
    width = sequences.joint_length(vocabulary, vocabulary.max_text) - 1  # the last id is only a label
    return Sizes(
        shape=shape, parameters=count_parameters(model), embedding=c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2),
        hidden_matrices=shape.L * shape.layer_matrices, flops_per_token=flops_per_token(model, width), width=width,
        tokens_per_sample=width - vocabulary.max_text + (caption_tokens or vocabulary.max_text / 2), codes=vocabulary.max_codes,
    )  # fmt: skip


def plan_vocabulary(config: Config) -> Vocabulary:
    """The id space of a run: with the tags of its code shards if they exist, else without styles and subjects."""
    codes = checkpoint.read_record(Path(config.out) / "codes" / "codes.json")
    side = config.image_tokenizer.image_size // config.image_tokenizer.downsample
    grids = parse_grids(config.data.grids) or ((side, side),)
    codes = codes or {"tag_counts": [], "codebook_size": config.image_tokenizer.codebook_size, "grid": grids[0], "grids": grids}
    return build_vocabulary(config, SimpleNamespace(size=config.text_tokenizer.vocab_size, illegal_ids=[0]), codes)


def count_samples(config: Config) -> int:
    """Number of training pairs, from the run's code shards, else `data.toy`, else the image shards; 0 if there are none."""
    codes = checkpoint.read_record(Path(config.out) / "codes" / "codes.json")
    if codes is not None:
        return codes["counts"]["train"]
    if config.data.toy:
        return config.data.toy
    try:
        return len(data.ShardIndex(data.expand_shards(config.data.train), one_of=data.IMAGE_SUFFIXES).usable())
    except FileNotFoundError:
        return 0


def mean_caption_tokens(config: Config, most: int = 512) -> float:
    """Mean length of the first plain captions of the run's code shards in pieces of its text tokenizer; 0 if they do not exist."""
    out = Path(config.out)
    tokenizer, shards = out / "text_tokenizer" / TEXT_TOKENIZER, sorted((out / "codes").glob("train-*.tar"))
    if not tokenizer.is_file() or not shards:
        return 0.0
    encode, index = TextTokenizer.load(tokenizer).encode, data.ShardIndex(shards[:1], need=("json", data.CODES_SUFFIX)).usable()
    lengths = [min(len(encode(index.read_json(i)["caption"])), config.data.max_caption_tokens) for i in range(min(most, len(index)))]
    return sum(lengths) / len(lengths)

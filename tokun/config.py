"""Every setting of a run: dataclasses < YAML < `a.b=c` on the command line.

Knows names, types and defaults, not what they do. An unknown key raises an error that names the nearest one, a value of the
wrong type an error that names the type. All defaults are here.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tokun.utils import shipped_configs, typed_tree
from tokun.utils.errors import UserError

Fit = Literal["auto", "pad", "crop"]


@dataclass
class DataConfig:
    train: str = ""  # image shards: a path, a glob or a list joined by commas; empty when `toy` draws them
    val: str = ""  # held-out image shards; empty: no validation
    toy: int = 0  # draw this many training pictures with data_tools/toy.py (and a sixteenth as many for validation)
    toy_seed: int = 0  # of these pictures
    style: str = ""  # the style of samples without one
    style_key: str = "style"  # the JSON key that holds the style tag …
    subject_key: str = "subject"  # … the subject tag …
    thing_key: str = "thing"  # … the tag of the main thing shown …
    caption_key: str = "caption"  # … and the plain caption, where "captions" has none; another key is the only one read
    max_caption_tokens: int = 64  # longer captions are truncated, and counted
    num_workers: int = 0  # threads that decode pictures and pack sequences, besides the prefetching thread
    sort_window: int = 4096  # sequences of similar length within such a window share a batch; 0: off, more padding
    cache_gb: float = 2.0  # memory for decoded, resized pictures
    # shapes of pictures, rows x columns of codes, such as ["16x16", "12x21", "21x12"]: each picture goes to the nearest, the first is the
    # default. Empty: one square of image_tokenizer.image_size, cropped from the centre of each picture
    grids: list[str] = field(default_factory=list)
    fit: Fit = "auto"  # how a picture is fitted to its grid. auto: things on a blank background are padded, others are cropped a little


@dataclass
class TextTokenizerConfig:
    vocab_size: int = 2048  # sentencepiece pieces


@dataclass
class ImageTokenizerConfig:
    image_size: int = 64  # pixels, square crops
    image_channels: int = 1  # 1 grayscale, 3 RGB
    downsample: int = 8  # pixels per code side: 8 (f8) or 16 (f16)
    stem: int = 4  # pixel-unshuffle of the first layer (2, 4 or 8); the rest of `downsample` is strided convolutions
    channels: list[int] = field(default_factory=lambda: [96, 192])  # width per resolution, finest first
    blocks: int = 2  # residual blocks per resolution
    attention: bool = False  # one self-attention block at the code resolution: slow on CPUs
    latent_dim: int = 32  # channels between encoder and quantizer
    quantizer: Literal["VectorQuantize", "FSQ", "LFQ", "SimVQ"] = "VectorQuantize"  # what turns latents into codes
    codebook_size: int = 1024  # number of codes, 8 to 65536; a power of two for FSQ and LFQ
    codebook_dim: int = 8  # VectorQuantize only
    commitment_weight: float = 0.25  # of the loss that keeps the encoder near the codes
    decay: float = 0.99  # EMA of the codebook, VectorQuantize only
    dead_code_threshold: float = 1.0  # EMA cluster size below which a code is replaced, VectorQuantize only


@dataclass
class ImageTokenizerTrainConfig:
    steps: int = 10000  # of training; the learning rate's cosine ends there
    max_minutes: float = 0.0  # stop early after this much time; 0: never
    batch_size: int = 32  # global, over all processes
    lr: float = 1e-3  # peak learning rate of AdamW
    lr_hold: float = 0.0  # share of the training at full lr before the cosine decay; until then max_minutes can be raised without loss
    warmup_steps: int = 100  # linear rise of the learning rate
    weight_decay: float = 0.01  # of AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    precision: Literal["bf16", "no"] = "bf16"  # autocast to bfloat16, or float32
    ema_decay: float = 0.999  # of the moving average of the weights, which is what is kept
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.4])  # short side / image_size before cropping
    l1_weight: float = 1.0  # of the absolute error
    mse_weight: float = 1.0  # in addition to L1, which alone converges to the median of a hatched patch: plain grey
    perceptual: Literal["lpips", "squeezenet", "none"] = "lpips"  # whose features are compared; lpips needs torchvision
    perceptual_weights: str = ""  # squeezenet: safetensors or .pth in torchvision's layout; empty: download
    perceptual_weight: float = 0.3  # of that distance
    line_weight: float = 0.2  # local spectra: preserves spacing, direction and contrast of hatching
    gan_weight: float = 0.0  # 0: no discriminator
    gan_start: int = 5000  # the step at which the discriminator's gradient reaches the decoder
    gan_lr: float = 4e-4  # of the discriminator's AdamW
    compile: bool = (
        False  # compare perceptual features (squeezenet) in one compiled kernel: half a minute to start, then steps 10 % shorter on CPUs
    )
    log_every: int = 20  # steps, here and below
    eval_every: int = 500  # held-out figures and the sheet of reconstructions
    save_every: int = 500  # trainer states
    min_usage: float = 0.5  # the gate on held-out pictures: share of the codebook in use …
    min_perplexity: float = 0.1  # … perplexity as a share of the codebook …
    min_psnr: float = 12.0  # … and dB; the run stops before the generator if any is lower


@dataclass
class CodesConfig:
    views: int = 5  # crops per picture; view 0 is the largest centre crop
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.1])  # short side / crop size: from, to
    positions: str = "random"  # of the crops; five: corners and centre at the two ends of crop_scale, as in LlamaGen (at most 11 views)
    # mirror about half of the views except the first, unless the captions mention writing; left and right are swapped in the captions
    mirror: bool = False
    batch_size: int = 64  # crops encoded together; does not change the codes


@dataclass
class GeneratorConfig:
    pretrained: str = ""  # a causal LM's Hub id or path to start from; its own text tokenizer is then used
    hidden_size: int = 256  # width
    num_layers: int = 8  # depth
    num_heads: int = 4  # attention heads
    num_kv_heads: int = 2  # heads of keys and values, which queries share
    head_dim: int = 64  # width of a head
    intermediate_size: int = 0  # 0: 8/3 of hidden_size, rounded up to a multiple of 64
    rope_theta: float = 10000.0  # base of the rotary positions
    tie_embeddings: bool = True  # one matrix for input and output embeddings
    dropout: float = 0.1  # on the embeddings and on each residual branch, in training only
    codebook_start: bool = False  # initialise code embeddings with a random projection of the codebook: similar codes start similar


@dataclass
class TrainConfig:
    steps: int = 10000  # of training; the learning rate's cosine ends there
    # training on pictures ends after so many passes over them, if that is sooner than steps (at least twice the warm-up); 0: off
    passes: float = 0.0
    seed: int = -1  # of initial weights, order, dropout and tasks, so that runs over the same codes can differ; -1: the run's seed
    max_minutes: float = 0.0  # stop early after this much time; 0: never
    batch_size: int = 32  # global: processes x micro batch x accumulation
    micro_batch_size: int = 0  # per process and forward pass; 0: batch_size / processes
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the hidden matrices, AdamW for the rest; DDP or ZeRO stage 0
    lr: float = 1e-3  # peak learning rate
    min_lr_ratio: float = 0.05  # the cosine ends at lr times this
    lr_hold: float = 0.0  # share of the training at full lr before the cosine begins, as above
    warmup_steps: int = 200  # linear rise of the learning rate
    weight_decay: float = 0.1  # of the matrices
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    spike_factor: float = 0.0  # skip and count a step whose gradient norm is this many times its running 90 % quantile; 0: off
    precision: Literal["bf16", "no"] = "bf16"  # autocast to bfloat16, or float32
    ema_decay: float = 0.999  # of the moving average of the weights, which is what is sampled and kept
    ema_every: int = 1  # steps between updates of the average, whose decay is adjusted. 4 saves a small model on a CPU 2 to 3 % of its time
    z_loss: float = 1e-4  # weight of the squared logarithm of the softmax normaliser (PaLM)
    image_weight: float = 1.0  # of the mean loss over image tokens
    text_weight: float = 1.0  # of the mean loss over text tokens
    # weight of the loss that predicts an image network's features of the picture from the hidden states at its codes (after REPA, Yu et al.
    # 2025); 0: off. At 1 words and pictures agree better (benchmarks/README.md)
    align_weight: float = 0.0
    align_features: str = ""  # its weights, SqueezeNet 1.1: safetensors or .pth in torchvision's layout; empty: download them
    align_layer: int = 0  # the layer whose output predicts them, from 1; 0: five eighths of the layers
    word_dropout: float = 0.0  # share of input words (never of targets) replaced by random ones, so that the model must use the picture
    tag_dropout: float = 0.1  # applied to each tag, and to all of them together
    # share of the sequences without style, subject and thing, so that the model learns to look at the picture instead of relying on its
    # tags. If it is above 0, questions never have tags, nor a register
    untagged_share: float = 0.0
    plain_share: float = 0.7  # share of samples with the plain caption; the rest draw from all their registers
    # a task whose fields a sample lacks falls back to joint
    task_mix: dict[str, float] = field(default_factory=lambda: {"joint": 0.7, "text_to_image": 0.2, "question": 0.05, "rewrite": 0.05})
    deepspeed: str = ""  # DeepSpeed JSON, used under any launcher (deepspeed, torchrun, srun); empty: DDP
    gradient_checkpointing: bool = False  # compute layers again in the backward pass: less memory, more time
    loss_chunk: int = (
        0  # positions whose logits are computed at once; 0: as many as fit 1 GiB in float32, usually all; on a CPU 32 MiB, about its cache
    )
    compile: bool = False  # torch.compile of the decoder layers and the loss: half a minute to start, then up to twice the speed
    log_every: int = 20  # steps, here and below
    eval_every: int = 500  # held-out losses, of at most 384 pairs
    save_every: int = 500  # trainer states
    sample_every: int = 1000  # the captioned grid of the same seeds
    keep_last: int = 2  # trainer states kept
    # number of checkpoints of averaged weights with the lowest held-out loss (image_weight x image loss + text_weight x text loss, at
    # eval_every) kept in out/best/step-…, each complete, for sample.py and tokun.load (0: none); out/checkpoint holds the last weights
    keep_best: int = 0


@dataclass
class AdapterConfig:
    """Low-rank fine-tuning (LoRA) of the model that `start` names: its weights are frozen, small added matrices are trained."""

    rank: int = 0  # of the two matrices added to each target; 0: no adapter, all weights are trained
    alpha: float = 32.0  # the change is scaled by alpha / rank
    dropout: float = 0.0  # on the input of the added matrices
    # linear layers that get an adapter
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    dora: bool = False  # DoRA (Liu et al. 2024): direction and magnitude of each row separately
    bits: int = 0  # 8 or 4: quantize the base's weights while training (QLoRA, Dettmers et al. 2023), with bitsandbytes
    new_tags: bool = True  # tags that the base does not know get new ids after its own, with trained rows


@dataclass
class DpoConfig:
    """Learning from preferences (DPO, Rafailov et al. 2023): of two samples, the chosen one becomes likelier than it was at the start."""

    pairs: str = ""  # chosen and rejected samples, JSONL or tars: a path, a glob or a list joined by commas; empty: no DPO
    val: str = ""  # held-out pairs
    beta: float = 0.1  # cost of moving away from the start
    over: Literal["both", "image", "text"] = "both"  # which likelihood: of codes, words, or both
    label_smoothing: float = 0.0  # share of choices that may be wrong (Mitchell 2023)


@dataclass
class WordsConfig:
    """Text-only training: rewriting a description as a caption in one register, from a table of both."""

    train: str = ""  # CSV, TSV, JSONL or Parquet; empty: no text-only training
    val: str = ""  # held-out rows
    description: str = "description"  # the input column …
    caption: str = "caption"  # … and the target column
    register: str = ""  # of the captions; an unknown one becomes a new tag


MAX_CANDIDATES = 10_000  # of a pair


@dataclass
class SamplingConfig:
    n: int = 16  # pairs in the grid that training logs
    seed: int = 42  # of that grid
    temperature: float = 1.0  # of codes; all from here on are also the defaults that the checkpoint is sampled with
    text_temperature: float = 0.7  # of words
    top_k: int = 0  # of codes; 0: off
    top_p: float = 1.0  # of codes; 1: off
    guidance_scale: float = 1.0  # of codes by tags and prompt; 1: off
    # no word and no phrase of up to six pieces twice in a row, no word twice that training captions hardly ever have twice
    no_repeats: bool = False
    text_guidance_scale: float = 1.0  # of words by their picture; 1: off; above 1, fit to the picture counts for more than fluency
    best_of: int = 1  # candidates of a pair, of which sample.py, `model(seed)`, tokun.pipeline and the demo keep the best; 1: single draws


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options: the keyword arguments of `Tokun.sample` and of everything that passes them on."""

    style: str = ""  # a tag; empty: drawn from the latent, as often as in training
    subject: str = ""  # another
    thing: str = ""  # another: the main noun, what the picture shows
    register: str = ""  # of the words; empty: plain
    aspect: str = (
        ""  # width:height (4:3), wide, tall, square or a grid (rows x columns, 12x16); the nearest grid is used; empty: drawn like the tags
    )
    prompt: str | None = None  # a caption to draw
    temperature: float | None = None  # of codes, and a factor on that of the words; None, here and below: the checkpoint's default
    text_temperature: float | None = None  # of words
    top_k: int | None = None  # of codes; 0 is off
    top_p: float | None = None  # keep the likeliest tokens that make up this share; 1 is off
    guidance_scale: float | None = None  # of codes by tags and prompt; 1 is off
    text_guidance_scale: float | None = None  # of words by their picture; 1 is off
    no_repeats: bool | None = None  # no word and no short phrase twice in a row, nor a word repeated that training captions rarely repeat
    batch_size: int = 16  # samples drawn together; does not change them


@dataclass
class TrackingConfig:
    kind: Literal["wandb", "tensorboard", "none"] = "wandb"  # where logs go
    project: str = "tokun"  # of Weights & Biases
    name: str = ""  # of the run there; empty: the folder's


@dataclass
class CardConfig:
    license: str = ""  # the model's licence for its Hub card, such as cc-by-4.0; empty: none


@dataclass
class RewardConfig:
    """One reward or judge. `tokun/align/rewards.py` lists the fields that each kind uses."""

    kind: str = ""  # pmi, clip, svg … or your own module:function
    weight: float = 1.0  # of a reward; negative for a cost. Ignored for judges
    judge: str = ""  # of a reward: the one of grpo.judges that tells whether its rise is real; empty: all of them
    of: str = ""  # the scoring model: an id, a folder or a file; for pmi and its like a checkpoint, empty: the start
    clip: str = ""  # the CLIP model of an aesthetic head
    question: str = ""  # with {} for the caption; for own_yes and vqa
    shards: str = ""  # image shards of pictures or captions to compare with
    n: int = 512  # how many of them
    max_bytes: int = 10_000  # of a drawing


@dataclass
class GrpoConfig:
    """Post-training by rewards (`tokun/align/grpo.py`): runs if `rewards` is not empty.
    `train` sets lr, steps (rollouts) and batch_size (pairs per update)."""

    rewards: list[RewardConfig] = field(default_factory=list)  # what is optimised: entries as in RewardConfig
    judges: list[RewardConfig] = field(default_factory=list)  # measured, never optimised: do they rise with the rewards?
    prompts: str = ""  # descriptions to draw, a text file or image shards; empty: pictures and their captions, both from seeds
    eval_prompts: str = ""  # held-out prompts; empty: the last sixteenth of the prompts
    # which tokens are trained; with prompts only the picture's can be.
    # The others keep near the start (kl), and are drawn as the checkpoint draws them
    learn: Literal["both", "image", "text"] = "both"
    group_size: int = 8  # pairs that share tags or a prompt and are compared; with learn text: captions of one picture
    minibatches: int = 1  # updates into which a rollout is split …
    epochs: int = 1  # … and passes over them
    # rollouts are drawn, and the policy is trained, with these four; 0: the start's own, since what is gained otherwise is overshot then.
    # A guidance scale other than 1 costs a second pass. The temperature
    temperature: float = 0.0  # of codes
    text_temperature: float = 0.0  # of words
    guidance_scale: float = 0.0  # of codes
    text_guidance_scale: float = 0.0  # of words
    scale: Literal["group", "batch", "none"] = (
        "group"  # what a reward is divided by: its standard deviation in the group, in the whole rollout, nothing (Liu et al. 2025)
    )
    clip_low: float = 0.2  # the probability ratio is clipped at 1 - this …
    clip_high: float = 0.28  # … and 1 + this: a higher bound lets rare tokens grow and delays entropy collapse (DAPO, Yu et al. 2025)
    kl: float = 0.02  # weight of the KL divergence from the start (k3)
    entropy: float = 0.0  # weight of the squared difference of the entropy from the start's (after STAGE, Ma et al. 2025); 0: only logged
    least_entropy: float = 0.3  # the run stops when entropy falls below this share of the start's; 0: never
    easy: float = 1.0  # tokens of at least this probability are not trained; 1: all are
    # 0 to 1: train codes less if the group's other pictures have similar ones at their position, since they are pushed both ways (STAGE)
    similar: float = 0.0
    perturb: list[str] = field(default_factory=list)  # before scoring: crop, noise, jpeg
    eval_n: int = 64  # pairs drawn and judged before, at train.eval_every and at the end
    eval_seed: int = 1_000_003  # of these pairs
    copies_of: str = ""  # image shards of training pictures, searched for near copies
    features: str = ""  # weights of SqueezeNet 1.1 or Inception v3, for diversity; empty: small grey pictures


@dataclass
class Config:
    out: str = "runs/default"  # folder of everything that the run makes
    seed: int = 0  # of initial weights, order, dropout and crops
    start: str = (
        ""  # "bundled", a checkpoint's folder or Hub id: use its tokenizers and fine-tune its generator; empty: train all from scratch
    )
    threads: int = 0  # CPU threads per process; 0: torch's choice
    data: DataConfig = field(default_factory=DataConfig)
    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    image_tokenizer_train: ImageTokenizerTrainConfig = field(default_factory=ImageTokenizerTrainConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    words: WordsConfig = field(default_factory=WordsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    card: CardConfig = field(default_factory=CardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    # no setting, hence no field: the keys of `sampling` that were named, as all others may come from the model of `start`
    sampling_given = frozenset[str]()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the config of that name that comes with tokun; apply `a.b=c` overrides, check every key and type.

    Raises FileNotFoundError for a missing file, UserError for unreadable YAML, an unknown key or a wrong type.
    """
    path = shipped_configs.find(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.3)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"config {path} does not exist.{hint} Tokun comes with {', '.join(shipped_configs.names())}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not readable YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds a {type(tree).__name__}, not a mapping of settings such as `seed: 0`")
    for override in overrides:
        typed_tree.override(tree, override, Config)
    return from_dict(tree, where=str(path))


def from_dict(tree: dict[str, Any], *, where: str = "config") -> Config:
    """Nested dict -> checked Config. Raises UserError naming the key, the value and the way out."""
    config = typed_tree.build(Config, tree, where=where)
    config.sampling_given = frozenset(tree.get("sampling") or ())
    for section, name in PATHS:
        place = getattr(config, section) if section else config
        setattr(place, name, os.path.expanduser(getattr(place, name)))
    for reward in (*config.grpo.rewards, *config.grpo.judges):
        reward.of, reward.clip = os.path.expanduser(reward.of), os.path.expanduser(reward.clip)
    _check_counts(config, where=where)
    return config


# settings that must be at least 1, by name, in any section
POSITIVE = {
    "steps", "batch_size", "log_every", "eval_every", "save_every", "sample_every", "keep_last", "views", "vocab_size",
    "max_caption_tokens", "image_size", "downsample", "stem", "blocks", "latent_dim", "codebook_size", "codebook_dim", "hidden_size",
    "num_layers", "num_heads", "num_kv_heads", "head_dim", "minibatches", "epochs", "eval_n", "best_of",
}  # fmt: skip
# paths in which ~ is expanded, besides `of` and `clip` of rewards and judges. `data.expand_shards` expands lists of shards (data.train,
# dpo.pairs …) part by part when they are opened
PATHS = (
    ("", "out"),
    ("", "start"),
    ("image_tokenizer_train", "perceptual_weights"),
    ("generator", "pretrained"),
    ("train", "deepspeed"),
    ("train", "align_features"),
    ("words", "train"),
    ("words", "val"),
    ("grpo", "prompts"),
    ("grpo", "eval_prompts"),
    ("grpo", "features"),
)
AT_MOST = {"best_of": MAX_CANDIDATES}
NOT_NEGATIVE = {"loss_chunk", "keep_best", "rank", "passes"}
PAIRS = {"crop_scale", "betas"}  # lists of exactly two numbers
MOST_RATIO = 3  # of the largest grid's codes to the smallest's, so that batches of all grids cost about the same


def _check_counts(config: Config, *, where: str) -> None:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values) or isinstance(values, type):
            continue
        for name, value in dataclasses.asdict(values).items():
            if name in POSITIVE and value < 1:
                raise UserError(f"{where}: {section.name}.{name} is {value}; it must be at least 1")
            if name in AT_MOST and value > AT_MOST[name]:
                raise UserError(f"{where}: {section.name}.{name} is {value}; it must be at most {AT_MOST[name]:,}")
            if name in NOT_NEGATIVE and value < 0:
                raise UserError(f"{where}: {section.name}.{name} is {value}; it must be 0 or more")
            if name in PAIRS and len(value) != 2:
                raise UserError(f"{where}: {section.name}.{name} is {value}; it takes two numbers")
    try:
        parse_grids(config.data.grids)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    positions, most = config.codes.positions, 1 + 5 * len({end for end in config.codes.crop_scale if end > 1})
    if positions not in ("random", "five"):
        raise UserError(f"{where}: codes.positions is {positions!r}; it must be random or five")
    if positions == "five" and config.codes.views > most:
        raise UserError(
            f"{where}: codes.views is {config.codes.views}; with positions five and crop_scale {config.codes.crop_scale} there are {most}: "
            "set codes.views to at most that"
        )


def parse_grids(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """["16x16", "12x21"] (rows x columns of codes) -> ((16, 16), (12, 21)). Raises UserError for an invalid or repeated
    grid, and for grids whose numbers of codes differ by more than MOST_RATIO."""
    grids: list[tuple[int, int]] = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", str(name))
        if match is None:
            raise UserError(f"data.grids names {name!r}; a grid is rows x columns of codes, both at least 1, for example 12x21")
        grid = (int(match[1]), int(match[2]))
        if grid in grids:
            raise UserError(f"data.grids names {name} twice: name each grid once")
        grids.append(grid)
    codes = [rows * columns for rows, columns in grids]
    if codes and max(codes) > MOST_RATIO * min(codes):
        few, many = (f"{grids[codes.index(n)][0]}x{grids[codes.index(n)][1]} ({n} codes)" for n in (min(codes), max(codes)))
        raise UserError(
            f"data.grids holds {few} and {many}: the ratio may be at most {MOST_RATIO}; choose grids with similar numbers of codes"
        )
    return tuple(grids)


def to_dict(config: Any) -> dict[str, Any]:
    """Config (or one of its sections) -> nested dict; `from_dict` is its inverse."""
    return dataclasses.asdict(config)

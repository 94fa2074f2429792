"""The plan: every figure of a config on a number of GPUs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from typing import Any

from tokun import data
from tokun.config import Config
from tokun.planner.duration import communication_bytes, failures_of, times_of
from tokun.planner.gpus import GPUS_PER_NODE, USABLE, Gpu, find_gpu
from tokun.planner.image_tokenizer import ImageSizes, image_tokenizer_sizes
from tokun.planner.memory import STAGES, activation_bytes, largest_micro_batch, peak_bytes, state_bytes, step_kind
from tokun.planner.report import report_lines
from tokun.planner.sizes import Sizes, count_samples, generator_sizes, mean_caption_tokens
from tokun.training.run import micro_batch
from tokun.utils import shipped_configs
from tokun.utils.errors import UserError, reading

SHARD = 1000  # pictures in a shard, as data_tools.prepare writes them


@dataclass
class Plan:
    """Every figure of a plan. `as_dict` is for programs, `str` for a terminal."""

    gpu: Gpu
    gpus: int
    mfu: float
    stage: str  # the stage that the config uses under the deepspeed launcher: marked * in the table
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
        return "\n".join(report_lines(self))


def make_plan(
    config: Config, *, gpu: str = "H100", gpus: int = 1, samples: int = 0, caption_tokens: float = 0.0, mfu: float = 0.4, disk: float = 2e9,
    restart: float = 600.0,
) -> Plan:  # fmt: skip
    """The plan of a config on `gpus` GPUs named `gpu`.

    samples: training pairs (0: counted in the shards, if they exist); caption_tokens: mean caption length (0: measured on the run's
    shards, else half of data.max_caption_tokens); mfu: share of the peak that model FLOPs reach; disk: bytes per second when
    writing a trainer state; restart: seconds from a failure to the next step.
    Raises UserError for an unknown GPU, a batch that does not divide, or a pretrained generator.
    """
    if gpus < 1 or not 0 < mfu <= 1:
        raise UserError(f"--gpus is {gpus} and --mfu {mfu}; at least one GPU, and a share between 0 and 1")
    card, t = find_gpu(gpu), config.train
    data.check_batch(config.image_tokenizer_train.batch_size, gpus, "image_tokenizer_train.batch_size")
    micro = micro_batch(t, gpus)
    accumulation = t.batch_size // gpus // micro
    samples = samples or count_samples(config)
    sizes = generator_sizes(config, caption_tokens=caption_tokens or mean_caption_tokens(config))
    image = image_tokenizer_sizes(config)

    def step_of(micro: int, stage: str) -> dict[str, float]:
        # zero3 computes all logits at once
        kind: dict[str, Any] = step_kind(config, sizes, micro) | ({"chunk": 0} if stage == "zero3" else {})
        return activation_bytes(sizes.shape, micro=micro, width=sizes.width, **kind)

    stage, zero = deepspeed_stage(config)
    memory = {}
    for name in STAGES:
        options = zero if name == stage else {}
        state = state_bytes(sizes, stage=name, gpus=gpus, optimizer=t.optimizer, **options)
        moments = peak_bytes(state, step_of(micro, name), accumulation=accumulation, checkpointing=t.gradient_checkpointing)
        sent = communication_bytes(sizes.parameters, stage=name, gpus=gpus, accumulation=accumulation)
        memory[name] = {
            "state": state,
            "moments": moments,
            "peak": max(moments.values()),
            "fits": max(moments.values()) <= USABLE * card.memory,
            "largest_micro_batch": largest_micro_batch(
                state,
                functools.partial(step_of, stage=name),
                card,
                accumulation=accumulation,
                checkpointing=t.gradient_checkpointing,
            ),
            "communication": sent,
            "communication_seconds": sent / (card.link if gpus <= GPUS_PER_NODE else card.network),
        }
    times = times_of(config, sizes, image, card, gpus, mfu, samples, memory[stage]["communication_seconds"])
    storage = _storage(config, sizes, image, samples)
    return Plan(
        card, gpus, mfu, stage, micro, accumulation, t.gradient_checkpointing, samples, sizes, image,
        image.memory(config.image_tokenizer_train.batch_size // gpus, gpus), step_of(micro, stage), memory, times,
        storage, failures_of(gpus, times["step_seconds"], t.save_every, storage["trainer_state"] / disk, restart),
    )  # fmt: skip


def deepspeed_stage(config: Config) -> tuple[str, dict[str, Any]]:
    """('zero1', its bucket settings) of the config's DeepSpeed JSON; ('ddp', {}) without one. Raises FileNotFoundError if it is missing."""
    if not config.train.deepspeed:
        return "ddp", {}
    path = shipped_configs.find(config.train.deepspeed, ".json")
    if not path.is_file():
        there = ", ".join(f"configs/{name}.json" for name in shipped_configs.names(".json"))
        raise FileNotFoundError(f"train.deepspeed {path} does not exist; there are {there}")
    with reading(f"train.deepspeed {path}"):
        zero = json.loads(path.read_text()).get("zero_optimization", {"stage": 1})
    return f"zero{zero.get('stage', 0)}", {
        "bucket": float(zero.get("reduce_bucket_size", 5e8)),
        "overlap": bool(zero.get("overlap_comm", False)),
    }


def _storage(config: Config, sizes: Sizes, image: ImageSizes, samples: int) -> dict[str, float]:
    codes = 2 * config.codes.views * sizes.codes
    npy = 512 + _blocks(128 + codes)  # a tar member: a header of 512 bytes, then its content in blocks of 512
    text = 512 + _blocks(800)  # caption, tags and source of a pair, as JSON: about 800 bytes
    moments = 4 * sizes.hidden_matrices if config.train.optimizer == "muon" else 0
    return {
        "codes_per_sample": float(codes), "code_shards": float(samples * (npy + text)), "shards": float(math.ceil(samples / SHARD)),
        "checkpoint": 4.0 * (sizes.parameters + image.parameters), "trainer_state": 16.0 * sizes.parameters - moments,
    }  # fmt: skip


def _blocks(size: int) -> int:
    return -(-size // 512) * 512

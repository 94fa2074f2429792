"""Time, communication and failures, in seconds and bytes."""

from __future__ import annotations

import math

from tokun.config import Config
from tokun.planner.gpus import Gpu
from tokun.planner.image_tokenizer import ImageSizes
from tokun.planner.sizes import Sizes
from tokun.training.generator import steps_of
from tokun.training.start_report import sensible_passes

# 419 unexpected interruptions in 54 days on 16,384 GPUs: Llama Team 2024, "The Llama 3 Herd of Models", section 3.3.4
GPU_DAYS_PER_FAILURE = 16384 * 54 / 419


def communication_bytes(parameters: int, *, stage: str, gpus: int, accumulation: int) -> float:
    """Bytes that each GPU sends in one step (ring algorithms, float32).

    ddp, zero0: all-reduce of the gradients, 2 x 4P. zero1: reduce-scatter 4P, and all-gather of the new weights 4P. zero2: reduce-scatter
    with every micro batch. zero3: also all-gather of the weights for each forward and backward pass; recomputed layers share the latter.
    """
    P = 4.0 * parameters * (gpus - 1) / gpus
    return {"ddp": 2 * P, "zero0": 2 * P, "zero1": 2 * P, "zero2": (accumulation + 1) * P, "zero3": 3 * accumulation * P}[stage]


def best_interval(write: float, mtbf: float) -> float:
    """Seconds between checkpoints that lose the least time: sqrt(2 x write x mtbf) (Young 1974; Daly 2006, first order)."""
    return math.sqrt(2 * write * mtbf)


def lost_share(interval: float, write: float, mtbf: float, restart: float) -> float:
    """Share of the time lost to checkpoints and failures: writing, and for each failure half an interval of repeated work and a restart."""
    return write / (interval + write) + (interval / 2 + write + restart) / mtbf


def times_of(
    config: Config, sizes: Sizes, image: ImageSizes, gpu: Gpu, gpus: int, mfu: float, samples: int, communication: float
) -> dict[str, float]:
    """Seconds and hours of the stages, tokens and FLOPs. mfu: share of the GPUs' peak, communication: seconds of a step."""
    t, it, rate = config.train, config.image_tokenizer_train, gpus * gpu.flops * mfu
    recomputed = 4 / 3 if t.gradient_checkpointing else 1.0
    compute = t.batch_size * sizes.width * sizes.flops_per_token * recomputed / rate
    step = compute + communication
    steps = steps_of(t, samples) if samples else t.steps
    tokens = steps * t.batch_size * sizes.tokens_per_sample
    sensible, enough = sensible_passes(samples, t.batch_size, going_on=bool(config.start), adapter=bool(config.adapter.rank))
    return {
        "compute_seconds": compute, "communication_seconds": communication, "step_seconds": step, "hours": steps * step / 3600,
        "tokens_per_step": t.batch_size * sizes.tokens_per_sample, "tokens": tokens, "tokens_per_parameter": tokens / sizes.parameters,
        "tokens_per_epoch": samples * sizes.tokens_per_sample, "epochs": steps * t.batch_size / samples if samples else 0.0,
        "sensible_epochs": float(sensible), "sensible_steps": float(enough),
        "flops": float(steps) * t.batch_size * sizes.width * sizes.flops_per_token,
        "image_tokenizer_hours": it.steps * it.batch_size * image.step_flops / rate / 3600,
        # the codes stage runs in float32, through TF32 kernels at half of bfloat16's peak
        "encode_hours": samples * config.codes.views * image.encode_flops / (rate / 2) / 3600,
    }  # fmt: skip


def failures_of(gpus: int, step: float, save_every: int, write: float, restart: float) -> dict[str, float]:
    """The cost of failures and trainer states, with steps of `step` seconds; write, restart: seconds."""
    mtbf = GPU_DAYS_PER_FAILURE / gpus * 86400
    best, now = best_interval(write, mtbf), save_every * step
    return {
        "per_day": 86400 / mtbf, "mtbf_hours": mtbf / 3600, "write_seconds": write, "restart_seconds": restart, "interval_seconds": now,
        "lost_share": lost_share(now, write, mtbf, restart), "best_interval_seconds": best, "best_save_every": max(1.0, round(best / step)),
        "best_lost_share": lost_share(best, write, mtbf, restart),
    }  # fmt: skip

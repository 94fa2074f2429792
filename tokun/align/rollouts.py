"""Rollouts: groups of pairs that share their tags or prompt and differ in the rest of their latents, drawn with the ordinary sampler.

Pair k of rollout s is sample s * n + k of the run's seed, where n is the number of pairs of a rollout over all processes. Samples are a
function of (seed, step, weights), so a resumed run draws the same ones. All latents of a group have the tag slots of its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokun.config import GrpoConfig
from tokun.data.sample_order import Order
from tokun.evaluate.held_out_pairs import read_captions
from tokun.inference import latents, sampling
from tokun.inference.conditional_generation import require_task
from tokun.tokenizers.sequences import pack_joint, pack_text_to_image, padded
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun

ROWS = 64  # pairs drawn together


@dataclass(frozen=True)
class Prompts:
    """Descriptions to draw, for training and held out. Empty if both pictures and captions come from seeds."""

    train: Sequence[str]
    held_out: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.train)


def read_prompts(config: GrpoConfig, model: Tokun) -> Prompts:
    """Read the prompts of a config. Raises UserError for a model that cannot draw from text, for empty files, and for texts that are too long."""
    if not config.prompts:
        if config.eval_prompts:
            raise UserError("grpo.eval_prompts is set but grpo.prompts is not: name training prompts, too")
        return Prompts([], [])
    require_task(model, "text_to_image")
    train = texts_of(config.prompts, "grpo.prompts")
    held_out = texts_of(config.eval_prompts, "grpo.eval_prompts") if config.eval_prompts else train[-max(1, len(train) // 16) :]
    train = train if config.eval_prompts else train[: -len(held_out)]
    if not train:
        raise UserError(f"grpo.prompts {config.prompts} holds one description; it needs at least two, or set grpo.eval_prompts, too")
    for text in (*train, *held_out):
        model.encode_text(text)
    return Prompts(train, held_out)


def texts_of(source: str, option: str) -> list[str]:
    """Distinct descriptions of a text file with one per line, or distinct plain captions of image shards."""
    if source.endswith(".tar") or not Path(source).is_file():
        found = read_captions(source)
    else:
        found = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines()]
    if not (found := list(dict.fromkeys(text for text in found if text))):
        raise UserError(f"{option} {source} holds no description; give a text file with one per line, or image shards with captions")
    return found


def draw(model: Tokun, config: GrpoConfig, prompts: Prompts, *, seed: int, step: int, numbers: Sequence[int], size: int) -> list[Pair]:
    """Draw pairs `numbers` (whole groups) of the `size` pairs of rollout `step`."""
    found = [step * size + number for number in numbers]
    u = latents.uniform(latents.draw(seed, found, model.slots.size))
    for first in range(0, len(u), config.group_size):
        u[first : first + config.group_size, : latents.TAG_SLOTS] = u[first, : latents.TAG_SLOTS].clone()
    order = Order(len(prompts.train), seed) if prompts else None
    wanted = [prompts.train[order[index // config.group_size]] if order else None for index in found]
    return pairs_of(model, u, seed, found, wanted, how_of(model, config))


def how_of(model: Tokun, config: GrpoConfig) -> dict[str, Any]:
    """Sampling options of rollouts from the config: no top-k or top-p, whatever the checkpoint's settings."""
    return {
        "image": sampling.Choice(config.temperature), "text": sampling.Choice(config.text_temperature),
        "guidance_scale": config.guidance_scale, "text_guidance_scale": config.text_guidance_scale,
    }  # fmt: skip


def pairs_of(
    model: Tokun, u: Tensor, seed: int, indices: Sequence[int], prompts: Sequence[str | None], how: dict[str, Any], rows: int = ROWS
) -> list[Pair]:
    """One pair per row of u, for its prompt if there is one; rows with the same prompt are drawn together."""
    out: dict[int, Pair] = {}
    for prompt in dict.fromkeys(prompts):
        mine = [i for i, own in enumerate(prompts) if own == prompt]
        caption = None if prompt is None else model.encode_text(prompt)
        wanted = model.wanted_tags()
        found = model.frequencies(wanted, caption)
        for first in range(0, len(mine), rows):
            part = mine[first : first + rows]
            pairs, _ = model.pairs_from(
                u[part],
                seed,
                [indices[i] for i in part],
                found.draw_all(u[part, : latents.TAG_SLOTS].tolist(), wanted),
                caption=caption,
                **how,
            )
            out |= dict(zip(part, pairs))
    return [out[i] for i in range(len(u))]


def held_out_pairs(model: Tokun, config: GrpoConfig, prompts: Prompts) -> list[Pair]:
    """The pairs for evaluating a model: `eval_n` of `eval_seed`, drawn with the checkpoint's own settings, cycling through the held-out prompts."""
    how, indices = model.plan().how, range(config.eval_n)
    u = latents.uniform(latents.draw(config.eval_seed, indices, model.slots.size))
    texts = [prompts.held_out[i % len(prompts.held_out)] if prompts else None for i in indices]
    return pairs_of(model, u, config.eval_seed, indices, texts, how)


def sequences(model: Tokun, pairs: Sequence[Pair], *, prompted: bool) -> Tensor:
    """The pairs' sequences of ids: int64 (B, T), right-padded, on the model's device."""
    v = model.vocabulary
    pack = pack_text_to_image if prompted else pack_joint
    return torch.tensor(padded(v, [pack(v, pair.tags, pair.codes, pair.caption_ids).input_ids for pair in pairs]), device=model.device)

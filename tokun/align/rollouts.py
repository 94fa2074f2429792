"""Rollouts: groups of pairs that share their tags or prompt and differ in the rest of their latents, drawn with the ordinary sampler.

Pair k of rollout s is sample s * n + k of the run's seed, where n is the number of pairs of a rollout over all processes.
Samples are a function of (seed, step, weights), so a resumed run draws the same ones.
All latents of a group have the tag slots of its first.
If only words are learned, a group is one picture with several captions, so that rewards compare words and not pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokun.align.objective import Guidance
from tokun.config import GrpoConfig
from tokun.data.sample_order import Order
from tokun.evaluate.held_out_pairs import read_captions
from tokun.inference import conditional_generation, latents
from tokun.inference.conditional_generation import require_task
from tokun.inference.token_choice import Choice, DecodingSettings
from tokun.tokenizers import sequences
from tokun.tokenizers.sequences import padded
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun

ROWS = 64  # pairs drawn together
# settings that are the start's own where they are 0
AS_SAMPLED = ("temperature", "text_temperature", "guidance_scale", "text_guidance_scale")


@dataclass(frozen=True)
class Prompts:
    """Descriptions to draw, for training and held out. Empty if both pictures and captions come from seeds."""

    train: Sequence[str]
    held_out: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.train)


def read_prompts(config: GrpoConfig, model: Tokun) -> Prompts:
    """Read the prompts of a config.

    Raises UserError for a model that cannot draw from text, for empty files, and for texts that are too long.
    """
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
    u = model.uniforms(seed, found)
    latents.share_tags(u, config.group_size)
    if config.learn == "text":
        return captions_of_pictures(model, config, u, seed, found)
    order = Order(len(prompts.train), seed) if prompts else None
    wanted = [prompts.train[order[index // config.group_size]] if order else None for index in found]
    return pairs_of(model, u, seed, found, wanted, how_of(model, config))


def captions_of_pictures(model: Tokun, config: GrpoConfig, u: Tensor, seed: int, indices: Sequence[int]) -> list[Pair]:
    """One pair per row of u; the rows of a group have the first one's picture, which is drawn once."""
    size, how, v = config.group_size, how_of(model, config), model.vocabulary
    shown = [pair for pair in pairs_of(model, u[::size], seed, indices[::size], [None] * len(u[::size]), how) for _ in range(size)]
    tags = [pair.tags for pair in shown]
    prompts = [sequences.caption_prompt(v, pair.tags, pair.codes) for pair in shown]
    out: dict[int, Pair] = {}
    for width in dict.fromkeys(map(len, prompts)):  # rows of a batch have prompts of one length
        mine = [i for i, prompt in enumerate(prompts) if len(prompt) == width]
        for first in range(0, len(mine), ROWS):
            part = mine[first : first + ROWS]
            unconditional = [sequences.caption_prompt(v, tags[i], None) for i in part]
            given_prompts = [prompts[i] for i in part]
            guidance = how.text_guidance_scale
            made = conditional_generation.write(model, given_prompts, u[part], how.text, unconditional, guidance)
            texts = [sequences.unpack(v, row).caption or [] for row in made.ids.tolist()]
            alone = conditional_generation.nll_alone(model, [tags[i] for i in part], texts, made, guidance)
            for i, text, own, without in zip(part, texts, made.text_nll.tolist(), alone):
                words = model.text_tokenizer.decode(text)
                out[i] = replace(shown[i], index=indices[i], caption=words, caption_ids=text, caption_nll=own, pmi=without - own)
    return [out[i] for i in range(len(u))]


def as_sampled(config: GrpoConfig, start: Tokun) -> GrpoConfig:
    """The config with temperatures and guidance scales that are 0 replaced by the start's; by 1 if the start's is 0, too."""
    return replace(config, **{name: getattr(config, name) or getattr(start.defaults, name) or 1.0 for name in AS_SAMPLED})


def how_of(model: Tokun, config: GrpoConfig) -> DecodingSettings:
    """How rollouts are drawn: what is learned by the config, without top-k or top-p; what is not, as the checkpoint draws it."""
    how, config = model.plan().how, as_sampled(config, model)
    if config.learn != "text":
        how = replace(how, image=Choice(config.temperature), guidance_scale=config.guidance_scale)
    if config.learn != "image":
        how = replace(how, text=Choice(config.text_temperature), text_guidance_scale=config.text_guidance_scale)
    return how


def guidance(model: Tokun, config: GrpoConfig, pairs: Sequence[Pair], *, prompted: bool) -> list[Guidance]:
    """How the learned tokens of the pairs were guided; empty if they were not."""
    v, out, config = model.vocabulary, [], as_sampled(config, model)
    as_ids = lambda rows: torch.tensor(padded(v, rows), device=model.device)  # noqa: E731
    if config.learn != "text" and config.guidance_scale != 1:
        rows = [sequences.image_scored(v, v.bare(pair.tags.grid), pair.codes).input_ids for pair in pairs]
        out.append(Guidance.of_codes(v, config.guidance_scale, as_ids(rows)))
    if config.learn != "image" and config.text_guidance_scale != 1 and not prompted:
        rows = [sequences.caption_scored(v, pair.tags, None, pair.caption_ids).input_ids for pair in pairs]
        out.append(Guidance.of_words(v, config.text_guidance_scale, as_ids(rows)))
    return out


def pairs_of(
    model: Tokun, u: Tensor, seed: int, indices: Sequence[int], prompts: Sequence[str | None], how: DecodingSettings, rows: int = ROWS
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
            tags = found.draw_all(u[part, : latents.TAG_SLOTS].tolist(), wanted)
            pairs, _ = model.pairs_from(u[part], seed, [indices[i] for i in part], tags, how, caption=caption)
            out |= dict(zip(part, pairs))
    return [out[i] for i in range(len(u))]


def held_out_pairs(model: Tokun, config: GrpoConfig, prompts: Prompts) -> list[Pair]:
    """The pairs for evaluating a model: `eval_n` of `eval_seed`, drawn with the checkpoint's own settings.

    Held-out prompts are used in turn.
    """
    how, indices = model.plan().how, range(config.eval_n)
    u = model.uniforms(config.eval_seed, indices)
    texts = [prompts.held_out[i % len(prompts.held_out)] if prompts else None for i in indices]
    return pairs_of(model, u, config.eval_seed, indices, texts, how)


def packed(model: Tokun, pairs: Sequence[Pair], *, prompted: bool) -> Tensor:
    """The pairs' sequences of ids: int64 (B, T), right-padded, on the model's device."""
    v = model.vocabulary
    pack = sequences.pack_text_to_image if prompted else sequences.pack_joint
    return torch.tensor(padded(v, [pack(v, pair.tags, pair.codes, pair.caption_ids).input_ids for pair in pairs]), device=model.device)

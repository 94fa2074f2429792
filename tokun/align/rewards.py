"""Rewards: one number per pair. Their names, and how they are made, checked and combined.

    kind            reads                value for a pair
    pmi             of                   nats of the caption that the picture explains, by the model before training (frozen), or `of`
    mmi             of                   the mean of pmi and likelihood: pictures that their captions fit, and that the model is sure of
    likelihood      of                   log-likelihood of the caption, given the picture: high where the model is sure of what it has drawn
    pmi_both        of                   PMI without tags: the mean of caption given picture and of picture given caption
    match           of                   how well the caption fits the picture by the checkpoint's matching head: a cosine
    pmi_first       of                   share of the own caption among it and 15 others of the batch, by exp(PMI); 0 to 1
    clip            of                   cosine of picture and caption by an open_clip model: id or folder (see benchmarks/clip_judge.py)
    clip_first      of                   probability that this model ranks the pair's caption above 15 other captions drawn from the batch
    recognition     of, shards           the same by a ridge regression from ImageNet features on the shards (`evaluate.recognition`)
    description     of, shards           that regression's score of the pair's caption
    style           of, shards           logit of a classifier of the shards' pictures against other kinds (`evaluate.style`)
    aesthetic       of, clip             a linear head on CLIP features, 1 to 10
    own_yes         question             P(yes) by the model before training, if it was trained on questions
    vqa             of, question         P(yes) by a visual question answering model (transformers id or folder)
    caption         shards               complete, without loops, not memorised: 1, less a third for each fault
    svg             max_bytes            likeness of the picture and its drawing within the limit, rendered
    svg_bytes                            negative kilobytes of the picture exported at a fixed fineness: shorter is better
    reference       of, shards           log density per dimension of Fréchet features under the shards' Gaussian
    module:function                      your own function of a list of pairs (`tokun.inference.model.Pair`)

A reward is any callable from pairs to as many finite numbers; `Checked` enforces that. Higher is better for all.
Every kind can also be a judge: measured, never optimised.
"""

from __future__ import annotations

import importlib
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from tokun.align import caption_rewards, drawing_rewards, image_rewards
from tokun.config import RewardConfig
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun

Score = Callable[[Sequence["Pair"]], Sequence[float]]
MAKERS: dict[str, Callable[[RewardConfig, Any], Score]] = {
    "pmi": caption_rewards.pmi, "likelihood": caption_rewards.likelihood, "mmi": caption_rewards.mmi,
    "pmi_both": caption_rewards.pmi_both, "match": caption_rewards.match, "pmi_first": caption_rewards.pmi_first,
    "caption": caption_rewards.caption,
    "clip": image_rewards.clip, "clip_first": image_rewards.clip_first, "aesthetic": image_rewards.aesthetic, "vqa": image_rewards.vqa,
    "own_yes": image_rewards.own_yes, "style": image_rewards.style, "recognition": image_rewards.recognition,
    "description": image_rewards.description, "reference": image_rewards.reference,
    "svg": drawing_rewards.likeness_within, "svg_bytes": drawing_rewards.shortness,
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """A reward with its name and weight. Checks that it gives one finite number per pair."""

    name: str
    weight: float
    score: Score

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """The reward of each pair. Raises UserError, naming the reward, unless it gives one finite number per pair."""
        found: Any = self.score(list(pairs))
        if isinstance(found, (Tensor, np.ndarray)):
            found = found.tolist()
        if isinstance(found, (str, bytes, dict)) or not isinstance(found, Sequence):
            raise UserError(f"reward {self.name} gave a {type(found).__name__}; it must give a list of {len(pairs)} numbers, one per pair")
        if len(found) != len(pairs):
            raise UserError(f"reward {self.name} gave {len(found)} numbers for {len(pairs)} pairs; it must give one per pair, in order")
        for i, value in enumerate(found):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise UserError(f"reward {self.name} gave {value!r} ({type(value).__name__}) for pair {i}; it must be a number")
            if not math.isfinite(value):
                raise UserError(f"reward {self.name} gave {float(value)} for pair {i} ({pairs[i].caption[:40]!r}); it must be finite")
        return [float(value) for value in found]


def make(asked: Sequence[RewardConfig], model: Tokun, where: str = "grpo.rewards") -> list[Checked]:
    """The rewards that a config names. `model`: the frozen model, for the rewards that use it; all run on its device.

    Raises UserError for an unknown kind, an invalid weight, or settings that the kind does not accept.
    """
    out: list[Checked] = []
    for number, (one, name) in enumerate(zip(asked, names(asked))):
        place = f"{where}[{number}]"
        if not math.isfinite(one.weight):
            raise UserError(f"{place}.weight is {one.weight}; it must be a finite number")
        try:
            score = own_function(one.kind) if ":" in one.kind else MAKERS[one.kind](one, model)
        except KeyError as error:
            if one.kind in MAKERS:
                raise
            raise UserError(f"{place}.kind is {one.kind!r}; it must be one of {', '.join(MAKERS)}, or your own module:function") from error
        except (UserError, FileNotFoundError) as error:
            raise type(error)(f"{place} ({one.kind}): {error}") from error
        out.append(Checked(name, one.weight, score))
    return out


def names(asked: Sequence[RewardConfig]) -> list[str]:
    """The names of rewards or judges: their kinds, and of the second of a kind, such as another CLIP, the kind with _2."""
    same = [sum(other.kind == one.kind for other in asked[:number]) for number, one in enumerate(asked)]
    return [f"{one.kind}_{count + 1}" if count else one.kind for one, count in zip(asked, same)]


def parse(text: str) -> RewardConfig:
    """'clip=FOLDER' or 'pmi' from a command line -> the same as config: the kind, and after = the value of `of`."""
    if text.partition(":")[0] not in MAKERS and ":" in text.partition("=")[0]:
        return RewardConfig(kind=text)
    kind, _, of = text.partition("=")
    return RewardConfig(kind=kind, of=of)


def own_function(name: str) -> Score:
    """Import the function `module:function`. Raises UserError if there is none."""
    module, _, function = name.partition(":")
    try:
        if os.getcwd() not in sys.path:  # under the `tokun` script it is not; last, so that it hides no installed module
            sys.path.append(os.getcwd())
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{name} cannot be imported ({error}); give module:function, with the module installed or in the current folder"
        ) from error
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}, not a function")
    return cast(Score, found)


def perturbed(reward: Checked, change: Callable[[Sequence[Pair]], list[Pair]]) -> Checked:
    """The reward of pairs after their pictures are perturbed (`perturb.changer`)."""
    score = reward.score
    return replace(reward, score=lambda pairs: score(change(pairs)))

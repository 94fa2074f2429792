"""Rewards for pictures by other networks: CLIP, an aesthetic head, question answering, ImageNet features.

Each maker takes a reward's config and the frozen model, and returns a function from pairs to numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from tokun import data
from tokun.evaluate import recognition as recognitions
from tokun.evaluate import style as styles
from tokun.evaluate.features import LITE0, Features, last_layer, open_features
from tokun.evaluate.held_out_pairs import described, framed_for, samples_of
from tokun.evaluate.judges import AESTHETIC_CLIP, Aesthetic, Own, Vqa
from tokun.evaluate.memorisation import shown_of
from tokun.inference.clip import Clip
from tokun.tokenizers.wordings import SHOWS
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.config import RewardConfig
    from tokun.inference.model import Pair, Tokun

Score = Callable[[Sequence["Pair"]], Sequence[float]]
SHRINK = 0.1  # of the covariance towards its diagonal's mean, since there are fewer pictures than features


# --- picture and words together ---------------------------------------------------------------------------------------


def clip(asked: RewardConfig, model: Tokun) -> Score:
    return Clip(needed(asked.of, "of", "an open_clip model, such as ViT-B-32:laion2b_s34b_b79k, or a folder"), device=str(model.device)).fit


def clip_first(asked: RewardConfig, model: Tokun) -> Score:
    network = Clip(needed(asked.of, "of", "an open_clip model or the folder of a small judge"), device=str(model.device))

    def score(pairs: Sequence[Pair]) -> list[float]:
        captions = [pair.caption for pair in pairs]
        return recognitions.firsts(network.similarities([pair.image for pair in pairs], captions), captions).tolist()

    return score


def recognition(asked: RewardConfig, model: Tokun) -> Score:
    judge, network = recogniser(asked, model)
    return lambda pairs: judge.firsts(vectors(network, pairs), [pair.caption for pair in pairs]).tolist()


def description(asked: RewardConfig, model: Tokun) -> Score:
    judge, network = recogniser(asked, model)
    return lambda pairs: np.diag(judge.scores(vectors(network, pairs), [pair.caption for pair in pairs])).tolist()


def recogniser(asked: RewardConfig, model: Tokun) -> tuple[recognitions.Judge, Features]:
    """The judge of `evaluate.recognition`, trained on the first `n` described pictures of the shards (0: all)."""
    config = model.image_tokenizer.config
    network = last_layer(asked.of or LITE0, model.device, max(128, config.image_size), f"{asked.kind}: of")
    pictures = described(needed(asked.shards, "shards", "shards of described pictures"), framed_for(model), channels=config.image_channels)
    found, texts = recognitions.look((one for i, one in enumerate(pictures) if not asked.n or i < asked.n), network, "reward: described")
    return recognitions.fit(found, texts), network


def vectors(network: Features, pairs: Sequence[Pair]) -> np.ndarray:
    return network([pair.image for pair in pairs]).float().numpy()


# --- yes or no --------------------------------------------------------------------------------------------------------


def own_yes(asked: RewardConfig, model: Tokun) -> Score:
    return answers(Own(model), asked)


def vqa(asked: RewardConfig, model: Tokun) -> Score:
    named = needed(asked.of, "of", "a model that answers questions, such as google/paligemma2-3b-mix-448")
    return answers(Vqa(named, device=str(model.device)), asked)


def answers(judge: Own | Vqa, asked: RewardConfig) -> Score:
    """The judge's P(yes) to each pair's question; {} is the caption. Raises UserError for an empty question, or one with other fields."""
    question = asked.question or SHOWS
    try:
        if not question.format("a ship").strip(" ?."):
            raise UserError("it is empty")
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"question is {question!r} ({error}); it must be a yes-or-no question, with {{}} for the caption") from error
    return lambda pairs: judge.yes([pair.image for pair in pairs], [question.format(pair.caption) for pair in pairs])


# --- pictures alone -----------------------------------------------------------------------------------------------------


def aesthetic(asked: RewardConfig, model: Tokun) -> Score:
    head = Aesthetic(needed(asked.of, "of", "the file of a linear head"), asked.clip or AESTHETIC_CLIP, device=str(model.device))
    return lambda pairs: head.score([pair.image for pair in pairs])


def style(asked: RewardConfig, model: Tokun) -> Score:
    network = open_features(needed(asked.of, "of", "weights of SqueezeNet 1.1 or Inception v3"), model.device, f"{asked.kind}: of")
    real = real_pictures(asked, model)
    judge = styles.fit(network(real), network(styles.generated_others(real, 0)[0]))

    def score(pairs: Sequence[Pair]) -> list[float]:
        found = network([pair.image for pair in pairs])
        return (((found - judge.centre) / judge.scale) @ judge.weight + judge.bias).tolist()

    return score


def reference(asked: RewardConfig, model: Tokun) -> Score:
    """Log density per dimension, up to a constant, of a picture's features under the Gaussian of the Fréchet distance.

    The covariance is shrunk (Ledoit and Wolf 2004). The density's mode is a single picture: watch diversity, too.
    """
    network = open_features(needed(asked.of, "of", "weights of SqueezeNet 1.1 or Inception v3"), model.device, f"{asked.kind}: of")
    found = network(real_pictures(asked, model))
    mean, centred = found.mean(0), found - found.mean(0)
    covariance = centred.T @ centred / (len(found) - 1)
    size = len(covariance)
    shrunk = (1 - SHRINK) * covariance + SHRINK * covariance.trace() / size * torch.eye(size, dtype=covariance.dtype)
    factor = torch.linalg.cholesky(shrunk)

    def score(pairs: Sequence[Pair]) -> list[float]:
        apart = network([pair.image for pair in pairs]) - mean
        return (-torch.linalg.solve_triangular(factor, apart.T, upper=False).square().sum(0) / (2 * size)).tolist()

    return score


def real_pictures(asked: RewardConfig, model: Tokun, least: int = 16) -> list[Image.Image]:
    """The first `n` pictures of the shards, framed like the model's. Raises UserError for fewer than `least`."""
    shards = needed(asked.shards, "shards", "shards of real pictures")
    samples = samples_of(model, data.ShardIndex(data.expand_shards(shards), need=(), one_of=data.IMAGE_SUFFIXES).usable())
    found = [shown_of(samples, i) for i in range(min(asked.n or len(samples), len(samples)))]
    if len(found) < least:
        raise UserError(f"shards {shards} hold {len(found)} pictures; at least {least} are needed")
    return found


def needed(value: str, name: str, what: str) -> str:
    if not value:
        raise UserError(f"{name} is empty; it must name {what}")
    return value

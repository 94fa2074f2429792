"""Checks and reads the folder of a checkpoint. folders.py finds the folder; `load.load` makes a `Tokun` of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokun.config import SamplingConfig
from tokun.data import cropping
from tokun.inference import sampling
from tokun.inference.candidates import require_candidates
from tokun.inference.folders import GENERATOR, IMAGE_TOKENIZER, SAMPLING, VOCABULARY
from tokun.inference.tags import read_counts
from tokun.inference.token_choice import require_scale
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.utils.checkpoint import require_safetensors
from tokun.utils.errors import UserError, first_line

DEEPSPEED_DEVICE = "DS_ACCELERATOR"  # the environment variable that DeepSpeed reads when it is imported


def quiet_deepspeed() -> None:
    """Prevent DeepSpeed's warning, on machines without a GPU, that it uses the CPU. transformers imports it to save a model."""
    if not torch.cuda.is_available():
        os.environ.setdefault(DEEPSPEED_DEVICE, "cpu")


def require_device(device: str | None) -> None:
    """Raise UserError if torch cannot compute on the device, or not in float64, which the latents need."""
    if str(device).partition(":")[0] == "mps":
        raise UserError(f"device {device!r} cannot be used: the latents need float64, which MPS lacks. Choose cpu")
    try:
        if torch.empty(0, device=device).is_meta:
            raise UserError("device 'meta' holds no numbers: choose cpu, or cuda")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used here: {first_line(error)}") from error


def require_whole(folder: Path) -> None:
    """Raise FileNotFoundError for a checkpoint that lacks a file, UserError for one whose weights are in a pickle."""
    for part in (GENERATOR, IMAGE_TOKENIZER):
        require_safetensors(folder / part)
    names = (*(f"{GENERATOR}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")), VOCABULARY, SAMPLING)
    sharded = folder / GENERATOR / "model.safetensors.index.json"
    for name in names:
        if not (folder / name).is_file() and not (name.endswith("model.safetensors") and sharded.is_file()):
            raise FileNotFoundError(f"{folder / name} is missing: the checkpoint is not whole. Copy or download {folder} again")


@dataclass(frozen=True)
class Settings:
    """The contents of a checkpoint's sampling.json."""

    defaults: SamplingConfig
    tag_counts: list[tuple[Any, ...]]
    tasks: tuple[str, ...]
    fit: str  # of a picture to its grid
    unrepeated_words: tuple[str, ...]  # that a caption has at most once
    question_wordings: tuple[str, ...]  # as `Tokun.question_wordings`
    image_tokenizer: str  # its fingerprint
    text_tokenizer: str | None  # its fingerprint; older checkpoints lack it


def read_settings(path: Path) -> Settings:
    """The settings in a checkpoint's sampling.json. Raises UserError if it cannot be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        text_tokenizer = tree.get("text_tokenizer")
        settings = Settings(
            defaults=SamplingConfig(**tree["defaults"]),
            tag_counts=read_counts(tree["tag_counts"]),
            tasks=tuple(str(task) for task in tree.get("tasks", ())),
            fit=tree.get("fit", ""),
            unrepeated_words=tuple(map(str, tree.get("unrepeated_words", ()))),
            question_wordings=tuple(map(str, tree.get("question_wordings") or ())),
            image_tokenizer=str(tree["image_tokenizer"]),
            text_tokenizer=None if text_tokenizer is None else str(text_tokenizer),
        )
        if settings.fit not in ("", *cropping.FITS):
            raise UserError(f"fit is {settings.fit!r}, not one of {', '.join(cropping.FITS)}")
        defaults = settings.defaults
        for temperature in (defaults.temperature, defaults.text_temperature):
            sampling.Choice(temperature, defaults.top_k, defaults.top_p)
        for name in ("guidance_scale", "text_guidance_scale"):
            require_scale(name, getattr(defaults, name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}. Copy the whole checkpoint again") from error
    require_candidates(settings.defaults.best_of, f"{path}: defaults.")
    return settings


def load_generator(folder: Path, dtype: torch.dtype) -> Any:
    """The causal LM of a checkpoint, on the CPU. Raises UserError if it cannot be read or lacks weights."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        with quiet_transformers():
            generator, found = auto.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # a config.json that does not fit the weights causes errors of any kind
        raise UserError(f"{folder} cannot be read: {type(error).__name__}: {first_line(error)}. Copy the whole checkpoint again") from error
    if found["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(f"{folder} lacks the weights {sorted(found['missing_keys'])[:3]}. Copy the whole checkpoint again")
    return generator


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of transformers, and the warning of DeepSpeed, which it imports."""
    from transformers.utils import logging

    accelerator = os.environ.get(DEEPSPEED_DEVICE)
    quiet_deepspeed()
    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if accelerator is None:
            os.environ.pop(DEEPSPEED_DEVICE, None)


def require_same_ids(path: Path, vocabulary: Vocabulary) -> None:
    """Raise UserError if the generator's tokenizer.json gives the control tokens and codes other ids than the vocabulary does."""
    try:
        ids = {str(token["content"]): int(token["id"]) for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}. Copy the whole checkpoint again") from error
    mismatch = f"{path.parents[1] / VOCABULARY} does not match the generator: "
    for number, name in enumerate(vocabulary.added_tokens, vocabulary.text_size):
        if ids.get(name) != number:
            raise UserError(f"{mismatch}{name} has id {number} there, {ids.get(name, 'none')} in {path}. Copy the whole checkpoint again")
    if max(ids.values()) >= vocabulary.size:
        raise UserError(f"{mismatch}it ends at id {vocabulary.size - 1}, {path} at {max(ids.values())}. Copy the whole checkpoint again")

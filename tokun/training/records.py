"""The record that a stage leaves: the settings it was made with, and which of them may differ when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokun import config as configs
from tokun.config import Config
from tokun.utils import checkpoint

LOGGING_KEYS = {"log_every", "eval_every", "save_every", "sample_every", "keep_last", "keep_best", "max_minutes"}
RETRY_KEYS = {"lr", "max_grad_norm", "precision"}  # may change when a run goes on from a trainer state
GATE_KEYS = {"min_usage", "min_perplexity", "min_psnr"}


def require_same_but_retry(path: Path, made_with: dict[str, Any], asked: dict[str, Any]) -> None:
    """`require_same` for trainer states. The settings that the report of a non-finite loss advises to change may differ."""

    def strip(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: without(v, RETRY_KEYS) if k in ("train", "image_tokenizer_train") else v for k, v in tree.items()}

    checkpoint.require_same(path, strip(made_with), strip(asked))


def idle_settings(train: configs.TrainConfig | configs.ImageTokenizerTrainConfig) -> set[str]:
    """Newer settings at values that change nothing. Records leave them out, so that those of older runs still match."""
    return {name for name, idle in {"ema_every": 1, "word_dropout": 0.0, "lr_hold": 0.0}.items() if getattr(train, name, None) == idle}


def started_from(config: Config) -> dict[str, str]:
    """What a stage's record says of the checkpoint that the run goes on from."""
    return {"start": config.start} if config.start else {}


def without(tree: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """A copy of the mapping that lacks these keys."""
    return {k: v for k, v in tree.items() if k not in keys}


def stopped_early(record: dict[str, Any], train: Any, target: Path) -> str:
    """What to say of a finished stage whose time ran out, when more time is given now."""
    before = record.get("stopped_by", "steps")
    if before in ("steps", f"max_minutes {train.max_minutes:g}"):
        return ""
    return f". It was stopped by {before} after {record['steps']} of {train.steps} steps; to train it longer choose another out=, or delete {target}"


def figures_line(figures: dict[str, float]) -> str:
    """Figures for one line of text: `psnr 21.3, usage 0.98`."""
    return ", ".join(f"{k} {v:.4g}" for k, v in figures.items())

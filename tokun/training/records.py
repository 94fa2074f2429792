"""The record that a stage leaves: the settings it was made with, and which of them may differ when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokun import config as configs
from tokun.config import Config
from tokun.utils import checkpoint
from tokun.utils.errors import UserError

LOGGING_KEYS = {"log_every", "eval_every", "save_every", "sample_every", "keep_last", "keep_best", "max_minutes"}
RETRY_KEYS = {"lr", "max_grad_norm", "precision"}  # may change when a run goes on from a trainer state
IDLE = {"ema_every": 1, "word_dropout": 0.0, "lr_hold": 0.0}  # newer settings of a training, at values that change nothing
START = "start_fingerprint"  # of a record: which weights `start` held; older ones lack it
GATE_KEYS = {"min_usage", "min_perplexity", "min_psnr"}


def require_same(path: Path, made_with: dict[str, Any], asked: dict[str, Any], *, but: set[str] | None = None) -> None:
    """`checkpoint.require_same` for the records of stages, those of older versions too. `but`: settings of the training that may differ.

    Raises UserError, and says so where the checkpoint that the run began with has been replaced by another.
    """

    def strip(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: without(v, idle_in(v) | (but or set())) if k in ("train", "image_tokenizer_train") else v for k, v in tree.items()}

    if START not in made_with:
        asked = without(asked, {START})
    elif made_with.get("start") == asked.get("start") and made_with[START] != asked.get(START):
        raise UserError(
            f"{path} began with other weights than start {asked.get('start')} holds now (fingerprint {made_with[START][:12]}… there, "
            f"{str(asked.get(START))[:12]}… here): put the old checkpoint back, choose another folder with out=…, or delete {path}"
        )
    checkpoint.require_same(path, strip(made_with), strip(asked))


def require_same_but_retry(path: Path, made_with: dict[str, Any], asked: dict[str, Any]) -> None:
    """`require_same` for trainer states. The settings that the report of a non-finite loss advises to change may differ."""
    require_same(path, made_with, asked, but=RETRY_KEYS)


def idle_settings(train: configs.TrainConfig | configs.ImageTokenizerTrainConfig) -> set[str]:
    """Newer settings at values that change nothing. Records leave them out, so that those of older runs still match."""
    return idle_in(vars(train))


def idle_in(section: dict[str, Any]) -> set[str]:
    """The same of a section as a record holds it."""
    return {name for name, idle in IDLE.items() if name in section and section[name] == idle}


def started_from(config: Config, base: str = "") -> dict[str, str]:
    """What a stage's record says of the checkpoint that the run goes on from. `base`: its `inference.adapters.fingerprint`, where it is kept."""
    return {"start": config.start, **({START: base} if base else {})} if config.start else {}


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

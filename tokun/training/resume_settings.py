"""The record of a finished stage: its settings, and which of them may differ when a run resumes."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokun.config import Config
from tokun.utils import checkpoint
from tokun.utils.errors import UserError

LOGGING_KEYS = {"log_every", "eval_every", "save_every", "sample_every", "keep_last", "keep_best", "max_minutes"}
RETRY_KEYS = {"lr", "max_grad_norm", "precision"}  # may change when a run resumes from a trainer state
# newer training settings, at values without effect
IDLE = {"ema_every": 1, "word_dropout": 0.0, "lr_hold": 0.0, "align_weight": 0.0, "align_layer": 0, "untagged_share": 0.0, "passes": 0.0}
AVERAGE_KEYS = {"ema_decay", "ema_every"}  # without effect in a stage that keeps no average; its older records hold them
START = "start_fingerprint"  # key of the fingerprint of the weights of `start`; older records lack it
GATE_KEYS = {"min_usage", "min_perplexity", "min_psnr"}
# of config.train: they affect only speed and memory, or are recorded by themselves (seed)
FREE_KEYS = {"seed", "deepspeed", "micro_batch_size", "gradient_checkpointing", "compile", "loss_chunk", "align_features"}


def recorded(config: Config, *, but: Set[str] = frozenset()) -> dict[str, Any]:
    """`config.train` without the keys `but`, and any `config.adapter`, as the record of a generator's training holds them."""
    train = without(asdict(config.train), LOGGING_KEYS | FREE_KEYS | idle_in(vars(config.train)) | but)
    return {"train": train, **({"adapter": asdict(config.adapter)} if config.adapter.rank else {})}


def require_same(path: Path, made_with: dict[str, Any], asked: dict[str, Any], *, but: Set[str] = frozenset()) -> None:
    """`checkpoint.require_same` for records of stages, including older versions. `but`: training settings that may differ.

    Raises UserError, also if the checkpoint that the run started from has been replaced.
    """

    def strip(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: without(v, idle_in(v) | but) if k in ("train", "image_tokenizer_train") else v for k, v in tree.items()}

    if START not in made_with or START not in asked:  # an older record, or one without an adapter: the other settings decide
        made_with, asked = without(made_with, {START}), without(asked, {START})
    elif made_with.get("start") == asked.get("start") and made_with[START] != asked[START]:
        raise UserError(
            f"{path} started from other weights than start {asked.get('start')} holds now (fingerprint {made_with[START][:12]}… there, "
            f"{asked[START][:12]}… here): put the old checkpoint back, choose another folder with out=…, or delete {path}"
        )
    checkpoint.require_same(path, strip(made_with), strip(asked))


def require_same_but_retry(path: Path, made_with: dict[str, Any], asked: dict[str, Any], *, but: Set[str] = frozenset()) -> None:
    """`require_same` for trainer states. The settings that the error of a non-finite loss suggests changing may differ."""
    require_same(path, made_with, asked, but=RETRY_KEYS | but)


def idle_in(section: dict[str, Any]) -> set[str]:
    """Newer settings at values without effect, in a section of a record or of the config.

    Records omit them, so that records of older runs still match.
    """
    return {name for name, idle in IDLE.items() if name in section and section[name] == idle}


def started_from(config: Config, base: str = "") -> dict[str, str]:
    """A stage's record of the checkpoint that the run starts from. `base`: its `inference.adapters.fingerprint`, if recorded."""
    return {"start": config.start, **({START: base} if base else {})} if config.start else {}


def without(tree: dict[str, Any], keys: Set[str]) -> dict[str, Any]:
    """A copy of the mapping without these keys."""
    return {k: v for k, v in tree.items() if k not in keys}


def stopped_early(record: dict[str, Any], train: Any, target: Path) -> str:
    """The message for a finished stage whose time ran out, if more time is given now."""
    before = record.get("stopped_by", "steps")
    if before in ("steps", f"max_minutes {train.max_minutes:g}"):
        return ""
    return (
        f". It was stopped by {before} after {record['steps']} of {record.get('planned', train.steps)} steps; "
        f"to train longer choose another out=, or delete {target}"
    )


def figures_line(figures: dict[str, float]) -> str:
    """Figures as one line of text: `psnr 21.3, usage 0.98`."""
    return ", ".join(f"{k} {v:.4g}" for k, v in figures.items())


def change_line(before: dict[str, float], after: dict[str, float]) -> str:
    """Figures after a training beside those before it, where these were measured: `psnr 20.1 before training, 21.3 after`."""
    changes = (
        (name, f"{before[name]:.4g} before training, {value:.4g} after" if name in before else f"{value:.4g}")
        for name, value in after.items()
    )
    return "; ".join(f"{name} {value}" for name, value in changes) if before else figures_line(after)

"""The checkpoint that `config.start` names."""

from __future__ import annotations

from tokun.config import Config
from tokun.inference.model import Tokun, load


def starting_model(config: Config) -> Tokun:
    """It, on the CPU. Raises as `tokun.load` does."""
    return load(None if config.start == "bundled" else config.start, device="cpu")

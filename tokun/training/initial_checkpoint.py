"""The checkpoint that `config.start` names."""

from __future__ import annotations

from tokun.config import Config
from tokun.inference.load import load
from tokun.inference.model import Tokun


def starting_model(config: Config) -> Tokun:
    """Load it on the CPU. Raises what `tokun.load` raises."""
    return load(config.start, device="cpu")

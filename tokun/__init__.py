"""tokun: one seed, one sequence: a picture and the words for it.

import tokun
model = tokun.load()              # the bundled engraving model, a folder, or a Hugging Face Hub id
image, caption = model(seed=42)

tokun.svg, tokun.grids and tokun.many are the modules that a user of the library may want besides.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokun._former_names import FORMER, FormerNames

if TYPE_CHECKING:
    from tokun.inference import bulk as many
    from tokun.inference.hub import push_adapter
    from tokun.inference.load import load
    from tokun.inference.model import Pair, Tokun
    from tokun.inference.pairs_pipeline import pipeline
    from tokun.render import grids, svg

__all__ = ["Pair", "Tokun", "grids", "load", "many", "pipeline", "push_adapter", "svg"]
__version__ = "0.2.0"

HOME = {"load": "load", "pipeline": "pairs_pipeline", "push_adapter": "hub"}  # modules in tokun/inference of what is not in model.py

sys.meta_path.insert(0, FormerNames(FORMER))


def __getattr__(name: str) -> Any:  # torch is imported when a model is, not when data tools import tokun.utils.optional_packages
    if name in ("grids", "many", "svg"):
        return import_module(f"tokun.{name}")
    if name in __all__:
        return getattr(import_module(f"tokun.inference.{HOME.get(name, 'model')}"), name)
    raise AttributeError(f"module 'tokun' has no attribute {name!r}")

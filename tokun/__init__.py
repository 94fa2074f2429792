"""tokun: one seed, one sequence: a picture and the words for it.

import tokun
model = tokun.load()              # the bundled engraving model, a folder, or a Hugging Face Hub id
image, caption = model(seed=42)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokun.model import Pair, Tokun, load

__all__ = ["Pair", "Tokun", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # torch is imported when a model is, not when data tools import tokun.extras
    if name in __all__:
        import tokun.model

        return getattr(tokun.model, name)
    raise AttributeError(f"module 'tokun' has no attribute {name!r}")

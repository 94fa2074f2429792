"""The modules' names of before they were grouped: `from tokun.grids import captioned_grid` goes on working, and is the module tokun.render.grids."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

_ROOMS = {
    "utils": ("checkpoint", "console", "extras", "memory"),
    "tokenizers": ("vocabulary", "wordings"),
    "data": ("framing", "tars"),
    "models": ("generator", "losses", "shares"),
    "render": ("grids", "svg", "video"),
    "inference": ("clip", "decoder", "directions", "hub", "latents", "many", "model", "model_card", "native", "sampling", "tags"),
    "training": ("engine", "health", "optim", "stages", "tracking"),
    "app": ("demo", "gate"),
}
FORMER = {f"tokun.{name}": f"tokun.{room}.{name}" for room, names in _ROOMS.items() for name in names}
FORMER |= {"tokun.text_tokenizer": "tokun.tokenizers.text", "tokun.image_tokenizer": "tokun.tokenizers.image"}


class FormerNames(MetaPathFinder, Loader):
    """Imports a module of `former` (a former name -> the present one) by its present name, under both."""

    def __init__(self, former: Mapping[str, str]) -> None:
        self.former = former

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in self.former else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self.former[module.__name__])

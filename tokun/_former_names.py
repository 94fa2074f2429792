"""The modules' former names go on working: `from tokun.grids import captioned_grid` imports the module tokun.render.grids."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
_RENAMED = {
    "training": {
        "alignment": "feature_alignment", "engine_stage": "distributed_stage", "records": "resume_settings", "shapes": "image_shapes",
        "start": "initial_checkpoint", "starting": "start_report", "tuning": "fine_tuning", "words": "text_only",
    },
    "align": {"of_drawings": "drawing_rewards", "of_pictures": "image_rewards", "of_words": "caption_rewards", "real": "reward_hacking"},
    "data": {"framing": "cropping", "images": "image_dataset", "order": "sample_order", "pictures": "image_files"},
    "evaluate": {"drawn": "stored_samples", "eyes": "viewer_pairs", "material": "held_out_pairs", "words": "captions"},
    "inference": {
        "choice": "token_choice", "directions": "conditional_generation", "many": "bulk", "seeing": "image_to_codes",
    },
    "models": {"alignment": "feature_alignment", "shares": "partitioned_parameters"},
    "utils": {"engine": "task_engine", "extras": "optional_packages", "reach": "network_access"},
}  # fmt: skip


def former_names(package: str, rooms: Mapping[str, Sequence[str]], renamed: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Former module names -> present ones. `rooms`: modules that stood in the package itself;
    `renamed`: by room, former name -> present one."""
    within = {f"{package}.{room}.{old}": f"{package}.{room}.{new}" for room, names in renamed.items() for old, new in names.items()}
    moved = {f"{package}.{name}": f"{package}.{room}.{name}" for room, names in rooms.items() for name in names}
    return within | {former: within.get(name, name) for former, name in moved.items()}


FORMER = former_names("tokun", _ROOMS, _RENAMED)
FORMER |= {"tokun.text_tokenizer": "tokun.tokenizers.text", "tokun.image_tokenizer": "tokun.tokenizers.image"}


class FormerNames(MetaPathFinder, Loader):
    """Imports a module of `former` (a former name -> the present one) by its present name, under both."""

    def __init__(self, former: Mapping[str, str]) -> None:
        self.former = former

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in self.former else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self.former[module.__name__])

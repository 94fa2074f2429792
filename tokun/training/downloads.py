"""Weights that a training downloads: checked before the first stage, so that none is found missing after hours."""

from __future__ import annotations

from pathlib import Path

from tokun.config import Config
from tokun.models.losses import SQUEEZENET_URL, VGG_URL, kept_weights
from tokun.training.adapters import is_on_pictures
from tokun.utils import network_access
from tokun.utils.network_access import NotFetched

NO_LOSS = "image_tokenizer_train.perceptual=none"
OWN_LOSS = "image_tokenizer_train.perceptual=squeezenet image_tokenizer_train.perceptual_weights=FILE"
COMMANDS = {
    VGG_URL: "python -c \"import lpips; lpips.LPIPS(net='vgg')\"",
    SQUEEZENET_URL: "python -c \"from tokun.models.losses import load_squeezenet; load_squeezenet('')\"",
}


def require_weights(config: Config) -> None:
    """Raise NotFetched (a FileNotFoundError) for weights that a stage of this run will need, and that are neither here nor in reach."""
    image, train, out = config.image_tokenizer_train, config.train, Path(config.out)
    pictures = is_on_pictures(config)
    if pictures and not config.start and image.perceptual_weight > 0 and not (out / "image_tokenizer").is_dir():
        if image.perceptual == "lpips":
            _require(VGG_URL, "image_tokenizer_train.perceptual is lpips", f"{OWN_LOSS}, or {NO_LOSS}")
        elif image.perceptual == "squeezenet" and not image.perceptual_weights:
            _require(
                SQUEEZENET_URL,
                "image_tokenizer_train.perceptual is squeezenet",
                f"image_tokenizer_train.perceptual_weights=FILE, or {NO_LOSS}",
            )
    begun = any((out / part).is_dir() for part in ("checkpoint", "state/generator"))  # the features are computed before the first step
    if pictures and train.align_weight > 0 and not train.align_features and not begun:
        _require(SQUEEZENET_URL, f"train.align_weight is {train.align_weight:g}", "train.align_features=FILE, or train.align_weight=0")


def _require(address: str, why: str, otherwise: str) -> None:
    kept = kept_weights(address)
    if kept.is_file() or not (reason := network_access.out_of_reach(address)):
        return
    raise NotFetched(
        f"{why}, which needs {kept}, and {address} is unreachable: {reason}. "
        f"Fetch it where there is a network, with the same home folder or TORCH_HOME ({COMMANDS[address]}), or set {otherwise}"
    )

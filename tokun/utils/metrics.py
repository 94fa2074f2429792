"""Metrics of pictures, reconstructions and codes: tensors in, numbers out. Knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

from tokun.utils.optional_packages import need

BAND = 1 / 6  # cycles per pixel: hatching lines are six pixels apart or closer


def psnr(images: Tensor, reconstructed: Tensor) -> Tensor:
    """(n, C, H, W) in [-1, 1], twice -> (n,) dB."""
    mse = ((reconstructed - images) / 2).square().mean((1, 2, 3))  # pixel values in 0..1
    return -10 * mse.clamp_min(1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(n, C, H, W) in [-1, 1], twice -> (n,): structural similarity (Wang et al. 2004)."""
    return (
        need("torchmetrics.functional.image", extra="eval")
        .structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
        .reshape(-1)
    )


def gradients(images: Tensor) -> Tensor:
    """(n, C, H, W) -> the magnitude of the brightness gradient (n, 1, H, W)."""
    down, across = need("torchmetrics.functional.image", extra="eval").image_gradients(images.mean(1, keepdim=True))
    return (down.square() + across.square()).sqrt()


def spectra(images: Tensor, size: int = 0) -> Tensor:
    """(n, C, H, W) -> radial power spectra (n, S / 2) of the windowed brightness, bin k at k / S cycles per pixel;
    S is `size`, or the shorter side."""
    (height, width), brightness = images.shape[2:], images.mean(1)
    size = size or min(height, width)
    down, across = (torch.hann_window(side, periodic=False) for side in (height, width))
    brightness = brightness - brightness.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(brightness * down[:, None] * across).abs().square().flatten(1) / (height * width)
    y, x = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    radius = ((y[:, None].square() + x.square()).sqrt() * size).round().long().flatten()
    inside = radius < size // 2
    sums = torch.zeros(len(images), size // 2).index_add_(1, radius[inside], power[:, inside])
    return sums / torch.bincount(radius[inside])


def spectrum_error(a: Tensor, b: Tensor) -> Tensor:
    """(n,) dB: mean absolute difference in the power of fine lines, over frequencies from BAND to half a cycle per pixel."""
    first = round(BAND * min(a.shape[2:]))
    x, y = (10 * (spectra(images)[:, first:] + 1e-6).log10() for images in (a, b))  # 1e-6: the noise level of 8 bits
    return (x - y).abs().mean(1)


def code_figures(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """codes int64, of any shape -> usage (share of codes used), perplexity, dead_codes, and codes_seen (how many codes there were)."""
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).float()
    p = counts / counts.sum()
    return {
        "usage": (counts > 0).float().mean().item(),
        "perplexity": (-(p * (p + 1e-12).log()).sum()).exp().item(),
        "dead_codes": float((counts == 0).sum()),
        "codes_seen": counts.sum().item(),
    }

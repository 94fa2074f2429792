"""The image tokenizer: what of a held-out picture survives its codes, and are the codes used? Knows no captions.

    doctor.png    the best and the worst reconstructions          entropy.png    entropy of the code at each place of the grid
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokun.config import ImageTokenizerTrainConfig
from tokun.evaluate import plots, recognition
from tokun.evaluate.distances import frechet, jackknife
from tokun.evaluate.features import Features, stack
from tokun.evaluate.figures import Figure, mean, skipped
from tokun.evaluate.material import RealPair
from tokun.inference.model import Tokun
from tokun.models.losses import LpipsDistance
from tokun.render.grids import pair_sheet
from tokun.training import stages
from tokun.utils.extras import need

BAND = 1 / 6  # cycles a pixel: hatching is lines six pixels apart, or closer
VGG = "vgg16-397923af.pth"  # torchvision's file, on which LPIPS stands


def measure(
    model: Tokun, held_out: Sequence[RealPair], *, seed: int = 0, features: Features | None = None, out: Path | None = None
) -> list[Figure]:
    """Figures of reconstructions; sheets and plots into `out`."""
    real = [pair.image for pair in held_out]
    codes = torch.tensor([pair.codes for pair in held_out])
    made = reconstruct(model, codes)
    originals, copies = stack(real), stack(made)
    psnr = stages.psnr(originals, copies)
    found = [
        mean("PSNR", psnr.tolist(), better="more", note="dB", seed=seed),
        mean("SSIM", ssim(originals, copies).tolist(), better="more", note="Gaussian window of 11 px", seed=seed),
        *perceptual(originals, copies, features, seed),
        *reconstruction_distance(real, made, features, seed),
        mean("spectrum error, fine lines", spectrum_error(originals, copies).tolist(), better="less", seed=seed,
             note=f"dB, mean over lines at most {1 / BAND:g} px apart; radial power spectrum of each picture"),
        mean("SSIM of gradients", ssim(gradients(originals), gradients(copies)).tolist(), better="more", seed=seed),
        *codebook(codes, model.image_tokenizer.codebook_size),
        verdict(psnr, codes, model.image_tokenizer.codebook_size),
    ]  # fmt: skip
    if out is not None:
        sheet(real, made, psnr).save(out / "doctor.png")
        plots.position_map(entropies(codes).reshape(model.vocabulary.default_grid).numpy(), "nats of the code at each place", out / "entropy.png")
    return found


@torch.inference_mode()
def reconstruct(model: Tokun, codes: Tensor) -> list[Image.Image]:
    """codes int64 (n, N) -> pictures."""
    return [picture for part in codes.split(64) for picture in model.decode_images(part.to(model.device))]


# --- pictures -------------------------------------------------------------------------------------------------------


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(n, C, H, W) in [-1, 1], twice -> (n,): structural similarity (Wang et al. 2004)."""
    return need("torchmetrics.functional.image", extra="eval").structural_similarity_index_measure(a, b, data_range=2.0, reduction="none").reshape(-1)


def gradients(images: Tensor) -> Tensor:
    """(n, C, H, W) -> the length of the brightness gradient (n, 1, H, W)."""
    down, across = need("torchmetrics.functional.image", extra="eval").image_gradients(images.mean(1, keepdim=True))
    return (down.square() + across.square()).sqrt()


def spectra(images: Tensor) -> Tensor:
    """(n, C, S, S) -> radial power spectra (n, S / 2), bin k at k / S cycles a pixel, of the windowed brightness."""
    size = images.shape[-1]
    window = torch.hann_window(size, periodic=False)
    brightness = images.mean(1)
    brightness = brightness - brightness.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(brightness * window[:, None] * window).abs().square().flatten(1) / size**2
    y = torch.fft.fftfreq(size)
    radius = ((y[:, None].square() + y.square()).sqrt() * size).round().long().flatten()
    inside = radius < size // 2
    sums = torch.zeros(len(images), size // 2).index_add_(1, radius[inside], power[:, inside])
    return sums / torch.bincount(radius[inside])


def spectrum_error(a: Tensor, b: Tensor) -> Tensor:
    """(n,) dB by which the power of fine lines differs, over frequencies from BAND to half a cycle a pixel."""
    first = round(BAND * a.shape[-1])
    x, y = (10 * (spectra(images)[:, first:] + 1e-6).log10() for images in (a, b))  # 1e-6: the noise of 8 bits
    return (x - y).abs().mean(1)


def perceptual(a: Tensor, b: Tensor, features: Features | None, seed: int) -> list[Figure]:
    found = []
    if features is not None and features.distance is not None:
        distances = _one_by_one(features.distance, a, b, features.device)
        found.append(mean("perceptual distance", distances, better="less", note="SqueezeNet 1.1 features, as in training (tokun.models.losses)", seed=seed))
    try:
        need("lpips", extra="train")
    except ImportError as error:
        return [*found, skipped("LPIPS", str(error))]
    weights = Path(torch.hub.get_dir()) / "checkpoints" / VGG
    if not weights.is_file():  # not downloaded unasked: half a gigabyte
        return [*found, skipped("LPIPS", f"needs torchvision's {VGG} in {weights.parent.name}/ of torch's hub folder (TORCH_HOME)")]
    device = torch.device("cpu") if features is None else features.device
    return [*found, mean("LPIPS", _one_by_one(LpipsDistance().to(device), a, b, device), better="less", note="VGG", seed=seed)]


@torch.inference_mode()
def _one_by_one(distance: torch.nn.Module, a: Tensor, b: Tensor, device: torch.device) -> list[float]:
    return [float(distance(x[None].to(device), y[None].to(device))) for x, y in zip(a, b)]


def reconstruction_distance(real: Sequence[Image.Image], made: Sequence[Image.Image], features: Features | None, seed: int) -> list[Figure]:
    if features is None:
        return [skipped("Fréchet distance of reconstructions", "needs --features")]
    sets = [features(pictures, what=f"doctor: {features.name}") for pictures in (real, made)]
    note = f"to their originals, {features.name} features"
    return [jackknife("Fréchet distance of reconstructions", sets, frechet, better="less", note=note, seed=seed)]


def sheet(real: Sequence[Image.Image], made: Sequence[Image.Image], psnr: Tensor, rows: int = 12) -> Image.Image:
    """The pictures that lost least beside those that lost most."""
    order = psnr.argsort(descending=True).tolist()
    best, worst = order[:rows], order[::-1][:rows]
    return pair_sheet([(real[i], made[i], real[j], made[j]) for i, j in zip(best, worst)], ["best", "from codes", "worst", "from codes"])


def recognised(model: Tokun, held_out: Sequence[RealPair], judge: recognition.Judge, network: Features, *, seed: int = 0) -> list[Figure]:
    """How often the judge finds a picture's own caption first of 16: for originals, for reconstructions, and the share that is kept."""
    real = [pair.image for pair in held_out]
    made = reconstruct(model, torch.tensor([pair.codes for pair in held_out]))
    originals, copies = (network(pictures, what=f"doctor: {network.name}").float().numpy() for pictures in (real, made))
    return recognition.measure(judge, [pair.caption for pair in held_out], originals, copies, note=network.name, seed=seed)


# --- codes ----------------------------------------------------------------------------------------------------------


def codebook(codes: Tensor, size: int) -> list[Figure]:
    figures, n = stages.code_figures(codes, size), len(codes)
    entropy = float(entropies(codes).mean())
    seen = f"{codes.numel()} codes of {n} pictures, a codebook of {size}"
    return [
        Figure("codebook usage", figures["usage"], n, better="more", note=seen),
        Figure("code perplexity", figures["perplexity"], n, better="more", note=f"at most {size}"),
        Figure("dead codes", figures["dead_codes"], n, better="less", note=seen),
        Figure("entropy at a place of the grid", entropy, n, note=f"nats, mean; {n} pictures cannot show more than {np.log(min(n, size)):.2f}"),
    ]


def entropies(codes: Tensor) -> Tensor:
    """codes int64 (n, N) -> nats of the code at each place (N,)."""
    shares = [column.unique(return_counts=True)[1] / len(codes) for column in codes.T]
    return torch.stack([-(p * p.log()).sum() for p in shares])


def verdict(psnr: Tensor, codes: Tensor, size: int) -> Figure:
    """1: a generator may be trained on these codes, by the gate of training itself with its default limits."""
    figures = {"psnr": float(psnr.mean()), **stages.code_figures(codes, size)}
    problems = stages.gate_problems(figures, ImageTokenizerTrainConfig(), size)
    return Figure("verdict", float(not problems), len(codes), better="more", note="no go: " + "; ".join(problems) if problems else "go: passes the gate of training")

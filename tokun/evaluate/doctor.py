"""The image tokenizer: how much of a held-out picture do its codes preserve, and are the codes used?

doctor.png    the best and the worst reconstructions          entropy.png    entropy of the code at each position of the grid
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokun.config import ImageTokenizerTrainConfig
from tokun.evaluate import plots, recognition
from tokun.evaluate.distances import frechet, jackknife
from tokun.evaluate.features import NEEDED, Features, alike, stack
from tokun.evaluate.figures import Figure, mean, skipped
from tokun.evaluate.held_out_pairs import RealPair, grids_of
from tokun.inference.model import Pair, Tokun
from tokun.models.losses import VGG_URL, LpipsDistance, kept_weights
from tokun.render.grids import pair_sheet
from tokun.training import reconstruction
from tokun.utils import metrics
from tokun.utils.metrics import BAND, gradients, spectra, spectrum_error, ssim
from tokun.utils.optional_packages import need


def measure(
    model: Tokun, held_out: Sequence[RealPair], *, seed: int = 0, features: Features | None = None, out: Path | None = None
) -> list[Figure]:
    """Figures of reconstructions; writes sheets and plots into `out`."""
    real = [pair.image for pair in held_out]
    by_grid = codes_by_grid(model, held_out)
    codes = torch.cat([part.flatten() for part in by_grid.values()])
    made = reconstructed(model, held_out)
    psnr = each(metrics.psnr, real, made)
    found = [
        mean("PSNR", psnr.tolist(), better="more", note="dB", seed=seed),
        mean("SSIM", each(ssim, real, made).tolist(), better="more", note="Gaussian window of 11 px", seed=seed),
        *perceptual(real, made, features, seed),
        *reconstruction_distance(real, made, features, seed),
        mean("spectrum error, fine lines", each(spectrum_error, real, made).tolist(), better="less", seed=seed,
             note=f"dB, mean over lines at most {1 / BAND:g} px apart; radial power spectrum of each picture"),
        mean("SSIM of gradients", each(lambda a, b: ssim(gradients(a), gradients(b)), real, made).tolist(), better="more", seed=seed),
        *codebook(list(by_grid.values()), model.image_tokenizer.codebook_size),
        verdict(psnr, codes, model.image_tokenizer.codebook_size),
    ]  # fmt: skip
    if out is not None:
        sheet(real, made, psnr).save(out / "doctor.png")
        grid = max(by_grid, key=lambda grid: len(by_grid[grid]))  # the most frequent one
        title = "nats of the code at each position" + (
            f", {len(by_grid[grid])} pictures of {grid[0]}x{grid[1]} codes" if len(by_grid) > 1 else ""
        )
        plots.position_map(entropies(by_grid[grid]).reshape(grid).numpy(), title, out / "entropy.png")
    return found


@torch.inference_mode()
def reconstruct(model: Tokun, codes: Sequence[Sequence[int]] | Tensor, grids: Sequence[tuple[int, int]] | None = None) -> list[Image.Image]:
    """codes int64 (n, N), or one list per picture, with these grids (None: all the default one) -> pictures."""
    parts = [slice(i, i + 64) for i in range(0, len(codes), 64)]
    return [picture for part in parts for picture in model.decode_images(codes[part], None if grids is None else grids[part])]


def reconstructed(model: Tokun, pairs: Sequence[RealPair | Pair]) -> list[Image.Image]:
    """The pictures of these pairs, from their codes."""
    return reconstruct(model, [pair.codes for pair in pairs], grids_of(model, pairs))


def codes_by_grid(model: Tokun, pairs: Sequence[RealPair]) -> dict[tuple[int, int], Tensor]:
    """Grid -> codes int64 (n, N) of its pictures."""
    grids = grids_of(model, pairs)
    return {grid: torch.tensor([pair.codes for pair, own in zip(pairs, grids) if own == grid]) for grid in dict.fromkeys(grids)}


def each(measure: Callable[[Tensor, Tensor], Tensor], a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
    """`measure`, which maps two batches (k, C, H, W) of pictures and copies of one size to (k,), over all pictures: (n,)."""
    parts = list(alike(a, len(a)))
    found = torch.cat([measure(stack([a[i] for i in part]), stack([b[i] for i in part])) for part in parts])
    return found[torch.tensor([i for part in parts for i in part]).argsort()]


# --- pictures -------------------------------------------------------------------------------------------------------


def mean_spectrum(pictures: Sequence[Image.Image], size: int) -> np.ndarray:
    """The mean of `spectra` over pictures of any shapes, no side below `size`: (size / 2,)."""
    parts = [spectra(stack([pictures[i] for i in part]), size).sum(0) for part in alike(pictures, len(pictures))]
    return (functools.reduce(torch.add, parts) / len(pictures)).numpy()


def perceptual(a: Sequence[Image.Image], b: Sequence[Image.Image], features: Features | None, seed: int) -> list[Figure]:
    found = []
    if features is not None and features.distance is not None:
        distances = _one_by_one(features.distance, a, b, features.device)
        note = "SqueezeNet 1.1 features, as in training (tokun.models.losses)"
        found.append(mean("perceptual distance", distances, better="less", note=note, seed=seed))
    try:
        need("lpips", extra="train")
    except ImportError as error:
        return [*found, skipped("LPIPS", str(error))]
    weights = kept_weights(VGG_URL)
    if not weights.is_file():  # half a gigabyte, so not downloaded automatically
        return [
            *found,
            skipped(
                "LPIPS", f"needs torchvision's {weights.name} ({VGG_URL}) in {weights.parent.name}/ of torch's hub folder (TORCH_HOME)"
            ),
        ]
    device = torch.device("cpu") if features is None else features.device
    return [*found, mean("LPIPS", _one_by_one(LpipsDistance().to(device), a, b, device), better="less", note="VGG", seed=seed)]


@torch.inference_mode()
def _one_by_one(distance: torch.nn.Module, a: Sequence[Image.Image], b: Sequence[Image.Image], device: torch.device) -> list[float]:
    return [float(distance(stack([x]).to(device), stack([y]).to(device))) for x, y in zip(a, b)]


def reconstruction_distance(real: Sequence[Image.Image], made: Sequence[Image.Image], features: Features | None, seed: int) -> list[Figure]:
    if features is None:
        return [skipped("Fréchet distance of reconstructions", NEEDED)]
    sets = [features(pictures, what=f"doctor: {features.name}") for pictures in (real, made)]
    note = f"to their originals, {features.name} features"
    return [jackknife("Fréchet distance of reconstructions", sets, frechet, better="less", note=note, seed=seed)]


def sheet(real: Sequence[Image.Image], made: Sequence[Image.Image], psnr: Tensor, rows: int = 12) -> Image.Image:
    """The pictures with the smallest loss beside those with the greatest."""
    order = psnr.argsort(descending=True).tolist()
    best, worst = order[:rows], order[::-1][:rows]
    return pair_sheet([(real[i], made[i], real[j], made[j]) for i, j in zip(best, worst)], ["best", "from codes", "worst", "from codes"])


def recognised(model: Tokun, held_out: Sequence[RealPair], judge: recognition.Judge, network: Features, *, seed: int = 0) -> list[Figure]:
    """How often the judge ranks a picture's own caption first of 16: for originals, for reconstructions, and the share kept."""
    real = [pair.image for pair in held_out]
    made = reconstructed(model, held_out)
    originals, copies = (network(pictures, what=f"doctor: {network.name}").float().numpy() for pictures in (real, made))
    return recognition.measure(judge, [pair.caption for pair in held_out], originals, copies, note=network.name, seed=seed)


# --- codes ----------------------------------------------------------------------------------------------------------


def codebook(grids: Sequence[Tensor], size: int) -> list[Figure]:
    """Codes int64 (n, N) of the pictures of each grid."""
    codes, n = torch.cat([part.flatten() for part in grids]), sum(map(len, grids))
    figures = metrics.code_figures(codes, size)
    entropy = sum(len(part) * float(entropies(part).mean()) for part in grids) / n
    seen = f"{codes.numel()} codes of {n} pictures, a codebook of {size}"
    return [
        Figure("codebook usage", figures["usage"], n, better="more", note=seen),
        Figure("code perplexity", figures["perplexity"], n, better="more", note=f"at most {size}"),
        Figure("dead codes", figures["dead_codes"], n, better="less", note=seen),
        Figure("entropy at a place of the grid", entropy, n, note=f"nats, mean; at most {np.log(min(n, size)):.2f} for {n} pictures"),
    ]


def entropies(codes: Tensor) -> Tensor:
    """codes int64 (n, N) -> nats of the code at each position (N,)."""
    shares = [column.unique(return_counts=True)[1] / len(codes) for column in codes.T]
    return torch.stack([-(p * p.log()).sum() for p in shares])


def verdict(psnr: Tensor, codes: Tensor, size: int) -> Figure:
    """1 if a generator may be trained on these codes, by the gate of training with its default limits."""
    figures = {"psnr": float(psnr.mean()), **metrics.code_figures(codes, size)}
    problems = reconstruction.gate_problems(figures, ImageTokenizerTrainConfig(), size)
    note = (
        "0 = no go: " + "; ".join(problems)
        if problems
        else "1 = go: these codes are good enough to train a generator on (the gate of training)"
    )
    return Figure("verdict", float(not problems), len(psnr), better="more", note=note)

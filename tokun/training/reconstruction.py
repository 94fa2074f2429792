"""How well an image tokenizer reconstructs pictures: PSNR, codebook usage, and the gate before the generator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokun import config as configs
from tokun.render.grids import pair_sheet, to_pil
from tokun.tokenizers.image import ImageTokenizer
from tokun.utils.errors import UserError
from tokun.utils.metrics import code_figures, psnr


@torch.no_grad()
def inspect_image_tokenizer(model: ImageTokenizer, images: Tensor | Sequence[Tensor], device: torch.device) -> tuple[dict[str, float], Any]:
    """Figures on pictures (n, C, H, W), or one such tensor per shape: psnr (dB) and those of `code_figures`.

    Also returns a sheet of sixteen pictures, alternating between shapes.
    """
    groups = [images] if isinstance(images, Tensor) else images
    codes, decibels, pairs = [], [], []
    model.eval()
    for group in groups:
        outputs = []
        for batch in group.split(64):
            c = model.encode(batch.to(device))
            codes.append(c.flatten().cpu())
            outputs.append(model.decode(c, (batch.shape[2] // model.config.downsample, batch.shape[3] // model.config.downsample)).cpu())
        reconstructed = torch.cat(outputs)
        decibels.append(psnr(group, reconstructed))
        pairs.append([(to_pil(group[i]), to_pil(reconstructed[i])) for i in range(min(16, len(group)))])
    figures = {"psnr": torch.cat(decibels).mean().item(), **code_figures(torch.cat(codes), model.codebook_size)}
    in_turn = [own[i] for i in range(16) for own in pairs if i < len(own)]  # the first of each shape, then the second of each …
    return figures, pair_sheet(in_turn[:16])


LOWER_GATE = (
    "lower the gate on purpose (image_tokenizer_train.min_usage / image_tokenizer_train.min_perplexity / image_tokenizer_train.min_psnr)"
)


def gate(
    figures: dict[str, float], train: configs.ImageTokenizerTrainConfig, codebook_size: int, *, start: str = "", sheet: Path | None = None
) -> None:
    """Raise UserError if the image tokenizer is too poor to train a generator on. `start`: the checkpoint that it comes from."""
    if problems := gate_problems(figures, train, codebook_size):
        if start:
            raise UserError(
                f"the image tokenizer of start {start} cannot draw these pictures: {'; '.join(problems)}. "
                f"{sheet} shows them beside their reconstructions. Train your own (without start), or {LOWER_GATE}"
            )
        raise UserError(
            "the image tokenizer has collapsed or is undertrained: " + "; ".join(problems) + ". A generator cannot be better than its "
            "codes. Train longer (image_tokenizer_train.steps), "
            f"use a smaller codebook (image_tokenizer.codebook_size), or {LOWER_GATE}"
        )


def gate_problems(figures: dict[str, float], train: configs.ImageTokenizerTrainConfig, codebook_size: int) -> list[str]:
    """The checks of the gate that a tokenizer with these figures fails; empty if none."""
    reach = min(1.0, figures["codes_seen"] / (4 * codebook_size))  # a few held-out pictures cannot use every code
    problems = []
    if figures["usage"] < train.min_usage * reach:
        problems.append(f"only {figures['usage']:.1%} of the codebook is used (the gate asks for {train.min_usage * reach:.1%})")
    if figures["perplexity"] < train.min_perplexity * reach * codebook_size:
        problems.append(
            f"code perplexity is {figures['perplexity']:.1f} of {codebook_size} (the gate asks for {train.min_perplexity * reach:.1%})"
        )
    if figures["psnr"] < train.min_psnr:
        problems.append(f"PSNR is {figures['psnr']:.1f} dB (the gate asks for {train.min_psnr:.1f})")
    return problems

"""The seed's latent: one standard-normal number for every choice of a sequence. Knows no model.

    seed, k  ->  z (slots,)  ->  u = Φ(z)  ->  each choice is the inverse CDF of the model's distribution at its u

A slot belongs to a choice by its position in its span, not by its absolute position: four slots for tags (style and subject,
thing, grid; the last is free), then one for each code in raster order, then one for each piece of text. An extra or missing tag,
a caption given as a prompt, or a picture of fewer codes moves no other slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokun.utils.errors import UserError

TAG_SLOTS = 4


@dataclass(frozen=True)
class Slots:
    """The slot of each choice, for pictures of at most `n_codes` codes and texts of at most `max_text` pieces and their end."""

    n_codes: int
    max_text: int

    @property
    def size(self) -> int:
        return TAG_SLOTS + self.n_codes + self.max_text + 1

    @property
    def image(self) -> int:
        """The slot of the first code."""
        return TAG_SLOTS

    @property
    def text(self) -> int:
        """The slot of the first piece of text."""
        return TAG_SLOTS + self.n_codes

    def given(self, rows: int = 1, *, codes: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """int64 (rows, size): given ids in the slots that would choose them; -1 if the latent chooses.
        Codes and text are ids (n,) or (rows, n)."""
        out = torch.full((rows, self.size), -1)
        for first, ids in ((self.image, codes), (self.text, text)):
            if ids is not None:
                out[:, first : first + ids.shape[-1]] = ids
        return out

    def deciding(self, in_image: Tensor, lengths: Tensor) -> Tensor:
        """The slot that decides the next id of rows with `lengths` ids of a picture or a text; arbitrary if nothing is left to decide."""
        return (torch.where(in_image, self.image, self.text) + lengths).clamp_max(self.size - 1)


def draw(seed: int, indices: Sequence[int], size: int) -> Tensor:
    """z of samples `indices` of `seed`: float32 (B, size). A pure function of (seed, index), independent of the other indices.

    Raises UserError for a seed that is not an integer in 0 … 2^63 - 1, or a negative index.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed!r}; it must be an integer from 0 to 2^63 - 1")
    if not len(indices):
        raise UserError("no sample was requested: n, candidates or the number of indices is 0; it must be at least 1")
    if any(isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 0 <= k < 2**63 for k in indices):
        raise UserError(f"indices are {list(indices)}; they must be integers from 0")
    rows = [np.random.Generator(np.random.Philox(key=np.array([seed, k], np.uint64))).standard_normal(size) for k in indices]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def share_tags(u: Tensor, size: int) -> None:
    """Give every group of `size` rows of u (B, slots.size) its first row's tag slots, in place: samples that differ in the rest only."""
    firsts = torch.arange(len(u)) // size * size
    u[:, :TAG_SLOTS] = u[firsts, :TAG_SLOTS]


def uniform(z: Tensor) -> Tensor:
    """Φ(z), float32 in [0, 1): computed in float64, then rounded down below 1."""
    u = torch.special.ndtr(z.double()).float()
    return u.clamp(0.0, float(np.nextafter(np.float32(1), np.float32(0))))


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation of two latents (…, slots), which keeps the likelihood under the normal distribution."""
    a64, b64 = a.double(), b.double()
    cosine = (a64 * b64).sum(-1, keepdim=True) / (a64.norm(dim=-1, keepdim=True) * b64.norm(dim=-1, keepdim=True))
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    straight = (1 - t) * a64 + t * b64
    bent = (torch.sin((1 - t) * angle) * a64 + torch.sin(t * angle) * b64) / sine.clamp_min(1e-9)
    return torch.where(sine < 1e-6, straight, bent).float()


def invert(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """z with Φ(z) inside (low, high), drawn uniformly in u: the latent of the tokens with these intervals.

    low, high float64 (…,) with 0 <= low < high <= 1 -> float32 (…,). The middle is used if float32 cannot tell the ends apart.
    """
    u = low + (high - low) * (0.01 + 0.98 * torch.rand(low.shape, generator=generator, dtype=torch.float64))
    z = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12)).float()
    inside = (uniform(z).double() > low) & (uniform(z).double() < high)
    return torch.where(inside, z, torch.special.ndtri(((low + high) / 2).clamp(1e-12, 1 - 1e-12)).float())

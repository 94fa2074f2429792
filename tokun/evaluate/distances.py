"""How far apart are two sets of vectors? Fréchet distance, KID, precision and recall, density and coverage.

Vectors are float64 (n, d). Every distance of few vectors is biased: compare with a reference, the distance of two sets of real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokun.evaluate.figures import Figure, mean, share, skipped

FEWEST = 32  # vectors in a set; with fewer, its covariance is meaningless
GROUPS = 10  # of the jackknife
STUDENT = 2.262  # the 97.5 % point of Student's t with GROUPS - 1 degrees of freedom
MANIFOLD_K = 3  # neighbours, as in Kynkäänniemi et al. 2019
COVERAGE_K = 5  # as in Naeem et al. 2020


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between the Gaussians of two sets (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of the root of the product of two covariances is the nuclear norm of the product of their square roots. Its singular
    values stay exact with fewer vectors than dimensions, where an eigenvalue solver loses precision.
    """
    roots = [torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b)]
    traces = sum(float(root.square().sum()) for root in roots)
    return float((a.mean(0) - b.mean(0)).square().sum()) + traces - 2 * float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel distance, cubic kernel, unbiased (Bińkowski et al. 2018), over all vectors at once."""
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (_cubic(a, a), _cubic(b, b))]
    return float(own[0] + own[1] - 2 * _cubic(a, b).mean())


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def spread(a: Tensor) -> float:
    """The mean distance between different vectors."""
    return float(_pairwise(a, a).sum() / (len(a) * (len(a) - 1)))


def jackknife(
    name: str, sets: Sequence[Tensor], statistic: Callable[..., float], *, better: str = "", note: str = "", seed: int = 0
) -> Figure:
    """A statistic of whole sets, with the interval of a grouped jackknife (Tukey 1958). Unlike a bootstrap it repeats no vectors, which
    would affect all these distances. With too few vectors, a figure that says so."""
    n = min(map(len, sets))
    if n < FEWEST:
        return skipped(name, f"{n} pictures; at least {FEWEST} are needed", n)
    shuffled = [x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))] for x in sets]
    without = torch.tensor([statistic(*(_without(x, group) for x in shuffled)) for group in range(GROUPS)], dtype=torch.float64)
    half = STUDENT * math.sqrt((GROUPS - 1) / GROUPS * float((without - without.mean()).square().sum()))
    value = statistic(*sets)
    return Figure(name, value, n, value - half, value + half, better, note)


def _without(x: Tensor, group: int) -> Tensor:
    return x[torch.arange(len(x)) % GROUPS != group]


def manifold(real: Tensor, made: Tensor, note: str) -> list[Figure]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""
    n = min(len(real), len(made))
    if n < FEWEST:
        return [skipped(name, f"{n} pictures; at least {FEWEST} are needed", n) for name in ("precision", "recall", "density", "coverage")]
    near = within(made, real, COVERAGE_K)  # (made, real)
    few, more = (f"{k} neighbours, {note}" for k in (MANIFOLD_K, COVERAGE_K))
    return [
        share("precision", within(made, real, MANIFOLD_K).any(1).tolist(), better="more", note=f"samples among real pictures; {few}"),
        share("recall", within(real, made, MANIFOLD_K).any(1).tolist(), better="more", note=f"real pictures among samples; {few}"),
        mean("density", (near.sum(1) / COVERAGE_K).tolist(), better="more", note=f"1 for samples as dense as real pictures; {more}"),
        share("coverage", near.any(0).tolist(), better="more", note=f"real pictures with a sample near them; {more}"),
    ]


def within(points: Tensor, reference: Tensor, k: int) -> Tensor:
    """(points, reference) bool: whether the point is no farther from the reference than the reference's own k-th neighbour."""
    radii = _pairwise(reference, reference).kthvalue(k + 1, dim=1).values  # the nearest is itself
    return _pairwise(points, reference) <= radii


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # keeps the distance of a vector to itself exactly 0

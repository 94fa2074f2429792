"""Promises of tokun/inference/latents.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokun.inference.latents import Slots, draw, invert, slerp, uniform

seeds = st.integers(0, 2**63 - 1)


@given(seeds, st.lists(st.integers(0, 2**40), min_size=1, max_size=6))
def test_sample_k_of_a_seed_depends_on_nothing_beside_it(seed, indices):
    together = draw(seed, indices, 7)
    alone = torch.cat([draw(seed, [k], 7) for k in indices])
    assert together.dtype == torch.float32 and torch.equal(together, alone)


@given(seeds)
def test_a_longer_latent_begins_like_the_shorter(seed):
    assert torch.equal(draw(seed, [0, 3], 20)[:, :9], draw(seed, [0, 3], 9))


def test_the_latent_is_fixed_for_good():
    """A checkpoint's published seeds must draw the same pairs under every later version."""
    expected = np.random.Generator(np.random.Philox(key=42)).standard_normal(2)
    assert torch.equal(draw(42, [0], 2)[0], torch.tensor(expected).float())


def test_seeds_and_samples_are_independent_standard_normals():
    z = torch.cat([draw(seed, range(20), 500) for seed in (0, 1, 2**63 - 1)]).double()
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert (torch.corrcoef(z).fill_diagonal_(0).abs() < 0.25).all()


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "1", None, float("nan")])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed is .*; it must be an integer from 0"):
        draw(seed, [0], 3)


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="must be integers from 0"):
        draw(1, [0, -1], 3)


@given(st.floats(-40, 40, width=32))
def test_u_is_phi_of_z_below_one(z):
    u = uniform(torch.tensor([z])).item()
    assert 0 <= u < 1
    assert u == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), rel=1e-6, abs=1.2e-7)


def test_slots_belong_to_places_in_spans():
    slots = Slots(n_codes=6, max_text=5)
    assert (slots.image, slots.text) == (4, 10) and slots.size == 4 + 6 + 5 + 1


def test_slerp_meets_its_ends_and_keeps_the_length():
    a, b = draw(1, [0, 1], 300), draw(2, [0, 1], 300)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    for t in (0.1, 0.5, 0.9):
        torch.testing.assert_close(slerp(unit(a), unit(b), t).norm(dim=-1), torch.ones(2))
        low, high = sorted([a[0].norm(), b[0].norm()])
        assert 0.95 * low < slerp(a, b, t)[0].norm() < 1.05 * high
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, b, 0.25), slerp(b, a, 0.75))


@given(st.floats(0, 0.9999), st.floats(1e-4, 1), st.integers(0, 99))
def test_an_inverted_interval_holds_its_latent(low, width, seed):
    low, high = torch.full((50,), low, dtype=torch.float64), torch.full((50,), min(1.0, low + width), dtype=torch.float64)
    u = uniform(invert(low, high, torch.Generator().manual_seed(seed))).double()
    assert (u > low).all() and (u < high).all()
    assert u.unique().numel() > 25  # drawn, not always the middle

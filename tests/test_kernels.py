"""Promises of tokun/models/kernels.py."""

import pytest
import torch
import torch.nn.functional as F

from tokun.models import kernels


def inputs(length, heads=4, kv=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, length, 8, generator=g).to(dtype).requires_grad_() for h in (heads, kv, kv))
    return q, k, v, torch.randn(3, length, heads, 8, generator=g).to(dtype)


def results(attention, q, k, v, wanted):
    output = attention(q, k, v)
    return [output, *torch.autograd.grad(output, (q, k, v), wanted)]


def stock(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3).transpose(1, 2)


def ours(q, k, v):
    return kernels.causal_attention(q, k, v, 0.3)


@pytest.mark.parametrize("length", [1, 2, 7, 20])
@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (3, 3), (4, 1)])
def test_causal_attention_and_its_gradients_are_torchs(length, heads, kv):
    given = inputs(length, heads, kv)
    for mine, its in zip(results(ours, *given), results(stock, *given), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_is_as_near_to_the_exact_one_as_torchs():
    exact, half = inputs(20), inputs(20, dtype=torch.bfloat16)
    whole = results(stock, *exact)
    for mine, its, right in zip(results(ours, *half), results(stock, *half), whole, strict=True):
        assert (mine.float() - right).norm() < 1.5 * (its.float() - right).norm() + 1e-3


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_hashed_dropout_drops_that_share_everywhere_and_keeps_the_expectation(p):
    kept = []
    for seed in (0, 1, -5, 2**31 - 1, 123456789):
        y = kernels.hashed_dropout(torch.ones(64, 50, 40), p, torch.tensor(seed, dtype=torch.int32))
        assert set(y.unique().tolist()) == {0.0, y.max().item()} and y.max().item() == pytest.approx(1 / (1 - p))
        kept.append((y != 0).float())
        spread = (p * (1 - p) / 3200) ** 0.5  # of a column's mean over 3,200 draws
        for axes in ((0, 1), (0, 2), (1, 2)):
            means = kept[-1].mean(axes)
            draws = y.numel() // len(means)
            assert means.sub(1 - p).abs().max() < 5 * spread * (3200 / draws) ** 0.5
    for a in range(len(kept)):  # masks of two seeds, and neighbours in one, know nothing of each other
        flat = kept[a].flatten() - (1 - p)
        for other in (*kept[a + 1 :], kept[a].roll(1, -1), kept[a].roll(1, 0), kept[a].roll(1, 1)):
            assert abs((flat * (other.flatten() - (1 - p))).mean()) < 5 * p * (1 - p) / flat.numel() ** 0.5

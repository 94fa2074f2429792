"""Promises of tokun/training/optim.py."""

import copy
import math

import pytest
import torch
from torch import nn

from tokun.training.optim import Ema, Muon, make_adamw, make_optimizer, parameter_groups, set_lr, warmup_cosine


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight  # tied
        self.conv, self.norm, self.frozen = nn.Conv2d(1, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


def test_warmup_then_cosine_meets_its_ends():
    at = lambda step: warmup_cosine(step, progress=step / 110, warmup=10, min_ratio=0.1)  # noqa: E731
    cosine = lambda share: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))  # noqa: E731
    assert at(0) == pytest.approx(0.1) and at(4) == pytest.approx(0.5 * cosine(4 / 110)) and at(9) == pytest.approx(cosine(9 / 110))
    assert at(55) == pytest.approx(0.55) and at(110) == pytest.approx(0.1) and at(500) == pytest.approx(0.1)
    assert all(at(s) >= at(s + 1) for s in range(9, 200))
    assert warmup_cosine(0, progress=0.0, warmup=0) == 1.0
    held = lambda progress: warmup_cosine(99, progress=progress, warmup=10, min_ratio=0.1, hold=0.8)  # noqa: E731
    assert held(0.3) == held(0.8) == 1.0 and abs(held(0.9) - 0.55) < 1e-9 and abs(held(1.0) - 0.1) < 1e-9
    assert 0 < warmup_cosine(3, progress=0.6, warmup=10) <= 1.0  # a run shorter than its warm-up


def test_groups_hold_every_trained_parameter_once():
    module = Small()
    decay, rest = parameter_groups(module, 0.1)
    ids = [id(p) for group in (decay, rest) for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in module.parameters() if p.requires_grad})
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in rest["params"]} == {id(module.conv.bias), id(module.norm.weight), id(module.norm.bias)}


def test_weight_decay_touches_matrices_alone():
    module = Small()
    optimizer = make_adamw(module, lr=0.1, betas=[0.9, 0.95], weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in module.named_parameters():
        factor = 0.95 if p.ndim >= 2 and p.requires_grad else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


class TwoMatrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down, self.norm = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 9, bias=False)

    def forward(self, ids):
        return self.lm_head(self.norm(self.down(self.up(self.embed(ids)).relu())))


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@needs_muon
def test_muon_turns_matrices_by_an_orthogonal_step_of_adamws_size_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    module = TwoMatrices()
    optimizer = make_optimizer("muon", module, lr=0.01, betas=[0.9, 0.95], weight_decay=0.0)
    assert isinstance(optimizer, Muon) and len(optimizer.parts[0].param_groups[0]["params"]) == 2
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = nn.init.orthogonal_(torch.empty_like(p)) * 3 if p.ndim == 2 else torch.randn_like(p)
    optimizer.step()
    for name, p in module.named_parameters():
        step = (p.detach() - before[name]) / 0.01
        if name in ("up.weight", "down.weight"):
            singular = torch.linalg.svdvals(step) / (0.2 * 24**0.5)  # 0.2 sqrt(larger side) times a nearly orthogonal matrix
            assert singular.min() > 0.5 and singular.max() < 1.5  # Newton-Schulz is not exact, nor needs to be
        else:
            moved = step[step != 0].abs()
            torch.testing.assert_close(moved, torch.ones_like(moved), atol=1e-2, rtol=0)  # AdamW's first step has the sign's size


@needs_muon
def test_muon_goes_on_from_its_state_as_if_it_had_never_stopped():
    def train(module, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            (module(torch.arange(9)) - step).square().sum().backward()
            set_lr(optimizer, 0.01 / (1 + step))
            optimizer.step()

    torch.manual_seed(0)
    one = TwoMatrices()
    first = make_optimizer("muon", one, lr=0.01, betas=[0.9, 0.95], weight_decay=0.1)
    train(one, first, range(3))
    two = TwoMatrices()
    two.load_state_dict(one.state_dict())
    second = make_optimizer("muon", two, lr=0.5, betas=[0.9, 0.95], weight_decay=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(one, first, range(3, 6))
    train(two, second, range(3, 6))
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)


@needs_muon
def test_muon_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match="adamw"):
        make_optimizer("muon", nn.LayerNorm(4), lr=0.01, betas=[0.9, 0.95], weight_decay=0.1)


def test_ema_is_the_hand_written_loop():
    torch.manual_seed(0)
    module = Small()
    ema = Ema(module, 0.5)
    slow = module.conv.weight.detach().clone()
    for t in range(1, 15):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        ema.update(module)
        decay = min(0.5, (1 + t) / (10 + t))
        slow = decay * slow + (1 - decay) * module.conv.weight.detach()
    torch.testing.assert_close(ema.shadow["conv.weight"], slow)
    assert not torch.equal(module.conv.weight, ema.shadow["conv.weight"])
    ema.copy_to(module)
    assert torch.equal(module.conv.weight, ema.shadow["conv.weight"]) and module.out.weight is module.embed.weight


def test_ema_saved_then_loaded_goes_on_as_if_uninterrupted(tmp_path):
    torch.manual_seed(0)
    module, other = Small(), Small()
    whole, first = Ema(module, 0.9), Ema(module, 0.9)
    for step in range(4):
        with torch.no_grad():
            module.conv.weight.add_(1.0)
        whole.update(module)
        if step < 2:
            first.update(module)
        if step == 1:
            torch.save(first.state_dict(), tmp_path / "ema.pt")
            second = Ema(other, 0.9)
            second.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
        if step >= 2:
            second.update(module)
    assert all(torch.equal(whole.shadow[name], second.shadow[name]) for name in whole.shadow)


def test_ema_averages_half_precision_weights_in_float32():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema = Ema(module, 0.999)
    ema.step = 10**6
    nn.init.constant_(module.weight, 1.0)
    ema.shadow["weight"].zero_()
    for _ in range(100):
        ema.update(module)
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].item() == pytest.approx(1 - 0.999**100, rel=1e-4)


def test_the_fused_adamw_is_the_plain_one_and_goes_on_from_its_state_and_from_its_own():
    def stepped(optimizer, layer, steps):
        for step in steps:
            layer.weight.grad = torch.full_like(layer.weight, 0.1 * (step + 1)) * layer.weight.detach().sign()
            optimizer.step()
        return layer.weight.detach().clone()

    def made(fused, weight=None):
        torch.manual_seed(0)
        layer = nn.Linear(3, 4, bias=False)
        if weight is not None:
            layer.weight.data.copy_(weight)
        if fused:
            return make_adamw(layer, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1), layer
        return torch.optim.AdamW(parameter_groups(layer, 0.1), lr=0.1, betas=(0.9, 0.95)), layer

    plain = stepped(*made(False), range(6))
    assert made(True)[0].defaults["fused"]
    for first in (True, False):  # whichever wrote the state
        optimizer, layer = made(first)
        half = stepped(optimizer, layer, range(3))
        other, rest = made(True, half)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        torch.testing.assert_close(stepped(other, rest, range(3, 6)), plain)
        if first:
            assert torch.equal(stepped(*made(True), range(6)), rest.weight)  # resumed == uninterrupted, to the bit


def test_an_average_that_looks_every_fourth_step_forgets_as_fast():
    module = nn.Linear(3, 2)
    each, fourth = Ema(module, 0.9), Ema(module, 0.9, every=4)
    with torch.no_grad():
        module.weight += 1.0
    for _ in range(40):  # the warm-up of the decay is among them
        each.update(module)
        fourth.update(module)
    torch.testing.assert_close(fourth.shadow, each.shadow)
    before = fourth.shadow["weight"].clone()
    fourth.update(module)
    assert torch.equal(fourth.shadow["weight"], before) and fourth.step == 41

"""Promises of tokun/align/objective.py: what is learned from which token, and how much."""

import copy

import pytest
import torch

from tokun.align import objective, rollouts
from tokun.config import GrpoConfig
from tokun.inference import sampling
from tokun.inference.token_choice import Constraints, DecodingSettings
from tokun.tokenizers import sequences


def test_advantages_are_apart_from_the_groups_own_mean():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    assert objective.advantages(rewards, 2, scale="none").tolist() == [-1, 1, 0, 0]
    assert objective.advantages(rewards, 2, scale="group").tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-3)
    assert objective.advantages(rewards, 2, scale="batch").tolist() == pytest.approx([-(2**0.5), 2**0.5, 0, 0], abs=1e-3)


@pytest.mark.parametrize("learn", ["both", "image", "text"])
def test_codes_words_and_their_end_are_chosen_and_nothing_that_was_given(tiny_model, learn):
    pairs = tiny_model.sample(3, n=4)
    ids = rollouts.packed(tiny_model, pairs, prompted=False)
    what = objective.chosen(tiny_model.vocabulary, ids, learn)
    v = tiny_model.vocabulary
    codes = [code + v.code_offset for pair in pairs for code in pair.codes] if learn != "text" else []
    words = [i for pair in pairs for i in (*pair.caption_ids, v.id("<eoc>"))] if learn != "image" else []
    assert sorted(what.ids.tolist()) == sorted(codes + words) and what.is_image.sum() == len(codes)
    assert torch.equal(ids[:, 1:].flatten()[what.places], what.ids)
    first = what.rows == 0
    assert what.slots[first & what.is_image].tolist() == list(range(len(pairs[0].codes) * (learn != "text")))


def test_of_a_prompt_the_picture_alone_is_chosen(shaped_model):
    pairs = shaped_model.sample(3, n=2, prompt="A disc.")
    ids = rollouts.packed(shaped_model, pairs, prompted=True)
    what = objective.chosen(shaped_model.vocabulary, ids, "both")
    assert what.is_image.all() and len(what.ids) == sum(len(pair.codes) for pair in pairs)


def test_likelihoods_are_those_of_the_sampler(tiny_model):
    """At temperature 1: what `generate` says that the codes and the words cost."""
    v, u = tiny_model.vocabulary, torch.rand(3, tiny_model.slots.size, generator=torch.Generator().manual_seed(0))
    tags = tiny_model.choose_tags(u, tiny_model.wanted_tags())
    pairs, _ = tiny_model.pairs_from(u, 0, [0, 1, 2], tags, DecodingSettings())
    ids = rollouts.packed(tiny_model, pairs, prompted=False)
    what = objective.chosen(v, ids, "both")
    logs, entropy = objective.likelihoods(tiny_model.generator, ids, what, v, temperatures=(1.0, 1.0))
    for row, pair in enumerate(pairs):
        mine = what.rows == row
        assert -logs[mine & what.is_image].sum().item() == pytest.approx(pair.image_nll, rel=1e-4)
        assert -logs[mine & ~what.is_image].sum().item() == pytest.approx(pair.caption_nll, rel=1e-4)
    assert entropy.min() >= 0 and entropy[what.is_image].max() <= torch.log(torch.tensor(64.0)) + 1e-4
    colder, _ = objective.likelihoods(tiny_model.generator, ids, what, v, temperatures=(0.5, 1.0))
    assert not torch.allclose(colder[what.is_image], logs[what.is_image]) and torch.allclose(colder[~what.is_image], logs[~what.is_image])


def test_guided_likelihoods_are_those_of_the_guided_sampler(tiny_model):
    """The probability of a choice is the width of the interval of u that makes it (`Generated.low`, `high`)."""
    model = copy.copy(tiny_model)
    # without the pieces that only the sampler leaves out
    model.__dict__["constraints"] = Constraints(sequences.other_tasks(model.vocabulary))
    v, slots = model.vocabulary, model.slots
    u = torch.rand(3, slots.size, generator=torch.Generator().manual_seed(0))
    tags = model.choose_tags(u, model.wanted_tags())
    config = GrpoConfig(temperature=1.0, text_temperature=1.0, guidance_scale=3.0, text_guidance_scale=2.0)
    how = rollouts.how_of(model, config)
    pairs, _ = model.pairs_from(u, 0, [0, 1, 2], tags, how)
    ids = rollouts.packed(model, pairs, prompted=False)
    what, guidance = objective.chosen(v, ids), rollouts.guidance(model, config, pairs, prompted=False)
    logs, _ = objective.likelihoods(model.generator, ids, what, v, temperatures=(1.0, 1.0), guidance=guidance)
    for row, pair in enumerate(pairs):
        text = torch.tensor([*pair.caption_ids, v.id("<eoc>")])
        drawn = sampling.generate(
            model.generator, sampling.Rules(v, slots, how, model.constraints),
            torch.tensor([sequences.image_prompt(v, pair.tags)]), u[row : row + 1],
            unconditional_image=torch.tensor([sequences.unconditional_image_prompt(v, pair.tags.grid)]),
            unconditional_text=torch.tensor([sequences.prefix(v, pair.tags)]),
            forced=slots.given(codes=torch.tensor(pair.codes) + v.code_offset, text=text),
        )  # fmt: skip
        width = (drawn.high - drawn.low)[0]
        for first, count, kind in ((slots.image, len(pair.codes), True), (slots.text, len(text), False)):
            mine = logs[(what.rows == row) & (what.is_image == kind)]
            assert torch.allclose(mine.exp().double(), width[first : first + count], atol=1e-5), (row, kind)
    bare, _ = objective.likelihoods(model.generator, ids, what, v, temperatures=(1.0, 1.0))
    assert not torch.allclose(bare[what.is_image], logs[what.is_image]) and not torch.allclose(bare[~what.is_image], logs[~what.is_image])


def terms(new, advantage, *, old=None, start=None, weight=None, **options):
    n = len(new)
    old, start = (new.detach() if given is None else given for given in (old, start))
    settings = dict(low=0.2, high=0.3, kl=0.0) | options
    ones = torch.ones(n)
    return objective.terms(
        new,
        ones,
        old,
        start,
        advantage,
        ones if weight is None else weight,
        ones / n,
        torch.ones(n, dtype=torch.bool),
        start_entropy=ones,
        **settings,
    )


def test_the_gradient_raises_what_was_better_and_stops_at_the_clip():
    new = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -1.5, -0.5])  # the third has risen beyond 1.3, the fourth has fallen below 0.8
    found = terms(new, torch.tensor([1.0, -1.0, 1.0, -1.0]), old=old)
    found.loss.backward()
    assert new.grad.tolist() == pytest.approx([-0.25, 0.25, 0, 0]) and found.clipped.tolist() == [2, 0]


def test_the_divergence_is_never_below_zero_and_pulls_back():
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    found = terms(new, torch.zeros(2), start=torch.tensor([-2.0, -1.0]), kl=1.0)
    assert found.kl[0] > 0 == found.kl[1]
    found.loss.backward()
    assert new.grad[0] > 0 > new.grad[1]  # the likelier than at the start falls


def test_tokens_that_were_all_but_certain_can_be_left_alone():
    old = torch.log(torch.tensor([0.999, 0.5]))
    assert objective.easy(old, 0.99).tolist() == [True, False] and not objective.easy(old, 1.0).any()
    new = old.clone().requires_grad_()
    terms(new, torch.ones(2), weight=(~objective.easy(old, 0.99)).float()).loss.backward()
    assert new.grad[0] == 0 > new.grad[1]


def test_codes_that_look_like_the_groups_others_are_told_from_those_that_do_not():
    vectors = torch.tensor([[1.0, 0.0], [0.99, 0.1], [-1.0, 0.0], [-0.99, -0.1]])
    codes = torch.tensor([[[0, 0], [1, 2], [0, 3]]])  # (1 group, 3 pictures, 2 places)
    found = objective.similarity(codes, vectors)
    assert found[0, :, 0].min() > 0.9 and found[0, 0, 1] == 0

"""Promises of tokun/inference/prompt_tags.py: a prompt's picture has the tags that the prompt calls for."""

import math
from collections import Counter
from copy import copy
from dataclasses import replace

import pytest
import torch

import tokun
from tokun.inference import adapters, prompt_tags
from tokun.inference.tags import Frequencies, with_subjects_of
from tokun.tokenizers.vocabulary import Tags
from tokun.utils.errors import UserError


@pytest.fixture(scope="module")
def bundled():
    return tokun.load()


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [("A pelican standing in the reeds with a fish in its bill.", "bird"), ("A small ship under full sail at sea.", "ship")],
)
def test_the_subject_of_a_prompt_is_found(bundled, prompt, subject):
    found = bundled.frequencies(Tags(), bundled.encode_text(prompt))
    subjects = Counter(found.draw(((i + 0.5) / 100, 0.5, 0.5, 0.5), Tags()).subject for i in range(100))
    assert subjects[subject] >= 60, subjects


def test_the_likelihoods_are_the_models_own(tiny_model):
    counts, caption = tiny_model.frequencies(Tags()), tiny_model.encode_text("a tree")
    found = prompt_tags.likelihoods(tiny_model, caption, Tags(), counts)
    pairs = list(found)
    assert len(pairs) > 1 and max(found.values()) == 1
    v = tiny_model.vocabulary
    nats = tiny_model.caption_nll(
        [Tags("", s if s in v.subjects else "", v.default_register, v.default_grid, t) for s, t in pairs], [caption] * len(pairs)
    )
    assert list(found.values()) == pytest.approx([math.exp(min(nats) - n) for n in nats], rel=1e-4)


def test_what_is_asked_for_is_not_inferred_and_a_seed_keeps_its_pairs(tiny_model):
    pairs = tiny_model.sample(5, n=6, prompt="a tree", subject="shapes")
    assert {p.tags.subject for p in pairs} == {"shapes"}
    whole = tiny_model.sample(5, n=6, prompt="a tree")
    assert [p.codes for p in tiny_model.sample(5, indices=[4, 1], prompt="a tree", batch_size=1)] == [whole[4].codes, whole[1].codes]


def test_an_unknown_subject_beside_a_prompt_is_refused(tiny_model):
    with pytest.raises(UserError, match="subject"):
        tiny_model.sample(5, n=1, prompt="a tree", subject="comets")


def test_a_plan_infers_its_tags_once_and_only_when_they_are_drawn(tiny_model, monkeypatch):
    asked = []
    own = prompt_tags.likelihoods
    monkeypatch.setattr(prompt_tags, "likelihoods", lambda *given: asked.append(1) or own(*given))
    plan = tiny_model.plan(prompt="a tree", batch_size=2)
    assert not asked
    tiny_model.sample_from(torch.rand(5, tiny_model.slots.size), 1, range(5), prompt="a tree", batch_size=2)
    assert len(asked) == 1 and plan.tags is plan.tags and len(asked) == 2


def test_of_many_even_subjects_the_likeliest_are_kept(tiny_model, monkeypatch):
    """None of 40 had the least share, and the prompt chose nothing."""
    counts = Frequencies([("engraving", f"kind {i}", 1) for i in range(40)], tiny_model.vocabulary)
    monkeypatch.setattr(tiny_model.__class__, "caption_nll", lambda self, tags, captions: [1.0] * len(tags))
    assert len(prompt_tags.likelihoods(tiny_model, [5], Tags(), counts)) == 40


def test_with_an_adapter_whose_pictures_had_no_subjects_a_prompt_still_calls_for_those_of_its_base(tiny_model):
    """A storm at sea was drawn as faces: the bundled model had drawn ships, since its tags said so."""
    model = copy(tiny_model)
    style, subjects = tiny_model.styles[0], [subject for subject in tiny_model.subjects]
    model.base, model.tag_counts = adapters.base_of(tiny_model), [(style, "", 30)]
    model.base = replace(model.base, tag_counts=[(tiny_model.styles[-1], subject, 10) for subject in subjects])
    caption, u = tiny_model.encode_text("a ship"), torch.full((1, 4), 0.4)
    (asked,), (own,) = model.choose_tags(u, Tags(), caption), model.choose_tags(u, Tags())
    assert asked.subject in subjects and asked.style == style and not own.subject
    own, base = [("a", "", "", "4x4", 2), ("b", "", 1)], [("c", "ship", "mast", "8x8", 3), ("d", "ship", "mast", "2x2", 1), ("c", "cat", 5)]
    shapes = [("a", "ship", "mast", "4x4", 8), ("a", "cat", "", "4x4", 10), ("b", "ship", "mast", "", 4), ("b", "cat", "", "", 5)]
    assert with_subjects_of(own, base) == shapes, "the adapter's pictures have shapes of their own"

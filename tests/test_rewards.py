"""Promises of tokun/align's rewards: one number a pair, finite, or one clear line that names the reward."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from tests.test_clip import tiny_clip
from tokun.align import caption_rewards, perturb, rewards
from tokun.config import RewardConfig
from tokun.inference.candidates import OWN_SCORES
from tokun.utils.errors import UserError


@pytest.fixture(scope="module")
def pairs(tiny_model):
    return tiny_model.sample(3, n=6)


def made(model, kind: str, **options):
    return rewards.make([RewardConfig(kind=kind, **options)], model)[0]


def ink(pairs):
    """A reward of one's own: how dark the picture is."""
    return [255 - float(np.asarray(pair.image).mean()) for pair in pairs]


def test_pmi_is_the_models_own_and_does_not_depend_on_the_company(tiny_model, pairs):
    reward = made(tiny_model, "pmi")
    together = reward(pairs)
    assert np.allclose(together, [pair.pmi for pair in pairs], atol=1e-3)
    assert np.allclose(together, [reward([pair])[0] for pair in pairs], atol=1e-3)


def test_pmi_first_is_a_share_among_the_batch_and_wants_rivals(tiny_model, pairs):
    reward, many = made(tiny_model, "pmi_first"), tiny_model.sample(3, n=20)
    got, others = reward(many), caption_rewards.rivals(many, 4)
    assert all(0 <= value <= 1 for value in got) and len({many[j].caption for j in others} - {many[4].caption}) == 15
    nats = tiny_model.pmi([many[4].tags] * 16, [many[j].caption_ids for j in (4, *others)], [many[4].codes] * 16)
    assert got[4] == pytest.approx(float(torch.tensor(nats).softmax(0)[0]), abs=1e-4)
    with pytest.raises(UserError, match=r"15 are needed: raise train\.batch_size"):
        reward(pairs)


@pytest.mark.parametrize("kind", ["pmi", "mmi", "likelihood", "pmi_first"])
def test_another_checkpoint_scores_by_its_own_weights_and_reads_the_picture_itself(tiny_model, shaped_folder, checkpoint_folder, kind):
    many = tiny_model.sample(3, n=18)
    same, other = (made(tiny_model, kind, of=str(folder))(many) for folder in (checkpoint_folder, shaped_folder))
    assert len(same) == len(other) == len(many) and not np.allclose(same, other, atol=1e-2)
    unread = made(tiny_model, kind)(many)  # by the model itself, from the codes that it drew
    assert not np.allclose(other, unread, atol=1e-2)


def test_a_checkpoint_that_is_not_there_is_named_with_the_rewards_place(tiny_model):
    with pytest.raises((UserError, FileNotFoundError), match=r"grpo\.rewards\[0\] \(pmi\)"):
        made(tiny_model, "pmi", of="nowhere/at/all")


def test_a_function_of_ones_own_is_a_reward(tiny_model, pairs):
    reward = made(tiny_model, f"{__name__}:ink", weight=-0.5)
    assert reward.weight == -0.5 and reward(pairs) == ink(pairs)


def test_a_reward_in_the_current_folder_is_found_however_tokun_was_started(tiny_model, pairs, tmp_path, monkeypatch):
    """The script `tokun` has its own folder on the path, not the current one."""
    (tmp_path / "reward_of_mine.py").write_text("def f(pairs):\n    return [2.0 for _ in pairs]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    assert made(tiny_model, "reward_of_mine:f")(pairs) == [2.0] * len(pairs)
    assert sys.path[-1] == str(tmp_path), "last: it hides no installed module"


@pytest.mark.parametrize(
    "given, told",
    [
        (lambda pairs: [1.0, math.nan], "gave nan for pair 1"),
        (lambda pairs: torch.tensor([math.inf, 1.0]), "gave inf for pair 0"),
        (lambda pairs: [1.0], "gave 1 numbers for 2 pairs; it must give one per pair"),
        (lambda pairs: ["good", "bad"], "gave 'good' .str. for pair 0; it must be a number"),
        (lambda pairs: [True, False], "gave True .bool. for pair 0"),
        (lambda pairs: 1.0, "gave a float; it must give a list of 2 numbers"),
        (lambda pairs: None, "gave a NoneType"),
    ],
)
def test_what_is_not_one_finite_number_a_pair_is_one_clear_line_with_the_rewards_name(pairs, given, told):
    with pytest.raises(ValueError, match=f"reward mine {told}") as error:
        rewards.Checked("mine", 1.0, given)(pairs[:2])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "asked, told",
    [
        (RewardConfig(kind="pim"), "kind is 'pim'; it must be one of pmi, .*module:function"),
        (RewardConfig(kind="nowhere.at_all:f"), "nowhere.at_all:f cannot be imported"),
        (RewardConfig(kind="math:pi"), "math:pi is a float, not a function"),
        (RewardConfig(kind="clip"), r"grpo.rewards\[0\] \(clip\): of is empty; it must name an open_clip model"),
        (RewardConfig(kind="vqa"), "of is empty; it must name a model that answers"),
        (RewardConfig(kind="svg", max_bytes=10), "max_bytes is 10; a picture takes at least"),
        (RewardConfig(kind="pmi", weight=math.nan), "weight is nan; it must be a finite number"),
        (RewardConfig(kind="own_yes", question="{"), "question is '{'"),
        (RewardConfig(kind="own_yes", question=" ? "), "it is empty"),
        (RewardConfig(kind="caption", shards="nothing-*.tar"), "nothing-"),
    ],
)
def test_a_reward_that_cannot_be_made_says_so_in_one_line(tiny_model, asked, told):
    with pytest.raises((ValueError, FileNotFoundError), match=told) as error:
        rewards.make([asked], tiny_model)
    assert "\n" not in str(error.value)


def test_the_scores_that_pairs_are_drawn_with_are_those_of_the_rewards(tiny_model):
    """`--best-of` takes the former, learning from rewards computes the latter by the frozen model."""
    pairs = tiny_model.sample(3, n=5)
    for kind, score in OWN_SCORES.items():
        if kind == "match":  # of a checkpoint with a head: tests/test_matching.py
            continue
        assert made(tiny_model, kind)(pairs) == pytest.approx(score(tiny_model, pairs), abs=1e-3), kind


def test_two_rewards_of_a_kind_have_names_of_their_own(tiny_model):
    assert [reward.name for reward in rewards.make([RewardConfig("pmi"), RewardConfig("pmi", 2.0)], tiny_model)] == ["pmi", "pmi_2"]


def test_a_reward_of_a_command_line_is_a_kind_with_what_it_reads():
    assert rewards.parse("svg") == RewardConfig(kind="svg")
    assert rewards.parse("clip=ViT-B-32:laion2b") == RewardConfig(kind="clip", of="ViT-B-32:laion2b")
    assert rewards.parse("my.module:function") == RewardConfig(kind="my.module:function")


def test_clip_and_the_aesthetic_head_score_pictures(tiny_model, pairs, tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    assert all(-1 <= value <= 1 for value in made(tiny_model, "clip", of=folder)(pairs))
    save_file({"weight": torch.ones(1, 16) / 16, "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    assert all(4 < value < 6 for value in made(tiny_model, "aesthetic", of=str(tmp_path / "head.safetensors"), clip=folder)(pairs))


def test_first_of_sixteen_is_a_share_for_each_pair(tiny_model, tmp_path):
    found = made(tiny_model, "clip_first", of=tiny_clip(tmp_path / "clip"))(tiny_model.sample(5, n=20))
    assert len(found) == 20 and all(0 <= value <= 1 for value in found)


def test_a_caption_loses_a_third_for_each_fault(tiny_model, pairs, toy_shards):
    reward = made(tiny_model, "caption", shards=str(toy_shards / "train-*.tar"))
    from tokun.evaluate.held_out_pairs import read_captions

    learnt = read_captions(str(toy_shards / "train-*.tar"))[0]
    texts = ["A disc above a striped square.", "A disc disc disc.", learnt, "A disc of the"]
    values = reward([replace(pairs[0], caption=text, caption_ids=[1, 2]) for text in texts])
    assert values == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3])


def drawn(kind: str) -> Image.Image:
    page = Image.new("L", (64, 64), 255)
    if kind != "blank":
        ImageDraw.Draw(page).ellipse((12, 12, 50, 50), fill=0)
    if kind == "noise":
        page = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    return page


def test_a_drawing_is_worth_its_likeness_within_the_limit_and_a_blank_page_nothing(pairs, tiny_model):
    pytest.importorskip("resvg_py")
    likeness = made(tiny_model, "svg", max_bytes=10_000)
    disc, noise, blank = likeness([replace(pairs[0], image=drawn(kind)) for kind in ("disc", "noise", "blank")])
    assert disc > 0.9 > noise and blank == 0
    tight = made(tiny_model, "svg", max_bytes=400)([replace(pairs[0], image=drawn("noise"))])[0]
    assert tight < noise


def test_shorter_drawings_are_worth_more(pairs, tiny_model):
    pytest.importorskip("vtracer")
    disc, noise, blank = made(tiny_model, "svg_bytes")([replace(pairs[0], image=drawn(kind)) for kind in ("disc", "noise", "blank")])
    assert noise < disc < blank <= -0.1


def test_a_drawing_is_rendered_at_the_side_that_is_asked_for():
    pytest.importorskip("resvg_py")
    from tokun.render.svg import rendered, to_svg

    made = rendered(to_svg(drawn("disc").resize((64, 32))), 96)
    assert made.size == (96, 48) and made.mode == "RGB"


def test_perturbations_change_pixels_little_and_the_same_way_each_time(pairs):
    change = perturb.changer(["crop", "noise", "jpeg"], 7)
    once, again = change(pairs), change(pairs)
    for before, one, two in zip(pairs, once, again):
        a, b = (np.asarray(pair.image, float) for pair in (before, one))
        assert one.image.size == before.image.size and one.image.mode == before.image.mode and np.array_equal(b, np.asarray(two.image))
        assert 0 < np.abs(a - b).mean() < 40
    with pytest.raises(ValueError, match=r"grpo\.perturb names blur; known are crop, noise, jpeg"):
        perturb.changer(["blur"], 0)

"""A model card says what is true of that model: no licence that nobody chose, what was trained on what, from which start."""

import pytest
import yaml

from tokun.config import from_dict
from tokun.inference.description import figures, title
from tokun.inference.model_card import changed_card, model_card

RECORD = {
    "image_tokenizer": {"psnr": 20.0, "usage": 0.5, "perplexity": 30},
    "val": None,
    "seconds": 600,
    "steps": 40,
    "parameters": 1e6,
    "settings": {"counts": {"train": 1200}},
}


@pytest.mark.parametrize("licence", ["", "cc-by-4.0", "mit"])
def test_a_licence_stands_there_only_where_it_was_chosen(licence):
    head = model_card(from_dict({"card": {"license": licence}}), RECORD).split("---")[1]
    assert (f"license: {licence}\n" in head) if licence else "license" not in head
    assert "engraving" not in head


@pytest.mark.parametrize("text", ["no", "CC BY 4.0: see LICENSE", "[mine]", "1.0", "# none"])
def test_a_licence_or_a_style_that_means_something_else_in_yaml_is_read_back_as_it_was_chosen(text):
    head = yaml.safe_load(model_card(from_dict({"card": {"license": text}, "data": {"style": text}}), RECORD).split("---\n")[1])
    assert head["license"] == text and head["tags"][-2:] == ["image-captioning", text]


@pytest.mark.parametrize("home", ["/home/anna", "~/prints", "/media/anna/disk 2"])
def test_it_names_no_home_folder(home):
    """The card goes to the Hub: the paths of the machine it was trained on do not."""
    settings = {
        "data": {"train": f"{home}/shards/train-*.tar,{home}/more"},
        "start": f"{home}/runs/first",
        "generator": {"pretrained": f"{home}/models/lm"},
    }
    card = model_card(from_dict(settings), RECORD)
    assert (
        home not in card
        and "anna" not in card
        and "shards/train-*.tar," in card
        and "went on from runs/first, started from models/lm" in card
    )


@pytest.mark.parametrize(("seconds", "said"), [(20, "less than a minute"), (90, "2 minutes"), (6 * 3600, "6 hours")])
def test_the_time_is_never_none_at_all(seconds, said):
    assert f", {said}.\n" in model_card(from_dict({}), {**RECORD, "seconds": seconds})


def test_it_says_what_was_trained_on_how_long_and_from_which_start():
    held = {**RECORD, "settings": {"counts": {"train": 1200, "val": 60}}}
    card = model_card(from_dict({"data": {"train": "shards/train-*.tar", "style": "etching"}, "start": "bundled"}), held)
    for said in (
        "1,200 pictures with captions to train, 60 held out (shards: `shards/train-*.tar`)",
        "40 steps",
        "10 minutes",
        "went on from the bundled engraving model",
        "image-captioning, etching]",
    ):
        assert said in card
    assert "none held out" in model_card(from_dict({"start": "me/mine"}), RECORD) and "went on from me/mine" in model_card(
        from_dict({"start": "me/mine"}), RECORD
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "on the data above and nothing else"), ({"start": "bundled"}, "before on that of the bundled engraving model"),
     ({"start": "me/mine"}, "before on that of me/mine"),
     ({"generator": {"pretrained": "a/lm"}}, "before on that of a/lm")],
)  # fmt: skip
def test_it_does_not_hide_what_was_learnt_before(settings, said):
    """A model that went on from another was said to know its own data and nothing else."""
    card = model_card(from_dict(settings), RECORD)
    assert said in card and ("as it was" in card) == ("start" in settings)


def test_a_model_trained_further_does_not_show_its_starts_figures_as_its_own():
    """They came first in its card, and its own figure of the same name was not told."""
    base = "# Ships\n\n## Data\n\n9 ships.\n\n```bash\n# a comment\n```\n\n| figure | value |\n| --- | --- |\n| PSNR | 16.9 dB |\n"
    config = from_dict({"start": "runs/ships", "out": "runs/better", "card": {"license": "mit"}})
    card = changed_card(
        config, base, about="Learned from preferences.", own="## Figures\n\n| figure | value |\n| --- | --- |\n| PSNR | 17 dB |"
    )
    assert title(card) == "better" and figures(card) == {"PSNR": "17 dB"} and yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "This is **Ships**, trained further. Learned from preferences." in card
    assert "\n### Data\n" in card.partition("## The base: Ships")[2] and "\n# a comment\n" in card
    assert figures(base.rstrip() + "\n\n## Merged adapter\n\nmine: LoRA\n") == {}, "written by an earlier version"

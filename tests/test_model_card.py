"""A model card says what is true of that model: no licence that nobody chose, what was trained on what, from which start."""

import pytest

from tokun.config import from_dict
from tokun.inference.model_card import model_card

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
    [({}, "on the data above and nothing else"), ({"start": "bundled"}, "before on that of the bundled engraving model"), ({"start": "me/mine"}, "before on that of me/mine"),
     ({"generator": {"pretrained": "a/lm"}}, "before on that of a/lm")],
)  # fmt: skip
def test_it_does_not_hide_what_was_learnt_before(settings, said):
    """A model that went on from another was said to know its own data and nothing else."""
    card = model_card(from_dict(settings), RECORD)
    assert said in card and ("as it was" in card) == ("start" in settings)

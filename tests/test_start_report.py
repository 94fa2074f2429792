"""What a run says when it begins: captions that say nothing, the tags that a start knows, whether its tokenizer can draw the pictures.

And how long is sensible."""

import io
import json

import pytest
import torch
from PIL import Image

from tests.small_runs import write_config
from tokun.config import ImageTokenizerTrainConfig, load_config
from tokun.data import ShardIndex, captions, shards, write_shard
from tokun.inference import folders
from tokun.tokenizers.wordings import fitting_tag
from tokun.training import image_shapes, start_report
from tokun.training.image_tokenizer import train_image_tokenizer
from tokun.training.run import open_run
from tokun.training.tracking import NullTracker


def picture(seed):
    buffer = io.BytesIO()
    Image.effect_noise((48, 48), 20 + seed).save(buffer, "PNG")
    return buffer.getvalue()


def record(caption="", source=None, **more):
    """A sample's JSON; with a source, the caption stands in a register, as `data_tools.caption` writes it."""
    if source is None:
        return {"caption": caption, **more}
    return {"caption": "", "captions": {"plain": caption}, "caption_sources": {"plain": {"source": source}}, **more}


def doubts(records: list[dict], **options) -> list[str]:
    seen = captions.Seen()
    for one in records:
        seen.add(one)
    return seen.doubts(**options)


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([record()] * 30, ["None of the 30 pictures has a caption"]),
        ([record(f"A ship with {i} masts.") for i in range(10)] + [record()] * 30,
         ["Only 10 of 40 pictures have a caption", "10 pictures with captions are few"]),
        ([record("An engraving.", "template")] * 98,
         ["All 98 captions are templates", "The 98 captions are only 1 different text:", "98 pictures"]),
        ([record("An engraving.")] * 2000, ["The 2,000 captions are only 1 different text:"]),
        ([record(f"A ship with {i} masts.", "template") for i in range(2000)], ["All 2,000 captions are templates"]),
        ([record(f"A ship with {i} masts.", "model") for i in range(2000)], []),
        ([record(f"A ship with {i} masts.", captions={"alt": "An engraving."}, caption_sources={"alt": {"source": "template"}})
          for i in range(2000)], []),
    ],
)  # fmt: skip
def test_captions_that_say_nothing_are_told_with_what_to_do(records, told):
    found = doubts(records)
    assert len(found) == len(told) and all(one.startswith(start) or start in one for one, start in zip(found, told))
    assert all("tokun caption" in one or "start=bundled" in one for one in found)


@pytest.mark.parametrize(
    "odd", [{}, {"caption": None}, {"caption": 7}, {"captions": "A ship."}, {"caption_sources": []}, {"captions": {"plain": None}}]
)
def test_odd_records_are_pictures_without_a_caption(odd):
    assert doubts([odd])[0].startswith("None of the 1 pictures")


def test_few_are_enough_to_train_on_from_a_checkpoint():
    assert doubts([record(f"A ship with {i} masts.") for i in range(163)], from_nothing=False) == []


def test_the_shards_themselves_are_read_and_broken_records_are_passed_over(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [{"__key__": f"{i}", "json": b"{" if i == 3 else json.dumps(record("An engraving.")).encode()} for i in range(60)],
    )
    said = []
    captions.tell(said.append, ShardIndex([tmp_path / "a.tar"]), caption_key="caption", from_nothing=False)
    assert said == [f"captions: WARNING: {captions.alike({'kept': 59, 'distinct': 1})}"]


def told_of(path, records, monkeypatch, *, most_read, from_nothing=True):
    monkeypatch.setattr(shards, "MOST_READ", most_read)
    write_shard(
        path,
        ({"__key__": f"{i:04d}", "json": one if isinstance(one, bytes) else json.dumps(one).encode()} for i, one in enumerate(records)),
    )
    said = []
    captions.tell(said.append, ShardIndex([path]), caption_key="caption", from_nothing=from_nothing)
    return said


def test_a_sample_of_very_many_records_is_told_as_a_sample(tmp_path, monkeypatch):
    different = [record(f"A ship with {i} masts.") for i in range(1500)]
    assert told_of(tmp_path / "a.tar", different, monkeypatch, most_read=100) == [], "1,500 are not few"
    (few,) = told_of(tmp_path / "b.tar", different[:600], monkeypatch, most_read=100)
    assert "600 pictures with captions are few" in few
    (templates,) = told_of(
        tmp_path / "c.tar", [record(f"A ship with {i} masts.", "template") for i in range(1500)], monkeypatch, most_read=100
    )
    assert "All 100 captions that were read (100 of 1,500 samples) are templates" in templates
    (none,) = told_of(tmp_path / "d.tar", [record()] * 300, monkeypatch, most_read=100)
    assert "None of the 100 pictures that were read (100 of 300 samples) has a caption" in none


def test_records_that_are_all_broken_are_told_as_that(tmp_path, monkeypatch):
    (said,) = told_of(tmp_path / "a.tar", [b"{"] * 3, monkeypatch, most_read=100)
    assert "None of the 3 records can be read" in said


def test_a_broken_record_is_of_the_sample_but_not_captioned(tmp_path, monkeypatch):
    """Half of 1,500 are captioned: 750, which are few."""
    records = [b"{" if i % 30 == 0 else record(f"A ship with {i} masts.") for i in range(1500)]
    (said,) = told_of(tmp_path / "a.tar", records, monkeypatch, most_read=100)
    assert "750 pictures with captions are few" in said


KNOWN = ("copper-engraving", "engraving", "etching", "wood-engraving")


@pytest.mark.parametrize(
    ("word", "fits"),
    [("engraving", "engraving"), ("engravings", "engraving"), ("etchings", "etching"), ("steel-engraving", "engraving"),
     ("wood-engravings", "wood-engraving"),
     ("old-copper-engravings", "copper-engraving"), ("prints", ""), ("", ""), ("grass", ""), ("engraving-after-a-drawing", "")],
)  # fmt: skip
def test_the_fitting_tag_is_the_known_one_that_the_word_means(word, fits):
    assert fitting_tag(word, KNOWN) == fits


def test_the_bundle_names_its_styles_and_what_becomes_of_the_pictures_own(tmp_path):
    shards = tmp_path / "shards"
    samples = [
        {"__key__": f"{i}", "png": picture(i), "json": json.dumps(record("A ship.", style=style)).encode()}
        for i, style in enumerate(["engravings"] * 3 + ["prints", ""])
    ]
    write_shard(shards / "train-00000.tar", samples)
    config = load_config(write_config(tmp_path, shards), ["start=bundled"])
    line = start_report.tags_line(config)
    assert "wood-engraving" in line.partition(". Of these")[0]
    for part in ("engravings (3) becomes its engraving", "prints (1) is new and will be learned", "1 pictures have no style (data.style="):
        assert part in line
    assert [start_report.style_of({"style": style}, config) for style in ("engravings", "prints", "Wood Engraving", "")] == [
        "engraving",
        "prints",
        "wood-engraving",
        "",
    ]
    config.start = ""
    assert start_report.style_of({"style": "engravings"}, config) == "engravings", "where nothing is gone on from, a tag stays as it is"


def test_the_verdict_gives_figures_and_where_the_sheet_lies(tmp_path):
    train = ImageTokenizerTrainConfig(min_psnr=12.0)
    for psnr, problems, said in (
        (17.6, [], "can draw"),
        (13.0, [], "roughly"),
        (9.0, ["PSNR is 9.0 dB"], "cannot draw these pictures (PSNR is 9.0 dB)"),
    ):
        line = start_report.verdict({"psnr": psnr, "usage": 0.9}, train, tmp_path / "reconstructions.png", problems, pictures=40)
        assert said in line and str(tmp_path / "reconstructions.png") in line and (problems or f"{psnr:.1f} dB, 90% of its codes" in line)


def test_a_verdict_on_a_handful_of_pictures_says_so(tmp_path):
    train = ImageTokenizerTrainConfig(min_psnr=12.0)
    said = [start_report.verdict({"psnr": 17.6, "usage": 0.9}, train, tmp_path, [], pictures=n) for n in (1, 16)]
    assert "only 1 picture: too few to judge" in said[0] and "; 16 pictures)" in said[1]


def test_where_few_pictures_are_held_out_the_tokenizer_of_a_start_is_judged_by_training_pictures_too(tmp_path):
    """A verdict was drawn from the one picture that was held out."""
    for name, count in (("train", 100), ("val", 1)):
        write_shard(tmp_path / f"{name}-0.tar", [{"__key__": f"{i}", "png": picture(i), "json": b"{}"} for i in range(count)])
    config = load_config(write_config(tmp_path, tmp_path))
    assert [sum(map(len, pictures(config))) for pictures in (image_shapes.held_out_pictures, image_shapes.unseen_pictures)] == [1, 64]
    config.data.val = ""
    assert sum(map(len, image_shapes.unseen_pictures(config))) == 100


def painted(seed: int, mode: str) -> bytes:
    """Noise in three colours, as on yellowed paper, or in grey."""
    grey = Image.effect_noise((48, 48), 60 + seed)
    bands = {
        "colour": [Image.effect_noise((48, 48), 60 + seed + band) for band in range(3)],
        "yellowed": [grey, grey.point(lambda x: int(x * 0.9)), grey.point(lambda x: int(x * 0.7))],
    }
    buffer = io.BytesIO()
    (grey if mode == "grey" else Image.merge("RGB", bands[mode])).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("modes", "overrides", "told"),
    [
        (["colour"], [],
         "64 of 64 pictures that were looked at are in colour, and will be drawn in grey: image_tokenizer.image_channels=3 keeps the "
         "colour"),
        (["colour", "grey"], [], "32 of 64 pictures"),
        (["colour"], ["start=bundled"],
         "image_tokenizer.image_channels=3 keeps the colour, without start=bundled, whose tokenizer is grey"),
        (["colour"], ["image_tokenizer.image_channels=3"], ""),
        (["colour"] + ["yellowed"] * 7, [], ""),
        (["yellowed"], [], ""),
        (["grey"], [], ""),
    ],
)  # fmt: skip
def test_colour_that_will_be_lost_is_told_with_the_setting_that_keeps_it(tmp_path, modes, overrides, told):
    """Paintings were learned in grey, and nothing said so."""
    samples = [{"__key__": f"{i:03d}", "png": painted(i, modes[(i // 2) % len(modes)]), "json": b"{}"} for i in range(128)]
    write_shard(tmp_path / "train-0.tar", samples)
    config = load_config(write_config(tmp_path, tmp_path), overrides)
    line = start_report.colour_line(config, ShardIndex([tmp_path / "train-0.tar"], need=(), one_of=shards.IMAGE_SUFFIXES))
    assert told in line if told else line == ""


def test_the_image_tokenizers_training_begins_with_that_line(tmp_path, capfd):
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}-0.tar", [{"__key__": f"{i}", "png": painted(i, "colour"), "json": b"{}"} for i in range(9)])
    config = load_config(write_config(tmp_path, tmp_path), ["image_tokenizer_train.steps=2"])
    train_image_tokenizer(open_run(config))
    said = capfd.readouterr().out
    assert said.count("9 of 9 pictures that were looked at are in colour") == 1


@pytest.mark.parametrize(
    ("records", "override", "told"),
    [
        ({"style": "etching"}, "data.style_key=technique",
         "data.style_key is technique, which is in no record of {train}: the style of each picture is taken instead, as with "
         "data.style_key=style"),
        ({}, "data.style_key=technique", "no record has a style: no style will be learned. data.style=WORD gives all pictures one"),
        ({"technique": "etching", "style": "prints"}, "data.style_key=technique", ""),
        ({}, "data.style_key=style", ""),
    ],
)  # fmt: skip
def test_a_style_key_that_no_record_has_is_told_with_what_is_taken_instead(tmp_path, records, override, told):
    write_shard(
        tmp_path / "train-0.tar",
        [{"__key__": f"{i}", "png": b"", "json": json.dumps(record("A ship.", **records)).encode()} for i in range(9)],
    )
    config = load_config(write_config(tmp_path, tmp_path), [override, "data.style="])
    line = start_report.style_key_line(config)
    assert told.format(train=config.data.train) in line if told else line == ""


def test_a_start_that_is_misspelt_is_told_the_nearest_and_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ships" / "checkpoint").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"'bundeled' \(did you mean bundled\?\).*Known here: bundled, runs/ships$"):
        folders.resolve("bundeled")
    assert folders.resolve("bundled") == folders.resolve(None)


def test_the_time_is_told_in_passes_and_what_max_minutes_counts():
    line = start_report.time_line(steps=20_000, batch_size=32, pictures=163, max_minutes=45, going_on=True, name="train")
    assert "3,926 passes over 163 pictures; about 8 passes (train.steps=41) are sensible; more would memorise them" in line
    assert "train.max_minutes 45 counts this stage alone" in line
    line = start_report.time_line(steps=20_000, batch_size=32, pictures=163, max_minutes=0, going_on=True, name="train", adapter=True)
    assert "about 20 passes (train.steps=102) are sensible" in line
    line = start_report.time_line(steps=84, batch_size=16, pictures=67, max_minutes=10, going_on=True, name="train", by_passes=True)
    assert line.startswith("84 steps of 16 are 20 passes over 67 pictures (train.passes). ")
    line = start_report.time_line(steps=16_000, batch_size=128, pictures=38_000, max_minutes=0, going_on=False, name="train")
    assert "are 54 passes over 38,000 pictures; about 30 passes (train.steps=8907) are sensible; more would memorise them" in line
    assert "max_minutes is not set" in start_report.time_line(
        steps=10, batch_size=4, pictures=163, max_minutes=0, going_on=False, name="train"
    )


@pytest.mark.parametrize(
    ("n", "told"),
    [
        (0, ""), (1, "1 held-out picture is few"), (3, "3 held-out pictures are few: differences of their loss under 0.08 nats are noise"),
        (start_report.ENOUGH_HELD_OUT - 1, f"({start_report.ENOUGH_HELD_OUT} or more tell steps apart)"),
        (start_report.ENOUGH_HELD_OUT, ""),
    ],
)  # fmt: skip
def test_a_held_out_set_that_cannot_tell_steps_apart_is_told_with_how_many_would(n, told):
    line = start_report.too_few_held_out(n)
    assert told in line and bool(line) == bool(told) and "\n" not in line
    assert start_report.too_few_held_out(n, "rows").startswith(f"{n} held-out row") == bool(told)


@pytest.mark.parametrize(
    ("before", "last", "lowest", "told"),
    [
        (6.0, 6.06, None,
         ["WARNING: the held-out loss (image + text) was 6.0000 before training and is 6.0600 now (image + text): "
          "so training has not helped on these pictures"]),
        (6.0, 6.04, None, ["a difference within the noise (0.05 nats): held-out pictures do not show yet that it has learned"]),
        (6.0, 5.96, None, ["a difference within the noise (0.05 nats)"]),
        (6.0, 5.94, (5.93, 20),
         ["is 5.9400 now, a fall by more than the noise (0.05 nats)",
          "no earlier step's held-out loss is lower than the last, 5.9400 (image + text), by more"]),
        (6.0, 5.94, (5.88, 20),
         ["a fall by more than the noise",
          "lowest held-out loss 5.8800 at step 20 (image + text), below the end's 5.9400. To sample from it instead:"]),
        (None, 5.94, (6.1, 20), ["no earlier step's held-out loss is lower than the last, 5.9400"]), (None, 5.94, None, []),
    ],
)  # fmt: skip
def test_the_end_of_a_training_says_what_the_losses_tell_beyond_their_noise_and_no_more(before, last, lowest, told):
    """It called a step the lowest that was above the end, and a difference within the noise a gain or a failure."""
    lines = start_report.gain_lines(before, last, 0.05, lowest, sums=" (image + text)")
    assert len(lines) == len(told) and all(
        words.replace(" now (image + text)", " now") in line for words, line in zip(told, lines, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], "First comes the text tokenizer, then the image tokenizer, the pictures' codes and the generator"),
        (["start=bundled"], "First the tokenizers of bundled are tried on these pictures, then come the pictures' codes and the generator"),
        (["start=bundled", "adapter.rank=2"], "are tried on these pictures, then come the pictures' codes and an adapter"),
        (["start=bundled", "adapter.rank=2", "dpo.pairs=a.jsonl"], "There is one stage: an adapter learns from preferences"),
        (["start=bundled", "words.train=a.jsonl"], "There is one stage: the generator learns from a table of words"),
    ],
)
def test_the_opening_line_names_the_folder_and_the_stages(changes, told, tmp_path):
    config = load_config(write_config(tmp_path, tmp_path), changes)
    assert start_report.opening_line(config, going_on=False).startswith(f"train: the run's folder is {config.out}. ")
    assert start_report.opening_line(config, going_on=False).endswith(told)


def test_a_run_begins_with_its_folder_and_what_comes_first_and_tracking_is_told_after(small_shards, tmp_path, monkeypatch, capsys):
    def tracker(*_, **__):
        print("W&B offline")
        return NullTracker()

    monkeypatch.setattr("tokun.training.run.make_tracker", tracker)
    begun = ". First comes the text tokenizer, then the image tokenizer, the pictures' codes and the generator"
    for told in (begun, "; it continues an earlier start"):
        run = open_run(load_config(write_config(tmp_path, small_shards)))
        run.close()
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert (first, second) == (f"train: the run's folder is {tmp_path / 'run'}{told}", "W&B offline")


def test_an_optimizer_that_this_torch_lacks_is_told_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    config = load_config(write_config(tmp_path, tmp_path / "shards"), ["train.optimizer=muon"])
    with pytest.raises(ValueError, match=r"muon needs torch 2\.9 or newer.*update torch, or set train\.optimizer=adamw"):
        open_run(config)
    assert not (tmp_path / "run").exists()


def test_held_out_shards_that_are_not_there_are_told_before_the_first_stage(small_shards, tmp_path):
    """The pattern of an example config, left as it was: told behind the first stage, or behind an hour of it."""
    config = load_config(write_config(tmp_path, small_shards), ["data.val=nowhere/val-*.tar"])
    with pytest.raises(FileNotFoundError, match=r"nowhere/val-.*data\.val"):
        open_run(config)
    assert not (tmp_path / "run").exists()


def test_training_shards_that_are_not_there_are_told_before_anything_is_made_and_how_to_make_them(tmp_path):
    config = load_config(write_config(tmp_path, tmp_path / "shards"), ["data.train=nowhere/train-*.tar", "data.val="])
    with pytest.raises(FileNotFoundError, match=r"nowhere/train-.*python -m data_tools\.prepare"):
        open_run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "told"), [("Bottle: Arkansas {}", True), ("A bottle with a long neck {}", False)])
def test_captions_that_are_titles_are_told(words, told):
    seen = captions.Seen()
    for number in range(40):
        seen.add({"caption": words.format(number)})
    doubts = " ".join(seen.doubts(from_nothing=False))
    assert ("40 of the 40 captions have fewer than 4 words" in doubts) == told and bool(doubts) == told

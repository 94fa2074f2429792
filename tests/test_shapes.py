"""Promises for pictures of several shapes and for things: one seed, one pair, whatever its grid and its company."""

import copy
import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fixtures import random_generator
from tests.test_sampling import slow_generate
from tests.test_serving import vllm  # noqa: F401
from tokun import data
from tokun.app import demo
from tokun.cli import sample
from tokun.data import cropping
from tokun.inference import bulk, conditional_generation, decoder, image_to_codes, latents, native, sampling
from tokun.inference.load import load
from tokun.inference.model import Tokun
from tokun.inference.token_choice import Choice, Constraints, DecodingSettings
from tokun.render import svg
from tokun.serving import __main__ as serving
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags


def tokens(pairs):
    return [(p.seed, p.index, p.tags, p.codes, p.caption_ids, p.caption) for p in pairs]


def pixels(grid):
    return grid[1] * 8, grid[0] * 8


def prompt(v, grid):
    return [*sequences.prefix(v, Tags("etching", thing="moth", grid=grid)), v.id("<boi>")]


def made(model, grids, u, **options):
    v = model.vocabulary
    guided = {
        "unconditional_image": torch.tensor([[*sequences.prefix(v, v.bare(grid)), v.id("<boi>")] for grid in grids]),
        "unconditional_text": torch.tensor([prompt(v, grid)[:-1] for grid in grids]),
    }
    prompts = torch.tensor([prompt(v, grid) for grid in grids])
    rules = sampling.Rules(v, model.slots, DecodingSettings(**options), Constraints((v.id("<boq>"),)))
    return sampling.generate(model.generator, rules, prompts, u, **guided)


# --- one seed, one pair -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "options"),
    [(3, {}), (3, {"guidance_scale": 2.0}), (3, {"text_guidance_scale": 2.0, "no_repeats": True}), (5, {"prompt": "two ships"})],
    ids=str,
)
def test_same_seed_same_pair_for_any_batch_size_and_shape(shaped_model, seed, options):
    whole = shaped_model.sample(seed, n=16, **options)
    assert len({p.tags.grid for p in whole}) >= 4 and len({len(p.codes) for p in whole}) == 3
    for batch_size in (1, 5, 100):
        pairs = shaped_model.sample(seed, n=16, batch_size=batch_size, **options)
        assert tokens(pairs) == tokens(whole) and all(a.image.tobytes() == b.image.tobytes() for a, b in zip(pairs, whole))
        if "text_guidance_scale" in options:  # guidance reads the words without their pictures, row by row
            assert [p.pmi for p in pairs] == [p.pmi for p in whole]
    assert tokens(shaped_model.sample(seed, indices=[11, 2], **options)) == tokens([whole[11], whole[2]])


def test_an_svg_has_the_shape_of_its_pair(shaped_model):
    pairs = shaped_model.sample(4, n=12)
    assert len({pair.image.size for pair in pairs}) >= 4
    for pair in pairs:
        text = svg.to_svg(pair.image, 10_000)
        width, height = pixels(pair.tags.grid)
        assert len(text.encode()) <= 10_000 and f'width="{width}"' in text[:200] and f'height="{height}"' in text[:200]


def test_a_picture_is_as_large_as_its_grid_and_its_record_says_so(shaped_model):
    for pair in shaped_model.sample(4, n=12):
        rows, columns = pair.tags.grid
        assert len(pair.codes) == rows * columns and pair.image.size == pixels(pair.tags.grid)
        record = json.loads(json.dumps(pair.record()))
        assert record["tags"]["grid"] == [rows, columns] and record["tags"].get("thing", "") == pair.tags.thing
        alone = shaped_model.image_tokenizer.decode(torch.tensor([pair.codes]), pair.tags.grid)[0]
        assert np.abs(np.asarray(pair.image, int) - np.rint((alone[0].numpy() + 1) * 127.5)).max() <= 1


@pytest.mark.parametrize(("scale", "text_scale"), [(1.0, 1.0), (2.5, 2.0)])
@pytest.mark.parametrize("compiled", [True, False])
def test_rows_of_several_shapes_come_out_as_each_does_without_a_cache(shaped_model, scale, text_scale, compiled):
    """In one call; by the C++ program and without it."""
    if compiled and not native.is_there():
        pytest.skip("there is no C++ compiler")
    v, grids = shaped_model.vocabulary, [(4, 4), (3, 5), (2, 6), (2, 8), (5, 3), (4, 4)]
    model = replace(shaped_model, generator=copy.deepcopy(shaped_model.generator)).compile(compiled)
    u = latents.uniform(latents.draw(8, range(len(grids)), model.slots.size))
    image, text = Choice(0.9, 20), Choice(0.7)
    out = made(model, grids, u, image=image, text=text, guidance_scale=scale, text_guidance_scale=text_scale)
    for row, grid in enumerate(grids):
        bare = [*sequences.prefix(v, v.bare(grid)), v.id("<boi>")]
        slow = slow_generate(model, prompt(v, grid), u[row], image, text, scale, bare, text_scale)
        assert out.ids[row, : len(slow)].tolist() == slow and (out.ids[row, len(slow) :] == v.id("<pad>")).all()
        assert len(sequences.unpack(v, slow).codes) == grid[0] * grid[1]


def test_a_rows_likelihoods_are_the_same_bits_whatever_shapes_stand_beside_it(shaped_model):
    grids = [(4, 4), (3, 5), (2, 6), (2, 8), (5, 3), (3, 5), (2, 8)]
    u = latents.uniform(latents.draw(8, range(len(grids)), shaped_model.slots.size))
    whole = made(shaped_model, grids, u)
    for row in range(len(grids)):
        alone = made(shaped_model, grids[row : row + 1], u[row : row + 1])
        assert alone.ids[0].tolist() == whole.ids[row, : alone.ids.shape[1]].tolist()
        assert alone.image_nll[0] == whole.image_nll[row] and alone.text_nll[0] == whole.text_nll[row]
    back = made(shaped_model, grids[::-1], u.flip(0))
    assert torch.equal(back.ids.flip(0), whole.ids) and torch.equal(back.text_nll.flip(0), whole.text_nll)


def test_compiled_shapes_are_the_plain_ones(shaped_model):
    if not native.is_there():
        pytest.skip("there is no C++ compiler")
    plain = replace(shaped_model, generator=copy.deepcopy(shaped_model.generator)).compile(False)
    assert decoder.is_compiled(shaped_model.generator) and not decoder.is_compiled(plain.generator)
    one, other = shaped_model.sample(5, n=16), plain.sample(5, n=16)
    assert sum(a == b for a, b in zip(tokens(one), tokens(other))) >= 15


def test_a_watcher_sees_the_first_sample_whatever_its_shape(shaped_model):
    for seed in range(4):
        seen = []
        pair = shaped_model.sample(seed, 5, watch=lambda codes, words, seen=seen: seen.append((codes, words)))[0]
        assert max((codes for codes, _ in seen), key=len) == pair.codes and len(seen) >= len(pair.codes)


def test_a_forced_picture_of_any_shape_is_inverted_and_its_likelihood_is_its_score(shaped_model):
    for size, grid in (((32, 32), (4, 4)), ((64, 16), (2, 8)), ((24, 40), (5, 3)), ((48, 16), (2, 6))):
        picture = Image.effect_noise(size, 90)
        found = shaped_model.invert(picture, "a ship", seed=2)
        assert found.tags.grid == grid and found.missed == 0
        (pair,) = shaped_model.vary(found, 0, n=1)
        assert pair.codes == found.codes and pair.caption == "a ship" and pair.image.size == pixels(grid)
        score = shaped_model.score(picture, "a ship", **{k: getattr(found.tags, k) for k in ("style", "subject", "thing", "register")})
        assert pair.image_nll == pytest.approx(score.image_nll, abs=1e-2) and pair.pmi == pytest.approx(score.pmi, abs=1e-2)
        assert (
            {p.tags.grid for p in shaped_model.vary(found, 0.4, n=2)}
            == {p.tags.grid for p in shaped_model.complete(picture, "left", n=2, candidates=2)}
            == {grid}
        )


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_thing_and_a_shape_are_drawn_as_asked(shaped_model):
    moths = shaped_model.sample(1, n=6, thing="Moth ", aspect="2x6")
    assert {(p.tags.thing, p.tags.subject, p.tags.grid, p.image.size) for p in moths} == {("moth", "shapes", (2, 6), (48, 16))}
    assert {p.tags.grid for p in shaped_model.sample(1, n=3, aspect="tall")} == {(5, 3)}
    best = shaped_model.best_of(1, 2, 2, thing="tree", aspect="16:10")
    assert {(p.tags.thing, p.tags.grid) for p in best} == {("tree", (3, 5))}
    assert {p.tags.grid for p in shaped_model.interpolate(1, 2, 3, aspect="square")} == {(4, 4)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"thing": "mouth"}, "thing can be: house, moth, tree"),
        ({"aspect": "9x9"}, "4x4, 2x8"),
        ({"aspect": 2}, "give a str"),
        ({"thing": 3}, "3 is not a tag"),
    ],
)
def test_a_thing_or_shape_that_there_is_not_is_refused(shaped_model, options, words):
    for call in (
        shaped_model.sample,
        lambda **asked: shaped_model.best_of(1, 1, 2, **asked),
        lambda **asked: shaped_model.interpolate(1, 2, **asked),
    ):
        with pytest.raises(ValueError, match=words):
            call(**options)


def test_the_unguided_prompt_keeps_the_grid(shaped_model, monkeypatch):
    asked = []
    inner = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda *args, **named: asked.append(named) or inner(*args, **named))
    v, pairs = shaped_model.vocabulary, shaped_model.sample(3, n=8, guidance_scale=2.0, text_guidance_scale=2.0)
    shapes = {v.id(f"<grid:{rows}x{columns}>") for rows, columns in (p.tags.grid for p in pairs)}
    bare = [row for named in asked for row in named["unconditional_image"].tolist()]
    assert all(row[0] == v.id("<bos>") and row[2] == v.id("<boi>") and len(row) == 3 for row in bare) and {row[1] for row in bare} == shapes
    assert {row[-1] for named in asked for row in named["unconditional_text"].tolist()} == shapes


def test_with_one_grid_prompts_without_tags_name_none(tiny_model, monkeypatch):
    one = replace(tiny_model, vocabulary=replace(tiny_model.vocabulary, grids=((4, 4),)))
    asked = []
    inner = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda *args, **named: asked.append(named) or inner(*args, **named))
    one.sample(3, n=2, guidance_scale=2.0)
    v = one.vocabulary
    assert [row for named in asked for row in named["unconditional_image"].tolist()] == [[v.id("<bos>"), v.id("<boi>")]] * 2


# --- what a checkpoint was not trained on -----------------------------------------------------------------------------


def test_a_register_that_was_not_trained_is_refused_in_every_direction(shaped_model, shaped_folder, tmp_path):
    picture, named = Image.new("L", (32, 32)), r"<register:poetic> is not in this vocabulary; register can be: plain, era"
    able = replace(shaped_model, tasks=("joint", "text_to_image", "question", "rewrite"))
    inverted = "a ship"
    for call in (
        lambda: able.sample(1, 1, register="poetic"), lambda: able.best_of(1, 1, 2, register="poetic"),
        lambda: able.interpolate(1, 2, register="poetic"),
        lambda: able.caption(picture, ["plain", "poetic"]), lambda: able.rewrite("a ship", "poetic"),
        lambda: able.score(picture, "a ship", register="poetic"),
        lambda: able.invert(picture, inverted, register="poetic"), lambda: able.complete(picture, "top", register="poetic"),
        lambda: bulk.generate(able, 1, 2, tmp_path / "many", {"register": "poetic"}),
        lambda: sample.main(["--checkpoint", str(shaped_folder), "--out", str(tmp_path), "--register", "poetic"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            call()
    studio = demo.Studio(able)
    assert studio.known[studio.usual].registers == ("plain", "era")
    for call in (lambda: list(studio.draw(1, 1, register="poetic")), lambda: studio.say(picture, ["poetic"])):
        with pytest.raises(ValueError, match="does not know that register; it knows plain, era"):
            call()


def test_a_task_that_was_not_trained_is_refused_in_every_direction(shaped_model, shaped_folder, tmp_path):
    picture = Image.new("L", (32, 32))
    common = ["--checkpoint", str(shaped_folder), "--out", str(tmp_path)]
    picture.save(tmp_path / "plate.png")
    (drawer, teller), plate = (replace(shaped_model, tasks=(task,)) for task in ("text_to_image", "joint")), str(tmp_path / "plate.png")
    for call, task in (
        (lambda: shaped_model.ask(picture, "what is shown?"), "question"), (lambda: shaped_model.rewrite("a ship", "era"), "rewrite"),
        (lambda: sample.main([*common, "--image", plate, "--question", "what?"]), "question"),
        (lambda: sample.main([*common, "--rewrite", "a ship"]), "rewrite"),
        (lambda: teller.sample(1, 1, prompt="a ship"), "text_to_image"),
        (lambda: teller.best_of(1, 1, 2, prompt="a ship"), "text_to_image"),
        (lambda: list(demo.Studio(teller).draw(1, 1, prompt="a ship")), "text_to_image"),
        (lambda: bulk.generate(teller, 1, 2, tmp_path / "many", {"prompt": "a"}), "text_to_image"),
        (lambda: drawer.caption(picture), "joint"), (lambda: drawer.score(picture, "a ship"), "joint"),
        (lambda: drawer.invert(picture, "a ship"), "joint"),
        (lambda: drawer.complete(picture, "top"), "joint"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"was not trained on the task '{task}', only on"):
            call()
    with pytest.raises(ValueError, match="not trained on questions"):
        demo.Studio(shaped_model).answer(picture, "what is shown?")


# --- pictures in ------------------------------------------------------------------------------------------------------


def test_a_pictures_own_grid_goes_into_the_prompt(shaped_model, monkeypatch):
    asked = []
    inner = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda *args, **named: asked.append(args[2]) or inner(*args, **named))
    v, able, wide = shaped_model.vocabulary, replace(shaped_model, tasks=()), Image.effect_noise((160, 40), 90)
    (said,), (answer,) = able.caption(wide), able.ask(wide, "what?")
    assert all(v.id("<grid:2x8>") in prompts[0].tolist() for prompts in asked) and answer.text
    codes, grid = image_to_codes.encode_whole(able, wide)
    assert grid == (2, 8) and len(codes) == 16
    tags = [Tags(register="plain", grid=grid)]
    assert said.nll == pytest.approx(able.caption_nll(tags, [said.ids], [codes])[0], abs=1e-3)
    score = able.score(wide, "a ship")
    assert score.image_nll == pytest.approx(able.image_nll(tags, [codes])[0], abs=1e-3)
    (other,) = able.rewrite("a ship", "era")
    assert other.text and sequences.prefix(v, v.bare()) == asked[-1][0, :2].tolist(), "a sequence names its grid where there are several"


def test_a_model_of_squares_codes_a_picture_as_it_always_did(tiny_model):
    """Also one whose checkpoint does not say how its pictures were fitted: the centred square."""
    old = replace(tiny_model, vocabulary=replace(tiny_model.vocabulary, grids=((4, 4),)), fit="")
    assert old.fit == "crop" and tiny_model.fit == "auto"
    for size in ((53, 47), (200, 40), (30, 90)):
        picture = blank_with_a_thing(size)
        crop = data.crop(picture, data.centre_box(*picture.size), 32)
        expected = old.image_tokenizer.encode(data.to_float(np.array(crop)[None]), rows=16)
        assert image_to_codes.see(old, [picture], (4, 4))[0].codes == expected[0].tolist()
        assert image_to_codes.encode_whole(old, picture) == (expected[0].tolist(), (4, 4))


def blank_with_a_thing(size) -> Image.Image:
    """A thing on white paper, which "auto" keeps whole."""
    page = Image.new("L", size, 255)
    page.paste(Image.effect_noise((size[0] * 3 // 4, size[1] * 3 // 4), 90), (size[0] // 8, size[1] // 8))
    return page


@pytest.mark.parametrize("fit", cropping.FITS)
def test_a_picture_is_framed_as_training_framed_it_in_every_direction(shaped_model, fit, monkeypatch, tmp_path):
    """What reaches the image tokenizer is what `cropping.frame` makes, with the fit that the checkpoint keeps."""
    model = replace(shaped_model, tasks=(), fit=fit)
    model.save(tmp_path)
    model = load(tmp_path, device="cpu", compile=False)
    picture, seen = blank_with_a_thing((100, 58)), []
    grid = model.grids[cropping.nearest_grid(*picture.size, model.grids)]
    expected = data.to_float(np.array(cropping.frame(picture, grid, 8, fit)[0]))
    inner = type(model.image_tokenizer).encode
    monkeypatch.setattr(type(model.image_tokenizer), "encode", lambda self, pixels, **o: seen.append(pixels) or inner(self, pixels, **o))
    model.caption(picture), model.ask(picture, "what?"), model.score(picture, "a ship"), model.complete(picture, "top", n=1, candidates=1)
    model.vary(model.invert(picture, "a ship"), 0.5, n=1)
    (
        demo.Studio(model).say(picture, ["plain"]),
        demo.Studio(model).vary(picture, "", 0.5, 1),
        demo.Studio(model).complete(picture, "left", 1),
    )
    assert len(seen) == 9 and all(torch.equal(pixels, expected[None]) for pixels in seen)


def test_the_fit_of_training_reaches_the_checkpoint(shaped_model, shaped_folder, tmp_path):
    settings = json.loads((shaped_folder / "sampling.json").read_text())
    assert settings["fit"] == "auto" == load(shaped_folder, device="cpu", compile=False).fit
    old = shutil.copytree(shaped_folder, tmp_path / "old")
    for fit, found in ((None, "auto"), ("pad", "pad")):
        (old / "sampling.json").write_text(
            json.dumps({**{k: v for k, v in settings.items() if k != "fit"}, **({"fit": fit} if fit else {})})
        )
        assert load(old, device="cpu", compile=False).fit == found
    (old / "sampling.json").write_text(json.dumps({**settings, "fit": "stretch"}))
    with pytest.raises(ValueError, match="fit is 'stretch', not one of auto, pad, crop"):
        load(old, device="cpu")


def test_mixed_codes_are_decoded_each_to_its_shape(shaped_model):
    codes, grids = [list(range(16)), list(range(12)), list(range(16)), list(range(15))], [(2, 8), (2, 6), (4, 4), (5, 3)]
    pictures = shaped_model.decode_images(codes, grids)
    assert [picture.size for picture in pictures] == [pixels(grid) for grid in grids] and shaped_model.grids[0] == (4, 4)
    (alone,) = shaped_model.decode_images([codes[3]], [(5, 3)])
    assert alone.tobytes() == pictures[3].tobytes()


# --- files and programs -----------------------------------------------------------------------------------------------


def test_saved_then_loaded_samples_the_same(shaped_model, shaped_folder):
    loaded = load(shaped_folder, device="cpu")
    assert loaded.tag_counts == shaped_model.tag_counts and loaded.vocabulary == shaped_model.vocabulary
    assert tokens(loaded.sample(11, n=6)) == tokens(shaped_model.sample(11, n=6))
    assert '  ["etching", "shapes", "moth", "2x8", 30],\n' in (shaped_folder / "sampling.json").read_text()


def test_sample_py_writes_things_and_shapes(shaped_model, shaped_folder, tmp_path, capsys):
    common = ["--checkpoint", str(shaped_folder), "--seed", "3"]
    sample.main([*common, "--n", "9", "--out", str(tmp_path / "a")])
    records = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert [(r["tags"]["grid"], r["tags"].get("thing", "")) for r in records] == [
        (list(p.tags.grid), p.tags.thing) for p in shaped_model.sample(3, n=9)
    ]
    for record in records:
        with Image.open(tmp_path / "a" / f"000003-{record['index']:02d}.png") as picture:
            assert picture.size == pixels(record["tags"]["grid"])
    capsys.readouterr()
    sample.main([*common, "--n", "2", "--thing", "moth", "--aspect", "3:1", "--out", str(tmp_path / "b")])
    assert "--aspect 3:1: grid 2x6 (rows x columns of codes), of 4x4, 2x8, 3x5, 5x3, 2x6" in capsys.readouterr().out
    assert '"thing": "moth"' in (tmp_path / "b" / "samples.jsonl").read_text()
    with pytest.raises(ValueError, match="thing can be: house, moth, tree"):
        sample.main([*common, "--thing", "moths", "--out", str(tmp_path / "d")])


def test_a_way_between_shapes_is_shown_whole(shaped_folder, shaped_model, tmp_path):
    first, last = (next(s for s in range(50) if shaped_model.sample(s, 1)[0].tags.grid == grid) for grid in ((2, 8), (5, 3)))
    sample.main(["--checkpoint", str(shaped_folder), "--interpolate", str(first), str(last), "--steps", "4", "--out", str(tmp_path)])
    with Image.open(tmp_path / "strip.png") as strip, Image.open(tmp_path / "interpolation.gif") as moving:
        assert strip.height == 40 and strip.width >= 64 + 24 and moving.n_frames == 6


def test_between_two_shapes_the_grids_between_are_passed_and_the_picture_stays(shaped_model):
    first, last = (next(s for s in range(50) if shaped_model.sample(s, 1)[0].tags.grid == grid) for grid in ((2, 8), (5, 3)))
    way = shaped_model.interpolate(first, last, 8)
    assert [p.tags.grid for p in way] == [(2, 8), (2, 6), (2, 6), (3, 5), (3, 5), (4, 4), (4, 4), (5, 3)]
    assert all(p.image.size == pixels(p.tags.grid) for p in way)
    assert tokens(way[:1]) == tokens(shaped_model.sample(first, 1)) and (way[-1].codes, way[-1].caption) == (
        lambda p: (p.codes, p.caption)
    )(shaped_model.sample(last, 1)[0])
    for step, pair in enumerate(way):
        start, end = (np.array(conditional_generation.through(shaped_model, one, pair.tags.grid)) for one in (way[0], way[-1]))
        codes, differs = np.array(pair.codes), start != end
        assert ((codes == start) | (codes == end)).all()
        assert abs((codes == end)[differs].sum() - differs.sum() * step / 7) <= 1, "all steps change about equally many codes"
        others = (way[0] if step < 4 else way[-1]).tags
        assert pair.tags == replace(others, grid=pair.tags.grid)
    for before, after in pairwise(way):
        if before.tags.grid == after.tags.grid:
            assert 0 < np.not_equal(before.codes, after.codes).sum() <= np.ceil(len(after.codes) / 7)
    back = shaped_model.interpolate(last, first, 8)
    assert [p.codes for p in back] == [p.codes for p in way[::-1]]


@pytest.mark.parametrize("grids", [((2, 4), (3, 4), (4, 4), (6, 4)), ((4, 2), (4, 3), (4, 5), (4, 6))])
def test_between_shapes_of_one_width_or_height_neighbours_differ_in_one_steps_share(shaped_model, grids):
    v = replace(shaped_model.vocabulary, grids=grids)
    tags = [("engraving", "scenery", "tree", f"{rows}x{columns}", 30) for rows, columns in grids]
    model = Tokun(shaped_model.image_tokenizer, shaped_model.text_tokenizer, v, random_generator(v), tag_counts=tags, tasks=("joint",))
    small, large = (next(s for s in range(90) if model.sample(s, 1)[0].tags.grid == grid) for grid in (grids[0], grids[-1]))
    way = model.interpolate(small, large, 10)
    areas = [math.prod(pair.tags.grid) for pair in way]
    assert areas == sorted(areas) and {pair.tags.grid for pair in way} == set(grids), "every shape between is passed"
    assert all(len(pair.codes) == area for pair, area in zip(way, areas))
    paper = conditional_generation.paper_codes(model, grids[-1])

    def on_paper(pair):
        whole = paper.clone()
        whole[conditional_generation.inside(grids[-1], pair.tags.grid)] = torch.tensor(pair.codes).view(pair.tags.grid)
        return whole

    first, last = on_paper(way[0]), on_paper(way[-1])
    changing = int((first != last).sum())
    for number, (before, after) in enumerate(pairwise(map(on_paper, way))):
        assert ((after == first) | (after == last)).all()
        assert int((before != after).sum()) <= 2 * np.ceil(changing / 9), "a new shape shows paper first"
        assert int((after != first).sum()) <= np.ceil(changing * (number + 1) / 9)
    ends = [model.sample(seed, 1)[0] for seed in (small, large)]
    assert [(p.codes, p.caption) for p in (way[0], way[-1])] == [(p.codes, p.caption) for p in ends]
    assert [p.codes for p in model.interpolate(large, small, 10)] == [p.codes for p in way[::-1]]


def test_many_samples_keep_their_shapes_and_go_on_from_records_of_earlier_versions(shaped_model, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="the table needs the extra 'data'")
    out = bulk.generate(shaped_model, 5, 12, tmp_path / "out", {"thing": "tree"}, shard_size=6)
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    assert [(r["thing"], r["grid"]) for r in rows] == [
        ("tree", f"{p.tags.grid[0]}x{p.tags.grid[1]}") for p in shaped_model.sample(5, n=12, thing="tree")
    ]
    with pytest.raises(ValueError, match="aspect: '' there, 'wide' here"):
        bulk.generate(shaped_model, 5, 12, out, {"thing": "tree", "aspect": "wide"}, shard_size=6)
    plain = bulk.generate(shaped_model, 5, 12, tmp_path / "plain", {}, shard_size=6)
    record = json.loads((plain / "samples.json").read_text())
    (plain / "samples.json").write_text(json.dumps({k: v for k, v in record.items() if k not in ("thing", "aspect", "style", "prompt")}))
    bulk.generate(shaped_model, 5, 12, plain, {}, shard_size=6)


def test_an_engine_draws_the_pairs_of_every_shape_that_tokun_draws(shaped_model, shaped_folder, vllm, tmp_path):  # noqa: F811
    serving.main(["--checkpoint", str(shaped_folder), "--seed", "3", "--n", "7", "--out", str(tmp_path)])
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = shaped_model.sample(3, n=7)
    assert len({len(pair.codes) for pair in expected}) > 1
    for pair, record in zip(expected, found, strict=True):
        own = json.loads(json.dumps(pair.record()))
        assert (tmp_path / record.pop("file_name")).is_file()
        assert {name: own[name] for name in record} == record
        with Image.open(tmp_path / f"000003-{pair.index:02d}.png") as image:
            assert image.tobytes() == pair.image.tobytes()
    serving.main(["--checkpoint", str(shaped_folder), "--n", "2", "--thing", "moth", "--aspect", "wide", "--out", str(tmp_path / "b")])
    asked = [json.loads(line)["tags"] for line in (tmp_path / "b" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(tags["thing"], tags["grid"]) for tags in asked] == [("moth", [3, 5])] * 2


def test_the_demo_sketches_and_draws_every_shape(shaped_model, monkeypatch):
    monkeypatch.setattr(demo, "PAUSE", 0.0)
    studio = demo.Studio(shaped_model)
    assert studio.known[studio.usual].things == ("", "house", "moth", "tree")
    for seed in range(4):
        *sketches, pairs = studio.draw(seed, 1)
        assert pairs[0].image.size == pixels(pairs[0].tags.grid) and all(sketch.image.size == pairs[0].image.size for sketch in sketches)
    (*_, pairs) = studio.draw(1, 1, thing="moth", shape="2x6")
    assert pairs[0].tags.thing == "moth" and pairs[0].image.size == (48, 16)
    with pytest.raises(ValueError, match="thing can be"):
        list(studio.draw(1, 1, thing="cat"))
    with pytest.raises(ValueError, match="does not know that shape; it knows 4x4, 2x8"):
        list(studio.draw(1, 1, shape="9x9"))
    assert studio.known[studio.usual].shapes[:3] == (("as it comes", ""), ("square 1:1", "4x4"), ("wide 4:1", "2x8"))
    (*_, way) = studio.between(1, 2, 3)
    assert len(way) == 3

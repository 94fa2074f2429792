"""Promises of tokun/inference/conditional_generation.py, on the tiny random model of fixtures.py."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data_tools import toy
from tests.test_losses import random_squeezenet
from tokun.data import to_float
from tokun.inference import candidates, conditional_generation, image_to_codes, latents, sampling
from tokun.inference.token_choice import DecodingSettings
from tokun.models.losses import SqueezeNetDistance
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.array(toy.draw(5, 3, 32)[0]))


def tokens(pairs):
    return [(p.tags, p.codes, p.caption_ids) for p in pairs]


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_captioned_in_each_register_with_the_models_own_likelihood(tiny_model, picture):
    said = tiny_model.caption(picture, ["plain", "poetic"], seed=4, n=3)
    assert [w.register for w in said] == ["plain"] * 3 + ["poetic"] * 3 and all(w.text.strip() for w in said)
    codes = image_to_codes.see(tiny_model, [picture])[0].codes
    tags = [Tags(register=w.register, grid=(4, 4)) for w in said]
    given, alone = tiny_model.caption_nll(tags, [w.ids for w in said], [codes] * 6), tiny_model.caption_nll(tags, [w.ids for w in said])
    for w, with_picture, without in zip(said, given, alone):
        assert w.nll == pytest.approx(with_picture, abs=1e-3) and w.pmi == pytest.approx(without - with_picture, abs=1e-3)
        assert 0 < w.confidence < 1 and w.confidence == pytest.approx(np.exp(-w.nll / (len(w.ids) + 1)))
    assert [w.ids for w in tiny_model.caption(picture, ["poetic"], seed=4, n=2)] == [w.ids for w in said[3:5]]
    assert tiny_model.caption(picture, temperature=0.0)[0].ids == tiny_model.caption(picture, seed=9, temperature=0.0)[0].ids


def test_questions_and_rewriting_go_through_the_same_loop(tiny_model, picture):
    answers = tiny_model.ask(picture, "what is shown?", n=2, seed=1)
    assert len({tuple(a.ids) for a in answers}) == 2 and all(a.text and a.nll > 0 for a in answers)
    (other,) = tiny_model.rewrite("a ship on a dark ground", "poetic", seed=3)
    assert other.register == "poetic" and other.text and other.ids != tiny_model.encode_text("a ship on a dark ground")


def test_what_a_model_never_learned_is_refused(tiny_model, picture):
    taught = replace(tiny_model, tasks=("joint", "text_to_image"))
    with pytest.raises(ValueError, match=r"'question'.*joint, text_to_image"):
        taught.ask(picture, "what is shown?")
    with pytest.raises(ValueError, match="'rewrite'"):
        taught.rewrite("a ship", "poetic")
    taught = replace(tiny_model, question_wordings=("is this a …", "what is shown"))
    with pytest.raises(ValueError, match=r"no question like 'Who painted this\?'.*what is shown; is this a …"):
        taught.ask(picture, "Who painted this?")
    assert taught.ask(picture, "What is shown?")[0].text == tiny_model.ask(picture, "What is shown?")[0].text
    for call in (lambda: tiny_model.ask(picture, "   "), lambda: tiny_model.rewrite("", "poetic")):
        with pytest.raises(ValueError, match="holds no text"):
            call()
    for call in (lambda: tiny_model.caption(picture, ["epic"]), lambda: tiny_model.rewrite("a ship", "epic")):
        with pytest.raises(ValueError, match="register can be: plain"):
            call()


# --- between seeds ----------------------------------------------------------------------------------------------------


def test_an_interpolation_starts_and_ends_at_its_seeds_and_does_not_depend_on_the_batch(tiny_model):
    way = tiny_model.interpolate(7, 8, 5)
    assert tokens(way[:1]) == tokens(tiny_model.sample(7, n=1)) and tokens(way[-1:]) == tokens(tiny_model.sample(8, n=1))
    assert len({tuple(p.codes) for p in way}) == 5 and [(p.seed, p.index) for p in way] == [(7, i) for i in range(5)]
    assert tokens(tiny_model.interpolate(7, 8, 5, batch_size=2)) == tokens(way)
    with pytest.raises(ValueError, match="steps is 1"):
        tiny_model.interpolate(7, 8, 1)


def test_between_two_seeds_every_code_changes_once_and_neighbours_share_all_but_a_steps_share(tiny_model):
    for first, last in ((7, 8), (1, 2), (3, 40)):
        way = tiny_model.interpolate(first, last, 9, aspect="4x4")
        codes = np.array([pair.codes for pair in way])
        a, b = codes[0], codes[-1]
        changed = (codes[1:] != codes[:-1]).sum(1)
        assert changed.sum() == (a != b).sum(), "what has changed stays"
        assert changed.max() <= np.ceil((a != b).sum() / 8) and ((codes == a) | (codes == b)).all()
        back = tiny_model.interpolate(last, first, 9, aspect="4x4")
        assert [p.codes for p in back[:4]] == [p.codes for p in way[:4:-1]], "the way back is the same way"


def test_words_on_the_way_follow_the_picture(tiny_model):
    way = tiny_model.interpolate(7, 8, 6, aspect="4x4")
    for pair in way:
        nll = tiny_model.caption_nll([pair.tags], [pair.caption_ids], [pair.codes])[0]
        assert pair.caption and pair.caption_nll == pytest.approx(nll, abs=1e-2)
        assert pair.image_nll == pytest.approx(tiny_model.image_nll([pair.tags], [pair.codes])[0], abs=1e-2)
    assert {p.tags for p in way[:3]} == {way[0].tags} and {p.tags for p in way[3:]} == {way[-1].tags}
    prompted = tiny_model.interpolate(7, 8, 4, prompt="two ships", batch_size=2)
    assert {pair.caption for pair in prompted} == {"two ships"}


def test_no_step_of_a_way_is_more_than_three_times_the_mean_one(tiny_model, tmp_path):
    distance = SqueezeNetDistance(str(random_squeezenet(tmp_path / "squeezenet.safetensors")))
    for first, last in ((7, 8), (1, 2), (5, 6), (3, 40)):
        pictures = torch.stack([to_float(np.array(pair.image))[None] for pair in tiny_model.interpolate(first, last, 8, aspect="4x4")])
        pictures = torch.nn.functional.interpolate(pictures, scale_factor=4)
        steps = [float(distance(a[None], b[None])) for a, b in pairwise(pictures)]
        assert max(steps) <= 3 * np.mean(steps)


def test_the_best_of_several_is_the_one_with_the_highest_score_whatever_n(tiny_model):
    pairs = tiny_model.sample(2, n=6)
    best = tiny_model.best_of(2, 2, 3)
    scores = candidates.pmi_both(tiny_model, pairs)
    assert [p.index for p in best] == [max(range(i, i + 3), key=lambda j: scores[j]) for i in (0, 3)]
    assert tokens(tiny_model.best_of(2, 1, 3)) == tokens(best[:1])
    lengths = tiny_model.best_of(2, 2, 3, score=lambda found: [-len(p.caption_ids) for p in found])
    assert [len(p.caption_ids) for p in lengths] == [min(len(p.caption_ids) for p in pairs[i : i + 3]) for i in (0, 3)]


# --- back from a picture ----------------------------------------------------------------------------------------------


def test_an_interval_holds_exactly_the_u_that_choose_its_id():
    torch.manual_seed(0)
    logits, legal = torch.randn(64, 40) * 2, torch.rand(64, 40) < 0.7
    for choice in (sampling.Choice(), sampling.Choice(0.7, top_k=9), sampling.Choice(1.5, top_p=0.8)):
        ids = sampling.choose(logits, legal, torch.rand(64), choice)
        low, high = sampling.interval(logits, legal, ids, choice)
        assert (high > low).all()
        for share in (0.02, 0.5, 0.98):
            assert torch.equal(sampling.choose(logits, legal, (low + share * (high - low)).float(), choice), ids)
        for outside in (low - 1e-3, high + 1e-3):
            inside = (outside >= 0) & (outside < 1)
            assert not (sampling.choose(logits, legal, outside.float().clamp(0, 0.999), choice) == ids)[inside].any()
    out = (~legal).float().argmax(-1)
    low, high = sampling.interval(logits, legal, out, sampling.Choice())
    assert torch.equal(low, high), "an id that cannot be chosen has no u"


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_an_inverted_pair_is_drawn_again_to_the_token(tiny_model, picture, temperature):
    found = tiny_model.invert(picture, "a ship on a dark ground", style="etching", temperature=temperature)
    assert found.missed == 0 and found.tags.style == "etching"
    (again,) = tiny_model.vary(found, 0.0, n=1, temperature=temperature)
    assert again.codes == found.codes == image_to_codes.see(tiny_model, [picture])[0].codes
    assert again.caption_ids == tiny_model.encode_text("a ship on a dark ground") and again.tags == found.tags


def test_variations_leave_a_picture_the_further_the_larger_their_amount(tiny_model, picture):
    found = tiny_model.invert(picture, "a ship on a dark ground")
    same = {amount: [np.mean(np.equal(p.codes, found.codes)) for p in tiny_model.vary(found, amount, n=8)] for amount in (0, 0.25, 0.5, 1)}
    assert same[0] == [1.0] * 8 and 0.75 <= min(same[0.25]) < 1 and 0.5 <= min(same[0.5]) < 0.75 and max(same[1]) < 0.5
    assert [p.codes for p in tiny_model.vary(found, 0.25, n=3)] == [p.codes for p in tiny_model.vary(found, 0.25, n=8)[:3]]
    assert [p.codes for p in tiny_model.vary(found, 1, n=8)] == [
        p.codes
        for p in tiny_model.pairs_from(
            latents.uniform(latents.draw(0, range(8), tiny_model.slots.size)),
            0,
            range(8),
            [found.tags] * 8,
            DecodingSettings(),
        )[0]
    ]
    alike = latents.slerp(found.z, found.z, 0.5)
    assert torch.allclose(alike, found.z, atol=1e-5)
    with pytest.raises(ValueError, match=r"vary is 1\.5"):
        tiny_model.vary(found, 1.5)
    with pytest.raises(ValueError, match="temperature is 0"):
        tiny_model.invert(picture, "a ship", temperature=0.0)


@pytest.mark.parametrize(
    ("keep", "kept"), [("top", range(8)), ("right", [2, 3, 6, 7, 10, 11, 14, 15]), ((0.25, 0.0, 0.75, 0.5), [1, 2, 5, 6])]
)
def test_a_completion_keeps_the_codes_that_were_kept(tiny_model, picture, keep, kept):
    own = image_to_codes.see(tiny_model, [picture])[0].codes
    pairs = tiny_model.complete(picture, keep, seed=2, n=3, candidates=2)
    assert len(pairs) == 3 and [p.index for p in pairs] == [0, 1, 2]
    for pair in pairs:
        assert [pair.codes[i] for i in kept] == [own[i] for i in kept] and pair.caption
    assert len({tuple(p.codes) for p in pairs}) == 3
    assert tokens(tiny_model.complete(picture, keep, seed=2, n=1, candidates=2)) == tokens(pairs[:1])


def test_of_several_completions_the_one_that_makes_what_is_kept_behind_it_likeliest_is_taken(tiny_model, picture):
    singles = tiny_model.complete(picture, "bottom", seed=2, n=4, candidates=1)
    (best,) = tiny_model.complete(picture, "bottom", seed=2, n=1, candidates=4)
    v = tiny_model.vocabulary

    def nats_of_kept(pair) -> float:
        ids = torch.tensor([sequences.pack_joint(v, pair.tags, pair.codes, pair.caption_ids).input_ids])
        logits = tiny_model.generator(input_ids=ids).logits.detach()[0, :, v.code_offset : v.size].log_softmax(-1)
        start = ids[0].tolist().index(v.id("<boi>"))
        return -sum(float(logits[start + i, pair.codes[i]]) for i in range(8, 16))

    assert tokens([best]) == tokens([min(singles, key=nats_of_kept)])


def test_what_is_kept_is_a_part_of_the_users_picture_in_whole_codes(tiny_model):
    one = replace(tiny_model, vocabulary=replace(tiny_model.vocabulary, grids=((4, 4),)), fit="crop")
    wide = Image.effect_noise((64, 32), 90)  # the middle half of its width is seen
    assert conditional_generation.kept(one, wide, (0, 0, 0.5, 1)).columns == range(2) and conditional_generation.kept(
        one, wide, (0, 0, 0.4, 1)
    ).columns == range(1)
    padded = replace(one, fit="pad")  # paper above and below: rows 1 and 2 hold the picture
    found = conditional_generation.kept(padded, wide, (0, 0, 1, 0.6))
    assert found.rows == range(2) and found.mask.sum() == 8, "the paper above it is kept as well"
    assert str(found) == "rows 1 to 2 of 4, columns 1 to 4 of 4 (whole codes)"
    assert conditional_generation.kept(tiny_model, Image.effect_noise((60, 20), 90), "left").columns == range(3)
    (pair,) = padded.complete(wide, (0, 0, 1, 0.6), n=1, candidates=1)
    assert pair.codes[:8] == image_to_codes.see(padded, [wide])[0].codes[:8]


@pytest.mark.parametrize("keep", ["middle", (0.5, 0, 0.2, 1), (0, 0, 1, 1), (0.1, 0.1, 0.2, 0.2), (0, 0, 2, 1)])
def test_a_part_that_cannot_be_kept_is_refused(tiny_model, picture, keep):
    with pytest.raises(ValueError, match="keep"):
        tiny_model.complete(picture, keep)


# --- pictures in ------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def white(side: int) -> bytes:
    """A whole PNG of one bit a pixel: at 30,000 a side, 112 MB of rows in 0.1 MB of file."""
    packer = zlib.compressobj(1)
    rows = (b"\0" + b"\xff" * (-(-side // 8))) * 100
    body = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_picture_too_large_to_decode_is_refused_by_its_size_in_every_direction(tiny_model, tmp_path, monkeypatch):
    huge = white(30_000)
    (tmp_path / "huge.png").write_bytes(huge)
    assert image_to_codes.open_picture(white(400), 1).size == (400, 400)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(pytest.fail.Exception):
        image_to_codes.open_picture(white(400), 1)
    with pytest.raises(ValueError, match=r"more than 100,000,000 pixels: scale it down"):
        image_to_codes.open_picture(huge, 1)
    for call in (
        lambda p: tiny_model.caption(p), lambda p: tiny_model.ask(p, "what?"), lambda p: tiny_model.invert(p, "a ship"),
        lambda p: tiny_model.complete(p, "top"), lambda p: tiny_model.score(p, "a ship"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"more than 100,000,000 pixels: scale it down"):
            call(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="20000 x 6000 pixels"):
        image_to_codes.open_picture(Image.new("1", (20_000, 6_000)), 1)


def test_pictures_of_every_mode_and_form_are_taken_and_others_refused(tiny_model, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    same = image_to_codes.see(tiny_model, [picture, tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), picture.convert("RGB")])
    assert all(seen == same[0] for seen in same)
    deep = np.asarray(picture).astype(np.uint16) * 257
    Image.frombytes("I;16B", picture.size, deep.astype(">u2").tobytes()).save(tmp_path / "big endian.tif")
    with Image.open(tmp_path / "big endian.tif") as other:
        for source in (
            other,
            Image.fromarray(deep),
            tmp_path / "big endian.tif",
            *[entry for entry in os.scandir(tmp_path) if entry.name == "big endian.tif"],
        ):
            assert np.abs(np.asarray(image_to_codes.open_picture(source, 1), int) - np.asarray(picture, int)).max() <= 1
    for mode in ("CMYK", "P", "LA", "1", "I;16", "YCbCr", "HSV"):  # as PIL pictures, not as files
        other = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257) if mode == "I;16" else picture.convert("RGB").convert(mode)
        assert len(image_to_codes.see(tiny_model, [other], (4, 4))[0].codes) == 16
    for mode in ("1", "P", "RGBA", "CMYK", "I;16", "LA"):
        buffer = io.BytesIO()
        picture.convert("I").convert(mode).save(buffer, "TIFF") if mode == "I;16" else picture.convert("RGB").convert(mode).save(
            buffer, "TIFF"
        )
        assert len(image_to_codes.see(tiny_model, [buffer.getvalue()], (4, 4))[0].codes) == 16
    for unread, named in ((Image.new("L", (0, 8)), "0 x 8 pixels"), (None, "NoneType is not a picture"), (b"<svg/>", "unknown format")):
        with pytest.raises(ValueError, match=named):
            tiny_model.caption(unread)
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"half\.png is not a picture that can be read"):
        tiny_model.caption(tmp_path / "half.png")
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        tiny_model.caption(tmp_path / "no.png")
    for hostile in (b"", b"no picture", png_header(30_000, 30_000), (tmp_path / "a.png").read_bytes()[:60]):
        with pytest.raises(ValueError, match=r"picture"):
            tiny_model.caption(hostile)


def test_what_a_direction_cannot_take_is_refused_in_words(tiny_model, picture):
    found = tiny_model.invert(picture, "a ship")
    for call, named in (
        (lambda: tiny_model.complete(picture, "top", style="cubism"), "<style:cubism> is not in this vocabulary"),
        (lambda: tiny_model.complete(picture, "top", register="rude"), "<register:rude>"),
        (lambda: tiny_model.invert(picture, "a ship", subject="zzz"), "<subject:zzz>"),
        (lambda: tiny_model.complete(picture, "top", n=0), "no sample was requested"),
        (lambda: tiny_model.complete(picture, "top", candidates=0), "no sample was requested"),
        (lambda: tiny_model.vary(found, 0.5, n=0), "no sample was requested"),
        (lambda: tiny_model.caption(picture, n=0), "no sample was requested"),
        (lambda: tiny_model.caption(picture, []), "at least one of plain"),
        (lambda: tiny_model.caption(picture, ["plain", ""]), "at least one of plain"),
        (lambda: tiny_model.interpolate(1, 2, 10**10), "at least 2 steps, its ends, and at most 10,000"),
        (lambda: tiny_model.best_of(1, 2, 10**11), "best_of is"),
        (lambda: tiny_model.sample(1, indices=[0.5]), "must be integers"),
        (lambda: tiny_model.sample(1, indices=[True]), "must be integers"),
        (lambda: tiny_model.sample(1, indices=[]), "no sample was requested"),
        (lambda: tiny_model.sample(1, 1.5), "n is 1.5"),
        (lambda: tiny_model.sample(1, 1, top_k=1.5), "top_k is 1.5"),
        (lambda: tiny_model.sample(1, 1, temperature="hot"), "temperature is 'hot'"),
        (lambda: tiny_model.sample(1, 1, temperature=1e39), "temperature is 1e"),
        (lambda: tiny_model.sample(1, 1, guidance_scale=1e39), "guidance_scale is 1e"),
        (lambda: tiny_model.sample(1, 1, prompt=5), "5 is no text"),
        (lambda: tiny_model.sample(1, 1, style=None), "None is not a tag"),
        (lambda: tiny_model.score(picture, None), "None is no text"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            call()
    same = tiny_model.sample(1, 2, top_k=5, temperature=0.5, guidance_scale=2.0)
    again = tiny_model.sample(
        np.int64(1), np.int64(2), top_k=np.int64(5), temperature=torch.tensor(0.5), guidance_scale=np.float32(2), batch_size=np.int64(2)
    )
    assert [pair.codes for pair in again] == [pair.codes for pair in same]
    assert tiny_model.caption(picture, "poetic") == tiny_model.caption(picture, ["poetic"])
    assert {pair.tags.register for pair in tiny_model.complete(picture, "top", register="poetic", n=2)} == {"poetic"}
    assert tiny_model.invert(picture, "a ship", register="alt").tags.register == "alt"

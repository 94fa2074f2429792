"""The demo: what visitors may ask for, how a pair appears, and the page itself in a real browser."""

from __future__ import annotations

import asyncio
import base64
import copy
import gc
import io
import json
import os
import re
import runpy
import shutil
import socket
import struct
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_tools import toy
from tests.fixtures import random_generator
from tokun.app import demo, links, views, visit
from tokun.app import page as app
from tokun.app.events import Events
from tokun.app.gate import Gate
from tokun.inference import adapters, preferences
from tokun.tokenizers import sequences

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Gradio and uvicorn leave event loops and sockets to the garbage collector, which warns of them
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def swept():
    """What these tests leave behind is collected while they are still the ones to blame."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def studio(tiny_model) -> demo.Studio:
    return demo.Studio(tiny_model)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.array(toy.draw(5, 3, 32)[0]))


def tokens(pairs):
    return [(p.tags, p.codes, p.caption_ids) for p in pairs]


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes whose header promises a huge picture."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    parts = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- what may be asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        *(({"seed": seed}, "seed") for seed in (-1, 2**31, 1.5, float("nan"), float("inf"), "42", None, True, [1])),
        *(({"n": n}, "number of prints") for n in (0, 13, 2.5, "9")),
        *(({"best": best}, "number of candidates") for best in (0, 17, 2.5, "9", None)),
        ({"no": 3000, "best": 4}, "number of the print"),
        ({"no": 9999, "n": 2}, "number of the print"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"guidance": 99}, "guidance"),
        ({"prompt": "a" * 301}, "301 characters"),
        ({"prompt": "ship " * 60}, "pieces"),
        ({"prompt": {"path": "/etc/passwd"}}, "prompt is a text"),
        ({"style": "cubism"}, "engraving, etching"),
        ({"style": ["engraving"]}, "style"),
        ({"register": "rude"}, "register"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_words(studio, wish, named):
    with pytest.raises(ValueError, match=named):
        list(studio.draw(**{"seed": 1, "n": 1, **wish}))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "choose a picture"),
        (b"", "choose a picture"),
        ("/etc/passwd", "choose a picture"),
        (b"root:x:0:0 <b>not a picture</b>", "not a whole picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not a whole picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) run", "not a whole picture"),
        (png_that_claims(200, 200), "not a whole picture"),
        (png_that_claims(6000, 5000), "too many pixels"),
        (png_that_claims(12_000, 12_000), "too many pixels"),
        (png_that_claims(30_000, 30_000), "too many pixels"),
        (b"\x89PNG\r\n\x1a\n" + bytes(demo.MAX_FILE_BYTES), "bytes; up to 10,000,000"),
    ],
)
def test_an_upload_that_is_no_decent_picture_is_refused_before_it_costs_anything(content, named):
    with pytest.raises(ValueError, match=named):
        demo.open_upload(content, 1)


def test_pictures_of_every_mode_are_taken_upright_and_scaled_down(picture):
    for mode, kind in (("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("1", "TIFF")):
        opened = demo.open_upload(file_of(picture.convert(mode), kind), 1)
        assert opened.mode == "L" and opened.size == (32, 32)
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    assert np.abs(np.asarray(demo.open_upload(file_of(deep), 1), int) - np.asarray(picture, int)).max() <= 1
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    assert demo.open_upload(file_of(Image.new("L", (3000, 1500)), "JPEG", exif=turned), 3).size == (512, 1024)


# --- drawing --------------------------------------------------------------------------------------------------------


def test_a_seed_is_the_same_pair_as_anywhere_else(studio, tiny_model):
    default = tiny_model.defaults.temperature
    assert tokens(list(studio.draw(42, 3, temperature=default))[-1]) == tokens(tiny_model.sample(42, 3))
    other = {"style": "etching", "prompt": "a ship", "temperature": 0.5, "guidance": 2.0}
    asked = tiny_model.sample(7, 1, style="etching", prompt="a ship", register="plain", temperature=0.5, guidance_scale=2.0)
    assert tokens(list(studio.draw(7, 1, **other))[-1]) == tokens(asked)
    assert tokens(list(studio.between(7, 8, 4))[-1]) == tokens(tiny_model.interpolate(7, 8, 4, register="plain"))


@pytest.mark.parametrize("scale", [3.0, 8.0])  # 8: beyond the slider's usual end
def test_a_model_that_is_sampled_with_guidance_is_so_here_too(tiny_model, scale):
    guided = replace(tiny_model, defaults=replace(tiny_model.defaults, guidance_scale=scale))
    own = demo.Studio(guided)
    drawn, plain = tokens(list(own.draw(42, 2))[-1]), tokens(list(own.draw(42, 2, guidance=1.0))[-1])
    assert drawn == tokens(list(own.draw(42, 2, guidance=scale))[-1]), "as the slider sends it"
    assert demo.including(demo.GUIDANCES, scale) == (1.0, max(6.0, scale))
    assert drawn == tokens(guided.sample(42, 2)) != plain == tokens(tiny_model.sample(42, 2))


def test_a_pair_appears_row_by_row_and_then_word_by_word(studio, tiny_model, monkeypatch):
    monkeypatch.setattr(demo, "PAUSE", 0.001)
    told: list[tuple[list[int], list[int]]] = []
    (pair,) = tiny_model.sample(3, 1, watch=lambda codes, ids: told.append((codes, ids)))
    rows = [(codes, ids) for codes, ids in told if len(codes) % 4 == 0 and not ids][:4]
    words = [(codes, ids) for codes, ids in told if ids]
    looked = threading.Semaphore(0)

    def make(watch):  # as slow as the one who looks
        for codes, ids in [*rows, *words]:
            watch(codes, ids)
            assert looked.acquire(timeout=20)
        return [pair]

    shown: list[demo.Sketch] = []
    for news in studio.watched(make):
        if isinstance(news, demo.Sketch):
            shown.append(news)
            looked.release()
    assert news == [pair] and len(shown) == len(rows) + len(words)
    for count, sketch in enumerate(shown[:4], 1):
        drawn = np.asarray(sketch.image)
        assert (drawn[8 * count :] == 255).all() and not (drawn[8 * count - 8 : 8 * count] == 255).all() and sketch.caption == ""
    assert all(np.array_equal(np.asarray(sketch.image), np.asarray(pair.image)) for sketch in shown[3:])
    captions = [sketch.caption for sketch in shown[4:]]
    assert captions[-1] == pair.caption.rstrip("\ufffd"), "bytes that are no letter yet are waited for"
    assert all(pair.caption.startswith(caption) for caption in captions) and len(set(captions)) > 3


def test_a_visitor_who_leaves_ends_the_work_and_the_next_one_is_served(studio, monkeypatch):
    monkeypatch.setattr(demo, "PAUSE", 0.01)
    ended = []

    def make(watch):
        try:
            while True:
                watch([1, 2], [])
        except demo.Left:
            ended.append(True)
            raise

    drawing = studio.watched(make)
    assert isinstance(next(drawing), demo.Sketch)
    drawing.close()
    assert isinstance(list(studio.draw(1, 1))[-1], list) and ended == [True]


# --- from a picture -------------------------------------------------------------------------------------------------


def test_a_picture_is_captioned_asked_about_varied_and_completed(studio, tiny_model, picture):
    said = studio.say(picture, ["poetic", "plain", "poetic"])
    assert [w.register for w in said] == ["poetic", "plain"] and said == tiny_model.caption(picture, ["poetic", "plain"])
    own = demo.own_words(tiny_model, picture)
    assert tiny_model.caption(picture, temperature=0.0)[0].text.startswith(own) and tiny_model.encode_text(own)
    for caption, meant in (("a ship", "a ship"), ("  ", own)):
        assert tokens(studio.vary(picture, caption, 0.2, 5)) == tokens(tiny_model.vary(tiny_model.invert(picture, meant), 0.2, seed=5, n=4))
    assert tokens(studio.complete(picture, "left", 2)) == tokens(tiny_model.complete(picture, "left", seed=2, n=4))
    taught = demo.Studio(replace(tiny_model, tasks=("joint", "question")))
    assert taught.can("question") and taught.answer(picture, "what is shown?")[0].text


def test_what_cannot_be_done_with_a_picture_is_said(studio, tiny_model, picture):
    assert not studio.can("question")
    taught = demo.Studio(replace(tiny_model, tasks=("joint", "question")))
    for call, named in (
        (lambda: studio.answer(picture, "what?"), "not trained on questions"),
        (lambda: taught.answer(picture, " "), "type a question"),
        (lambda: taught.answer(picture, "?" * 301), "301 characters"),
        (lambda: studio.say(None, ["plain"]), "choose a picture"),
        (lambda: studio.say(picture, []), "choose a register"),
        (lambda: studio.say(picture, ["/etc/passwd"]), "register"),
        (lambda: studio.vary(picture, "", 1.5, 0), "distance"),
        (lambda: studio.vary(picture, "", 0.5, -1), "seed"),
        (lambda: studio.complete(picture, "middle", 0), "half"),
    ):
        with pytest.raises(ValueError, match=named):
            call()


# --- what is shown and taken home -----------------------------------------------------------------------------------


def test_a_pair_is_taken_home_as_png_svg_and_json_with_no_file_on_the_server(tiny_model):
    (pair,) = tiny_model.sample(9, 1)
    files = {name: base64.b64decode(uri.partition(",")[2]) for name, uri in visit.keepsakes(pair).items()}
    assert sorted(files) == ["tokun-9-00.json", "tokun-9-00.png", "tokun-9-00.svg"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["tokun-9-00.png"]))), np.asarray(pair.image))
    assert json.loads(files["tokun-9-00.json"]) == json.loads(json.dumps(pair.record()))
    assert files["tokun-9-00.svg"].startswith(b"<svg") and len(files["tokun-9-00.svg"]) <= 10_000


def test_a_visit_is_remembered_newest_first_each_pair_once_and_not_for_ever(tiny_model):
    old, new = ([visit.Print(pair) for pair in tiny_model.sample(seed, 16)] for seed in (1, 2))
    kept = visit.remember(visit.remember([], old), [*new, *old[:2]])
    assert kept == [*new, *old[:2], *old[2:8]] and len(kept) == visit.REMEMBERED


def test_words_are_shown_as_words_whatever_stands_in_them(tiny_model):
    (pair,) = tiny_model.sample(9, 1)
    page = views.plate([replace(pair, caption='"><script>alert(1)</script> ${1+1} {{7*7}} `x`')])
    assert "<script" not in page and not set("${}`") & set(re.sub(r"&#\d+;", "", page)) and "&lt;script&gt;" in page


# --- links, comparisons, the gallery --------------------------------------------------------------------------------


def test_a_link_holds_every_option_that_is_not_the_usual_one_and_is_read_back():
    values = {
        "seed": 7, "no": 3, "prompt": "ein Schiff & 100 % Sturm?", "style": "etching", "subject": "", "thing": "moth", "register": "poetic",
        "shape": "4x4",
        "temperature": 0.8, "guidance": 2.25, "adapter": "mine",
    }  # fmt: skip
    made = links.link(values, {"temperature": 1.0, "register": "plain", "no": 0})
    read = links.read(dict(urllib.parse.parse_qsl(made[1:], keep_blank_values=True)))
    assert read == {name: value for name, value in values.items() if value != ""}
    assert links.link({"seed": 7, "no": 0, "temperature": 1.0, "prompt": None}, {"temperature": 1.0, "no": 0}) == "?seed=7"
    assert links.link({"seed": 7, "adapter": ""}, {"adapter": "mine"}) == "?seed=7&adapter=", "the base, where an adapter is usual"
    assert not links.read({"utm_source": "x", "__theme": "dark"})


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"seed": "-1"}, "seed"),
        ({"seed": "1e400"}, "seed"),
        ({"seed": "<script>"}, "seed"),
        ({"seed": "1", "no": "1000000"}, "number of the print"),
        ({"seed": "1", "n": "13"}, "number of prints"),
        ({"seed": "1", "best": "17"}, "number of candidates"),
        ({"seed": "1", "n": "12", "best": "16"}, "up to 96 are drawn"),
        ({"from": "1", "to": "2", "steps": "8", "step": "0"}, "step"),
        ({"temperature": "nan"}, "temperature"),
        ({"style": "cubism"}, "engraving, etching"),
        ({"adapter": "../../etc"}, "adapter"),
        ({"prompt": "a" * 301}, "301 characters"),
    ],
)
def test_a_link_that_asks_for_what_there_is_not_is_refused_in_words(adapted, parameters, named):
    noted = []

    class Gradio:
        Warning, skip = staticmethod(lambda words, **_: noted.append(words)), staticmethod(dict)

    assert list(Events(Gradio, demo.Studio(adapted), 1).asked(parameters)) == [{}]
    assert len(noted) == 1 and named in noted[0] and "<script" not in noted[0]


def test_the_link_of_several_prints_names_the_first_of_them(studio):
    class Gradio:
        skip, Warning = staticmethod(dict), None

    *_, (plate, *_) = Events(Gradio, studio, 1).drawn({"seed": 7, "n": 2, "no": 3}, {}, [])
    (link,) = re.findall(r'class="address" href="([^"]+)"', plate)
    assert links.read(dict(urllib.parse.parse_qsl(link.replace("&amp;", "&")[1:]))) == {"seed": 7, "no": 3, "n": 2}


def test_a_chosen_print_is_the_one_that_sample_py_chooses_and_its_link_draws_it_alone(studio, tiny_model):
    class Gradio:
        skip, Warning = staticmethod(dict), None

    (one,) = tiny_model.best_of(7, 1, 4)
    *sketches, (drawn,) = studio.draw(7, 1, best=4)
    assert tokens([drawn]) == tokens([one]) and all(sketch.candidates == 4 for sketch in sketches)
    plate, *_ = list(Events(Gradio, studio, 1).draw(7, 1, 4, *[""] * 4, None, "", None, None, None, []))[-1]
    (link,) = re.findall(r'class="address" href="([^"]+)"', plate)
    read = links.read(dict(urllib.parse.parse_qsl(link.replace("&amp;", "&")[1:])))
    assert tokens(list(studio.draw(n=1, **{"no": 0, **read}))[-1]) == tokens([one]) and "best" not in read
    *_, (plate, *_) = Events(Gradio, studio, 1).drawn({"seed": 7, "n": 2, "no": 1, "best": 4}, {}, [])
    (link,) = re.findall(r'class="address" href="([^"]+)"', plate)
    read = links.read(dict(urllib.parse.parse_qsl(link.replace("&amp;", "&")[1:])))
    assert read == {"seed": 7, "no": 1, "n": 2, "best": 4}
    assert tokens(list(studio.draw(**read))[-1]) == tokens(tiny_model.best_of(7, 3, 4)[1:])


def test_the_sketch_of_a_candidate_says_that_it_is_one(studio):
    sketch = demo.Sketch(Image.new("L", (64, 64)), "a ship", candidates=4)
    assert "the first of 4 candidates" in views.sketched(sketch) and "candidates" not in views.sketched(replace(sketch, candidates=1))


def test_the_number_of_candidates_follows_the_adapter_and_a_link_that_names_it(adapted):
    class Gradio:
        update = staticmethod(dict)

    studio = demo.Studio(adapted)
    for name, one in studio.models.items():
        one.defaults = replace(one.defaults, best_of=5 if name else 40)
    *_, best = app.fields_of(Gradio, studio, "mine")
    assert best == {"value": 5}
    *_, best = app.fields_of(Gradio, studio, "")
    assert best == {"value": demo.MAX_CANDIDATES}, "of more than the slider has"
    *_, best = app.fields_of(Gradio, studio, "mine", {"best": 1})
    assert best == {"value": 1}
    *_, best = app.fields_of(Gradio, studio, "mine", {"best": None})
    assert best == {"value": 5}, "one print's own link"


def test_sheets_of_choices_are_bounded_and_of_several_batches_have_the_first_candidates_shape(shaped_model, monkeypatch):
    monkeypatch.setattr(demo, "PAUSE", 1e-4)  # to sketch everything that is watched
    studio = demo.Studio(shaped_model)
    plain = [shaped_model.sample(seed, 17) for seed in range(20)]
    seed = next(seed for seed, pairs in enumerate(plain) if len(pairs[16].codes) > len(pairs[0].codes))
    *sketches, drawn = studio.draw(seed, 3, best=8)
    assert len(drawn) == 3 and len(sketches) > 3
    assert sketches[-1].caption == plain[seed][0].caption, "in later batches the first candidate stays"
    with pytest.raises(ValueError, match="12 prints of 16 candidates each are 192; up to 96"):
        list(studio.draw(1, 12, best=16))


def test_a_number_of_a_seed_is_drawn_alone_and_is_the_same_pair(studio, tiny_model):
    assert tokens(list(studio.draw(7, 1, 5))[-1]) == tokens(tiny_model.sample(7, indices=[5])) == tokens(tiny_model.sample(7, 6)[5:])


def test_two_prompts_adapters_or_prints_of_one_seed_are_compared(adapted, tiny_model):
    studio = demo.Studio(adapted)
    assert (
        list(studio.models) == ["", "mine"] and "lithograph" in studio.known["mine"].styles and "lithograph" not in studio.known[""].styles
    )
    plain, ship = tiny_model.sample(7, 2), tiny_model.sample(7, 1, prompt="a ship")
    both = list(studio.versus(7, [{}, {"prompt": "a ship"}]))
    assert tokens(both[-1]) == tokens([plain[0], *ship]), "sample 0 of both"
    assert tokens(list(studio.versus(7, [{}, {}]))[-1]) == tokens(plain), "two equal wishes: the seed's first two"
    alone, other = list(studio.versus(7, [{}, {"adapter": "mine"}]))[-1]
    assert tokens([alone]) == tokens(plain[:1]) and tokens([other]) != tokens([alone])
    assert tokens([other]) == tokens(copy.copy(adapted).use_adapter("mine").sample(7, 1)) and adapted.adapter == ""
    with pytest.raises(ValueError, match=r"it knows engraving, etching\."):
        list(studio.versus(7, [{}, {"style": "lithograph"}]))


def test_the_better_of_two_is_a_preference_and_of_two_prompts_one_of_whole_pairs(tiny_model, tmp_path):
    one, two = tiny_model.sample(3, 2)
    ship, moth = (tiny_model.sample(3, 1, prompt=words)[0] for words in ("a ship", "a moth"))
    judged = visit.Judged().prefer([one, two], 0).prefer([two, one], 0).prefer([ship, moth], 1)
    assert judged.summary() == "0 liked, 0 disliked, 2 compared: 2 preferences", "the last opinion of two counts"
    content = base64.b64decode(judged.files()["tokun-preferences.jsonl"].partition(",")[2])
    (tmp_path / "clicks.jsonl").write_bytes(content)
    v, found = tiny_model.vocabulary, preferences.read(str(tmp_path / "clicks.jsonl"), tiny_model.vocabulary, tiny_model.encode_text)
    chosen, rejected = ([sequences.unpack(v, getattr(p, side).input_ids) for p in found] for side in ("chosen", "rejected"))
    assert [c.codes for c in chosen] == [moth.codes, two.codes] and [c.codes for c in rejected] == [ship.codes, one.codes]
    assert found[0].chosen.input_ids.index(v.id("<boi>")) < found[0].chosen.input_ids.index(v.id("<boc>")), "picture, then words"
    for pairs, named in (([], "no two prints"), ([one, one], "the same")):
        with pytest.raises(ValueError, match=named):
            judged.prefer(pairs, 0)


def test_the_gallery_is_one_file_with_every_picture_and_the_links_that_draw_them_again(tiny_model):
    one, two = tiny_model.sample(3, 2)
    page = views.gallery(
        [visit.Print(replace(one, caption="<b>"), "?seed=3&style=etching"), visit.Print(two)], visit.address("https://a.b/x/?y#z")
    )
    assert page.count("data:image/png") == 2 and page.count("<a ") == 1 and 'href="https://a.b/x/?seed=3&amp;style=etching"' in page
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert [visit.address(found) for found in (None, "javascript:alert(1)", 'https://a.b/"><script>')] == ["", "", "https://a.b/"]


def test_a_form_offers_what_the_model_knows_and_no_more(tiny_model, adapted):
    pytest.importorskip("gradio", reason="the page needs gradio, the extra 'app'")

    def offered(model) -> set[str]:
        page = app.build(model)
        shown = [block for block in page.blocks.values() if getattr(block, "visible", False)]
        hints.append([block.info for block in shown if getattr(block, "elem_id", "") == "question"])
        return {label for block in shown if (label := getattr(block, "label", None))}

    hints: list[list[str | None]] = []
    able = replace(adapted, tasks=(*adapted.tasks, "question"), question_wordings=("what is shown", "is this a …"))
    able.adapters.update(adapted.adapters)
    full = offered(able)
    silent = replace(tiny_model.vocabulary, registers=("plain",), subjects=(), grids=((4, 4),))
    plain = offered(replace(tiny_model, tasks=("joint",), vocabulary=silent, generator=random_generator(silent)))
    named = {
        "Ask about it", "A caption", "What it shows, in words (may stay empty)", "Left: what it shows", "Adapter", "Register", "Subject",
        "Shape",
        "Say what it shows, in these registers",
    }  # fmt: skip
    assert named <= full and not named & plain and "Style" in plain
    assert hints == [["It knows: what is shown; is this a …"], []]
    knowing = demo.Studio(replace(adapted, tasks=(*adapted.tasks, "question")))
    assert knowing.rewrite("a ship", "poetic")[0].register == "poetic"
    for studio, words, named in ((demo.Studio(tiny_model), "a ship", "not trained to rewrite"), (knowing, " ", "type a caption")):
        with pytest.raises(ValueError, match=named):
            studio.rewrite(words, "poetic")


def test_ink_is_legible_on_paper():
    """WCAG 2.2, 1.4.3 (4.5 to 1), also where axe cannot tell what lies behind a text."""
    style = app.STYLE.read_text(encoding="utf-8")
    colour = {name: [int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)] for name, value in re.findall(r"--(\w+): #(\w{6});", style)}

    def light(name: str) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[name]]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for ink in ("ink", "faded", "seal"):
        for paper in ("paper", "sheet"):
            assert (light(paper) + 0.05) / (light(ink) + 0.05) >= 4.5, (ink, paper)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """The tiny model, which may rewrite, and an adapter of it that knows a style more."""
    model = replace(tiny_model, tasks=("joint", "text_to_image", "rewrite"))
    torch.manual_seed(3)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.randn(2, 64), name.format("B"): torch.randn(64, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"]}
    model.adapters["mine"] = adapters.Adapter(
        "mine", "bundled", "", config, tensors, model.vocabulary.extended(styles=("lithograph",)), tag_counts=model.tag_counts
    )
    return model


@pytest.fixture(scope="module")
def site(adapted) -> str:
    """The address of a running demo."""
    pytest.importorskip("gradio", reason="the demo needs gradio, the extra 'app'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = app.build(adapted)
    app.serve(page, port=port, wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1", "http://127.0.0.1:7860"),
        ("::1", "http://[::1]:7860"),
        ("192.168.1.7", "http://192.168.1.7:7860"),
        ("0.0.0.0", "http://127.0.0.1:7860, for others at http://desk:7860"),
        ("::", "http://127.0.0.1:7860, for others at http://desk:7860"),
    ],
)
def test_the_start_line_names_an_address_that_can_be_typed(host, told, monkeypatch):
    """It said http://0.0.0.0:7860, which leads nowhere from another machine."""
    monkeypatch.setattr(socket, "gethostname", lambda: "desk")
    assert app.addresses(host, 7860) == told


def status(address: str, body: bytes | None = None) -> int:
    request = urllib.request.Request(address, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_no_file_of_the_server_and_nothing_of_other_servers_is_handed_out(site):
    assert status(f"{site}/") == 200
    for path in (
        "/etc/passwd",
        f"{ROOT}/pyproject.toml",
        "pyproject.toml",
        "../../etc/passwd",
        "..%2f..%2fetc/passwd",
        "http://localhost:1/",
    ):
        assert status(f"{site}/gradio_api/file={path}") in (403, 404), path
    for path in (
        "/gradio_api/proxy=http://localhost:1/",
        "/gradio_api/file%3Dhttps://example.org",
        "/gradio_api/file=http://example.org/upload",
        "/docs",
        "/openapi.json",
    ):
        assert status(site + path) in (403, 404), path


def test_uploads_that_stand_still_are_ended_and_only_so_many_are_received_at_a_time(monkeypatch):
    async def answered(gate: Gate, messages: list[dict], *, then: float = 0) -> int:
        said = []

        async def receive() -> dict:
            if not messages:
                await asyncio.sleep(then)
            return messages.pop(0)

        async def send(message: dict) -> None:
            said.append(message)

        await gate({"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": []}, receive, send)
        return said[0]["status"]

    def begun() -> list[dict]:
        return [{"type": "http.request", "body": b"a", "more_body": True}]

    async def all_of_it() -> list[int]:
        gate = Gate(None, 100)
        silent = await answered(gate, [], then=9)
        slow = asyncio.create_task(answered(gate, begun(), then=9))
        await asyncio.sleep(0.01)
        crowded = await answered(gate, begun(), then=9)
        return [silent, crowded, await slow, gate.uploads]

    monkeypatch.setattr("tokun.app.gate.IDLE", 0.2)
    monkeypatch.setattr("tokun.app.gate.UPLOADS", 1)
    assert asyncio.run(all_of_it()) == [408, 429, 408, 0]


def test_an_upload_is_one_whole_file_and_not_endless(site):
    def sent(body: bytes, length: int | None = None, boundary: str = "xyz") -> int:
        host, _, port = site.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as wire:
            head = (
                f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: multipart/form-data; "
                f"boundary={boundary}\r\nContent-Length: {length or len(body)}\r\n\r\n"
            )
            wire.sendall(head.encode())
            try:
                wire.sendall(body)
                if length:
                    return 0  # and hangs up
                return int(wire.recv(4096).split()[1])
            except ConnectionError:  # it does not listen to the end
                return 413

    def part(name: str, content: bytes, filename: str = '; filename="a.png"') -> bytes:
        return f'--xyz\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + content + b"\r\n"

    kept = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")

    before, end, big = {*kept.rglob("*")}, b"--xyz--\r\n", bytes(demo.MAX_FILE_BYTES)
    assert (
        sent(part("files", b"x", filename="") + end)
        == sent(part("other", b"x") + end)
        == sent(part("files", b"x") + part("files", b"y") + end)
        == 400
    )
    assert sent(part("files", b"x") + end, boundary="") == 400
    assert sent(part("files", big + bytes(20_000)) + end) == 413 and sent(part("files", big, filename="") + bytes(20_000)) == 413
    assert sent(part("files", b"x" * 5000), length=9000) == 0
    assert not {path for path in {*kept.rglob("*")} - before if path.is_file()}, "nothing of it is kept"
    assert sent(part("files", b"a fine file") + end) == 200


def test_a_request_cannot_name_a_file_it_did_not_upload_nor_be_endless(site):
    def joined(value: object) -> int:
        return status(f"{site}/gradio_api/queue/join", json.dumps({"data": [value], "fn_index": 0, "session_hash": "x"}).encode())

    remote = {"path": "https://example.org/x.png", "meta": {"_type": "gradio.FileData"}}
    assert joined(remote) == joined([{"deep": [remote]}]) == 403
    assert joined("x" * 300_000) == 413


@pytest.fixture(scope="module")
def browser():
    """Of one visitor: what Gradio's page is made of is loaded once for all tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright, the extra 'dev'")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context()
        browser.close()


def test_in_a_browser_a_click_draws_a_pair_seeds_are_walked_and_an_upload_is_captioned_or_refused(site, browser, tiny_model, picture):
    page = browser.new_page()
    asked, broken = set(), []
    page.on(
        "request",
        lambda request: asked.add(request.url.partition(":")[0] if request.url[:5] in ("data:", "blob:") else request.url.split("/")[2]),
    )
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(site)
    page.fill("#seed input", "7")
    page.click("#generate")
    page.wait_for_selector("a[download$='.json']")
    (pair,) = tiny_model.sample(7, 1)
    assert " ".join(page.inner_text("#plate figcaption").split()).startswith(" ".join(pair.caption.split()))
    assert page.eval_on_selector("#plate img", "image => image.complete && image.naturalWidth") >= 512
    assert page.locator("#history .thumbnail-item").count() == 1
    with page.expect_download() as download:
        page.click("a[download$='.json']")
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["codes"] == pair.codes

    page.get_by_role("tab", name="Two seeds").click()
    page.click("#walk")
    page.wait_for_selector("#way a[download$='.gif']")
    page.locator("#step input[type=range]").fill("3")
    page.get_by_text("seed 42, no. 2").wait_for()
    (shown,) = tiny_model.interpolate(42, 43, 8, register="plain")[2:3]
    page.wait_for_selector("a[download='tokun-42-02.png']")
    page.locator("#history .thumbnail-item").first.click()
    page.wait_for_selector("a[download='tokun-7-00.png']")
    page.locator("#step input[type=range]").fill("4")
    page.locator("#step input[type=range]").fill("3")
    page.wait_for_selector("a[download='tokun-42-02.png']")

    page.get_by_role("tab", name="Picture", exact=True).click()
    page.get_by_role("button", name="Take the print").click()
    page.wait_for_selector("#inhand img")
    assert page.get_attribute("#inhand img", "src") == re.search(r'src="([^"]+)"', views.preview(shown.image))[1], "the one that is shown"
    page.get_by_role("tab", name="Seed", exact=True).click()
    page.fill("#seed input", "1.5")
    page.click("#generate")
    page.get_by_text("The seed is a whole number, not 1.5.").first.wait_for()
    page.get_by_role("tab", name="Picture", exact=True).click()
    for name, content, refusal in (
        ("notes.png", b"<b>not a picture</b>", "not a whole picture"),
        ("huge.png", png_that_claims(30_000, 30_000), "too many pixels"),
    ):
        page.set_input_files("input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content})
        page.get_by_text(refusal).first.wait_for()
    assert page.get_attribute("#inhand img", "src") == re.search(r'src="([^"]+)"', views.preview(shown.image))[1], "still the one before"
    page.set_input_files("input[type=file]", {"name": "plate.png", "mimeType": "image/png", "buffer": file_of(picture)})
    page.wait_for_function("old => document.querySelector('#inhand img').src != old", arg=page.get_attribute("#inhand img", "src"))
    page.click("#caption")
    page.wait_for_selector("#said dd")
    (said,) = tiny_model.caption(picture, ["plain"])
    assert " ".join(page.locator("#said dd").first.inner_text().split()) == " ".join(said.text.split())
    assert page.get_by_text("not trained on questions").count() == 1
    assert asked <= {site.removeprefix("http://"), "data", "blob"}, "the page asks nobody else"
    assert not broken
    page.close()


def test_a_visitor_takes_home_what_was_liked_and_disliked_and_training_reads_it(site, browser, tiny_model, tmp_path):
    page = browser.new_page()
    page.goto(site)
    for seed, button in (("7", "#like"), ("8", "#dislike"), ("9", "#dislike")):
        page.fill("#seed input", seed)
        page.click("#generate")
        page.wait_for_selector(f"a[download='tokun-{seed}-00.json']")
        page.click(button)
        page.get_by_text(
            {"7": "1 liked, 0 disliked: 0 preferences", "8": "1 liked, 1 disliked: 1 preference", "9": "2 preferences"}[seed]
        ).wait_for()
    with page.expect_download() as download:
        page.click("a[download='tokun-preferences.jsonl']")
    shutil.copy(download.value.path(), tmp_path / "clicks.jsonl")
    found = preferences.read(str(tmp_path / "clicks.jsonl"), tiny_model.vocabulary, tiny_model.encode_text)
    v, drawn = tiny_model.vocabulary, {seed: tiny_model.sample(seed, 1)[0] for seed in (7, 8, 9)}
    assert [sequences.unpack(v, p.chosen.input_ids).codes for p in found] == [drawn[7].codes] * 2
    assert [sequences.unpack(v, p.rejected.input_ids).codes for p in found] == [drawn[9].codes, drawn[8].codes]
    page.close()


def test_a_link_draws_that_very_print_and_the_address_is_the_link(site, browser, tiny_model):
    page = browser.new_page()
    asked = "?seed=7&no=2&prompt=a+ship&style=etching&register=poetic&temperature=0.5"
    page.goto(f"{site}/{asked}")
    page.wait_for_selector("a[download='tokun-7-02.json']")
    (pair,) = tiny_model.sample(7, indices=[2], prompt="a ship", style="etching", register="poetic", temperature=0.5)
    with page.expect_download() as download:
        page.click("a[download$='.json']")
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8")) == json.loads(json.dumps(pair.record()))
    assert page.url == f"{site}/{asked}" and page.get_attribute("a.address", "href") == asked
    assert page.input_value("#prompt textarea") == "a ship" and page.get_by_label("Style").input_value() == "etching", "the form is filled"
    page.fill("#seed input", "8")
    page.click("#generate")
    page.wait_for_selector("a[download='tokun-8-00.json']")
    page.wait_for_function("() => location.search.startsWith('?seed=8&prompt=a+ship&style=etching')")
    with page.expect_download() as download:
        page.click("#keep")
    assert download.value.suggested_filename == "tokun-gallery.html"
    kept = Path(download.value.path()).read_text(encoding="utf-8")
    assert kept.count("<figure>") == 2 and f'href="{views.quoted(f"{site}/{asked}")}"' in kept
    page.goto(f"{site}/?from=42&to=43&steps=3&step=2")
    page.wait_for_selector("a[download='tokun-42-01.png']")
    assert page.get_by_role("tab", name="Two seeds").get_attribute("aria-selected") == "true"
    page.goto(f"{site}/?seed=7&style=cubism")
    page.get_by_text("does not know that style").first.wait_for()
    assert page.get_by_text("Nothing is printed yet.").count() == 1
    page.close()


KNOWN_VIOLATIONS: dict[str, str] = {}  # of Gradio, that nothing here can mend: axe's rule -> why


def test_the_page_is_used_by_keyboard_on_a_phone_and_has_no_accessibility_error(site, browser, tiny_model):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with the extra 'dev'").Axe()
    page = browser.new_page()
    page.set_viewport_size({"width": 390, "height": 844})

    def require_accessible(where: str) -> None:
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
            wrong = [(one["id"], node["html"]) for one in found if one["id"] not in KNOWN_VIOLATIONS for node in one["nodes"]]
            assert not wrong, f"{where}, {width} px: {wrong}"
        page.set_viewport_size({"width": 390, "height": 844})

    def press_until(key: str, reached: str, most: int = 20) -> None:
        for _ in range(most):
            page.keyboard.press(key)
            if page.evaluate("reached => document.activeElement.matches(reached)", reached):
                return
        raise AssertionError(f"{key} does not come to {reached}")

    page.goto(site)
    page.wait_for_selector("#more > button:not(.open)")
    assert not page.get_by_label("Temperature").first.is_visible() and page.locator("#generate").is_visible(), "folded on a phone"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the phone"
    assert page.get_by_role("tab").count() == 5 and all(tab.is_visible() for tab in page.get_by_role("tab").all())
    page.focus("#seed input")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    press_until("Tab", "#more > button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#more > button.open")
    press_until("Tab", "#generate")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "one sees where one is"
    page.keyboard.press("Enter")
    page.wait_for_selector("a[download='tokun-7-00.json']")
    (pair,) = tiny_model.sample(7, 1)
    heard = " ".join(page.locator(".heard[role=status]").inner_text().split())
    assert heard == " ".join(f"Printed: {pair.caption}".split()), "the print is told to those who hear the page"
    assert page.locator("#history .thumbnail-item").get_attribute("aria-label").startswith("Print 1 of 1: ")
    require_accessible("a print")
    page.get_by_role("tab", name="Compare").press("Enter")
    page.fill("#prompt-right textarea", "a ship")
    page.focus("#prompt-right textarea")
    page.keyboard.press("Enter")
    page.wait_for_selector(".versus:not(.drawing)")
    page.wait_for_selector("#right:enabled")
    page.locator("#right").press("Enter")
    page.wait_for_selector("#opinion a[download='tokun-preferences.jsonl']")
    require_accessible("two compared prints")
    for name in ("Picture", "Words", "Two seeds"):
        page.get_by_role("tab", name=name).press("Enter")
        page.wait_for_selector({"Picture": "#caption", "Words": "#rewrite", "Two seeds": "#walk"}[name])
        require_accessible(name)
    page.close()


def test_who_changes_their_mind_about_a_print_has_one_opinion_of_it(tiny_model):
    one, two = tiny_model.sample(3, 2)
    judged = visit.Judged().mark(one, liked=True).mark(two, liked=False).mark(one, liked=False)
    assert judged.better == () and judged.worse == (one, two) and not judged.files()
    assert visit.Judged().mark(one, liked=True).mark(two, liked=False).files().keys() == {"tokun-preferences.jsonl"}
    with pytest.raises(ValueError, match="no print yet"):
        judged.mark(None, liked=True)


@pytest.mark.parametrize(
    ("content", "refusal"), [(b"<b>not a picture</b>", "not a whole picture"), (b"", "choose a picture first")], ids=["no picture", "empty"]
)
def test_a_refusal_is_a_notice_that_goes_and_leaves_no_pill(site, browser, content, refusal):
    """A bad upload left a pill "Error" on the page until the next click; so did a seed that is no whole number."""
    page = browser.new_page()
    page.goto(site)
    page.get_by_role("tab", name="Picture", exact=True).click()
    page.set_input_files("input[type=file]", {"name": "notes.png", "mimeType": "image/png", "buffer": content})
    page.get_by_text(refusal).first.wait_for()
    page.wait_for_timeout(500)
    assert not page.get_by_text("Error", exact=True).count()
    page.click("#caption")
    page.get_by_text("Please choose a picture first").first.wait_for()
    page.wait_for_timeout(500)
    assert not page.get_by_text("Error", exact=True).count()
    page.close()


def test_the_page_shows_every_picture_in_its_shape_and_offers_shapes_and_things(shaped_model):
    pytest.importorskip("gradio", reason="the page needs gradio, the extra 'app'")
    tall = Image.new("L", (24, 40))
    assert 'style="aspect-ratio: 24 / 40; width: 60%; margin: 0 auto"' in views.figure(tall, "a") and "style" not in views.figure(
        Image.new("L", (32, 32)), "a"
    )
    seen = demo.Studio(shaped_model).framed(Image.effect_noise((300, 75), 90))
    assert seen.size == (256, 64) and demo.Studio(shaped_model).framed(tall).tobytes() == tall.tobytes()
    page = app.build(shaped_model)
    shown = {block.label: block.visible for block in page.blocks.values() if getattr(block, "label", "") in ("Thing", "Shape")}
    assert shown == {"Thing": True, "Shape": True}


# --- the Space --------------------------------------------------------------------------------------------------------


def test_the_space_says_what_hugging_face_asks_for_and_builds_the_page(checkpoint_folder, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the Space needs gradio, the extra 'app'")
    header = yaml.safe_load((ROOT / "space" / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and re.fullmatch(r"6\.\d+\.\d+", header["sdk_version"]) and len(header["short_description"]) <= 60
    (required,) = (ROOT / "space" / "requirements.txt").read_text(encoding="utf-8").split("\n")[:-1]
    extras = re.fullmatch(r"tokun\[([a-z,]+)\] @ git\+https://\S+", required).group(1).split(",")
    known = re.findall(r"(?m)^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "app" in extras and set(extras) <= set(known)
    monkeypatch.setenv("TOKUN_CHECKPOINT", str(checkpoint_folder))
    assert isinstance(runpy.run_path(str(ROOT / "space" / header["app_file"]))["demo"], gradio.Blocks)

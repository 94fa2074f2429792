"""The demo: what visitors may ask for, how a pair appears, and the page itself in a real browser."""

from __future__ import annotations

import asyncio
import base64
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
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools import toy
from tokun.app import demo, views
from tokun.app import page as app
from tokun.app.gate import Gate
from tokun.inference import preferences
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
    assert taught.can_answer and taught.answer(picture, "what is shown?")[0].text


def test_what_cannot_be_done_with_a_picture_is_said(studio, tiny_model, picture):
    assert not studio.can_answer
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
    files = {name: base64.b64decode(uri.partition(",")[2]) for name, uri in demo.keepsakes(pair).items()}
    assert sorted(files) == ["tokun-9-00.json", "tokun-9-00.png", "tokun-9-00.svg"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["tokun-9-00.png"]))), np.asarray(pair.image))
    assert json.loads(files["tokun-9-00.json"]) == json.loads(json.dumps(pair.record()))
    assert files["tokun-9-00.svg"].startswith(b"<svg") and len(files["tokun-9-00.svg"]) <= 10_000


def test_a_visit_is_remembered_newest_first_each_pair_once_and_not_for_ever(tiny_model):
    old, new = tiny_model.sample(1, 16), tiny_model.sample(2, 16)
    kept = demo.remember(demo.remember([], old), [*new, *old[:2]])
    assert len(kept) == demo.REMEMBERED and tokens(kept[:18]) == tokens([*new, *old[:2]]) and tokens(kept[18:]) == tokens(old[2:8])


def test_words_are_shown_as_words_whatever_stands_in_them(tiny_model):
    (pair,) = tiny_model.sample(9, 1)
    page = views.plate([replace(pair, caption='"><script>alert(1)</script> ${1+1} {{7*7}} `x`')])
    assert "<script" not in page and not set("${}`") & set(re.sub(r"&#\d+;", "", page)) and "&lt;script&gt;" in page


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tiny_model) -> str:
    """The address of a running demo."""
    pytest.importorskip("gradio", reason="the demo needs gradio, the extra 'app'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = app.build(tiny_model)
    app.serve(page, port=port, wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


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
            head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: multipart/form-data; boundary={boundary}\r\nContent-Length: {length or len(body)}\r\n\r\n"
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
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright, the extra 'dev'")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
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

    page.get_by_role("tab", name="Between two seeds").click()
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

    page.get_by_role("tab", name="From a picture").click()
    page.get_by_role("button", name="Take the print").click()
    page.wait_for_selector("#inhand img")
    assert page.get_attribute("#inhand img", "src") == re.search(r'src="([^"]+)"', views.preview(shown.image))[1], "the one that is shown"
    page.get_by_role("tab", name="From a seed").click()
    page.fill("#seed input", "1.5")
    page.click("#generate")
    page.get_by_text("The seed is a whole number, not 1.5.").first.wait_for()
    page.get_by_role("tab", name="From a picture").click()
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


def test_who_changes_their_mind_about_a_print_has_one_opinion_of_it(tiny_model):
    one, two = tiny_model.sample(3, 2)
    judged = demo.Judged().mark(one, liked=True).mark(two, liked=False).mark(one, liked=False)
    assert judged.better == () and judged.worse == (one, two) and not judged.files()
    assert demo.Judged().mark(one, liked=True).mark(two, liked=False).files().keys() == {"tokun-preferences.jsonl"}
    with pytest.raises(ValueError, match="no print yet"):
        judged.mark(None, liked=True)


@pytest.mark.parametrize(
    ("content", "refusal"), [(b"<b>not a picture</b>", "not a whole picture"), (b"", "choose a picture first")], ids=["no picture", "empty"]
)
def test_a_refusal_is_a_notice_that_goes_and_leaves_no_pill(site, browser, content, refusal):
    """A bad upload left a pill "Error" on the page until the next click; so did a seed that is no whole number."""
    page = browser.new_page()
    page.goto(site)
    page.get_by_role("tab", name="From a picture").click()
    page.set_input_files("input[type=file]", {"name": "notes.png", "mimeType": "image/png", "buffer": content})
    page.get_by_text(refusal).first.wait_for()
    page.wait_for_timeout(500)
    assert not page.get_by_text("Error", exact=True).count()
    page.click("#caption")
    page.get_by_text("Please choose a picture first").first.wait_for()
    page.wait_for_timeout(500)
    assert not page.get_by_text("Error", exact=True).count()
    page.close()


def test_the_page_shows_every_picture_in_its_shape_and_offers_shapes_and_things(shaped_model, tiny_model):
    pytest.importorskip("gradio", reason="the page needs gradio, the extra 'app'")
    tall = Image.new("L", (24, 40))
    assert 'style="aspect-ratio: 24 / 40; width: 60%; margin: 0 auto"' in views.figure(tall, "a") and "style" not in views.figure(
        Image.new("L", (32, 32)), "a"
    )
    seen = demo.Studio(shaped_model).framed(Image.effect_noise((300, 75), 90))
    assert seen.size == (256, 64) and demo.Studio(shaped_model).framed(tall).tobytes() == tall.tobytes()
    for model, offered in (
        (shaped_model, {"Thing": True, "Shape": True}),
        (replace(tiny_model, vocabulary=replace(tiny_model.vocabulary, grids=((4, 4),))), {"Thing": False, "Shape": False}),
    ):
        page = app.build(model)
        assert {block.label: block.visible for block in page.blocks.values() if getattr(block, "label", "") in offered} == offered


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

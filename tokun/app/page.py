"""The demo: a page on which a seed becomes a print and its words. Knows the page and its look; what it does is demo.py.

    python -m tokun.app                                   the bundled model, http://127.0.0.1:7860
    python -m tokun.app --checkpoint runs/tiny --port 8000
    python -m tokun.app --host 0.0.0.0                    for others; --share for a public address by Gradio

Made to stand on the open web: one drawing at a time, a short queue, checked input, nothing sent to third parties, no file of
the server within reach. Needs the extra `app` (and `svg`, for traced drawings).
"""

import argparse
import functools
import html
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokun.app import demo
from tokun.app.gate import Gate
from tokun.inference import directions
from tokun.render.grids import gif, strip
from tokun.utils.extras import need

STYLE = Path(__file__).with_suffix(".css")
QUEUE, SESSIONS, HOUR = 20, 200, 3600
TITLE = "One seed, one sequence: a picture, and the words for it."
SHOW_PLATE = "() => { const plate = document.getElementById('plate'); if (plate.getBoundingClientRect().bottom < 80) plate.scrollIntoView({behavior: 'smooth'}); }"
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
LANE = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal", "api_visibility": "private"}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import tokun

    page = build(tokun.load(args.checkpoint, device=args.device, adapter=args.adapter))
    serve(page, host=args.host, port=args.port, share=args.share)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokun.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None, help="a folder or a Hugging Face Hub id; default: the bundled engraving model")
    parser.add_argument("--adapter", default=None, help="an adapter (LoRA) that was trained on the checkpoint: a folder or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument("--share", action="store_true", help="a public address by Gradio's relay")
    parser.add_argument("--device", default=None, help="cpu, cuda …; default: a GPU if there is one")
    return parser.parse_args(argv)


def serve(page: Any, *, host: str = "127.0.0.1", port: int = 7860, share: bool = False, wait: bool = True) -> Any:
    """Start the server; returns what Gradio's `launch` does once it is closed, or at once where `wait` is False."""
    from starlette.middleware import Middleware

    gr = gradio()
    page.queue(max_size=QUEUE, default_concurrency_limit=4, api_open=False)
    host = host.strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}, port {port}: cannot be listened on ({error}). Choose another --host or --port") from error
    return page.launch(
        server_name=f"[{host}]" if ":" in host else host, server_port=port, share=share, prevent_thread_lock=not wait, quiet=not wait, ssr_mode=False, show_error=False,
        max_file_size=demo.MAX_FILE_BYTES, allowed_paths=[], state_session_capacity=SESSIONS, max_threads=16, footer_links=[], enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Gate, max_file_bytes=demo.MAX_FILE_BYTES)], "docs_url": None, "redoc_url": None, "openapi_url": None},
        theme=gr.themes.Base(font=["Georgia", "serif"], font_mono=["monospace"]), css_paths=STYLE,
        js="() => document.body.classList.remove('dark')",
    )  # fmt: skip


def gradio() -> Any:
    """Gradio, told beforehand to report nothing to anybody."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return need("gradio", extra="app")


# --- views: a pair -> HTML --------------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """Text as HTML that neither a browser nor Gradio's templates take for more than text."""
    return html.escape(text).translate({ord(c): f"&#{ord(c)};" for c in "{}$`\\"})


def figure(image: Image.Image, caption: str, note: str = "", *, side: int = 512) -> str:
    shown = f'<img decoding="sync"{shape(image)} alt="{quoted(caption)}" src="{demo.data_uri(demo.enlarged(image, side))}">'
    return f"<figure>{shown}<figcaption>{quoted(caption) or '&nbsp;'}<small>{quoted(note) or '&nbsp;'}</small></figcaption></figure>"


def shape(image: Image.Image) -> str:
    """The attribute that gives a picture its own shape in a square place; a square has none."""
    width, height = image.size
    return (
        ""
        if width == height
        else f' style="aspect-ratio: {width} / {height}; width: {min(100, 100 * width / height):.4g}%; margin: 0 auto"'
    )


def plate(pairs: Sequence[Any], files: dict[str, str] | None = None) -> str:
    """One pair large, several as a sheet; below them what can be taken home."""
    kind, side = ("one", 512) if len(pairs) == 1 else ("sheet two", 320) if len(pairs) <= 4 else ("sheet three", 256)
    figures = "".join(figure(pair.image, pair.caption, signature(pair) if kind == "one" else "", side=side) for pair in pairs)
    return f'<div class="plate {kind}">{figures}</div>{links(files or {})}'


def signature(pair: Any) -> str:
    tags = " · ".join(word.replace("-", " ") for word in (pair.tags.style, pair.tags.subject, pair.tags.thing) if word)
    return f"seed {pair.seed}, no. {pair.index}" + (f" · {tags}" if tags else "")


def sketched(sketch: demo.Sketch) -> str:
    return f'<div class="plate one drawing">{figure(sketch.image, sketch.caption, "being drawn …")}</div>{links({})}'


def links(files: dict[str, str]) -> str:
    found = "".join(f'<a download="{quoted(name)}" href="{uri}">{quoted(Path(name).suffix[1:].upper())}</a>' for name, uri in files.items())
    return f'<nav class="files">{"Take it home: " + found if found else "&nbsp;"}</nav>'


def spoken(words: Sequence[directions.Words]) -> str:
    rows = "".join(
        f"<dt>{quoted(w.register or 'answer')}<small>confidence {w.confidence:.2f}</small></dt><dd>{quoted(w.text)}</dd>" for w in words
    )
    return f'<dl class="words">{rows}</dl>'


def preview(image: Image.Image) -> str:
    return f'<div class="plate preview"><figure><img{shape(image)} alt="the picture in hand" src="{demo.data_uri(demo.enlarged(image, 256))}"></figure></div>'


EMPTY = '<div class="plate one empty"><figure><div class="sheet-of-paper"></div><figcaption>Nothing is printed yet.<small>&nbsp;</small></figcaption></figure></div>'


# --- the page ---------------------------------------------------------------------------------------------------------


def build(model: Any) -> Any:
    """The page of a model, a `gradio.Blocks`; `serve` it."""
    gr, studio = gradio(), demo.Studio(model)

    def polite(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """A visitor's mistake as a notice on the page."""

        @functools.wraps(work)
        def working(*args: Any) -> Iterator[Any]:
            try:
                yield from work(*args)
            except ValueError as error:
                raise gr.Error(quoted(str(error)), duration=8, print_exception=False) from None

        return working

    def printed(pairs: list[Any], history: list[Any], shown: str | None = None) -> tuple[Any, ...]:
        """-> plate, current pair, history, its gallery"""
        kept = demo.remember(history, pairs)
        return shown or plate(pairs), pairs[0], kept, [(demo.enlarged(p.image, 192), p.caption) for p in kept]

    @polite
    def on_draw(seed, n, prompt, style, subject, thing, register, aspect, temperature, guidance, history):
        wishes = {
            "prompt": prompt,
            "style": style,
            "subject": subject,
            "thing": thing,
            "register": register,
            "aspect": aspect,
            "temperature": temperature,
            "guidance": guidance,
        }
        for news in studio.draw(seed, n, **wishes):
            if isinstance(news, demo.Sketch):
                yield sketched(news), gr.skip(), gr.skip(), gr.skip()
            else:
                yield printed(news, history)
                if len(news) == 1:
                    yield plate(news, demo.keepsakes(news[0])), gr.skip(), gr.skip(), gr.skip()

    @polite
    def on_walk(first, last, steps, temperature):
        for news in studio.between(first, last, steps, temperature=temperature):
            if isinstance(news, demo.Sketch):
                yield sketched(news), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            else:
                images, name = [pair.image for pair in news], f"tokun-{int(first)}-{int(last)}"
                files = {f"{name}.gif": demo.inline(gif(images), "image/gif"), f"{name}-strip.png": demo.data_uri(strip(images), "PNG")}
                yield (
                    plate(news[:1], demo.keepsakes(news[0])),
                    news[0],
                    news,
                    gr.update(maximum=len(news), value=1, interactive=True),
                    way(images) + links(files),
                )

    @polite
    def on_step(step, pairs):
        if pairs:
            pair = pairs[demo.whole(step, 1, len(pairs), "step") - 1]
            yield plate([pair], demo.keepsakes(pair)), pair

    @polite
    def on_upload(content):
        picture = demo.open_upload(content, model.image_tokenizer.config.image_channels)
        yield picture, preview(studio.framed(picture)), ""

    @polite
    def on_take(current):
        if current is None:
            raise ValueError("There is no print yet: draw one first.")
        yield current.image, preview(current.image), ""

    @polite
    def on_caption(picture, registers):
        yield spoken(studio.say(picture, registers))

    @polite
    def on_ask(picture, question):
        yield spoken(studio.answer(picture, question))

    @polite
    def on_vary(picture, caption, amount, seed, history):
        yield printed(studio.vary(picture, caption, amount, seed), history)

    @polite
    def on_complete(picture, keep, seed, history):
        yield printed(studio.complete(picture, keep, seed), history)

    @polite
    def on_recall(history, event: gr.SelectData):
        if not history:
            raise ValueError("This print is no longer kept here, but its seed still draws it.")
        pair = history[demo.whole(event.index, 0, len(history) - 1, "number")]
        yield plate([pair], demo.keepsakes(pair)), pair

    def on_judge(liked: bool) -> Callable[..., Iterator[Any]]:
        @polite
        def judge(current, judged):
            now = judged.mark(current, liked=liked)
            yield now, opinion(now)

        return judge

    with gr.Blocks(title="tokun", analytics_enabled=False, delete_cache=(HOUR // 4, HOUR), fill_width=True) as page:
        history, current, picture, steps_made = (gr.State(value, time_to_live=HOUR) for value in ([], None, None, []))
        judged = gr.State(demo.Judged(), time_to_live=HOUR)
        gr.HTML(f"<header><h1>tokun</h1><p>{TITLE}</p></header>")
        with gr.Row(elem_classes="room"):
            with gr.Column(scale=6, min_width=340):
                shown = gr.HTML(EMPTY, elem_id="plate")
            with gr.Column(scale=5, min_width=340), gr.Tabs():
                with gr.Tab("From a seed"):
                    with gr.Row(elem_classes="seed"):
                        seed = gr.Number(42, label="Seed", elem_id="seed")  # checked where it is used: gradio would round it
                        dice = gr.Button("Roll the dice", min_width=120)
                    prompt = gr.Textbox(label="What it shows, in words (may stay empty)", max_length=demo.MAX_TEXT, elem_id="prompt")
                    with gr.Row():
                        style = gr.Dropdown(named(studio.styles), value="", label="Style", min_width=120)
                        subject = gr.Dropdown(named(studio.subjects), value="", label="Subject", min_width=120)
                        thing = gr.Dropdown(named(studio.things), value="", label="Thing", min_width=120, visible=len(studio.things) > 1)
                        register = gr.Dropdown(named(studio.registers), value=studio.registers[0], label="Register", min_width=120)
                        aspect = gr.Dropdown(list(studio.aspects), value="", label="Shape", min_width=120, visible=len(model.grids) > 1)
                    with gr.Row():
                        default = model.defaults.temperature
                        temperature = gr.Slider(*demo.TEMPERATURES, default, step=0.05, label="Temperature", info="how daring")
                        guidance = gr.Slider(*demo.GUIDANCES, 1.0, step=0.25, label="Guidance", info="how literal; 1 is off")
                    count = gr.Slider(1, demo.MAX_PAIRS, 1, step=1, label="Prints of this seed")
                    draw = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Tab("Between two seeds"):
                    with gr.Row():
                        first = gr.Number(42, label="From seed")
                        last = gr.Number(43, label="to seed")
                    steps = gr.Slider(2, demo.MAX_PAIRS, 8, step=1, label="Steps")
                    walk = gr.Button("Walk from one to the other", variant="primary", elem_id="walk")
                    step = gr.Slider(1, demo.MAX_PAIRS, 1, step=1, label="Step", interactive=False, elem_id="step")
                    taken = gr.HTML(elem_id="way")
                with gr.Tab("From a picture"):
                    with gr.Row():
                        upload = gr.UploadButton(
                            "Upload a picture",
                            type="binary",
                            file_types=[f".{kind}" for kind in ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")],
                            elem_id="upload",
                        )
                        take = gr.Button("Take the print")
                    inhand = gr.HTML(elem_id="inhand")
                    said = gr.HTML(elem_id="said")
                    voices = gr.CheckboxGroup(
                        named(studio.registers), value=studio.registers[:2], label="Say what it shows, in these registers"
                    )
                    caption = gr.Button("Caption it", variant="primary", elem_id="caption")
                    if studio.can_answer:
                        question = gr.Textbox(label="Ask about it", max_length=demo.MAX_TEXT, elem_id="question")
                        ask = gr.Button("Ask", elem_id="ask")
                        ask.click(on_ask, [picture, question], said, **LANE)
                    else:
                        gr.HTML('<p class="aside">This model was not trained on questions, so it cannot be asked about a picture.</p>')
                    with gr.Row():
                        meaning = gr.Textbox(label="What it shows", placeholder="the model's own words", max_length=demo.MAX_TEXT)
                        amount = gr.Slider(0, 1, 0.1, step=0.05, label="Distance", info="how much is drawn anew; 1: all of it")
                    vary = gr.Button("Variations", elem_id="vary")
                    with gr.Row(elem_classes="level"):
                        keep = gr.Radio(list(directions.KEEP), value="top", label="Keep one half")
                        complete = gr.Button("Draw the rest anew", elem_id="complete")
        gallery = gr.Gallery(
            label="Printed in this visit",
            columns=8,
            height="auto",
            fit_columns=False,
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="history",
        )
        with gr.Row(elem_classes="level"):
            like = gr.Button("I like this print", min_width=120, elem_id="like")
            dislike = gr.Button("I do not", min_width=120, elem_id="dislike")
            opinions = gr.HTML(opinion(demo.Judged()), elem_id="opinions")
        gr.HTML(f"<footer>{colophon(model)}</footer>")

        result = [shown, current, history, gallery]
        dice.click(lambda: random.randrange(demo.MAX_SEED + 1), None, seed, queue=False, **QUIET)
        wishes = [seed, count, prompt, style, subject, thing, register, aspect, temperature, guidance]
        gr.on([draw.click, prompt.submit], on_draw, [*wishes, history], result, show_progress_on=shown, **LANE)
        walk.click(on_walk, [first, last, steps, temperature], [shown, current, steps_made, step, taken], show_progress_on=shown, **LANE)
        step.input(on_step, [step, steps_made], [shown, current], trigger_mode="always_last", **QUIET)
        upload.upload(on_upload, upload, [picture, inhand, said], **QUIET)
        take.click(on_take, current, [picture, inhand, said], **QUIET)
        caption.click(on_caption, [picture, voices], said, **LANE)
        vary.click(on_vary, [picture, meaning, amount, seed, history], result, show_progress_on=shown, **LANE)
        complete.click(on_complete, [picture, keep, seed, history], result, show_progress_on=shown, **LANE)
        gr.on([draw.click, walk.click, vary.click, complete.click], None, js=SHOW_PLATE, queue=False, **QUIET)
        like.click(on_judge(True), [current, judged], [judged, opinions], **QUIET)
        dislike.click(on_judge(False), [current, judged], [judged, opinions], **QUIET)
        gallery.select(on_recall, history, [shown, current], **QUIET)
    return page


def opinion(judged: demo.Judged) -> str:
    """What was liked and disliked, and the file of it."""
    return f'<p class="aside">{quoted(judged.told())}</p>{links(judged.files())}'


def named(words: Sequence[str]) -> list[tuple[str, str]]:
    return [(word.replace("-", " ") or "as it comes", word) for word in words]


def way(images: Sequence[Image.Image]) -> str:
    shown = "".join(f'<img alt="" src="{demo.data_uri(demo.enlarged(image, 96))}">' for image in images)
    return f'<div class="strip">{shown}</div>'


def colophon(model: Any) -> str:
    size = sum(parameter.numel() for parameter in model.generator.parameters())
    few, many = (pick(rows * columns for rows, columns in model.grids) for pick in (min, max))
    return (
        f"One model of {size / 1e6:.1f} million parameters draws {many if few == many else f'{few} to {many}'} codes of a picture, then its words. "
        "The same seed and wishes give the same pair. What it draws and says is made up."
    )

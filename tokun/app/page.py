"""The demo: a page on which a seed becomes a print and its words. Its layout; what its buttons do is events.py, and demo.py without a page.

    tokun app                                   the bundled model, http://127.0.0.1:7860
    tokun app --checkpoint runs/tiny --port 8000
    tokun app --host 0.0.0.0                    for others; --share for a public address by Gradio

Made to stand on the open web: one drawing at a time, a short queue, checked input, nothing sent to third parties, no file of
the server within reach. Needs the extra `app` (and `svg`, for traced drawings).
"""

import argparse
import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokun.app import demo, views
from tokun.app.events import Events
from tokun.app.gate import Gate
from tokun.inference import conditional_generation
from tokun.utils import console
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

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


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.app", __doc__)
    parser.add_argument("--checkpoint", default=None, help="a folder or a Hugging Face Hub id; default: the bundled engraving model")
    parser.add_argument("--adapter", default=None, help="an adapter (LoRA) that was trained on the checkpoint: a folder or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument("--share", action="store_true", help="a public address by Gradio's relay")
    parser.add_argument("--device", default=None, help="cpu, cuda …; default: a GPU if there is one")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


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
        raise UserError(f"{host}, port {port}: cannot be listened on ({error}). Choose another --host or --port") from error
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


# --- the page ---------------------------------------------------------------------------------------------------------


def build(model: Any) -> Any:
    """The page of a model, a `gradio.Blocks`; `serve` it."""
    gr, studio = gradio(), demo.Studio(model)
    events = Events(gr, studio, model.image_tokenizer.config.image_channels)
    with gr.Blocks(title="tokun", analytics_enabled=False, delete_cache=(HOUR // 4, HOUR), fill_width=True) as page:
        kept = Part(**{name: gr.State(value, time_to_live=HOUR) for name, value in KEPT.items()})
        gr.HTML(f"<header><h1>tokun</h1><p>{TITLE}</p></header>")
        with gr.Row(elem_classes="room"):
            with gr.Column(scale=6, min_width=340):
                plate = gr.HTML(views.EMPTY, elem_id="plate")
            with gr.Column(scale=5, min_width=340), gr.Tabs():
                seeds = from_a_seed(gr, studio, model)
                between = between_two_seeds(gr)
                pictures = from_a_picture(gr, studio)
        gallery = gr.Gallery(
            label="Printed in this visit", columns=8, height="auto", fit_columns=False, allow_preview=False, interactive=False, buttons=[],
            elem_id="history",
        )  # fmt: skip
        opinions = of_the_print(gr)
        gr.HTML(f"<footer>{views.colophon(model)}</footer>")
        connect(gr, events, kept, plate, gallery, seeds, between, pictures)
        judged = {"inputs": [kept.current, kept.judged], "outputs": [kept.judged, opinions.told], **QUIET}
        opinions.like.click(events.like, **judged)
        opinions.dislike.click(events.dislike, **judged)
    return page


Part = SimpleNamespace  # a part of the page: its components by name
KEPT = {"history": [], "current": None, "picture": None, "steps": [], "judged": demo.Judged()}  # of a visit


def from_a_seed(gr: Any, studio: demo.Studio, model: Any) -> Part:
    """The first tab."""
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
            defaults = model.defaults
            temperature = gr.Slider(
                *demo.including(demo.TEMPERATURES, defaults.temperature),
                defaults.temperature,
                step=0.05,
                label="Temperature",
                info="how daring",
            )
            guidance = gr.Slider(
                *demo.including(demo.GUIDANCES, defaults.guidance_scale),
                defaults.guidance_scale,
                step=0.25,
                label="Guidance",
                info="how literal; 1 is off",
            )
        count = gr.Slider(1, demo.MAX_PAIRS, 1, step=1, label="Prints of this seed")
        draw = gr.Button("Generate", variant="primary", elem_id="generate")
    wishes = [seed, count, prompt, style, subject, thing, register, aspect, temperature, guidance]
    return Part(seed=seed, dice=dice, prompt=prompt, temperature=temperature, draw=draw, wishes=wishes)


def between_two_seeds(gr: Any) -> Part:
    """The second tab."""
    with gr.Tab("Between two seeds"):
        with gr.Row():
            first = gr.Number(42, label="From seed")
            last = gr.Number(43, label="to seed")
        count = gr.Slider(2, demo.MAX_PAIRS, 8, step=1, label="Steps")
        walk = gr.Button("Walk from one to the other", variant="primary", elem_id="walk")
        step = gr.Slider(1, demo.MAX_PAIRS, 1, step=1, label="Step", interactive=False, elem_id="step")
        taken = gr.HTML(elem_id="way")
    return Part(first=first, last=last, count=count, walk=walk, step=step, taken=taken)


def from_a_picture(gr: Any, studio: demo.Studio) -> Part:
    """The third tab. Its `question` and `ask` are None for a model that cannot answer."""
    question = ask = None
    with gr.Tab("From a picture"):
        with gr.Row():
            kinds = [f".{kind}" for kind in ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")]
            upload = gr.UploadButton("Upload a picture", type="binary", file_types=kinds, elem_id="upload")
            take = gr.Button("Take the print")
        shown = gr.HTML(elem_id="inhand")
        said = gr.HTML(elem_id="said")
        voices = gr.CheckboxGroup(named(studio.registers), value=studio.registers[:2], label="Say what it shows, in these registers")
        caption = gr.Button("Caption it", variant="primary", elem_id="caption")
        if studio.can_answer:
            question = gr.Textbox(label="Ask about it", max_length=demo.MAX_TEXT, elem_id="question")
            ask = gr.Button("Ask", elem_id="ask")
        else:
            gr.HTML('<p class="aside">This model was not trained on questions, so it cannot be asked about a picture.</p>')
        with gr.Row():
            meaning = gr.Textbox(label="What it shows", placeholder="the model's own words", max_length=demo.MAX_TEXT)
            amount = gr.Slider(0, 1, 0.1, step=0.05, label="Distance", info="how much is drawn anew; 1: all of it")
        vary = gr.Button("Variations", elem_id="vary")
        with gr.Row(elem_classes="level"):
            keep = gr.Radio(list(conditional_generation.KEEP), value="top", label="Keep one half")
            complete = gr.Button("Draw the rest anew", elem_id="complete")
    return Part(
        upload=upload, take=take, shown=shown, said=said, voices=voices, caption=caption, question=question, ask=ask, meaning=meaning,
        amount=amount, vary=vary, keep=keep, complete=complete,
    )  # fmt: skip


def of_the_print(gr: Any) -> Part:
    """Below the gallery: what the visitor thinks of the print."""
    with gr.Row(elem_classes="level"):
        like = gr.Button("I like this print", min_width=120, elem_id="like")
        dislike = gr.Button("I do not", min_width=120, elem_id="dislike")
    return Part(like=like, dislike=dislike, told=gr.HTML(views.opinion(demo.Judged()), elem_id="opinion"))


def connect(gr: Any, events: Events, kept: Part, plate: Any, gallery: Any, seeds: Part, between: Part, pictures: Part) -> None:
    """Connect the components with the events: what sets one off, what it reads, what it writes."""
    p, printed, on_plate = pictures, [plate, kept.current, kept.history, gallery], {"show_progress_on": plate, **LANE}
    seeds.dice.click(lambda: random.randrange(demo.MAX_SEED + 1), None, seeds.seed, queue=False, **QUIET)
    gr.on([seeds.draw.click, seeds.prompt.submit], events.draw, [*seeds.wishes, kept.history], printed, **on_plate)
    ends = [between.first, between.last, between.count, seeds.temperature]
    between.walk.click(events.walk, ends, [plate, kept.current, kept.steps, between.step, between.taken], **on_plate)
    between.step.input(events.step, [between.step, kept.steps], [plate, kept.current], trigger_mode="always_last", **QUIET)
    p.upload.upload(events.upload, p.upload, [kept.picture, p.shown, p.said], **QUIET)
    p.take.click(events.take, kept.current, [kept.picture, p.shown, p.said], **QUIET)
    p.caption.click(events.caption, [kept.picture, p.voices], p.said, **LANE)
    if p.ask is not None:
        p.ask.click(events.ask, [kept.picture, p.question], p.said, **LANE)
    p.vary.click(events.vary, [kept.picture, p.meaning, p.amount, seeds.seed, kept.history], printed, **on_plate)
    p.complete.click(events.complete, [kept.picture, p.keep, seeds.seed, kept.history], printed, **on_plate)
    gr.on([seeds.draw.click, between.walk.click, p.vary.click, p.complete.click], None, js=SHOW_PLATE, queue=False, **QUIET)

    def recall(history: list[Any], event: gr.SelectData):  # pyright: ignore[reportInvalidTypeForm]  # gr is imported where it is needed; Gradio reads the annotation
        yield from events.recall(event.index, history)

    gallery.select(recall, kept.history, [plate, kept.current], **QUIET)


def named(words: Sequence[str]) -> list[tuple[str, str]]:
    return [(word.replace("-", " ") or "as it comes", word) for word in words]

"""The demo: a page on which a seed becomes a print and its words. This is its layout; events.py is what its buttons do.

    tokun app                                   the bundled model, http://127.0.0.1:7860
    tokun app --checkpoint runs/tiny --port 8000
    tokun app --host 0.0.0.0                    for others; --share for a public link through Gradio's relay

Made for the open web: one drawing at a time, a short queue, checked input, nothing sent to third parties, no access to files of the
server. Needs the extra `app` (and `svg`, for traced drawings).
"""

import argparse
import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokun.app import demo, views, visit
from tokun.app.events import Events
from tokun.app.gate import Gate
from tokun.inference import conditional_generation
from tokun.utils import console
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

STYLE, SCRIPT = (Path(__file__).with_suffix(kind) for kind in (".css", ".js"))
QUEUE, SESSIONS, HOUR = 20, 200, 3600
TITLE = "One seed, one sequence: a picture, and the words for it."
SHOW_PLATE = (
    "() => { const plate = document.getElementById('plate'); "
    "if (plate.getBoundingClientRect().bottom < 80) plate.scrollIntoView({behavior: 'smooth'}); }"
)
TAKE = "() => document.querySelector('#kept a[download]')?.click()"
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
LANE = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal", "api_visibility": "private"}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import tokun
    from tokun.serving.backend import served

    model = tokun.load(args.checkpoint, device=args.device, adapter=args.adapter)
    page = build(model if args.backend is None else served(model, args.backend))
    serve(page, host=args.host, port=args.port, share=args.share)


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.app", __doc__)
    parser.add_argument("--checkpoint", default=None, help="a folder or a Hugging Face Hub id; default: the bundled engraving model")
    parser.add_argument(
        "--adapter",
        action="append",
        default=None,
        help="an adapter (LoRA) that was trained on the checkpoint: a folder or a Hub id; given several times, visitors may compare them",
    )
    parser.add_argument(
        "--backend",
        default=None,
        metavar="URL",
        help="a vLLM server of the checkpoint that draws the pairs (docs/guides/serving.md): http://localhost:8000",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 accepts connections from other machines, which use this machine's name or address (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's relay")
    parser.add_argument("--device", default=None, help="cpu, cuda …; default: a GPU if there is one")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def serve(page: Any, *, host: str = "127.0.0.1", port: int = 7860, share: bool = False, wait: bool = True) -> Any:
    """Start the server. Returns what Gradio's `launch` returns, once the server is closed, or at once if `wait` is False."""
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
    if wait:
        print(f"The demo will be at {addresses(host, port)} in a moment; Ctrl-C ends it", flush=True)
    return page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=share,
        prevent_thread_lock=not wait,
        quiet=not share,
        ssr_mode=False,
        show_error=False,
        max_file_size=demo.MAX_FILE_BYTES,
        allowed_paths=[],
        state_session_capacity=SESSIONS,
        max_threads=16,
        footer_links=[],
        enable_monitoring=False,
        app_kwargs={
            "middleware": [Middleware(Gate, max_file_bytes=demo.MAX_FILE_BYTES)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
        theme=gr.themes.Base(font=["Georgia", "serif"], font_mono=["monospace"]),
        css_paths=STYLE,
        js=SCRIPT.read_text(encoding="utf-8"),
    )


def addresses(host: str, port: int) -> str:
    """The addresses for a browser on this machine and, if other machines may connect, on those."""
    if host in ("0.0.0.0", "::"):
        return f"http://127.0.0.1:{port}, for others at http://{socket.gethostname()}:{port}"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def gradio() -> Any:
    """Gradio, with its reports to others turned off before it is imported."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return need("gradio", extra="app")


# --- the page ---------------------------------------------------------------------------------------------------------


def build(model: Any) -> Any:
    """The page of a model: a `gradio.Blocks` for `serve`."""
    gr, studio = gradio(), demo.Studio(model)
    events = Events(gr, studio, model.image_tokenizer.config.image_channels)
    with gr.Blocks(title="tokun", analytics_enabled=False, delete_cache=(HOUR // 4, HOUR), fill_width=True) as page:
        kept = Part(**{name: gr.State(value, time_to_live=HOUR) for name, value in KEPT.items()})
        gr.HTML(f"<header><h1>tokun</h1><p>{TITLE}</p></header>")
        with gr.Row(elem_classes="room"):
            with gr.Column(scale=6, min_width=340):
                plate = gr.HTML(views.EMPTY, elem_id="plate")
            with gr.Column(scale=5, min_width=340), gr.Tabs() as tabs:
                seeds = from_a_seed(gr, studio)
                between = between_two_seeds(gr)
                pictures = from_a_picture(gr, studio)
                sides = compared(gr, studio)
                words = from_words(gr, studio)
        gallery = gr.Gallery(
            label="Printed in this visit", columns=8, height="auto", fit_columns=False, allow_preview=False, interactive=False, buttons=[],
            elem_id="history",
        )  # fmt: skip
        opinions = of_the_print(gr)
        gr.HTML(f"<footer>{views.colophon(model)}</footer>")
        shown = Part(plate=plate, gallery=gallery, tabs=tabs)
        connect_seeds(gr, events, kept, shown, seeds, between)
        connect_pictures(gr, events, kept, shown, seeds, pictures, words)
        connect_opinions(gr, events, kept, shown, seeds, sides, opinions)
        connect_links(gr, page, events, kept, shown, seeds, between)
    return page


Part = SimpleNamespace  # a part of the page: its components by name
KEPT = {"history": [], "current": None, "picture": None, "steps": [], "two": [], "judged": visit.Judged(), "asked": None}  # per visit


def from_a_seed(gr: Any, studio: demo.Studio) -> Part:
    """The first tab. `wishes` are its fields in the order of `links.WISHES`."""
    known, defaults = studio.known[studio.usual], studio.model.defaults
    with gr.Tab("Seed", id="seed"):
        with gr.Row(elem_classes="seed"):
            seed = gr.Number(42, label="Seed", elem_id="seed")  # checked where it is used: gradio would round it
            dice = gr.Button("Roll the dice", min_width=120)
        prompt = gr.Textbox(
            label="What it shows, in words (may stay empty)",
            max_length=demo.MAX_TEXT,
            elem_id="prompt",
            visible=studio.can("text_to_image"),
        )
        with gr.Accordion("More options", open=True, elem_id="more"):
            with gr.Row():
                fields = Part()
                for name, choices, value in choices_of(known):
                    several = len(choices) > (2 if name == "shape" else 1)
                    setattr(fields, name, gr.Dropdown(choices, value=value, label=name.capitalize(), min_width=120, visible=several))
                adapter = gr.Dropdown(
                    adapters_of(studio), value=studio.usual, label="Adapter", min_width=120, visible=len(studio.models) > 1
                )
            with gr.Row():
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
            with gr.Row():
                count = gr.Slider(1, demo.MAX_PAIRS, 1, step=1, label="Prints of this seed")
                best = gr.Slider(
                    1, demo.MAX_CANDIDATES, min(defaults.best_of, demo.MAX_CANDIDATES), step=1, label="Candidates",
                    info="the best of them is kept", elem_id="candidates",
                )  # fmt: skip
        draw = gr.Button("Generate", variant="primary", elem_id="generate")
    f = fields
    wishes = [prompt, f.style, f.subject, f.thing, f.register, f.shape, temperature, guidance, adapter]
    tags = [getattr(f, name) for name, *_ in choices_of(known)]
    return Part(
        seed=seed,
        dice=dice,
        count=count,
        best=best,
        prompt=prompt,
        tags=tags,
        temperature=temperature,
        guidance=guidance,
        adapter=adapter,
        draw=draw,
        wishes=wishes,
    )


def choices_of(known: demo.Known) -> list[tuple[str, list[tuple[str, str]], str]]:
    """(field, its choices, the initial one) for what a model knows by name."""
    words = {"style": known.styles, "subject": known.subjects, "thing": known.things, "register": known.registers}
    return [*((name, named(found), found[0]) for name, found in words.items()), ("shape", list(known.shapes), "")]


def adapters_of(studio: demo.Studio) -> list[tuple[str, str]]:
    return [(name or "none", name) for name in studio.models]


def between_two_seeds(gr: Any) -> Part:
    """The second tab."""
    with gr.Tab("Two seeds", id="walk"):
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
    question, ask, registers = None, None, list(studio.known[studio.usual].registers)
    with gr.Tab("Picture"):
        with gr.Row():
            kinds = [f".{kind}" for kind in ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")]
            upload = gr.UploadButton("Upload a picture", type="binary", file_types=kinds, elem_id="upload")
            take = gr.Button("Take the print")
        shown = gr.HTML(elem_id="inhand")
        spoken = gr.HTML(elem_id="said")
        voices = gr.CheckboxGroup(
            named(registers), value=registers[:2], label="Say what it shows, in these registers", visible=len(registers) > 1
        )
        caption = gr.Button("Caption it", variant="primary", elem_id="caption")
        if studio.can("question"):
            known = "; ".join(studio.suggested())
            question = gr.Textbox(
                label="Ask about it", info=f"It knows: {known}" if known else None, max_length=demo.MAX_TEXT, elem_id="question"
            )
            ask = gr.Button("Ask", elem_id="ask")
        else:
            gr.HTML('<p class="aside">This model was not trained on questions, so it cannot be asked about a picture.</p>')
        with gr.Accordion("Draw from it", open=True, elem_id="anew"):
            with gr.Row():
                meaning = gr.Textbox(label="What it shows", placeholder="the model's own words", max_length=demo.MAX_TEXT)
                amount = gr.Slider(0, 1, 0.1, step=0.05, label="Distance", info="how much is drawn anew; 1: all of it")
            vary = gr.Button("Variations", elem_id="vary")
            with gr.Row(elem_classes="level"):
                keep = gr.Radio(list(conditional_generation.KEEP), value="top", label="Keep one half")
                complete = gr.Button("Draw the rest anew", elem_id="complete")
    return Part(
        upload=upload, take=take, shown=shown, spoken=spoken, voices=voices, caption=caption, question=question, ask=ask, meaning=meaning,
        amount=amount, vary=vary, keep=keep, complete=complete,
    )  # fmt: skip


def compared(gr: Any, studio: demo.Studio) -> Part:
    """The fourth tab: two prints side by side."""
    prompts, adapters = studio.can("text_to_image"), len(studio.models) > 1
    what = " or ".join([*["two prompts"] * prompts, *["two adapters"] * adapters, "two prints of one seed"])
    with gr.Tab("Compare"):
        gr.HTML(f'<p class="aside">Compare {what}. These are single draws. The other options are in the tab “Seed”.</p>')
        seed = gr.Number(42, label="Seed of both", elem_id="both")
        sides = []
        with gr.Row():
            for side in ("Left", "Right"):
                with gr.Column(min_width=140):
                    prompt = gr.Textbox(
                        label=f"{side}: what it shows", max_length=demo.MAX_TEXT, elem_id=f"prompt-{side.lower()}", visible=prompts
                    )
                    adapter = gr.Dropdown(
                        adapters_of(studio), value=studio.usual, label=f"{side}: adapter", min_width=120, visible=adapters
                    )
                    sides.append((prompt, adapter))
        draw = gr.Button("Draw both", variant="primary", elem_id="versus")
        with gr.Row(elem_classes="level"):
            left = gr.Button("The left is better", min_width=120, interactive=False, elem_id="left")
            right = gr.Button("The right is better", min_width=120, interactive=False, elem_id="right")
    return Part(seed=seed, prompts=[one for one, _ in sides], adapters=[one for _, one in sides], draw=draw, left=left, right=right)


def from_words(gr: Any, studio: demo.Studio) -> Part | None:
    """The last tab, for a model that rewrites captions."""
    registers = list(studio.known[studio.usual].registers)
    if not studio.can("rewrite"):
        return None
    with gr.Tab("Words"):
        caption = gr.Textbox(label="A caption", max_length=demo.MAX_TEXT, elem_id="words")
        register = gr.Dropdown(named(registers), value=registers[-1], label="Say it in the register", visible=len(registers) > 1)
        rewrite = gr.Button("Rewrite it", variant="primary", elem_id="rewrite")
        spoken = gr.HTML(elem_id="rewritten")
    return Part(caption=caption, register=register, rewrite=rewrite, spoken=spoken)


def of_the_print(gr: Any) -> Part:
    """Below the gallery: what the visitor thinks of the print, and the gallery to keep."""
    with gr.Row(elem_classes="level"):
        like = gr.Button("I like this print", min_width=120, elem_id="like")
        dislike = gr.Button("I do not", min_width=120, elem_id="dislike")
        keep = gr.Button("Keep the gallery", min_width=120, elem_id="keep")
    return Part(
        like=like,
        dislike=dislike,
        keep=keep,
        summary=gr.HTML(views.opinion(visit.Judged()), elem_id="opinion"),
        taken=gr.HTML(elem_id="kept"),
    )


# --- which event starts what ------------------------------------------------------------------------------------------


def connect_seeds(gr: Any, events: Events, kept: Part, shown: Part, seeds: Part, between: Part) -> None:
    """Connect the first two tabs with the events: what starts one, what it reads, what it writes."""
    plate, printed = shown.plate, [shown.plate, kept.current, kept.history, shown.gallery]
    seeds.dice.click(lambda: random.randrange(demo.MAX_SEED + 1), None, seeds.seed, queue=False, **QUIET)
    drawn = [seeds.draw.click, seeds.prompt.submit, seeds.seed.submit]
    gr.on(drawn, events.draw, [seeds.seed, seeds.count, seeds.best, *seeds.wishes, kept.history], printed, show_progress_on=plate, **LANE)
    ends = [between.first, between.last, between.count, seeds.temperature, seeds.adapter]
    walked = [plate, kept.current, kept.steps, between.step, between.taken]
    between.walk.click(events.walk, ends, walked, show_progress_on=plate, **LANE)
    between.step.input(events.step, [between.step, kept.steps], [plate, kept.current], trigger_mode="always_last", **QUIET)
    gr.on([*drawn, between.walk.click], None, js=SHOW_PLATE, queue=False, **QUIET)

    # Gradio reads the annotation; gr is imported where it is needed
    def recall(history: list[Any], event: gr.SelectData):  # pyright: ignore[reportInvalidTypeForm]
        yield from events.recall(event.index, history)

    shown.gallery.select(recall, kept.history, [plate, kept.current], **QUIET)
    shown.gallery.select(None, js=SHOW_PLATE, queue=False, **QUIET)
    if len(events.studio.models) > 1:
        fields = [*seeds.tags, seeds.temperature, seeds.guidance, seeds.best]
        seeds.adapter.input(lambda name: fields_of(gr, events.studio, name), seeds.adapter, fields, queue=False, **QUIET)


def connect_pictures(gr: Any, events: Events, kept: Part, shown: Part, seeds: Part, p: Part, words: Part | None) -> None:
    """Connect the tabs of pictures and words."""
    printed, on_plate = [shown.plate, kept.current, kept.history, shown.gallery], {"show_progress_on": shown.plate, **LANE}
    p.upload.upload(events.upload, p.upload, [kept.picture, p.shown, p.spoken], **QUIET)
    p.take.click(events.take, kept.current, [kept.picture, p.shown, p.spoken], **QUIET)
    p.caption.click(events.caption, [kept.picture, p.voices], p.spoken, **LANE)
    if p.ask is not None:
        gr.on([p.ask.click, p.question.submit], events.ask, [kept.picture, p.question], p.spoken, **LANE)
    p.vary.click(events.vary, [kept.picture, p.meaning, p.amount, seeds.seed, kept.history], printed, **on_plate)
    p.complete.click(events.complete, [kept.picture, p.keep, seeds.seed, kept.history], printed, **on_plate)
    gr.on([p.vary.click, p.complete.click], None, js=SHOW_PLATE, queue=False, **QUIET)
    if words is not None:
        gr.on([words.rewrite.click, words.caption.submit], events.rewrite, [words.caption, words.register], words.spoken, **LANE)


def connect_opinions(gr: Any, events: Events, kept: Part, shown: Part, seeds: Part, sides: Part, opinions: Part) -> None:
    """Connect the comparison, and the buttons below the gallery."""
    common = [*seeds.wishes, kept.history]
    drawn = [shown.plate, kept.current, kept.two, kept.history, shown.gallery, sides.left, sides.right]
    asked = [sides.draw.click, *(prompt.submit for prompt in sides.prompts)]
    gr.on(asked, events.versus, [sides.seed, *sides.prompts, *sides.adapters, *common], drawn, show_progress_on=shown.plate, **LANE)
    gr.on(asked, None, js=SHOW_PLATE, queue=False, **QUIET)
    judged, written = [kept.judged], [kept.judged, opinions.summary]
    for button, event, about in (
        (sides.left, events.prefer_left, kept.two), (sides.right, events.prefer_right, kept.two),
        (opinions.like, events.like, kept.current), (opinions.dislike, events.dislike, kept.current),
    ):  # fmt: skip
        button.click(event, [about, *judged], written, **QUIET)

    def keep(history: list[Any], request: gr.Request):  # pyright: ignore[reportInvalidTypeForm]
        yield from events.keep(history, request.headers.get("referer"))

    opinions.keep.click(keep, kept.history, opinions.taken, **QUIET).success(None, js=TAKE, queue=False, **QUIET)


def connect_links(gr: Any, page: Any, events: Events, kept: Part, shown: Part, seeds: Part, between: Part) -> None:
    """Connect the page's address: its options fill the fields, then its print is drawn."""
    studio, numbers = events.studio, [seeds.seed, seeds.count, between.first, between.last, between.count]
    fields = [*seeds.tags, seeds.temperature, seeds.guidance, seeds.best]

    def ask(request: gr.Request):  # pyright: ignore[reportInvalidTypeForm]
        form = next(events.asked(dict(request.query_params)))
        if form is None or "walk" not in form:
            return gr.skip()
        counted = [form[name] for name in ("seed", "n", "from", "to", "steps")]
        tab = gr.update(selected="walk" if form["walk"] else "seed")
        single = form["n"] == 1 and not form["chosen"]  # one print's own link has one candidate, which is no wish for the next
        filled = {**form, "best": None} if single else form
        return form, tab, *counted, form["prompt"], form["adapter"], *fields_of(gr, studio, form["adapter"], filled)

    # queued: only then does Gradio notice that the State has changed
    page.load(ask, None, [kept.asked, shown.tabs, *numbers, seeds.prompt, seeds.adapter, *fields], **QUIET)
    drawn = [shown.plate, kept.current, kept.history, shown.gallery, kept.steps, between.step, between.taken]
    kept.asked.change(events.opened, [kept.asked, kept.history], drawn, show_progress_on=shown.plate, **LANE)


def fields_of(gr: Any, studio: demo.Studio, adapter: str, values: dict[str, Any] | None = None) -> list[Any]:
    """Updates of the fields of tags, temperature, guidance and candidates for the model with this adapter. `values`: by name, else the
    defaults."""
    values, defaults = values or {}, studio.models[adapter].defaults
    tags = [gr.update(choices=choices, value=values.get(name, first)) for name, choices, first in choices_of(studio.known[adapter])]
    numbers = (("temperature", demo.TEMPERATURES, defaults.temperature), ("guidance", demo.GUIDANCES, defaults.guidance_scale))
    for name, bounds, usual in numbers:
        low, high = demo.including(bounds, usual)
        tags.append(gr.update(minimum=low, maximum=high, value=values.get(name, usual)))
    best = values.get("best")
    return [*tags, gr.update(value=min(defaults.best_of, demo.MAX_CANDIDATES) if best is None else best)]


def named(words: Sequence[str]) -> list[tuple[str, str]]:
    return [(word.replace("-", " ") or "as it comes", word) for word in words]

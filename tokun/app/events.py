"""Events: what a button of the page does, as generators of its outputs. demo.py draws, visit.py keeps, and views.py shows the results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from tokun.app import demo, links, views, visit
from tokun.app.visit import Print
from tokun.render.grids import gif, strip
from tokun.utils.errors import UserError


def noticed(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A method of `Events` whose UserError, a visitor's mistake, becomes a notice on the page."""

    @functools.wraps(work)
    def working(self: Events, *args: Any) -> Iterator[Any]:
        try:
            yield from work(self, *args)
        except UserError as error:  # no gr.Error: it would leave a pill "Error" on the page until the next click
            self.gr.Warning(views.quoted(str(error)), duration=8, title="Please note")
            yield self.gr.skip()

    return working


class Events:
    """The work behind the page's buttons. `gr` is Gradio, which is imported when a page is built."""

    def __init__(self, gr: Any, studio: demo.Studio, channels: int) -> None:
        """channels: those of the model's pictures."""
        self.gr, self.studio, self.channels = gr, studio, channels

    # --- from seeds ---------------------------------------------------------------------------------------------------

    @noticed
    def draw(self, seed, n, best, *rest):
        """-> plate, current print, history, gallery"""
        *wishes, history = rest
        yield from self.drawn({"seed": seed, "n": n, "best": best}, dict(zip(links.WISHES, wishes)), history)

    def drawn(self, numbers: dict[str, object], wishes: dict[str, object], history: list[Print]) -> Iterator[Any]:
        """-> plate, current print, history, gallery. `numbers`: seed and n; no (else 0) and best (else 1) as in `Studio.draw`."""
        skip = self.gr.skip()
        for news in self.studio.draw(**numbers, **wishes):
            if isinstance(news, demo.Sketch):
                yield views.sketched(news), skip, skip, skip
            else:
                prints = [Print(pair, self.link({"seed": pair.seed, "no": pair.index, **wishes})) for pair in news]
                sheet = prints[0].link if len(news) == 1 else self.link({**numbers, "seed": news[0].seed, "n": len(news), **wishes})
                yield printed(prints, history, sheet)
                if len(news) == 1:
                    yield large(prints[0]), skip, skip, skip

    def link(self, values: dict[str, object]) -> str:
        name = self.studio.adapter(values.get("adapter"))
        known, defaults = self.studio.known[name], self.studio.models[name].defaults
        usual = {
            "no": 0,
            "n": 1,
            "best": 1,
            "adapter": self.studio.usual,
            "register": known.registers[0],
            "guidance": defaults.guidance_scale,
            "temperature": defaults.temperature,
        }
        return links.link({**values, "adapter": name}, usual)

    @noticed
    def walk(self, first, last, steps, temperature, adapter):
        """-> plate, current print, the steps, the slider among them, the strip"""
        yield from self.walked(first, last, steps, {"temperature": temperature, "adapter": adapter})

    def walked(self, first: object, last: object, steps: object, wishes: dict[str, object], shown: object = 1) -> Iterator[Any]:
        """-> plate, current print, the steps, the slider among them, the strip"""
        skip = self.gr.skip()
        for news in self.studio.between(first, last, steps, **wishes):
            if isinstance(news, demo.Sketch):
                yield views.sketched(news), skip, skip, skip, skip
            else:
                ends = {"from": demo.whole(first, 0, demo.MAX_SEED, "first seed"), "to": demo.whole(last, 0, demo.MAX_SEED, "last seed")}
                images, name = [pair.image for pair in news], "tokun-{from}-{to}".format(**ends)
                files = {f"{name}.gif": demo.inline(gif(images), "image/gif"), f"{name}-strip.png": demo.data_uri(strip(images), "PNG")}
                prints = [Print(pair, self.link({**ends, "steps": len(news), "step": i, **wishes})) for i, pair in enumerate(news, 1)]
                number = demo.whole(shown, 1, len(news), "step")
                slider = self.gr.update(maximum=len(news), value=number, interactive=True)
                one = prints[number - 1]
                yield large(one), one, prints, slider, views.way(images) + views.links(files, "the walk")

    @noticed
    def step(self, number, prints):
        """-> plate, current print"""
        if prints:
            one = prints[demo.whole(number, 1, len(prints), "step") - 1]
            yield large(one), one

    # --- from a link --------------------------------------------------------------------------------------------------

    @noticed
    def asked(self, parameters: dict[str, str]):
        """-> the options of the link, the selected tab, the fields of a form by name; nothing for an address without options"""
        values = links.read(parameters)
        if not values:
            yield None
            return
        wishes = {name: values.get(name) for name in ("register", "temperature", "guidance", "adapter")}
        wishes |= {name: values.get(name, "") for name in ("prompt", "style", "subject", "thing", "shape")}
        checked = self.studio.wishes(**wishes)  # before it is put into any field
        defaults = self.studio.models[checked.adapter].defaults
        form: dict[str, object] = {
            **wishes,
            "adapter": checked.adapter,
            "register": wishes["register"] or self.studio.known[checked.adapter].registers[0],
        }
        for name, usual in (("temperature", defaults.temperature), ("guidance", defaults.guidance_scale)):
            form[name] = usual if wishes[name] is None else wishes[name]
        for name, low, high, usual in (
            ("seed", 0, demo.MAX_SEED, 42), ("no", 0, demo.MAX_NUMBER, 0), ("n", 1, demo.MAX_PAIRS, 1),
            ("best", 1, demo.MAX_CANDIDATES, 1), ("from", 0, demo.MAX_SEED, 42),
            ("to", 0, demo.MAX_SEED, 43), ("steps", 2, demo.MAX_PAIRS, 8), ("step", 1, demo.MAX_PAIRS, 1),
        ):  # fmt: skip
            form[name] = demo.whole(values.get(name, usual), low, high, links.SPOKEN[name])
        demo.numbers_of(form["no"], form["n"], form["best"])
        yield {**form, "walk": "from" in values or "to" in values, "chosen": "best" in values}

    @noticed
    def opened(self, asked, history):
        """-> plate, current print, history, gallery, the steps, the slider among them, the strip"""
        if not asked:
            return
        skip, wishes = self.gr.skip(), {name: asked[name] for name in links.WISHES}
        if asked["walk"]:
            some = {name: wishes[name] for name in ("temperature", "adapter")}
            for plate, current, *rest in self.walked(asked["from"], asked["to"], asked["steps"], some, asked["step"]):
                yield plate, current, skip, skip, *rest
        else:
            for found in self.drawn({name: asked[name] for name in ("seed", "n", "no", "best")}, wishes, history):
                yield *found, skip, skip, skip

    # --- compared -----------------------------------------------------------------------------------------------------

    @noticed
    def versus(self, seed, left, right, left_adapter, right_adapter, *rest):
        """-> plate, current print, the two, history, gallery, both buttons"""
        *wishes, history = rest
        skip, common = self.gr.skip(), dict(zip(links.WISHES, wishes))
        sides = [{**common, "prompt": prompt, "adapter": name} for prompt, name in ((left, left_adapter), (right, right_adapter))]
        for news in self.studio.versus(seed, sides):
            if len(news) < 2 or isinstance(news[-1], demo.Sketch):
                yield views.versus(news), skip, skip, skip, skip, skip, skip
                continue
            drawn = [one for one in news if not isinstance(one, demo.Sketch)]
            prints = [Print(pair, self.link({"seed": pair.seed, "no": pair.index, **side})) for pair, side in zip(drawn, sides)]
            kept, can = visit.remember(history, prints), self.gr.update(interactive=True)
            notes = [self.note(one.pair, side) for one, side in zip(prints, sides)]
            yield views.versus([one.pair for one in prints], notes), prints[0], prints, kept, shown(kept), can, can

    def note(self, pair: Any, side: dict[str, object]) -> str:
        name = self.studio.adapter(side["adapter"])
        return views.signature(pair) + (f" · {name or 'no adapter'}" if len(self.studio.models) > 1 else "")

    @noticed
    def prefer_left(self, two, judged):
        """-> the judgements and their summary"""
        yield with_summary(judged.prefer([one.pair for one in two], 0))

    @noticed
    def prefer_right(self, two, judged):
        """-> the judgements and their summary"""
        yield with_summary(judged.prefer([one.pair for one in two], 1))

    # --- from a picture, from words -----------------------------------------------------------------------------------

    @noticed
    def upload(self, content):
        """-> picture, its preview, no words"""
        picture = demo.open_upload(content, self.channels)
        yield picture, views.preview(self.studio.framed(picture)), ""

    @noticed
    def take(self, current):
        """-> picture, its preview, no words"""
        if current is None:
            raise UserError("There is no print yet: draw one first.")
        yield current.pair.image, views.preview(current.pair.image), ""

    @noticed
    def caption(self, picture, registers):
        """-> words"""
        yield views.spoken(self.studio.say(picture, registers))

    @noticed
    def ask(self, picture, question):
        """-> words"""
        yield views.spoken(self.studio.answer(picture, question))

    @noticed
    def rewrite(self, caption, register):
        """-> words"""
        yield views.spoken(self.studio.rewrite(caption, register))

    @noticed
    def vary(self, picture, caption, amount, seed, history):
        """-> plate, current print, history, gallery"""
        yield printed([Print(pair) for pair in self.studio.vary(picture, caption, amount, seed)], history)

    @noticed
    def complete(self, picture, keep, seed, history):
        """-> plate, current print, history, gallery"""
        yield printed([Print(pair) for pair in self.studio.complete(picture, keep, seed)], history)

    # --- kept ---------------------------------------------------------------------------------------------------------

    @noticed
    def like(self, current, judged):
        """-> the judgements and their summary"""
        yield with_summary(judged.mark(current and current.pair, liked=True))

    @noticed
    def dislike(self, current, judged):
        """-> the judgements and their summary"""
        yield with_summary(judged.mark(current and current.pair, liked=False))

    @noticed
    def recall(self, number, history):
        """-> plate, current print"""
        if not history:
            raise UserError("This print is no longer kept here, but its seed still draws it.")
        one = history[demo.whole(number, 0, len(history) - 1, "number")]
        yield large(one), one

    @noticed
    def keep(self, history, referer):
        """-> the file of the gallery"""
        if not history:
            raise UserError("There is no print yet: draw one first.")
        page = views.gallery(history, visit.address(referer))
        yield views.links({"tokun-gallery.html": demo.inline(page.encode(), "text/html")}, "the gallery")


def with_summary(judged: visit.Judged) -> tuple[visit.Judged, str]:
    return judged, views.opinion(judged)


def large(one: Print) -> str:
    return views.plate([one.pair], visit.keepsakes(one.pair), one.link)


def printed(prints: list[Print], history: list[Print], link: str = "") -> tuple[str, Print, list[Print], list[tuple[Image.Image, str]]]:
    """-> plate, current print, history, gallery"""
    kept = visit.remember(history, prints)
    return views.plate([one.pair for one in prints], link=link), prints[0], kept, shown(kept)


def shown(prints: Sequence[Print]) -> list[tuple[Image.Image, str]]:
    return [(demo.enlarged(one.pair.image, 192), one.pair.caption) for one in prints]

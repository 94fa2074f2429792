"""Events: what a button of the page does, as generators of its outputs. What is drawn and said is demo.py's, how it looks views.py's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from tokun.app import demo, views
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
        """channels: of the model's pictures."""
        self.gr, self.studio, self.channels = gr, studio, channels

    @noticed
    def draw(self, seed, n, prompt, style, subject, thing, register, aspect, temperature, guidance, history):
        """-> plate, current pair, history, gallery"""
        wishes = dict(
            prompt=prompt,
            style=style,
            subject=subject,
            thing=thing,
            register=register,
            aspect=aspect,
            temperature=temperature,
            guidance=guidance,
        )
        skip = self.gr.skip()
        for news in self.studio.draw(seed, n, **wishes):
            if isinstance(news, demo.Sketch):
                yield views.sketched(news), skip, skip, skip
            else:
                yield printed(news, history)
                if len(news) == 1:
                    yield views.plate(news, demo.keepsakes(news[0])), skip, skip, skip

    @noticed
    def walk(self, first, last, steps, temperature):
        """-> plate, current pair, the steps, the slider among them, the strip"""
        skip = self.gr.skip()
        for news in self.studio.between(first, last, steps, temperature=temperature):
            if isinstance(news, demo.Sketch):
                yield views.sketched(news), skip, skip, skip, skip
            else:
                images, name = [pair.image for pair in news], f"tokun-{int(first)}-{int(last)}"
                files = {f"{name}.gif": demo.inline(gif(images), "image/gif"), f"{name}-strip.png": demo.data_uri(strip(images), "PNG")}
                slider = self.gr.update(maximum=len(news), value=1, interactive=True)
                yield views.plate(news[:1], demo.keepsakes(news[0])), news[0], news, slider, views.way(images) + views.links(files)

    @noticed
    def step(self, number, pairs):
        """-> plate, current pair"""
        if pairs:
            pair = pairs[demo.whole(number, 1, len(pairs), "step") - 1]
            yield views.plate([pair], demo.keepsakes(pair)), pair

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
        yield current.image, views.preview(current.image), ""

    @noticed
    def caption(self, picture, registers):
        """-> words"""
        yield views.spoken(self.studio.say(picture, registers))

    @noticed
    def ask(self, picture, question):
        """-> words"""
        yield views.spoken(self.studio.answer(picture, question))

    @noticed
    def vary(self, picture, caption, amount, seed, history):
        """-> plate, current pair, history, gallery"""
        yield printed(self.studio.vary(picture, caption, amount, seed), history)

    @noticed
    def complete(self, picture, keep, seed, history):
        """-> plate, current pair, history, gallery"""
        yield printed(self.studio.complete(picture, keep, seed), history)

    @noticed
    def like(self, current, judged):
        """-> what is liked and disliked, and how it is told"""
        yield told(judged.mark(current, liked=True))

    @noticed
    def dislike(self, current, judged):
        """-> what is liked and disliked, and how it is told"""
        yield told(judged.mark(current, liked=False))

    @noticed
    def recall(self, number, history):
        """-> plate, current pair"""
        if not history:
            raise UserError("This print is no longer kept here, but its seed still draws it.")
        pair = history[demo.whole(number, 0, len(history) - 1, "number")]
        yield views.plate([pair], demo.keepsakes(pair)), pair


def told(judged: demo.Judged) -> tuple[demo.Judged, str]:
    return judged, views.opinion(judged)


def printed(pairs: list[Any], history: list[Any]) -> tuple[str, Any, list[Any], list[tuple[Image.Image, str]]]:
    """-> plate, current pair, history, gallery"""
    kept = demo.remember(history, pairs)
    return views.plate(pairs), pairs[0], kept, [(demo.enlarged(pair.image, 192), pair.caption) for pair in kept]

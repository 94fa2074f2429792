"""What the demo does, without its page: what visitors may ask for, and a pair as it appears.

    Studio(model).draw(seed, …)   ->  Sketch, Sketch, … and at last the pairs
    Studio(model).known[""]       ->  the tags, shapes and tasks that a form may offer

Everything that comes from outside passes one of the checks below, which raise UserError with a message for visitors. Nothing typed is
opened as a path, and nothing is written to disk. Knows no Gradio.
"""

from __future__ import annotations

import base64
import copy
import functools
import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tokun.data import cropping, image_files
from tokun.data.question_wordings import OPEN, wording_of
from tokun.inference import conditional_generation, image_to_codes, latents
from tokun.render.scale import scaled
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair, SamplingPlan, Tokun, Watch

MAX_FILE_BYTES = 10_000_000
MAX_PIXELS = 25_000_000
MAX_TEXT = 300  # characters
MAX_SEED = 2**31 - 1
MAX_PAIRS = 12  # of a sheet, and most steps between two seeds
TEMPERATURES, GUIDANCES = (0.1, 1.5), (1.0, 6.0)
MAX_NUMBER = 9999  # of a print among those of its seed
MAX_CANDIDATES = 16  # of a print
MAX_DRAWN = 96  # candidates of all prints of a sheet
SIDE = 1024  # pixels of the longer side of an uploaded picture, which is scaled down to that
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
PAUSE = 0.15  # seconds between two sketches
VARIATIONS = 4  # and completions, of four candidates each: sixteen rows, which a CPU computes together anyway


# --- what may be asked for ------------------------------------------------------------------------------------------


def number(value: object, low: float, high: float, what: str) -> float:
    """The value, if it is a finite number from low to high; else UserError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"The {what} is a number from {low:g} to {high:,.15g}.")
    return value


def unless_usual(value: object, usual: float, bounds: tuple[float, float], what: str) -> float | None:
    """None for the checkpoint's default, also outside the bounds; else the number. Raises UserError as `number` does."""
    if value is None or (isinstance(value, (int, float)) and math.isclose(value, usual)):
        return None
    return number(value, *bounds, what)


def including(bounds: tuple[float, float], usual: float) -> tuple[float, float]:
    """The bounds of a slider that starts at the checkpoint's default."""
    return min(bounds[0], usual), max(bounds[1], usual)


def whole(value: object, low: int, high: int, what: str) -> int:
    """The value, if it is a whole number from low to high; else UserError."""
    found = number(value, low, high, what)
    if found != int(found):
        raise UserError(f"The {what} is a whole number, not {found:g}.")
    return int(found)


def text(value: object, what: str) -> str:
    """One line, blanks at its ends removed. Raises UserError for what is too long."""
    if not isinstance(value, str):
        raise UserError(f"The {what} is a text.")
    if len(value) > MAX_TEXT:
        raise UserError(f"The {what} has {len(value):,} characters; up to {MAX_TEXT} are read. Please shorten it.")
    return " ".join(value.split())


def one_of(value: object, choices: Sequence[str], what: str) -> str:
    if value not in choices:
        raise UserError(f"This model does not know that {what}; it knows {', '.join(c for c in choices if c)}.")
    return str(value)


def open_upload(content: object, channels: int) -> Image.Image:
    """The bytes of an uploaded file -> 'L' or 'RGB', upright, no side above SIDE. The size is checked before the pixels are decoded."""
    if not isinstance(content, bytes) or not content:
        raise UserError("Please choose a picture first.")
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"The file has {len(content):,} bytes; up to {MAX_FILE_BYTES:,} are read. Please scale it down.")
    try:
        opened = image_files.decode_as(content, channels, most=MAX_PIXELS, formats=FORMATS)
    except image_files.PictureError as error:
        if str(error) == image_files.TOO_MANY:
            raise UserError(f"The picture has too many pixels; up to {MAX_PIXELS:,} are read. Please scale it down.") from None
        raise UserError(f"This file is not a whole picture that can be read. Formats: {', '.join(FORMATS)}.") from None
    opened.thumbnail((SIDE, SIDE))
    return opened


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sketch:
    """A pair that is being drawn: the rest of the picture is white."""

    image: Image.Image
    caption: str
    candidates: int = 1
    """Above 1: it is the first of so many, one of which will be kept."""


class Left(Exception):
    """The visitor has left, so the pair is no longer needed."""


@dataclass(frozen=True)
class Wishes:
    """A visitor's options, checked."""

    adapter: str
    options: dict[str, Any]
    """Of `Tokun.sample`."""


@dataclass(frozen=True)
class Known:
    """What a model knows, as a form offers it; "" means that nothing is requested."""

    styles: tuple[str, ...]
    subjects: tuple[str, ...]
    things: tuple[str, ...]
    registers: tuple[str, ...]
    shapes: tuple[tuple[str, str], ...]
    """(label, grid)"""
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, model: Tokun) -> Known:
        v = model.vocabulary
        shapes = [("as it comes", ""), *((called(*grid), cropping.grid_text(grid)) for grid in model.grids)]
        tasks = model.tasks or ("joint", "text_to_image")  # an old checkpoint does not record them
        return cls(("", *v.styles), ("", *v.subjects), ("", *v.things), tuple(v.registers), tuple(shapes), tuple(tasks))


def called(rows: int, columns: int) -> str:
    part = math.gcd(rows, columns)
    return f"{'square' if rows == columns else 'wide' if columns > rows else 'tall'} {columns // part}:{rows // part}"


def numbers_of(no: object, n: object, best: object) -> tuple[int, int, int]:
    """The first print's number, the number of prints, and of each one's candidates, checked."""
    count, candidates = whole(n, 1, MAX_PAIRS, "number of prints"), whole(best, 1, MAX_CANDIDATES, "number of candidates")
    if count * candidates > MAX_DRAWN:
        raise UserError(
            f"{count} prints of {candidates} candidates each are {count * candidates}; up to {MAX_DRAWN} are drawn at a time. "
            "Please take fewer of one."
        )
    return whole(no, 0, (MAX_NUMBER + 1) // candidates - count, "number of the print"), count, candidates


def apart(model: Tokun) -> dict[str, Tokun]:
    """The model with each of its adapters, by the adapter's name, and without any, by "". Weights that no adapter changes are shared."""
    if not model.adapters:
        return {"": model}
    found = {name: copy.copy(model) for name in ("", *model.adapters)}
    return {name: one.use_adapter(name or None) for name, one in found.items()}


class Studio:
    """One model for all visitors, with its adapters. It does one thing at a time, in a separate thread."""

    def __init__(self, model: Tokun):
        self.models = apart(model)
        self.usual = model.adapter  # the adapter of those who choose none
        self.model = self.models[self.usual]
        self.known = {name: Known.of(one) for name, one in self.models.items()}
        self._lane = ThreadPoolExecutor(1, "tokun")

    def can(self, task: str) -> bool:
        return task in self.known[self.usual].tasks

    def adapter(self, name: object) -> str:
        """The name of an adapter, "" for none; None means the usual one."""
        return self.usual if name is None else one_of(name, list(self.models), "adapter")

    def wishes(
        self,
        prompt: object = "",
        style: object = "",
        subject: object = "",
        register: object = None,
        temperature: object = None,
        guidance: object = None,
        thing: object = "",
        shape: object = "",
        adapter: object = None,
    ) -> Wishes:
        """The options besides a seed. A temperature and a guidance that are None or the model's defaults are left out: then a print is what
        `sample.py` gives with as many candidates."""
        name = self.adapter(adapter)
        known, usual = self.known[name], self.models[name].defaults
        options = {
            "prompt": text(prompt, "prompt") or None,
            "style": one_of(style, known.styles, "style"),
            "subject": one_of(subject, known.subjects, "subject"),
            "register": "" if register is None else one_of(register, known.registers, "register"),
            "temperature": unless_usual(temperature, usual.temperature, TEMPERATURES, "temperature"),
            "guidance_scale": unless_usual(guidance, usual.guidance_scale, GUIDANCES, "guidance"),
            "thing": text(thing, "thing"),
            "aspect": one_of(shape, [grid for _, grid in known.shapes], "shape"),
        }
        return Wishes(name, options)

    def draw(self, seed: object, n: object, no: object = 0, best: object = 1, **wishes: object) -> Iterator[Sketch | list[Pair]]:
        """Prints no … no + n - 1 of the seed: sketches of the first, then all. With `best` 1 they are its samples; otherwise choices, each
        of `best` candidates (`Tokun.best_of`), and the sketches show the first candidate."""
        start, asked = whole(seed, 0, MAX_SEED, "seed"), self.wishes(**wishes)
        first, count, candidates = numbers_of(no, n, best)
        model = self.models[asked.adapter]
        plan = model.plan(**asked.options)
        drawn = functools.partial(model.best_of, start, count, candidates, first=first, plan=plan)
        for news in self.watched(lambda watch: drawn(watch=watch), *self.first(start, first * candidates, asked, plan)):
            yield replace(news, candidates=candidates) if isinstance(news, Sketch) else news

    def between(self, first: object, last: object, steps: object, **wishes: object) -> Iterator[Sketch | list[Pair]]:
        """Pairs on the way from one seed to another: sketches of the first pair, then all pairs."""
        a, b = whole(first, 0, MAX_SEED, "first seed"), whole(last, 0, MAX_SEED, "last seed")
        count, asked = whole(steps, 2, MAX_PAIRS, "number of steps"), self.wishes(**wishes)
        model = self.models[asked.adapter]
        known = self.first(a, 0, asked, model.plan(**asked.options))
        return self.watched(lambda watch: model.interpolate(a, b, count, watch=watch, **asked.options), *known)

    def versus(self, seed: object, sides: Sequence[dict[str, object]]) -> Iterator[list[Sketch | Pair]]:
        """Sample 0 of the seed for each of two sets of options, one after the other, as far as they are drawn. If the two are equal,
        samples 0 and 1."""
        start, asked = whole(seed, 0, MAX_SEED, "seed"), [self.wishes(**side) for side in sides]
        numbers = (0, int(asked[0] == asked[1]))
        plans = [self.models[one.adapter].plan(**one.options) for one in asked]
        first = [self.first(start, *one) for one in zip(numbers, asked, plans)]  # raises before anything is drawn
        done: list[Sketch | Pair] = []
        for one, number, plan, known in zip(asked, numbers, plans, first):
            sample = functools.partial(self.models[one.adapter].draw, start, [number], plan)
            for news in self.watched(lambda watch, sample=sample: sample(watch=watch), *known):
                if isinstance(news, Sketch):
                    yield [*done, news]
                else:
                    done += news
        yield done

    def first(self, seed: int, index: int, asked: Wishes, plan: SamplingPlan) -> tuple[str, tuple[int, int]]:
        """What is known of a sample before it is drawn: its prompt and its shape."""
        model, u = self.models[asked.adapter], latents.uniform(latents.draw(seed, [index], latents.TAG_SLOTS))
        (tags,) = self._lane.submit(model.tags_of, u, plan).result()  # with a prompt this runs the generator
        return asked.options["prompt"] or "", tags.grid or model.vocabulary.default_grid

    def watched(
        self, make: Callable[[Watch], list[Pair]], prompt: str = "", grid: tuple[int, int] | None = None
    ) -> Iterator[Sketch | list[Pair]]:
        """Yields what `make` has so far, then its result. Stops the work when the visitor has left. `grid`: that of the first pair."""
        news: deque[tuple[list[int], list[int]]] = deque(maxlen=1)
        left = threading.Event()

        def watch(codes: list[int], ids: list[int]) -> None:
            if left.is_set():
                raise Left
            news.append((codes, ids))

        future = self._lane.submit(make, watch)
        try:
            while not wait([future], PAUSE).done:
                if news:
                    codes, ids = news.pop()
                    yield Sketch(sketch(self.model, codes, grid), self.model.text_tokenizer.decode(ids).rstrip("\ufffd") or prompt)
            yield future.result()
        finally:
            left.set()
            future.cancel()

    # --- from a picture -------------------------------------------------------------------------------------------------

    def framed(self, picture: Image.Image) -> Image.Image:
        """What the model sees of a picture, at a size that suits a screen."""
        return image_to_codes.framed(self.model, picture, largest=4)

    def say(self, picture: Image.Image | None, registers: object) -> list[conditional_generation.Words]:
        """A caption of the picture in each register."""
        shown = given(picture)
        if not isinstance(registers, list) or not registers:
            raise UserError("Please choose a register.")
        asked = [one_of(name, self.known[self.usual].registers, "register") for name in dict.fromkeys(map(str, registers))]
        return self._lane.submit(self.model.caption, shown, asked).result()

    def suggested(self, most: int = 6) -> list[str]:
        """Wordings of questions that the model knows: whole ones first, the most frequent first."""
        return sorted(self.model.question_wordings, key=lambda wording: wording.endswith(OPEN))[:most]

    def answer(self, picture: Image.Image | None, question: object) -> list[conditional_generation.Words]:
        shown, asked = given(picture), text(question, "question")
        if not self.can("question"):
            raise UserError("This model was not trained on questions; it can caption the picture.")
        if not asked:
            raise UserError("Please type a question first.")
        if (known := self.model.question_wordings) and not wording_of(asked, known):
            raise UserError(f"This model was trained on no such question. It knows: {'; '.join(self.suggested())} …")
        return self._lane.submit(self.model.ask, shown, asked).result()

    def rewrite(self, caption: object, register: object) -> list[conditional_generation.Words]:
        """The caption in another register."""
        written, voice = text(caption, "caption"), one_of(register, self.known[self.usual].registers, "register")
        if not self.can("rewrite"):
            raise UserError("This model was not trained to rewrite captions; it can caption a picture.")
        if not written:
            raise UserError("Please type a caption first.")
        return self._lane.submit(self.model.rewrite, written, voice).result()

    def vary(self, picture: Image.Image | None, caption: object, amount: object, seed: object) -> list[Pair]:
        """Pairs near the picture and its caption; without a caption, near the picture and the model's own caption."""
        shown, words = given(picture), text(caption, "caption")
        share, start = number(amount, 0, 1, "distance"), whole(seed, 0, MAX_SEED, "seed")

        def work() -> list[Pair]:
            written = words or own_words(self.model, shown)
            return self.model.vary(self.model.invert(shown, written), share, seed=start, n=VARIATIONS)

        return self._lane.submit(work).result()

    def complete(self, picture: Image.Image | None, keep: object, seed: object) -> list[Pair]:
        """Pairs that continue one half of the picture."""
        shown, part, start = given(picture), one_of(keep, list(conditional_generation.KEEP), "half"), whole(seed, 0, MAX_SEED, "seed")
        return self._lane.submit(self.model.complete, shown, part, seed=start, n=VARIATIONS).result()


def given(picture: Image.Image | None) -> Image.Image:
    if picture is None:
        raise UserError("Please choose a picture first: upload one, or take the print.")
    return picture


def own_words(model: Tokun, picture: Image.Image) -> str:
    """The model's likeliest caption, cut to what it can read again: oddly spelled words may take more pieces."""
    caption = model.caption(picture, temperature=0.0)[0].text
    while len(model.text_tokenizer.encode(caption)) > model.vocabulary.max_text:
        caption = caption[:-1]
    return caption


def sketch(model: Tokun, codes: list[int], grid: tuple[int, int] | None = None) -> Image.Image:
    """The picture of the first codes of a grid (None: the default one) on white paper."""
    rows, columns = grid or model.vocabulary.default_grid
    filled = [*codes, *[codes[-1] if codes else 0] * (rows * columns - len(codes))]
    image = model.decode_images([filled], [(rows, columns)])[0]
    drawn = (np.arange(rows * columns) < len(codes)).reshape(rows, columns).astype(np.uint8) * 255
    return Image.composite(
        image, Image.new(image.mode, image.size, "white"), Image.fromarray(drawn).resize(image.size, Image.Resampling.NEAREST)
    )


# --- what is shown -----------------------------------------------------------------------------------


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """A small picture, smoothly enlarged by a whole factor until its longer side has at least `side` pixels."""
    return scaled(image, max(1, math.ceil(side / max(image.size))))


def data_uri(image: Image.Image, kind: str = "JPEG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return inline(buffer.getvalue(), f"image/{kind.lower()}")


def inline(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"

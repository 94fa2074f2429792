"""What the demo does, without its page: what visitors may ask for, a pair as it appears, what they take home.

    Studio(model).draw(seed, …)   ->  Sketch, Sketch, … and at last the pairs

Everything that comes from outside passes one of the checks below, which raise UserError with words for a visitor. Nothing that
is typed is opened as a path, nothing is written to disk. Knows no Gradio.
"""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tokun.data import cropping, image_files
from tokun.inference import conditional_generation, latents, preferences
from tokun.render.svg import to_svg
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun, Watch

MAX_FILE_BYTES = 10_000_000
MAX_PIXELS = 25_000_000
MAX_TEXT = 300  # characters
MAX_SEED = 2**31 - 1
MAX_PAIRS = 12  # of a sheet, or steps between two seeds
TEMPERATURES, GUIDANCES = (0.1, 1.5), (1.0, 6.0)
REMEMBERED = 24  # pairs of a session
SIDE = 1024  # pixels of an uploaded picture's longer side, as it is kept
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
PAUSE = 0.15  # seconds between two sketches
VARIATIONS = 4  # and completions, of four candidates each: sixteen rows, which a CPU computes together anyway


# --- what may be asked for ------------------------------------------------------------------------------------------


def number(value: object, low: float, high: float, what: str) -> float:
    """Raises UserError for what is no finite number from low to high."""
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
    """Raises UserError for what is no whole number from low to high."""
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
    """The bytes of a file somebody sent -> 'L' or 'RGB', upright, no side above SIDE. Its size is checked before its pixels are read."""
    if not isinstance(content, bytes) or not content:
        raise UserError("Please choose a picture first.")
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"The file has {len(content):,} bytes; up to {MAX_FILE_BYTES:,} are read. Please scale it down.")
    try:
        opened = image_files.decode_as(content, channels, most=MAX_PIXELS, formats=FORMATS)
    except image_files.PictureError as error:
        if str(error) == image_files.TOO_MANY:
            raise UserError(f"The picture has too many pixels; up to {MAX_PIXELS:,} are read. Please scale it down.") from None
        raise UserError(f"This file is not a whole picture that can be read; {', '.join(FORMATS)} are.") from None
    opened.thumbnail((SIDE, SIDE))
    return opened


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sketch:
    """A pair on its way: what is not drawn yet is white."""

    image: Image.Image
    caption: str


class Left(Exception):
    """The visitor is gone, the pair is not wanted any more."""


class Studio:
    """One model for all visitors. It does one thing at a time, in a thread of its own."""

    def __init__(self, model: Tokun):
        self.model = model
        self._lane = ThreadPoolExecutor(1, "tokun")

    @property
    def styles(self) -> list[str]:
        return ["", *self.model.vocabulary.styles]

    @property
    def subjects(self) -> list[str]:
        return ["", *self.model.vocabulary.subjects]

    @property
    def things(self) -> list[str]:
        return ["", *self.model.vocabulary.things]

    @property
    def aspects(self) -> list[tuple[str, str]]:
        """(what it is called, the grid) of each shape; "" for any."""

        def called(rows: int, columns: int) -> str:
            part = math.gcd(rows, columns)
            return f"{'square' if rows == columns else 'wide' if columns > rows else 'tall'} {columns // part}:{rows // part}"

        return [("as it comes", ""), *((called(*grid), cropping.grid_text(grid)) for grid in self.model.grids)]

    @property
    def registers(self) -> list[str]:
        return list(self.model.vocabulary.registers)

    @property
    def can_answer(self) -> bool:
        return "question" in self.model.tasks

    def wishes(
        self, prompt: object = "", style: object = "", subject: object = "", register: object = None, temperature: object = None, guidance: object = None,
        thing: object = "", aspect: object = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Options for `Tokun.sample`. A temperature and a guidance that are None or the model's defaults are left out: then the seed's pair is the one
        that `sample.py` draws."""
        usual = self.model.defaults
        return {
            "prompt": text(prompt, "prompt") or None, "style": one_of(style, self.styles, "style"), "subject": one_of(subject, self.subjects, "subject"),
            "register": "" if register is None else one_of(register, self.registers, "register"), "temperature": unless_usual(temperature, usual.temperature, TEMPERATURES, "temperature"),
            "guidance_scale": unless_usual(guidance, usual.guidance_scale, GUIDANCES, "guidance"), "thing": text(thing, "thing"), "aspect": one_of(aspect, [grid for _, grid in self.aspects], "shape"),
        }  # fmt: skip

    def draw(self, seed: object, n: object, **wishes: object) -> Iterator[Sketch | list[Pair]]:
        """Samples 0 … n-1 of the seed: sketches of the first, then all."""
        start, count, options = whole(seed, 0, MAX_SEED, "seed"), whole(n, 1, MAX_PAIRS, "number of prints"), self.wishes(**wishes)
        return self.watched(
            lambda watch: self.model.sample(start, count, watch=watch, **options), options["prompt"] or "", self.grid_of(start, options)
        )

    def between(self, first: object, last: object, steps: object, **wishes: object) -> Iterator[Sketch | list[Pair]]:
        """Pairs on the way from one seed to another: sketches of the first, then all."""
        a, b = whole(first, 0, MAX_SEED, "first seed"), whole(last, 0, MAX_SEED, "last seed")
        count, options = whole(steps, 2, MAX_PAIRS, "number of steps"), self.wishes(**wishes)
        return self.watched(
            lambda watch: self.model.interpolate(a, b, count, watch=watch, **options), options["prompt"] or "", self.grid_of(a, options)
        )

    def grid_of(self, seed: int, options: dict[str, Any]) -> tuple[int, int]:
        """The shape of the seed's first sample."""
        plan = self.model.plan(**options)
        (tags,) = self.model.tags_of(latents.uniform(latents.draw(seed, [0], latents.TAG_SLOTS)), plan)
        return tags.grid or self.model.vocabulary.default_grid

    def watched(
        self, make: Callable[[Watch], list[Pair]], prompt: str = "", grid: tuple[int, int] | None = None
    ) -> Iterator[Sketch | list[Pair]]:
        """What `make` has so far, as often as can be looked at, and its result. Ends its work when nobody listens any more. `grid`: of its first pair."""
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
        """What the model sees of a picture, as large as is good to look at."""
        model, downsample = self.model, self.model.image_tokenizer.config.downsample
        grid = model.grids[cropping.nearest_grid(*picture.size, model.grids)]
        found = cropping.fit_to(picture, grid, downsample, model.fit)
        scale = min(4, max(1, round(found.box[3] / (grid[0] * downsample))))
        array = cropping.cut(picture, found.box, (grid[1] * downsample * scale, grid[0] * downsample * scale), found.paper)
        return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))

    def say(self, picture: Image.Image | None, registers: object) -> list[conditional_generation.Words]:
        """A caption of the picture in each register."""
        shown = given(picture)
        if not isinstance(registers, list) or not registers:
            raise UserError("Please choose a register: in which voice shall it be said?")
        asked = [one_of(name, self.registers, "register") for name in dict.fromkeys(map(str, registers))]
        return self._lane.submit(self.model.caption, shown, asked).result()

    def answer(self, picture: Image.Image | None, question: object) -> list[conditional_generation.Words]:
        shown, asked = given(picture), text(question, "question")
        if not self.can_answer:
            raise UserError("This model was not trained on questions; it can caption the picture.")
        if not asked:
            raise UserError("Please type a question first.")
        return self._lane.submit(self.model.ask, shown, asked).result()

    def vary(self, picture: Image.Image | None, caption: object, amount: object, seed: object) -> list[Pair]:
        """Pairs near the picture and its caption; without one, near the picture and what the model says of it."""
        shown, words = given(picture), text(caption, "caption")
        share, start = number(amount, 0, 1, "distance"), whole(seed, 0, MAX_SEED, "seed")

        def work() -> list[Pair]:
            written = words or own_words(self.model, shown)
            return self.model.vary(self.model.invert(shown, written), share, seed=start, n=VARIATIONS)

        return self._lane.submit(work).result()

    def complete(self, picture: Image.Image | None, keep: object, seed: object) -> list[Pair]:
        """Pairs that go on from a half of the picture."""
        shown, part, start = given(picture), one_of(keep, list(conditional_generation.KEEP), "half"), whole(seed, 0, MAX_SEED, "seed")
        return self._lane.submit(self.model.complete, shown, part, seed=start, n=VARIATIONS).result()


def given(picture: Image.Image | None) -> Image.Image:
    if picture is None:
        raise UserError("Please choose a picture first: upload one, or take the print.")
    return picture


def own_words(model: Tokun, picture: Image.Image) -> str:
    """The model's likeliest caption, as much of it as it can read again: words that it spells strangely may take more pieces."""
    said = model.caption(picture, temperature=0.0)[0].text
    while len(model.text_tokenizer.encode(said)) > model.vocabulary.max_text:
        said = said[:-1]
    return said


def sketch(model: Tokun, codes: list[int], grid: tuple[int, int] | None = None) -> Image.Image:
    """The picture of the first codes of a grid (None: the default one) on white paper."""
    rows, columns = grid or model.vocabulary.default_grid
    filled = [*codes, *[codes[-1] if codes else 0] * (rows * columns - len(codes))]
    image = model.decode_images([filled], [(rows, columns)])[0]
    drawn = (np.arange(rows * columns) < len(codes)).reshape(rows, columns).astype(np.uint8) * 255
    return Image.composite(
        image, Image.new(image.mode, image.size, "white"), Image.fromarray(drawn).resize(image.size, Image.Resampling.NEAREST)
    )


# --- what is shown and taken home -----------------------------------------------------------------------------------


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """A small picture, smoothly enlarged until its longer side has at least so many pixels."""
    scale = math.ceil(side / max(image.size))
    return image if scale <= 1 else image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)


def data_uri(image: Image.Image, kind: str = "JPEG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return inline(buffer.getvalue(), f"image/{kind.lower()}")


def inline(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def keepsakes(pair: Pair) -> dict[str, str]:
    """File name -> data URI: the picture as PNG and SVG, and the record as JSON."""
    name = f"tokun-{pair.seed}-{pair.index:02d}"
    record = json.dumps(pair.record(), ensure_ascii=False, indent=1).encode()
    return {
        f"{name}.png": data_uri(pair.image, "PNG"), f"{name}.svg": inline(to_svg(pair.image).encode(), "image/svg+xml"),
        f"{name}.json": inline(record, "application/json"),
    }  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """What a visitor liked and disliked."""

    better: tuple[Pair, ...] = ()
    worse: tuple[Pair, ...] = ()

    def mark(self, pair: Pair | None, *, liked: bool) -> Judged:
        """With this pair on one side, and no longer on the other; the newest first, REMEMBERED of a side."""
        if pair is None:
            raise UserError("There is no print yet: draw one first.")

        def without(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
            return tuple(other for other in pairs if (other.codes, other.caption_ids) != (pair.codes, pair.caption_ids))

        better, worse = without(self.better), without(self.worse)
        return Judged((pair, *better)[:REMEMBERED], worse) if liked else Judged(better, (pair, *worse)[:REMEMBERED])

    def told(self) -> str:
        found = len(preferences.clicked(self.better, self.worse))
        return f"{len(self.better)} liked, {len(self.worse)} disliked: {found} preference{'' if found == 1 else 's'}"

    def files(self) -> dict[str, str]:
        """File name -> data URI: each liked print with each disliked one of the same wish, as `configs/dpo.yaml` learns from."""
        found = preferences.clicked(self.better, self.worse)
        return {"tokun-preferences.jsonl": inline(preferences.lines(found).encode(), "application/jsonl")} if found else {}


def remember(history: list[Pair], pairs: list[Pair]) -> list[Pair]:
    """The newest first, each once, REMEMBERED of them."""
    kept: list[Pair] = []
    for pair in [*pairs, *history]:
        if not any(pair.codes == other.codes and pair.caption_ids == other.caption_ids for other in kept):
            kept.append(pair)
    return kept[:REMEMBERED]

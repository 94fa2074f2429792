"""Sheets for people's eyes: what can be named in each picture, and which of four captions belongs to it?

    python -m tokun.evaluate --only viewer --shards 'shards/val-*.tar' --viewer-of generated --viewer-n 96 --out report
    python -m tokun.evaluate.viewer score report/viewer-keys/generated.json report/viewer/generated/answers.csv

    OUT/viewer/NAME/naming-1.png …, names.txt       first: pictures with numbers alone, and a form with a line for each
    OUT/viewer/NAME/matching-1.png …, answers.txt   then: four captions beneath each, and the form
    OUT/viewer/NAME/page.html                       both in a browser; it writes answers.csv
    OUT/viewer-keys/NAME.json                       what is right: not for the viewer

Three captions of the four belong to other pairs that are not on the sheets, so that none is found by elimination; one of the three is of the same
kind (subject) where there is one. The same pairs and the same seed make the same sheets. Knows pictures, captions and kinds; never models.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokun.render import grids
from tokun.utils import checkpoint
from tokun.utils.errors import UserError

LETTERS = "abcd"
ON_A_SHEET, COLUMNS, CELL = 24, 6, 240
LARGE = 480  # px of the longer side, in the page


@dataclass(frozen=True)
class Shown:
    """A pair that may be shown, or whose caption may stand beneath another's picture."""

    key: str
    caption: str
    kind: str
    image: Image.Image | None = None
    """None: its caption alone is used."""


@dataclass(frozen=True)
class Question:
    """A numbered picture with its four captions, in the order of LETTERS."""

    number: int
    pair: Shown
    options: tuple[str, ...]
    right: str


# --- choosing -------------------------------------------------------------------------------------------------------


def ask(pairs: Sequence[Shown], n: int, seed: int) -> list[Question]:
    """n of the pairs with pictures, drawn by the seed, with wrong captions out of the rest.

    Raises UserError where pairs are too few: n pictures whose captions differ, and three captions more.
    """
    rng = np.random.default_rng(seed)
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    shown = list({pair.caption: pair for pair in reversed(order) if pair.image is not None}.values())[::-1][:n]
    on_sheet = {pair.caption for pair in shown}
    rest = list({pair.caption: pair for pair in reversed(order) if pair.caption not in on_sheet}.values())[::-1]
    if len(shown) < n or len(rest) < len(LETTERS) - 1:
        raise UserError(
            f"{len(pairs)} pairs of {len({p.caption for p in pairs})} captions do not suffice for {n} pictures and the wrong captions of other pairs: "
            f"ask for fewer (--viewer-n), or give more pairs; {len(LETTERS) * n} use no wrong caption twice"
        )
    used: Counter[str] = Counter()
    wrong: list[list[str]] = [[] for _ in shown]
    for same in (True, False, False):  # those of the same kind first, for all: they are the fewest
        for pair, captions in zip(shown, wrong):
            captions.append(_wrong(pair, captions, rest, used, same=same))
    return [_question(number, pair, captions, rng) for number, (pair, captions) in enumerate(zip(shown, wrong), 1)]


def _wrong(pair: Shown, captions: Sequence[str], rest: Sequence[Shown], used: Counter[str], *, same: bool) -> str:
    """A caption out of `rest` (in a drawn order) of the same kind as the pair, or of another one: the least used, of the kind that has most left."""
    left = [other for other in rest if other.caption not in captions]
    fitting = [other for other in left if (other.kind == pair.kind) == same] or left
    unused = Counter(other.kind for other in rest if not used[other.caption])
    found = min(fitting, key=lambda other: (used[other.caption], -unused[other.kind])).caption
    used[found] += 1
    return found


def _question(number: int, pair: Shown, wrong: Sequence[str], rng: np.random.Generator) -> Question:
    options = [pair.caption, *wrong]
    places = rng.permutation(len(options))
    return Question(number, pair, tuple(options[i] for i in places), LETTERS[int(places.argmin())])


# --- what is written ------------------------------------------------------------------------------------------------


def write(questions: Sequence[Question], folder: Path, key: Path, about: dict[str, Any]) -> None:
    """Sheets, forms and page into `folder`, and the key, with `about`, into the file `key`."""
    for path in (folder, key.parent):
        checkpoint.require_writable(path)
    for number, at in enumerate(range(0, len(questions), ON_A_SHEET), 1):
        part = questions[at : at + ON_A_SHEET]
        _sheet(part, [[f"{q.number}"] for q in part]).save(folder / f"naming-{number}.png")
        _sheet(part, [[f"{q.number}", *map(": ".join, zip(LETTERS, q.options))] for q in part]).save(folder / f"matching-{number}.png")
    checkpoint.write_text(folder / "names.txt", "".join(f"{q.number}:\n" for q in questions))
    checkpoint.write_text(folder / "answers.txt", "".join(f"{q.number}:\n" for q in questions))
    checkpoint.write_text(folder / "page.html", page(questions, f"{about.get('of', 'pictures')}, seed {about.get('seed', 0)}"))
    rows = [{"number": q.number, "right": q.right, "kind": q.pair.kind, "key": q.pair.key, "options": list(q.options)} for q in questions]
    checkpoint.write_record(key, {**about, "pictures": rows})


def _sheet(part: Sequence[Question], texts: Sequence[Sequence[str]]) -> Image.Image:
    return grids.captioned_grid([q.pair.image for q in part], texts, columns=COLUMNS, cell=CELL, font_size=16)


def page(questions: Sequence[Question], title: str) -> str:
    """One HTML page that needs nothing else; the right answers are not in it."""
    shown = [{"number": q.number, "picture": _large_url(q.pair.image), "options": q.options} for q in questions]
    data = json.dumps({"title": title, "pictures": shown}, ensure_ascii=False).replace("<", "\\u003c")
    return (Path(__file__).parent / "viewer.html").read_text(encoding="utf-8").replace("DATA_OF_THE_SHEET", data)


def _large_url(image: Image.Image | None) -> str:
    assert image is not None
    scale = LARGE / max(image.size)
    return data_url(image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.LANCZOS))


def data_url(image: Image.Image) -> str:
    """The picture as PNG within a page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    from tokun.evaluate import viewer_score
    from tokun.utils import console

    console.run("tokun.evaluate.viewer", viewer_score.main)

"""Sheets for human viewers: what can be named in each picture, and which of four captions belongs to it?

    tokun evaluate --only viewer --shards 'shards/val-*.tar' --viewer-of generated --viewer-n 96 --out report
    python -m tokun.evaluate.viewer score report/viewer-keys/generated.json report/viewer/generated/answers.csv

    OUT/viewer/NAME/naming-1.png …, names.txt       first: pictures with only numbers, and a form with a line for each
    OUT/viewer/NAME/matching-1.png …, answers.txt   then: four captions below each, and the form
    OUT/viewer/NAME/page.html                       both in a browser; it writes answers.csv
    OUT/viewer-keys/NAME.json                       the right answers, not for the viewer

Three of the four captions belong to pairs that are not on the sheets, so none can be found by elimination; one of the three is of the same
kind (subject), if available. The same pairs and seed give the same sheets. Knows pictures, captions and kinds, not models.
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
    """A pair that may be shown, or whose caption may be a wrong answer."""

    key: str
    caption: str
    kind: str
    image: Image.Image | None = None
    """None: only its caption is used."""


@dataclass(frozen=True)
class Question:
    """A numbered picture with its four captions, in the order of LETTERS."""

    number: int
    pair: Shown
    options: tuple[str, ...]
    right: str


# --- choosing -------------------------------------------------------------------------------------------------------


def ask(pairs: Sequence[Shown], n: int, seed: int) -> list[Question]:
    """n of the pairs with pictures, drawn by the seed, with wrong captions from the rest.

    Raises UserError if there are too few pairs: n pictures with different captions and three more captions are needed.
    """
    rng = np.random.default_rng(seed)
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    shown = list({pair.caption: pair for pair in reversed(order) if pair.image is not None}.values())[::-1][:n]
    on_sheet = {pair.caption for pair in shown}
    rest = list({pair.caption: pair for pair in reversed(order) if pair.caption not in on_sheet}.values())[::-1]
    if len(shown) < n or len(rest) < len(LETTERS) - 1:
        raise UserError(
            f"{len(pairs)} pairs of {len({p.caption for p in pairs})} captions are too few for {n} pictures with wrong "
            "captions from other pairs: "
            f"ask for fewer (--viewer-n), or give more pairs; with {len(LETTERS) * n} no wrong caption is used twice"
        )
    used: Counter[str] = Counter()
    wrong: list[list[str]] = [[] for _ in shown]
    for same in (True, False, False):  # those of the same kind first, as they are the scarcest
        for pair, captions in zip(shown, wrong):
            captions.append(_wrong(pair, captions, rest, used, same=same))
    return [_question(number, pair, captions, rng) for number, (pair, captions) in enumerate(zip(shown, wrong), 1)]


def _wrong(pair: Shown, captions: Sequence[str], rest: Sequence[Shown], used: Counter[str], *, same: bool) -> str:
    """A caption from `rest` (in a drawn order) of the pair's kind or of another: the least used, of the kind with most left."""
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


# --- output ---------------------------------------------------------------------------------------------------------


def write(questions: Sequence[Question], folder: Path, key: Path, about: dict[str, Any]) -> None:
    """Write sheets, forms and page into `folder`, and the key, with `about`, into the file `key`."""
    for path in (folder, key.parent):
        checkpoint.require_writable(path)
    for number, at in enumerate(range(0, len(questions), ON_A_SHEET), 1):
        part = questions[at : at + ON_A_SHEET]
        grids.save_page(_sheet(part, [[f"{q.number}"] for q in part]), folder / f"naming-{number}.png")
        matching = _sheet(part, [[f"{q.number}", *map(": ".join, zip(LETTERS, q.options))] for q in part])
        grids.save_page(matching, folder / f"matching-{number}.png")
    checkpoint.write_text(folder / "names.txt", "".join(f"{q.number}:\n" for q in questions))
    checkpoint.write_text(folder / "answers.txt", "".join(f"{q.number}:\n" for q in questions))
    checkpoint.write_text(folder / "page.html", page(questions, f"{about.get('of', 'pictures')}, seed {about.get('seed', 0)}"))
    rows = [{"number": q.number, "right": q.right, "kind": q.pair.kind, "key": q.pair.key, "options": list(q.options)} for q in questions]
    checkpoint.write_record(key, {**about, "pictures": rows})


def _sheet(part: Sequence[Question], texts: Sequence[Sequence[str]]) -> Image.Image:
    return grids.captioned_grid([q.pair.image for q in part if q.pair.image is not None], texts, columns=COLUMNS, cell=CELL, font_size=16)


def page(questions: Sequence[Question], title: str) -> str:
    """One self-contained HTML page, without the right answers."""
    shown = [{"number": q.number, "picture": _large_url(q.pair.image), "options": q.options} for q in questions]
    data = json.dumps({"title": title, "pictures": shown}, ensure_ascii=False).replace("<", "\\u003c")
    return (Path(__file__).parent / "viewer.html").read_text(encoding="utf-8").replace("DATA_OF_THE_SHEET", data)


def _large_url(image: Image.Image | None) -> str:
    assert image is not None
    scale = LARGE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    grids.save_page(image.resize((width, height), Image.Resampling.LANCZOS), buffer)
    return data_url(buffer.getvalue())


def data_url(png: bytes) -> str:
    """The data URL of a PNG file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


if __name__ == "__main__":
    from tokun.evaluate import viewer_score
    from tokun.utils import console

    console.run("tokun.evaluate.viewer", viewer_score.main)

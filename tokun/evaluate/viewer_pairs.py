"""The pairs that a viewer is shown. Knows the model and its pairs; `viewer` makes the sheets.

generated         samples with their captions
reconstructions   held-out pictures through the image tokenizer, with their captions
originals         held-out pictures unchanged: the best that a viewer can do
prompted          pictures that the model draws from held-out captions
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from tokun.data.image_files import open_own_png
from tokun.evaluate import viewer
from tokun.evaluate.doctor import reconstructed
from tokun.evaluate.figures import Figure, skipped
from tokun.evaluate.viewer import Question, Shown
from tokun.inference.candidates import own_score
from tokun.utils import checkpoint
from tokun.utils.errors import UserError
from tokun.utils.files import whole_file

if TYPE_CHECKING:
    from tokun.evaluate.__main__ import Case


def measure(case: Case) -> list[Figure]:
    """Write the sheets of each requested source. The figures are only counts; the viewer does the measuring."""
    found = []
    for name in case.args.viewer_of:
        folder, key = case.args.out / "viewer" / name, case.args.out / "viewer-keys" / f"{name}.json"
        about = {
            "of": name,
            "seed": case.args.seed,
            **case.chosen,
            "checkpoint": {"name": case.args.checkpoint or "bundled", **case.identity},
            "shards": case.args.shards,
        }
        try:
            questions = viewer.ask(shown(case, name), case.args.viewer_n, case.args.seed)
            questions = drawn(case, questions) if name == "prompted" else questions
        except UserError as error:
            found.append(skipped(f"sheets of {name}", str(error)))
            continue
        viewer.write(questions, folder, key, about)
        note = f"{folder}/page.html; then python -m tokun.evaluate.viewer score {shlex.quote(str(key))} ANSWERS"
        found.append(Figure(f"pictures on sheets of {name}", len(questions), len(questions), note=note))
    return found


def shown(case: Case, name: str) -> list[Shown]:
    """The pairs of a source. Those to be drawn still have the held-out pictures."""
    if name == "generated":
        return [Shown(f"{pair.seed}-{pair.index}", pair.caption, pair.tags.subject, pair.image) for pair in case.samples]
    images = [pair.image for pair in case.held_out]
    if name == "reconstructions":
        images = reconstructed(case.model, case.held_out)
    return [Shown(pair.key, pair.caption, pair.tags.subject, image) for pair, image in zip(case.held_out, images)]


def drawn(case: Case, questions: Sequence[Question]) -> list[Question]:
    """The same questions with the picture that the model draws from each caption, stored in --out along the way.

    Raises UserError if the model does not draw from captions, or the folder holds pictures of another model or seed.
    """
    folder = case.args.out / "viewer-prompted"
    checkpoint.require_writable(folder)
    asked = {"seed": case.args.seed, **case.identity, **case.chosen}
    if (there := checkpoint.read_record(folder / "drawn.json")) is not None:
        checkpoint.require_same(folder, there, asked)
    checkpoint.write_record(folder / "drawn.json", asked)
    bar = tqdm(questions, desc="drawing from captions", unit="picture", leave=False)
    return [replace(q, pair=replace(q.pair, image=_drawn(case, folder, q.pair))) for q in bar]


def _drawn(case: Case, folder: Path, pair: Shown) -> Image.Image:
    """The first sample of the seed for the pair's caption (with --best-of the best of the first), from `folder` if already drawn."""
    path = folder / f"{hashlib.sha256(f'{pair.key} {pair.caption}'.encode()).hexdigest()[:16]}.png"
    if not path.is_file():
        (made,) = case.model.best_of(case.args.seed, 1, case.args.best_of, own_score(case.model, case.args.reward), prompt=pair.caption)
        with whole_file(path) as aside:
            made.image.save(aside, "PNG")
    return open_own_png(path)

"""Samples as single pictures, written batch by batch, with resume after a kill.

    out/000042-00.png …   one per sample, enlarged if so wished; with `svg_bytes` an SVG beside each
    out/samples.jsonl     one record per sample, and out/grid.png of the first 64: written at the end
    out/.samples/         until then: what was asked, and the records of each finished batch

An interruption loses only the current batch, and the bytes do not depend on it. An earlier run's pictures, which its samples.jsonl lists,
are removed first: they would be mistaken for the new run's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from tokun.render import scale
from tokun.render.grids import captioned_grid
from tokun.render.svg import to_svg
from tokun.utils import checkpoint

if TYPE_CHECKING:
    from tokun.inference.model import Pair

LISTED, GRID, SHEET, STATE, ASKED = "samples.jsonl", "grid.png", "sheet.png", ".samples", "asked.json"
ON_GRID = 64
MANY = 1000  # pictures of an unfinished run that are not thrown away for another run
OURS = re.compile(r"(steps-\d+-|completed-|varied-)?\d{6,}-\d{2,}\.png")


def write(
    draw: Callable[[range], list[Pair]], n: int, out: Path, asked: dict[str, Any], *, batch_size: int, svg_bytes: int = 0,
    enlarge: scale.Enlarge = scale.NOT,
) -> None:  # fmt: skip
    """Write pairs 0 … n-1. `draw` returns those of a range; `asked` is everything that decides them, as plain JSON.

    Batches that an earlier call with the same `asked` finished are kept. Raises UserError if `out` holds more than MANY pictures of an
    unfinished call with another.
    """
    asked = json.loads(json.dumps({**asked, **enlarge.record(), "n": n, "batch_size": batch_size, "svg_bytes": svg_bytes}))
    state = out / STATE
    there = checkpoint.read_record(state / ASKED)
    if there != asked:
        if there is not None and sum(1 for _ in records(state)) > MANY:
            checkpoint.require_same(out, there, asked, option="--out")
        drawn = draw(range(min(n, batch_size)))  # first: what is refused removes nothing
        remove_earlier(out)
        checkpoint.write_record(state / ASKED, asked)
        write_batch(drawn, state / f"{0:010d}.jsonl", out, svg_bytes, enlarge)
    parts = [state / f"{first:010d}.jsonl" for first in range(0, n, batch_size)]
    for part in tqdm(parts, desc="sampling", unit="batch", disable=len(parts) == 1):
        if not is_whole(part, out):
            first = int(part.stem)
            write_batch(draw(range(first, min(n, first + batch_size))), part, out, svg_bytes, enlarge)
    aside = state / f"{LISTED}.partial"
    with open(aside, "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    os.replace(aside, out / LISTED)
    write_grid(out)
    remove_state(state)


def write_batch(pairs: list[Pair], part: Path, out: Path, svg_bytes: int, enlarge: scale.Enlarge) -> None:
    """Write the pictures of a batch, and its records: under another name until the pictures are there, so that none is unknown."""
    names = [f"{pair.seed:06d}-{pair.index:02d}.png" for pair in pairs]
    lines = [json.dumps({**pair.record(), "file_name": name, **enlarge.record()}, ensure_ascii=False) for pair, name in zip(pairs, names)]
    begun = part.with_suffix(".begun")
    checkpoint.write_text(begun, "\n".join(lines) + "\n")
    for pair, name in zip(pairs, names):
        enlarge(pair.image).save(out / name)
        if svg_bytes:
            checkpoint.write_text((out / name).with_suffix(".svg"), to_svg(pair.image, svg_bytes))
    os.replace(begun, part)


def is_whole(part: Path, out: Path) -> bool:
    """Whether a batch was finished, and its pictures are still there."""
    try:
        return all((out / json.loads(line)["file_name"]).is_file() for line in part.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def records(folder: Path, pattern: str = "*.jsonl") -> Iterator[dict[str, Any]]:
    """The records in the files of a folder, in order; unreadable lines are left out."""
    for path in sorted(folder.glob(pattern)):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def first_of(out: Path, most: int) -> list[dict[str, Any]]:
    """The first records of a finished run."""
    return [record for _, record in zip(range(most), records(out, LISTED))]


def write_grid(out: Path) -> None:
    first = first_of(out, ON_GRID)
    grid = scale.grid if any(one.get("scale", 1) != 1 for one in first) else captioned_grid
    grid(list(images_of(out, first)), [one["caption"] for one in first]).save(out / GRID)


def images_of(out: Path, listed: list[dict[str, Any]]) -> Iterator[Image.Image]:
    for one in listed:
        with Image.open(out / one["file_name"]) as image:
            image.load()
            yield image


def remove_earlier(out: Path) -> None:
    """Remove an earlier run's files: only the pictures that its samples.jsonl or its unfinished batches list, and these lists."""
    state = out / STATE
    names = [name_in(record) for record in (*records(out, LISTED), *records(state), *records(state, "*.begun"))]
    for name in filter(OURS.fullmatch, names):
        for path in (out / name, (out / name).with_suffix(".svg")):
            path.unlink(missing_ok=True)
    if any(name.startswith("steps-") for name in names):
        for name in ("strip.png", "interpolation.gif", "interpolation.mp4"):
            (out / name).unlink(missing_ok=True)
    if any(name.startswith(("completed-", "varied-")) for name in names):
        (out / SHEET).unlink(missing_ok=True)
    if names:
        for name in (GRID, LISTED):
            (out / name).unlink(missing_ok=True)
    remove_state(state)


def name_in(record: Mapping[str, Any]) -> str:
    """The picture's name in a record; earlier versions did not write it. "" if there is none."""
    try:
        return str(record.get("file_name") or f"{record['seed']:06d}-{record['index']:02d}.png")
    except (KeyError, TypeError, ValueError):
        return ""


def remove_state(state: Path) -> None:
    """Remove the folder of an unfinished run, what was asked last: until then it says whose the batches are."""
    if state.is_dir():
        for path in sorted(state.iterdir(), key=lambda path: path.name == ASKED):
            path.unlink()
        state.rmdir()

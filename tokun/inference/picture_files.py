"""Samples as single pictures, written batch by batch, with resume after a kill.

    out/000042-00.png …   one per sample or choice, by its number; enlarged if requested; with `svg_bytes` an SVG beside each
    out/samples.jsonl     one record per sample, and out/grid.png of the first 64: written at the end
    out/.samples/         until then: what was asked for, and the records of each finished batch

    out/earlier/1 …       the pictures of earlier runs, each with their samples.jsonl and grid; the same run again replaces its own files

An interruption loses only the current batch, and the bytes do not depend on it. Only pictures that a samples.jsonl lists are ever moved.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from tokun.data.image_files import open_own_png
from tokun.render import scale
from tokun.render.grids import captioned_grid
from tokun.render.svg import to_svg
from tokun.utils import checkpoint

if TYPE_CHECKING:
    from tokun.inference.model import Pair

LISTED, GRID, SHEET, STATE, ASKED, EARLIER = "samples.jsonl", "grid.png", "sheet.png", ".samples", "asked.json", "earlier"
ON_GRID = 64
MANY = 1000  # more pictures than this of an unfinished run are not discarded for another run
OURS = re.compile(r"(steps-\d+-|completed-|varied-)?\d{6,}-\d{2,}\.png")
# further files of a run
BESIDE = {
    "steps-": ("strip.png", "interpolation.gif", "interpolation.mp4"),
    "completed-": (SHEET,),
    "varied-": (SHEET,),
}  # by the beginning of the pictures' names


def write(
    draw: Callable[[range], list[Pair]],
    n: int,
    out: Path,
    asked: dict[str, Any],
    *,
    batch_size: int,
    svg_bytes: int = 0,
    enlarge: scale.Enlarge = scale.NOT,
) -> None:
    """Write pairs 0 … n-1. `draw` returns those of a range; `asked` is everything that determines them, as plain JSON.

    Batches that an earlier call with the same `asked` finished are kept. Raises UserError if `out` holds more than MANY pictures of an
    unfinished call with another.
    """
    # a caller's own "batch_size" is that of samples, which are drawn with all their candidates
    asked = json.loads(json.dumps({"batch_size": batch_size, **asked, **enlarge.record(), "n": n, "svg_bytes": svg_bytes}))
    state = out / STATE
    there = checkpoint.read_record(state / ASKED)
    if there != asked:
        if there is not None and sum(1 for _ in records(state)) > MANY:
            checkpoint.require_same(out, there, asked, option="--out")
        drawn = draw(range(min(n, batch_size)))  # before files are moved: options may be refused
        make_room(out, lines_of(drawn, names_of(drawn, 0), enlarge), n)
        checkpoint.write_record(state / ASKED, asked)
        write_batch(drawn, 0, state, out, svg_bytes, enlarge)
    parts = [part_of(state, first) for first in range(0, n, batch_size)]
    for part in tqdm(parts, desc="sampling", unit="batch", disable=len(parts) == 1):
        if not is_whole(part, out):
            first = int(part.stem)
            write_batch(draw(range(first, min(n, first + batch_size))), first, state, out, svg_bytes, enlarge)
    joined = state / f"{LISTED}.partial"
    with open(joined, "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    os.replace(joined, out / LISTED)
    write_grid(out)
    remove_state(state)


def part_of(state: Path, first: int) -> Path:
    """The records of the batch that begins with pair `first`, once it is finished."""
    return state / f"{first:010d}.jsonl"


def names_of(pairs: Sequence[Pair], first: int) -> list[str]:
    """The file names of pairs first, first + 1 … of a seed. A pair that was chosen among candidates is not numbered by its sample."""
    return [f"{pair.seed:06d}-{number:02d}.png" for number, pair in enumerate(pairs, first)]


def lines_of(pairs: Sequence[Pair], names: Sequence[str], enlarge: scale.Enlarge) -> list[str]:
    """The lines of samples.jsonl. `names` are the file names of the pictures."""
    return [
        json.dumps({**pair.record(), "file_name": name, **enlarge.record()}, ensure_ascii=False)
        for pair, name in zip(pairs, names, strict=True)
    ]


def write_batch(pairs: list[Pair], first: int, state: Path, out: Path, svg_bytes: int, enlarge: scale.Enlarge) -> None:
    """Write the pictures of pairs first … and their records. Until all pictures are written, the records have another name: so every
    picture is listed somewhere."""
    part, names = part_of(state, first), names_of(pairs, first)
    begun = part.with_suffix(".begun")
    checkpoint.write_text(begun, "\n".join(lines_of(pairs, names, enlarge)) + "\n")
    for pair, name in zip(pairs, names, strict=True):
        path = out / name
        enlarge(pair.image).save(path)
        if svg_bytes:
            checkpoint.write_text(path.with_suffix(".svg"), to_svg(pair.image, svg_bytes))
    os.replace(begun, part)


def is_whole(part: Path, out: Path) -> bool:
    """Whether a batch was finished, and its pictures are still there."""
    try:
        with open(part, encoding="utf-8") as file:
            return all((out / json.loads(line)["file_name"]).is_file() for line in file)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def records(folder: Path, pattern: str = "*.jsonl") -> Iterator[dict[str, Any]]:
    """The records in the files of a folder, in order; unreadable lines are left out."""
    for path in sorted(folder.glob(pattern)):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:  # not `str.splitlines`: a caption may hold other characters that it takes for line ends
                    with contextlib.suppress(ValueError):
                        record = json.loads(line)
                        if isinstance(record, dict):
                            yield record
        except OSError:
            continue


def first_of(out: Path, most: int) -> list[dict[str, Any]]:
    """The first records of a finished run."""
    return list(itertools.islice(records(out, LISTED), most))


@contextlib.contextmanager
def announced(out: Path, lines: Iterable[str]) -> Iterator[None]:
    """Within the block the pictures of these records are written, and their list. After a kill, the next run removes unlisted pictures."""
    checkpoint.write_text(out / STATE / "pairs.begun", "".join(f"{line}\n" for line in lines))
    yield
    remove_state(out / STATE)


def write_grid(out: Path) -> None:
    first = first_of(out, ON_GRID)
    grid = scale.grid if any(one.get("scale", 1) != 1 for one in first) else captioned_grid
    grid(list(images_of(out, first)), [one["caption"] for one in first]).save(out / GRID)


def images_of(out: Path, listed: list[dict[str, Any]]) -> Iterator[Image.Image]:
    for one in listed:
        yield open_own_png(out / one["file_name"])


def make_room(out: Path, lines: Sequence[str], n: int, *, but: Path | None = None) -> None:
    """Move an earlier run's files to `out/earlier` and print where they are, unless it drew the same pairs: `n`, of which `lines` are the
    first records. The file `but` also stays where it is."""
    there = records(out, LISTED)
    first = list(itertools.islice(there, len(lines)))
    if first == list(map(json.loads, lines)) and len(first) + sum(1 for _ in there) == n:
        remove_state(out / STATE)  # the files are overwritten by the same ones
    elif moved := put_aside(out, but=but):
        tqdm.write(f"the pictures that were in {out} are now in {moved}")


def put_aside(out: Path, *, but: Path | None = None) -> Path | None:
    """Move an earlier run's files to `out/earlier/NUMBER`: the pictures that its samples.jsonl or its finished batches list, and the lists.
    Pictures of a batch that was never finished are removed. After a kill, the next call continues with the same folder. Returns the
    folder, or None if nothing was moved."""
    state = out / STATE
    listed = set(map(name_in, records(out, LISTED)))  # a batch may hold the same pictures, if the same run was begun again
    for name in filter(OURS.fullmatch, map(name_in, records(state, "*.begun"))):
        for path in both(out / name):
            if name not in listed and not is_same(path, but):
                path.unlink(missing_ok=True)
    names = [name for record in itertools.chain(records(out, LISTED), records(state)) if OURS.fullmatch(name := name_in(record))]
    made = [path for name in dict.fromkeys(names) for path in both(out / name)]
    made += [out / name for start, more in BESIDE.items() if any(name.startswith(start) for name in names) for name in more]
    made = [path for path in made if path.is_file()]
    if names and not (out / LISTED).is_file():  # the run was stopped
        checkpoint.write_text(out / LISTED, "".join(path.read_text(encoding="utf-8") for path in sorted(state.glob("*.jsonl"))))
    remove_state(state)
    if not names:
        return None
    numbers = [int(path.name) for path in (out / EARLIER).glob("*") if path.name.isdecimal()]
    target = out / EARLIER / str(max(numbers, default=1))
    if (target / LISTED).is_file() or any((target / path.name).exists() for path in made):
        target = target.with_name(str(max(numbers) + 1))
    target.mkdir(parents=True, exist_ok=True)
    for path in [*made, out / GRID, out / LISTED]:  # the list last: until it is there, the move is not finished
        if path.is_file():
            (shutil.copy2 if is_same(path, but) else os.replace)(path, target / path.name)
    return target


def is_same(path: Path, other: Path | None) -> bool:
    return other is not None and path.is_file() and other.is_file() and path.samefile(other)


def both(picture: Path) -> tuple[Path, Path]:
    """A picture's file, and that of the drawing beside it."""
    return picture, picture.with_suffix(".svg")


def name_in(record: Mapping[str, Any]) -> str:
    """The picture's name in a record; earlier versions did not write it. "" if there is none."""
    try:
        return str(record.get("file_name") or f"{record['seed']:06d}-{record['index']:02d}.png")
    except (KeyError, TypeError, ValueError):
        return ""


def remove_state(state: Path) -> None:
    """Remove the folder of an unfinished run. The file of what was asked for is removed last: it says which run the batches belong to."""
    if state.is_dir():
        for path in sorted(state.iterdir(), key=lambda path: path.name == ASKED):
            path.unlink()
        state.rmdir()

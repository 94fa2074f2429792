"""Inspect: what does a folder of shards hold, and is any of it damaged?

    tokun inspect shards/ --verify --sheet sheet.png

Prints counts, sizes, captions and tags of image shards (KEY.webp + KEY.json) and code shards (KEY.codes.npy + KEY.json).
With --verify every member is read and decoded, damage is listed, and the exit code is 1 if there is any.
Samples are told apart as in training (`tokun.data.shards.group`), with one pair in memory at a time. Needs no model and no torch.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.pipeline.output import RECORD
from tokun.data import captions as captions_of_data
from tokun.data import image_files, tars
from tokun.data.shards import CODES_SUFFIX as CODES
from tokun.data.shards import IMAGE_SUFFIXES as IMAGE_EXTENSIONS
from tokun.data.shards import MADE, Grouped, group, shown_key, without_shards
from tokun.render.grids import captioned_grid
from tokun.utils import console
from tokun.utils.console import home_path
from tokun.utils.errors import BadSample, UserError

CODES_RECORD = "codes.json"  # stored beside code shards
SHEET = 32  # pictures on the contact sheet


# ---------------------------------------------------------------------------------------------------------------------
# reading


@dataclass
class StoredPair:
    """The members of one key as bytes, by extension (everything after the first dot of the name)."""

    shard: Path
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(offset, size) in the shard of each member."""

    @property
    def image(self) -> bytes | None:
        return next((self.members[name] for name in IMAGE_EXTENSIONS if name in self.members), None)


@dataclass(frozen=True)
class Damage:
    """One fault: the shard, the member or key ("" for the whole shard), and what is wrong."""

    shard: str
    member: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{'/' if self.member else ''}{self.member}: {self.what}"


def find_shards(paths: Iterable[Path]) -> list[Path]:
    """The given .tar files and those in the given folders, sorted. Raises FileNotFoundError if there are none."""
    shards: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give shards (.tar) or a folder of them. {MADE}")
        inside = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(without_shards(path))
        shards += inside
    return shards


def read_pairs(shard: Path, damaged: list[Damage]) -> Iterator[StoredPair]:
    """The pairs of one shard, in the order of their first members, grouped as in training.

    What cannot be read, and ambiguous samples, which training leaves out too, are added to `damaged`.
    """
    skipped: Counter[str] = Counter()
    try:
        names, where = tars.files(shard, skipped)
        size = shard.stat().st_size
    except (UserError, OSError) as error:
        damaged.append(Damage(shard.name, "", f"cannot be read: {error}"))
        return
    places: list[tuple[int, int]] = [(offset, length) for offset, length in where.tolist()]
    end = max((offset + length for offset, length in places), default=0)
    if not skipped.keys() - {tars.NO_FILE} and size < (2 - -end // tars.BLOCK) * tars.BLOCK:  # it stops in its end mark
        skipped["truncated shard"] = 1
    found = grouped(names, others=True)
    damaged += [Damage(shard.name, "", what) for what in skipped]
    damaged += [Damage(shard.name, shown_key(found.keys[row]), what) for what, rows in found.ambiguous.items() for row in rows]
    members: dict[int, dict[str, int]] = {row: {} for row in range(len(found.keys))}
    for suffix, of_suffix in found.files.items():
        for row, number in of_suffix.items():
            members[row][suffix] = number
    for row in (row for rows in found.ambiguous.values() for row in rows):
        del members[row]
    with open(shard, "rb", buffering=0) as file:
        for row, own in members.items():
            order = {suffix: places[number] for suffix, number in sorted(own.items(), key=lambda item: item[1])}
            yield read_pair(StoredPair(shard, found.keys[row], places=order), file.fileno())


def grouped(names: Sequence[str], *, others: bool = False) -> Grouped:
    """The samples of a shard of pictures or codes."""
    return group(names, ("json", *IMAGE_EXTENSIONS, CODES), IMAGE_EXTENSIONS, others=others)


def read_pair(pair: StoredPair, file: int) -> StoredPair:
    """The pair with its members read from the open shard."""
    pair.members = {suffix: os.pread(file, size, offset) for suffix, (offset, size) in pair.places.items()}
    return pair


def read_record(pair: StoredPair, damaged: list[Damage]) -> dict[str, Any]:
    """KEY.json as a dict; empty if it is missing or damaged."""
    if "json" not in pair.members:
        damaged.append(Damage(pair.shard.name, pair.key, "missing partner: no .json"))
        return {}
    try:
        record = json.loads(pair.members["json"])
        if not isinstance(record, dict):
            raise BadSample("it is not an object")
        if not isinstance(record.get("caption"), str) and not captions_of_data.plain_of(record):
            raise BadSample("it has no caption")
    except (ValueError, RecursionError) as error:
        damaged.append(Damage(pair.shard.name, f"{pair.key}.json", f"invalid JSON: {error}"))
        return {}
    return record


def open_image(pair: StoredPair, damaged: list[Damage]) -> Image.Image | None:
    """The pair's picture, decoded as in training: upright, in sRGB. None if it is missing or damaged."""
    try:
        return image_files.decode(pair.image) if pair.image is not None else None
    except image_files.PictureError as error:
        damaged.append(Damage(pair.shard.name, pair.key, f"undecodable picture: {error}"))
        return None


def read_head(pair: StoredPair, damaged: list[Damage]) -> tuple[str, tuple[int, int]] | None:
    """(format, (width, height) of the upright picture), from its header; None if it is missing or damaged."""
    if pair.image is None:
        return None
    try:
        with image_files.quiet():
            return str(image_files.read_header(pair.image).format), image_files.size_of(pair.image)
    except image_files.PictureError as error:
        damaged.append(Damage(pair.shard.name, pair.key, f"undecodable picture: {error}"))
        return None


def read_codes(pair: StoredPair, damaged: list[Damage]) -> np.ndarray | None:
    """The pair's codes (views, N) uint16; None if they are missing or damaged."""
    if CODES not in pair.members:
        return None
    try:
        codes = np.load(io.BytesIO(pair.members[CODES]), allow_pickle=False)
        if codes.dtype != np.uint16 or codes.ndim != 2 or not codes.size:
            raise BadSample(f"they are {codes.dtype} of shape {codes.shape}, not uint16 (views, N)")
    except (ValueError, OSError, EOFError) as error:
        damaged.append(Damage(pair.shard.name, f"{pair.key}.{CODES}", f"unreadable codes: {error}"))
        return None
    return codes


def read_beside(folder: Path, name: str, damaged: list[Damage]) -> dict[str, Any]:
    """The JSON object in a file beside the shards; {} if it is missing or damaged."""
    path = folder / name
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise BadSample("it is not an object")
    except (ValueError, OSError, RecursionError) as error:
        damaged.append(Damage(name, "", f"invalid JSON: {error}"))
        return {}
    return value


# ---------------------------------------------------------------------------------------------------------------------
# counting


@dataclass
class Inventory:
    """Everything counted over the shards."""

    shards: dict[str, int] = field(default_factory=dict)  # path -> pairs
    bytes: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) of each picture
    formats: Counter[str] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)  # of each caption
    words: list[int] = field(default_factory=list)
    distinct: set[int] = field(default_factory=set)  # hashes of the captions' gists
    seen: captions_of_data.Seen = field(default_factory=captions_of_data.Seen)  # decides whether the captions say enough
    tags: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("style", "subject", "source", "license", "register")}
    )
    code_counts: np.ndarray = field(default_factory=lambda: np.zeros(2**16, np.int64))
    codebook_size: int | None = None  # from codes.json
    views: Counter[tuple[int, int]] = field(default_factory=Counter)  # shapes of code arrays
    grids: Counter[str] = field(default_factory=Counter)  # rows x columns of each sample's codes
    damaged: list[Damage] = field(default_factory=list)
    sheet: list[tuple[Image.Image, str]] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return sum(self.shards.values())


def take_inventory(shards: list[Path], *, verify: bool = False, sheet: int = 0) -> Inventory:
    """Read all shards once. `verify` decodes every picture; `sheet` is how many pictures to keep for the contact sheet."""
    inventory = Inventory()
    for shard in shards:
        inventory.bytes += shard.stat().st_size
        inventory.shards[str(shard)] = 0
        for pair in read_pairs(shard, inventory.damaged):
            inventory.shards[str(shard)] += 1
            count_pair(inventory, pair, verify=verify, keep=len(inventory.sheet) < sheet)
    for folder in sorted({shard.parent for shard in shards}):
        check_beside(inventory, folder)
    return inventory


def count_pair(inventory: Inventory, pair: StoredPair, *, verify: bool, keep: bool) -> None:
    damaged = inventory.damaged
    record = read_record(pair, damaged)
    if pair.image is None and CODES not in pair.members:
        damaged.append(Damage(pair.shard.name, pair.key, "missing partner: neither picture nor codes"))
    if (head := read_head(pair, damaged)) is not None:
        image = open_image(pair, damaged) if verify or keep else None
        if image is not None or not (verify or keep):
            inventory.formats[head[0]] += 1
            inventory.sizes.append(head[1])
        if image is not None and keep:
            inventory.sheet.append((image, captions_of_data.plain_of(record)))
    codes = read_codes(pair, damaged)
    if codes is not None:
        inventory.code_counts += np.bincount(codes.ravel(), minlength=2**16)
        inventory.views[codes.shape] += 1
        count_grid(inventory, pair, record.get("grid"), codes.shape[1])
    if record:
        caption = captions_of_data.plain_of(record)
        inventory.characters.append(len(caption))
        inventory.words.append(len(caption.split()))
        if said := inventory.seen.add(record):
            inventory.distinct.add(hash(captions_of_data.gist(said)))
        for name in ("style", "subject", "source", "license"):
            inventory.tags[name][str(record.get(name) or "")] += 1
        captions = record.get("captions")
        inventory.tags["register"].update(map(str, captions) if isinstance(captions, dict) else ())


def count_grid(inventory: Inventory, pair: StoredPair, grid: Any, n: int) -> None:
    """Count the grid that a record names, or report that the codes do not fill it."""
    if isinstance(grid, list) and len(grid) == 2 and all(isinstance(side, int) for side in grid) and grid[0] * grid[1] == n:
        inventory.grids[f"{grid[0]}x{grid[1]}"] += 1
    elif grid is not None:
        inventory.damaged.append(Damage(pair.shard.name, pair.key, f"{n} codes do not fill its grid {grid!r}"))


def check_beside(inventory: Inventory, folder: Path) -> None:
    """Compare the shards of `folder` with prepare.json and codes.json, if present."""
    damaged = inventory.damaged
    for shard, pairs in read_beside(folder, RECORD, damaged).get("shards", {}).items():
        found = inventory.shards.get(str(folder / shard))
        if not (folder / shard).exists():
            damaged.append(Damage(shard, "", f"missing shard with {pairs} pairs"))
        elif found is not None and found != pairs:
            damaged.append(Damage(shard, "", f"{found} pairs; {RECORD} says {pairs}"))
    size = read_beside(folder, CODES_RECORD, damaged).get("codebook_size")
    if size is not None and inventory.views:
        inventory.codebook_size = int(size)
        if (beyond := int(inventory.code_counts[inventory.codebook_size :].sum())) > 0:
            damaged.append(Damage(CODES_RECORD, "", f"{beyond:,} codes exceed its codebook_size {size}"))


def perplexity(counts: np.ndarray) -> float:
    """exp of a histogram's entropy: the number of equally frequent codes with the same entropy."""
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


# ---------------------------------------------------------------------------------------------------------------------
# printing


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Minimum, quartiles, 95th percentile and maximum of a list of numbers."""
    low, q1, median, q3, p95, high = np.percentile(values, (0, 25, 50, 75, 95, 100))
    named = zip(("min", "25%", "median", "75%", "95%", "max"), (low, q1, median, q3, p95, high))
    return " · ".join(f"{name} {value:.{digits}f}" for name, value in named)


def most_common(counter: Counter[str], limit: int = 12) -> str:
    shown = [f"{name or '(none)'} {count:,}" for name, count in counter.most_common(limit)]
    return " · ".join(shown) + (f" · and {len(counter) - limit} more" if len(counter) > limit else "")


def describe(inventory: Inventory) -> str:
    """The inventory as text."""
    lines = [f"shards      {len(inventory.shards):,} with {inventory.pairs:,} pairs, {inventory.bytes / 1e6:,.1f} MB"]
    splits: Counter[str] = Counter()
    for path, count in inventory.shards.items():
        splits[Path(path).name.split("-")[0].split(".")[0]] += count
    lines.append(f"splits      {most_common(splits)}")
    if inventory.sizes:
        lines.append(f"pictures    {most_common(inventory.formats)}")
        lines.append(f"short side  {spread([min(size) for size in inventory.sizes])}")
        lines.append(f"long side   {spread([max(size) for size in inventory.sizes])}")
        lines.append(f"shape       width / height: {spread([width / height for width, height in inventory.sizes], digits=2)}")
    if inventory.characters:
        empty = inventory.seen.pictures - inventory.seen.captioned
        lines.append(f"captions    {len(inventory.distinct):,} distinct, {empty:,} empty")
        lines += [f"            {doubt}" for doubt in inventory.seen.doubts()]
        lines.append(f"characters  {spread(inventory.characters)}")
        lines.append(f"words       {spread(inventory.words)}")
    lines += [f"{name:<11} {most_common(counts)}" for name, counts in inventory.tags.items() if counts]
    if inventory.views:
        counts = inventory.code_counts
        size = "" if inventory.codebook_size is None else f" of {inventory.codebook_size:,}"
        shapes = Counter({f"{views} x {n}": count for (views, n), count in inventory.views.items()})
        lines.append(f"codes       {int(counts.sum()):,} in (views x N) {most_common(shapes)}")
        if inventory.grids:
            lines.append(f"grids       {most_common(inventory.grids)}")
        lines.append(
            f"codebook    {int((counts > 0).sum()):,} codes used{size}, greatest {int(counts.nonzero()[0][-1])}, "
            f"perplexity {perplexity(counts):,.1f}, most frequent {counts.max() / counts.sum():.2%}"
        )
    return "\n".join(lines)


def check_sheet(path: Path) -> None:
    """Raise UserError unless a picture can be saved under this name."""
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        what = (
            f"ends in {path.suffix}, which is no picture that can be written"
            if path.suffix
            else "has no suffix that says what picture it is"
        )
        raise UserError(f"--sheet {path} {what}: name it {path.with_suffix('.png')}")
    if not path.parent.is_dir():
        raise UserError(f"--sheet {path}: the folder {path.parent} does not exist. Make it, or name another")


def write_sheet(inventory: Inventory, path: Path) -> None:
    """Draw the kept pictures with their captions. Raises UserError if there are none."""
    if not inventory.sheet:
        raise UserError("--sheet needs pictures, and these shards have no readable one (code shards hold only codes)")
    images, captions = zip(*inventory.sheet)
    captioned_grid(images, captions, columns=8, cell=192).save(path)


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m data_tools.inspect", "What is in these shards?")
    parser.add_argument("shards", type=home_path, nargs="+", metavar="SHARDS", help="folders of shards, or .tar files")
    parser.add_argument("--verify", action="store_true", help="decode every member; exit 1 if anything is damaged")
    parser.add_argument("--sheet", type=home_path, metavar="FILE.png", help=f"draw {SHEET} pictures with their captions")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return console.status("inspect", lambda: inspect(args))


def inspect(args: argparse.Namespace) -> int:
    if args.sheet:
        check_sheet(args.sheet)
    shards = find_shards(args.shards)
    inventory = take_inventory(shards, verify=args.verify, sheet=SHEET if args.sheet else 0)
    print(describe(inventory))
    if args.verify:
        print(f"damaged     {len(inventory.damaged):,}")
        for damage in inventory.damaged:
            print(f"  {damage}")
    elif inventory.damaged:
        print(f"damaged     {len(inventory.damaged):,} found so far: list all with --verify")
    if args.sheet:
        write_sheet(inventory, args.sheet)
        print(f"sheet       {args.sheet}")
    return 1 if args.verify and inventory.damaged else 0


if __name__ == "__main__":
    sys.exit(main())

"""Inspect: what does a folder of shards hold, and is any of it damaged?

    tokun inspect shards/ --verify --sheet sheet.png

Prints counts, sizes, captions and tags of image shards (KEY.webp + KEY.json) and code shards (KEY.codes.npy + KEY.json).
With --verify every member is read and decoded, damage is listed, and the exit code is 1 if there is any. The pairs are read by
readers/stored_pairs.py, one at a time. Needs no model and no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.pipeline.output import RECORD
from data_tools.readers.stored_pairs import (
    CODES,
    Damage,
    StoredPair,
    find_shards,
    grouped,
    open_image,
    read_codes,
    read_head,
    read_pair,
    read_pairs,
    read_record,
)
from tokun.data import captions as captions_of_data
from tokun.data.sample_record import plain_of
from tokun.data.shards import IMAGE_SUFFIXES as IMAGE_EXTENSIONS
from tokun.render.grids import captioned_grid
from tokun.utils import console
from tokun.utils.console import home_path
from tokun.utils.errors import BadSample, UserError

__all__ = [  # what was defined here before stored_pairs.py goes on being found here
    "IMAGE_EXTENSIONS", "Damage", "StoredPair", "find_shards", "grouped", "inspect", "main", "make_parser", "open_image", "read_codes",
    "read_head", "read_pair", "read_pairs", "read_record", "take_inventory",
]  # fmt: skip

CODES_RECORD = "codes.json"  # stored beside code shards
SHEET = 32  # pictures on the contact sheet


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
            inventory.sheet.append((image, plain_of(record)))
    codes = read_codes(pair, damaged)
    if codes is not None:
        inventory.code_counts += np.bincount(codes.ravel(), minlength=2**16)
        inventory.views[codes.shape] += 1
        count_grid(inventory, pair, record.get("grid"), codes.shape[1])
    if record:
        caption = plain_of(record)
        inventory.characters.append(len(caption))
        inventory.words.append(len(caption.split()))
        if text := inventory.seen.add(record):
            inventory.distinct.add(hash(captions_of_data.gist(text)))
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
    named = zip(("min", "25%", "median", "75%", "95%", "max"), np.percentile(values, (0, 25, 50, 75, 95, 100)))
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
            f"ends in {path.suffix}, which is not a picture format that can be written"
            if path.suffix
            else "has no suffix that names a picture format"
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

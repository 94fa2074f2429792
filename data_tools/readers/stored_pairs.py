"""Stored pairs: the samples of image and code shards, read whole, each fault noted. Grouped as in training (`tokun.data.shards.group`).

One pair is in memory at a time. Needs no model and no torch.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokun.data import image_files, tars
from tokun.data.sample_record import plain_of
from tokun.data.shards import CODES_SUFFIX as CODES
from tokun.data.shards import IMAGE_SUFFIXES, MADE, Grouped, group, shown_key, without_shards
from tokun.utils.errors import BadSample, UserError


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
        return next((self.members[name] for name in IMAGE_SUFFIXES if name in self.members), None)


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
    return group(names, ("json", *IMAGE_SUFFIXES, CODES), IMAGE_SUFFIXES, others=others)


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
        if not isinstance(record.get("caption"), str) and not plain_of(record):
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

"""The plan of a merge: every pair of the source shards, the row about it, and the new shard that it goes into."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.captioning.captioned_shards import read_record
from data_tools.captioning.described_rows import Counted, DescribedRows, Options, count_facts, described_record
from data_tools.captioning.journals import require_image_shards, sha256
from data_tools.readers.stored_pairs import Damage, StoredPair, find_shards, read_pair, read_pairs
from data_tools.readers.table_files import TableError
from tokun.data.shards import SEVERAL, TWICE
from tokun.utils.errors import UserError


@dataclass
class MergePlan:
    """Every source pair, in a few arrays, and where it goes."""

    shards: list[Path]
    shard: list[int] = field(default_factory=list)
    stamps: list[tuple[int, ...]] = field(default_factory=list)
    """Which file each shard was when it was planned."""
    places: list[tuple[str, bytes]] = field(default_factory=list)  # suffixes of its members, joined by "/"; int64 offsets and sizes
    key: list[str] = field(default_factory=list)
    row: list[str] = field(default_factory=list)  # the row's name for the picture, "" without a row
    facts: list[Counted] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # name of each shard's folder
    named: dict[str, int] = field(default_factory=dict)  # rows with a picture -> the shard of the first
    pictures: int = 0

    @property
    def several(self) -> bool:
        return len({shard.parent for shard in self.shards}) > 1

    def outputs(self, options: Options) -> Iterator[tuple[str, list[int]]]:
        """(name of a new shard, numbers of its pairs in order) of each shard."""
        of_shard: dict[int, list[int]] = {}
        for number, shard in enumerate(self.shard):
            of_shard.setdefault(shard, []).append(number)
        if not self.several:
            yield from ((self.shards[shard].name, numbers) for shard, numbers in of_shard.items())
            return
        splits: dict[str, list[int]] = {}
        for shard, numbers in of_shard.items():
            splits.setdefault(split_of(self.shards[shard]), []).extend(numbers)
        for split, numbers in splits.items():
            seed = [options.seed, int(sha256(split)[:8], 16)]
            mixed = [numbers[i] for i in np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).permutation(len(numbers))]
            for part, start in enumerate(range(0, len(mixed), options.shard_size)):
                yield f"{split}-{part:05d}.tar", mixed[start : start + options.shard_size]

    def pair(self, number: int) -> StoredPair:
        """A pair, read from its source shard."""
        shard = self.shards[self.shard[number]]
        with open(shard, "rb", buffering=0) as file:
            if stamp(os.fstat(file.fileno())) != self.stamps[self.shard[number]]:
                raise UserError(f"{shard} changed while it was being read: run again")
            suffixes, places = self.places[number]
            where = {
                name: (int(at), int(size)) for name, (at, size) in zip(suffixes.split("/"), np.frombuffer(places, np.int64).reshape(-1, 2))
            }
            return read_pair(StoredPair(shard, self.key[number], places=where), file.fileno())


def stamp(file: os.stat_result) -> tuple[int, ...]:
    """What distinguishes a file from one that replaced it or was written over it."""
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def split_of(shard: Path) -> str:
    """train-00003.tar -> train"""
    return re.sub(r"[-_.]?\d+$", "", shard.stem) or "shard"


def sources(paths: Iterable[str | Path], out: Path) -> list[Path]:
    """The shards given by path, folder or pattern. Raises UserError or FileNotFoundError, with the way out."""
    found: list[Path] = []
    for path in map(Path, paths):
        path = path.expanduser()
        typed = sorted(map(Path, glob(str(path)))) if not path.exists() else []
        found += find_shards(typed or [path])
    require_image_shards(found, out)
    return list(dict.fromkeys(found))


def make_plan(shards: list[Path], rows: DescribedRows, options: Options, *, progress: bool) -> MergePlan:
    """Find each pair's row. Raises TableError if a row is ambiguous."""
    plan = MergePlan(shards, folders=[shard.resolve().parent.name for shard in shards], stamps=[stamp(shard.stat()) for shard in shards])
    parents = {shard.resolve().parent for shard in shards}
    if rows.columns.folder and len({parent.name for parent in parents}) < len(parents):
        raise UserError(
            f"two shard folders have the same name ({', '.join(sorted(plan.folders))}), "
            f"so {rows.table.name} cannot tell them apart: rename one"
        )
    twice = Counter[tuple[str, str]]()
    for number, shard in enumerate(tqdm(shards, desc="matching", unit="shard", disable=not progress)):
        damaged: list[Damage] = []
        for pair in read_pairs(shard, damaged):
            plan.pictures += 1
            _match(plan, number, pair, rows, options)
            twice[str(shard.parent), pair.key] += 1
        for one in damaged:
            if one.what in (TWICE, SEVERAL):
                twice[str(shard.parent), one.member] += 1
                plan.left_out.append({"shard": f"{plan.folders[number]}/{shard.name}", "key": one.member, "reason": one.what})
        plan.damaged += map(str, damaged)
    _refuse_twice(plan, {place for place, count in twice.items() if count > 1})
    unmatched = [one for one in rows.by_id.values() if one.where not in plan.named]
    plan.left_out += [
        {"line": one.line, "row": one.where, "reason": "row without a picture"} for one in sorted(unmatched, key=lambda one: one.line)
    ]
    return plan


def _match(plan: MergePlan, number: int, pair: StoredPair, rows: DescribedRows, options: Options) -> None:
    """Add one pair to the plan, or to what is left out, with the reason."""
    folder = plan.folders[number]
    found = rows.find(folder, pair)
    record = read_record(pair)
    if found is not None:
        first = plan.named.setdefault(found.where, number)
        if plan.shards[first].parent != plan.shards[number].parent:
            raise TableError(
                f"{rows.table.name}, line {found.line}: {found.where} is in {plan.folders[first]} and in {plan.folders[number]}. "
                "Add a column folder to the table, with the name of the shards' folder"
            )
    reason = ""
    if pair.image is None:
        reason = "no picture in the shard"
    elif record is None:
        reason = "damaged record"
    elif found is None:
        reason = "" if options.keep_undescribed else "picture without a row"
    elif not found.use:
        reason = "use 0"
    elif not found.texts:
        reason = "row without a caption"
    if reason:
        plan.left_out.append({"shard": f"{folder}/{plan.shards[number].name}", "key": pair.key, "reason": reason})
    else:
        plan.shard.append(number)
        plan.places.append((sys.intern("/".join(pair.places)), np.array([*pair.places.values()], np.int64).tobytes()))
        plan.key.append(pair.key)
        plan.row.append(found.where if found else "")
        plan.facts.append(count_facts(described_record(record or {}, found, rows)) if found else Counted())


def _refuse_twice(plan: MergePlan, twice: set[tuple[str, str]]) -> None:
    """Remove all pairs whose key occurs several times in one folder: it is unknown which of them a row is about."""
    keep = [n for n in range(len(plan.key)) if (str(plan.shards[plan.shard[n]].parent), plan.key[n]) not in twice]
    for n in sorted(set(range(len(plan.key))) - set(keep)):
        shard = plan.shard[n]
        plan.left_out.append(
            {"shard": f"{plan.folders[shard]}/{plan.shards[shard].name}", "key": plan.key[n], "reason": "key twice in one folder"}
        )
    for name in ("shard", "places", "key", "row", "facts"):
        values = getattr(plan, name)
        setattr(plan, name, [values[n] for n in keep])

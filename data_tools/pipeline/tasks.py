"""Tasks: the files of a collection in chunks of a hundred or so, and the progress bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tqdm import tqdm

from data_tools import report
from data_tools.pipeline.chunks import Chunk, Settings
from data_tools.pipeline.storage_backends import Store
from data_tools.readers.listing import NOTHING, Listing
from tokun.utils.task_engine import absolute

CHUNK_FILES = 128  # most files in one task


@dataclass(frozen=True)
class Tasks:
    """The division of files into tasks, small enough that a small collection shows progress and keeps several workers busy."""

    files: int

    @property
    def size(self) -> int:
        return min(CHUNK_FILES, max(16, self.files // 64))

    @property
    def count(self) -> int:
        return -(-self.files // self.size)

    def range(self, number: int) -> range:
        return range(self.size * number, min(self.files, self.size * (number + 1)))

    def chunk(self, number: int, listing: Listing, settings: Settings, aside: Store) -> Chunk:
        part = self.range(number)
        entries = [(one, listing.words.get(one.path, NOTHING)) for one in listing.found.part(part.start, part.stop)]
        return Chunk(number, absolute(str(listing.base)), entries, settings, aside)


NO_COUNTS: Mapping[str, int] = {}


class Progress:
    """A bar with a rate, the time left, and the most frequent reasons so far."""

    def __init__(self, name: str, unit: str, total: int, shown: bool) -> None:
        self.bar = tqdm(total=total, desc=name, unit=unit, disable=None if shown else True)
        self.counts: Counter[str] = Counter()

    def update(self, count: int, counts: Mapping[str, int] = NO_COUNTS) -> None:
        for reason, number in counts.items():
            self.counts[report.family(reason)] += number  # else there might be as many reasons as files
        if self.counts:
            self.bar.set_postfix_str(", ".join(f"{reason} {number:,}" for reason, number in self.counts.most_common(3)), refresh=False)
        self.bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

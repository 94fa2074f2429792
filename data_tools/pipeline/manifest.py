"""Manifest: one row for each input file, kept or not, with the reason."""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice, starmap
from typing import Any

from data_tools import report
from data_tools.pipeline.chunks import REJECTED, read_rows, rows_name
from data_tools.pipeline.next_steps import Captions
from data_tools.pipeline.selection import Settled
from data_tools.pipeline.storage_backends import Store
from data_tools.pipeline.tasks import Tasks
from data_tools.readers import Found, Listing, shown
from data_tools.report.counting import MANIFEST
from tokun.utils.optional_packages import need

FIELDS = (
    "path", "sha256", "dhash", "width", "height", "status", "reason", "shard", "key", "caption", "words_from", "language", "license",
    "source_url",
)  # fmt: skip
ROW_GROUP = 1024  # rows in memory at a time


TAGS = ("own_style", "technique", "several")
"""Fields of a row that are counted, and not written."""


def manifest(store: Store, tasks: Tasks, settled: Settled, listing: Listing) -> tuple[Counter[tuple[str, str]], Captions, Counter[str]]:
    """Write one row for each input file, kept or not, as Parquet, with null for unknown values.

    Returns the counts of files by (status, reason), the caption counts, and how many kept pictures have each of TAGS.
    """
    counts: Counter[tuple[str, str]] = Counter()
    tags: Counter[str] = Counter()
    captions = Captions()

    def counted() -> Iterator[dict[str, Any]]:
        for row in chain(manifest_rows(store, tasks, settled, listing.found), starmap(unread_row, listing.unread.items())):
            counts[row["status"], report.family(row["reason"])] += 1
            captions.add(row)
            tags.update(name for name in TAGS if row.pop(name, False) and row["shard"])
            yield row

    write_rows(store, counted())
    return counts, captions, tags


def write_rows(store: Store, rows: Iterator[dict[str, Any]]) -> None:
    """Write the rows of a manifest as Parquet."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    schema = pa.schema([(name, pa.int32() if name in ("width", "height") else pa.string()) for name in FIELDS])
    with tempfile.TemporaryFile() as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while part := list(islice(rows, ROW_GROUP)):
                writer.write_table(as_table(part, schema))
        file.seek(0)
        store.write_from(MANIFEST, file)


def unread_row(path: str, reason: str) -> dict[str, Any]:
    """The row of a file that no reader takes."""
    return {**dict.fromkeys(FIELDS), "path": shown(path), "status": REJECTED, "reason": reason, "caption": ""}


def manifest_rows(store: Store, tasks: Tasks, settled: Settled, found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    for number in range(tasks.count):
        for index, row in enumerate(read_rows(store, rows_name(number)), start=tasks.size * number):
            (status, reason), (shard, key) = settled.verdict(index, (row.status, row.reason), found), settled.place(index)
            fields = vars(row) | {"status": status, "reason": reason, "shard": shard, "key": key}
            fields["dhash"] = None if row.dhash is None else f"{row.dhash:016x}"
            yield {name: fields[name] for name in (*FIELDS, *TAGS)}


def as_table(rows: list[dict[str, Any]], schema: Any) -> Any:
    """Rows -> a table, through JSON: pyarrow's conversion of Python lists would import pandas, which takes as long as some 200 pictures."""
    reader = need("pyarrow.json", extra="data")
    text = "\n".join(map(json.dumps, rows)).encode()
    whole = reader.ReadOptions(use_threads=False, block_size=len(text) + 1)
    return reader.read_json(io.BytesIO(text), read_options=whole, parse_options=reader.ParseOptions(explicit_schema=schema))

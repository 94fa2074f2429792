"""Shard writer: the second task of prepare, which copies pairs from the chunks' data into one WebDataset tar.

Independent of other shards, for any process or machine. Written atomically; the bytes depend only on the pairs.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from data_tools.pipeline.storage_backends import Store
from tokun.data.shards import write_samples


@dataclass(frozen=True)
class Piece:
    """The location of one pair: chunk, offset in its data, and the lengths of its two parts."""

    key: str
    data_name: str
    start: int
    image_bytes: int
    json_bytes: int


@dataclass(frozen=True)
class Shard:
    """One tar to write."""

    name: str
    suffix: str
    pieces: list[Piece]
    store: Store


def write_pieces(shard: Shard) -> int:
    """Copy the pairs into the tar, in order. Returns their number."""
    wanted: dict[str, list[Piece]] = {}
    for piece in shard.pieces:
        wanted.setdefault(piece.data_name, []).append(piece)
    both: dict[str, bytes] = {}
    for name, pieces in wanted.items():
        parts = shard.store.read_parts(name, [(piece.start, piece.image_bytes + piece.json_bytes) for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            if len(part) != piece.image_bytes + piece.json_bytes:
                raise OSError(
                    f"{name} in {shard.store} is truncated, or was not read completely: "
                    f"run again, and if that does not help, remove {shard.store} first"
                )
            both[piece.key] = part
    buffer = io.BytesIO()
    count = write_samples(buffer, (sample_of(piece, both.pop(piece.key), shard.suffix) for piece in shard.pieces))
    shard.store.write(shard.name, buffer.getvalue())
    return count


def sample_of(piece: Piece, data: bytes, suffix: str) -> dict[str, Any]:
    """The pair of a piece, as `write_samples` takes it."""
    return {"__key__": piece.key, suffix: data[: piece.image_bytes], "json": data[piece.image_bytes :]}

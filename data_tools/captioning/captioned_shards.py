"""Shards with new captions: OUT/SHARD.tar, made only from the source shard and its journals, written to a temporary file and renamed.

Each shard is either complete or missing, and the same inputs give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.captioning.journals import Folder, JournalRows, sha256
from data_tools.readers.stored_pairs import StoredPair, read_pairs
from tokun.data import shards
from tokun.utils.files import write_text

Scores = dict[int, dict[str, dict[str, float]]]  # row -> register -> {"clip", "clip_percentile"}


def read_record(pair: StoredPair) -> dict[str, Any] | None:
    """KEY.json as a dict: empty if missing, None if damaged."""
    try:
        record = json.loads(pair.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def new_record(record: dict[str, Any], row: dict[str, Any], order: Iterable[str], scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A pair's record with the captions of its row. `caption` stays unless it is empty.

    An older caption of the same register, unless it is the source text itself, moves to `earlier_captions`.
    """
    caption = record["caption"] if isinstance(record.get("caption"), str) else ""
    captions, sources = (dict(record[name]) if isinstance(record.get(name), dict) else {} for name in ("captions", "caption_sources"))
    earlier = list(record["earlier_captions"]) if isinstance(record.get("earlier_captions"), list) else []
    new = [name for name in order if name in row["captions"]]
    for name in new:
        source = dict(row["captions"][name])
        text, before = source.pop("text"), captions.get(name)
        if before and before != text and (before != caption or name in sources):
            earlier.append({"register": name, "text": before, "source": sources.get(name)})
        captions[name], sources[name] = text, {**source, "scores": scores.get(name, {})}
    record = {**record, "captions": captions, "caption_sources": sources}
    if earlier:
        record["earlier_captions"] = earlier
    record.pop("caption_failures", None)
    if row["failures"]:
        record["caption_failures"] = row["failures"]
    if not caption.strip() and new:
        first = "plain" if "plain" in new else new[0]
        record["caption"] = captions[first]
        record["caption_source"] = {"register": first, "source": sources[first]["source"], "model": sources[first]["model"]}
    return record


def with_captions(shard: Path, rows: JournalRows, order: Iterable[str], scores: Scores, left_out: set[int]) -> Iterator[StoredPair]:
    """The pairs of a shard with their new records; rows without a result and left-out rows are skipped."""
    for number, pair in enumerate(read_pairs(shard, [])):
        if number not in rows or number in left_out:
            continue
        record = read_record(pair)
        if record is not None:  # a damaged record stays unchanged
            tree = new_record(record, rows[number], order, scores.get(number, {}))
            pair.members["json"] = json.dumps(tree, ensure_ascii=False).encode("utf-8", "backslashreplace")
        yield pair


def write_pairs(path: Path, pairs: Iterable[StoredPair]) -> None:
    """Write a shard of these pairs, as `shards.write_shard` does."""
    shards.write_shard(path, ({**pair.members, "__key__": pair.key} for pair in pairs))


def write_unless_same(folder: Folder, name: str, made_of: list[Any], pairs: Iterable[StoredPair]) -> bool:
    """Write a shard of these pairs, unless it already exists with the same inputs, `made_of`. Returns whether it was written."""
    path, stamp = folder.out / name, sha256(json.dumps(made_of))
    stamp_path = folder.stamp(path)
    if path.exists() and stamp_path.exists() and stamp_path.read_text() == stamp:
        return False
    stamp_path.unlink(missing_ok=True)  # else, after a kill, the stamp could belong to another shard's contents
    write_pairs(path, pairs)
    write_text(stamp_path, stamp)
    return True


def publish_shard(folder: Folder, shard: Path, rows: JournalRows, order: tuple[str, ...], scores: Scores, left_out: set[int]) -> None:
    """Write a shard from its rows, unless it already exists with the same inputs."""
    made_of = [shard.stat().st_size, order, sorted(rows.items()), sorted(scores.items()), sorted(left_out)]
    write_unless_same(folder, shard.name, made_of, with_captions(shard, rows, order, scores, left_out))

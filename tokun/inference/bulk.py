"""Bulk sampling: shards of pairs and a table of them, by several processes, with resume after a kill.

    out/samples-00000.tar …    WebDataset: KEY.png and KEY.json (seed, index, tags, caption, codes, likelihoods), 1,000 each
    out/samples.parquet        one row per sample, without the picture
    out/samples.json           the model and options; others are refused

Shard i holds samples i * shard_size … of the seed, whichever process makes it. Until it is complete, its batches are stored in
out/.samples-00000/, so an interruption loses only the current batch. All files are written atomically, and their bytes do not depend
on interruptions or the number of processes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokun import data
from tokun.config import SamplingOptions
from tokun.inference import decoder, latents
from tokun.utils import checkpoint
from tokun.utils.errors import BadSample, UserError
from tokun.utils.lock import alone_in
from tokun.utils.optional_packages import need
from tokun.utils.task_engine import TaskEngine

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun

MOST = 1_000_000_000
RECORD, TABLE = "samples.json", "samples.parquet"
SUFFIXES = ("png", "json")  # of a sample's files
TAGS = ("style", "subject", "thing", "register", "grid")
COLUMNS = ("seed", "index", "caption", *TAGS, "image_nll", "caption_nll", "pmi", "shard")


def generate(
    model: Tokun, seed: int, n: int, out: Path, options: Mapping[str, Any], *, shard_size: int = 1000, rank: int = 0, world: int = 1,
    engine: TaskEngine | None = None, loading: Loading | None = None,
) -> Path:  # fmt: skip
    """Write samples 0 … n-1 of the seed; `options` are those of `Tokun.sample`. Returns `out`. With an engine, its processes make the
    shards, each with the model that it loads as `loading` describes.

    Each of several processes makes its own shards; the one that finds all of them complete writes the table. Raises ImportError
    without pyarrow, and UserError if `out` holds samples of another model, seed or options, or for options that `Tokun.sample` refuses.
    """
    from tqdm import tqdm

    assert (engine is None) == (loading is None) and (engine is None or world == 1)
    if not 1 <= n <= MOST:
        raise UserError(f"n is {n}; it must be from 1 to {MOST:,}")
    need("pyarrow.parquet", extra="data")  # fail before the hours of work, not after
    latents.draw(seed, [0], 1)
    model.plan(**options)
    checkpoint.require_writable(out)
    with alone_in(out, option="--out", rank=rank):
        # includes the batch size: samples do not depend on it, but the last digits of their likelihoods do
        asked = {**asdict(SamplingOptions(**options)), "seed": seed, "n": n, "shard_size": shard_size, **(drawn_by := identity(model))}
        require_same(out, asked, rank=rank)
        paths = [out / f"samples-{number:05d}.tar" for number in range(-(-n // shard_size))]
        mine = list(enumerate(paths))[rank::world]
        done = sum(min(shard_size, n - number * shard_size) for number, path in mine if path.is_file())
        total = sum(min(shard_size, n - number * shard_size) for number, _ in mine)
        with tqdm(total=total, initial=done, desc="sampling", unit="pair", disable=rank != 0, dynamic_ncols=True) as bar:
            missing = {path: range(number * shard_size, min(n, (number + 1) * shard_size)) for number, path in mine if not path.is_file()}
            if engine is not None and loading is not None:
                tasks = [ShardTask(loading, drawn_by, seed, indices, dict(options), path.resolve()) for path, indices in missing.items()]
                for _, count in engine.run(make_shard, tasks):
                    bar.update(count)
            for _, path in mine:
                if not path.is_file():
                    data.write_shard(path, members(model, seed, missing[path], options, bar.update, parts_of(path)))
                if parts_of(path).is_dir():
                    shutil.rmtree(parts_of(path), ignore_errors=True)
        if all(path.is_file() for path in paths):
            write_table(paths, out / TABLE, aside=out / f"{TABLE}.partial{rank}")  # two processes that finish together write the same bytes
    return out


@dataclass(frozen=True)
class Loading:
    """How a process of an engine loads the model: as `tokun.load` does. Every node must reach the folders."""

    checkpoint: str | None = None
    adapter: str | None = None
    device: str | None = None
    dtype: str = "float32"
    compile: bool | None = None


@dataclass(frozen=True)
class ShardTask:
    """One shard to make, as it is sent to another process or machine."""

    loading: Loading
    drawn_by: Mapping[str, Any]
    """The `identity` of the model."""
    seed: int
    indices: range
    options: Mapping[str, Any]
    path: Path


def make_shard(task: ShardTask) -> int:
    """Make a shard in a process of an engine, which loads the model once. Returns its number of samples.

    Raises UserError if the model, or how it is computed, differs from that in the process that gives the tasks.
    """
    model, here = _loaded(task.loading)
    if differing := sorted(name for name in {*here, *task.drawn_by} if here.get(name) != task.drawn_by.get(name)):
        why = "; ".join(f"{name} is {here.get(name)} here and {task.drawn_by.get(name)} there" for name in differing)
        raise UserError(
            f"a worker would draw other samples than the process that started it ({why}): give --device, or --no-compile, or the same files"
        )
    data.write_shard(task.path, members(model, task.seed, task.indices, task.options, lambda _: None, parts_of(task.path)))
    return len(task.indices)


@lru_cache(maxsize=1)
def _loaded(loading: Loading) -> tuple[Tokun, dict[str, Any]]:
    import torch

    from tokun.inference.load import load

    model = load(
        loading.checkpoint, device=loading.device, dtype=getattr(torch, loading.dtype), compile=loading.compile, adapter=loading.adapter
    )
    return model, identity(model)


def identity(model: Tokun) -> dict[str, Any]:
    """What determines the samples besides the options: weights, the checkpoint's settings, precision, device type and engine."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.generator.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return {
        "generator": digest.hexdigest(), "image_tokenizer": model.image_tokenizer.fingerprint(),
        "defaults": {k: v for k, v in asdict(model.defaults).items() if k not in ("n", "seed", "best_of")},  # which choose no sample
        "dtype": str(model.generator.dtype).removeprefix("torch."), "device": model.device.type,
        # of settings that older checkpoints do not have
        **({"unrepeated_words": hashlib.sha256(" ".join(model.unrepeated_words).encode()).hexdigest()} if model.unrepeated_words else {}),
        **({"compiled": "native"} if decoder.is_compiled(model.generator) else {}),
    }  # fmt: skip


def require_same(out: Path, asked: dict[str, Any], *, rank: int) -> None:
    there, asked = checkpoint.read_record(out / RECORD), json.loads(json.dumps(asked))
    if there is not None:
        # earlier versions did not write all options
        checkpoint.require_same(out, {**asdict(SamplingOptions()), "batch_size": asked["batch_size"], **there}, asked, option="--out")
    elif next(out.glob("samples-*.tar"), None) is not None:
        raise UserError(f"{out} holds shards of samples without a complete {RECORD}, which describes them: name another folder with --out")
    else:
        aside = out / f"{RECORD}.partial{rank}"  # all processes write the same
        checkpoint.write_record(aside, asked)
        os.replace(aside, out / RECORD)


def parts_of(shard: Path) -> Path:
    """The folder for the batches of a shard until it is complete."""
    return shard.with_name(f".{shard.stem}")


def members(
    model: Tokun, seed: int, indices: range, options: Mapping[str, Any], report: Callable[[int], object], parts: Path
) -> Iterator[dict[str, Any]]:
    """The pairs of a shard, batch by batch. Batches that an earlier run left in `parts` are reused. `report` is called with the number of
    pairs of each batch."""
    plan = model.plan(**options)
    batch = plan.options.batch_size
    for first in range(indices.start, indices.stop, batch):
        part, own = parts / f"{first:010d}.tar", range(first, min(indices.stop, first + batch))
        if (found := read_part(part)) is None:
            found = [member(pair) for pair in model.draw(seed, own, plan)]
            parts.mkdir(exist_ok=True)
            data.write_shard(part, found)
        yield from found
        report(len(own))


def read_part(path: Path) -> list[dict[str, Any]] | None:
    """The members of a batch, as `member` made them; None if it is missing or damaged."""
    try:
        index = data.ShardIndex([path], need=SUFFIXES)
        if index.skipped:
            return None
        return [{"__key__": index.key(i), **{suffix: index.read(i, suffix) for suffix in SUFFIXES}} for i in range(len(index))]
    except (OSError, UserError):
        return None


def member(pair: Pair) -> dict[str, Any]:
    buffer = io.BytesIO()
    pair.image.save(buffer, "PNG")
    text = json.dumps(pair.record(), ensure_ascii=False, sort_keys=True)
    return {"__key__": f"{pair.seed:06d}-{pair.index:07d}", "png": buffer.getvalue(), "json": text.encode()}


def write_table(paths: list[Path], target: Path, aside: Path) -> None:
    """Write one row group per shard, so that memory does not grow with their number."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    kinds = {"seed": pa.int64(), "index": pa.int64(), "image_nll": pa.float64(), "caption_nll": pa.float64(), "pmi": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for path in paths:
            writer.write_table(pa.Table.from_pylist([row(record, path) for record in records(path)], schema))
    os.replace(aside, target)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a shard. Raises UserError if it is damaged."""
    try:
        index = data.ShardIndex([path], need=SUFFIXES)
        if why := index.skipped_summary():
            raise UserError(why)
        yield from map(index.read_json, range(len(index)))
    except (UserError, BadSample) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the same command makes it again") from error


def row(record: dict[str, Any], path: Path) -> dict[str, Any]:
    tags = {kind: record["tags"].get(kind, "") for kind in TAGS}
    flat = {**tags, "grid": "x".join(map(str, tags["grid"])), **record, "shard": path.name}
    return {name: flat[name] for name in COLUMNS}

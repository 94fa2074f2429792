"""How fast code shards open, how fast they become batches, and how fast a training step consumes them.

    python benchmarks/loader.py --out FOLDER                                     # configs/tiny.yaml: the rung with the fastest step
    python benchmarks/loader.py --out FOLDER --config configs/ladder/8m.yaml --sizes 100000

Writes shards of 1,000 samples with the config's codes, views and drawn captions to FOLDER (20 different ones, then copies in separate
files) and leaves them there. Prints one table. Each line is measured in fresh processes:

    cold, cached, kept   seconds until the shards are open: from disk, from the system's page cache, with the stored index
    MiB                  resident memory before opening, when open, after a quarter of the samples and after all
    loader               samples per second of one thread, with the config's batches, by the clock and by processor time
    step                 samples per second of a bare training step of the config's generator from memory, likewise, on the cores or
                         the GPU that torch uses; with the loader's batches
    ratio                loader to step, by processor time (one core to all that the step uses; on a GPU by the clock)
    wait, slower         share of the time that the step waits for `prefetch`, and its slowdown compared with batches from memory, in turns
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_tools import toy  # noqa: E402
from tokun import data  # noqa: E402
from tokun.config import Config, load_config  # noqa: E402
from tokun.models.generator import can_compile, compile_layers, make_generator, tune_for  # noqa: E402
from tokun.tokenizers import sequences  # noqa: E402
from tokun.tokenizers.text import TextTokenizer  # noqa: E402
from tokun.tokenizers.vocabulary import Vocabulary  # noqa: E402
from tokun.training import optim  # noqa: E402
from tokun.utils import console  # noqa: E402

PER_SHARD, DISTINCT = 1000, 20


# ---- shards ---------------------------------------------------------------------------------------------------------


def samples(config: Config, records: list[dict[str, Any]], shard: int) -> Iterator[dict[str, bytes]]:
    side, rng = config.image_tokenizer.image_size // config.image_tokenizer.downsample, np.random.default_rng(shard)
    for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
        buffer, record = io.BytesIO(), records[rng.integers(len(records))]
        np.save(buffer, rng.integers(0, config.image_tokenizer.codebook_size, (config.codes.views, side * side)).astype(np.uint16))
        tree = record | {"grid": [side, side], "boxes": [[0.0, 0.0, float(config.image_tokenizer.image_size)]] * config.codes.views}
        yield {"__key__": f"{i:09d}", data.CODES_SUFFIX: buffer.getvalue(), "json": json.dumps(tree, sort_keys=True).encode()}


def write_shards(config: Config, out: Path, count: int) -> list[Path]:
    paths = [out / f"train-{number:05d}.tar" for number in range(count // PER_SHARD)]
    if not all(path.exists() for path in paths):
        records = [toy.draw(0, i, 32)[1] for i in range(2000)]
        for number, path in enumerate(paths):
            if number < DISTINCT:
                data.write_shard(path, samples(config, records, number))
            elif not path.exists():
                shutil.copyfile(paths[number % DISTINCT], path)
    return paths


def text_of(config: Config, paths: list[Path]) -> tuple[TextTokenizer, Vocabulary]:
    shard = data.CodeSamples(paths[:1])
    tokenizer = TextTokenizer.train([shard.record(i).caption for i in range(len(shard))], vocab_size=config.text_tokenizer.vocab_size)
    records = [shard.record(i) for i in range(len(shard))]
    styles, subjects = sorted({r.style for r in records} - {""}), sorted({r.subject for r in records} - {""})
    return tokenizer, Vocabulary(
        tokenizer.size, config.image_tokenizer.codebook_size, tuple(styles), tuple(subjects), grids=(records[0].grid,),
        max_text=config.data.max_caption_tokens, illegal_text=tokenizer.illegal_ids,
    )  # fmt: skip


def make_batches(config: Config, paths: list[Path], kept: Path | None = None) -> data.TokenBatches:
    tokenizer, vocabulary = text_of(config, paths)
    train = config.train
    return data.TokenBatches(
        data.CodeSamples(paths, cache_file=kept), vocabulary, tokenizer.encode, batch_size=train.batch_size, seed=config.seed,
        task_mix=train.task_mix, tag_dropout=train.tag_dropout, plain_share=train.plain_share, sort_window=config.data.sort_window,
    )  # fmt: skip


# ---- measurements, each in a fresh process --------------------------------------------------------------------------


def resident() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def opening(paths: list[Path], kept: Path | None) -> dict[str, float]:
    before, began, cpu = resident(), time.perf_counter(), time.process_time()
    opened = data.CodeSamples(paths, cache_file=kept)
    seconds = time.perf_counter() - began, time.process_time() - cpu
    assert len(opened) == PER_SHARD * len(paths)
    return {"seconds": seconds[0], "cpu": seconds[1], "before": before, "open": resident()}


def loading(config: Config, paths: list[Path], kept: Path | None, count: int) -> dict[str, float]:
    batches = make_batches(config, paths, kept)
    batches(0)  # fills its window, and imports everything it needs
    steps = count // config.train.batch_size
    began, cpu, tokens, quarter = time.perf_counter(), time.process_time(), 0, 0.0
    for step in range(1, steps + 1):
        tokens += int((batches(step).labels != -100).sum())
        if step == steps // 4:
            quarter = resident()
    seconds = time.perf_counter() - began, time.process_time() - cpu
    rows = steps * config.train.batch_size
    return {"clock": rows / seconds[0], "cpu": rows / seconds[1], "tokens": tokens / seconds[1], "quarter": quarter, "end": resident()}


def training(config: Config, paths: list[Path], kept: Path | None, steps: int) -> dict[str, float]:
    """A bare step: forward, loss, backward, clip, update; from memory and from the loader in turns."""
    torch.manual_seed(0)
    batches, train = make_batches(config, paths, kept), config.train
    v, device = batches.vocabulary, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_generator(
        config.generator, vocab_size=v.size, max_length=sequences.most_positions(v),
        pad=v.id("<pad>"), bos=v.id("<bos>"), eos=v.id("<eos>"),
    ).to(device)  # fmt: skip
    tune_for(model, device)
    if train.compile and can_compile(device):
        compile_layers(model)
    optimizer = optim.make_optimizer(train.optimizer, model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)

    def step(batch: data.TokenBatch) -> None:
        ids, labels = batch.input_ids.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    held = [batches(number) for number in range(4)]
    for batch in held:  # compiles and warms up
        step(batch)
    spent = {"memory": [], "loader": []}
    cpu, waited = 0.0, 0.0
    stream = data.prefetch(batches, 4)
    for batch in islice(stream, 2):
        step(batch)
    for turn in range(steps):
        _sync(device)
        began, start = time.perf_counter(), time.thread_time()
        step(held[turn % 4])
        _sync(device)
        spent["memory"].append(time.perf_counter() - began)
        cpu += time.thread_time() - start
        began = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - began
        step(batch)
        _sync(device)
        spent["loader"].append(time.perf_counter() - began)
    stream.close()
    clock = float(np.median(spent["memory"]))
    on_gpu = device.type == "cuda"
    return {
        "clock": train.batch_size / clock, "cpu": train.batch_size / (clock if on_gpu else cpu / steps),
        "wait": waited / sum(spent["loader"]),
        "slower": float(np.median(spent["loader"])) / clock - 1,
    }  # fmt: skip


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def alone(function: Any, *args: Any) -> dict[str, float]:
    """The function's figures, measured in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def forget(paths: list[Path]) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- the table ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--count", type=int, default=60_000, help="samples for timing the loader")
    parser.add_argument("--steps", type=int, default=20, help="training steps timed; 0 leaves them out")
    parser.add_argument("overrides", nargs="*", help="section.key=value of the config")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    print(
        "| samples | MB | cold | cached (cpu) | kept (cpu) | MiB before, open, 1/4, end | loader: clock, cpu, tokens | step: clock, cpu | "
        "ratio | wait | slower |"
    )
    print("| ---: " * 11 + "|")
    for size in args.sizes:
        paths = write_shards(config, args.out, size)
        kept = args.out / f"{size}.index"
        kept.unlink(missing_ok=True)
        forget(paths)
        cold, cached = alone(opening, paths, None), alone(opening, paths, None)
        alone(opening, paths, kept)  # writes it
        again = alone(opening, paths, kept)
        loader = alone(loading, config, paths, kept, args.count)
        line = [
            f"{size:,}", f"{sum(p.stat().st_size for p in paths) / 1e6:,.0f}", f"{cold['seconds']:.2f}",
            f"{cached['seconds']:.2f} ({cached['cpu']:.2f})",
            f"{again['seconds']:.3f} ({again['cpu']:.3f})",
            f"{again['before']:.0f}, {again['open']:.0f}, {loader['quarter']:.0f}, {loader['end']:.0f}",
            f"{loader['clock']:,.0f}, {loader['cpu']:,.0f}, {loader['tokens'] / 1e6:.2f} M",
        ]  # fmt: skip
        if args.steps:
            step = alone(training, config, paths, kept, args.steps)
            ratio = loader["cpu"] / step["cpu"]
            line += [f"{step['clock']:,.0f}, {step['cpu']:,.0f}", f"{ratio:.0f}", f"{step['wait']:.2%}", f"{step['slower']:+.1%}"]
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    console.run("benchmarks/loader.py", main)

"""A captioning run: each process's share of the shards, from journal to published shard; CLIP scores; the preview."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import captioning as captioners
from data_tools.captioning.caption_results import CaptionReport, finish, outcome
from data_tools.captioning.captioned_shards import publish_shard
from data_tools.captioning.journals import (
    Folder,
    Journal,
    JournalRows,
    done_rows,
    is_scored,
    limits_of,
    read_journal,
    require_image_shards,
    rows_left,
    texts_id,
)
from data_tools.captioning.rows import Block, CaptionRow, Task, open_small
from data_tools.captioning.settings import Settings, Work
from data_tools.captioning.writers import ModelWriter, ServerWriter, Writer, block_size, make_stages, run_stages
from data_tools.readers.stored_pairs import find_shards, read_pairs
from tokun.inference.clip import Clip
from tokun.render.grids import captioned_grid
from tokun.utils.errors import UserError
from tokun.utils.lock import alone_in
from tokun.utils.task_engine import TaskEngine

PATIENCE = 60.0  # seconds that a repeated task waits for the journal of the one that is being ended
PREVIEW = "preview.png"
CLIP_BATCH = 64
CLIP_SIDE = 1024  # pixels: more than any CLIP model sees


@dataclass
class Progress:
    """A progress bar with the rate, the time left and the counts by outcome."""

    bar: Any
    stages: list[Writer]
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Block) -> None:
        self.count(Counter(outcome(row.as_json()) for row in rows))

    def count(self, outcomes: Counter[str]) -> None:
        self.counts.update(outcomes)
        shown = [f"{name} {count:,}" for name, count in self.counts.most_common(4)]
        shown += [f"retries {stage.endpoint.counts['retries']:,}" for stage in self.stages if isinstance(stage, ServerWriter)]
        self.bar.total = max(self.bar.total, self.bar.n + outcomes.total())  # second attempts were not in the total
        self.bar.set_postfix_str(" · ".join(shown), refresh=False)
        self.bar.update(outcomes.total())


def caption(
    paths: list[Path], out: Path, settings: Settings, work: Work, *, progress: bool = False, engine: TaskEngine | None = None
) -> CaptionReport | None:
    """Caption the shards in `paths` into `out`. With an engine, its processes do, a shard each.

    Returns None while other processes still have shards to do; the last of them writes the record. Raises FileNotFoundError
    or UserError, with the way out, for missing shards, unsuitable models, and an `out` that holds something else.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun or accelerate sets them
    shards = checked_shards(paths, out)
    folder = Folder(out)
    folder.check(shards, settings.recorded())
    if engine is not None and world > 1:
        raise UserError(
            "--engine and --workers share the shards among processes themselves: leave them out under a process launcher such as accelerate"
        )
    with alone_in(out, option="--out", rank=rank):
        return caption_all(folder, shards, settings, work, rank, world, progress=progress, engine=engine)


def caption_all(
    folder: Folder, shards: list[Path], settings: Settings, work: Work, rank: int, world: int, *, progress: bool, engine: TaskEngine | None
) -> CaptionReport | None:
    """Caption this process's share of the shards, with the folder's lock held."""
    limits = limits_of(shards, work.limit)
    attempt = folder.retry_attempt(limits) if work.retry_failed else 0
    mine = list(limits)[rank::world]
    todo = [shard for shard in mine if done_rows(folder, shard, limit=limits[shard], attempt=attempt) is None]
    stages = make_stages(settings, work) if todo and engine is None else []
    jobs = [Job(folder.out.resolve(), shard.resolve(), settings, work, limits[shard], attempt) for shard in todo]
    total = sum(rows_left(folder, shard, limits[shard], attempt) for shard in todo)
    with tqdm(total=total, unit="row", desc="caption", disable=not (progress and rank == 0 and todo)) as bar:
        counted = Progress(bar, stages)
        for number, rows in run_here(jobs, stages, counted) if engine is None else run_elsewhere(engine, jobs, counted):
            if not work.clip:  # with scores, a shard must wait for all others
                with folder.locked():
                    publish_shard(folder, todo[number], rows, settings.registers, {}, set())
    if work.clip:
        stages.clear()  # keeps one model at a time in memory
        score_shards(folder, mine, limits, work)
    clip = captioners.short_name(work.clip) if work.clip else ""
    return finish(folder, limits, settings.recorded(), attempt=attempt, clip=clip, keep_best=work.keep_best, prices=work.prices)


@dataclass(frozen=True)
class Job:
    """One shard to caption, as it is sent to another process or machine."""

    out: Path
    shard: Path
    settings: Settings
    work: Work
    limit: int
    attempt: int

    def run(self, stages: list[Writer], progress: Progress, wait: float = 0.0) -> JournalRows:
        """Complete the journal of the shard up to the limit, and return its rows.

        `wait`: seconds that another process may still hold it.
        """
        task = Task(self.shard, self.settings, self.limit, block_size(stages, self.work), self.attempt, any(stage.sees for stage in stages))
        head = {
            "shard": self.shard.name, "bytes": self.shard.stat().st_size, "settings": self.settings.recorded(),
            "models": [f"{stage.model.name}@{stage.model.revision}" for stage in stages if isinstance(stage, ModelWriter)],
        }  # fmt: skip
        with Journal(Folder(self.out).journal(self.shard), head, wait) as journal:
            for _ in range(2 if self.attempt else 1):  # the second pass retries what failed in the first
                for block in run_stages(stages, task.blocks(dict(journal.rows), journal.end)):
                    journal.add([row.as_json() for row in block])
                    progress.add(block)
            return {number: row for number, row in journal.rows.items() if number < self.limit}


def run_here(jobs: list[Job], stages: list[Writer], progress: Progress) -> Iterator[tuple[int, JournalRows]]:
    """(number of the job, rows of its shard), in order."""
    for number, job in enumerate(jobs):
        yield number, job.run(stages, progress)


def run_elsewhere(engine: TaskEngine, jobs: list[Job], progress: Progress) -> Iterator[tuple[int, JournalRows]]:
    """The same by the processes of an engine, in order of completion."""
    for number, counts in engine.run(run_job, jobs):
        progress.count(counts)
        rows = read_journal(Folder(jobs[number].out).journal(jobs[number].shard))[1]
        yield number, {row: rows[row] for row in sorted(rows) if row < jobs[number].limit}


def run_job(job: Job) -> Counter[str]:
    """Caption one shard in a process of an engine, which loads its models once. Returns the outcomes of its new rows."""
    stages = stages_of(job.settings, job.work)
    progress = Progress(tqdm(total=0, disable=True), stages)
    job.run(stages, progress, PATIENCE)
    return progress.counts


stages_of = lru_cache(maxsize=1)(make_stages)


def score_shards(folder: Folder, shards: list[Path], limits: dict[Path, int], work: Work) -> None:
    """Score the captions without a score into their own journal. The model is loaded only if needed."""
    clip: Clip | None = None
    for shard in shards:
        rows = read_journal(folder.journal(shard))[1]
        head = {"clip": captioners.short_name(work.clip), "bytes": shard.stat().st_size}
        with Journal(folder.scores(shard), head) as journal:
            missing = {n for n, row in rows.items() if n < limits[shard] and row["captions"] and not is_scored(row, journal.rows)}
            if missing:
                clip = clip or Clip(work.clip, device=work.device)
                score_shard(journal, shard, {number: rows[number] for number in missing}, clip)


def score_shard(journal: Journal, shard: Path, rows: JournalRows, clip: Clip) -> None:
    """Write a score for each caption of `rows` to the journal, except where the picture is damaged."""
    for _, group in groupby(enumerate(read_pairs(shard, [])), lambda item: item[0] // CLIP_BATCH):
        batch = [(rows[number], open_small(pair, CLIP_SIDE)) for number, pair in group if number in rows]
        seen = [(row, image) for row, image in batch if image is not None]
        values = clip.score([(image, [entry["text"] for entry in row["captions"].values()]) for row, image in seen]) if seen else []
        scores = {row["row"]: dict(zip(row["captions"], (round(value, 5) for value in each))) for (row, _), each in zip(seen, values)}
        if batch:
            journal.add([{"row": row["row"], "texts": texts_id(row), "scores": scores.get(row["row"], {})} for row, _ in batch])


def checked_shards(paths: list[Path], out: Path) -> list[Path]:
    """The image shards in `paths`. Raises UserError if two have the same name, or as `require_image_shards` does."""
    shards = find_shards(paths)
    twice = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
    if twice:
        raise UserError(f"two shards are named {twice[0]}: caption folders with the same shard names one by one, each into its own --out")
    require_image_shards(shards, out)
    return shards


def preview(paths: list[Path], out: Path, settings: Settings, work: Work, count: int) -> tuple[Path, Counter[str]]:
    """Caption `count` pictures, spread over the shards, into a contact sheet. Journals and shards do not change."""
    if count < 1:
        raise UserError(f"--preview {count} must be 1 or more")
    shards = checked_shards(paths, out)
    stages = make_stages(settings, work)
    each = math.ceil(count / len(shards))
    rows: Block = []
    for shard in shards:
        if len(rows) < count:
            task = Task(shard, settings, min(each, count - len(rows)), block_size(stages, work))
            rows += sorted((row for block in run_stages(stages, task.blocks({})) for row in block), key=lambda row: row.number)
    rows = [row for row in rows if row.image is not None]
    if not rows:
        raise UserError(f"no picture of {shards[0]} can be decoded: tokun inspect --verify shows what is wrong")
    cells = [(row.image, text_on_sheet(row, name)) for row in rows for name in settings.registers]
    columns = len(settings.registers) if len(settings.registers) > 1 else None
    out.mkdir(parents=True, exist_ok=True)
    captioned_grid(*zip(*cells), columns=columns, cell=288).save(out / PREVIEW)
    return out / PREVIEW, Counter(outcome(row.as_json()) for row in rows)


def text_on_sheet(row: CaptionRow, name: str) -> str:
    if name not in row.captions:
        return f"{name}: FAILED, {row.failures.get(name, 'no answer')}"
    entry = row.captions[name]
    return f"{name}{' (template)' if entry['source'] == 'template' else ''}: {entry['text']}"

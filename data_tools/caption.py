"""Caption: image shards -> the same shards with more captions, side by side, in several registers.

    python -m data_tools.caption shards/ --model Salesforce/blip2-opt-2.7b --registers plain,poetic,era
    python -m data_tools.caption shards/ --endpoint http://localhost:8000/v1 --endpoint-model Qwen/Qwen2.5-VL-7B-Instruct
    python -m data_tools.caption shards/ --from captions.tsv --out described/
    accelerate launch -m data_tools.caption shards/ --model Qwen/Qwen2.5-VL-7B-Instruct --registers plain,social

Who writes: a captioner that sees the picture (--model), a language model (--rewriter), a server (--endpoint); where there
is none, a template puts the metadata into words and says so in the record. Look first: --preview 16 draws a sheet. Captions that
people wrote are merged from a table (--from, captioning/from_table.py).

Each new caption stands in KEY.json under `captions`, and under `caption_sources` who wrote it: model, revision, hash of
the prompt, seed, scores. The source text, `caption`, stays as it is. A run that is killed goes on where it was
(journal.py), and every row ends with captions or with a counted reason. The same batches are made whatever was done
before and however many processes share the shards, so the words are the same, too, where --batch-size is, memory
suffices, and the server, if there is one, answers alike. Knows rows and registers; the models are those of captioning/.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_tools import captioning as captioners
from data_tools.captioning import from_table, registers
from data_tools.captioning.journal import (
    ALL,
    RECORD,
    Folder,
    Journal,
    Report,
    Rows,
    done_rows,
    finish,
    is_scored,
    limits_of,
    outcome,
    publish_shard,
    read_journal,
    read_record,
    rows_left,
    sha256,
    texts_id,
)
from data_tools.captioning.registers import FACTS, Facts
from data_tools.inspect import Pair, find_shards, read_pairs
from data_tools.tables import QUOTING
from tokun.data.pictures import PictureError, decode_as
from tokun.inference.clip import Clip
from tokun.render.grids import captioned_grid
from tokun.utils.console import home_path
from tokun.utils.lock import alone_in

PREVIEW = "preview.png"
RETRY_TEMPERATURE = 0.7  # of a second attempt: the likeliest words have failed once
FAILURES_IN_A_ROW = 16  # rows without an answer after which a server counts as down
CLIP_BATCH = 64
CLIP_SIDE = 1024  # pixels: more than any CLIP model sees


# ---------------------------------------------------------------------------------------------------------------------
# settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the words. Kept with the rows; a folder begun with other settings is refused."""

    registers: tuple[str, ...] = ("plain",)
    """The registers to write."""
    hashtags: bool = True
    """Social captions end in hashtags."""
    hints: tuple[str, ...] = FACTS
    """The metadata that prompts tell of a picture."""
    model: str = ""
    """The captioner: a Hub id or folder."""
    revision: str = ""
    """Its commit or tag on the Hub."""
    shape: str = "auto"
    """caption, task or chat; auto: as the model's type tells."""
    task: str = ""
    """The task prompt of a task model, instead of its usual one."""
    rewriter: str = ""
    """The language model that writes registers from words: a Hub id or folder."""
    endpoint: str = ""
    """The address of an OpenAI-compatible server."""
    endpoint_model: str = ""
    """The name of the model there."""
    send_pictures: bool = True
    """The server sees the pictures, where no captioner does; else it gets words alone."""
    seed: int = 0
    temperature: float = 0.0
    max_new_tokens: int = 96
    dtype: str = "auto"
    image_side: int = 768
    """Pixels of the longer side of the pictures that models get, at most."""

    def __post_init__(self) -> None:
        for name in self.hints:
            if name not in FACTS:
                raise ValueError(f"--hints names {name!r}: give some of {', '.join(FACTS)}, or none")
        if self.rewriter and self.endpoint:
            raise ValueError("--rewriter and --endpoint both write registers: give one of them")
        if self.endpoint and not self.endpoint_model:
            raise ValueError("--endpoint needs --endpoint-model, the name of the model there")
        if self.shape not in ("auto", *captioners.SHAPES):
            raise ValueError(f"--shape {self.shape!r} is unknown: give auto, {', '.join(captioners.SHAPES)}")
        if self.image_side < 16:
            raise ValueError(f"--image-side {self.image_side} must be 16 pixels or more")
        if not 0 <= self.temperature <= 5:
            raise ValueError(f"--temperature {self.temperature} is outside 0..5")
        self.generation()

    def generation(self, device: str = "auto") -> captioners.Generation:
        return captioners.Generation(device=device, dtype=self.dtype, max_new_tokens=self.max_new_tokens)

    def recorded(self) -> dict[str, Any]:
        """As it stands in the record: no password, no path of this machine, and a hash of all prompts and templates."""
        tree = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        tree["endpoint"] = captioners.public_url(self.endpoint) if self.endpoint else ""
        for name in ("model", "rewriter"):
            tree[name] = captioners.short_name(tree[name]) if tree[name] else ""
        words = [registers.frame(self.registers, hashtags=self.hashtags), *(registers.TEMPLATES[name] for name in self.registers)]
        return {**tree, "prompts_sha256": sha256("\n".join(words))}


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done, which may change from run to run."""

    batch_size: int = 16
    """Pictures at a time for a local model."""
    concurrency: int = 16
    """Requests under way at a server."""
    device: str = "auto"
    clip: str = ""
    """The open_clip model that scores captions."""
    keep_best: float = 1.0
    """Share of the pictures to keep, by their CLIP scores."""
    limit: int = 0
    """Rows to caption, of all shards in order; 0: all."""
    retry_failed: bool = False
    api_key: str = field(default="", repr=False)
    timeout: float = 120.0
    tries: int = 6
    pause: float = 1.0
    """Seconds before the second request for an answer; longer before each further one."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens in the prompt, and in the answer."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more")
        if self.limit < 0:
            raise ValueError(f"--limit {self.limit} must be 0 (all) or more")
        if not 0 < self.keep_best <= 1:
            raise ValueError("--keep-best takes a share above 0 and up to 100%")
        if self.keep_best < 1 and not self.clip:
            raise ValueError("--keep-best needs --clip, the model that scores captions")


# ---------------------------------------------------------------------------------------------------------------------
# rows


@dataclass
class Row:
    """One pair on its way: what is known, what is wanted, and what came of it."""

    shard: str
    number: int  # within the shard
    key: str
    wanted: tuple[str, ...]
    facts: Facts = field(default_factory=Facts)
    described: str = ""  # what a captioner of an earlier run saw
    image: Image.Image | None = None  # None: it cannot be decoded, or nobody looks
    attempt: int = 0
    captions: dict[str, dict[str, Any]] = field(default_factory=dict)  # register -> {"text", "source", …}
    failures: dict[str, str] = field(default_factory=dict)  # register -> reason
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # of prompts, of answers, at a server

    def open(self, names: Iterable[str]) -> list[str]:
        """Which of these registers are wanted and still without a result."""
        return [name for name in names if name in self.wanted and name not in self.captions and name not in self.failures]

    def fail(self, names: Iterable[str], reason: str) -> None:
        self.failures.update(dict.fromkeys(names, reason))

    def seed(self, seed: int) -> int:
        """A seed of its own for each row and attempt: 31 bits, which every server takes."""
        return int(sha256(f"{seed}/{self.shard}/{self.number}/{self.attempt}")[:8], 16) >> 1

    def as_json(self) -> dict[str, Any]:
        tree = {"row": self.number, "key": self.key, "attempt": self.attempt, "captions": self.captions, "failures": self.failures}
        return {**tree, "tokens": self.tokens} if any(self.tokens) else tree


Block = list[Row]  # rows that are written and kept together: a batch of a local model, one row for a server
Stage = Callable[[Iterable[Block]], Iterator[Block]]


def open_small(pair: Pair, side: int) -> Image.Image | None:
    """The pair's picture in RGB, upright and on white, reduced to `side` pixels; None where it is missing or broken."""
    try:
        image = decode_as(pair.image or b"", 3)
    except PictureError:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def earlier_description(record: dict[str, Any]) -> str:
    """The plain caption of a model that saw the picture, in a record that an earlier run wrote; else ""."""
    captions, sources = record.get("captions"), record.get("caption_sources")
    if not isinstance(captions, dict) or not isinstance(sources, dict) or not isinstance(sources.get("plain"), dict):
        return ""
    text = captions.get("plain") if sources["plain"].get("source") in ("model", "endpoint") else ""
    return text if isinstance(text, str) else ""


def make_row(pair: Pair, number: int, before: dict[str, Any] | None, settings: Settings, *, attempt: int, looks: bool) -> Row:
    """A new row; or one that failed `before`, for another attempt at what it lacks."""
    row = Row(pair.shard.name, number, pair.key, settings.registers)
    if before is not None:
        row.wanted, row.attempt, row.captions = tuple(before["failures"]), attempt, dict(before["captions"])
        row.tokens = list(before.get("tokens", row.tokens))
    record = read_record(pair)
    if record is None:
        row.fail(row.wanted, "damaged record")
        return row
    row.facts, row.described = registers.facts_of(record), earlier_description(record)
    row.image = open_small(pair, settings.image_side) if looks else None
    return row


@dataclass(frozen=True)
class Task:
    """One shard's rows to do: the first `limit`, in blocks of `size` that begin at its multiples."""

    shard: Path
    settings: Settings
    limit: int = ALL
    size: int = 1
    attempt: int = 0
    """Rows that failed in an earlier attempt than this are tried again."""
    looks: bool = True
    """Whether anybody sees the pictures."""

    def blocks(self, done: Rows, end: Callable[..., None] | None = None) -> Iterator[Block]:
        """The rows that are not done, and those to try again, apart. `end` is told of the shard's end, when it is reached."""
        damaged: list[Any] = []
        count = 0
        for _, group in groupby(islice(enumerate(read_pairs(self.shard, damaged)), self.limit), lambda item: item[0] // self.size):
            new: Block = []
            again: Block = []
            for number, pair in group:
                count += 1
                before = done.get(number)
                if before is None or (before["failures"] and before["attempt"] < self.attempt):
                    row = make_row(pair, number, before, self.settings, attempt=self.attempt, looks=self.looks)
                    (new if before is None else again).append(row)
            yield from (block for block in (new, again) if block)
        if end is not None and count < self.limit:
            end(pairs=count, damaged=[str(one) for one in damaged])


# ---------------------------------------------------------------------------------------------------------------------
# the stages that write captions


@dataclass
class Writer:
    """What all stages share: the registers that this stage answers for, and how an answer is judged and recorded."""

    settings: Settings
    names: tuple[str, ...]
    sees: bool
    """Whether it looks at the pictures; else it starts from words."""

    def facts(self, row: Row) -> Facts:
        return row.facts.only(self.settings.hints)

    def heat(self, row: Row) -> float:
        return max(self.settings.temperature, RETRY_TEMPERATURE) if row.attempt else self.settings.temperature

    def take(self, row: Row, register: str, answer: Any, **source: Any) -> None:
        """Keep an answer, or the reason why it cannot be kept."""
        if not isinstance(answer, str):
            row.fail([register], "missing from the answer" if answer is None else "answer is no text")
            return
        text = registers.tidy(answer, register, hashtags=self.settings.hashtags)
        if reason := registers.fault(text, registers.frame([register], hashtags=self.settings.hashtags)):
            row.fail([register], reason)
        else:
            row.captions[register] = {"text": text, **source}

    def description(self, row: Row) -> str | None:
        """The captioner's words that a stage without eyes starts from, "" where there are none; None for one that sees."""
        seen = row.captions.get("plain", {}) if "plain" not in self.names else {}
        return None if self.sees else seen.get("text", row.described)

    def ready(self, row: Row, names: Iterable[str]) -> list[str]:
        """Which of these registers can be written now. Those that cannot fail, each with its reason."""
        names = row.open(names)
        if self.sees:
            reason = "broken picture" if row.image is None else ""
        elif "plain" in row.failures and "plain" not in self.names:
            reason = "no plain caption to start from"
        else:
            reason = "" if self.facts(row) or self.description(row) else "no metadata"
        if reason:
            row.fail(names, reason)
        return [] if reason else names


@dataclass
class Models(Writer):
    """A local model, in batches: one for each block and register."""

    model: captioners.LocalModel
    batch_size: int
    source: str

    def __post_init__(self) -> None:
        self.batched = captioners.InHalves(self.write, self.batch_size)

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            for register in self.names:
                self.write_register([row for row in block if self.ready(row, [register])], register)
            yield block

    def write_register(self, rows: Block, register: str) -> None:
        for row, (prompt, text, seed) in zip(rows, self.batched([(row, register) for row in rows])):
            self.take(
                row, register, text.strip().removeprefix(prompt), source=self.source, model=self.model.name,
                revision=self.model.revision, prompt_sha256=sha256(prompt), seed=seed,
            )  # fmt: skip

    def write(self, items: list[tuple[Row, str]]) -> list[tuple[str, str, int]]:
        """(prompt, text, seed) of each row. Where words are drawn, the first row's seed decides them for the batch."""
        prompts = [self.prompt(row, register) for row, register in items]
        first = items[0][0]
        seed = first.seed(self.settings.seed)
        texts = self.model.write([row.image for row, _ in items], prompts, seed=seed, temperature=self.heat(first))
        return [(prompt, text, seed) for prompt, text in zip(prompts, texts)]

    def prompt(self, row: Row, register: str) -> str:
        if self.model.fixed_prompt is not None:
            return self.model.fixed_prompt
        return registers.ask(register, self.facts(row), hashtags=self.settings.hashtags, description=self.description(row))


@dataclass
class Asking(Writer):
    """A server: all registers of a row in one question, many questions under way."""

    endpoint: captioners.Endpoint
    concurrency: int
    in_a_row: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Blocks in the order in which they are done."""
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        open_blocks: list[tuple[Block, list[Future[None]]]] = []
        try:
            for block in blocks:
                open_blocks.append((block, [pool.submit(self.answer, row) for row in block]))
                while self.under_way(open_blocks) >= 2 * self.concurrency:
                    yield from self.done(open_blocks)
            while open_blocks:
                yield from self.done(open_blocks)
        except BaseException:
            self.endpoint.stop()  # else threads that wait for another try would keep the process alive
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def under_way(self, open_blocks: list[tuple[Block, list[Future[None]]]]) -> int:
        return sum(not future.done() for _, futures in open_blocks for future in futures)

    def done(self, open_blocks: list[tuple[Block, list[Future[None]]]]) -> Iterator[Block]:
        """Wait for an answer, and take out the blocks that have all of theirs. Raises what a question raised."""
        wait([future for _, futures in open_blocks for future in futures if not future.done()], return_when=FIRST_COMPLETED)
        for entry in list(open_blocks):
            block, futures = entry
            if all(future.done() for future in futures):
                for future in futures:
                    future.result()
                open_blocks.remove(entry)
                yield block

    def answer(self, row: Row) -> None:
        names = self.ready(row, self.names)
        if not names:
            return
        prompt = registers.ask_json(names, self.facts(row), hashtags=self.settings.hashtags, description=self.description(row))
        seed = row.seed(self.settings.seed)
        try:
            reply = self.endpoint.ask(
                prompt, image=row.image if self.sees else None, schema=registers.schema(names), seed=seed, temperature=self.heat(row),
                max_tokens=self.settings.max_new_tokens * len(names) + 64,
            )  # fmt: skip
        except captioners.EndpointError as error:
            row.fail(names, str(error))
            self.count_failure(error)
            return
        self.in_a_row = 0
        row.tokens = [row.tokens[0] + reply.prompt_tokens, row.tokens[1] + reply.completion_tokens]
        if reply.fault:
            row.fail(names, reply.fault)
            return
        try:
            answers = registers.read_answer(reply.text, names)
        except ValueError as error:
            row.fail(names, str(error))
            return
        source = {"source": "endpoint", "model": self.endpoint.model, "revision": reply.model}
        for name in names:
            self.take(row, name, answers.get(name), **source, prompt_sha256=sha256(prompt), seed=seed)

    def count_failure(self, error: captioners.EndpointError) -> None:
        """Raise EndpointRefusal when many rows running got no answer at all: the rest would only fail as they did."""
        with self.lock:
            self.in_a_row += 1
            if self.in_a_row >= FAILURES_IN_A_ROW:
                raise captioners.EndpointRefusal(
                    f"--endpoint {captioners.public_url(self.endpoint.url)}: {FAILURES_IN_A_ROW} rows running without an answer "
                    f"({error}; {error.told}). Is it up? The same command goes on where this one stopped, with --retry-failed also "
                    "for these rows"
                )


@dataclass
class Templates(Writer):
    """Metadata put into words, by a template, the same each time. No model, and the record says so."""

    def facts(self, row: Row) -> Facts:
        return row.facts  # all of them: --hints is for prompts

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            for row in block:
                for name in self.ready(row, self.names):
                    self.fill(row, name)
            yield block

    def fill(self, row: Row, name: str) -> None:
        described, printed = self.description(row), row.facts.caption
        words = printed or described if name == "era" else described or printed  # a book's own caption is of its time
        text = registers.template(name, Facts(**{**vars(row.facts), "caption": words}), hashtags=self.settings.hashtags)
        if text:
            pattern = sha256(registers.TEMPLATES[name])
            self.take(row, name, text, source="template", model="", revision="", prompt_sha256=pattern, seed=self.settings.seed)
        else:
            row.fail([name], "no metadata")


def make_stages(settings: Settings, work: Work) -> list[Writer]:
    """Who writes which register, in order; models are loaded here. Raises ValueError when that cannot be."""
    stages: list[Writer] = []
    rest = settings.registers
    if settings.model:
        captioner = captioners.load_captioner(
            settings.model, revision=settings.revision or None, shape=settings.shape, task=settings.task,
            generation=settings.generation(work.device),
        )  # fmt: skip
        writes_all = captioner.fixed_prompt is None and not (settings.rewriter or settings.endpoint)
        if not writes_all and "plain" not in rest:
            raise ValueError("--model sees the pictures and writes the plain caption that the others start from: add plain to --registers")
        names = rest if writes_all else ("plain",)
        stages.append(Models(settings, names, True, captioner, work.batch_size, "model"))
        rest = tuple(name for name in rest if name not in names)
    if settings.endpoint and rest:
        endpoint = captioners.Endpoint(
            settings.endpoint, settings.endpoint_model, work.api_key, timeout=work.timeout, tries=work.tries, pause=work.pause
        )
        stages.append(Asking(settings, rest, settings.send_pictures and not settings.model, endpoint, work.concurrency))
    elif settings.rewriter and rest:
        rewriter = captioners.load_rewriter(settings.rewriter, generation=settings.generation(work.device))
        stages.append(Models(settings, rest, False, rewriter, work.batch_size, "rewriter"))
    elif rest:
        stages.append(Templates(settings, rest, False))
    return stages


def run_stages(stages: Iterable[Stage], blocks: Iterable[Block]) -> Iterator[Block]:
    for stage in stages:
        blocks = stage(blocks)
    return iter(blocks)


def block_size(stages: Iterable[Writer], work: Work) -> int:
    return 1 if all(isinstance(stage, Asking) for stage in stages) else work.batch_size


# ---------------------------------------------------------------------------------------------------------------------
# the whole


@dataclass(frozen=True)
class Share:
    """Which of the shards are this process's, as torchrun and accelerate tell it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Share:
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def of(self, shards: list[Path]) -> list[Path]:
        return shards[self.rank :: self.world]


@dataclass
class Progress:
    """A bar with the rate, the time left and the counts by outcome."""

    bar: Any
    stages: list[Writer]
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Block) -> None:
        self.counts.update(outcome(row.as_json()) for row in rows)
        told = [f"{name} {count:,}" for name, count in self.counts.most_common(4)]
        told += [f"retries {stage.endpoint.counts['retries']:,}" for stage in self.stages if isinstance(stage, Asking)]
        self.bar.total = max(self.bar.total, self.bar.n + len(rows))  # second attempts are more than was planned
        self.bar.set_postfix_str(" · ".join(told), refresh=False)
        self.bar.update(len(rows))


def caption(paths: list[Path], out: Path, settings: Settings, work: Work, *, progress: bool = False) -> Report | None:
    """Caption the shards in `paths` into `out`. The story of this file, top to bottom.

    Returns None where other processes have shards to do yet; the last of them writes the record. Raises FileNotFoundError
    or ValueError, with the way out, for shards that are not there, models that do not fit, and an `out` of something else.
    """
    share = Share.from_environment()
    shards = checked_shards(paths, out)
    folder = Folder(out)
    folder.check(shards, settings.recorded())
    with alone_in(out, option="--out", rank=share.rank):
        return caption_all(folder, shards, settings, work, share, progress=progress)


def caption_all(folder: Folder, shards: list[Path], settings: Settings, work: Work, share: Share, *, progress: bool) -> Report | None:
    """This process's share of the shards, in a folder that is held."""
    limits = limits_of(shards, work.limit)
    attempt = folder.retry_attempt(limits) if work.retry_failed else 0
    mine = share.of(list(limits))
    todo = [shard for shard in mine if done_rows(folder, shard, limit=limits[shard], attempt=attempt) is None]
    stages = make_stages(settings, work) if todo else []
    size, looks = block_size(stages, work), any(stage.sees for stage in stages)
    total = sum(rows_left(folder, shard, limits[shard], attempt) for shard in todo)
    with tqdm(total=total, unit="row", desc="caption", disable=not (progress and share.rank == 0 and todo)) as bar:
        told = Progress(bar, stages)
        for shard in todo:
            rows = caption_shard(folder, Task(shard, settings, limits[shard], size, attempt, looks), stages, told)
            if not work.clip:  # with scores, a shard has to wait for all the others
                with folder.alone():
                    publish_shard(folder, shard, rows, settings.registers, {}, set())
    if work.clip:
        stages.clear()  # one model at a time in memory
        score_shards(folder, mine, limits, work)
    clip = captioners.short_name(work.clip) if work.clip else ""
    return finish(folder, limits, settings.recorded(), attempt=attempt, clip=clip, keep_best=work.keep_best, prices=work.prices)


def caption_shard(folder: Folder, task: Task, stages: list[Writer], progress: Progress) -> Rows:
    """Bring the journal of one shard up to the task's limit, and return its rows."""
    head = {
        "shard": task.shard.name, "bytes": task.shard.stat().st_size, "settings": task.settings.recorded(),
        "models": [f"{stage.model.name}@{stage.model.revision}" for stage in stages if isinstance(stage, Models)],
    }  # fmt: skip
    with Journal(folder.journal(task.shard), head) as journal:
        for _ in range(2 if task.attempt else 1):  # the second time, what failed in the first
            for block in run_stages(stages, task.blocks(dict(journal.rows), journal.end)):
                journal.add([row.as_json() for row in block])
                progress.add(block)
        return {number: row for number, row in journal.rows.items() if number < task.limit}


def score_shards(folder: Folder, shards: list[Path], limits: dict[Path, int], work: Work) -> None:
    """Score the captions that have no score yet, in a journal of their own. The model is loaded when it is needed."""
    clip: Clip | None = None
    for shard in shards:
        rows = read_journal(folder.journal(shard))[1]
        head = {"clip": captioners.short_name(work.clip), "bytes": shard.stat().st_size}
        with Journal(folder.scores(shard), head) as journal:
            missing = {n for n, row in rows.items() if n < limits[shard] and row["captions"] and not is_scored(row, journal.rows)}
            if missing:
                clip = clip or Clip(work.clip, device=work.device)
                score_shard(journal, shard, {number: rows[number] for number in missing}, clip)


def score_shard(journal: Journal, shard: Path, rows: Rows, clip: Clip) -> None:
    """Journal a score for each caption of `rows`; none for those whose picture is broken."""
    for _, group in groupby(enumerate(read_pairs(shard, [])), lambda item: item[0] // CLIP_BATCH):
        batch = [(rows[number], open_small(pair, CLIP_SIDE)) for number, pair in group if number in rows]
        seen = [(row, image) for row, image in batch if image is not None]
        values = clip.score([(image, [entry["text"] for entry in row["captions"].values()]) for row, image in seen]) if seen else []
        scores = {row["row"]: dict(zip(row["captions"], (round(value, 5) for value in each))) for (row, _), each in zip(seen, values)}
        if batch:
            journal.add([{"row": row["row"], "texts": texts_id(row), "scores": scores.get(row["row"], {})} for row, _ in batch])


def checked_shards(paths: list[Path], out: Path) -> list[Path]:
    """The image shards in `paths`. Raises ValueError where two have one name, or `out` is their own folder."""
    shards = find_shards(paths)
    twice = [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice: caption folders with equal shard names one by one, each into its own --out")
    inside = [shard for shard in shards if shard.parent.resolve() == out.resolve()]
    if inside:
        raise ValueError(f"--out {out} is the folder of {inside[0].name} itself: name another, so that the source stays as it is")
    if any((shard.parent / "codes.json").exists() for shard in shards):
        raise ValueError(f"{shards[0].parent} holds code shards (codes.json), which have no pictures: give the image shards")
    return shards


def preview(paths: list[Path], out: Path, settings: Settings, work: Work, count: int) -> tuple[Path, Counter[str]]:
    """Caption `count` pictures, spread over the shards, into a contact sheet. Journals and shards stay as they are."""
    if count < 1:
        raise ValueError(f"--preview {count} must be 1 or more")
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
        raise ValueError(f"no picture of {shards[0]} can be decoded: python -m data_tools.inspect --verify says what is wrong")
    cells = [(row.image, told_on_sheet(row, name)) for row in rows for name in settings.registers]
    columns = len(settings.registers) if len(settings.registers) > 1 else None
    out.mkdir(parents=True, exist_ok=True)
    captioned_grid(*zip(*cells), columns=columns, cell=288).save(out / PREVIEW)
    return out / PREVIEW, Counter(outcome(row.as_json()) for row in rows)


def told_on_sheet(row: Row, name: str) -> str:
    if name not in row.captions:
        return f"{name}: FAILED, {row.failures.get(name, 'nothing came')}"
    entry = row.captions[name]
    return f"{name}{' (template)' if entry['source'] == 'template' else ''}: {entry['text']}"


# ---------------------------------------------------------------------------------------------------------------------
# the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    words, work = Settings(), Work()
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.caption",
        description="Image shards -> the same shards with captions in several registers.",
        epilog="Killed or stopped, the same command goes on. Several GPUs: accelerate launch -m data_tools.caption … divides the shards.",
    )
    add = parser.add_argument
    add("shards", type=home_path, nargs="+", metavar="SHARDS", help="folders of image shards, or .tar files")
    add("--out", type=home_path, help="the folder for the new shards (SHARDS-captioned)")
    add("--registers", default=",".join(words.registers), help=f"of {','.join(registers.REGISTERS)} (%(default)s)")
    add("--hashtags", action=argparse.BooleanOptionalAction, default=words.hashtags, help="in social captions (yes)")
    add("--hints", default=",".join(words.hints), help="metadata told in prompts, or none (%(default)s)")
    who = parser.add_argument_group("who writes").add_argument
    who("--model", default="", type=os.path.expanduser, help=f"a captioner, Hub id or folder: {captioners.EXAMPLES}")
    who("--revision", default="", help="its commit or tag on the Hub")
    who("--shape", default=words.shape, help="auto, caption, task or chat (%(default)s: as the model's type tells)")
    who("--task", default="", help="the prompt of a task model, such as '<CAPTION>' or 'caption en'")
    who("--rewriter", default="", type=os.path.expanduser, help="a language model that writes the other registers, Hub id or folder")
    who("--endpoint", default="", metavar="URL", help="an OpenAI-compatible server: sees pictures, or rewrites what --model saw")
    who("--endpoint-model", default="", help="the name of the model there")
    pictures = argparse.BooleanOptionalAction
    who("--send-pictures", action=pictures, default=words.send_pictures, help="to the server; a language model wants none (yes)")
    who("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="the environment variable with the key (%(default)s)")
    merged = from_table.Options()
    table = parser.add_argument_group("captions from a table, instead of all that").add_argument
    table(
        "--from",
        dest="table",
        type=home_path,
        metavar="TABLE",
        help="merge this .csv, .tsv, .jsonl or .parquet: rows by key or path, a column a register",
    )
    table(
        "--caption-column",
        default="",
        metavar="NAME",
        help="the column of the plain caption (the first of caption, text, description, prompt, title …)",
    )
    table("--encoding", default=merged.encoding, help="of the table, where it is text (%(default)s)")
    table(
        "--quoting",
        default=merged.quoting,
        choices=QUOTING,
        help="of its fields (%(default)s: of CSV yes, of TSV where something shows it)",
    )
    table("--keep-undescribed", action="store_true", help="pictures without a row stay as they are, instead of being left out")
    table(
        "--min-things",
        type=int,
        default=merged.min_things,
        metavar="N",
        help="pictures that a main noun needs to become a thing (%(default)s)",
    )
    table(
        "--shard-size",
        type=int,
        default=merged.shard_size,
        metavar="N",
        help="pictures in a shard, where several folders are mixed by --seed (%(default)s)",
    )
    how = parser.add_argument_group("how").add_argument
    how("--seed", type=int, default=words.seed)
    how("--temperature", type=float, default=words.temperature, help="0: the likeliest words (%(default)s)")
    how("--max-new-tokens", type=int, default=words.max_new_tokens, help="of one caption (%(default)s)")
    how("--dtype", default=words.dtype, choices=("auto", "float32", "bfloat16", "float16"))
    how("--image-side", type=int, default=words.image_side, help="longer side of the pictures shown, in pixels (%(default)s)")
    how("--device", default=work.device, help="auto, cpu, cuda, cuda:1 (%(default)s)")
    how("--batch-size", type=int, default=work.batch_size, help="halved when memory runs out (%(default)s)")
    how("--concurrency", type=int, default=work.concurrency, help="requests under way (%(default)s)")
    how("--timeout", type=float, default=work.timeout, help="seconds for an answer (%(default)s)")
    how("--tries", type=int, default=work.tries, help="requests for one answer at most (%(default)s)")
    how("--price", default="", metavar="IN,OUT", help="of a million tokens in prompts and in answers, for the cost")
    what = parser.add_argument_group("which rows").add_argument
    what("--preview", type=int, default=0, metavar="N", help=f"caption N pictures into {PREVIEW} and stop")
    what("--limit", type=int, default=0, metavar="N", help="the first N rows; without it, a later run does the rest")
    what("--retry-failed", action="store_true", help="try again what failed, with other words")
    what(
        "--clip",
        default="",
        type=os.path.expanduser,
        metavar="MODEL",
        help="score captions by open_clip: ViT-B-32:laion2b_s34b_b79k, hf-hub:…, a folder",
    )
    what("--keep-best", default="100%", metavar="SHARE", help="leave out the rest, by score: 90%% (%(default)s)")
    return parser.parse_args(argv)


def parse_share(text: str) -> float:
    """'90%' or '0.9' -> 0.9."""
    try:
        return float(text.rstrip("% ")) / 100 if text.rstrip().endswith("%") else float(text)
    except ValueError as error:
        raise ValueError(f"--keep-best {text!r} is no share: give 90%") from error


def parse_prices(text: str) -> tuple[float, float]:
    try:
        prices = [float(part) for part in text.split(",")] if text else [0.0, 0.0]
    except ValueError as error:
        raise ValueError(f"--price {text!r} is no pair of numbers: give one like 0.15,0.60") from error
    if len(prices) != 2 or min(prices) < 0:
        raise ValueError(f"--price {text!r} is no pair of prices: give one like 0.15,0.60")
    return prices[0], prices[1]


def settings_from(args: argparse.Namespace) -> Settings:
    given = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    given["registers"] = registers.parse_registers(args.registers)
    given["hints"] = tuple(name.strip() for name in args.hints.split(",") if name.strip() and args.hints.strip() != "none")
    return Settings(**given)


def work_from(args: argparse.Namespace) -> Work:
    given = {name: value for name, value in vars(args).items() if name in Work.__dataclass_fields__}
    given.update(keep_best=parse_share(args.keep_best), prices=parse_prices(args.price), api_key=os.environ.get(args.api_key_env, ""))
    return Work(**given)


def default_out(shards: Path) -> Path:
    """Beside the folder of the shards."""
    folder = (shards if shards.is_dir() else shards.parent).absolute()
    return folder.with_name(f"{folder.name}-captioned")


def main_from_table(args: argparse.Namespace, out: Path) -> int:
    options = from_table.Options(**{name: value for name, value in vars(args).items() if name in from_table.Options.__dataclass_fields__})
    report = from_table.merge(args.shards, args.table, out, options, progress=True)
    print(report.text(out))
    print(f"Next:\n  python -m data_tools.questions {shlex.quote(str(out))} --out {shlex.quote(str(out.with_name(f'{out.name}-asked')))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    out = args.out or default_out(args.shards[0])
    try:
        if args.table:
            return main_from_table(args, out)
        settings, work = settings_from(args), work_from(args)
        if args.preview:
            path, counts = preview(args.shards, out, settings, work, args.preview)
            print(" · ".join(f"{name} {count:,}" for name, count in counts.most_common()))
            print(f"preview      {path}: look at it, then run the same command without --preview")
            return 0
        report = caption(args.shards, out, settings, work, progress=True)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"caption: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("caption: stopped; the same command goes on", file=sys.stderr)
        return 130
    if report is None:
        print("caption: this process's shards are done; others are still at work")
        return 0
    print(report.table())
    if not report.captions:
        print(f"caption: no caption was written; {out / RECORD} counts the reasons", file=sys.stderr)
        return 1
    for told in report.doubts():
        print(f"caption: WARNING: {told}", file=sys.stderr)
    if report.says_nothing():
        return 1
    print(f"Next:\n  python -m data_tools.inspect {shlex.quote(str(out))} --verify --sheet sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

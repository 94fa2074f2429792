"""The stages that write captions: local models, a server, templates. Each takes blocks of rows and passes them on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools import captioning as captioners
from data_tools.captioning import registers
from data_tools.captioning.journals import sha256
from data_tools.captioning.registers import Facts
from data_tools.captioning.rows import Block, CaptionRow
from data_tools.captioning.settings import Settings, Work
from tokun.utils.errors import BadSample, UserError

if TYPE_CHECKING:
    from data_tools.captioning.tokun_captioner import TokunCaptioner

RETRY_TEMPERATURE = 0.7  # of a second attempt: the most likely words have failed once
FAILURES_IN_A_ROW = 16  # rows without an answer after which a server counts as down


@dataclass
class Writer:
    """Base of all stages: the registers it writes, and how an answer is judged and recorded."""

    settings: Settings
    names: tuple[str, ...]
    sees: bool
    """Whether it sees the pictures; otherwise it starts from text."""

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks, with what this stage writes in their rows."""
        raise NotImplementedError

    def facts(self, row: CaptionRow) -> Facts:
        return row.facts.only(self.settings.hints)

    def temperature_of(self, row: CaptionRow) -> float:
        return max(self.settings.temperature, RETRY_TEMPERATURE) if row.attempt else self.settings.temperature

    def take(self, row: CaptionRow, register: str, answer: Any, **source: Any) -> None:
        """Keep an answer, or the reason for rejecting it."""
        if not isinstance(answer, str):
            row.fail([register], "missing from the answer" if answer is None else "answer is not text")
            return
        text = registers.tidy(answer, register, hashtags=self.settings.hashtags)
        if reason := registers.fault(text, registers.frame([register], hashtags=self.settings.hashtags)):
            row.fail([register], reason)
        else:
            row.captions[register] = {"text": text, **source}

    def description(self, row: CaptionRow) -> str | None:
        """The captioner's description, "" if there is none, for a stage that does not see pictures; None for one that does."""
        seen = row.captions.get("plain", {}) if "plain" not in self.names else {}
        return None if self.sees else seen.get("text", row.described)

    def ready(self, row: CaptionRow, names: Iterable[str]) -> list[str]:
        """Those of these registers that can be written now. The others fail, each with its reason."""
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
class ModelWriter(Writer):
    """A local model: one batch for each block and register."""

    model: captioners.LocalModel | TokunCaptioner
    batch_size: int
    source: str

    def __post_init__(self) -> None:
        self.batched = captioners.HalvingBatches(self.write, self.batch_size)

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

    def write(self, items: list[tuple[CaptionRow, str]]) -> list[tuple[str, str, int]]:
        """(prompt, text, seed) of each row. When sampling, the first row's seed is used for the whole batch."""
        prompts = [self.prompt(row, register) for row, register in items]
        first = items[0][0]
        seed = first.seed(self.settings.seed)
        texts = self.model.write([row.image for row, _ in items], prompts, seed=seed, temperature=self.temperature_of(first))
        return [(prompt, text, seed) for prompt, text in zip(prompts, texts)]

    def prompt(self, row: CaptionRow, register: str) -> str:
        if self.model.fixed_prompt is not None:
            return self.model.fixed_prompt
        return registers.ask(register, self.facts(row), hashtags=self.settings.hashtags, description=self.description(row))


@dataclass
class ServerWriter(Writer):
    """A server: one question for all registers of a row, many questions concurrently."""

    endpoint: captioners.Endpoint
    concurrency: int
    in_a_row: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Blocks in the order in which they finish."""
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        open_blocks: list[tuple[Block, list[Future[None]]]] = []
        try:
            for block in blocks:
                open_blocks.append((block, [pool.submit(self.answer, row) for row in block]))
                while self.pending(open_blocks) >= 2 * self.concurrency:
                    yield from self.done(open_blocks)
            while open_blocks:
                yield from self.done(open_blocks)
        except BaseException:
            self.endpoint.stop()  # else threads waiting to retry would keep the process alive
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def pending(self, open_blocks: list[tuple[Block, list[Future[None]]]]) -> int:
        return sum(not future.done() for _, futures in open_blocks for future in futures)

    def done(self, open_blocks: list[tuple[Block, list[Future[None]]]]) -> Iterator[Block]:
        """Wait for an answer, and remove and yield the finished blocks. Re-raises a worker's error."""
        wait([future for _, futures in open_blocks for future in futures if not future.done()], return_when=FIRST_COMPLETED)
        for entry in list(open_blocks):
            block, futures = entry
            if all(future.done() for future in futures):
                for future in futures:
                    future.result()
                open_blocks.remove(entry)
                yield block

    def answer(self, row: CaptionRow) -> None:
        names = self.ready(row, self.names)
        if not names:
            return
        prompt = registers.ask_json(names, self.facts(row), hashtags=self.settings.hashtags, description=self.description(row))
        seed = row.seed(self.settings.seed)
        try:
            reply = self.endpoint.ask(
                prompt,
                image=row.image if self.sees else None,
                schema=registers.schema(names),
                seed=seed,
                temperature=self.temperature_of(row),
                max_tokens=self.settings.max_new_tokens * len(names) + 64,
            )
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
        except BadSample as error:
            row.fail(names, str(error))
            return
        source = {"source": "endpoint", "model": self.endpoint.model, "revision": reply.model}
        for name in names:
            self.take(row, name, answers.get(name), **source, prompt_sha256=sha256(prompt), seed=seed)

    def count_failure(self, error: captioners.EndpointError) -> None:
        """Raise EndpointRefusal if many rows in a row got no answer: the rest would fail too."""
        with self.lock:
            self.in_a_row += 1
            if self.in_a_row >= FAILURES_IN_A_ROW:
                raise captioners.EndpointRefusal(
                    f"--endpoint {captioners.public_url(self.endpoint.url)}: {FAILURES_IN_A_ROW} consecutive rows without an answer "
                    f"({error}; {error.message}). Is it running? The same command resumes; "
                    "--retry-failed also retries these rows"
                )


@dataclass
class TemplateWriter(Writer):
    """Metadata put into words by a fixed template, without a model; the record says so."""

    def facts(self, row: CaptionRow) -> Facts:
        return row.facts  # all of them: --hints is for prompts

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for block in blocks:
            for row in block:
                for name in self.ready(row, self.names):
                    self.fill(row, name)
            yield block

    def fill(self, row: CaptionRow, name: str) -> None:
        described, printed = self.description(row), row.facts.caption
        words = printed or described if name == "era" else described or printed  # a book's own caption is of its time
        text = registers.template(name, Facts(**{**vars(row.facts), "caption": words}), hashtags=self.settings.hashtags)
        if text:
            pattern = sha256(registers.TEMPLATES[name])
            self.take(row, name, text, source="template", model="", revision="", prompt_sha256=pattern, seed=self.settings.seed)
        else:
            row.fail([name], "no metadata")


def make_stages(settings: Settings, work: Work) -> list[Writer]:
    """The stages and their registers, in order; loads the models. Raises UserError if the settings do not allow it."""
    stages: list[Writer] = []
    rest = settings.registers
    if settings.model:
        captioner = captioners.load_captioner(
            settings.model, revision=settings.revision or None, shape=settings.shape, task=settings.task,
            generation=settings.generation(work.device),
        )  # fmt: skip
        writes_all = captioner.fixed_prompt is None and not (settings.rewriter or settings.endpoint)
        if not writes_all and "plain" not in rest:
            raise UserError("--model writes the plain caption, which the other registers start from: add plain to --registers")
        names = rest if writes_all else ("plain",)
        stages.append(ModelWriter(settings, names, True, captioner, work.batch_size, "model"))
        rest = tuple(name for name in rest if name not in names)
    if settings.endpoint and rest:
        endpoint = captioners.Endpoint(
            settings.endpoint, settings.endpoint_model, work.api_key, timeout=work.timeout, tries=work.tries, pause=work.pause
        )
        stages.append(ServerWriter(settings, rest, settings.send_pictures and not settings.model, endpoint, work.concurrency))
    elif settings.rewriter and rest:
        rewriter = captioners.load_rewriter(settings.rewriter, generation=settings.generation(work.device))
        stages.append(ModelWriter(settings, rest, False, rewriter, work.batch_size, "rewriter"))
    elif rest:
        stages.append(TemplateWriter(settings, rest, False))
    return stages


def run_stages(stages: Iterable[Writer], blocks: Iterable[Block]) -> Iterator[Block]:
    for stage in stages:
        blocks = stage(blocks)
    return iter(blocks)


def block_size(stages: Iterable[Writer], work: Work) -> int:
    return 1 if all(isinstance(stage, ServerWriter) for stage in stages) else work.batch_size

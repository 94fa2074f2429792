"""Packed sequences for the generator, in batches: code samples in, ids and labels out."""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokun.data import mirror
from tokun.data.codes import CodeSamples, Record
from tokun.data.sample_order import Order, check_batch, positions_of, rng_for
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import TASKS, Tags
from tokun.utils.errors import UserError

ENCODED = 2**16  # texts whose ids are cached: some tens of MB
# with several grids, batch lengths are multiples of this: on a CPU, oneDNN prepares its matrix products again for each length
LENGTH_MULTIPLE = 16


@dataclass(frozen=True)
class TokenBatch:
    """input_ids, labels int64 (B, T); labels are shifted, and -100 where there is no loss.
    Counts are made with the batch, in the loader's thread."""

    input_ids: Tensor
    labels: Tensor
    counts: tuple[int, int, int]  # image targets, other targets, tokens other than padding


class OtherWords:
    """Word dropout (Bowman et al. 2016): a share of the words after the prompt is read as random ones,
    so that the model must rely on what it is given."""

    def __init__(self, vocabulary: Any, share: float) -> None:
        self.share, self.size = share, vocabulary.text_size
        self.words = np.setdiff1d(np.arange(self.size, dtype=np.int32), vocabulary.illegal_text)

    def __call__(self, ids: np.ndarray, prompt: int, rng: np.random.Generator) -> np.ndarray:
        """ids (N,) -> what is read in their place."""
        chosen = (rng.random(len(ids)) < self.share) & (ids < self.size) & (np.arange(len(ids)) >= prompt)
        return np.where(chosen, rng.choice(self.words, len(ids)), ids)


class PackedRow(NamedTuple):
    """A packed sequence, before it is batched."""

    input_ids: np.ndarray  # int32: a tenth of a list's memory
    prompt: int
    read: np.ndarray | None = None  # replaces input_ids as the model's input, not as its targets


class TokenBatches:
    """Packed sequences for the generator: step -> TokenBatch with batch_size / world rows.

    Each position's task, view, register and dropped tags are drawn from its own generator. Within windows of `sort_window`
    positions (0: none), sequences of similar length are batched together to save padding, and the batches of a window are
    shuffled. All of it is a function of (seed, position, batch_size, sort_window), and so the same for any number of
    processes; each packs the whole window.
    """

    def __init__(
        self, samples: CodeSamples, vocabulary: Any, encode: Callable[[str], list[int]], *, batch_size: int, seed: int,
        task_mix: dict[str, float], tag_dropout: float, plain_share: float = 1.0, rank: int = 0, world: int = 1, views: bool = True,
        threads: int = 0, sort_window: int = 0, word_dropout: float = 0.0, untagged_share: float = 0.0,
    ):  # fmt: skip
        check_batch(batch_size, world)
        self.samples, self.vocabulary = samples, vocabulary
        # saves a quarter of the packing time from the second epoch on; the lists are shared and must not be changed
        self.encode = lru_cache(ENCODED)(encode)
        self.batch_size, self.seed, self.tag_dropout, self.rank, self.world, self.views = batch_size, seed, tag_dropout, rank, world, views
        self.plain_share, self.untagged_share = plain_share, untagged_share
        self.other = OtherWords(vocabulary, word_dropout) if word_dropout else None
        self.order = Order(len(samples), seed)
        check_task_mix(task_mix)
        self.tasks = list(task_mix)
        self.shares = (np.cumsum([task_mix[t] for t in self.tasks]) / sum(task_mix.values())).tolist()
        self.cut_captions = 0
        self.window = max(1, sort_window // batch_size)  # in batches
        self.multiple = LENGTH_MULTIPLE if len(vocabulary.grids) > 1 else 1
        self.pool = ThreadPoolExecutor(threads) if threads > 0 else None
        self.ahead = ThreadPoolExecutor(1) if self.window > 1 else None
        self._windows: dict[int, Future[list[list[tuple[int, PackedRow]]]]] = {}
        self._lock = threading.Lock()

    def __call__(self, step: int) -> TokenBatch:
        if self.window == 1:
            packed = self._pack(positions_of(step, self.batch_size, self.rank, self.world))
        else:
            mine = self._batch(step)[self.rank * self.batch_size // self.world : (self.rank + 1) * self.batch_size // self.world]
            packed = [sequence for _, sequence in mine]
        v = self.vocabulary
        return collate(packed, v.id("<pad>"), first_code=v.code_offset, last_code=v.code_end - 1, multiple=self.multiple)

    def positions(self, step: int) -> list[int]:
        """Stream positions of this process's rows at `step`."""
        mine = positions_of(step, self.batch_size, self.rank, self.world)
        if self.window == 1:
            return list(mine)
        first = step * self.batch_size
        batch = self._batch(step)
        return [batch[position - first][0] for position in mine]

    def _pack(self, positions: Iterable[int]) -> list[PackedRow]:
        items = [(p, self.order[p]) for p in positions]
        groups = [items[start : start + 32] for start in range(0, len(items), 32)]  # one by one, the hand-over costs as much as the packing
        return [row for group in (self.pool.map if self.pool else map)(self._items, groups) for row in group]

    def _items(self, items: Iterable[tuple[int, int]]) -> list[PackedRow]:
        return [self._item(item) for item in items]

    def _batch(self, step: int) -> list[tuple[int, PackedRow]]:
        """(position, sequence) of the whole global batch. A thread packs its window and prefetches the next."""
        window, number = divmod(step, self.window)
        assert self.ahead is not None
        with self._lock:
            for wanted in (window, window + 1):
                if wanted not in self._windows:
                    self._windows[wanted] = self.ahead.submit(self._pack_window, wanted)
            for old in [known for known in self._windows if not window - 1 <= known <= window + 1]:
                del self._windows[old]
            future = self._windows[window]
        return future.result()[number]

    def _pack_window(self, window: int) -> list[list[tuple[int, PackedRow]]]:
        size = self.window * self.batch_size
        positions = range(window * size, (window + 1) * size)
        by_length = sorted(zip(positions, self._pack(positions), strict=True), key=lambda item: (len(item[1].input_ids), item[0]))
        batches = [
            sorted(by_length[start : start + self.batch_size], key=lambda item: item[0]) for start in range(0, size, self.batch_size)
        ]
        return [batches[number] for number in rng_for(self.seed, window, stream=4).permutation(self.window)]

    def _item(self, item: tuple[int, int]) -> PackedRow:
        position, i = item
        rng = rng_for(self.seed, position, stream=2)
        packed = self.pack(self.samples.whole_record(i), rng)
        ids = np.array(packed.input_ids, np.int32)
        return PackedRow(ids, packed.prompt, self.other(ids, packed.prompt, rng) if self.other else None)

    def text(self, text: str) -> list[int]:
        """Ids of a text, truncated to the longest span; truncations are counted."""
        ids = self.encode(text)
        if len(ids) > self.vocabulary.max_text:
            self.cut_captions += 1
        return ids[: self.vocabulary.max_text] or self.encode(".")

    def pack(self, record: Record, rng: np.random.Generator) -> Any:
        """One record -> Packed, for a task drawn from `rng`; falls back to joint if the task's fields are missing."""
        v = self.vocabulary
        task = self.tasks[min(bisect_right(self.shares, rng.random()), len(self.tasks) - 1)]
        # for a range of one, numpy draws nothing either
        view = int(rng.integers(len(record.codes))) if self.views and len(record.codes) > 1 else 0
        codes, turned = record.codes[view], view < len(record.mirrored) and record.mirrored[view]
        registers = [r for r in record.captions if r in v.registers]
        register = "plain" if rng.random() < self.plain_share or len(registers) == 1 else registers[rng.integers(len(registers))]
        dropped, bare = rng.random(5 if v.things else 4).tolist(), rng.random() < self.tag_dropout
        keep = [not bare and number >= self.tag_dropout for number in dropped]
        asked = task == "question" and bool(record.questions)
        if self.untagged_share and (asked or rng.random() < self.untagged_share):
            keep = [False, False, keep[2] and not asked, keep[3], False]
        only_grid = len(v.grids) > 1 or record.grid != v.default_grid  # one of several grids cannot be guessed
        tags = Tags(
            style=record.style if keep[0] and record.style in v.styles else "",
            subject=record.subject if keep[1] and record.subject in v.subjects else "",
            register=register if keep[2] else "",
            grid=record.grid if keep[3] or only_grid else None,
            thing=record.thing if v.things and keep[4] and record.thing in v.things else "",
        )

        def text(words: str) -> list[int]:
            return self.text(mirror.exchange_sides(words) if turned else words)

        caption = text(record.captions[register])
        if task == "text_to_image":
            return sequences.pack_text_to_image(v, tags, codes, caption)
        if asked:
            question, answer = record.questions[rng.integers(len(record.questions))]
            return sequences.pack_question(v, tags, codes, text(question), text(answer))
        others = [r for r in registers if r != register]
        if task == "rewrite" and others:
            other = others[rng.integers(len(others))]
            return sequences.pack_rewrite(v, tags, caption, other, text(record.captions[other]))
        return sequences.pack_joint(v, tags, codes, caption)


def collate(
    packed: Sequence[Any], pad: int, *, first_code: int = sys.maxsize, last_code: int = sys.maxsize, multiple: int = 1
) -> TokenBatch:
    """Packed sequences (or rows) -> a batch, right-padded and shifted by one. The only place where labels are shifted.

    Ids from `first_code` to `last_code` are image codes, counted separately. The batch's length is a multiple of `multiple`.
    """
    width = -(-(max(len(p.input_ids) for p in packed) - 1) // multiple) * multiple
    input_ids = np.full((len(packed), width), pad)
    labels = np.full((len(packed), width), -100)
    for row, p in enumerate(packed):
        n = len(p.input_ids) - 1
        read = getattr(p, "read", None)
        input_ids[row, :n] = (p.input_ids if read is None else read)[:-1]
        labels[row, p.prompt - 1 : n] = p.input_ids[p.prompt :]
    image, targets = int(((labels >= first_code) & (labels <= last_code)).sum()), int((labels >= 0).sum())
    tokens = sum(len(p.input_ids) - 1 for p in packed)
    return TokenBatch(torch.from_numpy(input_ids), torch.from_numpy(labels), (image, targets - image, tokens))


def check_task_mix(task_mix: dict[str, float]) -> None:
    unknown = set(task_mix) - set(TASKS)
    if unknown or not task_mix or min(task_mix.values()) < 0 or sum(task_mix.values()) <= 0:
        raise UserError(f"train.task_mix is {task_mix}; it takes non-negative shares of {', '.join(TASKS)}, not all zero")

"""Text-only training (`config.words`): rewriting descriptions as captions of one register, from a table of both. Uses no pictures.

A row is a sequence of the task `rewrite`, with loss on the caption only. A register that the model does not know becomes a new tag.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokun import data
from tokun.data.sample_order import rng_for
from tokun.data.sample_record import text_in
from tokun.data.tokens import OtherWords, PackedRow, collate
from tokun.inference.model import Tokun
from tokun.models import losses
from tokun.tokenizers import sequences
from tokun.tokenizers.sequences import Packed
from tokun.tokenizers.text import normalize
from tokun.tokenizers.vocabulary import Vocabulary, tag_word
from tokun.training.engine import summed
from tokun.training.fine_tuning import TuningStage, run_stage, settings_of
from tokun.training.run import Run
from tokun.training.token_loss import TokenLoss
from tokun.utils import checkpoint
from tokun.utils.errors import UserError


def train_words(run: Run) -> Path:
    """Train on the rows of `words.train` -> `out/adapter`, or without an adapter `out/checkpoint`.

    The rows are JSONL, which train.py makes from any table.
    """
    w = run.config.words
    register = tag_word(w.register)
    if not register:
        raise UserError("words.register is empty: name the register of the captions, for example words.register=social")
    files = checkpoint.files_fingerprint([Path(path) for path in (w.train, w.val) if path])
    base = run.take_start()
    settings = settings_of(
        run.config, base, words={"register": register, "description": w.description, "caption": w.caption, "rows": files}
    )

    def about(stage: TuningStage) -> str:
        return f"Learned to rewrite descriptions as captions in the register {register}, from {len(stage.items)} rows."

    return run_stage(run, WordsStage.name, settings, lambda: WordsStage(run, base, register, settings), about)


def read_rows(path: str | Path, description: str, caption: str) -> list[tuple[str, str]]:
    """(description, caption) pairs of a JSONL file, without incomplete rows. Raises UserError if none are left."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}. Give a table such as a CSV or TSV, or fix the line") from error
    found = [(normalize(text_in(row.get(description))), normalize(text_in(row.get(caption)))) for row in rows]
    whole = [row for row in found if all(row)]
    if not whole:
        columns = ", ".join(rows[0]) if rows else "none"
        raise UserError(
            f"{path} has no row with both {description!r} and {caption!r} (words.description, words.caption); its columns are {columns}"
        )
    return whole


def pack_rows(rows: Sequence[tuple[str, str]], model: Tokun, vocabulary: Vocabulary, register: str) -> list[Packed]:
    """(description, caption) -> sequences as in `Tokun.rewrite`; texts are truncated to the longest span."""
    v, encode = vocabulary, model.text_tokenizer.encode
    packed = []
    for description, caption in rows:
        given, wanted = encode(description)[: v.max_text], encode(caption)[: v.max_text]
        packed.append(sequences.pack_rewrite(v, v.bare(), given, register, wanted, given=True))
    return packed


class WordsStage(TuningStage):
    """Trains on rows of a table."""

    name, what, sums, tasks = "words", "rows", ("nats", "tokens", "z"), ("rewrite",)

    def __init__(self, run: Run, base: Tokun, register: str, settings: dict[str, Any]) -> None:
        w = run.config.words
        vocabulary = base.vocabulary.extended(registers=[register])
        self.items = pack_rows(read_rows(w.train, w.description, w.caption), base, vocabulary, register)
        held = pack_rows(read_rows(w.val, w.description, w.caption), base, vocabulary, register) if w.val else []
        self.pad = vocabulary.id("<pad>")
        dropped = run.config.train.word_dropout
        self.other = OtherWords(vocabulary, dropped) if dropped else None
        super().__init__(run, base, vocabulary, settings, held=len(held))
        self.held_out = [collate(held[i : i + 32], self.pad) for i in range(0, len(held), 32)]

    def ready(self, model: Any) -> None:
        longest = max(len(row.input_ids) for row in self.items)
        self.token_loss = TokenLoss(
            model, self.vocabulary, rows=self.micro, length=longest, chunk=self.train.loss_chunk, compile=False, say=lambda _: None
        )  # fmt: skip

    def row(self, item: int, position: int) -> PackedRow:
        packed = self.items[item]
        ids = np.array(packed.input_ids, np.int32)
        return PackedRow(ids, packed.prompt, self.other(ids, packed.prompt, rng_for(self.seed, position, stream=2)) if self.other else None)

    def pack(self, items: Sequence[int], positions: Sequence[int]) -> data.TokenBatch:
        batch = collate([self.row(i, position) for i, position in zip(items, positions, strict=True)], self.pad)
        self.tokens = summed(torch.tensor(float(batch.counts[1]), device=self.engine.device), self.run.world)
        return batch

    def loss(self, batch: data.TokenBatch, rows: slice) -> tuple[Tensor, Tensor]:
        each = 1 / self.tokens if torch.is_grad_enabled() else torch.ones((), device=self.engine.device)
        # one kind of target: its own weight would only scale the learning rate
        own = ("image_weight", "text_weight")
        shares = [1.0 if term.weight in own else getattr(self.train, term.weight) for term in losses.TERMS.values()]
        weights = each * each.new_tensor(shares)
        model = self.engine.model if torch.is_grad_enabled() else self.model
        loss, parts = self.token_loss(self.engine, model, batch.input_ids[rows], batch.labels[rows], weights)
        return loss, torch.stack([parts["text_sum"], parts["text_count"], parts["z_sum"]])

    def figures_of(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["nats"] / max(1.0, sums["tokens"])}

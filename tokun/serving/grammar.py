"""The span grammar for external engines: the ids that may come next, and the one that a seed's latent picks. Knows ids, no engine.

A row is a request: the ids of its prompt and those generated so far. `RequestGrammar.apply` masks the logits. What remains are the ids
that `sampling.generate` would choose from or, for a row with a seed, the one id that it would choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from tokun.inference import latents, sampling
from tokun.inference.checkpoint_folder import read_settings
from tokun.inference.folders import SAMPLING, TEXT_TOKENIZER, VOCABULARY
from tokun.inference.text_token_classes import constraints_of, without_repeats
from tokun.inference.token_choice import Choice, Constraints, DecodingSettings, repetition_mask, word_numbers
from tokun.tokenizers.grammar import IMAGE_STATES, START, STATES, TEXT_STATES
from tokun.tokenizers.text import text_tokenizer_at
from tokun.tokenizers.vocabulary import Vocabulary

IMAGE = [STATES.index(state) for state in IMAGE_STATES]
TEXT = [STATES.index(state) for state in TEXT_STATES]


def changed(
    settings: DecodingSettings,
    *,
    temperature: float | None = None,
    text_temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    no_repeats: bool | None = None,
) -> DecodingSettings:
    """The settings with the given values. `temperature` and `top_k` apply to codes, `top_p` to codes and text.

    Raises UserError for values outside their range.
    """
    image = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    text = {"temperature": text_temperature, "no_repeats": no_repeats, "top_p": top_p}
    given = [{name: value for name, value in new.items() if value is not None} for new in (image, text)]
    return replace(settings, image=replace(settings.image, **given[0]), text=replace(settings.text, **given[1]))


@dataclass
class RowState:
    """A request and its grammar state after the first `read` of its ids."""

    prompt: Sequence[int]
    written: Sequence[int]  # the engine's own list, which grows
    n_codes: int  # of its picture, from the grid in its prompt
    u: Tensor | None = None  # (slots,) float32; None: the engine samples from the legal ids
    state: int = START
    length: int = 0
    read: int = 0
    broken: bool = False  # the prompt does not fit the grammar: only the end may follow
    settings: DecodingSettings = field(default_factory=DecodingSettings)
    words: list[int] = field(default_factory=list)  # of its current text, without marks


class RequestGrammar:
    """The ids that requests to a model may choose. `settings`: how codes and words are chosen, unless a request asks otherwise;
    guidance is ignored."""

    def __init__(self, vocabulary: Vocabulary, settings: DecodingSettings, constraints: Constraints):
        v = self.vocabulary = vocabulary
        self.settings, self.constraints = settings, constraints
        self.slots = latents.Slots(v.max_codes, v.max_text)
        self.word_starts, self.marks = torch.zeros(v.size, dtype=torch.bool), frozenset(constraints.marks)
        self.word_starts[list(constraints.word_starts)] = True
        self.unrepeated = word_numbers(constraints.unrepeated, v.size)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> RequestGrammar:
        """With the settings in the checkpoint's sampling.json, for pictures with captions, not questions."""
        v, settings = Vocabulary.load(folder / VOCABULARY), read_settings(folder / SAMPLING)
        d = settings.defaults
        image, text = Choice(d.temperature, d.top_k, d.top_p), Choice(d.text_temperature, 0, d.top_p, d.no_repeats)
        tokenizer = text_tokenizer_at(folder / TEXT_TOKENIZER)
        # a request may ask for no repeats, whatever the checkpoint's default is
        constraints = without_repeats(constraints_of(tokenizer, v), tokenizer, v, settings.unrepeated_words)
        return cls(v, DecodingSettings(image, text), constraints)

    def row(
        self,
        prompt: Sequence[int],
        written: Sequence[int],
        seed: int | None = None,
        index: int = 0,
        *,
        u: Tensor | None = None,
        settings: DecodingSettings | None = None,
    ) -> RowState:
        """A request. With a seed, its latent `index` decides, or else the uniforms u (slots.size,). For a u of another size only the end
        may follow.

        Raises UserError for an invalid seed."""
        row = RowState(prompt, written, self.vocabulary.n_codes([]), settings=settings or self.settings)
        row.broken = u is not None and u.shape != (self.slots.size,)
        self.catch_up(row)
        row.u = latents.uniform(latents.draw(seed, [index], self.slots.size))[0] if seed is not None else None if row.broken else u
        return row

    def catch_up(self, row: RowState) -> None:
        """Read the ids generated since. Raises RuntimeError for an illegal id, which means that the engine does not apply the masks."""
        for token in unread(row):
            if row.broken:
                break
            n_codes = self.vocabulary.codes_of.get(token, row.n_codes)
            state, length = self.vocabulary.grammar.step(row.state, row.length, token, n_codes)
            row.broken = state < 0 and row.read < len(row.prompt)
            if state < 0 and not row.broken:
                raise RuntimeError(
                    f"id {token} was generated in a {STATES[row.state]} span: "
                    "turn off the engine's asynchronous scheduling and speculative decoding"
                )
            if state != row.state:
                row.words = []
            elif state in TEXT and token not in self.marks:
                row.words.append(token)
            row.state, row.length, row.n_codes, row.read = state, length, n_codes, row.read + 1

    def legal(self, rows: Sequence[RowState], device: torch.device | str = "cpu") -> Tensor:
        """(B, V) bool: the ids that may come next in each row."""
        for row in rows:
            self.catch_up(row)
        v, grammar = self.vocabulary, self.vocabulary.grammar.on(device)
        broken = torch.tensor([row.broken for row in rows], device=device)
        states = torch.tensor([START if row.broken else row.state for row in rows], device=device)
        lengths, n_codes = (torch.tensor([getattr(row, name) for row in rows], device=device) for name in ("length", "n_codes"))
        _, ruled = grammar.chosen_from(self.constraints.forbid, self.constraints.forbid_first, v.size)
        legal = ruled[grammar.case(states, lengths, grammar.limit(states, n_codes))]
        if writing := [i for i, row in enumerate(rows) if row.settings.text.no_repeats and row.state in TEXT and row.words]:
            legal[writing] &= ~self.repeats([rows[i].words for i in writing]).to(legal.device)
        legal[broken] = torch.arange(v.size, device=device) == v.id("<eos>")
        return legal

    def repeats(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(B, V) bool: the ids that would repeat the phrase at the end of each text without marks."""
        counts = torch.tensor([len(own) for own in texts])
        words = torch.tensor([[0] * (int(counts.max()) - len(own)) + [*own] for own in texts], dtype=torch.long)
        return repetition_mask(words, counts, self.word_starts, self.unrepeated, self.vocabulary.size)

    def apply(self, logits: Tensor, rows: Sequence[RowState]) -> Tensor:
        """logits (B, at least V) -> the same with -inf for illegal ids; in rows with a seed, for all but the chosen id."""
        legal = self.legal(rows, logits.device)
        seeded = torch.tensor([row.u is not None and not row.broken for row in rows], device=logits.device)
        if seeded.any():
            chosen = self.choose(logits[:, : self.vocabulary.size], legal, rows)
            legal = torch.where(seeded[:, None], torch.nn.functional.one_hot(chosen, self.vocabulary.size).bool(), legal)
        out = torch.full_like(logits, -torch.inf)
        out[:, : self.vocabulary.size] = logits[:, : self.vocabulary.size].masked_fill(~legal, -torch.inf)
        return out

    def choose(self, logits: Tensor, legal: Tensor, rows: Sequence[RowState]) -> Tensor:
        """(B,) int64: the id that each row's latent picks; arbitrary for rows without one."""
        in_image = torch.tensor([row.state in IMAGE for row in rows])
        slots = self.slots.deciding(in_image, torch.tensor([row.length for row in rows])).tolist()
        u = torch.tensor([0.0 if row.u is None else float(row.u[slot]) for row, slot in zip(rows, slots)], device=logits.device)
        out = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
        choices = [row.settings.image if drawn else row.settings.text for row, drawn in zip(rows, in_image.tolist())]
        for choice in dict.fromkeys(choices):
            same = torch.tensor([i for i, own in enumerate(choices) if own == choice], device=logits.device)
            out[same] = sampling.choose(logits[same], legal[same], u[same], choice)
        return out


def unread(row: RowState) -> Iterator[int]:
    """The ids of a row that its state does not include yet."""
    behind = len(row.prompt)
    if row.read >= behind:
        return islice(row.written, row.read - behind, None)
    return chain(islice(row.prompt, row.read, None), row.written)

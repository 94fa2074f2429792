"""From a prompt and a latent to ids: prefill, one choice at a time, guidance, likelihoods. Knows ids, never pixels.

    generate: prompts (B, P), u (B, slots)           ->  Generated        until every row has ended

Every id is drawn from the grammar's legal ids, so nothing is repaired afterwards. A row's result does not depend on the rest
of the batch: on a CPU, rows are computed in numbers that give the same bits (`decoder.row_counts`). While a picture is drawn,
all rows are at the same position of it; afterwards each row has its own position, and finished rows leave the batch. The only
synchronisation with a GPU is a check, every `LOOK` steps, whether all rows have ended.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokun.inference import decoder, native
from tokun.inference.decoder import SAFE, HubStreams, NativeStream, Stream, open_stream, row_counts
from tokun.inference.latents import Slots
from tokun.inference.token_choice import Choice, Constraints, DecodingSettings, choose, interval, nats, repetition_mask, word_numbers
from tokun.tokenizers import sequences
from tokun.tokenizers.grammar import END, START, STATES, TAG_KINDS, Grammar, Tables
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.utils.errors import UserError

LOOK = 16
# guided text: pieces below this share of the greatest probability are excluded, as in contrastive decoding (Li et al. 2023)
PLAUSIBLE = 0.1


@dataclass(frozen=True)
class Generated:
    """ids (B, T) int64: prompt, generated ids, <pad>; log-likelihoods at temperature 1 over the legal ids."""

    ids: Tensor
    image_nll: Tensor  # (B,) nats, float64, of the sampled codes
    text_nll: Tensor  # (B,) of the sampled text and its end
    text_nll_alone: Tensor  # (B,) of the same without the picture, known where text guidance reads it; else 0
    forced_nll: Tensor  # (B,) of the given codes and pieces, which the other two include
    low: Tensor  # (B, slots) float64: the interval of u that gives the same choice, low to high; 0 and 1 for unused slots
    high: Tensor

    def rows(self, n: int) -> Generated:
        """The first n rows."""
        return Generated(*(getattr(self, f.name)[:n] for f in fields(self)))


@dataclass(frozen=True)
class Rules:
    """How ids are chosen; the same for all rows."""

    vocabulary: Vocabulary
    slots: Slots
    settings: DecodingSettings = field(default_factory=DecodingSettings)
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def prevents_repeats(self) -> bool:
        return self.settings.text.no_repeats and len(self.constraints.word_starts) > 0


@torch.inference_mode()
def generate(
    model: Any,
    rules: Rules,
    prompts: Tensor,
    u: Tensor,
    *,
    unconditional_image: Tensor | None = None,
    unconditional_text: Tensor | None = None,
    forced: Tensor | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Generated:
    """Complete every row of `prompts` (B, P) int64 to its <eos> with the uniforms `u` (B, slots.size). A row's grid tag determines
    the number of codes of its picture; without one it is the default grid's.

    With a guidance scale other than 1, codes are drawn from unconditional + scale * (conditional - unconditional) logits. The
    unconditional ones follow `unconditional_image` (B, Q), a prompt without tags or caption. With a text guidance scale other than 1,
    text after a picture is drawn the same way, among the `PLAUSIBLE` pieces. Its unconditional logits follow `unconditional_text`
    (B, R), the prompt without its picture.
    `forced` (B, slots.size) int64: ids taken regardless of u, in the slot that would choose them; -1 if u chooses.
    `watch` is called after every choice with the ids (rows, T) of row 0 and the rows computed together with it.

    Raises UserError if an unconditional prompt is missing.
    """
    vocabulary, settings = rules.vocabulary, rules.settings
    if settings.guidance_scale != 1 and unconditional_image is None:
        raise UserError("guidance_scale is set, but there is no unconditional prompt (without tags or caption)")
    if settings.text_guidance_scale != 1 and unconditional_text is None:
        raise UserError("text_guidance_scale is set, but there is no unconditional prompt (without a picture)")
    unconditional_image = None if settings.guidance_scale == 1 else unconditional_image
    unconditional_text = None if settings.text_guidance_scale == 1 else unconditional_text
    groups = 1 if unconditional_image is None else 2
    allowed = row_counts(model, [part.shape[1] for part in (prompts, unconditional_image, unconditional_text) if part is not None])
    counts = [n // groups for n in allowed]
    if unconditional_image is not None and unconditional_text is not None:
        # the text's second stream is one group, which also needs a number of rows that gives the same bits
        counts = [n for n in counts if n in allowed] or counts
    given, parts, most = (forced, unconditional_image, unconditional_text), [], counts[-1] if counts else len(prompts)
    codes = _codes_of(vocabulary, prompts)
    together = (
        watch is None
        and set(range(1, SAFE + 1)) <= set(allowed)
        and bool((prompts[:, -1] == vocabulary.id("<boi>")).all())
        and decoder.is_compiled(model)
    )
    for group in [range(len(prompts))] if together else [[i for i, own in enumerate(codes) if own == n] for n in dict.fromkeys(codes)]:
        for rows in ([*group[i : i + most]] for i in range(0, len(group), most)):
            size, own = min([n for n in counts if n >= len(rows)] or [len(rows)]), [codes[i] for i in rows]
            more = (None if part is None else _pad_rows(part[rows], size) for part in given)
            block = Block(model, rules, allowed, max(own), _pad_rows(prompts[rows], size), _pad_rows(u[rows], size), *more)
            block.watch = None if watch is None or rows[0] else partial(_first_rows, watch, len(rows))
            if len(set(own)) == 1:
                parts.append((rows, block.run().rows(len(rows))))
            else:
                parts += [([rows[place] for place in places], made) for places, made in block.run_apart(own)]
    width, pad = max(made.ids.shape[1] for _, made in parts), vocabulary.id("<pad>")
    ids = [torch.nn.functional.pad(made.ids, (0, width - made.ids.shape[1]), value=pad) for _, made in parts]
    others = (torch.cat([getattr(made, f.name) for _, made in parts]) for f in fields(Generated)[1:])
    back = torch.tensor([i for rows, _ in parts for i in rows], device=prompts.device).argsort()
    return Generated(*(part[back] for part in (torch.cat(ids), *others)))


def _first_rows(watch: Callable[[Tensor], None], count: int, ids: Tensor) -> None:
    watch(ids[:count])


def _codes_of(vocabulary: Vocabulary, ids: Tensor) -> list[int]:
    """The number of codes in each row's picture, ids (B, T)."""
    if len(vocabulary.grids) == 1:
        return [vocabulary.max_codes] * len(ids)
    return [vocabulary.n_codes(row) for row in ids[:, : len(TAG_KINDS) + 1].tolist()]


class Block:
    """Rows computed together, from their prompts to their ends."""

    def __init__(
        self,
        model: Any,
        rules: Rules,
        counts: tuple[int, ...],
        n_codes: int,
        prompts: Tensor,
        u: Tensor,
        forced: Tensor | None,
        unconditional_image: Tensor | None,
        unconditional_text: Tensor | None,
    ):
        v, slots, device = rules.vocabulary, rules.slots, prompts.device
        (B, P), self.rules, self.n_codes, self.u, self.forced = prompts.shape, rules, n_codes, u, forced
        self.grammar: Grammar = v.grammar.on(device)
        self.width = sequences.longest_from(v, P, n_codes)
        self.ids = torch.full((B, self.width), v.id("<pad>"), device=device)
        self.ids[:, :P] = prompts
        self.length = P
        self.states, self.lengths = torch.zeros(B, dtype=torch.long, device=device), torch.zeros(B, dtype=torch.long, device=device)
        for token in prompts.T:
            self.states, self.lengths = self.grammar.advance(self.states, self.lengths, token)
        self.image_nll, self.text_nll, self.text_nll_alone, self.forced_nll = (
            torch.zeros(B, dtype=torch.float64, device=device) for _ in range(4)
        )
        self.low = torch.zeros(B, slots.size, dtype=torch.float64, device=device)
        self.high = torch.ones_like(self.low)
        self.rows = torch.arange(B, device=device)  # rows of the block that are still in the batch
        self.watch: Callable[[Tensor], None] | None = None
        self.counts = counts
        self.stream: Stream | HubStreams = open_stream(
            model, [prompts] if unconditional_image is None else [prompts, unconditional_image], self.width
        )
        self.choose, self.nats = (native.choose, native.nats) if isinstance(self.stream, NativeStream) else (choose, nats)
        self.guided = unconditional_image is not None
        self.model, self.unconditional_text = model, unconditional_text
        self.unconditional: Stream | HubStreams | None = None  # the same text without the picture
        # ids that begin a word; ids that are not words
        self.begins, self.marks = (torch.zeros(v.size, dtype=torch.bool, device=device) for _ in range(2))
        self.begins[list(rules.constraints.word_starts)] = True
        self.marks[list(rules.constraints.marks)] = True
        self.unrepeated = word_numbers(rules.constraints.unrepeated, v.size).to(device)

    def run(self) -> Generated:
        while bool(self.grammar.may_draw[self.states].any()):
            if self.in_picture():
                self.draw_codes(self.n_codes)
                self.end_picture()
                break
            self.write(True)
        return self.finish()

    def run_apart(self, codes: Sequence[int]) -> list[tuple[list[int], Generated]]:
        """As `run`, for rows whose pictures have `codes` codes each, all at their first code: (positions of the rows, their results).

        The rows are computed together until the smallest pictures are complete. The steps then continue for the others; what they write
        into the cache after a complete picture is overwritten. After their pictures, the rows of each size continue separately."""
        parts = []
        for n in sorted(set(codes)):
            self.draw_codes(n)
            rows = [place for place, own in enumerate(codes) if own == n]
            parts += [(some, self.fork(torch.tensor(some), n)) for i in range(0, len(rows), SAFE) for some in [rows[i : i + SAFE]]]
        for _, part in parts:
            part.end_picture()
        return [(rows, part.finish()) for rows, part in parts]

    def fork(self, rows: Tensor, n_codes: int) -> Block:
        """These rows in their current state as a separate block in the same cache. Only for streams of the C++ program."""
        assert isinstance(self.stream, NativeStream)
        other, many = copy.copy(self), len(self.rows)
        for name in ("states", "lengths", "u", "forced", "unconditional_text", *(f.name for f in fields(Generated))):
            part = getattr(self, name)
            setattr(other, name, None if part is None else part[rows])
        other.rows, other.n_codes = torch.arange(len(rows)), n_codes
        other.stream = self.stream.fork(torch.cat([rows, rows + many]) if self.guided else rows)
        return other

    def finish(self) -> Generated:
        """Generate everything after the picture."""
        if (
            isinstance(self.stream, NativeStream)
            and not (self.guided or self.unconditional_text is not None or self.rules.prevents_repeats)
            and self.forced is None
            and self.watch is None
        ):
            self.write_all(self.stream)
        while not self.has_ended():
            self.write(False)
        found = (getattr(self, f.name) for f in fields(Generated)[1:])
        return Generated(self.ids[:, : self.length], *found)

    def in_picture(self) -> bool:
        """Whether all rows are at the same position of a picture."""
        in_image = self.grammar.in_image[self.states]
        return bool(in_image.all() and (self.lengths == self.lengths[0]).all() and (self.states == self.states[0]).all())

    # --- a picture: all rows are at the same position, and only codes are computed ------------------------------------

    def draw_codes(self, n_codes: int) -> None:
        """Draw the pictures up to `n_codes` codes."""
        v, slots, settings = self.rules.vocabulary, self.rules.slots, self.rules.settings
        part, first = v.code_range, int(self.lengths[0])
        if isinstance(self.stream, NativeStream) and not self.guided and self.forced is None and self.watch is None:
            codes, self.image_nll = self.stream.draw(
                part, self.u[:, slots.image + first : slots.image + n_codes], settings.image, self.image_nll
            )
            self.ids[:, self.length : self.length + codes.shape[1]] = codes
            self.length, first = self.length + codes.shape[1], n_codes
        for place in range(first, n_codes):
            logits = self.stream.logits(part).float()
            drawn = logits
            if self.guided:
                logits, base = logits.chunk(2)
                drawn = base + settings.guidance_scale * (logits - base)
            codes = self.choose(drawn, None, self.u[:, slots.image + place], settings.image)
            if self.forced is not None:
                given = self.forced[:, slots.image + place]
                codes = torch.where(given.ge(0), v.codes_of_ids(given), codes)
                if settings.image.temperature > 0:
                    slot = slots.image + place
                    self.low[:, slot], self.high[:, slot] = interval(drawn, None, codes, settings.image)
            nll = self.nats(logits, None, codes)
            self.image_nll += nll
            if self.forced is not None:
                self.forced_nll += torch.where(given.ge(0), nll, 0.0)
            self.put(v.ids_of_codes(codes))
        self.lengths = torch.full_like(self.lengths, n_codes)

    def end_picture(self) -> None:
        end = torch.full_like(self.states, self.rules.vocabulary.id("<eoi>"))
        self.states, self.lengths = self.grammar.advance(self.states, self.lengths, end)
        if self.guided and (not self.counts or len(self.rows) in self.counts):
            self.put(end, step=False)
            self.stream.only_first(len(self.rows))
            self.guided = False
            self.stream.step(end)
        else:
            self.put(end)

    def put(self, chosen: Tensor, step: bool = True) -> None:
        """Append the ids to their rows, and feed them to the model."""
        self.ids[self.rows, self.length] = chosen
        self.length += 1
        if self.watch is not None:
            self.watch(self.ids[:, : self.length])
        if step:
            self.stream.step(chosen.repeat(2) if self.guided else chosen)

    # --- anything else: each row has its own position -----------------------------------------------------------------

    def write(self, draws: bool) -> None:
        """Generate one id for every row. draws: a picture may follow, or some rows are in one."""
        rules, v, slots, settings = self.rules, self.rules.vocabulary, self.rules.slots, self.rules.settings
        B = len(self.rows)
        part = slice(0, v.size if draws else v.code_offset)
        allowed, ruled = self.grammar.chosen_from(rules.constraints.forbid, rules.constraints.forbid_first, part.stop)
        in_image, in_text = self.grammar.in_image[self.states], self.grammar.in_text[self.states]
        case = self.grammar.case(self.states, self.lengths, self.grammar.limit(self.states, self.n_codes))
        grammatical, legal = allowed[case], ruled[case]
        slot = slots.deciding(in_image, self.lengths)
        if rules.prevents_repeats:
            legal = legal & ~self.repetition_mask(in_text, legal.shape[1])
        logits = self.stream.logits(part).float()
        drawn = logits = logits[:B]
        if self.unconditional_text is not None and self.unconditional is None and not draws:
            self.unconditional = open_stream(self.model, [self.unconditional_text], self.width)
        if self.unconditional is not None:
            base = self.unconditional.logits(part).float()
            likely = logits.masked_fill(~legal, -torch.inf)
            likely = likely >= likely.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
            guided = (base + settings.text_guidance_scale * (logits - base)).masked_fill(~likely, -torch.inf)
            drawn = torch.where(in_text[:, None], guided, logits)
        if draws and self.guided:
            base = self.stream.logits(part)[B:].float()
            drawn = torch.where(in_image[:, None], base + settings.guidance_scale * (logits - base), logits)
        at = self.u.gather(1, slot[:, None])[:, 0]
        chosen = self.choose(drawn, legal, at, settings.text)
        if draws:
            chosen = torch.where(in_image, self.choose(drawn, legal, at, settings.image), chosen)
        if self.forced is not None:
            given = self.forced.gather(1, slot[:, None])[:, 0]
            drawing = in_image & (self.lengths < self.n_codes)  # after a complete picture only its end can follow
            is_given = (given >= 0) & (drawing | in_text)
            chosen = torch.where(is_given, given, chosen)
            for kind, choice in ((drawing, settings.image), (in_text, settings.text)):
                self.note(kind, drawn, legal, chosen, slot, choice)
        nll = self.nats(logits, grammatical, chosen)
        if draws:
            self.image_nll.index_add_(0, self.rows, torch.where(in_image, nll, 0.0))
        self.text_nll.index_add_(0, self.rows, torch.where(in_text, nll, 0.0))
        if self.unconditional is not None:
            alone = self.nats(base, grammatical, chosen)
            self.text_nll_alone.index_add_(0, self.rows, torch.where(in_text, alone, 0.0))
        if self.forced is not None:
            self.forced_nll.index_add_(0, self.rows, torch.where(is_given, nll, 0.0))
        self.states, self.lengths = self.grammar.advance(self.states, self.lengths, chosen)
        self.put(chosen, step=False)
        self.leave(chosen)

    def write_all(self, stream: NativeStream) -> None:
        """The same as `write` until all rows have ended, in one call."""
        v, slots, constraints, g = self.rules.vocabulary, self.rules.slots, self.rules.constraints, self.grammar
        part, every = slice(0, v.code_offset), torch.arange(len(STATES))
        limit, slot = g.limit(every, self.n_codes), slots.deciding(g.in_image, torch.zeros_like(every))
        tables = Tables(*g.chosen_from(constraints.forbid, constraints.forbid_first, part.stop), g.in_text, g.following, limit, slot)
        ids, nll = stream.write(part, self.u, self.rules.settings.text, tables, self.states, self.lengths, END)
        self.ids[self.rows, self.length : self.length + ids.shape[1]] = ids.where(ids >= 0, v.id("<pad>"))
        self.text_nll.index_add_(0, self.rows, nll)
        self.length += ids.shape[1]

    def repetition_mask(self, in_text: Tensor, width: int) -> Tensor:
        """(rows, width) bool: the ids that would repeat the phrase at the end of a row's text."""
        text = self.ids[self.rows, max(0, self.length - self.rules.vocabulary.max_text) : self.length]
        size = text.shape[1]
        counted = ~self.marks[text] & (torch.arange(size, device=text.device) >= size - self.lengths[:, None])
        words = text.gather(1, counted.long().argsort(stable=True, dim=1))
        return repetition_mask(words, torch.where(in_text, counted.sum(1), 0), self.begins, self.unrepeated, width)

    def note(self, kind: Tensor, logits: Tensor, legal: Tensor, chosen: Tensor, slot: Tensor, choice: Choice) -> None:
        """Store in `low` and `high` the interval of u that gives the same choice, for the rows selected by `kind`, each at its own slot."""
        if choice.temperature > 0 and bool(kind.any()):
            for where, end in zip((self.low, self.high), interval(logits, legal, chosen, choice)):
                where[self.rows[kind], slot[kind]] = end[kind]

    def leave(self, chosen: Tensor) -> None:
        """Feed the ids to the model; on a CPU, drop finished rows as far as the allowed numbers of rows permit."""
        streams = [stream for stream in (self.stream, self.unconditional) if stream is not None]
        if not isinstance(self.stream, HubStreams) and self.counts and not self.guided:
            alive = self.states != END
            many = int(alive.sum())
            size = min(n for n in self.counts if n >= many)
            if many and size < len(self.rows):
                kept = alive.long().argsort(descending=True, stable=True)[:size]
                for stream in streams:
                    assert isinstance(stream, Stream)
                    stream.keep(kept)
                self.rows, self.states, self.lengths, self.u, chosen = (
                    part[kept] for part in (self.rows, self.states, self.lengths, self.u, chosen)
                )
                self.forced = None if self.forced is None else self.forced[kept]
        self.stream.step(chosen.repeat(2) if self.guided else chosen)
        if self.unconditional is not None:
            self.unconditional.step(chosen)

    def has_ended(self) -> bool:
        """Whether all rows have ended. On a GPU this is only checked every `LOOK` steps; until then finished rows get padding."""
        if self.counts or self.length % LOOK == 0 or self.length == self.ids.shape[1]:
            return bool((self.states == END).all())
        return False


@torch.no_grad()
def legal_cases(vocabulary: Vocabulary, ids: Tensor) -> Tensor:
    """ids (B, T), sequences or their beginnings, padded with <pad> -> (B, T): the row of `Grammar.allowed` that applied to each id, which
    is 3 x the state (`STATES`) plus the position in its span. Each row's grid tag determines the number of codes of its picture."""
    live = ids != vocabulary.id("<pad>")
    codes = torch.tensor(_codes_of(vocabulary, ids), device=ids.device)
    grammar, cases = vocabulary.grammar.on(ids.device), []
    states, lengths = torch.full((len(ids),), START, device=ids.device), torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for t in range(ids.shape[1]):
        cases.append(grammar.case(states, lengths, grammar.limit(states, codes)))
        following = grammar.following[states, ids[:, t]]
        lengths = torch.where(following == states, lengths + 1, 0)
        states = torch.where(live[:, t], following, states)
    assert (states >= 0).all(), "an illegal id is scored"
    return torch.stack(cases, 1)


def span_nll(model: Any, vocabulary: Vocabulary, ids: Tensor, first: Tensor) -> Tensor:
    """Nats of ids[first:] up to and including the end of each row's span, over legal ids, without a cache: float64 (B,).

    ids (B, T) padded with <pad>; first (B,): the start of the scored span. Each row's grid tag determines the number of codes of its
    picture.
    """
    begin = max(1, int(first.min()))
    nll = token_nll(model, vocabulary, ids, begin)
    return torch.where(torch.arange(begin, ids.shape[1], device=ids.device) >= first[:, None], nll, 0.0).sum(-1)


@torch.inference_mode()
def token_nll(model: Any, vocabulary: Vocabulary, ids: Tensor, begin: int) -> Tensor:
    """Nats of each of ids[:, begin:], over legal ids, without a cache: float64 (B, T - begin), 0 for padding. ids (B, T), begin >= 1."""
    T = ids.shape[1]
    logits = model(input_ids=ids, logits_to_keep=T - begin + 1).logits[:, :-1, : vocabulary.size].float()  # of ids[:, begin:]
    live = ids != vocabulary.id("<pad>")
    allowed = vocabulary.grammar.on(ids.device).allowed[legal_cases(vocabulary, ids)[:, begin:]]  # (B, T - begin, V)
    nll = -logits.masked_fill(~allowed, -torch.inf).log_softmax(-1).gather(2, ids[:, begin:, None])[:, :, 0].double()
    return torch.where(live[:, begin:], nll, 0.0)


def _pad_rows(rows: Tensor, size: int) -> Tensor:  # (b, …) -> (size, …), repeating the last row
    return rows if len(rows) == size else torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])

"""Conditional generation: captions, questions, rewriting, completion, interpolation, inversion.

Each function uses the same loop, `sampling.generate`, with another prompt, other uniforms or given codes. Those for users have a Tokun as
first argument, and are its methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from tokun.data import cropping
from tokun.data.caption_words import words as words_of
from tokun.data.question_wordings import OPEN, wording_of
from tokun.inference import latents
from tokun.inference.image_to_codes import Picture, encode_whole, open_picture, see
from tokun.inference.sampling import Generated
from tokun.inference.sampling_arguments import with_sampling_options
from tokun.inference.token_choice import Choice, DecodingSettings
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags, tag_word
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tokun.inference.model import Pair, Tokun, Watch
    from tokun.inference.sampling_arguments import SamplingArguments

MAX_STEPS = 10_000  # of an interpolation
SHOWN = 12  # wordings of questions in an error
WIDE = 1 / 3  # of a picture's side: width of the regions that change together between two seeds; the wider, the fewer seams


@dataclass(frozen=True)
class Words:
    """A text the model wrote about a picture, or in place of another text."""

    text: str
    register: str
    ids: list[int]
    nll: float
    """Nats of all pieces and the end."""
    pmi: float
    """PMI with the picture (or the original text) in nats; 0 for answers, where it is not measured."""

    @property
    def confidence(self) -> float:
        """The geometric mean of the pieces' probabilities, 0 to 1."""
        return math.exp(-self.nll / (len(self.ids) + 1))


# --- words out ------------------------------------------------------------------------------------------------------


def caption(
    model: Tokun,
    picture: Picture,
    registers: Sequence[str] | None = None,
    *,
    seed: int = 0,
    n: int = 1,
    style: str = "",
    subject: str = "",
    thing: str = "",
    temperature: float | None = None,
    top_p: float | None = None,
    text_guidance_scale: float | None = None,
) -> list[Words]:
    """n captions of a picture in each register (None: plain), register by register. Caption k is latent k of the seed.

    Raises UserError for a register or tag unknown to the model, or an unreadable picture.
    """
    require_task(model, "joint")
    v = model.vocabulary
    asked = [v.default_register] if registers is None else [registers] if isinstance(registers, str) else list(registers)
    if not asked or not all(map(tag_word, asked)):
        raise UserError(f"registers are {registers!r}; name at least one of {', '.join(model.vocabulary.registers)}")
    wanted = [model.wanted_tags(style, subject, register, thing=thing) for register in asked for _ in range(n)]
    codes, grid = encode_whole(model, picture)
    tags = [replace(each, grid=grid) for each in wanted]
    prompts = [sequences.caption_prompt(v, t, codes) for t in tags]
    unconditional_text = [sequences.caption_prompt(v, t, None) for t in tags]
    u, choice = model.uniforms(seed, range(n)).repeat(len(asked), 1), model.text_choice(temperature, top_p)
    guidance = model.text_guidance(text_guidance_scale)
    made = write(model, prompts, u, choice, unconditional_text, guidance)
    texts = [sequences.unpack(v, ids).caption or [] for ids in made.ids.tolist()]
    alone = nll_alone(model, tags, texts, made, guidance)
    return [words(model, *parts) for parts in zip(texts, [t.register for t in tags], made.text_nll.tolist(), alone)]


def ask(
    model: Tokun,
    picture: Picture,
    question: str,
    *,
    seed: int = 0,
    n: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
) -> list[Words]:
    """n answers to a question about a picture. Raises UserError for a model that was not trained on questions, or not on such a one."""
    require_task(model, "question")
    require_wording(model, question)
    v, (codes, grid) = model.vocabulary, encode_whole(model, picture)
    prompt = sequences.question_prompt(v, Tags(grid=grid), codes, text_of(model, question, "question"))
    made = write(model, [prompt] * n, model.uniforms(seed, range(n)), model.text_choice(temperature, top_p))
    texts = [sequences.unpack(v, ids).answer or [] for ids in made.ids.tolist()]
    return [words(model, text, "", own, own) for text, own in zip(texts, made.text_nll.tolist())]


def rewrite(
    model: Tokun,
    caption: str,
    register: str,
    *,
    seed: int = 0,
    n: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
) -> list[Words]:
    """n versions of a caption in another register. Raises UserError for a model that was not trained to rewrite."""
    require_task(model, "rewrite")
    v, written = model.vocabulary, text_of(model, caption, "caption")
    tags = replace(v.bare(), register=tag_word(register))
    prompt = sequences.rewrite_prompt(v, v.bare(), written, tags.register)
    made = write(model, [prompt] * n, model.uniforms(seed, range(n)), model.text_choice(temperature, top_p))
    texts = [sequences.unpack(v, ids).rewritten or [] for ids in made.ids.tolist()]
    alone = model.caption_nll([tags] * n, texts)
    return [words(model, *parts) for parts in zip(texts, [tags.register] * n, made.text_nll.tolist(), alone)]


def write(
    model: Tokun,
    prompts: list[list[int]],
    u: Tensor,
    choice: Choice,
    unconditional_text: list[list[int]] | None = None,
    text_guidance_scale: float = 1.0,
) -> Generated:
    """Texts that complete prompts of one length, with uniforms u (B, slots.size). `unconditional_text`: the prompts without their
    pictures."""
    how = DecodingSettings(text=choice, text_guidance_scale=text_guidance_scale)
    return model.generate(prompts, u, how, unconditional_text=unconditional_text)


def nll_alone(model: Tokun, tags: Sequence[Tags], texts: Sequence[list[int]], made: Generated, guidance: float) -> list[float]:
    """Nats of captions without their pictures: as text guidance has read them, or without guidance by a pass of their own."""
    return model.caption_nll(tags, texts) if guidance == 1 else made.text_nll_alone.tolist()


def words(model: Tokun, ids: list[int], register: str, nll: float, alone: float) -> Words:
    return Words(model.text_tokenizer.decode(ids), register, ids, nll, alone - nll)


def text_of(model: Tokun, text: str, what: str) -> list[int]:
    ids = model.encode_text(text)
    if not ids:
        raise UserError(f"the {what} {text!r} holds no text")
    return ids


def require_task(model: Tokun, task: str) -> None:
    if not model.can(task):
        raise UserError(
            f"this model was not trained on the task {task!r}, only on {', '.join(model.tasks)}: "
            "see train.task_mix, and use another checkpoint"
        )


# --- likelihood -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Likelihoods of a pair, in nats."""

    image_nll: float
    """Of all codes, given the tags."""
    caption_nll: float
    """Of all pieces and the end, given the picture."""
    pmi: float
    """log p(caption | picture) - log p(caption): above 0 if the picture makes the words more likely."""


def require_wording(model: Tokun, question: str) -> None:
    """Raise UserError for a question unlike all that the model was trained on, if these are recorded."""
    known = model.question_wordings
    if known and isinstance(question, str) and words_of(question) and not wording_of(question, known):
        known = sorted(known, key=lambda wording: wording.endswith(OPEN))  # whole questions first
        more = f", and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        raise UserError(
            f"this model was trained on no question like {question!r}, so its answer would mean nothing. It knows: "
            f"{'; '.join(known[:SHOWN])}{more} (`tokun info CHECKPOINT --json` has all; … stands for any words). "
            "More can be trained: questions in each KEY.json (docs/guides/data.md)"
        )


def score(
    model: Tokun, picture: Picture, caption: str, *, style: str = "", subject: str = "", thing: str = "", register: str = ""
) -> Score:
    """Likelihoods of a picture and its caption, alone and together.

    Raises UserError for an unreadable picture, an unknown tag or an empty caption.
    """
    require_task(model, "joint")
    written = text_of(model, caption, "caption")
    wanted = model.wanted_tags(style, subject, register or model.vocabulary.default_register, thing=thing)
    seen, grid = encode_whole(model, picture)
    tags, codes = [replace(wanted, grid=grid)], [seen]
    (drawn,), (given,) = model.image_nll(tags, codes), model.caption_nll(tags, [written], codes)
    (alone,) = model.caption_nll(tags, [written])
    return Score(drawn, given, alone - given)


# --- between seeds --------------------------------------------------------------------------------------------------


@with_sampling_options
def interpolate(
    model: Tokun, first: int, last: int, steps: int = 12, *, watch: Watch | None = None, **options: Unpack[SamplingArguments]
) -> list[Pair]:
    """Pairs between sample 0 of one seed and sample 0 of another; the ends are those samples.

    `options` are those of `Tokun.sample`. A pair's `seed` is the first seed, its `index` the step. In between, the first picture's codes
    are replaced one by one by the last's and then stay, so that neighbours of one shape differ only in one step's share (`passage`). Each
    picture's words are sampled with latents on the great circle between the ends'. Tags change in the middle; the shape passes through
    those between the ends'.
    """
    if not 2 <= steps <= MAX_STEPS:
        raise UserError(f"steps is {steps}; an interpolation needs at least 2 steps, its ends, and at most {MAX_STEPS:,}")
    slots, plan = model.slots, model.plan(**options)
    a, b = (latents.draw(seed, [0], slots.size)[0] for seed in (first, last))
    start, end = model.draw(first, [0, steps - 1], plan, u=latents.uniform(torch.stack([a, b])), watch=watch)
    # the first picture is complete: later ones are not shown
    listen = None if watch is None else lambda *_: watch(start.codes, start.caption_ids)
    noise = (b - a)[slots.image : slots.image + slots.n_codes]
    between = passage(model, start, end, noise, steps)
    out = [start]
    for some in (range(i, min(steps - 1, i + plan.options.batch_size)) for i in range(1, steps - 1, plan.options.batch_size)):
        z = torch.stack([latents.slerp(a, b, step / (steps - 1)) for step in some])
        forced = torch.cat([slots.given(codes=model.vocabulary.ids_of_codes(between[step - 1][0])) for step in some])
        tags = [between[step - 1][1] for step in some]
        out += model.pairs_from(latents.uniform(z), first, some, tags, plan.how, caption=plan.caption, forced=forced, watch=listen)[0]
    return [*out, end]


def passage(model: Tokun, start: Pair, end: Pair, noise: Tensor, steps: int) -> list[tuple[Tensor, Tags]]:
    """Codes int64 (N,) and tags of the steps 1 … steps - 2 between two pairs.

    Each code is the start's, the end's or, between shapes, that of blank paper. Codes change in the order of smooth noise over the
    picture, from `noise` (n_codes,), so that each step moves the borders of a few regions, and all steps change about equally many codes.
    Negated noise gives the same path reversed. Between pictures of two grids, the path takes the grids between theirs, from wide to tall
    or back. Of grids with one width (or one height) the smaller fits into the larger: the smaller picture gets paper around it, which the
    larger one then fills (`growth`). In other grids both pictures are encoded anew. The other tags change in the middle.
    """
    ends, default = (start, end), model.vocabulary.default_grid
    grids = sorted(model.vocabulary.grids, key=lambda grid: (grid[0] / grid[1], grid))
    first, last = (grids.index(pair.tags.grid or default) for pair in ends)
    on_the_way = grids[min(first, last) : max(first, last) + 1]
    if len(on_the_way) > 1 and any(len({grid[axis] for grid in on_the_way}) == 1 for axis in (0, 1)):
        if math.prod(grids[first]) > math.prod(grids[last]):
            return passage(model, end, start, -noise, steps)[::-1]
        return growth(model, start, end, noise, steps, sorted(on_the_way, key=math.prod))
    larger = max((grids[first], grids[last]), key=lambda grid: (math.prod(grid), grid))
    order = hills(noise[None, : math.prod(larger)], larger, WIDE).view(1, 1, *larger)

    @cache
    def encoded(grid: cropping.Grid) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of both pictures in a grid, and the fraction of the path at which each changes."""
        a, b = (torch.tensor(through(model, pair, grid)) for pair in ends)
        ranks = torch.nn.functional.interpolate(order, grid, mode="bilinear").flatten().argsort(stable=True)
        changing = (a != b).double()
        when = torch.empty_like(changing)
        when[ranks] = (changing[ranks].cumsum(0) - changing[ranks] / 2) / changing.sum().clamp_min(1)
        return a, b, when

    out = []
    for t in (step / (steps - 1) for step in range(1, steps - 1)):
        grid, tags = grids[round(first + (last - first) * t)], ends[t >= 0.5].tags
        a, b, when = encoded(grid)
        out.append((torch.where(when < t, b, a), tags if grid == (tags.grid or default) else replace(tags, grid=grid)))
    return out


GROWN = 0.8  # the share of a path after which its pictures have the last one's shape


def growth(model: Tokun, start: Pair, end: Pair, noise: Tensor, steps: int, grids: Sequence[cropping.Grid]) -> list[tuple[Tensor, Tags]]:
    """`passage` from a picture to a larger one, through grids that fit into each other, smallest first.

    The first picture is in the middle of paper: the codes of a white picture. Paper shows before the codes of the last picture replace it,
    so that a new shape changes nothing else.
    """
    whole = grids[-1]
    a, b = paper_codes(model, whole), torch.tensor(end.codes).view(whole)
    a[inside(whole, grids[0])] = torch.tensor(start.codes).view(grids[0])
    waiting = hills(noise[None, : math.prod(whole)], whole, WIDE).view(whole)  # lowest first
    waiting[a == b] = math.inf
    total, changed, shown, out = int((a != b).sum()), 0, inside(whole, grids[0]), []
    for step in range(1, steps - 1):
        t = step / (steps - 1)
        ready = torch.full_like(waiting, math.inf)
        ready[shown] = waiting[shown]
        now = min(round(total * t) - changed, int(ready.isfinite().sum()))
        chosen = ready.flatten().argsort(stable=True)[:now]
        a.view(-1)[chosen], waiting.view(-1)[chosen], changed = b.view(-1)[chosen], math.inf, changed + now
        grid, tags = grids[round((len(grids) - 1) * min(1, t / GROWN))], (start, end)[t >= 0.5].tags
        shown = inside(whole, grid)
        out.append((a[shown].reshape(-1).clone(), replace(tags, grid=grid)))
    return out


def inside(whole: cropping.Grid, grid: cropping.Grid) -> tuple[slice, slice]:
    """The middle of a grid, where a smaller one fits."""
    (top, left) = ((large - small) // 2 for large, small in zip(whole, grid))
    return slice(top, top + grid[0]), slice(left, left + grid[1])


def paper_codes(model: Tokun, grid: cropping.Grid) -> Tensor:
    """The codes (rows, columns) of a white picture."""
    c = model.image_tokenizer.config
    white = Image.new("L" if c.image_channels == 1 else "RGB", (grid[1] * c.downsample, grid[0] * c.downsample), "white")
    return torch.tensor(see(model, [white], grid)[0].codes).view(grid)


def through(model: Tokun, pair: Pair, grid: cropping.Grid) -> list[int]:
    """The codes of a pair's picture in a grid: its own, or those of the picture fitted to the grid's shape."""
    if grid == (pair.tags.grid or model.vocabulary.default_grid):
        return pair.codes
    downsample = model.image_tokenizer.config.downsample
    return see(model, [pair.image.resize((grid[1] * downsample, grid[0] * downsample), Image.Resampling.LANCZOS)], grid)[0].codes


# --- inversion ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inverted:
    """A latent whose sample is a given pair."""

    z: Tensor  # (slots,) float32
    tags: Tags
    codes: list[int]
    missed: int
    """Number of codes and pieces that no latent chooses here, because float32 cannot resolve them or they are truncated away."""


def invert(
    model: Tokun,
    picture: Picture,
    caption: str,
    *,
    style: str = "",
    subject: str = "",
    thing: str = "",
    register: str = "",
    seed: int = 0,
    temperature: float = 1.0,
) -> Inverted:
    """A latent from which `vary` with amount 0 samples the picture's codes and then the caption, at this temperature without truncation.

    If several tags are possible, those of the latent `seed` are used. Raises UserError for a caption that is too long, a temperature of 0,
    or a tag unknown to the model.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be above 0, or the latent chooses nothing")
    require_task(model, "joint")
    v, slots, wanted = model.vocabulary, model.slots, model.wanted_tags(style, subject, register, thing=thing)
    (codes, grid), written = encode_whole(model, picture), text_of(model, caption, "caption")
    z = latents.draw(seed, [0], slots.size)[0]
    (tags,) = model.choose_tags(latents.uniform(z)[None], replace(wanted, grid=grid))
    forced = slots.given(codes=torch.tensor(sequences.code_ids(v, codes, tags)), text=torch.tensor(sequences.text_end(v, written)))
    how = DecodingSettings(Choice(temperature), Choice(temperature))
    made = model.generate([sequences.image_prompt(v, tags)], torch.full(forced.shape, 0.5), how, forced=forced)
    low, high, given = made.low[0].cpu(), made.high[0].cpu(), forced[0] >= 0
    reached = given & (high > low)
    z = torch.where(reached, latents.invert(low, torch.where(high > low, high, 1.0), torch.Generator().manual_seed(seed)), z)
    return Inverted(z, tags, codes, int((given & ~reached).sum()))


def vary(model: Tokun, inverted: Inverted, amount: float, *, seed: int = 0, n: int = 16, temperature: float = 1.0) -> list[Pair]:
    """n pairs around an inverted one. amount 0: the pair itself; 1: nothing left of it. `temperature`: that of `invert`, for codes.

    That share of the picture's codes, in a few regions chosen by the variation's own noise, is resampled from the noisy latent
    sqrt(1 - amount^2) z + amount noise; so are the words, with the settings of `Tokun.sample`. The other codes are kept; otherwise the
    first changed code would change all after it.
    """
    if not 0 <= amount <= 1:
        raise UserError(f"vary is {amount}; it must be between 0 (the picture itself) and 1 (nothing left of it)")
    slots = model.slots
    noise, places = latents.draw(seed, range(n), slots.size + slots.n_codes).split([slots.size, slots.n_codes], 1)
    z = math.sqrt(1 - amount**2) * inverted.z + amount * noise
    image = Choice(temperature)
    how = DecodingSettings(image, image)  # with amount 0 its own words are where `invert` found them
    if amount:
        how = DecodingSettings(image, model.text_choice(), text_guidance_scale=model.text_guidance(None))
    grid = inverted.tags.grid or model.vocabulary.default_grid
    size = grid[0] * grid[1]
    anew = lowest(hills(places[:, :size], grid), round(amount * size))
    kept = torch.where(anew, -1, model.vocabulary.ids_of_codes(torch.tensor(inverted.codes))) if inverted.codes else None
    forced = slots.given(n, codes=kept)
    return model.pairs_from(latents.uniform(z), seed, range(n), [inverted.tags] * n, how, forced=forced)[0]


def hills(noise: Tensor, grid: tuple[int, int], width: float = 1 / 6) -> Tensor:
    """Noise (B, N) -> the noise smoothed over the grid by a Gaussian with this share of its side as width: float64 (B, N)."""
    rows, columns = grid
    out = noise.double().view(-1, rows, columns)
    for axis, side in ((1, rows), (2, columns)):
        distance = torch.arange(side)[:, None] - torch.arange(side)
        weights = torch.exp(-(distance.double() ** 2) / (2 * (side * width) ** 2))
        out = torch.movedim(torch.movedim(out, axis, -1) @ (weights / weights.sum(0)), -1, axis)
    return out.flatten(1)


def lowest(values: Tensor, count: int) -> Tensor:
    """(B, N) -> bool (B, N): the `count` lowest of each row."""
    return values.argsort(dim=1, stable=True).argsort(1) < count


def complete(
    model: Tokun,
    picture: Picture,
    keep: str | tuple[float, float, float, float],
    *,
    seed: int = 0,
    n: int = 4,
    candidates: int = 4,
    style: str = "",
    subject: str = "",
    thing: str = "",
    register: str = "",
    temperature: float | None = None,
    top_p: float | None = None,
) -> list[Pair]:
    """n completions of the kept part of a picture, each with its caption. `keep`: 'top', 'bottom', 'left' or 'right' (halves), or a box
    (left, top, right, bottom) in shares of the picture. Only whole codes can be kept: `kept` returns them.

    Codes are drawn row by row, so a new code depends on kept codes above it and to its left, but not on those below and to
    its right. Therefore, of `candidates`, the one that makes those kept codes most likely is returned. If much is kept after
    the gap, ask for more candidates; seams remain possible.
    """
    require_task(model, "joint")
    v, slots, wanted = model.vocabulary, model.slots, model.wanted_tags(style, subject, register, thing=thing)
    (seen,) = see(model, [picture])
    codes, kept = seen.codes, kept_part(keep, seen.grid, seen.box, seen.size).mask
    count = n * candidates
    u = model.uniforms(seed, range(count))
    tags = model.choose_tags(u, replace(wanted, grid=seen.grid))
    forced = slots.given(count, codes=torch.where(kept, v.ids_of_codes(torch.tensor(codes)), -1))
    d = model.defaults
    image = Choice(d.temperature if temperature is None else temperature, d.top_k, d.top_p if top_p is None else top_p)
    how = DecodingSettings(image, model.text_choice(None, top_p), text_guidance_scale=model.text_guidance(None))
    pairs, nats = model.pairs_from(u, seed, range(count), tags, how, forced=forced)
    best = [min(range(i * candidates, (i + 1) * candidates), key=lambda j: nats[j]) for i in range(n)]
    return [replace(pairs[j], index=i) for i, j in enumerate(best)]


KEEP = {"top": (0, 0, 1, 0.5), "bottom": (0, 0.5, 1, 1), "left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1)}


@dataclass(frozen=True)
class Kept:
    """The kept part of a picture, in whole codes."""

    grid: cropping.Grid
    rows: range
    columns: range

    @property
    def mask(self) -> Tensor:
        """(N,) bool: the codes that are kept."""
        mask = torch.zeros(self.grid, dtype=torch.bool)
        mask[self.rows.start : self.rows.stop, self.columns.start : self.columns.stop] = True
        return mask.flatten()

    def __str__(self) -> str:
        (rows, columns), y, x = self.grid, self.rows, self.columns
        return f"rows {y.start + 1} to {y.stop} of {rows}, columns {x.start + 1} to {x.stop} of {columns} (whole codes)"


def kept(model: Tokun, picture: Picture, keep: str | tuple[float, float, float, float]) -> Kept:
    """The part of a picture that `complete` keeps. Raises UserError as it does."""
    config, image = model.image_tokenizer.config, open_picture(picture, model.image_tokenizer.config.image_channels)
    framed = cropping.fit_to(image, model.grids[cropping.nearest_grid(*image.size, model.grids)], config.downsample, model.fit)
    return kept_part(keep, framed.grid, framed.box, image.size)


def kept_part(keep: str | tuple[float, float, float, float], grid: cropping.Grid, box: cropping.Box, size: tuple[int, int]) -> Kept:
    """The codes whose patch is entirely inside the part to keep of a picture of `size` (width, height), of which the grid shows `box`. If
    the part reaches an edge of the picture, the area beyond that edge is kept too.

    Raises UserError if no code or every code is kept, or for an invalid box.
    """
    if isinstance(keep, str) and keep not in KEEP:
        raise UserError(f"keep is {keep!r}; it must be one of {', '.join(KEEP)}, or left,top,right,bottom in shares of the picture")
    left, top, right, bottom = KEEP[keep] if isinstance(keep, str) else keep
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError(f"keep is {(left, top, right, bottom)}; it must have left < right and top < bottom, between 0 and 1")

    def whole(start: float, stop: float, axis: int) -> range:
        """The rows (axis 1) or columns (axis 0) between two shares of the picture."""
        count = grid[1 - axis]
        places = [share * count if share in (0, 1) else (share * size[axis] - box[axis]) / box[2 + axis] * count for share in (start, stop)]
        return range(max(0, math.ceil(places[0] - 1e-6)), min(count, math.floor(places[1] + 1e-6)))

    found = Kept(grid, whole(top, bottom, 1), whole(left, right, 0))
    count = len(found.rows) * len(found.columns)
    if count in (0, math.prod(grid)):
        what, way = ("all", "draw") if count else ("none", "continue from")
        raise UserError(f"keep {keep} leaves {what} of the {grid[0]} x {grid[1]} codes: there is nothing to {way}")
    return found

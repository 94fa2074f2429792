"""Tokun: the tokenizers, the vocabulary and the generator in one object, which users work with.

model = tokun.load()                      # the bundled checkpoint; or a folder, or a Hugging Face Hub id
image, caption = model(42)                # from a seed, the picture and the words for it
pairs = model.sample(seed=42, n=16)       # sample k of seed s is the same pair whatever n and the batch size
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tokun.config import SamplingConfig, SamplingOptions
from tokun.data import cropping
from tokun.inference import (
    adapters,
    candidates,
    conditional_generation,
    decoder,
    description,
    hub,
    latents,
    matching,
    preferences,
    prompt_tags,
    sampling,
    text_token_classes,
    token_choice,
)
from tokun.inference.checkpoint_folder import quiet_transformers, read_settings
from tokun.inference.folders import BUNDLED, CARD, GENERATOR, IMAGE_TOKENIZER, MATCHING, SAMPLING, TEXT_TOKENIZER, VOCABULARY, resolve
from tokun.inference.sampling_arguments import with_sampling_options
from tokun.inference.tags import Frequencies, TagCounts, count_tags, grid_of, settings_json, with_subjects_of
from tokun.inference.token_choice import DecodingSettings, require_scale
from tokun.models.matching import MatchingHead
from tokun.render.grids import to_pil
from tokun.tokenizers import sequences
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.text import PretrainedTextTokenizer, TextTokenizer, normalize
from tokun.tokenizers.vocabulary import Tags, Vocabulary, tag_word
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tokun.inference.sampling_arguments import SamplingArguments

__all__ = ["BUNDLED", "GENERATOR", "TEXT_TOKENIZER", "Pair", "SamplingPlan", "Tokun", "count_tags", "read_settings", "resolve"]

Watch = Callable[[list[int], list[int]], None]  # the codes 0..K-1 and the caption's ids that a sample has so far


MOST_LOGITS = 2**28  # in memory at a time when sequences are scored: a gigabyte in float32, of which there are a few copies


@dataclass(frozen=True)
class Pair:
    """One sample: the picture and its caption, and how the model scores them (nats; PMI = log p(c|i) - log p(c))."""

    image: Image.Image
    caption: str
    seed: int
    index: int
    tags: Tags
    codes: list[int]  # 0..K-1, raster order
    caption_ids: list[int]
    image_nll: float  # of all codes, given the ids before them
    caption_nll: float  # of all pieces and the end, given the picture
    pmi: float
    prompted: bool = False  # the caption was given, and the picture drawn from it

    def record(self) -> dict[str, Any]:
        """What samples.jsonl holds, all of it plain JSON."""
        tags = {k: v for k, v in asdict(self.tags).items() if v}
        return {
            "seed": int(self.seed), "index": int(self.index), "tags": tags, "caption": self.caption, "image_nll": round(self.image_nll, 4),
            "caption_nll": round(self.caption_nll, 4), "pmi": round(self.pmi, 4), "codes": self.codes, "caption_ids": self.caption_ids,
            **({"prompted": True} if self.prompted else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class SamplingPlan:
    """The options of `Tokun.sample`, checked and resolved."""

    options: SamplingOptions
    wanted: Tags
    caption: list[int] | None
    """The ids of the prompt."""
    infer: Callable[[], Frequencies]
    how: DecodingSettings

    @cached_property
    def tags(self) -> Frequencies:
        """The frequencies that tags are drawn from. For a prompt this runs the generator, once."""
        return self.infer()


class DrawnSequence(NamedTuple):
    """A pair's ids, and their nats."""

    ids: list[int]
    image_nll: float
    text_nll: float
    forced_nll: float
    """Of the given ids, which the other two include."""
    text_nll_alone: float | None = None
    """Of the text without its picture, where text guidance has read it."""


@dataclass(repr=False)
class Tokun:
    """A whole checkpoint in memory. `print(model)` describes it."""

    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer | PretrainedTextTokenizer
    vocabulary: Vocabulary
    generator: Any
    defaults: SamplingConfig = field(default_factory=SamplingConfig)
    tag_counts: TagCounts = field(default_factory=list)
    tasks: tuple[str, ...] = ()
    """What it was trained on (see `vocabulary.TASKS`); empty: unknown."""
    card: str = ""
    """Its model card (README.md), in Markdown."""
    fit: str = ""
    """How pictures were fitted to their grids in training (`cropping.FITS`); empty: `cropping.usual_fit`."""
    unrepeated_words: tuple[str, ...] = ()
    """Words that training captions hardly ever have twice (`data.caption_words`). Texts written with `no_repeats` never do. An adapter
    keeps its base's."""
    question_wordings: tuple[str, ...] = ()
    """Of the questions it was trained on (`data.question_wordings`); empty: none, too many, or not recorded, and any is tried."""
    matching: MatchingHead | None = None
    """Says how well captions fit pictures (`match`); None: not trained (`align.matching`). An adapter keeps its base's."""

    def __post_init__(self) -> None:
        self.fit = self.fit or cropping.usual_fit(self.vocabulary.grids)
        v, rows = self.vocabulary, self.generator.get_input_embeddings().num_embeddings
        if self.image_tokenizer.codebook_size != v.codebook_size:
            raise UserError(
                f"the image tokenizer has {self.image_tokenizer.codebook_size} codes, the vocabulary {v.codebook_size}: "
                "parts of two checkpoints"
            )
        if self.text_tokenizer.size != v.text_size:
            raise UserError(
                f"the text tokenizer has {self.text_tokenizer.size} pieces, the vocabulary {v.text_size}: parts of two checkpoints"
            )
        if rows < v.size:
            raise UserError(f"the generator has {rows} embeddings, the vocabulary needs {v.size}: parts of two checkpoints")
        self._frequencies: Frequencies | None = None
        self.adapters: dict[str, adapters.Adapter] = {}
        self.adapter = ""  # the name of the one in use
        self.base: adapters.Base | None = None  # what the model is without it
        self.eval()

    def __repr__(self) -> str:
        return description.of_model(self).brief()

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Tokun:
        """Move both networks; `dtype` is the generator's (the image tokenizer stays in float32)."""
        self.image_tokenizer.to(device)
        if self.matching is not None:
            self.matching.to(device)
        for generator in (self.generator, *([self.base.generator] if self.base else [])):
            generator.to(device)
            if dtype is not None:
                for parameter in generator.parameters():  # not the buffers: rounded rotary frequencies would turn positions
                    parameter.data = parameter.data.to(dtype)
        return self

    def compile(self, wanted: bool = True) -> Tokun:
        """Use compiled steps for sampling on a CPU (`decoder.compile_steps`), or not. By default they are used if there is a C++ compiler.
        Compiled steps agree with one another; against uncompiled ones the last digits may differ."""
        decoder.compile_steps(self.generator, wanted)
        if self.base:
            decoder.sample_as(self.base.generator, self.generator)
        return self

    def eval(self) -> Tokun:
        self.image_tokenizer.eval()
        self.generator.eval()
        return self

    # --- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter: str | Path, name: str = "") -> str:
        """Read an adapter (a folder, a training run's, or a Hub id) that was trained on this model, for `use_adapter`. Returns its name,
        which is the folder's unless one is given. Raises FileNotFoundError or UserError for one that is missing, is broken or was trained
        on another base."""
        return adapters.add(self, adapters.read(adapter, name))

    def use_adapter(self, name: str | None) -> Tokun:
        """Sample, caption and score with this adapter from now on, including its tags, frequencies and defaults; None: without any."""
        adapters.use(self, name)
        return self

    # --- sampling ---------------------------------------------------------------------------------------------------

    @with_sampling_options
    def __call__(self, seed: int, **options: Unpack[SamplingArguments]) -> tuple[Image.Image, str]:
        """The picture of a seed and the caption that describes it, with the options of `sample`: sample 0, or the best of as many as the
        checkpoint asks for (`defaults.best_of`), as `sample.py` draws it."""
        (pair,) = self.best_of(seed, 1, self.defaults.best_of, **options)
        return pair.image, pair.caption

    @with_sampling_options
    def sample(
        self,
        seed: int = 42,
        n: int = 16,
        *,
        indices: Sequence[int] | None = None,
        watch: Watch | None = None,
        **options: Unpack[SamplingArguments],
    ) -> list[Pair]:
        """Samples `indices` (default 0 … n-1) of `seed`.

        `config.SamplingOptions` explains each option; None is the checkpoint's default. `watch` is called after every choice with what the
        first sample has so far. Raises UserError for values outside their range, or what the checkpoint was not trained on.
        """
        if indices is None and (not token_choice.is_whole(n) or n < 1):
            raise UserError(f"n is {n!r}; it must be an integer, at least 1")
        numbers = list(range(n)) if indices is None else list(indices)
        return self.draw(seed, numbers, self.plan(**options), watch=watch)

    @with_sampling_options
    def sample_from(
        self, u: Tensor, seed: int, indices: Sequence[int], *, watch: Watch | None = None, **options: Unpack[SamplingArguments]
    ) -> list[Pair]:
        """As `sample`, from uniforms u float32 (B, slots.size); the pairs are named by `seed` and `indices`."""
        return self.draw(seed, indices, self.plan(**options), u=u, watch=watch)

    def draw(
        self, seed: int, indices: Sequence[int], plan: SamplingPlan, *, u: Tensor | None = None, watch: Watch | None = None
    ) -> list[Pair]:
        """As `sample`, or with u as `sample_from`, for a plan that serves several calls."""
        u = self.uniforms(seed, indices) if u is None else u
        out: list[Pair] = []
        for i in range(0, len(u), plan.options.batch_size):
            rows = slice(i, i + plan.options.batch_size)
            tags = self.tags_of(u[rows], plan)
            out += self.pairs_from(u[rows], seed, indices[rows], tags, plan.how, caption=plan.caption, watch=watch)[0]
            if i == 0 and watch is not None:  # in later batches the first sample is complete
                watch = partial(_complete, watch, out[0])
        return out

    def can(self, task: str) -> bool:
        """Whether it was trained on the task; of a checkpoint from before tasks were recorded, any is tried."""
        return not self.tasks or task in self.tasks

    def uniforms(self, seed: int, indices: Sequence[int]) -> Tensor:
        """The uniforms that decide these samples of a seed: float32 (B, slots.size)."""
        return latents.uniform(latents.draw(seed, indices, self.slots.size))

    @with_sampling_options
    def plan(self, **options: Unpack[SamplingArguments]) -> SamplingPlan:
        """The options, checked and resolved. Raises UserError as `sample` does, TypeError for an unknown option."""
        asked, d = SamplingOptions(**options), self.defaults
        if not token_choice.is_whole(asked.batch_size) or asked.batch_size < 1:
            raise UserError(f"batch_size is {asked.batch_size!r}; it must be an integer, at least 1")
        given = {
            name: getattr(d, name) if getattr(asked, name) is None else getattr(asked, name)
            for name in ("temperature", "top_k", "top_p", "guidance_scale")
        }
        image = sampling.Choice(given["temperature"], given["top_k"], given["top_p"])
        scale = 1.0 if asked.temperature is None else asked.temperature
        text = self.text_choice(
            d.text_temperature * scale if asked.text_temperature is None else asked.text_temperature, image.top_p, asked.no_repeats
        )
        guidance = require_scale("guidance_scale", given["guidance_scale"])
        worded = self.text_guidance(asked.text_guidance_scale)
        wanted = self.wanted_tags(asked.style, asked.subject, asked.register, thing=asked.thing, aspect=asked.aspect)
        caption = None if asked.prompt is None else self.encode_text(asked.prompt)
        if caption == []:
            raise UserError(f"prompt {asked.prompt!r} holds no text; leave it out or describe a picture")
        if caption is not None:
            conditional_generation.require_task(self, "text_to_image")
        how = DecodingSettings(image, text, guidance, worded)
        return SamplingPlan(asked, wanted, caption, partial(self.frequencies, wanted, caption), how)

    def tags_of(self, u: Tensor, plan: SamplingPlan) -> list[Tags]:
        """The tags of the samples whose uniforms are u (B, slots.size)."""
        return plan.tags.draw_all(u[:, : latents.TAG_SLOTS].tolist(), plan.wanted)

    def text_choice(self, temperature: float | None = None, top_p: float | None = None, no_repeats: bool | None = None) -> sampling.Choice:
        """How words are chosen. None means the checkpoint's default."""
        d = self.defaults
        temperature, top_p = d.text_temperature if temperature is None else temperature, d.top_p if top_p is None else top_p
        return sampling.Choice(temperature, 0, top_p, d.no_repeats if no_repeats is None else no_repeats)

    def text_guidance(self, scale: float | None) -> float:
        """The scale of text guidance. None means the checkpoint's default. Raises UserError outside the range."""
        return require_scale("text_guidance_scale", self.defaults.text_guidance_scale if scale is None else scale)

    @torch.inference_mode()
    def pairs_from(
        self,
        u: Tensor,
        seed: int,
        indices: Sequence[int],
        tags: Sequence[Tags],
        how: DecodingSettings,
        *,
        caption: list[int] | None = None,
        forced: Tensor | None = None,
        watch: Watch | None = None,
    ) -> tuple[list[Pair], list[float]]:
        """One pair for each row. Its codes and caption are chosen by the uniforms u float32 (B, slots.size). `forced` int64
        (B, slots.size): given ids (see `sampling.generate`); the second result is their nats."""
        v, made = self.vocabulary, self.sequences_from(u, tags, how, caption=caption, forced=forced, watch=watch)
        parts = [sequences.unpack_pair(v, each.ids) for each in made]
        codes, captions = [own for own, _ in parts], [words for _, words in parts]
        pictures = self.decode_images(codes, [t.grid or v.default_grid for t in tags])
        read = [each.text_nll_alone for each in made if each.text_nll_alone is not None]
        alone = read if len(read) == len(made) else self.caption_nll(tags, captions)
        given = [each.text_nll for each in made] if caption is None else self.caption_nll(tags, captions, codes)
        pairs = [
            Pair(
                pictures[i], self.text_tokenizer.decode(captions[i]), seed, indices[i], tags[i], codes[i], captions[i],
                made[i].image_nll, given[i], alone[i] - given[i], caption is not None,
            )
            for i in range(len(tags))
        ]  # fmt: skip
        return pairs, [each.forced_nll for each in made]

    @torch.inference_mode()
    def sequences_from(
        self,
        u: Tensor,
        tags: Sequence[Tags],
        how: DecodingSettings,
        *,
        caption: list[int] | None = None,
        forced: Tensor | None = None,
        watch: Watch | None = None,
    ) -> list[DrawnSequence]:
        """That of each row of `pairs_from`."""
        v, guided = self.vocabulary, caption is None and how.text_guidance_scale != 1
        prompts = [sequences.image_prompt(v, t, caption) for t in tags]
        bare = [sequences.unconditional_image_prompt(v, t.grid) for t in tags]
        made: dict[int, DrawnSequence] = {}
        # rows share a length; a seed's block of rows keeps its place, so equal lengths are grouped in order
        for width in sorted({len(p) for p in prompts}):
            rows = [i for i, p in enumerate(prompts) if len(p) == width]
            out = self.generate(
                [prompts[i] for i in rows],
                u[rows],
                how if caption is None else replace(how, text_guidance_scale=1.0),
                unconditional_image=[bare[i] for i in rows],
                unconditional_text=[sequences.prefix(v, tags[i]) for i in rows],
                forced=None if forced is None else forced[rows],
                watch=self._reporting(watch, width) if watch is not None and rows[0] == 0 else None,
            )
            for j, i in enumerate(rows):
                drawn, written, given, alone = (
                    float(nats[j]) for nats in (out.image_nll, out.text_nll, out.forced_nll, out.text_nll_alone)
                )
                made[i] = DrawnSequence(out.ids[j].tolist(), drawn, written, given, alone if guided else None)
        return [made[i] for i in range(len(tags))]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        u: Tensor,
        how: DecodingSettings,
        *,
        unconditional_image: Sequence[Sequence[int]] | None = None,
        unconditional_text: Sequence[Sequence[int]] | None = None,
        forced: Tensor | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> sampling.Generated:
        """`sampling.generate` by this model, for prompts (and their unconditional ones) of one length:
        pairs, captions, answers, never a question."""

        def on_device(rows: Sequence[Sequence[int]] | None) -> Tensor | None:
            return None if rows is None else torch.tensor(rows, device=self.device)

        return sampling.generate(
            self.generator,
            sampling.Rules(self.vocabulary, self.slots, how, self.constraints_without_repeats if how.text.no_repeats else self.constraints),
            torch.tensor(prompts, device=self.device),
            u.to(self.device),
            unconditional_image=on_device(unconditional_image),
            unconditional_text=on_device(unconditional_text),
            forced=None if forced is None else forced.to(self.device),
            watch=watch,
        )

    def _reporting(self, watch: Watch, width: int) -> Callable[[Tensor], None]:
        """A function that passes the first row's codes and words, after a prompt of `width` ids, to `watch`."""
        v = self.vocabulary

        def report(ids: Tensor) -> None:
            row = ids[0, width:].tolist()
            watch([v.codes_of_ids(i) for i in row if v.is_code(i)], [i for i in row if i < v.text_size])

        return report

    def wanted_tags(self, style: str = "", subject: str = "", register: str = "", *, thing: str = "", aspect: str = "") -> Tags:
        """The requested tags. Raises UserError, with the known ones, for a tag that the model does not know."""
        wanted = Tags(tag_word(style), tag_word(subject), tag_word(register), grid_of(aspect, self.vocabulary), tag_word(thing))
        for name in wanted.names():
            self.vocabulary.id(name)
        return wanted

    def choose_tags(self, u: Tensor, wanted: Tags, caption: Sequence[int] | None = None) -> list[Tags]:
        """Draw the tags that are not requested from the training frequencies, by the tag slots of u (B, at least TAG_SLOTS): see
        `tags.Frequencies`."""
        return self.frequencies(wanted, caption).draw_all(u[:, : latents.TAG_SLOTS].tolist(), wanted)

    def frequencies(self, wanted: Tags, caption: Sequence[int] | None = None) -> Frequencies:
        """How often tags occur together in training; with a caption (text ids),
        times how well subject and thing fit it: see `prompt_tags`."""
        if caption is not None and self.base and not any(row[1] for row in self.tag_counts):  # an adapter's pictures had no subjects
            counts = Frequencies(with_subjects_of(self.tag_counts, self.base.tag_counts), self.vocabulary)
            return counts.given(prompt_tags.likelihoods(self, caption, wanted, counts))
        found = self._frequencies
        if found is None or found.counts is not self.tag_counts or found.vocabulary is not self.vocabulary:  # an adapter brings its own
            found = self._frequencies = Frequencies(self.tag_counts, self.vocabulary)
        return found if caption is None else found.given(prompt_tags.likelihoods(self, caption, wanted, found))

    # --- conditional generation, and files ----------------------------------------------------------------------------

    caption = conditional_generation.caption
    ask = conditional_generation.ask
    rewrite = conditional_generation.rewrite
    interpolate = conditional_generation.interpolate
    best_of = candidates.best_of
    best_and_worst = preferences.best_and_worst
    complete = conditional_generation.complete
    invert = conditional_generation.invert
    vary = conditional_generation.vary
    score = conditional_generation.score
    save_pretrained = hub.save_pretrained
    push_to_hub = hub.push_to_hub

    # --- scoring ----------------------------------------------------------------------------------------------------

    def caption_nll(
        self, tags: Sequence[Tags], captions: Sequence[list[int]], codes: Sequence[list[int]] | None = None, batch_size: int = 32
    ) -> list[float]:
        """Nats of each caption and its end, given its picture's codes, or without a picture when `codes` is None."""
        v = self.vocabulary
        shown = [None] * len(captions) if codes is None else codes
        return self.span_nll([sequences.caption_scored(v, *parts) for parts in zip(tags, shown, captions)], batch_size)

    def image_nll(self, tags: Sequence[Tags], codes: Sequence[list[int]], batch_size: int = 32) -> list[float]:
        """Nats of each picture's codes, given its tags."""
        v = self.vocabulary
        return self.span_nll([sequences.image_scored(v, t, own) for t, own in zip(tags, codes)], batch_size)

    @torch.inference_mode()
    def span_nll(self, scored: Sequence[sequences.Packed], batch_size: int = 32) -> list[float]:
        """Nats of the span that follows the prompt of each sequence, with its end token (`sampling.span_nll`), in batches."""
        out: list[float] = []
        for part, ids in self._batches([row.input_ids for row in scored], batch_size):
            starts = torch.tensor([row.prompt for row in scored[part]], device=self.device)
            out += sampling.span_nll(self.generator, self.vocabulary, ids, starts).tolist()
        return out

    def _batches(self, rows: Sequence[list[int]], batch_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Which sequences are scored together, and their padded ids: fewer than asked for where their logits would need too much memory."""
        logits = self.generator.config.get_text_config().vocab_size * max(map(len, rows), default=1)
        size = max(1, min(batch_size, MOST_LOGITS // logits))
        for part in (slice(i, i + size) for i in range(0, len(rows), size)):
            yield part, torch.tensor(sequences.padded(self.vocabulary, rows[part]), device=self.device)

    def pair_nll(
        self,
        tags: Sequence[Tags],
        codes: Sequence[list[int]],
        captions: Sequence[list[int]],
        *,
        caption_first: bool = False,
        batch_size: int = 32,
    ) -> list[tuple[float, float]]:
        """Nats of each picture's codes and of its caption with its end: those of the picture first and of the caption given the picture,
        or, with `caption_first`, of the picture given the caption and of the caption alone."""
        v = self.vocabulary
        return self.both_nll(
            [sequences.pair_to_score(v, *parts, caption_first=caption_first) for parts in zip(tags, codes, captions)], batch_size
        )

    @torch.inference_mode()
    def both_nll(self, wholes: Sequence[list[int]], batch_size: int = 32) -> list[tuple[float, float]]:
        """Nats of the picture and of the caption in sequences that hold both, in either order, each given the ids before it."""
        out: list[tuple[float, float]] = []
        for part, ids in self._batches(wholes, batch_size):
            nats = sampling.token_nll(self.generator, self.vocabulary, ids, 1)
            for row, whole in zip(nats, wholes[part]):
                spans = sequences.pair_scored(self.vocabulary, whole)
                drawn, written = (float(row[span.prompt - 1 : len(span.input_ids) - 1].sum()) for span in spans)
                out.append((drawn, written))
        return out

    def pmi(self, tags: Sequence[Tags], captions: Sequence[list[int]], codes: Sequence[list[int]]) -> list[float]:
        """log p(caption | picture, tags) - log p(caption | tags), in nats: how much the picture explains the words."""
        alone, given = self.caption_nll(tags, captions), self.caption_nll(tags, captions, codes)
        return [a - g for a, g in zip(alone, given)]

    def match(self, pairs: Sequence[Pair | Any]) -> list[float]:
        """How well the captions of pairs fit their pictures by the matching head: the cosine of both, in [-1, 1]. Raises UserError for a
        checkpoint without a head."""
        return matching.match(self, pairs)

    # --- parts ------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> latents.Slots:
        return latents.Slots(self.vocabulary.max_codes, self.vocabulary.max_text)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The shapes of its pictures, (rows, columns) of codes; the first is the default."""
        return self.vocabulary.grids

    @property
    def styles(self) -> tuple[str, ...]:
        """The style tags that the model knows; `subjects`, `things` and `registers` likewise."""
        return self.vocabulary.styles

    @property
    def subjects(self) -> tuple[str, ...]:
        return self.vocabulary.subjects

    @property
    def things(self) -> tuple[str, ...]:
        return self.vocabulary.things

    @property
    def registers(self) -> tuple[str, ...]:
        return self.vocabulary.registers

    @cached_property
    def constraints(self) -> token_choice.Constraints:
        """Text ids that are never sampled, or may not begin a caption."""
        return text_token_classes.constraints_of(self.text_tokenizer, self.vocabulary)

    @cached_property
    def constraints_without_repeats(self) -> token_choice.Constraints:
        """The same, and what would repeat a word."""
        return text_token_classes.without_repeats(self.constraints, self.text_tokenizer, self.vocabulary, self.unrepeated_words)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a caption. Raises UserError when it is longer than the model's text spans, or no text."""
        if not isinstance(text, str):
            raise UserError(f"{text!r} is no text: give a str")
        ids = self.text_tokenizer.encode(text)
        if len(ids) > self.vocabulary.max_text:
            raise UserError(
                f"the text has {len(ids)} pieces, this model takes {self.vocabulary.max_text}: shorten {normalize(text)[:60]!r}…"
            )
        return ids

    def decode_images(self, codes: Tensor | Sequence[Sequence[int]], grids: Sequence[tuple[int, int]] | None = None) -> list[Image.Image]:
        """Codes int64 (B, N), or a list for each picture, of these grids (None: all of the default one) -> pictures in their grids' shapes.

        On a CPU each is decoded alone: on some processors the kernels round differently for other batch sizes, and a picture must not
        depend on its batch.
        """
        shapes = [self.vocabulary.default_grid] * len(codes) if grids is None else list(grids)
        assert len(shapes) == len(codes), f"{len(codes)} pictures, {len(shapes)} grids"
        out: dict[int, Image.Image] = {}
        for grid in dict.fromkeys(shapes):
            rows = [i for i, own in enumerate(shapes) if own == grid]
            part = torch.stack([torch.as_tensor(codes[i], device=self.device) for i in rows])
            together = part.split(1 if self.device.type == "cpu" else len(part))
            images = (image for some in together for image in self.image_tokenizer.decode(some, grid))
            out |= {i: to_pil(image.cpu()) for i, image in zip(rows, images)}
        return [out[i] for i in range(len(shapes))]

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path, *, dtype: torch.dtype = torch.float32, card: str = "") -> None:
        """Write a checkpoint folder (safetensors, tokenizer.json, vocabulary.json …). The caller renames it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        v = self.vocabulary
        own = next(self.generator.parameters()).dtype
        written = self.generator if dtype == own else copy.deepcopy(self.generator).to(dtype)  # the live weights stay as they are
        with quiet_transformers():
            written.save_pretrained(directory / GENERATOR)
        self.text_tokenizer.save_hf(directory / GENERATOR, v.added_tokens, bos="<bos>", eos="<eos>", pad="<pad>")
        self.image_tokenizer.save(directory / IMAGE_TOKENIZER)
        self.text_tokenizer.save(directory / TEXT_TOKENIZER)
        v.save(directory / VOCABULARY)
        if self.matching is not None and not self.adapter:  # it reads the weights without the adapter
            self.matching.save(directory / MATCHING)
        settings = {
            "defaults": asdict(self.defaults),
            "tag_counts": self.tag_counts,
            "tasks": list(self.tasks),
            "fit": self.fit,
            "unrepeated_words": list(self.unrepeated_words),
            "question_wordings": list(self.question_wordings),
            "image_tokenizer": self.image_tokenizer.fingerprint(),
            "text_tokenizer": self.text_tokenizer.fingerprint(),
        }
        (directory / SAMPLING).write_text(settings_json(settings), encoding="utf-8")
        if card:
            (directory / CARD).write_text(card, encoding="utf-8")

    @staticmethod
    def from_pretrained(
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
    ) -> Tokun:
        """`load`, by the name that users of Hugging Face libraries expect."""
        load = import_module("tokun.inference.load").load  # which imports this module
        return load(checkpoint, device=device, dtype=dtype, compile=compile, adapter=adapter)


def _complete(watch: Watch, pair: Pair, *_: list[int]) -> None:
    """Report a complete pair to `watch`."""
    watch(pair.codes, pair.caption_ids)


def __getattr__(name: str) -> Any:
    if name == "load":  # its former place
        return import_module("tokun.inference.load").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

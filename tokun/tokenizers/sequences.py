"""The layout of every sequence: for training, prompting and scoring. The only place that assembles ids.

    joint          <bos> [tags] <boi> codes <eoi> <boc> caption <eoc> <eos>
    text_to_image  <bos> [tags] <boc> caption <eoc> <boi> codes <eoi> <eos>
    question       <bos> [tags] <boi> codes <eoi> <boq> question <eoq> <boa> answer <eoa> <eos>
    rewrite        <bos> [tags] <boc> caption <eoc> <register:R> <boc> caption in register R <eoc> <eos>

    pack_…    a whole sequence, and the length of its prompt
    …_prompt  the prompt that a model continues
    …_scored  a sequence up to the end of one span, and where that span begins
    unpack    a whole sequence -> its parts

Codes are 0 … K-1 in raster order, text is ids of the text tokenizer. A wrong number of codes, codes or pieces out of range, and tags that
the vocabulary does not know raise UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokun.tokenizers.grammar import END, IMAGE_STATES, START, STATES, TAG_KINDS
from tokun.tokenizers.vocabulary import Tags, Vocabulary, parse_grid
from tokun.utils.errors import UserError

Codes = Sequence[int] | np.ndarray
MARKS = 8  # structure tokens after a prompt, at most: five, and some to spare
POSITIONS_BESIDE = 21  # positions of a new generator besides a picture and two texts: tags, structure tokens, and room for later tasks


@dataclass(frozen=True)
class Packed:
    """The ids of one sequence; the first `prompt` of them are given and carry no loss."""

    input_ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Unpacked:
    """The parts of a sequence, by `unpack`; None for parts that the task does not have."""

    task: str
    tags: Tags
    codes: list[int] | None = None  # 0..K-1, raster order
    caption: list[int] | None = None  # text ids
    question: list[int] | None = None
    answer: list[int] | None = None
    rewritten: list[int] | None = None
    rewritten_register: str = ""


# --- how long -------------------------------------------------------------------------------------------------------


def most_positions(v: Vocabulary) -> int:
    """The positions of a new generator: more than any sequence of this vocabulary needs."""
    return v.max_codes + 2 * v.max_text + POSITIONS_BESIDE


def longest_from(v: Vocabulary, prompt: int, n_codes: int) -> int:
    """An upper bound on the length of a sequence with a prompt of `prompt` ids and a picture of `n_codes` codes."""
    return prompt + n_codes + 2 * v.max_text + MARKS


def joint_length(v: Vocabulary, caption: int) -> int:
    """Length of a joint sequence with the largest grid, every kind of tag and a caption of `caption` pieces."""
    marks = ("<bos>", "<boi>", "<eoi>", "<boc>", "<eoc>", "<eos>")
    tags = Tags("style", "subject", "register", v.default_grid, "thing" if v.things else "")
    return len(marks) + len(tags.names()) + v.max_codes + caption


def least_positions(v: Vocabulary) -> int:
    """A generator with fewer positions than this belongs to another vocabulary."""
    return v.max_codes + v.max_text


# --- parts ----------------------------------------------------------------------------------------------------------


def prefix(v: Vocabulary, tags: Tags) -> list[int]:
    """<bos> and the tags."""
    return [v.id("<bos>"), *(v.id(name) for name in tags.names())]


def picture(v: Vocabulary, tags: Tags, codes: Codes) -> list[int]:
    """<boi> codes <eoi>"""
    return [v.id("<boi>"), *code_ids(v, codes, tags), v.id("<eoi>")]


def text_end(v: Vocabulary, caption: Sequence[int]) -> list[int]:
    """A caption and its end: what follows <boc>."""
    return [*text_ids(v, caption), v.id("<eoc>")]


def code_ids(v: Vocabulary, codes: Codes, tags: Tags) -> list[int]:
    """Codes -> their ids. Raises UserError if they do not fill the tags' grid, or are outside the codebook."""
    rows, columns = tags.grid or v.default_grid
    if len(codes) != rows * columns:
        raise UserError(f"{len(codes)} codes do not fill a grid of {rows}x{columns} ({rows * columns})")
    array = np.asarray(codes)
    if array.dtype != np.uint16:  # as in shards: never negative
        array = array.astype(np.int64)
    if len(array) and not (np.maximum.reduce(array) < v.codebook_size and (array.dtype == np.uint16 or array.min() >= 0)):
        raise UserError(f"codes are in {array.min()}..{array.max()}, outside 0..{v.codebook_size - 1}")
    return v.ids_of_codes(array.astype(np.int64, copy=False)).tolist()


def text_ids(v: Vocabulary, ids: Sequence[int]) -> list[int]:
    """The pieces of one text. Raises UserError for none, for too many, and for ids that are not text."""
    if not 0 < len(ids) <= v.max_text:
        raise UserError(f"a text span has {len(ids)} pieces; it needs 1 to {v.max_text} (data.max_caption_tokens)")
    ids = list(map(int, ids))
    if not (min(ids) >= 0 and max(ids) < v.text_size) or not v.illegal.isdisjoint(ids):
        raise UserError(f"a text span holds ids outside the text pieces 0..{v.text_size - 1} (or {v.illegal_text})")
    return ids


# --- whole sequences ------------------------------------------------------------------------------------------------


def pack_joint(v: Vocabulary, tags: Tags, codes: Codes, caption: Sequence[int]) -> Packed:
    ids = [*prefix(v, tags), *picture(v, tags, codes)]
    return Packed([*ids, v.id("<boc>"), *text_end(v, caption), v.id("<eos>")], 1)


def pack_text_to_image(v: Vocabulary, tags: Tags, codes: Codes, caption: Sequence[int]) -> Packed:
    ids = [*prefix(v, tags), v.id("<boc>"), *text_end(v, caption)]
    return Packed([*ids, *picture(v, tags, codes), v.id("<eos>")], 1)


def pack_question(v: Vocabulary, tags: Tags, codes: Codes, question: Sequence[int], answer: Sequence[int]) -> Packed:
    ids = question_prompt(v, tags, codes, question)
    return Packed([*ids, *text_ids(v, answer), v.id("<eoa>"), v.id("<eos>")], len(ids))


def pack_rewrite(
    v: Vocabulary, tags: Tags, caption: Sequence[int], register: str, rewritten: Sequence[int], *, given: bool = False
) -> Packed:
    """`given`: the caption belongs to the prompt, so that only the rewritten one carries loss."""
    ids = rewrite_prompt(v, tags, caption, register)
    return Packed([*ids, *text_end(v, rewritten), v.id("<eos>")], len(ids) if given else 1)


def without_words(v: Vocabulary, whole: Sequence[int], kinds: Sequence[str] = TAG_KINDS) -> list[int]:
    """The picture of a whole sequence after its tags of these kinds: <bos> [tags] <boi> codes <eoi>"""
    begin, end = whole.index(v.id("<boi>")), whole.index(v.id("<eoi>")) + 1
    return [v.id("<bos>"), *(i for i in whole[:begin] if v.class_of(i) in kinds), *whole[begin:end]]


# --- prompts --------------------------------------------------------------------------------------------------------


def image_prompt(v: Vocabulary, tags: Tags, caption: Sequence[int] | None = None) -> list[int]:
    """The prompt of a picture: the tags, and the caption to draw, if given."""
    written = [] if caption is None else [v.id("<boc>"), *text_end(v, caption)]
    return [*prefix(v, tags), *written, v.id("<boi>")]


def unconditional_image_prompt(v: Vocabulary, grid: tuple[int, int] | None) -> list[int]:
    """The unconditional prompt for guidance: no tags and no caption, only the grid if there are several."""
    return image_prompt(v, v.bare(grid))


def caption_prompt(v: Vocabulary, tags: Tags, codes: Codes | None) -> list[int]:
    """The prompt of a caption: the tags and the picture. Without codes, the tags alone: unconditional, for guidance and PMI."""
    return [*prefix(v, tags), *([] if codes is None else picture(v, tags, codes)), v.id("<boc>")]


def question_prompt(v: Vocabulary, tags: Tags, codes: Codes, question: Sequence[int]) -> list[int]:
    """The prompt of an answer."""
    return [*prefix(v, tags), *picture(v, tags, codes), v.id("<boq>"), *text_ids(v, question), v.id("<eoq>"), v.id("<boa>")]


def rewrite_prompt(v: Vocabulary, tags: Tags, caption: Sequence[int], register: str) -> list[int]:
    """The prompt of a caption in another register."""
    ids = [*prefix(v, tags), v.id("<boc>"), *text_end(v, caption)]
    return [*ids, v.id(f"<register:{register}>"), v.id("<boc>")]


# --- what is scored -------------------------------------------------------------------------------------------------


def caption_scored(v: Vocabulary, tags: Tags, codes: Codes | None, caption: Sequence[int]) -> Packed:
    """A caption and its end after its picture, or after the tags alone if codes is None."""
    ids = caption_prompt(v, tags, codes)
    return Packed([*ids, *text_end(v, caption)], len(ids))


def pair_scored(v: Vocabulary, ids: Sequence[int]) -> tuple[Packed, Packed]:
    """The picture of a whole pair and its caption, each with the ids before it as its prompt. Raises ValueError if ids is not a pair."""
    picture_end, caption_end = ids.index(v.id("<eoi>")), ids.index(v.id("<eoc>"))
    return (
        Packed([*ids[: picture_end + 1]], ids.index(v.id("<boi>")) + 1),
        Packed([*ids[: caption_end + 1]], ids.index(v.id("<boc>")) + 1),
    )


def written_caption(v: Vocabulary, ids: Sequence[int]) -> slice | None:
    """Where a whole pair has its caption with <eoc>; None where the caption comes first, as the prompt of the picture."""
    picture, caption = pair_scored(v, ids)
    return slice(caption.prompt, len(caption.input_ids)) if picture.prompt < caption.prompt else None


def unconditional_images(v: Vocabulary, grid: tuple[int, int] | None, codes: Tensor) -> Tensor:
    """codes int64 (B, N) of one grid -> int64 (B, T): the unconditional prompt, then all codes but the last.

    The last N positions predict the codes.
    """
    prompt = torch.tensor(unconditional_image_prompt(v, grid), device=codes.device).expand(len(codes), -1)
    return torch.cat([prompt, v.ids_of_codes(codes[:, :-1])], 1)


def is_picture(v: Vocabulary, ids: Sequence[int], n_codes: int) -> bool:
    """Whether ids begin with n_codes codes and the end of a picture."""
    return len(ids) > n_codes and ids[n_codes] == v.id("<eoi>") and all(map(v.is_code, ids[:n_codes]))


def pair_to_score(v: Vocabulary, tags: Tags, codes: Codes, caption: Sequence[int], *, caption_first: bool = False) -> list[int]:
    """A picture and its caption, or a caption and its picture, for `pair_scored`."""
    whole = (pack_text_to_image if caption_first else pack_joint)(v, tags, codes, caption)
    return whole.input_ids[:-1]


def image_scored(v: Vocabulary, tags: Tags, codes: Codes) -> Packed:
    """A picture after its tags."""
    ids = prefix(v, tags)
    return Packed([*ids, *picture(v, tags, codes)], len(ids) + 1)


def other_tasks(v: Vocabulary) -> tuple[int, ...]:
    """Ids that would turn a pair's sequence into another task's: never chosen when sampling a caption."""
    return (v.id("<boq>"),)


def padded(v: Vocabulary, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Right-pad the rows with <pad> to one length."""
    width = max(map(len, rows))
    return [[*row, *[v.id("<pad>")] * (width - len(row))] for row in rows]


# --- and back -------------------------------------------------------------------------------------------------------


def unpack_pair(v: Vocabulary, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The codes and the caption's ids of a whole sequence that holds both."""
    parts = unpack(v, ids)
    assert parts.codes is not None and parts.caption is not None, f"no pair, but {parts.task}"
    return parts.codes, parts.caption


def unpack(v: Vocabulary, ids: Sequence[int]) -> Unpacked:
    """A whole sequence, padded or not -> its parts. Raises UserError if it breaks the grammar."""
    spans: dict[str, list[int]] = {}
    tags: dict[str, Any] = {}
    task, register, state, length, n_codes = "joint", "", START, 0, v.codes_of[None]
    for position, token in enumerate(map(int, ids)):
        name, kind = STATES[state], v.class_of(token)
        following, further = v.grammar.step(state, length, token, n_codes)
        if following < 0:
            raise UserError(f"id {token} ({kind}) at position {position} is not allowed in a {name} span of {length}")
        if kind in ("text", "code"):
            spans.setdefault(name, []).append(v.codes_of_ids(token) if kind == "code" else token)
        elif kind in TAG_KINDS and name != "prompt_done":
            value = v.name(token)[1:-1].partition(":")[2]
            tags[kind] = parse_grid(value) if kind == "grid" else value
            n_codes = v.codes_of.get(token, n_codes)
        elif name == "prompt_done":
            task = "rewrite" if kind in TAG_KINDS else "text_to_image"
            register = v.name(token)[1:-1].partition(":")[2] if task == "rewrite" else ""
        elif STATES[following] == "asked":
            task = "question"
        state, length = following, further
    if state != END:
        raise UserError(f"the sequence of {len(ids)} ids ends inside its {STATES[state]} span; a whole one ends with <eos>")
    written = spans.get("prompt" if task in ("text_to_image", "rewrite") else "caption")
    rewritten = spans.get("caption") if task == "rewrite" else None
    codes = next((spans[name] for name in IMAGE_STATES if name in spans), None)
    return Unpacked(task, Tags(**tags), codes, written, spans.get("asked"), spans.get("answer"), rewritten, register)

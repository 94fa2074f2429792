"""Held-out pairs, to be measured: pairs of image shards as the model sees them. Knows shards and tokenizers, measures nothing."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokun import data
from tokun.data import cropping
from tokun.data.sample_record import plain_of, questions_of
from tokun.inference.image_to_codes import see
from tokun.inference.model import Pair, Tokun
from tokun.render.grids import as_picture
from tokun.tokenizers.vocabulary import Tags, tag_word
from tokun.utils.errors import BadSample, UserError, reading


@dataclass(frozen=True)
class RealPair:
    """A picture from a shard, framed and coded as in training, and its plain caption, or as much of it as is trained."""

    key: str
    image: Image.Image  # at its grid's size, 'L' or 'RGB'
    caption: str
    tags: Tags
    codes: list[int]
    caption_ids: list[int]
    questions: tuple[tuple[str, str], ...] = ()  # with their answers


def read_pairs(
    model: Tokun, shards: str, limit: int = 0, seed: int = 0, *, style_key: str = "style", subject_key: str = "subject",
    caption_key: str = "caption",
) -> list[RealPair]:  # fmt: skip
    """Up to `limit` pairs (0: all) of image shards, drawn by the seed, in the shards' order. Damaged pictures are left out; of a caption
    that is too long for the model the first pieces are taken, as in training. The keys are those of `data` in the run's config.

    Raises FileNotFoundError if no shard matches the pattern, UserError if nothing is left.
    """
    samples = samples_of(model, data.ShardIndex(data.expand_shards(shards), need=("json",), one_of=data.IMAGE_SUFFIXES).usable())
    chosen: Sequence[int] = range(len(samples))
    if limit and limit < len(samples):
        chosen = sorted(np.random.default_rng(seed).choice(len(samples), limit, replace=False).tolist())
    found = [one for i in chosen if (one := _read(model, samples, i, style_key, subject_key, caption_key)) is not None]
    if not found:
        raise UserError(
            f"no pair of {shards} can be used: pairs need a readable picture and a caption; "
            f"name the field of the captions with --caption-key, now {caption_key}"
        )
    seen = [one for i in range(0, len(found), 512) for one in see(model, [p["image"] for p in found[i : i + 512]])]  # many of one shape
    return [RealPair(**pair, codes=one.codes) for pair, one in zip(found, seen)]


def samples_of(model: Tokun, index: data.ShardIndex) -> data.ImageSamples:
    """The pictures of image shards, framed as in the model's training and no larger than it takes them."""
    c = model.image_tokenizer.config
    return data.ImageSamples(
        index, c.image_size, c.image_channels, max_scale=1.0, grids=model.grids, downsample=c.downsample, fit=model.fit
    )


def framed_for(model: Tokun) -> Callable[[Image.Image], Image.Image]:
    """A function: a picture of any size -> the picture framed to the grid nearest to its shape."""

    def framed(image: Image.Image) -> Image.Image:
        grid = model.grids[cropping.nearest_grid(*image.size, model.grids)]
        return as_picture(cropping.frame(image, grid, model.image_tokenizer.config.downsample, model.fit)[0])

    return framed


def grids_of(model: Tokun, pairs: Sequence[RealPair | Pair]) -> list[cropping.Grid]:
    return [pair.tags.grid or model.vocabulary.default_grid for pair in pairs]


def _read(model: Tokun, samples: data.ImageSamples, i: int, style_key: str, subject_key: str, caption_key: str) -> dict[str, Any] | None:
    try:
        framed = samples.framed(i)
        tree = samples.index.read_json(i)
        caption = plain_of(tree, caption_key)
    except (OSError, BadSample):
        return None
    questions: tuple[tuple[str, str], ...] = ()
    with contextlib.suppress(BadSample):
        questions = tuple(questions_of(tree))
    ids = model.text_tokenizer.encode(caption)
    if not ids:
        return None
    if len(ids) > model.vocabulary.max_text:
        ids = ids[: model.vocabulary.max_text]
        caption = model.text_tokenizer.decode(ids)
    style, subject = tag_word(str(tree.get(style_key, ""))), tag_word(str(tree.get(subject_key, "")))
    tags = model.vocabulary.known(Tags(style, subject, "plain", framed.grid))
    return {
        "key": samples.index.key(i),
        "image": as_picture(samples.cut(framed, framed.box)),
        "caption": caption,
        "tags": tags,
        "caption_ids": ids,
        "questions": questions,
    }


def read_captions(shards: str, *, caption_key: str = "caption") -> list[str]:
    """The plain captions of all pairs of image shards, without unreadable ones. `caption_key`: that of `data` in the run's config."""
    index = data.ShardIndex(data.expand_shards(shards), need=("json",), one_of=data.IMAGE_SUFFIXES).usable()
    found = []
    for i in range(len(index)):
        try:
            found.append(plain_of(index.read_json(i), caption_key))
        except (OSError, BadSample):
            continue
    return [caption for caption in found if caption]


# --- described pictures, without a model ----------------------------------------------------------------------------

Described = tuple[str, Image.Image, str]  # key, picture, description
Table = Mapping[tuple[str, str], str]  # (folder, key) -> description
MULTIPLE = 16  # px: sides of whole pictures are multiples of it, which every usual image tokenizer accepts


def described(
    shards: str, cut: Callable[[Image.Image], Image.Image], *, channels: int = 1, table: Table | None = None, caption_key: str = "caption"
) -> Iterator[Described]:
    """The pictures of image shards, cropped by `cut`, with their descriptions: the plain captions, or those of `table` by shard folder and
    key. Damaged pictures and pictures without a description are left out. `caption_key`: that of `data` in the run's config.

    Raises FileNotFoundError if no shard matches the pattern.
    """
    for path in data.expand_shards(shards):
        index = data.ShardIndex([path], need=("json",), one_of=data.IMAGE_SUFFIXES)
        folder = path.resolve().parent.name
        for i in range(len(index)):
            try:
                text = plain_of(index.read_json(i), caption_key) if table is None else table.get((folder, index.key(i)), "")
                if text:
                    yield index.key(i), cut(data.decode_image(index.read(i, index.image_suffix(i)), channels)), text
            except (OSError, BadSample):
                continue


def read_table(path: Path) -> Table:
    """A tab-separated table with a header and the columns folder, key, description, without quoting; rows with `use` 0 are left out.

    Raises UserError if a column is missing.
    """
    with path.open(encoding="utf-8", newline="") as file, reading(path):
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := {"folder", "key", "description"} - set(rows.fieldnames or ()):
            raise UserError(f"{path} has no column {', '.join(sorted(missing))}; it must be a tab-separated table with a header")
        return {(row["folder"], row["key"]): row["description"] for row in rows if row.get("use", "1") != "0" and row["description"]}


def squares(size: int) -> Callable[[Image.Image], Image.Image]:
    """A function: a picture -> its centred square at size x size px."""
    return lambda image: as_picture(data.crop(image, data.centre_box(*image.size), size))


def wholes(size: int, multiple: int = MULTIPLE) -> Callable[[Image.Image], Image.Image]:
    """A function: a picture -> the whole picture with about the area of size x size px, each side the nearest multiple."""

    def whole(image: Image.Image) -> Image.Image:
        scale = size / math.sqrt(image.width * image.height)
        width, height = (multiple * max(1, round(side * scale / multiple)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    return whole


VIEWS = {"square": squares, "whole": wholes}

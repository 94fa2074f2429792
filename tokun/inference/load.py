"""Reads a checkpoint: a folder or a Hugging Face Hub id -> a `Tokun`. How the folder is found and checked: `checkpoint_folder`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokun.inference.checkpoint_folder import load_generator, read_settings, require_device, require_same_ids, require_whole
from tokun.inference.folders import GENERATOR, IMAGE_TOKENIZER, MATCHING, SAMPLING, TEXT_TOKENIZER, VOCABULARY, card_in, resolve
from tokun.inference.matching import head_in
from tokun.inference.model import Tokun
from tokun.tokenizers import sequences
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.text import text_tokenizer_at
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.utils.errors import UserError


def load(
    checkpoint: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    compile: bool | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
) -> Tokun:
    """The model of a checkpoint folder or a Hugging Face Hub id ('name/model'); None is the bundled engraving model.

    `compile`: as for `Tokun.compile`; None: where possible. `adapter`: one that was trained on the checkpoint, or several, of which the
    first is used (`Tokun.use_adapter`).

    Raises FileNotFoundError or UserError naming the file that is missing or broken.
    """
    require_device(device)
    model = assembled(resolve(checkpoint), dtype)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if compile is not None:
        model.compile(compile)
    named = [] if adapter is None else [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    added = [model.add_adapter(one) for one in named]
    return model.use_adapter(added[0]) if added else model


def assembled(folder: Path, dtype: torch.dtype = torch.float32, *, generator: Any = None) -> Tokun:
    """The model of a checkpoint's folder, on the CPU. `generator`: the causal LM, if it has been read already. Raises as `load` does."""
    require_whole(folder)
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    require_same_ids(folder / GENERATOR / "tokenizer.json", vocabulary)
    text_path = folder / TEXT_TOKENIZER
    text_tokenizer = text_tokenizer_at(text_path)
    image_tokenizer = ImageTokenizer.load(folder / IMAGE_TOKENIZER)
    settings = read_settings(folder / SAMPLING)
    if generator is None:
        generator = load_generator(folder / GENERATOR, dtype)
    for path, wanted, found in (
        (folder / IMAGE_TOKENIZER, settings.image_tokenizer, image_tokenizer.fingerprint()),
        (text_path, settings.text_tokenizer, text_tokenizer.fingerprint()),
    ):
        if wanted not in (None, found):
            raise UserError(
                f"{path} is not the tokenizer this generator was trained with: its fingerprint is "
                f"{found[:16]}…, the generator asks for {wanted[:16]}…. Copy the whole checkpoint again"
            )
    places = getattr(generator.config.get_text_config(), "max_position_embeddings", math.inf)
    needed = sequences.least_positions(vocabulary)
    if needed > places:
        raise UserError(
            f"{folder / VOCABULARY} speaks of {needed} codes and pieces, the generator has {places} places. Copy the whole checkpoint again"
        )
    card = card_in(folder)
    return Tokun(
        image_tokenizer,
        text_tokenizer,
        vocabulary,
        generator,
        settings.defaults,
        settings.tag_counts,
        settings.tasks,
        card,
        settings.fit,
        settings.unrepeated_words,
        settings.question_wordings,
        head_in(folder / MATCHING, generator, vocabulary),
    )

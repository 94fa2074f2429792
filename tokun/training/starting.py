"""What a run says when it begins: which tags the checkpoint knows that it goes on from, whether that one's tokenizer can draw these pictures,
what takes the first minutes, and how long is sensible. Trains nothing."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokun import data
from tokun.config import Config, ImageTokenizerTrainConfig
from tokun.inference.model import resolve
from tokun.tokenizers.vocabulary import Vocabulary, tag_word

PASSES = 60  # over the pictures: the bundled model's, behind which it knew half of its captions by heart (README.md)
PASSES_ON = 20  # where the run goes on from a checkpoint
CLEARLY = 3.0  # dB above the gate, from which on a tokenizer draws pictures well
MOST_READ = 20_000  # samples whose tags are counted
NAMED = 12  # tags that are named in a line


@functools.lru_cache(maxsize=2)
def known_styles(start: str) -> tuple[str, ...]:
    """The style tags of the checkpoint that a run goes on from."""
    return Vocabulary.load(resolve(None if start == "bundled" else start) / "vocabulary.json").styles


def fitting_tag(word: str, known: Sequence[str]) -> str:
    """The known tag that a word means: itself, its singular, or the longest that it ends in (steel-engravings -> engraving); "" for none."""
    forms = [word, *([word[:-1]] if word.endswith("s") and not word.endswith("ss") else [])]
    for form in forms:
        if form in known:
            return form
    return max((tag for tag in known for form in forms if form.endswith(f"-{tag}")), key=len, default="")


def style_of(tree: dict[str, Any], config: Config) -> str:
    """The style tag of a sample's record; where the run goes on from a checkpoint, the one that it knows and that fits."""
    d = config.data
    word = tag_word(str(tree.get(d.style_key) or tree.get("style") or d.style))
    return (fitting_tag(word, known_styles(config.start)) or word) if word and config.start else word


def tags_line(config: Config) -> str:
    """Which styles the checkpoint knows, and what becomes of those of the pictures."""
    known, found = known_styles(config.start), Counter[str]()
    for tree in _records(config):
        d = config.data
        with contextlib.suppress(ValueError, AttributeError):
            found[tag_word(str(tree.get(d.style_key) or tree.get("style") or d.style))] += 1
    told = []
    for word, count in found.most_common(NAMED):
        fits = fitting_tag(word, known)
        if not word:
            told.append(f"{count:,} pictures name no style (data.style=… gives them one)")
        elif not fits:
            told.append(f"{word} ({count:,}) is new to it and is learnt from these pictures alone")
        else:
            told.append(f"{word} ({count:,})" + ("" if fits == word else f" becomes its {fits}"))
    return f"start {config.start}: it knows the styles {', '.join(known) or 'of none'}. Of these pictures: {'; '.join(told)}"


def _records(config: Config) -> Iterator[dict[str, Any]]:
    index = data.ShardIndex(data.expand_shards(config.data.train))
    for i in range(0, len(index), -(-len(index) // MOST_READ)):
        with contextlib.suppress(OSError, ValueError):
            yield index.read_json(i)


def verdict(figures: dict[str, float], train: ImageTokenizerTrainConfig, sheet: Path, problems: Sequence[str]) -> str:
    """Whether an image tokenizer can draw the pictures that it was measured on, and where to see it."""
    seen = f"{figures['psnr']:.1f} dB, {figures['usage']:.0%} of its codes"
    if problems:
        said = f"it cannot draw these pictures ({'; '.join(problems)})"
    elif figures["psnr"] < train.min_psnr + CLEARLY:
        said = f"it draws these pictures roughly ({seen}; {train.min_psnr + CLEARLY:.0f} dB would be well)"
    else:
        said = f"it can draw these pictures ({seen})"
    return f"{said}. See for yourself: {sheet} has each picture beside what comes of it"


def time_line(*, steps: int, batch_size: int, pictures: int, max_minutes: float, going_on: bool, name: str) -> str:
    """How many passes the steps are, how many are sensible, and what `max_minutes` counts."""
    passes, sensible = steps * batch_size / max(1, pictures), PASSES_ON if going_on else PASSES
    enough = math.ceil(sensible * pictures / batch_size)
    line = f"{steps:,} steps of {batch_size} are {passes:,.0f} passes over {pictures:,} pictures; some {sensible} passes ({enough:,} steps) are sensible"
    if steps > enough:
        line += ", longer learns them by heart"
    if max_minutes > 0:
        return f"{line}. {name}.max_minutes {max_minutes:g} counts this stage alone: its steps, evaluations and compiling, those of earlier starts too"
    return f"{line}. {name}.max_minutes is not set: it ends after its steps. It would count this stage alone, compiling too"

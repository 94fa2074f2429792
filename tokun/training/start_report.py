"""Messages at the start of a run, and what its held-out losses mean at the end. Trains nothing.

At the start: the run's folder and stages, the tags that the starting checkpoint knows, whether its tokenizer can draw these pictures,
whether colour is lost, how long a training is sensible, and whether enough is held out to compare its steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokun import data
from tokun.config import Config, DataConfig, ImageTokenizerTrainConfig
from tokun.data import image_files
from tokun.data.colour import coloured_share
from tokun.inference.folders import VOCABULARY, resolve
from tokun.tokenizers.vocabulary import Vocabulary, tag_word
from tokun.tokenizers.wordings import fitting_tag
from tokun.utils.errors import BadSample

# sensible passes over the pictures. After 60, a model of 5.2M parameters had memorised half of its 17,568 captions; after nine over 27,948
# pictures, one of 6.6M was still getting better. In between nothing was measured, and larger models memorise sooner: train.keep_best
PASSES = 30
FINE_TUNING_PASSES = 8  # when the run starts from a checkpoint: in twenty, 600 pictures were memorised (benchmarks/README.md)
ADAPTER_PASSES = 20
FEW_PICTURES = 16  # fewer are too few to judge a tokenizer by
GOOD_MARGIN = 3.0  # dB above the gate from which a tokenizer draws pictures well
NAMED = 12  # most tags in a line
LOOKED_AT = 64  # pictures that are searched for colour
COLOURED = 0.05  # share of its points by which a picture is in colour; a sepia print has none
MANY_COLOURED = 0.25  # of the pictures
NOISE = 0.07  # nats: of one picture, the standard error of the difference of two steps (docs/guides/training.md)
ENOUGH_HELD_OUT = 64  # pictures; steps 0.02 nats apart can then be distinguished (on the noise of fewer: docs/guides/training.md)


def opening_line(config: Config, *, going_on: bool) -> str:
    """The first line of a run: its folder, and what comes first. `going_on`: whether it continues an earlier start."""
    folder = f"train: the run's folder is {config.out}"
    if going_on:
        return f"{folder}; it continues an earlier start"
    made = "an adapter" if config.adapter.rank else "the generator"
    alone = {"rewards": config.grpo.rewards, "preferences": config.dpo.pairs, "a table of words": config.words.train}
    if learned := [name for name, given in alone.items() if given]:
        stages = f"There is one stage: {made} learns from {learned[0]}"
    elif config.start:
        stages = f"First the tokenizers of {config.start} are tried on these pictures, then come the pictures' codes and {made}"
    else:
        stages = "First comes the text tokenizer, then the image tokenizer, the pictures' codes and the generator"
    return f"{folder}. {stages}"


@functools.lru_cache(maxsize=2)
def known_styles(start: str) -> tuple[str, ...]:
    """The style tags of the checkpoint that a run starts from."""
    return Vocabulary.load(resolve(start) / VOCABULARY).styles


def style_of(tree: dict[str, Any], config: Config) -> str:
    """The style tag of a sample's record; if the run starts from a checkpoint, the fitting tag that it knows, if any."""
    d = config.data
    word = tag_word(str(tree.get(d.style_key) or tree.get("style") or d.style))
    return (fitting_tag(word, known_styles(config.start)) or word) if word and config.start else word


def tags_line(config: Config) -> str:
    """The styles that the checkpoint knows, and how the pictures' styles map to them."""
    known, found = known_styles(config.start), Counter[str]()
    for tree in _records(config):
        d = config.data
        with contextlib.suppress(ValueError, AttributeError):
            found[tag_word(str(tree.get(d.style_key) or tree.get("style") or d.style))] += 1
    parts = []
    for word, count in found.most_common(NAMED):
        fits = fitting_tag(word, known)
        if not word:
            parts.append(f"{count:,} pictures have no style (data.style=… sets one)")
        elif not fits:
            parts.append(f"{word} ({count:,}) is new and will be learned from these pictures alone")
        else:
            parts.append(f"{word} ({count:,})" + ("" if fits == word else f" becomes its {fits}"))
    return f"start {config.start}: it knows the styles {', '.join(known) or '(none)'}. Of these pictures: {'; '.join(parts)}"


def style_key_line(config: Config) -> str:
    """The warning where no record has the key `data.style_key`; "" if one has it, and for the usual key."""
    key = config.data.style_key
    if key == DataConfig.style_key:
        return ""
    found = Counter[str]()
    for tree in _records(config):
        with contextlib.suppress(AttributeError):
            found.update(name for name in (key, DataConfig.style_key) if tree.get(name))
    if found[key]:
        return ""
    problem = f"data.style_key is {key}, which is in no record of {config.data.train}"
    if found[DataConfig.style_key]:
        return f"{problem}: the style of each picture is taken instead, as with data.style_key=style"
    given = (
        f"all get data.style, {config.data.style}"
        if config.data.style
        else "no style will be learned. data.style=WORD gives all pictures one"
    )
    return f"{problem}, and no record has a style: {given}; data.style_key=KEY names another key"


def _records(config: Config) -> Iterator[dict[str, Any]]:
    index = data.ShardIndex(data.expand_shards(config.data.train)).usable()
    yield from (record for record in index.some_records() if record is not None)


def colour_line(config: Config, index: data.ShardIndex) -> str:
    """The warning where many of an index's pictures are in colour and will be learned in grey; else "".

    It looks at a few pictures, evenly spread.
    """
    if config.image_tokenizer.image_channels != 1:
        return ""
    looked_at = coloured = 0
    for i in range(0, len(index), -(-len(index) // LOOKED_AT) or 1):
        with contextlib.suppress(OSError, BadSample):
            picture = image_files.decode_reduced(index.read(i, index.image_suffix(i)), 128)[0]
            looked_at, coloured = looked_at + 1, coloured + (coloured_share(picture) >= COLOURED)
    if coloured < MANY_COLOURED * looked_at or not coloured:
        return ""
    without = f", without start={config.start}, whose tokenizer is grey" if config.start else ""
    return (
        f"image tokenizer: {coloured} of {looked_at} pictures that were looked at are in colour, and will be drawn in grey: "
        f"image_tokenizer.image_channels=3 keeps the colour{without}"
    )


def verdict(figures: dict[str, float], train: ImageTokenizerTrainConfig, sheet: Path, problems: Sequence[str], *, pictures: int) -> str:
    """Whether an image tokenizer can draw the `pictures` that it was evaluated on, and where to see them."""
    few = f"only {pictures} picture{'' if pictures == 1 else 's'}: too few to judge"
    seen = f"{figures['psnr']:.1f} dB, {figures['usage']:.0%} of its codes; {few if pictures < FEW_PICTURES else f'{pictures} pictures'}"
    if problems:
        judgement = f"it cannot draw these pictures ({'; '.join(problems)})"
    elif figures["psnr"] < train.min_psnr + GOOD_MARGIN:
        judgement = f"it draws these pictures roughly ({seen}; {train.min_psnr + GOOD_MARGIN:.0f} dB would be good)"
    else:
        judgement = f"it can draw these pictures ({seen})"
    return f"{judgement}. {sheet} shows each picture beside its reconstruction"


def sensible_passes(pictures: int, batch_size: int, *, going_on: bool, adapter: bool = False) -> tuple[int, int]:
    """How many passes over so many pictures are sensible, and how many steps make them.

    `going_on`: whether the run starts from a checkpoint. `adapter`: whether it trains an adapter.
    """
    passes = ADAPTER_PASSES if adapter else FINE_TUNING_PASSES if going_on else PASSES
    return passes, math.ceil(passes * pictures / batch_size)


def time_line(
    *, steps: int, batch_size: int, pictures: int, max_minutes: float, going_on: bool, name: str, by_passes: bool = False,
    adapter: bool = False,
) -> str:  # fmt: skip
    """How many passes the steps make, how many are sensible, and what `max_minutes` counts.

    `by_passes`: the steps are those of the setting `passes`.
    """
    passes = steps * batch_size / max(1, pictures)
    sensible, enough = sensible_passes(pictures, batch_size, going_on=going_on, adapter=adapter)
    line = f"{steps:,} steps of {batch_size} are {passes:,.0f} passes over {pictures:,} pictures"
    if by_passes:
        line += f" ({name}.passes)"
    else:
        line += f"; about {sensible} passes ({name}.steps={enough}) are sensible"
        line += "; more would memorise them" if steps > enough else ""
    if max_minutes > 0:
        counted = f"{name}.max_minutes {max_minutes:g} counts this stage alone: its steps, evaluations and compiling"
        return f"{line}. {counted}, including earlier starts"
    return f"{line}. {name}.max_minutes is not set: the stage ends after its steps. It would count this stage alone, including compiling"


def noise_of(n: int) -> float:
    """Nats below which the losses of two steps on `n` held-out pictures are indistinguishable; 0 for no pictures."""
    return 2 * NOISE / math.sqrt(n) if n else 0.0


def gain_lines(before: float | None, last: float, noise: float, lowest: tuple[float, int] | None, *, sums: str = "") -> list[str]:
    """The closing lines about held-out losses: whether the training has helped, and whether an earlier step was better.

    Args:
        before, last: weighted sums before the first step (None: not measured) and at the end, in nats.
        noise: nats within which two of them are indistinguishable.
        lowest: loss and number of the best step that is kept, if any.
        sums: what is summed, in brackets.
    """
    lines = []
    if before is not None:
        change = f"the held-out loss{sums} was {before:.4f} before training and is {last:.4f} now"
        if last > before + noise:
            lines.append(
                f"WARNING: {change}: so training has not helped on these pictures. "
                "Try a lower train.lr, or more pictures; look at the samples, too"
            )
        elif last >= before - noise:
            lines.append(
                f"{change}, a difference within the noise ({noise:.2f} nats): held-out pictures do not show yet that it has learned. "
                "Look at the samples, or train longer"
            )
        else:
            lines.append(f"{change}, a fall by more than the noise ({noise:.2f} nats)")
    if lowest and lowest[0] < last - noise:
        lines.append(
            f"lowest held-out loss {lowest[0]:.4f} at step {lowest[1]}{sums}, below the end's {last:.4f}. To sample from it instead:"
        )
    elif lowest:
        lines.append(
            f"no earlier step's held-out loss is lower than the last, {last:.4f}{sums}, by more than the noise: "
            "sample from the end, as above"
        )
    return lines


def too_few_held_out(n: int, what: str = "pictures") -> str:
    """The warning that `n` held-out pictures are too few to compare the steps of a training; "" if they are enough, or for none.

    `what`: other items than pictures, a plural.
    """
    if not 0 < n < ENOUGH_HELD_OUT:
        return ""
    of_these = f"{n} held-out {what.removesuffix('s') if n == 1 else what} {'is' if n == 1 else 'are'}"
    noise = f"differences of their loss under {noise_of(n):.2f} nats are noise" if what == "pictures" else "their loss is a rough guide"
    return f"{of_these} few: {noise} ({ENOUGH_HELD_OUT} or more tell steps apart)"

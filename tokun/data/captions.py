"""Are the captions good enough to train on? Knows shards and the records of their samples; knows no model and no torch.

Warns, each time with a remedy, when few pictures have a caption, when there are few pictures at all, when captions are nearly all the same
or titles, and when they were not written from the pictures (templates filled with metadata).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokun.data.sample_record import words_of
from tokun.data.shards import ShardIndex

MOST_TEXTS = 1000  # distinct captions that are counted
ALIKE = 20  # captions below which nothing is said of them as a whole
SENTENCE = 4  # words of a caption that says what is seen
FEW = 1000  # captioned pictures below which a generator trained from scratch memorises them
CAPTION = "tokun caption SHARDS --model … (or --endpoint …, or --from TABLE)"


def alike(captions: Mapping[str, int], *, looked_at: str = "") -> str:
    """The warning when the kept captions are nearly all the same, or labels; "" when they differ. `captions`: counts kept, empty, distinct,
    most (of the most frequent one), labels (see `is_label`).

    `looked_at` says which captions were read, if not all.
    """
    kept, distinct = captions.get("kept", 0) - captions.get("empty", 0), captions.get("distinct", 0)
    if kept < ALIKE:
        return ""
    if 10 * distinct <= kept and distinct < MOST_TEXTS:
        what = f"The {kept:,} captions{looked_at} are only {distinct:,} different text{'' if distinct == 1 else 's'}"
    elif 2 * (most := captions.get("most", 0)) > kept:
        what = f"{most:,} of the {kept:,} captions{looked_at} are the same text"
    elif 2 * (labels := captions.get("labels", 0)) > kept:
        what = f"{labels:,} of the {kept:,} captions{looked_at} are only numbers, file names or addresses"
    else:
        return ""
    return (
        f"{what}: a model cannot learn from them what a picture shows. Caption the pictures again (tokun caption, with a "
        "captioner), or by hand."
    )


def titles(captions: Mapping[str, int], *, looked_at: str = "") -> str:
    """The warning when most of the kept captions have fewer than SENTENCE words, as titles do; else "". `captions`: counts kept, empty,
    short."""
    kept, short = captions.get("kept", 0) - captions.get("empty", 0), captions.get("short", 0)
    if kept < ALIKE or 2 * short <= kept:
        return ""
    return (
        f"{short:,} of the {kept:,} captions{looked_at} have fewer than {SENTENCE} words: titles and names teach a model "
        "little. A sentence that says what is seen teaches more (tokun caption, with a captioner, or by hand)."
    )


# Thai, Lao, Burmese, Khmer, Japanese, Chinese
WITHOUT_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
NO_CAPTION = re.compile(r"\s*(\w+://|www\.)\S+\s*|.*\.(avif|bmp|gif|heic|jpe?g|png|tiff?|webp)\s*", re.I | re.S)
NUMBER = re.compile(r"[a-z]{0,8}\d[a-z\d]*|m*(cm|cd|d?c{0,3})(xc|xl|l?x{0,3})(ix|iv|v?i{0,3})")
OF_LABELS = re.compile(
    "an?|and|by|de|drawing|dsc[fn]?|engraving|etching|file|fig(ure)?|folio|frame|from|ill(us|ustration)?|images?|img|in|item|lithograph|n|no|nr|number|"
    "object|of|p|page|painting|photo(graph)?|pic(ture)?|pl(ate)?|print|pxl|scan(ned)?|sheet|tab|tafel|the|unknown|untitled|vol(ume)?|with|wood(cut)?"
)


def is_label(text: str) -> bool:
    """Whether a caption is a file's name, an address, or says no more than a number and the kind of picture: "Plate 17." """
    words = re.findall(r"[^\W_]+", text.casefold())
    return bool(NO_CAPTION.fullmatch(text)) or all(OF_LABELS.fullmatch(word) or NUMBER.fullmatch(word) for word in words)


def gist(text: str) -> str:
    """What a caption has in common with those that count as the same: case, punctuation and spaces make no difference."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


class Texts:
    """Counts how often each caption occurs by its gist, of MOST_TEXTS different ones at most, how many are labels,
    and how many are short."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()
        self.labels = self.short = 0

    def __len__(self) -> int:
        return len(self.times)

    def add(self, text: str) -> None:
        self.labels += is_label(text)
        self.short += len(text.split()) < SENTENCE and not WITHOUT_SPACES.search(text)
        if (one := gist(text)) in self.times or len(self.times) < MOST_TEXTS:
            self.times[one] += 1

    def counts(self) -> dict[str, int]:
        """The counts that `alike` and `titles` read: distinct, most, labels and short."""
        return {"distinct": len(self), "most": max(self.times.values(), default=0), "labels": self.labels, "short": self.short}


@dataclass
class Seen:
    """Counts over the samples' records, added one by one."""

    caption_key: str = "caption"
    pictures: int = 0
    broken: int = 0
    captioned: int = 0
    templates: int = 0
    texts: Texts = field(default_factory=Texts)

    def add(self, record: Mapping[str, Any]) -> str:
        """Count one record. Returns its caption, "" for none."""
        self.pictures += 1
        said, looked_at = words_of(record, self.caption_key)
        self.captioned += bool(said)
        self.templates += bool(said) and not looked_at
        if said:
            self.texts.add(said)
        return said

    def doubts(self, *, from_nothing: bool = True, of: int = 0) -> list[str]:
        """Warnings about training on these captions, in whole sentences; empty if there are none.

        `from_nothing`: the generator is trained from scratch. `of`: the number of all samples, if only some were added.
        """
        read = self.pictures + self.broken
        share, sample = (of / read, f" that were read ({read:,} of {of:,} samples)") if 0 < read < of else (1.0, "")
        if not self.pictures:
            return (
                [f"None of the {self.broken:,} records{sample} can be read. Make the shards again or remove them."] if self.broken else []
            )
        if not self.captioned:
            return [
                f"None of the {self.pictures:,} pictures{sample} has a caption: there are no words to learn from. Caption them: {CAPTION}."
            ]
        found = []
        if 2 * self.captioned < self.pictures:
            found.append(
                f"Only {self.captioned:,} of {self.pictures:,} pictures{sample} have a caption. More than half have no caption and "
                f"are skipped. Caption them: {CAPTION}."
            )
        if self.templates == self.captioned:
            found.append(only_templates(self.captioned, looked_at=sample))
        counts = {"kept": self.captioned, **self.texts.counts()}
        if same := alike(counts, looked_at=sample) or (self.templates < self.captioned and titles(counts, looked_at=sample)):
            found.append(same)
        if from_nothing and (captioned := round(share * self.captioned)) < FEW:
            found.append(few(captioned))
        return found


def only_templates(captioned: int, *, looked_at: str = "") -> str:
    return (
        f"All {captioned:,} captions{looked_at} are templates filled with metadata, not written from the pictures. Caption them: {CAPTION}."
    )


def few(captioned: int) -> str:
    one = captioned == 1
    return (
        f"{captioned:,} picture{' with a caption is' if one else 's with captions are'} few for a model trained from scratch: "
        "below some thousands it repeats its training data. Add pictures, or use start=bundled, which fine-tunes the bundled model."
    )


def tell(say: Callable[[str], object], index: ShardIndex, *, caption_key: str, from_nothing: bool) -> None:
    """Print the warnings about training on these samples' captions. Reads an even subsample."""
    seen = Seen(caption_key)
    for record in index.some_records():
        if record is None:
            seen.broken += 1  # counted by its reason where the sample is encoded
        else:
            seen.add(record)
    warn(say, seen.doubts(from_nothing=from_nothing, of=len(index)))


def warn(say: Callable[[str], object], doubts: Iterable[str]) -> None:
    for doubt in doubts:
        say(f"captions: WARNING: {doubt}")

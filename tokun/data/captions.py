"""Captions: do they say enough to be trained on? Knows shards and the records of their samples; knows no model and no torch.

Told loudly, each with what to do: that few pictures have a caption, that there are few pictures at all, that captions are nearly all the same,
that nobody looked at the pictures (templates filled with metadata).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokun.data.shards import ShardIndex

MOST_TEXTS = 1000  # different captions that are told apart
ALIKE = 20  # captions, from which on it is said when they are nearly all the same
FEW = 1000  # captioned pictures below which a generator that begins from nothing learns them by heart
MOST_READ = 20_000  # samples that are looked at
CAPTION = "python -m data_tools.caption SHARDS --model … (or --endpoint …, or --from TABLE)"


def alike(captions: Mapping[str, int]) -> str:
    """What to say when the captions that were kept are nearly all the same; "" when they differ. `captions`: kept, empty, distinct."""
    kept, distinct = captions.get("kept", 0) - captions.get("empty", 0), captions.get("distinct", 0)
    if kept < ALIKE or 10 * distinct > kept or distinct >= MOST_TEXTS:
        return ""
    return (
        f"The {kept:,} captions are only {distinct:,} different text{'' if distinct == 1 else 's'}: a model learns nothing from them "
        "about what a picture shows. Caption the pictures anew (python -m data_tools.caption, with a captioner), or by hand."
    )


def doubts(records: Iterable[Mapping[str, Any]], *, caption_key: str = "caption", from_nothing: bool = True) -> list[str]:
    """What speaks against training on the captions of these samples' records, in whole sentences; empty: nothing.

    `from_nothing`: the generator begins without another's weights.
    """
    pictures = captioned = templates = 0
    texts: set[str] = set()
    for record in records:
        pictures += 1
        said, looked_at = words_of(record, caption_key)
        captioned += bool(said)
        templates += bool(said) and not looked_at
        if said and len(texts) < MOST_TEXTS:
            texts.add(said)
    told = []
    if not captioned:
        return [f"None of the {pictures:,} pictures has a caption: there is nothing to learn words from. Caption them: {CAPTION}."]
    if 2 * captioned < pictures:
        told.append(f"Only {captioned:,} of {pictures:,} pictures have a caption, and the others are left out. Caption them: {CAPTION}.")
    if templates == captioned:
        told.append(only_templates(captioned))
    if same := alike({"kept": captioned, "distinct": len(texts)}):
        told.append(same)
    if from_nothing and captioned < FEW:
        told.append(few(captioned))
    return told


def only_templates(captioned: int) -> str:
    return f"All {captioned:,} captions are templates filled with metadata: nobody looked at the pictures. Caption them: {CAPTION}."


def few(captioned: int) -> str:
    one = captioned == 1
    return (
        f"{captioned:,} picture{' with a caption is' if one else 's with captions are'} few for a model that begins from nothing: below some thousands it "
        "repeats what it was shown. More pictures help, or start=bundled, which trains the bundled model on."
    )


def words_of(record: Mapping[str, Any], caption_key: str) -> tuple[str, bool]:
    """(the caption, "" for none; whether it is more than a template) of a sample's record."""
    captions, sources = (value if isinstance(value := record.get(name), Mapping) else {} for name in ("captions", "caption_sources"))
    found = {**captions, **({"plain": record[caption_key]} if record.get(caption_key) else {})}
    found = {register: " ".join(text.split()) for register, text in found.items() if isinstance(text, str) and text.strip()}
    if not found:
        return "", False

    def is_template(register: str) -> bool:
        source = sources.get(register)
        written = captions.get(register) == record.get(caption_key) or register != "plain" or not record.get(caption_key)
        return isinstance(source, Mapping) and source.get("source") == "template" and written

    return found.get("plain") or next(iter(found.values())), not all(map(is_template, found))


def tell(say: Callable[[str], object], shards: Sequence[Path], *, caption_key: str, from_nothing: bool) -> None:
    """Say what speaks against training on the captions of these shards. Of very many samples every so-manyth is read."""
    index = ShardIndex(shards)

    def records() -> Iterator[dict[str, Any]]:
        for i in range(0, len(index), -(-len(index) // MOST_READ)):
            with contextlib.suppress(OSError, ValueError):  # counted where the sample is encoded
                yield index.read_json(i)

    for doubt in doubts(records(), caption_key=caption_key, from_nothing=from_nothing):
        say(f"captions: WARNING: {doubt}")

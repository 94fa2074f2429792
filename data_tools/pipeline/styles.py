"""Styles: without --style, each picture has its own, from its words or its folder. Opens no picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_tools.pipeline.chunks import AMBIGUOUS, KEPT, Settings, judged_caption, of_caption
from data_tools.pipeline.verdicts import decide
from data_tools.readers import CaptionError, Found, Listing, Words, find_words, shown
from data_tools.readers.listing import NOTHING
from tokun.utils.errors import UserError

FOLDER, BESIDE, ROW = "its folder's name", "the JSON beside it", "its row of a table or JSON in a tar"
NAMED = 12  # styles in a line


@dataclass(frozen=True)
class OwnStyles:
    """The pictures' own styles, and the places that they are from, each with its number of pictures."""

    styles: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """Where the styles are from, and the most frequent ones; "" if there are none."""
        if not self.styles:
            return ""
        names, more = [name for name, _ in self.styles.most_common(NAMED)], len(self.styles) - NAMED
        places = " or ".join(name for name, _ in self.places.most_common())
        return f"Without --style each picture has its own, from {places}: {', '.join(names)}{f' and {more:,} more' if more > 0 else ''}."


def own_styles(listing: Listing, settings: Settings, source: object, *, classes: bool, progress: bool = False) -> OwnStyles:
    """The styles of the pictures in `source`. `classes`: whether folder names are styles (reader `classes`).

    Raises UserError, with their number and the way out, if pictures have none. Pictures rejected only for their words do not count: most of
    them have no caption, and so no JSON and no row that could give a style.
    """
    own, without, opened, first = OwnStyles(), 0, 0, ""
    for one in tqdm(listing.found, desc="styles", unit="file", leave=False, disable=None if progress else True):
        if one.problem:
            continue
        opened += 1
        style, place, wanted = style_of(one, listing.words.get(one.path, NOTHING), Path(listing.base), settings, classes=classes)
        if style:
            own.styles[style] += 1
            own.places[place] += 1
        elif wanted:
            without, first = without + 1, first or shown(one.path)
    if opened and not own.styles:
        raise UserError(
            f"--style is needed: {source} gives no picture a style. Add --style engraving, or another tag; or write each picture's own "
            'into its JSON or table row ("style": "engraving")'
        )
    if without:
        total = without + own.places.total()
        raise UserError(
            f"--style is needed: {without:,} of {total:,} pictures in {source} have no style of their own, the first {first}. "
            'Write it into their JSON or table row ("style": "engraving"), or add --style engraving, which then is the style of all'
        )
    return own


def style_of(one: Found, row: Words, base: Path, settings: Settings, *, classes: bool) -> tuple[str, str, bool]:
    """A picture's own style ("" if it has none), where it is from, and whether its words allow the picture to be kept."""
    if one.style:
        return one.style, FOLDER if classes and one.where is None else ROW, True
    try:
        words = find_words(base, one, row, from_names=settings.captions_from_names, caption_column=settings.caption_column)
    except CaptionError:
        return "", "", False
    if words.style:
        return words.style, ROW if words.style == row.style else BESIDE, True
    status, _ = decide(of_caption(judged_caption(words, settings), settings))
    kept = status == KEPT or (status == AMBIGUOUS and settings.keep_ambiguous)
    return "", "", kept

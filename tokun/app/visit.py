"""What a visitor keeps: prints with their links, the files of a print, and opinions that training can learn from.

None of it is written on the server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokun.app.demo import data_uri, inline
from tokun.inference import preferences
from tokun.render.svg import to_svg
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair

REMEMBERED = 24  # prints of a visit


@dataclass(frozen=True)
class Print:
    """A pair, and the parameters of the address that draws it again (`links`); "" for what was made from a picture."""

    pair: Pair
    link: str = ""


def remember(history: list[Print], prints: list[Print]) -> list[Print]:
    """The newest prints first, each once, at most REMEMBERED of them."""
    kept: list[Print] = []
    for one in [*prints, *history]:
        if not any(same(one.pair, other.pair) for other in kept):
            kept.append(one)
    return kept[:REMEMBERED]


def same(one: Pair, other: Pair) -> bool:
    return one.codes == other.codes and one.caption_ids == other.caption_ids


def keepsakes(pair: Pair) -> dict[str, str]:
    """File name -> data URI: the picture as PNG and SVG, and the record as JSON."""
    name = f"tokun-{pair.seed}-{pair.index:02d}"
    record = json.dumps(pair.record(), ensure_ascii=False, indent=1).encode()
    return {
        f"{name}.png": data_uri(pair.image, "PNG"), f"{name}.svg": inline(to_svg(pair.image).encode(), "image/svg+xml"),
        f"{name}.json": inline(record, "application/json"),
    }  # fmt: skip


def address(found: object) -> str:
    """The page's address without its parameters, from a browser's Referer; "" if that is not an address."""
    match = re.match(r"https?://[A-Za-z0-9.:\[\]_~/%@+-]+", str(found or ""))
    return match[0] if match else ""


@dataclass(frozen=True)
class Judged:
    """What a visitor liked and disliked, and which of two was better."""

    better: tuple[Pair, ...] = ()
    worse: tuple[Pair, ...] = ()
    compared: tuple[tuple[Pair, Pair], ...] = ()
    """(chosen, rejected)"""

    def mark(self, pair: Pair | None, *, liked: bool) -> Judged:
        """The same with this pair on one side, and no longer on the other. The newest are first, at most REMEMBERED of a side."""
        if pair is None:
            raise UserError("There is no print yet: draw one first.")

        def without(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
            return tuple(other for other in pairs if not same(other, pair))

        better, worse = without(self.better), without(self.worse)
        if liked:
            return Judged((pair, *better)[:REMEMBERED], worse, self.compared)
        return Judged(better, (pair, *worse)[:REMEMBERED], self.compared)

    def prefer(self, pairs: Sequence[Pair], chosen: int) -> Judged:
        """The same with the first (0) or the second (1) of two as the better one, which replaces an earlier opinion of these two. The
        newest are first."""
        if len(pairs) != 2:
            raise UserError("There are no two prints to compare yet: draw both first.")
        if same(*pairs):
            raise UserError("Both prints are the same, so neither is the better one.")
        found = preferences.compared(pairs[chosen], pairs[1 - chosen])
        others = tuple(two for two in self.compared if not any(same(two[i], found[0]) and same(two[1 - i], found[1]) for i in (0, 1)))
        return Judged(self.better, self.worse, (found, *others)[: 8 * REMEMBERED])

    @property
    def pairs(self) -> list[tuple[Pair, Pair]]:
        """(chosen, rejected) of each comparison, and each liked print with each disliked one of the same prompt."""
        return [*self.compared, *preferences.clicked(self.better, self.worse)]

    def summary(self) -> str:
        found, compared = len(self.pairs), len(self.compared)
        judged = f"{len(self.better)} liked, {len(self.worse)} disliked" + (f", {compared} compared" if compared else "")
        return f"{judged}: {found} preference{'' if found == 1 else 's'}"

    def files(self) -> dict[str, str]:
        """File name -> data URI of the preferences, in the format that `configs/dpo.yaml` reads."""
        found = self.pairs
        return {"tokun-preferences.jsonl": inline(preferences.lines(found).encode(), "application/jsonl")} if found else {}

"""Medium: does CLIP see a print, or something else? A signal in addition to the measurements (measure.py).

    tokun prepare pictures/ --style engraving --out shards/ --clip ViT-B-32:laion2b_s34b_b79k

Zero-shot (Radford et al., 2021, section 3.1): the picture is compared with sentences for its own style and for other
content of print collections. Only the medium is judged; the model is `tokun.inference.clip.Clip`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from data_tools.text.yes_or_no import with_article
from tokun.inference.clip import BATCH, Clip

OTHERS = {
    "photograph": "a photograph",
    "colour plate": "a colour painting",
    "map": "a map or a plan",
    "music": "a page of sheet music",
    "text page": "a page of printed text",
    "ornament or initial": "an ornament or a decorated initial letter",
}
SURE = 0.7  # a picture is doubted from this probability of another medium

load = lru_cache(maxsize=1)(Clip)


def own_words(style: str) -> str:
    """A sentence for a style's tag: wood-engraving -> "a wood engraving"."""
    return with_article(style.replace("-", " "))


def doubts(images: Sequence[Image.Image], styles: Sequence[str], name: str) -> list[str]:
    """For each picture, the medium that CLIP sees instead of its style, as a reason, or "".

    Raises ImportError that names the extra, or UserError that names the model.
    """
    clip = load(name)
    scale = clip.model.logit_scale.exp().item()
    pairs = [(image.convert("RGB"), [own_words(style), *OTHERS.values()]) for image, style in zip(images, styles)]
    scores = [row for start in range(0, len(pairs), BATCH) for row in clip.score(pairs[start : start + BATCH])]
    return [doubt([scale * score for score in row]) for row in scores]


def doubt(logits: Sequence[float]) -> str:
    """The reason for one picture, or "", from the logits of its own style followed by OTHERS."""
    best = max(logits)
    shares = [math.exp(logit - best) for logit in logits]
    kind = shares.index(1.0)
    return f"CLIP sees: {list(OTHERS)[kind - 1]}" if kind and 1 / sum(shares) >= SURE else ""

"""Medium: does CLIP take a picture for a print, or for something else? A signal beside the measurements of cleaning.py.

    python -m data_tools.prepare pictures/ --style engraving --out shards/ --clip-model ViT-B-32:laion2b_s34b_b79k

Zero-shot (Radford et al., 2021, section 3.1): the picture is compared with sentences for its own style and for what
collections of prints are mixed with. This file knows open_clip; it judges nothing but the medium.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from tokun.extras import need

OTHERS = {
    "photograph": "a photograph",
    "colour plate": "a colour painting",
    "map": "a map or a plan",
    "music": "a page of sheet music",
    "text page": "a page of printed text",
    "ornament or initial": "an ornament or a decorated initial letter",
}
SURE = 0.7  # probability of another medium from which a picture is doubted
BATCH = 64


def own_words(style: str) -> str:
    """A sentence for a style's tag: wood-engraving -> "a wood engraving"."""
    words = style.replace("-", " ")
    return f"{'an' if words[:1] in 'aeiou' else 'a'} {words}"


@lru_cache(maxsize=1)
def load(name: str) -> tuple[Any, Any, Any]:
    """(model, preprocess, tokenizer) of an open_clip name: MODEL:PRETRAINED, MODEL:FILE, hf-hub:ID or local-dir:PATH.

    Raises ImportError naming the extra, or ValueError naming the model.
    """
    open_clip = need("open_clip", extra="clip")
    model_name, _, pretrained = (name, "", "") if name.startswith(("hf-hub:", "local-dir:")) else name.partition(":")
    if Path(name).is_dir():
        model_name = f"local-dir:{name}"
    elif pretrained == "" and not model_name.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(f"--clip-model {name!r} names no weights: write MODEL:PRETRAINED, MODEL:FILE, hf-hub:ID or a folder")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(model_name, pretrained=pretrained or None)
        return model.eval(), preprocess, open_clip.get_tokenizer(model_name)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"--clip-model {name!r} cannot be loaded: {error}") from error


def doubts(images: Sequence[Image.Image], styles: Sequence[str], name: str) -> list[str]:
    """For each picture the medium that CLIP sees instead of its style, as a reason, or ""."""
    torch = need("torch", extra="clip")
    model, preprocess, tokenizer = load(name)
    others, result = list(OTHERS), []
    for start in range(0, len(images), BATCH):
        some, theirs = images[start : start + BATCH], styles[start : start + BATCH]
        with torch.inference_mode():
            seen_BD = model.encode_image(torch.stack([preprocess(image.convert("RGB")) for image in some]), normalize=True)
            other_KD = model.encode_text(tokenizer(list(OTHERS.values())), normalize=True)
            own_BD = model.encode_text(tokenizer([own_words(style) for style in theirs]), normalize=True)
            logits_BK = torch.cat([(seen_BD * own_BD).sum(1, keepdim=True), seen_BD @ other_KD.T], 1) * model.logit_scale.exp()
        for share, kind in zip(*logits_BK.softmax(1).max(1), strict=True):
            result.append(f"CLIP sees: {others[int(kind) - 1]}" if int(kind) and float(share) >= SURE else "")
    return result

"""Views: a pair, words or a picture in, HTML out. Whatever a visitor or a model wrote is quoted."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokun.app import demo
from tokun.inference import conditional_generation


def quoted(text: str) -> str:
    """Text as HTML that neither a browser nor Gradio's templates take for more than text."""
    return html.escape(text).translate({ord(c): f"&#{ord(c)};" for c in "{}$`\\"})


def figure(image: Image.Image, caption: str, note: str = "", *, side: int = 512) -> str:
    shown = f'<img decoding="sync"{shape(image)} alt="{quoted(caption)}" src="{demo.data_uri(demo.enlarged(image, side))}">'
    return f"<figure>{shown}<figcaption>{quoted(caption) or '&nbsp;'}<small>{quoted(note) or '&nbsp;'}</small></figcaption></figure>"


def shape(image: Image.Image) -> str:
    """The attribute that gives a picture its own shape in a square place; a square has none."""
    width, height = image.size
    return (
        ""
        if width == height
        else f' style="aspect-ratio: {width} / {height}; width: {min(100, 100 * width / height):.4g}%; margin: 0 auto"'
    )


def plate(pairs: Sequence[Any], files: dict[str, str] | None = None) -> str:
    """One pair large, several as a sheet; below them what can be taken home."""
    kind, side = ("one", 512) if len(pairs) == 1 else ("sheet two", 320) if len(pairs) <= 4 else ("sheet three", 256)
    figures = "".join(figure(pair.image, pair.caption, signature(pair) if kind == "one" else "", side=side) for pair in pairs)
    return f'<div class="plate {kind}">{figures}</div>{links(files or {})}'


def signature(pair: Any) -> str:
    tags = " · ".join(word.replace("-", " ") for word in (pair.tags.style, pair.tags.subject, pair.tags.thing) if word)
    return f"seed {pair.seed}, no. {pair.index}" + (f" · {tags}" if tags else "")


def sketched(sketch: demo.Sketch) -> str:
    return f'<div class="plate one drawing">{figure(sketch.image, sketch.caption, "being drawn …")}</div>{links({})}'


def links(files: dict[str, str]) -> str:
    found = "".join(f'<a download="{quoted(name)}" href="{uri}">{quoted(Path(name).suffix[1:].upper())}</a>' for name, uri in files.items())
    return f'<nav class="files">{"Take it home: " + found if found else "&nbsp;"}</nav>'


def spoken(words: Sequence[conditional_generation.Words]) -> str:
    rows = "".join(
        f"<dt>{quoted(w.register or 'answer')}<small>confidence {w.confidence:.2f}</small></dt><dd>{quoted(w.text)}</dd>" for w in words
    )
    return f'<dl class="words">{rows}</dl>'


def preview(image: Image.Image) -> str:
    return f'<div class="plate preview"><figure><img{shape(image)} alt="the picture in hand" src="{demo.data_uri(demo.enlarged(image, 256))}"></figure></div>'


EMPTY = '<div class="plate one empty"><figure><div class="sheet-of-paper"></div><figcaption>Nothing is printed yet.<small>&nbsp;</small></figcaption></figure></div>'


def opinion(judged: demo.Judged) -> str:
    """What was liked and disliked, and the file that training learns from; nothing before the first click."""
    if not (judged.better or judged.worse):
        return ""
    return f'<p class="aside">{quoted(judged.told())}</p>{links(judged.files())}'


def way(images: Sequence[Image.Image]) -> str:
    shown = "".join(f'<img alt="" src="{demo.data_uri(demo.enlarged(image, 96))}">' for image in images)
    return f'<div class="strip">{shown}</div>'


def colophon(model: Any) -> str:
    size = sum(parameter.numel() for parameter in model.generator.parameters())
    few, many = (pick(rows * columns for rows, columns in model.grids) for pick in (min, max))
    return (
        f"One model of {size / 1e6:.1f} million parameters draws {many if few == many else f'{few} to {many}'} codes of a picture, then its words. "
        "The same seed and wishes give the same pair. What it draws and says is made up."
    )

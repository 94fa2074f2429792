"""Views: a pair, words or a picture in, HTML out. Text of visitors and models is quoted."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tokun.app import demo, visit
from tokun.inference import conditional_generation

LARGE = 1024  # px of the longer side of a print: sharp on a screen with two device pixels per pixel
SKETCHED = 512  # the same while it is drawn


def quoted(text: str) -> str:
    """Text as HTML that browsers and Gradio's templates only show as text."""
    return html.escape(text).translate({ord(c): f"&#{ord(c)};" for c in "{}$`\\"})


def figure(image: Image.Image, caption: str, note: str = "", *, side: int = LARGE, heading: str = "") -> str:
    shown = f'<img decoding="sync"{shape(image)} alt="{quoted(caption)}" src="{demo.data_uri(demo.enlarged(image, side))}">'
    head = f"<h2>{quoted(heading)}</h2>" if heading else ""
    return f"<figure>{head}{shown}<figcaption>{quoted(caption) or '&nbsp;'}<small>{quoted(note) or '&nbsp;'}</small></figcaption></figure>"


def shape(image: Image.Image) -> str:
    """The attribute that gives a picture its own shape in a square place; "" for a square."""
    width, height = image.size
    if width == height:
        return ""
    return f' style="aspect-ratio: {width} / {height}; width: {min(100, 100 * width / height):.4g}%; margin: 0 auto"'


def plate(pairs: Sequence[Any], files: dict[str, str] | None = None, link: str = "") -> str:
    """One pair large, several as a sheet; below them what can be downloaded."""
    kind, side = ("one", LARGE) if len(pairs) == 1 else ("sheet two", 640) if len(pairs) <= 4 else ("sheet three", 512)
    figures = "".join(figure(pair.image, pair.caption, signature(pair) if kind == "one" else "", side=side) for pair in pairs)
    return f'<div class="plate {kind}">{figures}</div>{links(files or {}, "the print", link)}'


def versus(sides: Sequence[Any], notes: Sequence[str] = ()) -> str:
    """Two pairs side by side, as far as they are drawn: sketches, or pairs; the second may be missing."""
    figures = ""
    for number, heading in enumerate(("Left", "Right")):
        if number < len(sides):
            one, drawn = sides[number], not isinstance(sides[number], demo.Sketch)
            note = notes[number] if drawn and number < len(notes) else ""
            figures += figure(one.image, one.caption, note, side=640 if drawn else SKETCHED, heading=heading)
        else:
            figures += f'<figure><h2>{heading}</h2><div class="sheet-of-paper"></div><figcaption>&nbsp;</figcaption></figure>'
    busy = "" if len(sides) == 2 and not any(isinstance(one, demo.Sketch) for one in sides) else " drawing"
    return f'<div class="plate sheet two versus{busy}">{figures}</div>{links({})}'


def signature(pair: Any) -> str:
    tags = " · ".join(word.replace("-", " ") for word in (pair.tags.style, pair.tags.subject, pair.tags.thing) if word)
    return f"seed {pair.seed}, no. {pair.index}" + (f" · {tags}" if tags else "")


def sketched(sketch: demo.Sketch) -> str:
    note = f"the first of {sketch.candidates} candidates …" if sketch.candidates > 1 else "being drawn …"
    return f'<div class="plate one drawing">{figure(sketch.image, sketch.caption, note, side=SKETCHED)}</div>{links({})}'


def links(files: dict[str, str], of: str = "", link: str = "") -> str:
    """What can be downloaded, and the address that draws it again. `of`: what it belongs to, for screen readers."""
    found = "".join(f'<a download="{quoted(name)}" href="{uri}">{quoted(Path(name).suffix[1:].upper())}</a>' for name, uri in files.items())
    again = f'<a class="address" href="{quoted(link)}">Link</a>' if link else ""
    if not (found or again):
        return '<p class="files">&nbsp;</p>'
    return f'<nav class="files" aria-label="Files of {quoted(of)}">{"Download: " if found else "Keep it: "}{found}{again}</nav>'


def spoken(words: Sequence[conditional_generation.Words]) -> str:
    rows = "".join(
        f"<dt>{quoted(w.register or 'answer')}<small>confidence {w.confidence:.2f}</small></dt><dd>{quoted(w.text)}</dd>" for w in words
    )
    return f'<dl class="words">{rows}</dl>'


def preview(image: Image.Image) -> str:
    shown = f'<img{shape(image)} alt="the picture in hand" src="{demo.data_uri(demo.enlarged(image, 480))}">'
    return f'<div class="plate preview"><figure>{shown}</figure></div>'


EMPTY = (
    '<div class="plate one empty"><figure><div class="sheet-of-paper"></div>'
    "<figcaption>Nothing is printed yet.<small>&nbsp;</small></figcaption></figure></div>"
)


def opinion(judged: visit.Judged) -> str:
    """What was liked, disliked and compared, and the file that training learns from; nothing before the first click."""
    if not (judged.better or judged.worse or judged.compared):
        return ""
    return f'<p class="aside">{quoted(judged.summary())}</p>{links(judged.files(), "your preferences")}'


def way(images: Sequence[Image.Image]) -> str:
    shown = "".join(f'<img alt="" src="{demo.data_uri(demo.enlarged(image, 192))}">' for image in images)
    return f'<div class="strip">{shown}</div>'


def gallery(prints: Sequence[visit.Print], address: str = "") -> str:
    """The prints of a visit as a separate page in one file. `address`: that of the demo, which draws them again."""
    figures = ""
    for one in prints:
        again = f'<a href="{quoted(address + one.link)}">draw it again</a>' if address and one.link else ""
        picture, caption, note = one.pair.image, quoted(one.pair.caption), quoted(signature(one.pair))
        size = f'width="{picture.width}" height="{picture.height}"'
        image = f'<img {size} alt="{caption}" src="{demo.data_uri(picture, "PNG")}">'
        figures += f"<figure>{image}<figcaption>{caption}<small>{note} {again}</small></figcaption></figure>\n"
    title, head = f"tokun: {len(prints)} prints", '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title><style>{GALLERY}</style></head>\n'
        f"<body><main><h1>{title}</h1>\n{figures}</main></body></html>\n"
    )


GALLERY = (
    "body{background:#f6f1e6;color:#2a2622;font:17px/1.35 Georgia,serif;margin:0}main{display:grid;gap:24px;padding:24px;"
    "grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr))}h1{grid-column:1/-1;font-weight:400;margin:0}"
    "figure{background:#fdfaf3;border:1px solid #d9cfbd;margin:0;padding:16px;text-align:center}"
    "img{width:100%;height:auto;max-height:420px;object-fit:contain}"
    "figcaption{font-style:italic;padding-top:12px}small{display:block;font-style:normal;color:#665d52}a{color:#7a2e21}"
)


def colophon(model: Any) -> str:
    size = sum(parameter.numel() for parameter in model.generator.parameters())
    few, many = (pick(rows * columns for rows, columns in model.grids) for pick in (min, max))
    return (
        f"One model of {size / 1e6:.1f} million parameters draws {many if few == many else f'{few} to {many}'} codes of a picture, "
        "then its words. The same seed and options give the same pair. What it draws and says is made up."
    )

"""The toy set: small engravings drawn by code, with captions that state exactly what is drawn and how.

    tokun toy --out data/toy --n 4096 --seed 0 --side 64

Discs, squares, triangles, stars, trees, houses, ships, moons and mountains, one to three per picture, with
parallel, cross or stipple hatching, on a light or dark ground. An item is a pure function of (seed, index): any number
can be drawn, in any order, on any machine. The captions follow a small grammar, so `parse_caption` can read the facts
back, and a model's picture and caption can be compared without a second model.

Hatching is anchored to the canvas with a fixed phase, and positions move by `side / 32`, so that a picture consists of
few distinct patches that a small VQ-VAE learns in minutes. Needs no torch.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tokun.data.shards import ShardIndex, write_samples
from tokun.utils import console
from tokun.utils.console import home_path
from tokun.utils.errors import UserError
from tokun.utils.files import whole_file
from tokun.utils.lock import alone_in

SHAPES = ("disc", "square", "triangle", "star", "tree", "house", "ship", "moon", "mountain")
SCENERY = frozenset({"tree", "house", "ship", "moon", "mountain"})
HATCHINGS = ("parallel", "cross", "stipple")
GROUNDS = ("light", "dark")
NUMBERS = {1: "one", 2: "two", 3: "three"}
PAPER, INK = 244, 22  # gray levels on a light ground; a dark ground swaps them
STEP = 1 / 32  # a quarter of a cell
CELL = 1 / 8  # positions move by whole cells of an 8x8 grid


# ---- what is drawn: a scene, planned from (seed, index) ---------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn. Lengths are fractions of the side; the origin is the top left corner."""

    shapes: tuple[str, ...]
    # in reading order: top to bottom, left to right
    centres: tuple[tuple[float, float], ...]
    # (x, y) of each shape
    extent: float
    # width and height of each shape's box
    hatching: str
    # one of HATCHINGS, the same for all shapes
    lean: str | None
    # 'left' or 'right' for parallel lines, else None
    ground: str
    # one of GROUNDS
    layout: str
    # 'single', 'pair', 'row' or 'pyramid'
    size: str | None
    # 'small' or 'large' for a single shape, else None
    position: str | None
    # 'centre', 'left', 'right', 'top' or 'bottom' for a single shape, else None


def _rng(seed: int, index: int) -> np.random.Generator:
    if min(seed, index) < 0 or max(seed, index) >= 2**64:
        raise UserError(f"seed and index must be in 0..2**64-1, got seed={seed}, index={index}")
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _pick(rng: np.random.Generator, options):
    return options[int(rng.random() * len(options))]  # only .random(): its stream is the same in every numpy


def _sample(rng: np.random.Generator, options, count: int) -> list:
    pool = list(options)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]


def _plan(rng: np.random.Generator) -> Scene:
    """Plan a scene: how many shapes, which, where, the hatching and the ground."""
    chance = rng.random()
    count = 1 if chance < 0.6 else 2 if chance < 0.88 else 3
    alike = rng.random() < 0.5
    shapes = (_pick(rng, SHAPES),) * count if alike else tuple(_sample(rng, SHAPES, count))
    hatching = _pick(rng, HATCHINGS)
    lean = _pick(rng, ("left", "right")) if hatching == "parallel" else None
    ground = _pick(rng, GROUNDS)

    def shift() -> float:  # whole eighths: the patches of an 8x8 grid recur, so few codes draw many pictures
        return (int(rng.random() * 3) - 1) * CELL

    size = position = None
    if count == 1:
        layout, size = "single", _pick(rng, ("small", "large"))
        extent = 0.56 if size == "small" else 0.76
        position = _pick(rng, ("centre", "left", "right", "top", "bottom")) if size == "small" else "centre"
        dx, dy = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}.get(position, (0, 0))
        centres = ((0.5 + dx * CELL, 0.5 + dy * CELL),)
    elif count == 2:
        layout, extent = "pair", 0.44
        centres = ((0.25, 0.5 + shift()), (0.75, 0.5 + shift()))
    elif rng.random() < 0.3:
        layout, extent, y = "row", 0.29, 0.5 + shift()
        centres = ((6 * STEP, y), (16 * STEP, y), (26 * STEP, y))
    else:
        layout, extent = "pyramid", 0.42
        centres = ((0.5 + shift(), 0.25), (0.25, 0.75), (0.75, 0.75))
    return Scene(shapes, centres, extent, hatching, lean, ground, layout, size, position)


# ---- how it is drawn --------------------------------------------------------------------------------------------


def _arc(cx: float, cy: float, r: float, start: float, stop: float, n: int = 40) -> list[tuple[float, float]]:
    """Points on a circle; degrees clockwise from the right, as in Pillow."""
    angles = [math.radians(start + (stop - start) * k / (n - 1)) for k in range(n)]
    return [(cx + r * math.cos(a), cy + r * math.sin(a)) for a in angles]


def _star() -> list[tuple[float, float]]:
    radii = (0.53, 0.25)
    turns = [(math.pi * (k / 5 - 0.5), radii[k % 2]) for k in range(10)]
    return [(r * math.cos(a), 0.05 + r * math.sin(a)) for a, r in turns]


def _crescent() -> list[tuple[float, float]]:
    return _arc(0.06, 0, 0.48, 50.5, 309.5) + _arc(0.28, 0, 0.38, 282.9, 77.1)[1:-1]  # the horns meet


# Each shape in a unit box around (0, 0), y down: strokes in order. 'hatch' fills with the hatching and outlines,
# 'blank' fills with the ground and outlines, 'ink' is solid, 'line' an open line.
_DRAWINGS: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {
    "disc": [("hatch", _arc(0, 0, 0.47, 0, 351, 40))],
    "square": [("hatch", [(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)])],
    "triangle": [("hatch", [(0, -0.45), (0.49, 0.42), (-0.49, 0.42)])],
    "star": [("hatch", _star())],
    "tree": [
        ("ink", [(-0.08, 0.24), (0.08, 0.24), (0.08, 0.5), (-0.08, 0.5)]),
        ("hatch", [(0, -0.5), (0.24, -0.16), (0.13, -0.16), (0.42, 0.27), (-0.42, 0.27), (-0.13, -0.16), (-0.24, -0.16)]),
    ],
    "house": [
        ("ink", [(0.18, -0.46), (0.32, -0.46), (0.32, -0.1), (0.18, -0.1)]),
        ("hatch", [(-0.37, -0.06), (0.37, -0.06), (0.37, 0.47), (-0.37, 0.47)]),
        ("ink", [(0, -0.48), (0.5, -0.03), (-0.5, -0.03)]),
        ("ink", [(-0.1, 0.15), (0.1, 0.15), (0.1, 0.47), (-0.1, 0.47)]),
    ],
    "ship": [
        ("line", [(0, -0.5), (0, 0.3)]),
        ("hatch", [(0.05, -0.46), (0.48, 0.18), (0.05, 0.18)]),
        ("hatch", [(-0.05, -0.36), (-0.05, 0.18), (-0.44, 0.18)]),
        ("ink", [(-0.5, 0.26), (0.5, 0.26), (0.33, 0.48), (-0.33, 0.48)]),
    ],
    "moon": [("hatch", _crescent())],
    "mountain": [
        ("hatch", [(-0.5, 0.42), (-0.15, -0.42), (0.08, 0.1), (0.2, -0.14), (0.5, 0.42)]),
        ("blank", [(-0.15, -0.42), (-0.01, -0.1), (-0.09, -0.16), (-0.16, -0.04), (-0.22, -0.15), (-0.29, -0.08)]),
    ],
}


@functools.lru_cache(maxsize=64)
def _hatching(hatching: str, lean: str | None, ground: str, side: int, scale: int) -> Image.Image:
    """The whole canvas hatched at `scale` times the side, with the same phase in every picture."""
    spacing = max(4, side // 16) * scale  # 4 px at side 64; less would make the three kinds indistinguishable
    ys, xs = np.mgrid[0 : side * scale, 0 : side * scale] + 0.5

    def lines(coordinate: np.ndarray, period: float, weight: float) -> np.ndarray:
        return np.abs((coordinate + period / 2) % period - period / 2) < weight

    if hatching == "stipple":
        inked = _stipple(xs, ys, spacing)
    elif hatching == "cross":  # twice the spacing, else the two sets of lines merge into a gray checkerboard
        falling = lines(xs - ys, 2 * spacing, 0.24 * spacing)
        inked = falling | lines(xs + ys - scale, 2 * spacing, 0.24 * spacing)
    else:  # leaning left: \\\, leaning right: ///
        inked = lines(xs - ys if lean == "left" else xs + ys, spacing, 0.226 * spacing)
    paper, ink = _tones(ground)
    return Image.fromarray(np.where(inked, ink, paper).astype(np.uint8))


def _stipple(xs: np.ndarray, ys: np.ndarray, spacing: float) -> np.ndarray:
    """Dots every `spacing` pixels, every second row shifted by half of it."""
    row = np.floor(ys / spacing)
    dx = (xs - row * spacing / 2) % spacing - spacing / 2
    dy = ys % spacing - spacing / 2
    return dx**2 + dy**2 < (spacing * 0.27) ** 2


def _tones(ground: str) -> tuple[int, int]:
    return (PAPER, INK) if ground == "light" else (INK, PAPER)


def _paint(scene: Scene, side: int) -> Image.Image:
    """Draw at a multiple of the side, then average down: an 'L' picture, side x side."""
    scale = 4 if side <= 96 else 2
    canvas_side = side * scale
    paper, ink = _tones(scene.ground)
    canvas = Image.new("L", (canvas_side, canvas_side), paper)
    stencil = Image.new("L", (canvas_side, canvas_side), 0)  # where the hatching shows
    placed = [
        (kind, [((cx + x * scene.extent) * canvas_side, (cy + y * scene.extent) * canvas_side) for x, y in points])
        for shape, (cx, cy) in zip(scene.shapes, scene.centres)
        for kind, points in _DRAWINGS[shape]
    ]
    cut = ImageDraw.Draw(stencil)
    for kind, points in placed:
        if kind != "line":
            cut.polygon(points, fill=255 if kind == "hatch" else 0)
    canvas.paste(_hatching(scene.hatching, scene.lean, scene.ground, side, scale), mask=stencil)
    pen, width = ImageDraw.Draw(canvas), round(canvas_side / 38)
    for kind, points in placed:
        if kind == "ink":
            pen.polygon(points, fill=ink)
        else:
            pen.line(points if kind == "line" else points + points[:2], fill=ink, width=width, joint="curve")
    return canvas.reduce(scale)


# ---- how it is described-----------------------------------------------------------------------------------------

# {s} the shapes, {p} where (may be empty), {h} the hatching, {g} the ground (may be empty)
_PLAIN = (
    "{s}{p} in {h}{g}.",
    "{s}{p}{g}, drawn in {h}.",
    "{s}{p}{g}, shaded with {h}.",
    "an engraving of {s}{p} in {h}{g}.",
    "a print of {s}{p}{g}, all in {h}.",
    "this engraving shows {s}{p} in {h}{g}.",
    "in {h}, {s}{p}{g}.",
    "the engraver cut {s}{p}{g} with {h}.",
)
_POETIC = (
    "out of the silence came {s}, woven in {h}{g}.",
    "a patient hand left {s} here, breathing in {h}{g}.",
    "softly the needle sang of {s} in {h}{g}.",
    "dream of {s}, and wake to {h}{g}.",
)
_POETIC_GROUND = {"light": " on a ground as light as morning", "dark": " on a ground as dark as night"}


def _shape_words(scene: Scene, *, size: bool = False, beside: bool = False) -> str:
    """'two stars', 'a small moon', 'a house beside a tree', 'a disc, a star and a ship'."""
    count = len(scene.shapes)
    if count > 1 and len(set(scene.shapes)) == 1:
        return f"{NUMBERS[count]} {scene.shapes[0]}s"
    each = [f"a {scene.size} {shape}" if size else f"a {shape}" for shape in scene.shapes]
    if beside and count == 2:
        return " beside ".join(each)
    return each[0] if count == 1 else ", ".join(each[:-1]) + " and " + each[-1]


def _hatching_words(scene: Scene, *, lean: bool) -> str:
    if scene.hatching == "parallel":
        return f"parallel lines leaning {scene.lean}" if lean else "parallel hatching"
    return {"cross": "cross-hatching", "stipple": "stippling"}[scene.hatching]


def _place_words(scene: Scene) -> str:
    if scene.layout == "single":
        assert scene.position is not None
        return {"centre": "in the centre", "left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}[
            scene.position
        ]
    return {"pair": "side by side", "row": "in a row", "pyramid": "in a pyramid"}[scene.layout]


def _sentence(template: str, **words: str) -> str:
    text = template.format(**words)
    return text[0].upper() + text[1:]


def _describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str, bool]:
    """The plain caption, the poetic one, and whether the plain one states the ground."""
    beside = scene.layout == "pair" and rng.random() < 0.5
    size = scene.layout == "single" and rng.random() < 0.5
    alike = len(set(scene.shapes)) == 1  # a list of different shapes is long enough without the place
    place = alike and rng.random() < (0.15 if scene.size == "large" else 0.5)
    lean = rng.random() < 0.5
    tells_ground = rng.random() < 2 / 3
    plain = _sentence(
        _pick(rng, _PLAIN),
        s=_shape_words(scene, size=size, beside=beside),
        p=" " + _place_words(scene) if place else "",
        h=_hatching_words(scene, lean=lean),
        g=f" on a {scene.ground} ground" if tells_ground else "",
    )
    poetic = _sentence(
        _pick(rng, _POETIC),
        s=_shape_words(scene),
        h=_hatching_words(scene, lean=False),
        g=_POETIC_GROUND[scene.ground] if rng.random() < 2 / 3 else "",
    )
    return plain, poetic, tells_ground


def _questions(scene: Scene) -> list[dict[str, str]]:
    return [
        {"question": "What is shown?", "answer": _shape_words(scene)},
        {"question": "Which hatching is used?", "answer": _hatching_words(scene, lean=False)},
        {"question": "How many shapes are there?", "answer": NUMBERS[len(scene.shapes)]},
        {"question": "Is the ground light or dark?", "answer": scene.ground},
    ]


_MENTION = re.compile(rf"\b(?:(a|one|two|three) )?(?:(?:small|large) )?({'|'.join(SHAPES)})(s?)\b")
_HATCHING_WORD = re.compile(r"\b(parallel|cross|stipple|stippling|stippled)\b")
_GROUND_WORD = re.compile(r"\b(light|dark) ground\b|\bground as (light|dark)\b")


def parse_caption(caption: str) -> dict:
    """Read the facts back from a caption, plain or poetic: `{"shapes", "hatching", "ground"}`.

    `shapes` is a sorted multiset (`["star", "star"]`), empty if there are none. A fact that is not stated, or stated
    two ways, is None. Malformed captions are read as far as possible: a noun without a number counts once, a bare
    plural twice. Never raises for a str.
    """
    text = " ".join(caption.lower().split())
    shapes: list[str] = []
    for number, shape, plural in _MENTION.findall(text):
        count = {"a": 1, "one": 1, "two": 2, "three": 3}.get(number, 2 if plural else 1)
        shapes += [shape] * count
    hatchings = {"stipple" if word.startswith("stippl") else word for word in _HATCHING_WORD.findall(text)}
    grounds = {first or second for first, second in _GROUND_WORD.findall(text)}
    return {
        "shapes": sorted(shapes),
        "hatching": hatchings.pop() if len(hatchings) == 1 else None,
        "ground": grounds.pop() if len(grounds) == 1 else None,
    }


# ---- one item, and shards of them -------------------------------------------------------------------------------


def draw(seed: int, index: int, side: int = 64) -> tuple[Image.Image, dict]:
    """Item `index` of `seed`: a picture ('L', side x side) and its record (the shard's JSON, less `sha256`).

    The record does not depend on `side`. Raises UserError for an unsupported side.
    """
    if side % 16 or not 32 <= side <= 256:
        raise UserError(f"side must be a multiple of 16 from 32 to 256, got {side}; try 64")
    rng = _rng(seed, index)
    scene = _plan(rng)
    plain, poetic, ground_stated = _describe(scene, rng)
    record = {
        "caption": plain,
        "captions": {"plain": plain, "poetic": poetic},
        "style": "engraving",
        "subject": "scenery" if SCENERY & set(scene.shapes) else "geometry",
        "source": "tokun toy",
        "license": "CC0-1.0",
        "truth": {
            "shapes": sorted(scene.shapes),
            "hatching": scene.hatching,
            "ground": scene.ground,
            "ground_stated": ground_stated,
            "lean": scene.lean,
            "layout": scene.layout,
            "size": scene.size,
            "position": scene.position,
        },
        "questions": _questions(scene),
    }
    return _paint(scene, side), record


def _key(seed: int, index: int) -> str:
    return f"toy-{seed}-{index:06d}"


def _item(seed: int, index: int, side: int) -> dict[str, Any]:
    """The two files of an item, by suffix, and its key."""
    image, record = draw(seed, index, side)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    picture = buffer.getvalue()
    record["sha256"] = hashlib.sha256(picture).hexdigest()
    return {"__key__": _key(seed, index), "png": picture, "json": json.dumps(record, ensure_ascii=False).encode()}


def _is_whole(path: Path, seed: int, indices: range, side: int) -> bool:
    """Whether `path` already holds these items: all keys match, and every hundredth and the last have the same bytes."""
    if not path.exists():
        return False
    try:
        shard = ShardIndex([path], need=("png", "json"))
    except UserError:  # not a tar
        return False
    if shard.skipped or [shard.key(n) for n in range(len(shard))] != [_key(seed, index) for index in indices]:
        return False
    for n in (*range(0, len(indices), 100), len(indices) - 1):
        drawn = _item(seed, indices[n], side)
        if any(shard.read(n, suffix) != drawn[suffix] for suffix in ("png", "json")):
            return False
    return True


def write_shards(out_dir: str | Path, n: int, seed: int, side: int, prefix: str = "train", shard_size: int = 1000) -> list[Path]:
    """Write items 0..n-1 of `seed` as WebDataset shards `PREFIX-00000.tar …`; returns their paths in order.

    Each shard is written to a temporary file and renamed; complete shards are kept. Raises UserError if `out_dir`
    holds further shards of this prefix, which a reader's glob would include.
    """
    if n < 1 or shard_size < 1:
        raise UserError(f"n and shard_size must be at least 1, got n={n}, shard_size={shard_size}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + shard_size, n)) for start in range(0, n, shard_size)]
    paths = [out_dir / f"{prefix}-{k:05d}.tar" for k in range(len(parts))]
    unexpected = sorted(set(out_dir.glob(f"{prefix}-" + "[0-9]" * 5 + ".tar")) - set(paths))
    if unexpected:
        raise UserError(f"{unexpected[0]} is not one of the {len(paths)} shards requested: remove it, or use another --out")
    for path, indices in zip(paths, parts):
        if not _is_whole(path, seed, indices, side):
            with whole_file(path) as aside, open(aside, "wb") as tar:
                write_samples(tar, (_item(seed, index, side) for index in indices))
    return paths


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m data_tools.toy", "Draw the toy set and write it as WebDataset shards.")
    parser.add_argument("--out", type=home_path, required=True, help="folder for the shards")
    parser.add_argument("--n", type=int, default=4096, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="use another seed for another split")
    parser.add_argument("--side", type=int, default=64, help="pixels; a multiple of 16 from 32 to 256")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures per shard")
    parser.add_argument("--prefix", default="train", help="shards are named PREFIX-00000.tar …")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with alone_in(args.out, option="--out"):
        paths = write_shards(args.out, args.n, args.seed, args.side, args.prefix, args.shard_size)
    print(f"{args.n} pictures of {args.side} px in {len(paths)} shards: {paths[0]} … {paths[-1].name}")


if __name__ == "__main__":
    console.run("data_tools.toy", main)

"""Promises of tokun/render/svg.py: valid, safe, within the limit, and still the picture. Rendered back by resvg."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from data_tools import toy
from tokun.render import svg

resvg = pytest.importorskip("resvg_py", reason="rendering back needs resvg_py (extra 'dev')")


def rendered(text: str, size: tuple[int, int]) -> np.ndarray:
    """Shades (H, W), 0 to 255."""
    image = Image.open(io.BytesIO(resvg.svg_to_bytes(svg_string=text)))
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), np.float64)


def assert_safe(text: str) -> None:
    root = ElementTree.fromstring(text)
    assert {element.tag.partition("}")[2] for element in root.iter()} <= {"svg", "rect", "path"}
    allowed = {"width", "height", "viewBox", "preserveAspectRatio", "fill", "d"}
    for element in root.iter():
        assert set(element.attrib) <= allowed and not (element.text or "").strip()
        assert re.fullmatch(r"[MLCZmlczhv0-9 .-]*", element.get("d", "")) and re.fullmatch(r"(#[0-9a-f]{6})?", element.get("fill", ""))


def picture_of_a_kind(index: int) -> Image.Image:
    """Toy engravings, noise, ramps, blots, flat ones, stripes; gray, colour, bilevel, palette, alpha, 16 bits; all shapes."""
    rng = np.random.default_rng(index)
    width, height = (int(n) for n in rng.integers(3, 22, 2))
    y, x = np.mgrid[:height, :width]
    kinds = (
        lambda: np.asarray(toy.draw(1, index, 32)[0].convert("L").resize((width, height))),
        lambda: rng.integers(0, 256, (height, width)),
        lambda: 255 * x / max(1, width - 1),
        lambda: 255 * ((x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2),
        lambda: np.full((height, width), rng.integers(0, 256)),
        lambda: 255 * ((x + y) // int(rng.integers(1, 5)) % 2),
    )
    gray = Image.fromarray(np.asarray(kinds[index % len(kinds)](), np.float64).astype(np.uint8))
    modes = ("L", "RGB", "1", "P", "RGBA", "LA", "I;16", "CMYK")
    mode = modes[index // len(kinds) % len(modes)]
    if mode == "I;16":
        return Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    return gray.convert("RGB").convert(mode) if mode != "LA" else gray.convert("LA")


@pytest.mark.slow
def test_of_a_thousand_pictures_of_all_kinds_none_is_above_the_limit_invalid_or_another_picture():
    limits = (10_000, 2_000, 600, svg.LEAST_BYTES)
    for index in range(1000):
        image, limit = picture_of_a_kind(index), limits[index % len(limits)]
        text = svg.to_svg(image, limit)
        assert len(text.encode()) <= limit
        assert_safe(text)
        given = np.asarray(svg.flat(image).convert("L"), np.float64)
        back = rendered(text, image.size)
        assert back.shape == given.shape
        worst = np.abs(given - given.mean()).mean()  # of a flat sheet of the mean tone
        assert np.abs(back - given).mean() <= 1.05 * worst + 10, f"picture {index} at {limit} bytes"


@pytest.mark.parametrize("limit", [10_000, 4_000])
def test_an_engraving_stays_recognisable_within_ten_kilobytes(limit):
    for index in range(4):
        image = toy.draw(3, index, 128)[0].convert("L")
        given, back = np.asarray(image, np.float64), rendered(svg.to_svg(image, limit), image.size)
        assert np.corrcoef(given.ravel(), back.ravel())[0, 1] > 0.6


def test_without_vtracer_and_where_nothing_else_fits_it_is_a_mosaic(monkeypatch):
    image = toy.draw(3, 1, 64)[0]
    monkeypatch.setattr(svg.importlib.util, "find_spec", lambda name: None)
    fine, coarse = svg.to_svg(image, 10_000), svg.to_svg(image, 500)
    assert "h1v1h-1z" in fine and len(coarse) <= 500 < len(fine) <= 10_000
    for text in (fine, coarse):
        assert_safe(text)


def test_sixteen_bits_keep_their_tones():
    for tone in (0, 90, 255):
        deep = Image.fromarray(np.full((40, 30), tone * 257, np.uint16))
        assert set(rendered(svg.to_svg(deep), (30, 40)).ravel()) == {tone}


def test_sizes_and_limits():
    text = svg.to_svg(Image.new("L", (6000, 90), 200))
    assert 'width="6000" height="90"' in text and len(text) < svg.LEAST_BYTES
    with pytest.raises(ValueError, match="at least 400"):
        svg.to_svg(Image.new("L", (8, 8)), 399)

"""Grids: every picture on the page, every caption beneath its picture, whatever the words are."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tokun.render.grids import ELLIPSIS, MAX_LINES, _font, _wrap, captioned_grid, gif, on_one_size, pair_sheet, strip, to_pil

RED, BLUE = (250, 0, 0), (0, 0, 250)
HARD_CAPTIONS = [
    "",
    " \n\t ",
    "a fox\nin the snow",
    "w" * 5000,
    "word " * 5000,
    "\u200b" * 5000,
    "日本語のとても長いキャプション" * 30,
    "עברית عربى 😀👩‍👩‍👧 a\u0301\u0302",
    "null \x00, bell \x07, lone \ud800 surrogate, \U0010ffff",
]


def colour(rgb, size=(200, 200)) -> Image.Image:
    return Image.new("RGB", size, rgb)


def box_of(page: Image.Image, rgb) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the pixels of exactly that colour."""
    rows, columns = np.nonzero((np.asarray(page) == rgb).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def ink_below(page: Image.Image, rgb) -> int:
    """Dark pixels in the 90 rows beneath the picture of that colour, within its width."""
    left, _, right, bottom = box_of(page, rgb)
    return int((np.asarray(page.convert("L"))[bottom + 2 : bottom + 92, left:right] < 128).sum())


def test_to_pil_maps_minus_one_to_black_and_one_to_white():
    gray = to_pil(torch.tensor([[[-1.0, 0.0, 1.0, 3.0]]]))
    assert (gray.mode, gray.size, list(gray.tobytes())) == ("L", (4, 1), [0, 128, 255, 255])
    rgb = to_pil(np.stack([np.ones((2, 3)), -np.ones((2, 3)), np.ones((2, 3))]))
    assert (rgb.mode, rgb.size, rgb.getpixel((2, 1))) == ("RGB", (3, 2), (255, 0, 255))
    assert to_pil(torch.zeros(5, 4, dtype=torch.bfloat16, requires_grad=True)).size == (4, 5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "shape"),
        (np.zeros((2, 8, 8)), "shape"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "127.5"),
        (np.full((8, 8), np.nan), "64 of 64"),
    ],
)
def test_to_pil_refuses_what_has_no_right_colour(image, message):
    with pytest.raises(ValueError, match=message):
        to_pil(image)


def test_each_caption_is_written_below_its_own_picture():
    page = captioned_grid([colour(RED), colour(BLUE)], ["a fox in the snow", ""])
    assert ink_below(page, RED) > 100
    assert ink_below(page, BLUE) == 0
    page = captioned_grid([colour(RED), colour(BLUE)], ["", "two ships\nat anchor"], columns=1)
    assert box_of(page, RED)[3] < box_of(page, BLUE)[1] < box_of(page, RED)[3] + 50
    assert ink_below(page, BLUE) > 100


def test_pictures_keep_their_pixels_and_reading_order():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    page = captioned_grid([colour(RED), picture, colour(BLUE)], ["", "x", ""], columns=2)
    red, blue = box_of(page, RED), box_of(page, BLUE)
    assert red[0] == blue[0] and red[3] < blue[1]
    gap = 200 // 10
    assert page.crop((red[2] + gap, red[1], red[2] + gap + 200, red[3])).tobytes() == picture.tobytes()


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_reduced():
    def side(image, **options):
        left, top, right, bottom = box_of(captioned_grid([image], ["x"], **options), RED)
        return right - left, bottom - top

    assert side(colour(RED, (64, 64))) == (192, 192)
    assert side(colour(RED, (128, 64))) == (256, 128)
    assert side(colour(RED, (256, 256))) == (256, 256)
    assert side(colour(RED, (1024, 512))) == (512, 256)
    assert side(colour(RED, (64, 64)), cell=100) == (100, 100)


def test_pictures_of_one_area_and_several_shapes_stand_whole_at_one_scale_in_the_middle_of_equal_cells():
    sizes, shades = [(128, 128), (168, 96), (96, 168), (128, 128)], [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 0, 250)]
    page = captioned_grid([colour(shade, size) for shade, size in zip(shades, sizes)], ["", "", "", ""], columns=2)
    boxes = [box_of(page, shade) for shade in shades]
    assert [(right - left, bottom - top) for left, top, right, bottom in boxes] == [(2 * width, 2 * height) for width, height in sizes]
    middles = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes]
    assert (
        middles[0][1] == middles[1][1]
        and middles[2][1] == middles[3][1]
        and middles[0][0] == middles[2][0]
        and middles[1][0] == middles[3][0]
    )


def test_strips_and_animations_of_several_shapes_show_all_of_them_on_white():
    images = [colour(RED, (16, 8)), colour(BLUE, (8, 24))]
    page = strip(images)
    assert (
        page.size == (32, 24)
        and box_of(page, RED) == (0, 8, 16, 16)
        and box_of(page, BLUE) == (20, 0, 28, 24)
        and page.getpixel((0, 0)) == (255, 255, 255)
    )
    with Image.open(io.BytesIO(gif([*images, images[0]]))) as moving:
        assert moving.size == (64, 96) and moving.n_frames == 4
    same = [colour(RED), colour(BLUE)]
    assert all(a is b for a, b in zip(on_one_size(same), same))


def test_a_row_is_as_tall_as_its_longest_caption():
    captions = ["one", "one two three four five six seven eight nine ten " * 2]
    images = [colour(RED), colour(BLUE)]
    short, long = captioned_grid(images, captions[:1] * 2), captioned_grid(images, captions)
    assert long.width == short.width
    assert long.height > short.height
    assert captioned_grid(images, [captions[1]] * 2).height == long.height
    assert captioned_grid(images, ["", ""]).height < short.height


def test_captions_wrap_between_words_and_end_in_an_ellipsis():
    font = _font(14)
    assert _wrap("a fox", font, 200) == ["a fox"]
    words = "the quick brown fox jumps over the lazy dog by the river"
    assert " ".join(_wrap(words, font, 200)) == words
    assert len(_wrap(words, font, 200)) > 1
    lines = _wrap(words * 20, font, 200)
    assert len(lines) == MAX_LINES == 4 and lines[-1].endswith(ELLIPSIS)
    assert "".join(_wrap("incomprehensibilities" * 2, font, 100)) == "incomprehensibilities" * 2


@pytest.mark.parametrize("caption", HARD_CAPTIONS)
@pytest.mark.parametrize("width", [40, 200])
def test_any_caption_stays_within_its_cell(caption, width):
    font = _font(14)
    lines = _wrap(caption, font, width)
    assert len(lines) <= MAX_LINES
    assert all(font.getlength(line) <= width for line in lines)


def test_any_caption_can_be_drawn():
    page = captioned_grid([colour(RED)] * len(HARD_CAPTIONS), HARD_CAPTIONS, cell=60, columns=3)
    assert page.mode == "RGB"


def test_any_picture_can_be_drawn():
    modes = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]
    images = [Image.new(mode, size) for mode in modes for size in [(1, 300), (300, 1), (7, 5)]]
    assert captioned_grid(images, [image.mode for image in images]).size[0] > 300
    clear = captioned_grid([Image.new("RGBA", (200, 200), (0, 0, 0, 0))], [""])
    assert np.asarray(clear).min() > 128, "what is transparent shows the page"


def test_the_same_pairs_make_the_same_page():
    pair = [colour(RED)] * 3, ["one", "two", "three"]
    assert captioned_grid(*pair).tobytes() == captioned_grid(*pair).tobytes()


def test_grids_refuse_what_they_cannot_set():
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        captioned_grid([colour(RED)] * 2, ["one"])
    with pytest.raises(ValueError, match="at least one picture"):
        captioned_grid([], [])
    with pytest.raises(ValueError, match="columns=0"):
        captioned_grid([colour(RED)], [""], columns=0)


def test_pair_sheet_sets_the_reconstruction_right_of_its_original_under_its_label():
    sheet = pair_sheet([(colour(RED), colour(BLUE))], labels=("original", "reconstruction"))
    red, blue = box_of(sheet, RED), box_of(sheet, BLUE)
    assert red[1::2] == blue[1::2] and red[2] < blue[0] < red[2] + 10
    above = np.asarray(sheet.convert("L"))[: red[1] - 2]
    assert (above[:, red[0] : red[2]] < 128).any() and (above[:, blue[0] : blue[2]] < 128).any()
    assert pair_sheet([(colour(RED), colour(BLUE))]).height < sheet.height


def test_pair_sheet_holds_every_row():
    page = np.asarray(pair_sheet([(colour(RED, (20, 20)), colour(BLUE, (20, 20)))] * 7, cell=20))
    for rgb in (RED, BLUE):
        assert (page == rgb).all(axis=-1).sum() == 7 * 20 * 20


def test_pair_sheet_refuses_uneven_rows_and_labels():
    pair = (colour(RED), colour(BLUE))
    with pytest.raises(ValueError, match="same number"):
        pair_sheet([pair, pair[:1]])
    with pytest.raises(ValueError, match="1 labels for rows of 2"):
        pair_sheet([pair], labels=["original"])
    with pytest.raises(ValueError, match="at least one row"):
        pair_sheet([])

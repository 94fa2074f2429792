"""Larger pictures: three ways of enlarging, in every file that holds pictures, and sheets that show the original and the cut."""

import json

import numpy as np
import pytest
from PIL import Image

import sample
from tests.small_runs import needs
from tokun.render import scale
from tokun.utils.errors import UserError


def toned(width: int, height: int) -> Image.Image:
    """A dark disc on a light slope."""
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    return Image.fromarray(np.where(disc, 30, 180 + 60 * x // width).astype(np.uint8))


def test_each_pixel_becomes_a_square_or_the_picture_stays_smooth():
    image = toned(24, 40)
    square, smooth = (np.asarray(scale.scaled(image, 3, by)) for by in ("nearest", "lanczos"))
    assert square.shape == smooth.shape == (120, 72)
    assert (square == np.asarray(image).repeat(3, 0).repeat(3, 1)).all()
    assert len(np.unique(smooth)) > len(np.unique(square)) and scale.scaled(image, 1) is image


@needs("vtracer", reason="drawings are traced with the extra 'svg'")
@needs("resvg_py", reason="drawings are rendered with the extra 'svg'")
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_drawing_is_drawn_again_in_the_picture_s_own_size_and_mode_with_sharp_edges(mode):
    image = toned(33, 50).convert(mode)
    drawn = scale.scaled(image, 4, "svg")
    assert drawn.size == (132, 200) and drawn.mode == mode
    smooth, sharp = (np.asarray(one.convert("L"), float) for one in (scale.scaled(image, 4), drawn))
    assert np.abs(smooth - sharp).mean() < 16, "the same picture"
    assert np.abs(np.diff(sharp)).max() > np.abs(np.diff(smooth)).max(), "whose edges are sharper"
    assert scale.scaled(Image.new(mode, (8, 8), "white"), 2, "svg").getextrema() in ((255, 255), ((255, 255),) * 3)


@pytest.mark.parametrize(
    ("times", "by", "named"),
    [(0, "lanczos", "0; it must be"), (33, "nearest", "from 1 to 32"), (2.0, "svg", "whole"), (2, "bicubic", "nearest, lanczos, svg")],
)
def test_a_scale_or_a_method_that_there_is_not_is_named(times, by, named):
    with pytest.raises(UserError, match=named):
        scale.Enlarge(times, by)


def test_the_cut_is_drawn_where_two_parts_meet_and_not_at_the_picture_s_own_edge():
    pixels = np.asarray(scale.with_cut(Image.new("L", (64, 64), 128), (0, 0, 1, 0.5))).astype(int)
    red = (pixels[..., 0] > pixels[..., 1] + 60).any(1)
    assert pixels.shape == (512, 512, 3) and red[252:260].any() and not red[:250].any() and not red[262:].any()
    white = (pixels[252:260] == 255).all(-1)
    assert white.any(), "red and white in turns"


def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_pictures_and_grids_of_every_direction_are_enlarged_and_the_codes_stay(checkpoint_folder, tmp_path):
    toned(40, 50).save(tmp_path / "plate.png")
    plate, common = str(tmp_path / "plate.png"), ["--checkpoint", str(checkpoint_folder), "--n", "2"]
    sample.main([*common, "--out", str(tmp_path / "plain")])
    sample.main([*common, "--scale", "4", "--scale-by", "nearest", "--out", str(tmp_path / "large")])
    before, after = read(tmp_path / "plain"), read(tmp_path / "large")
    assert [r["codes"] for r in before] == [r["codes"] for r in after]
    assert "scale" not in before[0] and (after[0]["scale"], after[0]["scale_by"]) == (4, "nearest")
    small, large = (np.asarray(Image.open(tmp_path / name / before[0]["file_name"])) for name in ("plain", "large"))
    assert (large == small.repeat(4, 0).repeat(4, 1)).all()
    sample.main([*common, "--scale", "32", "--out", str(tmp_path / "large")])
    with Image.open(tmp_path / "large" / "grid.png") as grid, Image.open(tmp_path / "plain" / "grid.png") as usual:
        assert grid.width > 2 * 1024 > usual.width
    for direction in (["--complete", plate, "--keep", "left"], ["--invert", plate, "--caption", "a ship"]):
        sample.main([*common, *direction, "--scale", "2", "--out", str(tmp_path / "made")])
        (first, _), sheet = read(tmp_path / "made"), Image.open(tmp_path / "made" / "sheet.png")
        with Image.open(tmp_path / "made" / first["file_name"]) as image:
            assert image.size == (64, 64)
        red = (np.asarray(sheet).astype(int) @ (1, -1, 0) > 60).any()
        assert red == (direction[0] == "--complete"), "the cut"
    sample.main([*common, "--out", str(tmp_path / "made")])
    assert not (tmp_path / "made" / "sheet.png").exists(), "it would be taken for the new run's"
    sample.main([*common[:2], "--interpolate", "1", "2", "--steps", "3", "--scale", "4", "--out", str(tmp_path / "way")])
    with Image.open(tmp_path / "way" / "strip.png") as strip, Image.open(tmp_path / "way" / "interpolation.gif") as moving:
        assert strip.size == (3 * 128, 128) and moving.size == (128, 128)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--scale-by", "svg"], "--scale"), (["--scale", "2", "--shard-size", "5"], "no effect on shards"), (["--scale", "0"], "at least 1"),
     (["--image", "a.png", "--scale", "2"], "no effect with --image")],
)  # fmt: skip
def test_a_scale_without_effect_is_told(capsys, arguments, named):
    with pytest.raises(SystemExit):
        sample.main(arguments)
    assert named in capsys.readouterr().err

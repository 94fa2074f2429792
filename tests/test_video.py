"""Promises of tokun/render/video.py: the film shows the pictures, in order, there and back."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tokun.cli import sample
from tokun.render import video

film = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra 'video')")


def frames_of(path) -> tuple[str, np.ndarray]:
    """(what ffmpeg says of the file, its frames as uint8 (T, H, W, 3))."""
    command = [film.get_ffmpeg_exe(), "-nostdin", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    told = done.stderr.decode()
    width, height = map(int, re.search(r"Video: .* (\d+)x(\d+)", told).groups())
    return told, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def test_every_picture_is_seen_there_and_back(tmp_path):
    shades = [Image.linear_gradient("L").resize((33, 47)).point(lambda tone, step=step: tone * step // 4) for step in (4, 3, 2, 1)]
    video.write_mp4(shades, tmp_path / "way.mp4")
    told, frames_THWC = frames_of(tmp_path / "way.mp4")
    assert re.search(r"Video: h264.*yuv420p.*198x282", told) and frames_THWC.shape == (6, 282, 198, 3)
    minutes, seconds = re.search(r"Duration: 00:(\d+):([\d.]+)", told).groups()
    assert 60 * int(minutes) + float(seconds) == pytest.approx(6 * video.SECONDS, abs=0.2)
    for frame, shade in zip(frames_THWC, [shades[i] for i in (0, 1, 2, 3, 2, 1)], strict=True):
        shown = np.asarray(shade.resize((198, 282), Image.Resampling.NEAREST), float)
        assert np.abs(frame.mean(-1) - shown).mean() < 4


def test_odd_sides_grow_by_a_pixel(tmp_path):
    video.write_mp4([Image.new("RGB", (301, 257), colour) for colour in ("white", "black")], tmp_path / "odd.mp4")
    _, frames_THWC = frames_of(tmp_path / "odd.mp4")
    assert frames_THWC.shape == (2, 258, 302, 3) and [round(frame.mean()) // 250 for frame in frames_THWC] == [1, 0]


def test_sample_py_writes_the_film_beside_strip_and_gif(checkpoint_folder, tmp_path):
    sample.main(["--checkpoint", str(checkpoint_folder), "--interpolate", "1", "2", "--steps", "4", "--video", "--out", str(tmp_path)])
    _, frames_THWC = frames_of(tmp_path / "interpolation.mp4")
    assert frames_THWC.shape == (6, 256, 256, 3) and {"strip.png", "interpolation.gif"} <= {path.name for path in tmp_path.iterdir()}
    with Image.open(tmp_path / "strip.png") as strip:
        ends = [strip.crop((32 * i, 0, 32 * i + 32, 32)).resize((256, 256), Image.Resampling.NEAREST) for i in (0, 3)]
    for end, frame in zip(ends, frames_THWC[[0, 3]]):
        assert np.abs(np.asarray(end, float) - frame.mean(-1)).mean() < 8


def test_want_of_ffmpeg_is_told_before_anything_is_sampled(checkpoint_folder, tmp_path, monkeypatch):
    common = ["--checkpoint", str(checkpoint_folder), "--interpolate", "1", "2", "--video", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(film, "get_ffmpeg_exe", lambda: (_ for _ in ()).throw(RuntimeError("No ffmpeg exe could be found")))
    with pytest.raises(OSError, match="no ffmpeg for this machine: install one"):
        sample.main(common)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"extra 'video': in tokun's own folder, pip install -e '.\[video\]'"):
        sample.main(common)
    assert not (tmp_path / "out").exists()

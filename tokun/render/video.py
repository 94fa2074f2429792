"""MP4: pictures as a short video that plays everywhere (H.264, 4:2:0), made by the ffmpeg of imageio-ffmpeg. Knows pictures only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tokun.render.grids import on_one_size
from tokun.utils.optional_packages import need

SECONDS = 0.15  # per picture
LEAST = 256  # pixels: smaller pictures are enlarged by a whole factor, since players would blur them


def require_ffmpeg() -> None:
    """Raise ImportError if imageio-ffmpeg is missing, or OSError if it has no program for this machine."""
    try:
        need("imageio_ffmpeg", extra="video").get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(f"imageio-ffmpeg has no ffmpeg for this machine: install one, and name it in IMAGEIO_FFMPEG_EXE ({error})") from error


def write_mp4(images: Sequence[Image.Image], path: Path) -> None:
    """Write the pictures forwards and backwards, so that the video loops. Different shapes are padded with white. Odd sides grow by a
    pixel, as H.264 requires."""
    require_ffmpeg()
    film = need("imageio_ffmpeg", extra="video")
    images = on_one_size(images)
    width, height = images[0].size
    times = max(1, -(-LEAST // max(width, height)))
    size = width * times + width * times % 2, height * times + height * times % 2
    # name the encoder: otherwise the library tries the machine's hardware encoders, and videos differ
    writer = film.write_frames(str(path), size, fps=1 / SECONDS, codec="libx264", macro_block_size=1, quality=8, ffmpeg_log_level="error")
    writer.send(None)
    for image in [*images, *images[-2:0:-1]]:
        writer.send(image.convert("RGB").resize(size, Image.Resampling.NEAREST).tobytes())
    writer.close()

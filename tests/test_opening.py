"""One way to open a picture: prepare, the demo, sample.py --image, training, encode and captioning see the same pixels."""

import io
import json
import struct
import tarfile
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_tools.images.image_ops import encode
from tokun import data
from tokun.app import demo
from tokun.data import image_files
from tokun.inference import image_to_codes


def upright():
    """Black on the left, grey on the top right: no turn of it is itself."""
    image = Image.new("L", (200, 100), 255)
    image.paste(0, (0, 0, 100, 100))
    image.paste(128, (150, 0, 200, 50))
    return image


TURNS = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_a_phone_saves_it(orientation, kind="PNG"):
    exif = Image.Exif()
    exif[0x112] = orientation
    turned = upright() if TURNS[orientation] is None else upright().transpose(TURNS[orientation])
    return saved(turned, kind, exif=exif)


def shard(path, content, suffix):
    with tarfile.open(path, "w") as tar:
        for name, payload in ((f"0.{suffix}", content), ("0.json", json.dumps({"caption": "A wall."}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return data.ImageSamples.open(str(path), image_size=100, channels=1)


@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_picture_is_upright_wherever_it_is_opened(orientation, tmp_path):
    content = as_a_phone_saves_it(orientation)
    (tmp_path / "phone.png").write_bytes(content)
    samples = shard(tmp_path / "train-00000.tar", content, "png")
    seen = {
        "prepare": image_files.decode(content), "the demo": demo.open_upload(content, 1),
        "--image": image_to_codes.open_picture(tmp_path / "phone.png", 1),
        "bytes": image_to_codes.open_picture(content, 1), "a PIL picture": image_to_codes.open_picture(Image.open(io.BytesIO(content)), 1),
        "training": samples.picture(0),
    }  # fmt: skip
    for where, image in seen.items():
        assert np.array_equal(np.asarray(image), np.asarray(upright())), where
    assert samples.sizes.tolist() == [[200, 100]] and image_files.size_of(content) == (200, 100), "by the header alone too"


@pytest.mark.parametrize("kind", ["webp", "jpg", "png"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_prepare_wrote_is_decoded_to_the_bits_of_before(kind, mode):
    noise = np.random.default_rng(3).integers(0, 255, (37, 53) if mode == "L" else (37, 53, 3), np.uint8)
    for image in (Image.fromarray(noise), upright().convert(mode)):
        content = encode(image, kind)
        for channels, wanted in ((1, "L"), (3, "RGB")):
            before = Image.open(io.BytesIO(content)).convert(wanted)
            assert np.array_equal(np.asarray(data.decode_image(content, channels)), np.asarray(before))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_twelve_bits_in_sixteen_are_scaled_by_their_own_white(kind):
    tones = np.linspace(0, 4095, 256).round().astype(np.uint16)[None].repeat(4, 0)
    assert abs(np.asarray(data.decode_image(saved(Image.fromarray(tones), kind), 1)).astype(int) - np.arange(256)).max() <= 1
    whole = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(4, 0)
    assert np.array_equal(np.asarray(data.decode_image(saved(Image.fromarray(whole), kind), 1))[0], np.arange(256))
    black = np.full((4, 4), 200, np.uint16)
    assert np.asarray(data.decode_image(saved(Image.fromarray(black), kind), 1)).max() <= 1, "a black page stays black"


def test_transparency_lies_on_white_and_a_profile_is_applied_in_training_too():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert np.asarray(data.decode_image(saved(clear, "PNG"), 1)).min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 10, 10, 200, 0, 0])
    assert np.asarray(data.decode_image(saved(palette, "PNG", transparency=0), 1)).min() == 255
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    other = saved(Image.new("RGB", (8, 8), (90, 30, 30)), "PNG", icc_profile=lab)  # of no use to RGB: left alone
    assert np.asarray(data.decode_image(other, 3))[0, 0].tolist() == [90, 30, 30]
    cmyk = saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert np.asarray(data.decode_image(cmyk, 3)).min() >= 254


def test_the_limit_of_pixels_can_be_raised_and_lowered(monkeypatch):
    content = saved(Image.effect_noise((300, 200), 50), "PNG")
    monkeypatch.setenv(image_files.LIMIT, "0.05")
    for opened in (lambda: image_files.decode(content), lambda: data.decode_image(content, 1)):
        with pytest.raises(image_files.PictureError, match="too many pixels"):
            opened()
    with pytest.raises(image_to_codes.TooLarge, match=r"more than 50,000 pixels.*--max-megapixels"):
        image_to_codes.open_picture(content, 1)
    assert image_files.decode(content, most=image_files.max_pixels(0.06)).size == (300, 200)
    monkeypatch.setenv(image_files.LIMIT, "0.06")
    assert image_to_codes.open_picture(content, 1).size == (300, 200)
    for wrong in ("many", "-3", "nan", "0"):
        monkeypatch.setenv(image_files.LIMIT, wrong)
        with pytest.raises(ValueError, match=image_files.LIMIT):
            image_files.max_pixels()


def test_heic_is_read_with_its_library_and_refused_in_one_line_without(monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    content = saved(upright().convert("RGB"), "HEIF", quality=95)
    found = np.asarray(data.decode_image(content, 1)).astype(int)
    assert found.shape == (100, 200) and abs(found - np.asarray(upright()))[:, 5:90].mean() < 4
    assert image_files.size_of(content) == (200, 100)
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name not in ("HEIF", "AVIF")})
    monkeypatch.setattr(image_files, "know_formats", lambda: None)
    with pytest.raises(image_files.PictureError, match="pillow-heif"):
        data.decode_image(content, 1)
    with pytest.raises(ValueError, match=r"the picture is not .* pillow-heif"):
        image_to_codes.open_picture(content, 1)
    with pytest.raises(image_files.PictureError, match=r"AVIF .*Pillow"):
        image_files.decode(b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf" + bytes(50))


def test_threads_that_open_pictures_leave_the_filters_of_warnings_as_they_are():
    content, before = as_a_phone_saves_it(6, "JPEG"), warnings.filters[:]
    image_files.decode(content)
    assert warnings.filters == before
    threads = [threading.Thread(target=lambda: [image_files.decode(content) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one for one in warnings.filters if one not in before] in ([], [("ignore", None, Warning, warnings.filters[0][3], 0)])


def png_16(values, *more):
    """(H, W, 1, 3 or 4) uint16 -> a PNG of 16 bits a colour, which Pillow cannot write, with `more` chunks (kind, body)."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def tiff_16(values, order="<"):
    """(H, W, 3) uint16 -> an uncompressed TIFF of 16 bits a colour."""
    height, width, _ = values.shape
    pixels, at = values.astype(f"{order}u2").tobytes(), 8
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, at + len(pixels)), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, at),
        (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(pixels)), (284, 3, 1, 1),
    ]  # fmt: skip
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value))
        for tag, kind, count, value in tags
    )
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", at + len(pixels) + len(bits))
    return head + pixels + bits + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("file", [png_16, tiff_16, lambda values: tiff_16(values, ">")], ids=["PNG", "TIFF", "TIFF, the other byte order"])
def test_twelve_bits_of_each_colour_in_sixteen_are_scaled_by_their_own_white(file):
    """Scans of 12 bits saved in 16: each colour used four bits of the eight that are kept, and the picture was nearly black."""
    ramp = np.linspace(0, 4095, 64).round().astype(np.uint16)
    tones = np.stack([ramp, ramp[::-1], ramp], -1)[None].repeat(4, 0)
    found = np.asarray(data.decode_image(file(tones), 3)).astype(int)
    assert abs(found - tones / 4095 * 255).max() <= 0.51
    whole = tones * 16
    assert np.array_equal(np.asarray(data.decode_image(file(whole), 3)), whole >> 8), "16 bits are as before"
    dark = np.full((4, 8, 3), 200, np.uint16)
    assert np.asarray(data.decode_image(file(dark), 3)).max() == 0, "a black page stays black"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", range(9, 15))
def test_any_number_of_bits_in_sixteen_is_scaled_by_its_own_white(bits, channels):
    """Data of 10 or 14 bits came out dark. What the file declares counts; else the largest number tells. A dull picture stays dull."""

    def opened(tones, *more):
        tones = np.asarray(tones, np.uint16)[None, :, None].repeat(4, 0).repeat(channels, 2)
        return np.asarray(data.decode_image(png_16(tones, *more), channels)).reshape(4, -1, channels)[0, :, 0].astype(int)

    white = 2**bits - 1
    ramp = np.linspace(0, white, 64).round()
    assert abs(opened(ramp) - ramp / white * 255).max() <= 0.51
    declares = lambda number: (b"sBIT", bytes([number] * channels))  # noqa: E731
    assert abs(opened(ramp / 4, declares(bits)) - ramp / white * 64).max() <= 1, "an underexposed one stays so where its bits are known"
    for wrong in (15, 17, 32, 200):  # taken for 16
        assert opened(ramp * 2 ** (16 - bits), declares(wrong)).max() >= 254
    assert opened(ramp, declares(16)).max() <= 64 and opened(ramp * 2 ** (16 - bits), declares(bits)).max() >= 254
    assert opened([0, 2**14]).max() == 64 and opened([0, 200]).max() <= 1  # 0.8, cut off or rounded


def test_a_tiff_that_declares_its_white_is_scaled_by_it():
    tones = np.linspace(0, 900, 64).round().astype(np.uint16)[None].repeat(4, 0)
    for tag, value in ((image_files.MAX_SAMPLE_VALUE, 4095), (image_files.WHITE_LEVEL, 4000)):
        content = saved(Image.fromarray(tones), "TIFF", tiffinfo={tag: value})
        assert abs(np.asarray(data.decode_image(content, 1)).astype(int) - tones / 4095 * 255).max() <= 0.51
    assert np.asarray(data.decode_image(saved(Image.fromarray(tones), "TIFF"), 1)).max() == round(900 / 1023 * 255)


def test_twelve_bits_with_transparency():
    tones = np.full((4, 4, 4), 4095, np.uint16)
    tones[0] = 0
    for opaque in (4095, 65535):
        tones[..., 3] = opaque
        found = np.asarray(data.decode_image(png_16(tones), 3))
        assert found[0].max() == 0 and found[1:].min() == 255


def test_inspect_and_questions_see_what_training_sees(tmp_path):
    from data_tools import inspect, questions

    content = as_a_phone_saves_it(6, "JPEG")
    shard(tmp_path / "train-00000.tar", content, "jpg")
    for verify in (False, True):
        inventory = inspect.take_inventory(inspect.find_shards([tmp_path]), verify=verify, sheet=1)
        assert inventory.sizes == [(200, 100)] and inventory.formats == {"JPEG": 1} and not inventory.damaged
        assert inventory.sheet[0][0].size == (200, 100)
    (pair,) = inspect.read_pairs(tmp_path / "train-00000.tar", [])
    assert questions.open_image(pair, []).size == (200, 100)


def test_inspect_keeps_the_same_limit_of_pixels(tmp_path, monkeypatch):
    from data_tools import inspect

    shard(tmp_path / "train-00000.tar", saved(Image.effect_noise((300, 200), 50), "PNG"), "png")
    monkeypatch.setenv(image_files.LIMIT, "0.05")
    for verify in (False, True):
        (damage,) = inspect.take_inventory(inspect.find_shards([tmp_path]), verify=verify).damaged
        assert "too many pixels" in str(damage)

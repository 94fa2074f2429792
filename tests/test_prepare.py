"""Promises of data_tools/prepare.py, on real files made on the spot."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_tools import prepare as tool
from data_tools.prepare import Settings, Words, main, prepare

pq = pytest.importorskip("pyarrow.parquet", reason="prepare writes Parquet: pip install 'tokun[data]'")

ROOT = Path(__file__).resolve().parents[1]


def picture(seed: int, size: tuple[int, int] = (96, 80), mode: str = "L") -> Image.Image:
    """Coarse random tiles: no two seeds look alike, and a resized one keeps its dHash."""
    channels = () if mode == "L" else (3,)
    tiles = np.random.default_rng(seed).integers(0, 256, (5, 6, *channels), dtype=np.uint8)
    return Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST)


def save(path: Path, image: Image.Image, format: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format, **options)
    return path


def manifest(out: Path) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(out / "manifest.parquet").to_pylist()}


def pairs(out: Path) -> dict[str, tuple[dict, Image.Image]]:
    """{path of the original: (its JSON, its picture)} over all shards."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            data = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for name, text in data.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                image = next(data[f"{key}.{kind}"] for kind in ("webp", "png") if f"{key}.{kind}" in data)
                record = json.loads(text)
                found[record["path"]] = (record, Image.open(io.BytesIO(image)))
    return found


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def run(source: Path, out: Path, *options: str) -> int:
    return main([str(source), "--style", "engraving", "--out", str(out), "--workers", "1", *options])


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size with a few bytes of pixels: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


# ---- hostile files --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_every_hostile_file_is_rejected_with_its_reason(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "a good one.png", picture(1))
    jpeg = save(source / "truncated wolf.jpg", picture(2, (300, 300)), quality=95)
    jpeg.write_bytes(jpeg.read_bytes()[:2000])
    png = save(source / "flipped bytes.png", picture(3))
    png.write_bytes(png.read_bytes()[:60] + b"\0" * 40 + png.read_bytes()[100:])
    (source / "zero bytes.jpg").write_bytes(b"")
    (source / "no picture.jpg").write_text("<html>404</html>")
    (source / "postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n")
    (source / "bomb huge.png").write_bytes(png_header(60_000, 60_000))
    (source / "bomb large.png").write_bytes(png_header(12_000, 10_000))
    save(source / "tiny thing.png", picture(4, (40, 40)))
    save(source / "long thing.png", picture(5, (300, 70)))
    save(source / "white page.png", Image.new("RGB", (90, 90), "white"))
    save(source / "clear page.png", Image.new("RGBA", (90, 90), (0, 0, 0, 0)))
    save(source / "black page.jpg", Image.new("RGB", (90, 90)))
    speck = Image.new("L", (200, 200), 255)
    speck.paste(0, (100, 100, 106, 106))
    save(source / "nearly blank.png", speck)
    save(source / "IMG_1234.png", picture(6))
    save(source / "b exact copy.png", picture(1))
    save(source / "c near copy.jpg", picture(1, (192, 160)), quality=90)
    save(tmp_path / "secret.png", picture(7))
    (source / "link out.png").symlink_to(tmp_path / "secret.png")
    (source / "link nowhere.png").symlink_to(source / "absent.png")
    (source / "link folder").symlink_to(tmp_path)
    (source / "link round").symlink_to(source)
    os.mkfifo(source / "a pipe.png")
    save(source / "caption leak.png", picture(8))
    (tmp_path / "secret.txt").write_text("a secret")
    (source / "caption leak.txt").symlink_to(tmp_path / "secret.txt")
    save(source / "caption broken.png", picture(9))
    (source / "caption broken.json").write_text('{"caption": "half')

    assert run(source, out) == 0
    rows = manifest(out)
    assert {path: row["reason"] for path, row in rows.items()} == {
        "a good one.png": "",
        "truncated wolf.jpg": "truncated or damaged",
        "flipped bytes.png": "truncated or damaged",
        "zero bytes.jpg": "empty file",
        "no picture.jpg": "not a picture that can be read",
        "postscript.jpg": "not a picture that can be read",
        "bomb huge.png": "too many pixels",
        "bomb large.png": "too many pixels",
        "tiny thing.png": "too small",
        "long thing.png": "too long for its width",
        "white page.png": "blank",
        "clear page.png": "blank",
        "black page.jpg": "blank",
        "nearly blank.png": "blank",
        "IMG_1234.png": "no caption",
        "b exact copy.png": "exact duplicate",
        "c near copy.jpg": "near duplicate",
        "link out.png": "symlink leaves the source",
        "link nowhere.png": "broken symlink",
        "link folder": "symlink leaves the source",
        "link round": "symlink to a folder",
        "a pipe.png": "not a regular file",
        "caption leak.png": "caption file: symlink leaves the source",
        "caption broken.png": "caption file is not valid JSON",
    }
    assert all((row["status"] == "kept") == (row["reason"] == "") == (row["shard"] is not None) for row in rows.values())
    assert set(pairs(out)) == {"a good one.png"}


def test_a_file_cut_at_any_byte_is_decoded_whole_or_refused(tmp_path):
    for format, options in (
        ("JPEG", {"quality": 90}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("BMP", {}),
    ):
        buffer = io.BytesIO()
        picture(1).save(buffer, format, **options)
        data = buffer.getvalue()
        whole = tool.decode(data).size
        for end in range(0, len(data) - 1, max(1, len(data) // 40)):
            try:
                assert tool.decode(data[:end]).size == whole
            except tool.PictureError as error:
                assert str(error)


# ---- odd but good files ---------------------------------------------------------------------------------------------


def test_odd_names_and_wrong_extensions_are_kept(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    names = [
        "-a leading dash.png",
        "Größe — кот 猫.png",
        "two  spaces . and. dots.png",
        ".a hidden wolf.png",
        "x y\nnew line.png",
    ]
    for seed, name in enumerate(names):
        save(source / name, picture(seed))
    save(source / "really a jpeg.png", picture(20), "JPEG")
    save(source / "no suffix at all", picture(21), "PNG")
    save(source / "wrong kind.dat", picture(22), "GIF")
    (source / "notes.dat").write_text("not a picture, and not named like one")
    names += ["really a jpeg.png", "no suffix at all", "wrong kind.dat"]
    if sys.platform == "linux":
        save(Path(os.fsdecode(os.fsencode(source / "a bad ") + b"\xff name.png")), picture(23))
        names.append("a bad \\xff name.png")
    assert run(source, out, "--allow-missing-captions") == 0
    rows = manifest(out)
    assert {path: row["reason"] for path, row in rows.items()} == dict.fromkeys(names, "")
    assert all(not set("./") & set(row["key"]) for row in rows.values())
    assert pairs(out)["Größe — кот 猫.png"][0]["caption"] == "Größe — кот 猫"


def roundtrip(image: Image.Image, format: str, **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return np.asarray(tool.decode(buffer.getvalue())).astype(int)


def test_every_mode_decodes_to_the_same_grays():
    gray = picture(1)
    expected = np.asarray(gray).astype(int)
    wide = Image.fromarray(expected.astype(np.uint16) * 257)
    palette = Image.merge("RGB", (gray,) * 3).quantize(256)
    gif_frames = [picture(2).convert("P")]
    assert (roundtrip(gray, "PNG") == expected).all()
    assert (roundtrip(wide, "PNG") == expected).all(), "16 bits are scaled"
    assert (roundtrip(wide, "TIFF") == expected).all()
    assert (roundtrip(Image.fromarray((expected / 255).astype(np.float32)), "TIFF") == expected).all()
    assert (roundtrip(palette, "PNG") == expected).all()
    assert (roundtrip(gray.convert("LA"), "PNG") == expected).all()
    animated = roundtrip(gray.convert("P"), "GIF", save_all=True, append_images=gif_frames)
    assert (animated == expected).all(), "the first frame"
    assert animated.ndim == 2, "a gray palette stays grayscale"
    cmyk = roundtrip(Image.merge("RGB", (gray,) * 3).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(cmyk - expected[..., None]).mean() < 3


def test_transparency_is_laid_on_white():
    image = picture(1, mode="RGB").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    pixels = roundtrip(image, "PNG")
    assert pixels[0].min() > 250 and np.abs(pixels[-1] - np.asarray(image)[-1, :, :3]).max() <= 5
    one_bit = Image.new("1", (20, 20), 0)
    assert (roundtrip(one_bit, "PNG", transparency=0) == 255).all()


def test_exif_orientation_is_applied_and_broken_exif_is_survived(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert roundtrip(picture(1, (96, 80)), "JPEG", exif=exif).shape == (96, 80)
    assert roundtrip(picture(1, (96, 80)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff").shape == (80, 96)


def test_colour_profiles_are_applied_and_broken_ones_survived():
    swatch = Image.new("RGB", (8, 8), (200, 100, 50))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "GRB!".encode("utf-16-be"))
    for profile in (lab, srgb, srgb[:100], b"garbage"):
        assert (roundtrip(swatch, "PNG", icc_profile=profile) == (200, 100, 50)).all()
    assert (np.abs(roundtrip(swatch, "PNG", icc_profile=swapped) - (100, 200, 50)) < 25).all()


def test_written_pictures_have_the_short_side_and_stay_gray(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "a large one.png", picture(1, (300, 200)))
    save(source / "a small one.png", picture(2, (70, 90)))
    save(source / "in colour.png", picture(3, (200, 200), mode="RGB"))
    for format, options in (("webp", ()), ("png", ("--lossless",))):
        assert run(source, out, "--side", "128", "--overwrite", *options) == 0
        found = pairs(out)
        assert found["a large one.png"][1].size == (192, 128)
        assert found["a small one.png"][1].size == (105, 135), "enlarged 1.5 times at most"
        assert all(image.format.lower() == format for _, image in found.values())
        gray = np.asarray(found["a large one.png"][1].convert("RGB"))
        assert np.ptp(gray, axis=2).max() <= 1, "WebP has no gray mode; its decoder rounds by one level"
        assert np.ptp(np.asarray(found["in colour.png"][1].convert("RGB")), axis=2).max() > 50
        record = found["a large one.png"][0]
        assert (record["width"], record["height"]) == (192, 128)
    assert found["a large one.png"][1].mode == "L"


# ---- captions -------------------------------------------------------------------------------------------------------


def test_captions_come_from_each_source_in_the_order_of_preference(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    names = ["by text", "by json", "by table", "by semicolons/inner", "by lines/inner", "by_name-03", "empty text"]
    for seed, name in enumerate(names):
        save(source / f"{name}.png", picture(seed))
    (source / "by text.txt").write_text("  A <b>wolf</b>,\n&amp; a lamb \x00 ", encoding="utf-16")
    sidecar = {
        "caption": "A castle",
        "captions": {"poetic": "O walls!"},
        "subject": "Old Castles",
        "license": "CC0",
        "x": 3,
    }
    (source / "by json.json").write_text(json.dumps(sidecar))
    (source / "by text.json").write_text('{"caption": "not this one", "source_url": "http://127.0.0.1/wolf"}')
    table = "file_name,caption\nby table.png,A table\nby text.png,nor this\nby json.png,nor this\nabsent.png,A ghost\n"
    (source / "metadata.csv").write_text("\ufeff" + table, encoding="utf-8")
    (source / "by semicolons" / "captions.csv").write_text('Image;Title\ninner.png;"A ship; at sea"\n', encoding="utf-8")
    (source / "by lines" / "metadata.jsonl").write_text('{"path": "./inner.png", "text": "A tower"}\n\n')
    (source / "empty text.txt").write_text(" \n")
    report = prepare(source, out, Settings(style="engraving", license="public domain", val=0))
    found = {path.removesuffix(".png"): record for path, (record, _) in pairs(out).items()}
    assert {name: record["caption"] for name, record in found.items()} == {
        "by text": "A wolf, & a lamb",
        "by json": "A castle",
        "by table": "A table",
        "by semicolons/inner": "A ship; at sea",
        "by lines/inner": "A tower",
        "by_name-03": "by name",
        "empty text": "empty text",
    }
    assert found["by json"]["captions"] == {"plain": "A castle", "poetic": "O walls!"}
    assert found["by json"]["subject"] == "old-castles"
    assert found["by json"]["license"] == "CC0" and found["by table"]["license"] == "public domain"
    assert found["by text"]["source_url"] == "http://127.0.0.1/wolf"
    assert report.unmatched_rows == 1


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("the_wolf-and-the-lamb-02.jpg", "the wolf and the lamb"),
        ("WolfAndLamb.jpg", "Wolf And Lamb"),
        ("0012 siege of paris 1870.png", "siege of paris 1870"),
        ("cat.small.webp", "cat small"),
        ("The%20Raven.jpg", "The Raven"),
        ("猫.png", "猫"),
        *[
            (name, "")
            for name in (
                "IMG_1234.jpg",
                "DSC00012.JPG",
                "DSC_0012 (2).jpg",
                "p033.png",
                "i_024a.png",
                "fig12.png",
                "1.png",
                "___.png",
            )
        ],
        *[(name, "") for name in ("page-33.png", "screenshot 2021-03-04.png", "3f9a8c7d6e5b.jpg", "deadbeefcafe.jpg", "xkcd.png")],
    ],
)
def test_a_file_name_is_a_caption_when_it_reads_like_words(name, caption):
    assert tool.caption_from_name(f"some folder/{name}") == caption


def test_a_caption_is_one_clean_line():
    assert tool.clean_caption("<p>Fig.&nbsp;1 <i>A  wolf</i></p><!-- x --><script>bad()</script>") == "Fig. 1 A wolf"
    assert tool.clean_caption("2 < 3 and 5 > 4 \ud800") == "2 < 3 and 5 > 4 ?"
    assert tool.clean_caption("Cafe\u0301\u200b\r\n\x07bar") == "Café bar"


def test_missing_captions_are_kept_when_allowed(tmp_path):
    save(tmp_path / "in" / "IMG_1.png", picture(1))
    assert run(tmp_path / "in", tmp_path / "out", "--allow-missing-captions") == 0
    record, _ = pairs(tmp_path / "out")["IMG_1.png"]
    assert record["caption"] == "" and record["captions"] == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\na.png,1\n", "none is called caption"),
        ("metadata.csv", "name,caption\na.png,x\n", "none is called file_name"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n[1]\n', "line 2 holds no JSON object"),
        ("metadata.jsonl", '\n{"file_name"\n', "line 2 is not valid JSON"),
        ("captions.csv", "file_name,caption\na.png,caf\udce9\n", "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, text, message):
    save(tmp_path / "a.png", picture(1))
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        prepare(tmp_path, tmp_path / "out", Settings(style="engraving"))
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- duplicates -----------------------------------------------------------------------------------------------------


def test_near_hashes_finds_what_a_slow_search_finds():
    rng = np.random.default_rng(0)
    values = [int(value) for value in rng.integers(0, 2**63, 150)]
    for value in values[:100]:  # neighbours at 1 to 4 bits
        values.append(value ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(1, 5), replace=False)))
    near, kept = tool.NearHashes(), []
    for value in values:
        slow = any((value ^ other).bit_count() <= 2 for other in kept)
        assert near.holds(value) == slow
        if not slow:
            near.add(value)
            kept.append(value)
    assert 150 < len(kept) < 250


def test_dhash_is_imagehash_dhash():
    imagehash = pytest.importorskip("imagehash")
    for seed in range(3):
        image = picture(seed, (123, 97), mode="RGB")
        assert f"{tool.dhash(image):016x}" == str(imagehash.dhash(image))


# ---- the split, the order, the shards -------------------------------------------------------------------------------


def many(source: Path, folders: int, each: int) -> Path:
    for folder in range(folders):
        for index in range(each):
            save(source / f"book {folder}" / f"a picture of number {index}.png", picture(1000 * folder + index))
    return source


def test_folders_stay_whole_and_validation_is_never_empty(tmp_path):
    source = many(tmp_path / "in", 6, 4)
    splits = set()
    for seed in range(3):
        report = prepare(source, tmp_path / f"out{seed}", Settings(style="engraving", val=0.2, seed=seed))
        rows = manifest(tmp_path / f"out{seed}")
        by_folder = {}
        for path, row in rows.items():
            by_folder.setdefault(path.split("/")[0], set()).add(row["shard"].split("-")[0])
        assert all(len(names) == 1 for names in by_folder.values())
        assert report.pairs("val") % 4 == 0 and 4 <= report.pairs("val") <= 12
        assert report.pairs("train") + report.pairs("val") == 24
        splits.add(frozenset(folder for folder, names in by_folder.items() if names == {"val"}))
    assert len(splits) > 1, "the seed decides"


def test_without_folders_single_pictures_are_drawn():
    kept = [tool.Measured(f"{index}.png", sha256=f"{index:064x}", dhash=0) for index in range(2000)]
    settings = Settings(style="engraving", val=0.1)
    split = tool.split_by_group(kept, settings)
    assert 150 < sum(name == "val" for name in split.values()) < 250
    more = tool.split_by_group([*kept, tool.Measured("new.png", sha256="f" * 64, dhash=0)], settings)
    assert all(more[path] == name for path, name in split.items()), "a new file moves no other"
    assert "val" not in tool.split_by_group(kept, Settings(style="engraving", val=0)).values()
    assert tool.split_by_group(kept[:1], settings) == {"0.png": "train"}


def test_same_bytes_for_one_worker_and_two_and_another_order_for_another_seed(tmp_path):
    source = many(tmp_path / "in", 3, 8)
    (source / "book 0" / "broken.png").write_bytes(b"\x89PNG")
    options = ("--shard-size", "7", "--side", "64")
    assert run(source, tmp_path / "one", *options) == 0
    assert run(source, tmp_path / "two", *options, "--workers", "2") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert run(source, tmp_path / "other", *options, "--seed", "1") == 0
    with tarfile.open(tmp_path / "one" / "train-00000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 14 and {(m.mtime, m.uid, m.uname, m.mode) for m in members} == {(0, 0, "", 0o644)}
    order = [row["path"] for row in sorted(manifest(tmp_path / "one").values(), key=lambda row: row["key"] or "")]
    other = [row["path"] for row in sorted(manifest(tmp_path / "other").values(), key=lambda row: row["key"] or "")]
    assert order != other and order != sorted(order)


def test_json_and_manifest_have_the_fields_of_the_format(tmp_path):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    assert run(source, out, "--register", "social", "--source", "My Books", "--license", "public domain") == 0
    rows = manifest(out)
    columns = "path sha256 dhash width height status reason shard key license source_url"
    assert " ".join(pq.read_table(out / "manifest.parquet").column_names) == columns
    for path, (record, _) in pairs(out).items():
        assert record["captions"] == {"social": record["caption"]} and record["style"] == "engraving"
        assert record["source"] == "My Books" and record["license"] == "public domain" == rows[path]["license"]
        assert record["sha256"] == hashlib.sha256((source / path).read_bytes()).hexdigest() == rows[path]["sha256"]
        assert record["dhash"] == rows[path]["dhash"] and (rows[path]["width"], rows[path]["height"]) == (96, 80)


def test_a_file_that_changes_between_the_passes_is_rejected_not_written(tmp_path):
    path = save(tmp_path / "a wolf.png", picture(1))
    settings = Settings(style="engraving")
    measured = tool.measure(tmp_path, settings, (tool.Found("a wolf.png"), Words()))
    (spot,) = tool.place([measured], settings)
    save(path, picture(2))
    assert tool.render(tmp_path, settings, (spot, Words())).reason == "changed while being read"
    assert tool.write_shards(tmp_path, [tool.render(tmp_path, settings, (spot, Words()))], suffix="webp")[1] == {
        "a wolf.png": "changed while being read"
    }


# ---- the output folder ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
@pytest.mark.parametrize("moment", ["place", "add_member", "write_manifest"])
def test_a_killed_run_leaves_no_shard_and_the_next_run_is_whole(tmp_path, moment):
    source, out = many(tmp_path / "in", 1, 4), tmp_path / "out"
    script = (
        "import os, signal\nfrom data_tools import prepare as tool\n"
        f"tool.{moment} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"tool.main([{str(source)!r}, '--style', 'engraving', '--out', {str(out)!r}, '--workers', '1'])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    assert [path for path in out.iterdir() if not path.name.startswith(".")] == []
    assert run(source, out) == 0
    assert run(source, tmp_path / "fresh") == 0
    assert files(out) == files(tmp_path / "fresh")


def test_shards_of_other_settings_are_not_replaced_unasked(tmp_path, capsys):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    assert run(source, out) == 0
    before = files(out)
    (out / "notes.md").write_text("mine")
    assert run(source, out) == 0, "the same settings may run again"
    assert run(source, out, "--side", "128") == 2
    message = capsys.readouterr().err
    assert "side: 256 there, 128 now" in message and "--overwrite" in message
    assert {name: value for name, value in files(out).items() if name != "notes.md"} == before
    assert run(many(tmp_path / "in2", 1, 2), out) == 2, "the same settings, another folder"
    assert run(source, out, "--shard-size", "1", "--overwrite") == 0
    assert run(source, out, "--overwrite") == 0
    assert sorted(path.name for path in out.glob("train-*")) == ["train-00000.tar"], "no shard of the old ones is left"
    assert (out / "notes.md").read_text() == "mine"
    (out / "prepare.json").unlink()
    assert run(source, out) == 2 and "broken run" in capsys.readouterr().err
    (out / "codes.json").write_text("{}")
    assert run(source, out, "--overwrite") == 2 and "code shards" in capsys.readouterr().err


def test_out_may_lie_inside_the_source(tmp_path):
    source = many(tmp_path / "in", 1, 3)
    assert run(source, source / "shards") == 0
    save(source / "shards" / "contact sheet.png", picture(99))
    assert run(source, source / "shards") == 0
    assert len(manifest(source / "shards")) == 3
    assert run(source, source) == 2


def test_mistakes_are_told_with_the_way_out(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "absent", tmp_path / "out") == 2 and "does not exist" in capsys.readouterr().err
    assert run(tmp_path / "empty", tmp_path / "out") == 2 and "no pictures found" in capsys.readouterr().err
    for options, words in (
        (("--style", "Wood Engraving"), "wood-engraving"),
        (("--val", "1"), "--val 1.0"),
        (("--side", "4"), "--side 4"),
        (("--shard-size", "0"), "--shard-size 0"),
        (("--workers", "0"), "--workers 0"),
        (("--side", "4096", "--max-aspect", "9"), "--lossless"),
    ):
        save(tmp_path / "one" / "a wolf.png", picture(1))
        assert run(tmp_path / "one", tmp_path / "out", *options) == 2 and words in capsys.readouterr().err
    save(tmp_path / "bad" / "IMG_1.png", picture(1))
    assert run(tmp_path / "bad", tmp_path / "out2") == 1
    captured = capsys.readouterr()
    assert "no picture was kept" in captured.err and "no caption" in captured.out
    assert manifest(tmp_path / "out2")["IMG_1.png"]["reason"] == "no caption"


def test_the_table_counts_every_file_and_names_the_next_steps(tmp_path, capsys):
    source = many(tmp_path / "in", 1, 3)
    (source / "empty.png").write_bytes(b"")
    assert run(source, tmp_path / "out") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["files", "4"] in lines and ["kept", "3", "75.0%"] in lines
    assert ["rejected:", "empty", "file", "1", "25.0%"] in lines
    assert ["python", "sample.py", "--checkpoint", "runs/mine", "--seed", "0"] in lines
    assert "data.val=" in str(lines)
    assert "data.val=" not in tool.next_steps(Path("my shards"), tool.Report(Counter(), Counter(), 0))
    assert "data.train='my shards/train-*.tar'" in tool.next_steps(Path("my shards"), tool.Report(Counter(), Counter(), 0))


def exit_hard(item):
    os._exit(1)


def test_a_worker_that_is_killed_is_an_error_not_a_wait_for_ever():
    with tool.Workers(2) as pool, pytest.raises(tool.WorkerDied, match="--workers 1"):
        list(pool.imap(exit_hard, [(tool.Found("a.png"), Words())]))


def test_prepare_and_inspect_run_without_torch(tmp_path):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    (tmp_path / "torch.py").write_text("raise ImportError('torch is blocked')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for module, arguments in (
        ("prepare", [str(source), "--style", "engraving", "--out", str(out), "--workers", "2"]),
        ("inspect", [str(out), "--verify", "--sheet", str(tmp_path / "sheet.png")]),
    ):
        command = [sys.executable, "-W", "error", "-m", f"data_tools.{module}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.png").exists()

"""Promises of data_tools/prepare.py, on real files made on the spot."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import prepare as tool
from data_tools.pipeline import manifest as rows_of_all
from data_tools.pipeline import selection
from data_tools.pipeline.chunks import Settings, cleaned
from data_tools.pipeline.next_steps import steps
from data_tools.pipeline.shard_writer import Piece, Shard, write_pieces
from data_tools.pipeline.storage_backends import Store
from data_tools.prepare import Tables, Work, main, prepare
from data_tools.readers import Found, Words
from tests.kills import dies, kills
from tokun.data.shards import expand_shards
from tokun.utils.task_engine import TaskEngine

pq = pytest.importorskip("pyarrow.parquet", reason="prepare writes Parquet: pip install -e '.[data]'")

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
                image = next(data[f"{key}.{kind}"] for kind in ("webp", "png", "jpg") if f"{key}.{kind}" in data)
                record = json.loads(text)
                found[record["path"]] = (record, Image.open(io.BytesIO(image)))
    return found


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def run(source: Path, out: Path, *options: str) -> int:
    """The command. The tiles of these tests are no engravings, so they are not judged as such; their names are their captions."""
    return main([str(source), "--style", "engraving", "--out", str(out), "--workers", "1", "--no-clean", "--captions-from-names", *options])


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
        "a good one.png": "thumbnail of c near copy.jpg",
        "truncated wolf.jpg": "truncated or damaged",
        "flipped bytes.png": "truncated or damaged",
        "zero bytes.jpg": "empty file",
        "no picture.jpg": "not a picture that can be read",
        "postscript.jpg": "not a picture that can be read",
        "bomb huge.png": "too many pixels",
        "bomb large.png": "too many pixels",
        "tiny thing.png": "too small",
        "long thing.png": "too long",
        "white page.png": "blank",
        "clear page.png": "blank",
        "black page.jpg": "blank",
        "nearly blank.png": "blank",
        "IMG_1234.png": "no caption",
        "b exact copy.png": "thumbnail of c near copy.jpg",
        "c near copy.jpg": "",
        "link out.png": "symlink leaves the source",
        "link nowhere.png": "broken symlink",
        "link folder": "symlink leaves the source",
        "link round": "symlink to a folder",
        "a pipe.png": "not a regular file",
        "caption leak.png": "caption file: symlink leaves the source",
        "caption broken.png": "caption file is not valid JSON",
    }
    assert all((row["status"] == "kept") == (row["reason"] == "") == (row["shard"] is not None) for row in rows.values())
    assert set(pairs(out)) == {"c near copy.jpg"}, "the copy with the most pixels"


def test_pictures_of_any_shape_up_to_the_limit_stay_whole(tmp_path):
    source, shapes = tmp_path / "source", {"wide": (310, 100), "tall": (100, 310), "square": (120, 120), "strip": (330, 100)}
    for seed, (name, size) in enumerate(shapes.items()):
        save(source / f"A {name} thing.png", picture(seed, size))
    assert run(source, tmp_path / "out", "--side", "64") == 0
    assert manifest(tmp_path / "out")["A strip thing.png"]["reason"] == "too long"
    made = {path.split()[1]: image for path, (record, image) in pairs(tmp_path / "out").items()}
    assert {name: image.size for name, image in made.items()} == {"wide": (198, 64), "tall": (64, 198), "square": (64, 64)}
    for seed, name in enumerate(("wide", "tall")):
        whole = np.asarray(picture(seed, shapes[name]).resize(made[name].size, Image.Resampling.LANCZOS), int)
        assert abs(np.asarray(made[name].convert("L"), int) - whole).mean() < 12, "nothing is cut off"


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
    assert {path: row["reason"] for path, row in rows.items()} == {
        **dict.fromkeys(names, ""), "notes.dat": "not read: neither a picture nor words for one",
    }  # fmt: skip
    assert all(not set("./") & set(row["key"]) for row in rows.values() if row["key"])
    assert pairs(out)["Größe — кот 猫.png"][0]["caption"] == "Größe — кот 猫"


def test_written_pictures_have_the_short_side_and_stay_gray(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "a large one.png", picture(1, (300, 200)))
    save(source / "a small one.png", picture(2, (70, 90)))
    save(source / "in colour.png", picture(3, (200, 200), mode="RGB"))
    for format, options in (("webp", ()), ("png", ("--format", "png")), ("jpg", ("--format", "jpg"))):
        assert run(source, out, "--side", "128", "--overwrite", *options) == 0
        found = pairs(out)
        assert found["a large one.png"][1].size == (192, 128)
        assert found["a small one.png"][1].size == (105, 135), "enlarged 1.5 times at most"
        assert all(image.format.lower() == format.replace("jpg", "jpeg") for _, image in found.values())
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
    report = prepare(source, out, Settings(clean=False, style="engraving", license="public domain", val=0, captions_from_names=True))
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
    ("printed", "given", "caption"), [("Fig. 3. A wolf.", "", "A wolf."), ("Fig. 3. A wolf.", "A lamb.", "A lamb."), ("Fig. 3", "", "")]
)
def test_the_caption_that_is_cleaned_or_given_is_the_plain_one_whatever_the_source_calls_plain(tmp_path, printed, given, caption):
    save(tmp_path / "in" / "a.png", picture(1))
    row = {"file_name": "a.png", "caption": printed, "captions": {"plain": printed, "poetic": "O wolf!"}}
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "given.csv").write_text(f"file_name,caption\na.png,{given}\n")
    tables = Tables(captions=tmp_path / "given.csv") if given else None
    prepare(
        tmp_path / "in",
        tmp_path / "out",
        Settings(style="engraving", val=0, keep_ambiguous=True, allow_missing_captions=True),
        tables=tables,
    )
    ((record, _),) = pairs(tmp_path / "out").values()
    assert record["caption"] == caption and record["captions"] == {**({"plain": caption} if caption else {}), "poetic": "O wolf!"}


def test_missing_captions_are_kept_when_allowed(tmp_path):
    save(tmp_path / "in" / "IMG_1.png", picture(1))
    assert run(tmp_path / "in", tmp_path / "out", "--allow-missing-captions") == 0
    record, _ = pairs(tmp_path / "out")["IMG_1.png"]
    assert record["caption"] == "" and record["captions"] == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\na.png,1\n", r"no caption column.*its columns are file_name, label.*--caption-column"),
        ("metadata.csv", "name,caption\na.png,x\n", r"names no pictures: its columns are \['name', 'caption'\].*file_name"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n[1]\n', "line 2: is not a JSON object"),
        ("metadata.jsonl", '\n{"file_name"\n', "line 2: is not valid JSON"),
        ("captions.csv", "file_name,caption\na.png,caf\udce9\n", "line 2: is not utf-8.*--encoding cp1252"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, text, message):
    save(tmp_path / "a.png", picture(1))
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        prepare(tmp_path, tmp_path / "out", Settings(clean=False, style="engraving"))
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


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
        report = prepare(
            source, tmp_path / f"out{seed}", Settings(clean=False, style="engraving", val=0.2, seed=seed, captions_from_names=True)
        )
        rows = manifest(tmp_path / f"out{seed}")
        by_folder = {}
        for path, row in rows.items():
            by_folder.setdefault(path.split("/")[0], set()).add(row["shard"].split("-")[0])
        assert all(len(names) == 1 for names in by_folder.values())
        assert report.pairs("val") % 4 == 0 and 4 <= report.pairs("val") <= 12
        assert report.pairs("train") + report.pairs("val") == 24
        splits.add(frozenset(folder for folder, names in by_folder.items() if names == {"val"}))
    assert len(splits) > 1, "the seed decides"


def test_views_of_one_object_share_a_split_also_where_a_table_or_a_sidecar_in_a_folder_names_it(tmp_path):
    """Their groups and styles were read from tables and tars given as SOURCE alone: another view of a training object was held out."""
    source, out = tmp_path / "in", tmp_path / "out"
    rows = ["file_name,caption,style,object_id"]
    for index in range(24):
        name = f"{index // 12}/view {index}.png"
        save(source / name, picture(index))
        rows.append(f"{name},View number {index},Wood Engraving,{index // 2 if index < 12 else ''}")
        if index >= 12:
            (source / name).with_suffix(".json").write_text(json.dumps({"object_id": index // 2, "author": "J. G. Wood"}))
    (source / "metadata.csv").write_text("\n".join(rows))
    (tmp_path / "given.csv").write_text("file_name,caption\n1/view 13.png,A given view\n")
    for seed in range(2):
        settings = Settings(style="" if seed else "etching", clean=False, val=0.3, seed=seed)
        report = prepare(source, out, settings, tables=Tables(captions=tmp_path / "given.csv"), overwrite=True)
        objects: dict[int, set[str]] = {}
        for path, row in manifest(out).items():
            objects.setdefault(int(path.split()[1].removesuffix(".png")) // 2, set()).add(row["shard"].split("-")[0])
        assert len(objects) == 12 and all(len(splits) == 1 for splits in objects.values()) and report.pairs("val") in range(2, 13)
        records = {path: record for path, (record, _) in pairs(out).items()}
        assert {record["style"] for record in records.values()} == {settings.style or "wood-engraving"}
        assert records["1/view 13.png"]["caption"] == "A given view" and records["1/view 13.png"]["author"] == "J. G. Wood"


def test_neither_folders_nor_named_objects_are_divided():
    keys = [[b"folder/a", b"object/1"], [b"folder/a", b"object/2"], [b"folder/b", b"object/2"], [b"folder/c", b"object/3"], [b"picture"]]
    group = selection.joined(keys)
    assert [group(first) for first, *_ in keys] == [b"folder/a"] * 3 + [b"folder/c", b"picture"]
    chain = selection.joined([[b"%03d" % (i + 1), b"%03d" % i] for i in range(200)])  # the worst order
    assert {chain(b"%03d" % i) for i in range(201)} == {b"000"}


@pytest.mark.parametrize("seed", range(2))
def test_the_views_of_the_only_object_that_is_named_share_a_split(tmp_path, seed):
    rows = ["file_name,caption,object_id"]
    for index in range(12):
        save(tmp_path / "in" / f"{index}.png", picture(index))
        rows.append(f"{index}.png,View number {index},{'17' if index < 4 else ''}")
    (tmp_path / "in" / "metadata.csv").write_text("\n".join(rows))
    prepare(tmp_path / "in", tmp_path / "out", Settings(style="etching", clean=False, val=0.4, seed=seed))
    splits = {int(path.removesuffix(".png")): row["shard"].split("-")[0] for path, row in manifest(tmp_path / "out").items()}
    assert len(splits) == 12 and len({splits[index] for index in range(4)}) == 1 and set(splits.values()) == {"train", "val"}


def columns(shas: list[int]) -> selection.Columns:
    """Columns of kept pictures without any likeness."""
    rng, count = np.random.default_rng(0), len(shas)
    numbers = rng.integers(0, 2**63, (count, 5)).astype(np.uint64)
    sha256 = np.array([sha.to_bytes(32, "big") for sha in shas], dtype="V32")
    whole = np.ones(count, dtype=bool)
    return selection.Columns(
        np.zeros(count, np.uint8), whole, sha256, numbers[:, 0], numbers[:, 1:], whole * 1, whole, np.zeros((count, 4), int)
    )


def splits_of(settled: selection.Settled) -> dict[int, str]:
    """{index: split} of what is written."""
    places = {index: settled.place(index) for index in range(len(settled.cause))}
    return {index: shard.split("-")[0] for index, (shard, _) in places.items() if shard}


def reasons_of(settled: selection.Settled, found: list[Found]) -> list[str]:
    """The reasons of what was kept by its own verdict and is not written."""
    return [settled.verdict(index, ("kept", ""), found)[1] for index in range(len(found)) if index not in splits_of(settled)]


def test_without_folders_single_pictures_are_drawn():
    found = [Found(f"{index}.png") for index in range(2001)]
    settings = Settings(style="engraving", val=0.1)
    val = selection.split_by_group(columns([*range(2000)]), found, np.arange(2000), settings)
    assert 150 < sum(val) < 250
    more = selection.split_by_group(columns([*range(2000), 2**255]), found, np.arange(2001), settings)
    assert (more[:2000] == val).all(), "a new file moves no other"
    assert not any(selection.split_by_group(columns([*range(2000)]), found, np.arange(2000), Settings(style="engraving", val=0)))
    assert selection.split_by_group(columns([0]), found, np.arange(1), settings).tolist() == [False]


def test_no_lookalike_of_a_training_picture_is_in_validation():
    data = columns([*range(1000)])
    for index in range(0, 1000, 2):  # pairs that differ in 3 bits of 64 and 60 of 256: alike, but no duplicates
        data.coarse[index + 1] = data.coarse[index] ^ np.uint64(0b10101)
        data.fine[index + 1] = data.fine[index] ^ np.array([(1 << 60) - 1, 0, 0, 0], dtype=np.uint64)
    found = [Found(f"{index}.png") for index in range(1000)]
    settled = selection.settle(data, found, Settings(style="engraving", val=0.2))
    splits = splits_of(settled)
    assert 25 < list(splits.values()).count("val") < 75
    across = [index for index in range(0, 1000, 2) if len({splits.get(index), splits.get(index + 1)} - {None}) > 1]
    assert across == []
    gone = reasons_of(settled, found)
    assert 100 < len(gone) < 200 and all(reason.startswith("too like ") for reason in gone)


def test_a_validation_picture_may_have_several_lookalikes_in_training():
    data = columns([*range(1000)])
    for index in range(0, 1000, 4):  # four of a kind, each two 60 bits apart: alike, but no duplicates
        first = data.fine[index].copy()
        for other in range(4):
            flipped = np.array([0, 0, 0, 0], dtype=np.uint64)
            flipped[other // 2] = ((1 << 30) - 1) << (30 * (other % 2))
            data.coarse[index + other], data.fine[index + other] = data.coarse[index], first ^ flipped
    found = [Found(f"{index}.png") for index in range(1000)]
    settled = selection.settle(data, found, Settings(style="engraving", val=0.2))
    splits = splits_of(settled)
    four = [{splits.get(index + other) for other in range(4)} - {None} for index in range(0, 1000, 4)]
    assert {"train"} in four and all(len(kinds) == 1 for kinds in four)
    assert sum(reason.startswith("too like ") for reason in reasons_of(settled, found)) > 50


def test_of_lookalikes_the_largest_with_a_caption_is_kept_and_its_verdict_stands(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "a wolf.png", picture(1, (200, 160)))
    save(source / "a wolf, small.jpg", picture(1, (96, 80)), quality=85)
    save(source / "IMG_1.png", picture(1, (400, 320)))
    save(source / "a ship.png", picture(2))
    (source / "a ship, again.png").write_bytes((source / "a ship.png").read_bytes())
    assert run(source, out, "--val", "0") == 0
    assert {path: row["reason"] for path, row in manifest(out).items()} == {
        "a wolf.png": "",
        "a wolf, small.jpg": "thumbnail of a wolf.png",
        "IMG_1.png": "no caption",
        "a ship, again.png": "",
        "a ship.png": "exact duplicate",
    }


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


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_tasks_find_relative_folders_from_wherever_they_run(tmp_path, monkeypatch, kind):
    """The workers of Ray run in another folder: they read nothing, and wrote the shards where nobody looked."""

    class Elsewhere(TaskEngine):
        def run(self, function, tasks):
            for number, task in enumerate(tasks):
                with monkeypatch.context() as there:
                    there.chdir(tmp_path / "elsewhere")
                    result = function(pickle.loads(pickle.dumps(task)))
                yield number, result

    many(tmp_path / "in", 2, 2), (tmp_path / "elsewhere").mkdir()
    (tmp_path / "table.csv").write_text("path,caption\nbook 0/a picture of number 0.png,A wolf.\nbook 1/a picture of number 1.png,A fox.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "open_engine", lambda *_, **__: Elsewhere())
    settings = Settings(style="engraving", clean=False, captions_from_names=True)
    source, root = (Path("in"), None) if kind == "folder" else (Path("table.csv"), Path("in"))
    report = prepare(source, "out", settings, root=root, work=Work(engine="ray"))
    assert report.kept == len(pairs(tmp_path / "out")) == (4 if kind == "folder" else 2)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_chunk_that_is_cut_off_makes_no_shard(tmp_path):
    store = Store(str(tmp_path))
    store.write("chunk.data", b"picture{}")
    piece = Piece("000000001", "chunk.data", 0, 7, 2)
    assert write_pieces(Shard("a.tar", "jpg", [piece], store)) == 1
    store.write("chunk.data", b"picture{")
    with pytest.raises(OSError, match=r"chunk.data in .* is truncated.*remove"):
        write_pieces(Shard("b.tar", "jpg", [piece], store))
    assert not store.exists("b.tar")


def test_json_and_manifest_have_the_fields_of_the_format(tmp_path):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    assert run(source, out, "--register", "social", "--source", "My Books", "--license", "public domain") == 0
    rows = manifest(out)
    columns = "path sha256 dhash width height status reason shard key caption words_from language license source_url"
    assert " ".join(pq.read_table(out / "manifest.parquet").column_names) == columns
    for path, (record, _) in pairs(out).items():
        assert record["captions"] == {"social": record["caption"]} and record["style"] == "engraving"
        assert record["source"] == "My Books" and record["license"] == "public domain" == rows[path]["license"]
        assert record["sha256"] == hashlib.sha256((source / path).read_bytes()).hexdigest() == rows[path]["sha256"]
        assert record["dhash"] == rows[path]["dhash"] and (rows[path]["width"], rows[path]["height"]) == (96, 80)


def test_any_text_stands_in_the_manifest_as_it_is():
    pa = pytest.importorskip("pyarrow")
    schema = pa.schema([(name, pa.int32() if name in ("width", "height") else pa.string()) for name in rows_of_all.FIELDS])
    texts = ["a\0b", "\N{WOLF FACE} é", "\\xff", "2020-01-01T00:00:00", "", 'line\nbreak "', "null", "1", "\u2028"]
    rows = [{name: 7 if name in ("width", "height") else text for name in rows_of_all.FIELDS} for text in texts] + [
        dict.fromkeys(rows_of_all.FIELDS)
    ]
    assert rows_of_all.as_table(rows, schema).schema == schema and rows_of_all.as_table(rows, schema).to_pylist() == rows
    assert rows_of_all.as_table(rows[-1:], schema).to_pylist() == rows[-1:], "unknown in every row"


@pytest.mark.parametrize("name", ["hamming", "area", "linear"])
def test_the_filter_softens_the_picture_and_changes_nothing_else(tmp_path, capsys, name):
    if name in ("area", "linear"):
        pytest.importorskip("cv2")
    source = save(tmp_path / "in" / "a wolf.png", picture(1, (600, 480))).parent
    assert run(source, tmp_path / "sharp") == 0 and run(source, tmp_path / "soft", "--filter", name) == 0
    (sharp, one), (soft, other) = (pairs(tmp_path / folder)["a wolf.png"] for folder in ("sharp", "soft"))
    assert sharp == soft and one.size == other.size and one.tobytes() != other.tobytes()
    assert run(source, tmp_path / "none", "--filter", "nearest") == 2 and "lanczos, hamming, area" in capsys.readouterr().err


def test_pictures_are_judged_in_groups_as_one_by_one(tmp_path, monkeypatch):
    source = tmp_path / "in"
    for number in range(9):
        save(source / f"a wolf and {'abcdefghi'[number]} sheep.png", picture(number, (300, 260)))
    (source / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert run(source, tmp_path / "groups") == 0
    monkeypatch.setattr("data_tools.pipeline.chunks.GROUP_SIDES", 1)
    assert run(source, tmp_path / "single") == 0
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()} for name in ("groups", "single"))
    assert one == other


# ---- the output folder ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
def test_killed_at_random_moments_the_result_is_that_of_a_run_that_was_not(tmp_path):
    source, out, whole = many(tmp_path / "in", 4, 40), tmp_path / "out", tmp_path / "whole"
    options = ["--style", "engraving", "--no-clean", "--captions-from-names", "--shard-size", "20", "--workers", "2"]
    start = time.monotonic()
    assert main([str(source), "--out", str(whole), *options]) == 0
    length = time.monotonic() - start
    command = [sys.executable, "-m", "data_tools.prepare", str(source), "--out", str(out), *options]
    moments, kills = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0.3, 0.9) * (length + 0.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    assert files(out) == files(whole)


@pytest.mark.parametrize("there", ["nothing", *(pytest.param(there, marks=pytest.mark.slow) for there in ("the same", "others"))])
def test_killed_before_any_change_of_the_disk_it_goes_on(tmp_path, there):
    source, before = many(tmp_path / "in", 1, 4), tmp_path / "before"  # two shards of training, one of validation
    assert run(source, tmp_path / "fresh", "--shard-size", "2") == 0
    if there != "nothing":
        assert run(source, before, "--shard-size", "2" if there == "the same" else "3") == 0
        shutil.copytree(before, tmp_path / "out")

    def first_run() -> None:
        run(source, tmp_path / "out", "--shard-size", "2", *(["--overwrite"] if there == "others" else []))

    for _ in kills(first_run, tmp_path / "out"):
        record, kept = tmp_path / "out" / "prepare.json", tmp_path / "before" / "prepare.json"
        if there == "others" and record.exists() and record.read_bytes() == kept.read_bytes():
            shutil.copytree(tmp_path / "out", tmp_path / "had", ignore=shutil.ignore_patterns(".prepare-partial", ".lock"))
            first_run()
            assert files(tmp_path / "had") == files(before), "the old ones stood, whole, until the new ones were made"
            shutil.rmtree(tmp_path / "had")
        else:
            assert run(source, tmp_path / "out", "--shard-size", "2") == 0
        assert files(tmp_path / "out") == files(tmp_path / "fresh")
        shutil.rmtree(tmp_path / "out")
        if there != "nothing":
            shutil.copytree(before, tmp_path / "out")


def test_killed_while_the_files_take_their_places_it_publishes_nothing_of_other_settings_or_files(tmp_path, capsys):
    source, out = many(tmp_path / "in", 1, 5), tmp_path / "out"
    assert run(source, tmp_path / "fresh", "--shard-size", "2") == 0
    for change in itertools.count():
        assert dies(lambda: run(source, out, "--shard-size", "2"), out, change)
        if len(list(out.glob("*.tar"))) == 2:
            break
        shutil.rmtree(out, ignore_errors=True)
    assert run(source, out, "--shard-size", "3") == 2 and "shard_size: 2 then, 3 now" in capsys.readouterr().err
    save(source / "book 0" / "a picture of number 2.png", picture(77))
    assert run(source, out, "--shard-size", "2") == 0 and run(source, tmp_path / "changed", "--shard-size", "2") == 0
    assert files(out) == files(tmp_path / "changed") != files(tmp_path / "fresh")


def test_what_was_measured_before_a_kill_is_measured_again_when_a_file_or_a_caption_has_changed(tmp_path, monkeypatch):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.prepare.Columns.read", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(source, out) == 130
    (source / "book 0" / "a picture of number 1.txt").write_text("A wolf")
    save(source / "book 0" / "a picture of number 2.png", picture(77))
    assert run(source, out) == 0 and run(source, tmp_path / "fresh") == 0
    assert files(out) == files(tmp_path / "fresh")
    assert {record["caption"] for record, _ in pairs(out).values()} >= {"A wolf"}


def test_shards_of_other_settings_are_not_replaced_unasked(tmp_path, capsys):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    assert run(source, out) == 0
    before = files(out)
    (out / "notes.md").write_text("mine")
    assert run(source, out) == 0, "the same settings may run again"
    assert run(source, out, "--side", "128") == 2
    message = capsys.readouterr().err
    assert "side: 256 then, 128 now" in message and "--overwrite" in message
    assert {name: value for name, value in files(out).items() if name != "notes.md"} == before
    assert run(many(tmp_path / "in2", 1, 2), out) == 2, "the same settings, another folder"
    assert run(source, out, "--shard-size", "1", "--overwrite") == 0
    assert run(source, out, "--overwrite") == 0
    assert sorted(path.name for path in out.glob("train-*")) == ["train-00000.tar"], "no shard of the old ones is left"
    assert (out / "notes.md").read_text() == "mine"
    (out / "prepare.json").unlink()
    assert run(source, out) == 2 and "interrupted run" in capsys.readouterr().err
    (out / "codes.json").write_text("{}")
    assert run(source, out, "--overwrite") == 2 and "code shards" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["by hand", "by a model, then by hand"])
def test_the_suggested_commands_for_pictures_without_captions_run_as_they_stand(way, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("pictures/scan 1.png"), picture(1))

    def suggested() -> list[list[str]]:
        told = capsys.readouterr()
        assert "out//" not in told.out + told.err
        return [words[words.index("prepare") + 1 :] for words in map(shlex.split, told.out.splitlines()) if "prepare" in words]

    assert main(["pictures", "--style", "engraving", "--out", "out/"]) == 1
    by_hand, from_drafts, by_model = suggested()
    assert "--overwrite" not in by_hand + from_drafts + by_model, "nothing is there to be lost"
    for named in ("out", "out/train-*.tar"):
        with pytest.raises(FileNotFoundError, match=r"prepare kept no picture there, and out/report.html says why"):
            expand_shards(named)
    if "model" in way:
        assert main(by_model) == 0 and [record["caption"] for record, _ in pairs(Path("out")).values()] == [""]
        by_hand, _ = suggested()
    Path("out/captions.csv").write_text("file_name,caption\nscan 1.png,A wolf.\n")
    assert main(by_hand) == 0
    assert [record["caption"] for record, _ in pairs(Path("out")).values()] == ["A wolf."]


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
        (("--side", "4096", "--max-aspect", "9"), "--format png"),
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
    assert ["files", "4"] in lines and ["pairs", "written", "3", "75.0%"] in lines
    assert ["rejected:", "empty", "file", "1", "25.0%"] in lines
    assert ["tokun", "sample", "--adapter", "runs/mine-lora", "--seed", "0"] in lines
    assert "data.val=" in str(lines)
    told = steps("my shards", [], {"kept": 3, "distinct": 3}, report="report.html", val=False)
    assert "data.val=" not in told and "'data.train=my shards/train-*.tar'" in told and "doubtful" not in told
    told = steps("shards", [], {"kept": 60, "distinct": 60}, report="report.html", val=6, doubtful=2)
    assert "2 doubtful pictures are left out (ambiguous); --keep-ambiguous keeps them." in told


def test_shards_with_given_captions_are_not_replaced_by_some_without(tmp_path, capsys):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    (tmp_path / "filled.csv").write_text(
        "file_name,caption\n" + "".join(f"{path.relative_to(source)},A given one\n" for path in sorted(source.rglob("*.png")))
    )
    assert run(source, out) == 0, "at first without"
    given = ["--captions", str(tmp_path / "filled.csv")]
    assert run(source, out, *given) == 0 == run(source, out, *given)
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    capsys.readouterr()
    assert run(source, out) == 2
    assert "holds shards with the captions of filled.csv, and none are given now: give them again (--captions)" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert run(source, out, "--overwrite") == 0


def test_prepare_and_inspect_run_without_torch(tmp_path):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    (tmp_path / "torch.py").write_text("raise ImportError('torch is blocked')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for module, arguments in (
        ("prepare", [str(source), "--style", "engraving", "--out", str(out), "--workers", "2", "--no-clean", "--captions-from-names"]),
        ("inspect", [str(out), "--verify", "--sheet", str(tmp_path / "sheet.png")]),
    ):
        command = [sys.executable, "-W", "error", "-m", f"data_tools.{module}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("origin", "reason"), [("heading above", "caption is a heading"), ("neighbouring text", ""), ("alt", ""), ("", "")]
)
def test_the_heading_above_a_picture_is_a_caption_to_be_doubted(origin, reason):
    caption = cleaned(Words(caption="Blue Beard", more={"caption_origin": origin}))
    assert (caption.text, caption.reason) == ("Blue Beard", reason)
    assert [verdict.kind for verdict in caption.verdicts] == (["ambiguous"] if reason else [])


def test_shards_of_before_there_was_a_limit_of_pixels_to_choose_are_gone_on_with_and_a_raised_one_is_another_setting(tmp_path, capsys):
    source, out = many(tmp_path / "in", 1, 3), tmp_path / "out"
    assert run(source, out) == 0
    record = json.loads((out / "prepare.json").read_text())
    del record["settings"]["max_megapixels"]
    (out / "prepare.json").write_text(json.dumps(record))
    assert run(source, out) == 0
    assert run(source, out, "--max-megapixels", "400") == 2 and "max_megapixels: 100.0 then, 400.0 now" in capsys.readouterr().err
    assert run(source, tmp_path / "few", "--max-megapixels", "0.001") != 0, "each picture has more pixels than that"


def test_a_style_spelt_almost_like_one_of_the_bundled_model_is_asked_about(tmp_path, capsys):
    source = many(tmp_path / "in", 1, 3)
    assert run(source, tmp_path / "out", "--style", "engravnig") == 0
    assert "--style is engravnig, which the bundled model does not know; did you mean engraving?" in capsys.readouterr().out
    for style in ("engraving", "engravings", "stipple-engraving", "lunar-maps"):
        assert run(source, tmp_path / style, "--style", style) == 0
        assert "did you mean" not in capsys.readouterr().out


# ---- styles of the pictures' own ------------------------------------------------------------------------------------


def described(folder: Path, styles: dict[str, str | None]) -> Path:
    """Pictures with JSON beside them: a caption, and a style unless it is None."""
    for seed, (name, style) in enumerate(styles.items()):
        save(folder / f"{name}.png", picture(seed))
        record = {"caption": f"A picture of a {name}."} | ({} if style is None else {"style": style})
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def run_without_style(source: Path, out: Path, *options: str) -> int:
    return main([str(source), "--out", str(out), "--workers", "1", "--no-clean", *options])


def test_where_every_kept_picture_has_a_style_in_its_json_or_row_none_is_asked_for(tmp_path, capsys):
    source, out = described(tmp_path / "in", {"wolf": "Etching", "fox": "etching", "hare": "wood engraving"}), tmp_path / "out"
    save(source / "cover.png", picture(8))  # no caption, so it is not kept
    save(source / "broken.png", picture(9))
    (source / "broken.json").write_text("{")
    assert run_without_style(source, out) == 0
    assert (
        "Without --style each picture has its own, from the JSON beside it: etching, wood-engraving."
        in capsys.readouterr().out.splitlines()
    )
    assert {path: record["style"] for path, (record, _) in pairs(out).items()} == {
        "wolf.png": "etching", "fox.png": "etching", "hare.png": "wood-engraving",
    }  # fmt: skip
    assert manifest(out)["cover.png"]["reason"] == "no caption"
    (source / "metadata.csv").write_text("file_name,caption,style\ncover.png,The cover.,Lithograph\nfox.png,The fox.,engraving\n")
    assert run_without_style(source, out) == 0
    told = "Without --style each picture has its own, from the JSON beside it or its row of a table or JSON in a tar: etching, "
    assert told in capsys.readouterr().out
    styles = {path: record["style"] for path, (record, _) in pairs(out).items()}
    assert styles["cover.png"] == "lithograph" and styles["fox.png"] == "etching", "the JSON beside a picture comes before a row"


def test_where_only_some_have_a_style_those_without_are_counted_before_any_is_opened(tmp_path, capsys):
    source, out = described(tmp_path / "in", {"wolf": "etching", "fox": None, "hare": "etching", "ant": None}), tmp_path / "out"
    save(source / "old mill.png", picture(8))
    assert run_without_style(source, out) == 2 and not out.exists()
    told = capsys.readouterr().err.strip()
    assert told.endswith(
        f"--style is needed: 2 of 4 pictures in {source} have no style of their own, the first ant.png. "
        'Write it into their JSON or table row ("style": "engraving"), or add --style engraving, which then is the style of all'
    )
    assert "\n" not in told
    assert run_without_style(source, out, "--captions-from-names") == 2 and "3 of 5 pictures" in capsys.readouterr().err
    assert run_without_style(source, out, "--allow-missing-captions") == 2 and "3 of 5 pictures" in capsys.readouterr().err
    assert run_without_style(source, out, "--style", "engraving") == 0
    assert {record["style"] for record, _ in pairs(out).values()} == {"engraving"} and "Without --style" not in capsys.readouterr().out


def test_where_none_has_a_style_one_is_asked_for(tmp_path, capsys):
    source = described(tmp_path / "in", {"wolf": None})
    assert run_without_style(source, tmp_path / "out") == 2
    assert f"--style is needed: {source} gives no picture a style. Add --style engraving, or another tag" in capsys.readouterr().err
    save(tmp_path / "bare" / "wolf.png", picture(1))
    assert run_without_style(tmp_path / "bare", tmp_path / "out") == 2 and "gives no picture a style" in capsys.readouterr().err


def test_the_last_lines_ask_about_a_misspelt_style_and_give_the_command_with_the_right_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = many(tmp_path / "in", 1, 3)
    assert run(source, Path("out"), "--style=engravng") == 0
    *_, before, warned, command = capsys.readouterr().out.splitlines()
    assert warned.startswith("prepare: WARNING: --style is engravng, which the bundled model does not know; did you mean engraving?")
    assert not before, "set apart"
    assert shlex.split(command)[:3] == ["tokun", "prepare", str(source)] and main(shlex.split(command)[2:]) == 0
    assert {record["style"] for record, _ in pairs(Path("out")).values()} == {"engraving"}
    assert "did you mean" not in capsys.readouterr().out
    own = described(tmp_path / "own", {"wolf": "etching", "fox": "engravng", "hare": "engravng"})
    assert run_without_style(own, tmp_path / "other") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "prepare: WARNING: engravng, the style of 2 pictures, is one which the bundled model does not know; did you mean engraving? "
        "Then correct it where it is written, and run the same command again. Any other word becomes a style of its own."
    )

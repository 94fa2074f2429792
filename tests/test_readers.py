"""Promises of data_tools/readers.py and data_tools/readers/book_page.py, on small sources made on the spot."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import socketserver
import tarfile
import threading
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_tools.images.image_ops import PictureError
from data_tools.readers import (
    MAX_TEXT_BYTES,
    READERS,
    CaptionError,
    Found,
    Listing,
    Options,
    Remote,
    Span,
    Words,
    choose_reader,
    find_words,
    read_picture,
    shown,
)
from data_tools.readers.book_page import Page, book_facts, illustrations
from data_tools.report.reasons import EXPLANATIONS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
JPEG = b"\xff\xd8\xff\xe0 not a whole picture, but readers do not look "


def put(path: Path, data: bytes | str = JPEG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(source: Path | str, reader: str = "auto", **options) -> Listing:
    return READERS[choose_reader(source, reader, leave_out=options.get("leave_out"))](source, Options(**options))


def problems(listing: Listing) -> dict[str, str]:
    return {one.path: one.problem for one in listing.found}


def captions(listing: Listing, *, from_names: bool = False) -> dict[str, str]:
    """{path: caption} of the pictures that may be opened, as prepare will see them."""
    opened = [one for one in listing.found if not one.problem]
    words = {one.path: find_words(listing.base, one, listing.words.get(one.path, Words()), from_names=from_names) for one in opened}
    return {path: said.caption for path, said in words.items()}


def make_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- folder ---------------------------------------------------------------------------------------------------------


def test_folder_takes_words_from_text_then_json_then_table_then_name(tmp_path):
    (
        put(tmp_path / "a.jpg"),
        put(tmp_path / "a.txt", "  A <b>wolf</b>,\n&amp; a lamb "),
        put(tmp_path / "a.json", '{"caption": "no", "artist": "Doré"}'),
    )
    put(tmp_path / "b.PNG"), put(tmp_path / "b.json", '{"text": "A fox", "captions": {"Poetic": "O fox!"}, "Subject": "Wild Animals"}')
    put(tmp_path / "deep/c.tif"), put(tmp_path / "deep/metadata.csv", '\ufefffile_name;caption\nc.tif;"A stork; never"\n')
    put(tmp_path / "the_old_mill-02.webp")
    put(tmp_path / "no suffix at all"), put(tmp_path / "IMG_1234.jpg"), put(tmp_path / "notes.doc", "no picture")
    listing = read(tmp_path)
    assert captions(listing, from_names=True) == {
        "IMG_1234.jpg": "", "a.jpg": "A wolf, & a lamb", "b.PNG": "A fox", "deep/c.tif": "A stork; never",
        "no suffix at all": "no suffix at all", "the_old_mill-02.webp": "the old mill",
    }  # fmt: skip
    assert {path: said for path, said in captions(listing).items() if not said} == {
        "IMG_1234.jpg": "", "no suffix at all": "", "the_old_mill-02.webp": "",
    }, "a name is a caption only when asked for"  # fmt: skip
    assert dict(listing.unread) == {"notes.doc": "not read: neither a picture nor words for one"}
    words = find_words(tmp_path, Found("b.PNG"), Words())
    assert (words.captions, words.subject) == ({"poetic": "O fox!"}, "wild-animals")
    assert find_words(tmp_path, Found("a.jpg"), Words()).more == {"artist": "Doré"}
    assert read_picture(listing.base, listing.found[0]) == JPEG


def test_what_a_row_says_beside_the_caption_is_kept_where_a_sidecar_says_something_else(tmp_path):
    """The title and the second caption of the row were lost if the sidecar had an artist."""
    put(tmp_path / "a.jpg"), put(tmp_path / "a.json", '{"caption": "A wolf", "artist": "Doré", "captions": {"era": "Wolf."}}')
    row = {
        "file_name": "a.jpg",
        "caption": "no",
        "artist": "no",
        "title": "Fables",
        "captions": {"era": "no", "poetic": "O wolf!"},
        "object_id": 7,
    }
    put(tmp_path / "metadata.jsonl", json.dumps(row))
    listing = read(tmp_path)
    words = find_words(tmp_path, listing.found[0], listing.words["a.jpg"])
    assert words.caption == "A wolf" and words.captions == {"era": "Wolf.", "poetic": "O wolf!"}
    assert words.more == {"artist": "Doré", "title": "Fables"} and words.group == "object_id/7"


def test_folder_counts_rows_without_a_picture_and_the_first_table_wins(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "captions.csv", "image,text\na.jpg,last\nb.jpg,absent\n")
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.jpg", "caption": "second"}\n\n')
    put(tmp_path / "metadata.csv", "path\tcaption\n./a.jpg\tfirst\n")
    listing = read(tmp_path)
    assert captions(listing) == {"a.jpg": "first"} and listing.unmatched == 1


def test_the_output_inside_the_source_is_not_entered(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "out/b.jpg"), put(tmp_path / "out/1-h.htm", "<p>")
    assert list(problems(read(tmp_path, leave_out=tmp_path / "out"))) == ["a.jpg"]


def test_the_order_is_that_of_the_paths_whatever_the_disk_says(tmp_path, monkeypatch):
    for name in ("z/a.jpg", "b.jpg", "a/z.jpg", "a.jpg", "Z.jpg"):
        put(tmp_path / name)
    before = read(tmp_path)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **kw: reversed(list(walk(*args, **kw))))
    assert read(tmp_path) == before and [one.path for one in before.found] == ["Z.jpg", "a.jpg", "a/z.jpg", "b.jpg", "z/a.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_no_link_is_followed_out_of_the_source_and_no_pipe_opened(tmp_path):
    source = tmp_path / "in"
    put(tmp_path / "secret.jpg"), put(tmp_path / "secret.txt", "a secret"), put(source / "a.jpg")
    (source / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (source / "within.jpg").symlink_to(source / "a.jpg")
    (source / "gone.jpg").symlink_to(source / "nothing")
    (source / "loop.jpg").symlink_to(source / "loop.jpg")
    (source / "folder").symlink_to(tmp_path)
    (source / "round").symlink_to(source)
    os.mkfifo(source / "pipe.jpg")
    (source / "a.txt").symlink_to(tmp_path / "secret.txt")
    listing = read(source, "folder")
    assert problems(listing) == {
        "a.jpg": "", "within.jpg": "", "out.jpg": "symlink leaves the source", "gone.jpg": "broken symlink", "loop.jpg": "broken symlink",
        "folder": "symlink leaves the source", "round": "symlink to a folder", "pipe.jpg": "not a regular file",
    }  # fmt: skip
    with pytest.raises(CaptionError, match="symlink leaves the source"):
        find_words(source, Found("a.jpg"), Words())
    (source / "metadata.csv").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"metadata.csv cannot be read for captions \(symlink leaves"):
        read(source, "folder")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", '{"caption": "half', "caption file is not valid JSON"),
        ("a.json", "[1, 2]", "caption file holds no JSON object"),
        ("a.json", "[" * 50_000, "caption file is not valid JSON"),
        ("a.txt", "x" * (MAX_TEXT_BYTES + 1), "caption file is too large"),
    ],
)
def test_a_broken_sidecar_is_an_error_and_no_other_caption_is_guessed(tmp_path, name, data, reason):
    put(tmp_path / "a.jpg"), put(tmp_path / name, data)
    with pytest.raises(CaptionError, match=reason):
        find_words(tmp_path, Found("a.jpg"), Words(caption="another"))


def test_sidecars_in_other_encodings_are_read(tmp_path):
    for encoding in ("utf-8-sig", "utf-16", "cp1252"):
        put(tmp_path / "a.txt", "Kawendé’s wolf".encode(encoding))
        assert find_words(tmp_path, Found("a.jpg"), Words()).caption == "Kawendé's wolf"


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("wolf.jpg", "wolf"), ("01 WolfAndLamb (2).jpg", "Wolf And Lamb"), ("The%20Mill.png", "The Mill"), ("Paris 1878.jpg", "Paris 1878"),
        ("DSC_0042.jpg", ""), ("scan0001.tif", ""), ("deadbeefcafe.jpg", ""), ("a\udcff wolf.jpg", ""), ("i_042.png", ""),
    ],
)  # fmt: skip
def test_a_name_is_a_caption_only_when_it_reads_like_words(tmp_path, name, caption):
    assert find_words(tmp_path, Found(f"folder/{name}"), Words(), from_names=True).caption == caption
    assert find_words(tmp_path, Found(f"folder/{name}"), Words()).caption == ""


# ---- classes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def art_images(tmp_path) -> Path:
    """The layout of the Kaggle set of art images, its second copy and its broken files."""
    for start in ("dataset/dataset_updated", "musemart/dataset_updated"):
        for part in ("training_set", "validation_set"):
            for name in ("drawings", "engraving", "iconography", "painting", "sculpture"):
                put(tmp_path / start / part / name / f"{part[0]}{name}.jpg")
    put(tmp_path / "dataset/dataset_updated/training_set/drawings/.DS_Store", "no picture")
    put(tmp_path / "dataset/dataset_updated/training_set/engraving/empty.jpg", b"")
    return tmp_path


def test_class_folders_become_styles_and_second_copies_come_last(art_images):
    assert choose_reader(art_images) == "classes"
    listing = read(art_images)
    assert len(listing.found) == 21 and {one.style for one in listing.found} == {
        "drawing",
        "engraving",
        "iconography",
        "painting",
        "sculpture",
    }
    assert [one.path.split("/")[0] for one in listing.found] == ["dataset"] * 11 + ["musemart"] * 10
    assert all(one.group == "" for one in listing.found), "the split is drawn anew, whatever folder a picture lay in"


def test_with_a_style_asked_for_the_other_classes_are_listed_and_left(art_images):
    listing = read(art_images, style="engraving")
    assert {one.style for one in listing.found if not one.problem} == {"engraving"}
    assert {one.problem for one in listing.found if one.style != "engraving"} == {"other style"}


def test_any_folder_is_a_class_when_classes_are_asked_for(tmp_path):
    put(tmp_path / "Art Nouveau/a.jpg"), put(tmp_path / "engravings/Book 1/b.jpg"), put(tmp_path / "c.jpg")
    assert choose_reader(tmp_path) == "folder"
    found = {one.path: (one.style, one.group, one.problem) for one in read(tmp_path, "classes").found}
    assert found == {
        "Art Nouveau/a.jpg": ("art-nouveau", "", ""),
        "engravings/Book 1/b.jpg": ("engraving", "Book 1", ""),
        "c.jpg": ("", "", "in no class folder"),
    }


# ---- manifest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_paths_in_any_format_says_the_same(tmp_path, kind):
    for name in ("a.jpg", "b.jpg"):
        put(tmp_path / "images" / name)
    rows = [
        {"Image Path": "images/a.jpg", "caption": "A wolf", "style": "Wood Engraving", "artist": "Doré", "url": "https://x/a"},
        {"Image Path": "images\\b.jpg", "caption": "A fox", "style": "etching", "artist": "Doré", "url": ""},
        {"Image Path": "images/a.jpg", "caption": "The wolf again", "style": "", "artist": "", "url": ""},
        {"Image Path": "", "caption": "no picture", "style": "", "artist": "", "url": ""},
    ]
    table = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow", reason="reads Parquet: pip install -e '.[data]'")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{**row, "pixels": b"\0" * 9, "odd": 2**40} for row in rows]), table)
    elif kind == "jsonl":
        put(table, "\n".join(map(json.dumps, rows)))
    else:
        lines = [list(rows[0])] + [list(row.values()) for row in rows]
        put(table, "\r\n".join(("," if kind == "csv" else "\t").join(line) for line in lines))
    listing = read(table)
    assert listing.base == tmp_path and listing.unmatched == 1
    assert [(one.path, one.problem, one.style, one.group) for one in listing.found] == [
        ("images/a.jpg", "", "wood-engraving", "artist/Doré"),
        ("images/b.jpg", "", "etching", "artist/Doré"),
    ]
    words = listing.words["images/a.jpg"]
    more = {"artist": "Doré", "captions_all": ["A wolf", "The wolf again"]}
    assert words == Words("A wolf", source_url="https://x/a", group="artist/Doré", style="wood-engraving", more=more)
    assert captions(listing)["images/b.jpg"] == "A fox"


@pytest.mark.parametrize(
    ("record", "caption", "more"),
    [
        ({"caption": "A wolf", "captions": ["One wolf", "A wolf", 3, " "], "title": "Fables"}, "A wolf",
         {"title": "Fables", "captions_all": ["A wolf", "One wolf"]}),
        ({"title": "Fables"}, "Fables", {}),
        ({"Caption ": "", "text": ["", "A <b>wolf</b>"], "date": 1867, "artist": None, "technique": {"a": 1}}, "A wolf", {"date": "1867"}),
        ({"caption": {"en": "A wolf"}, "captions": {"Plain": "A wolf", "era": 3}, "description": "wolf\n\ud800"}, "wolf ?", {}),
    ],
)  # fmt: skip
def test_a_record_of_any_values_gives_its_words(tmp_path, record, caption, more):
    put(tmp_path / "a.jpg"), put(tmp_path / "a.json", json.dumps(record))
    words = find_words(tmp_path, Found("a.jpg"), Words())
    assert (words.caption, words.more, words.captions) == (caption, more, {"plain": "A wolf"} if "wolf ?" in caption else {})


def test_several_captions_in_one_row_are_all_kept(tmp_path):
    (
        put(tmp_path / "a.jpg"),
        put(tmp_path / "t.jsonl", '{"file_name": "a.jpg", "captions": ["One  wolf", "A <i>wolf</i>"], "title": "Fables"}'),
    )
    assert read(tmp_path / "t.jsonl").words["a.jpg"] == Words(
        "One wolf", more={"title": "Fables", "captions_all": ["One wolf", "A wolf"], "raw_captions_all": ["One  wolf", "A <i>wolf</i>"]}
    )


@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_a_table_opens_nothing_outside_its_folder_unless_a_root_is_given(tmp_path):
    base = tmp_path / "set"
    put(tmp_path / "secret.jpg"), put(base / "a.jpg")
    (base / "link").symlink_to(tmp_path)
    (base / "leaf.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["a.jpg", f"{base}/a.jpg", "../secret.jpg", "x/../../secret.jpg", f"{tmp_path}/secret.jpg", "link/secret.jpg", "leaf.jpg",
             "https://example.org/a.jpg", "nul\0.jpg", "\ud800.jpg", "n" * 5000, "missing.jpg", ".", "..\\secret.jpg"]  # fmt: skip
    table = put(base / "t.jsonl", "\n".join(json.dumps({"file_name": name}) for name in names))
    assert problems(read(table)) == {
        "a.jpg": "", "../secret.jpg": "path leaves the source", f"{tmp_path}/secret.jpg": "path leaves the source",
        "link/secret.jpg": "symlink leaves the source", "leaf.jpg": "symlink leaves the source",
        "https://example.org/a.jpg": "a web address, not a file", "nul\0.jpg": "missing file", "?.jpg": "missing file",
        "n" * 5000: "missing file",
        "missing.jpg": "missing file", ".": "not a regular file",
    }  # fmt: skip
    table = put(base / "t.csv", "file_name\nsecret.jpg\nset/a.jpg\n")
    assert problems(read(table, root=tmp_path)) == {"secret.jpg": "", "set/a.jpg": ""}


# ---- coco -----------------------------------------------------------------------------------------------------------


def coco(**changes) -> dict:
    data = {
        "images": [{"id": 1, "file_name": "1.jpg", "license": 3, "flickr_url": "http://f/1"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "A wolf\n"},
            {"image_id": 1, "caption": "One wolf"},
            {"image_id": 9, "caption": "nothing"},
        ],
        "licenses": [{"id": 3, "name": "CC BY"}],
    }
    return {**data, **changes}


def test_coco_captions_find_their_pictures_in_the_usual_layout(tmp_path):
    put(tmp_path / "val2017/1.jpg"), put(tmp_path / "val2017/2.jpg")
    listing = read(put(tmp_path / "annotations/captions_val2017.json", json.dumps(coco())))
    assert problems(listing) == {"1.jpg": "", "2.jpg": ""} and listing.unmatched == 1
    assert read_picture(listing.base, listing.found[0]) == JPEG
    words = listing.words["1.jpg"]
    assert (words.caption, words.license, words.source_url) == ("A wolf", "CC BY", "http://f/1")
    assert words.more == {"captions_all": ["A wolf", "One wolf"]} and listing.words["2.jpg"].caption == ""


def test_coco_with_odd_values_and_doubled_ids_is_read(tmp_path):
    put(tmp_path / "1.jpg")
    data = coco(
        licenses=7,
        images=[*coco()["images"][:1] * 2, {"id": [1], "file_name": "../1.jpg"}, 5, {"id": 1}],
        annotations=[*coco()["annotations"], 3, {"image_id": {}}],
    )
    listing = read(put(tmp_path / "c.json", json.dumps(data)))
    assert problems(listing) == {"1.jpg": "", "../1.jpg": "path leaves the source"} and listing.words["1.jpg"].caption == "A wolf"


# ---- webdataset -----------------------------------------------------------------------------------------------------


def test_tars_are_read_in_place_with_the_words_of_each_key(tmp_path):
    record = '{"caption": "A fox", "gutenberg_id": 7, "style": "Etching", "title": "Fables", "author": "Aesop"}'
    make_tar(tmp_path / "b.tar", [("x/2.json", record), ("x/2.webp", b"two"), ("x/3.jpg", b"three")])
    make_tar(tmp_path / "a.tar", [("./1.jpg", b"one"), ("./1.seg.png", b"mask"), ("./1.txt", "A wolf\n"), ("./1.cls", "3")])
    assert choose_reader(tmp_path) == "webdataset"
    listing = read(tmp_path)
    assert [one.path for one in listing.found] == ["a.tar/1.jpg", "a.tar/1.seg.png", "b.tar/x/2.webp", "b.tar/x/3.jpg"]
    assert [read_picture(tmp_path, one) for one in listing.found] == [b"one", b"mask", b"two", b"three"]
    assert captions(listing) == {"a.tar/1.jpg": "A wolf", "b.tar/x/2.webp": "A fox", "b.tar/x/3.jpg": ""}
    assert problems(listing)["a.tar/1.seg.png"] == "not read: beside the picture of its sample (a mask, a depth map, a thumbnail)"
    assert [(one.style, one.group) for one in listing.found] == [("", ""), ("", ""), ("etching", "gutenberg_id/7"), ("", "")]
    assert read(tmp_path / "a.tar").found == listing.found[:2]


def test_a_key_that_comes_twice_keeps_each_picture_with_its_own_words(tmp_path):
    make_tar(
        tmp_path / "a.tar",
        [("1.jpg", b"one"), ("1.txt", "A wolf"), ("1.jpg", b"two"), ("1.txt", "A fox"), ("2.txt", "An owl"), ("2.jpg", b"3")],
    )
    listing = read(tmp_path / "a.tar")
    said = {read_picture(tmp_path, one): listing.words[one.path].caption for one in listing.found}
    assert said == {b"one": "A wolf", b"two": "A fox", b"3": "An owl"}


def test_a_tar_cut_in_the_middle_gives_what_is_whole_and_names_the_damage(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("1.jpg", b"1" * 2000), ("1.txt", "A wolf"), ("2.jpg", b"2" * 2000)])
    path.write_bytes(path.read_bytes()[:5000])
    listing = read(path)
    assert (
        problems(listing) == {"a.tar/1.jpg": "", "a.tar/2.jpg": "", "a.tar": "damaged tar file"}
        and captions(listing)["a.tar/1.jpg"] == "A wolf"
    )
    with pytest.raises(PictureError, match="truncated or damaged"):
        read_picture(tmp_path, listing.found[1])


def test_links_and_paths_in_a_tar_lead_nowhere(tmp_path):
    put(tmp_path / "secret.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.LNKTYPE), ("3.jpg", tarfile.FIFOTYPE), ("4.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "secret.jpg"
            tar.addfile(info)
        for name in ("../5.jpg", "/6.jpg", "7\udcff.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    found = {shown(path): problem for path, problem in problems(read(tmp_path / "a.tar")).items()}
    assert found == {
        "a.tar/1.jpg": "not a regular file", "a.tar/2.jpg": "not a regular file", "a.tar/3.jpg": "not a regular file",
        "a.tar/../5.jpg": "path leaves the source", "a.tar//6.jpg": "path leaves the source", "a.tar/7?.jpg": "",
    }  # fmt: skip


def backwards_tar() -> bytes:
    """A member of negative size: whoever goes on from its end reads it again, for ever."""
    info = tarfile.TarInfo("1.jpg")
    head = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    head[124:136] = (-1024).to_bytes(12, "big", signed=True)
    head[148:156] = b"        "
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head) + bytes(2048)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.tar", b"", "damaged tar file"),
        ("a.tar", b"no tar at all" * 99, "damaged tar file"),
        ("a.tar", backwards_tar(), "damaged tar file"),
        ("a.tar.gz", b"\x1f\x8b", "compressed tar: unpack it to .tar first"),
    ],
)
def test_a_broken_tar_is_one_line_in_the_listing(tmp_path, name, data, problem):
    put(tmp_path / name, data)
    assert problems(read(tmp_path)) == {name: problem}


# on made shards: test_tars_are_read_in_place_with_the_words_of_each_key
@pytest.mark.skipif(not (SHARED / "engravings").is_dir(), reason="the real engravings are not beside the project")
def test_real_shards_are_read_with_their_words():
    listing = read(SHARED / "engravings" / "val-00000.tar")
    assert len(listing.found) == 385 and not any(problems(listing).values()) and len({one.group for one in listing.found}) == 16
    assert all(words.caption and words.more["title"] for words in listing.words.values())
    assert read_picture(listing.base, listing.found[-1])[8:12] == b"WEBP"


# ---- huggingface ----------------------------------------------------------------------------------------------------


needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")


@needs_datasets
def test_a_saved_data_set_gives_its_pictures_and_words(tmp_path):
    import datasets

    features = datasets.Features({
        "picture": datasets.Image(), "text": datasets.Value("string"), "style": datasets.ClassLabel(names=["etching", "wood cut"]),
        "artist": datasets.Value("string"),
    })  # fmt: skip
    rows = {"picture": [{"bytes": b"one", "path": None}, None], "text": ["A wolf", None], "style": [1, None], "artist": ["Doré", None]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(str(tmp_path / "set"))
    assert choose_reader(tmp_path / "set") == "huggingface"
    listing = read(tmp_path / "set")
    assert captions(listing) == {"train/00000000": "A wolf", "train/00000001": ""}
    assert [(one.style, one.group) for one in listing.found] == [("wood-cut", "artist/Doré"), ("", "")]
    assert read_picture(listing.base, listing.found[0]) == b"one"
    with pytest.raises(PictureError, match="missing file"):
        read_picture(listing.base, listing.found[1])


@needs_datasets
def test_rows_that_name_files_open_none_outside_the_data_set(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    put(tmp_path / "secret.jpg"), put(tmp_path / "set/a.jpg")
    paths = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "gone.jpg"]
    pq.write_table(
        pa.table({"image": [{"bytes": None, "path": path} for path in paths], "caption": ["A wolf"] * 4}), tmp_path / "set/rows.parquet"
    )
    listing = read(tmp_path / "set/rows.parquet", "huggingface")
    assert read_picture(listing.base, listing.found[0]) == JPEG and listing.words["train/00000003"].caption == "A wolf"
    for one, reason in zip(listing.found[1:], ("path leaves the source", "path leaves the source", "cannot be read")):
        with pytest.raises(PictureError, match=reason):
            read_picture(listing.base, one)


@needs_datasets
def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    put(tmp_path / "a.parquet", "nothing")
    assert choose_reader(tmp_path) == "huggingface"
    with pytest.raises(FileNotFoundError, match="not a data set that `datasets` can open"):
        read(tmp_path)


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_without_datasets_the_message_names_the_package(tmp_path):
    with pytest.raises(ImportError, match=r"datasets is not installed.*pip install"):
        read(Path("owner/name"), "huggingface")


# ---- remote ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket():
    """A folder of an object storage in memory: (its address, a function that puts files into it)."""
    fsspec = pytest.importorskip("fsspec", reason="reads URLs: pip install -e '.[data]'")
    fs = fsspec.filesystem("memory")
    yield "memory://bucket/set", lambda name, data=JPEG: fs.pipe(f"/bucket/{name}", data.encode() if isinstance(data, str) else data)
    fs.rm("/bucket", recursive=True)


def test_a_folder_in_object_storage_is_read_with_sidecars_tables_and_tars(bucket, tmp_path):
    url, put_there = bucket
    put_there("set/a.jpg", b"one"), put_there("set/a.txt", "A wolf"), put_there("set/deep/b.png"), put_there("set/b.json", "{}")
    (
        put_there("set/deep/b.json", '{"caption": "A fox", "title": "Fables"}'),
        put_there("set/c.jpg"),
        put_there("set/metadata.csv", "file_name,caption\nc.jpg,An owl\n"),
    )
    put_there("set/t.tar", make_tar(tmp_path / "t.tar", [("1.jpg", b"two"), ("1.txt", "A stork")]).read_bytes())
    put_there("other/secret.jpg"), put_there("set2/no.jpg")
    assert choose_reader(url) == "remote"
    listing = pickle.loads(pickle.dumps(read(url)))
    assert listing.base == url and not any(problems(listing).values())
    assert captions(listing) == {"a.jpg": "A wolf", "c.jpg": "An owl", "deep/b.png": "A fox", "t.tar/1.jpg": "A stork"}
    data = {one.path: read_picture(Path(str(listing.base)), one) for one in listing.found}
    assert data == {"a.jpg": b"one", "c.jpg": JPEG, "deep/b.png": JPEG, "t.tar/1.jpg": b"two"}
    assert problems(read(f"{url}/t.tar")) == {"t.tar/1.jpg": ""} and problems(read(f"{url}/a.jpg")) == {"a.jpg": ""}


def test_what_is_wrong_in_object_storage_is_said(bucket, monkeypatch):
    url, put_there = bucket
    (
        put_there("set/cut.tar", b"nothing" * 99),
        put_there("set/a.jpg", b"12345"),
        put_there("set/a.json", "{"),
        put_there("set/big.jpg", bytes(99)),
    )
    monkeypatch.setattr("data_tools.readers.remote.MAX_BYTES", 50)
    listing = read(url)
    assert problems(listing) == {"a.jpg": "", "big.jpg": "file too large", "cut.tar": "damaged tar file"}
    with pytest.raises(CaptionError, match="not valid JSON"):
        find_words(listing.base, listing.found[0], Words())
    put_there("set/a.jpg", b"123")
    with pytest.raises(PictureError, match="truncated or damaged"):
        read_picture(listing.base, listing.found[0])
    with pytest.raises(PictureError, match="cannot be read"):
        read_picture(listing.base, Found("gone.jpg", where=Remote("memory://bucket/gone.jpg")))
    assert read("memory://bucket/nowhere").found == []
    put_there("set/metadata.csv", "a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"metadata.csv names no pictures: its columns are \['a', 'b'\].*Rename the path column"):
        read(url)


def test_file_urls_are_read_as_the_folders_they_are_links_and_all(tmp_path):
    put(tmp_path / "in/a wolf.jpg"), put(tmp_path / "secret.jpg")
    (tmp_path / "in/link.jpg").symlink_to(tmp_path / "secret.jpg")
    listing = read(f"file://{tmp_path}/in")
    assert listing == read(tmp_path / "in") and captions(listing, from_names=True) == {"a wolf.jpg": "a wolf"}
    table = put(tmp_path / "in/t.csv", "file_name,caption\na wolf.jpg,A wolf\n")
    assert captions(read(table.as_uri())) == {"a wolf.jpg": "A wolf"}


@pytest.mark.skipif(find_spec("aiohttp") is None, reason="aiohttp is not installed: no web addresses through fsspec")
def test_a_folder_on_the_web_is_read(tmp_path):
    put(tmp_path / "set/a.jpg"), put(tmp_path / "set/a.txt", "A wolf"), put(tmp_path / "other/b.jpg")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        listing = read(f"http://127.0.0.1:{server.server_address[1]}/set/")
        assert captions(listing) == {"a.jpg": "A wolf"} and read_picture(Path("."), listing.found[0]) == JPEG
        server.shutdown()


# ---- one file of words for several pictures, and words as they were found -------------------------------------------


def test_two_pictures_that_share_one_text_get_none_of_it_and_the_text_is_named(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "a.png"), put(tmp_path / "a.txt", "A wolf")
    put(tmp_path / "b.jpg"), put(tmp_path / "b.png"), put(tmp_path / "b.txt", "A fox"), put(tmp_path / "b.jpg.txt", "A stork")
    (
        put(tmp_path / "c.jpg"),
        put(tmp_path / "c.webp"),
        put(tmp_path / "c.json", '{"caption": "An owl"}'),
        put(tmp_path / "c.webp.txt", "A crane"),
    )
    put(tmp_path / "d.jpg"), put(tmp_path / "d.png"), put(tmp_path / "d.txt", "A hen")
    put(tmp_path / "captions.csv", "file_name,caption\nd.jpg,A cock\n")
    listing = read(tmp_path)
    assert captions(listing) == {
        "a.jpg": "", "a.png": "", "b.jpg": "A stork", "b.png": "A fox", "c.jpg": "", "c.webp": "A crane", "d.jpg": "A cock", "d.png": "",
    }  # fmt: skip
    assert dict(listing.unread) == dict.fromkeys(("a.txt", "c.json", "d.txt"), "not read: ambiguous: several pictures have its name")
    assert set(listing.unread.values()) <= EXPLANATIONS.keys()


def test_what_cleaning_changed_is_kept_as_it_was_found(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "a.txt", " A\u200b <b>wolf</b>\n")
    put(tmp_path / "b.jpg"), put(tmp_path / "b.json", '{"caption": "A fox &amp; a hen", "title": "Fables"}')
    put(tmp_path / "c.jpg"), put(tmp_path / "c.txt", " \u06a9\u062a\u0627\u0628\u200c\u0647\u0627\n")  # its joiner is a part of the word
    put(tmp_path / "d.jpg"), put(tmp_path / "captions.csv", "file_name,caption\na.jpg,no\nd.jpg,An <i>owl</i>\n")
    make_tar(tmp_path / "e.tar", [("k.jpg", JPEG), ("k.txt", "A \u201cstork\u201d")])
    listing = read(tmp_path)
    words = {one.path: find_words(listing.base, one, listing.words.get(one.path, Words())) for one in listing.found}
    assert {path: (said.caption, said.raw) for path, said in words.items()} == {
        "a.jpg": ("A wolf", "A\u200b <b>wolf</b>"), "b.jpg": ("A fox & a hen", "A fox &amp; a hen"),
        "c.jpg": ("\u06a9\u062a\u0627\u0628\u200c\u0647\u0627", ""), "d.jpg": ("An owl", "An <i>owl</i>"),
        "e.tar/k.jpg": ('A "stork"', "A \u201cstork\u201d"),
    }  # fmt: skip


# ---- gutenberg ------------------------------------------------------------------------------------------------------


def plates(html: str, title: str = "") -> dict[str, tuple[str, str]]:
    """{address: (caption, where it was found)} of the pictures on a page."""
    return {one.src: (one.caption, one.caption_source) for one in illustrations(Page(html), title) if not one.is_link}


@pytest.mark.parametrize(
    ("html", "caption", "source"),
    [
        ("<figure><img src=a.jpg alt=no><figcaption>The <i>wolf</i>.</figcaption></figure>", "The wolf.", "figcaption"),
        ('<div class="figcenter"><img src=a.jpg><span class="caption">The wolf.</span></div>', "The wolf.", "caption class"),
        ('<p class=fig><a href="b.jpg"><img src=a.jpg alt="A"></a></p><p class="caption">The wolf.</p>', "The wolf.", "caption class"),
        ('<div class="caption">The wolf.<img src=a.jpg></div>', "The wolf.", "caption class"),
        ('<p>One day.</p><img src=a.jpg alt="The wolf"><p>He ran.</p>', "The wolf", "alt"),
        ('<div class=fig><img src=a.jpg alt="the wolf">THE WOLF <small>and the lamb</small></div>', "THE WOLF and the lamb", "alt"),
        ('<div class=fig><img src=a.jpg alt="Fig. 12" title="The wolf"></div>', "The wolf", "title"),
        ("<h2>List of Illustrations</h2><p><a href='#p1'>The wolf . . . . . 12</a></p><h2>I</h2><a name=p1></a><img src=a.jpg alt=''>",
         "The wolf", "list of illustrations"),
        ("<center><img src=a.jpg alt=''><br>The wolf</center>", "The wolf", "figure text"),
        ("<div class=fig><img src=a.jpg alt=i042.jpg></div><h3>THE WOLF</h3>", "THE WOLF", "neighbouring text"),
        ("<p class=center><img src=a.jpg></p><p align=center><small>The wolf</small></p><p>He ran.</p>", "The wolf", "neighbouring text"),
        ("<h2>The Wolf</h2><div class=fig><img src=a.jpg></div><p>He ran.</p>", "The Wolf", "heading above"),
        ("<h2>CHAPTER IV.</h2><div class=fig><img src=a.jpg></div><p>He ran.</p>", "", ""),
        ("<h1>FABLES OF AESOP</h1><div class=fig><img src=a.jpg></div><p>He ran.</p>", "", ""),
        ("<h3>The Fox</h3><img src=z.jpg><h3>The Wolf</h3><div class=fig><img src=a.jpg></div>", "", ""),
        ("<div class=figleft><img src=a.jpg alt='O'></div><p>nce upon a time</p>", "", ""),
        ("<p>One day.</p><img src=a.jpg alt=''><p>He ran.</p>", "", ""),
        ("<img src=a.jpg alt='The &lt;wolf&gt; &amp;amp; I &mdash; we'>", "The <wolf> & I — we", "alt"),
    ],
)  # fmt: skip
def test_the_caption_is_taken_from_the_place_that_names_the_picture(html, caption, source):
    assert plates(html)["a.jpg"] == (caption, source)


def test_the_context_is_the_story_around_the_picture():
    html = (
        f"<h2>I</h2><p>{'Before it. ' * 60}</p><div class=fig><img src=a.jpg><p>The wolf</p></div><p><span class=pagenum>12</span>After "
        "it.</p>"
    )
    context = next(illustrations(Page(html))).context
    assert context.startswith("it. Before it.") and context.endswith("Before it. After it.") and len(context) <= 300


BOOK = """<!DOCTYPE html><html><head><title>The Project Gutenberg eBook of Fables, by Aesop</title>
<style>.drop {{ background: url('images/drop.png') }}</style></head><body><pre>Title: Fables
Author: Aesop
Illustrator: Harrison Weir

*** START OF THE PROJECT GUTENBERG EBOOK ***</pre><h1>FABLES</h1>{}<p>*** END OF THE PROJECT</p><img src=images/end.png></body></html>"""


@pytest.fixture
def book(tmp_path) -> Path:
    page = (
        '<div class=fig><a href="images/wolf_large.jpg"><img src="images/WOLF.jpg" alt="The wolf"></a></div>'
        '<div class=fig><img src="images/fox.jpg" alt="The fox"><a href="images/fox_large.jpg">[Larger]</a></div>'
        '<p>A map <a href="images/map.jpg">of the forest</a></p><img src="images/gone.jpg" alt="The owl"><img src="../../secret.jpg">'
        '<img src="/etc/secret.jpg"><img src="http://x/y.jpg"><img src="data:image/png;base64,AA"><img>'
    )
    put(tmp_path / "4321/4321-h.htm", BOOK.format(page))
    for name in ("wolf", "wolf_large", "fox", "fox_large", "map", "unused"):
        put(tmp_path / f"4321/images/{name}.jpg")
    put(tmp_path / "4321/images/drop.png"), put(tmp_path / "loose wolf.jpg"), put(tmp_path / "secret.jpg")
    return tmp_path


def test_a_book_gives_the_large_pictures_their_words_and_says_why_others_are_left(book):
    assert choose_reader(book) == "gutenberg"
    listing = read(book)
    assert problems(listing) == {
        "4321/images/drop.png": "ornament of the style sheet", "4321/images/fox.jpg": "thumbnail of 4321/images/fox_large.jpg",
        "4321/images/end.png": "missing file",
        "4321/images/fox_large.jpg": "", "4321/images/gone.jpg": "missing file", "4321/images/map.jpg": "",
        "4321/images/unused.jpg": "not shown in the book",
        "4321/images/wolf.jpg": "thumbnail of 4321/images/wolf_large.jpg", "4321/images/wolf_large.jpg": "", "loose wolf.jpg": "",
        "secret.jpg": "",
    }  # fmt: skip
    assert captions(listing) == {
        "4321/images/fox_large.jpg": "The fox", "4321/images/wolf_large.jpg": "The wolf", "4321/images/map.jpg": "of the forest",
        "loose wolf.jpg": "", "secret.jpg": "",
    }  # fmt: skip
    words = listing.words["4321/images/wolf_large.jpg"]
    assert words.source_url == "https://www.gutenberg.org/ebooks/4321" and words.more["caption_origin"] == "alt"
    assert {name: words.more[name] for name in ("title", "author", "illustrator", "gutenberg_id")} == {
        "title": "Fables", "author": "Aesop", "illustrator": "Harrison Weir", "gutenberg_id": "4321",
    }  # fmt: skip
    assert {one.group for one in listing.found if one.path.startswith("4321")} == {"book/4321"}
    assert read(book / "4321").found[3].path == "images/fox_large.jpg"
    assert captions(read(book / "4321/4321-h.htm"))["images/wolf_large.jpg"] == "The wolf"


@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_a_book_page_that_leaves_the_source_is_not_read(book, tmp_path):
    put(tmp_path.parent / "secret.htm", "<img src=images/wolf.jpg alt='a secret'>")
    (book / "4321/4321-h.htm").unlink()
    (book / "4321/4321-h.htm").symlink_to(tmp_path.parent / "secret.htm")
    listing = read(book)
    assert problems(listing)["4321/images/wolf.jpg"] == "book page: symlink leaves the source"


def test_the_facts_of_a_book_come_from_meta_elements_too():
    page = Page(
        '<title>Fables | Project Gutenberg</title><meta name="dc.creator" content="Aesop"><meta property="og:title" content="Fables &amp; '
        'Tales"><h2>Illustrated by JOHN TENNIEL</h2>'
    )
    assert book_facts(page, "pg77-images.html") == {
        "title": "Fables & Tales",
        "author": "Aesop",
        "illustrator": "John Tenniel",
        "gutenberg_id": "77",
    }


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "html",
    [
        "", "\0\0", "<", "<img", "<img src=a.jpg alt='", "</p></p></div>", "<![if lt IE 9]><p>x<![endif]>", "<!-- <img src=a.jpg>", "<?xml",
        "&#xFFFFFFFFF;&#0;&bogus;",
        "<table><tr><td><p><img src=a.jpg><li>" * 20, "<div>" * 5_000 + "<img src=a.jpg>", "<a " * 30_000, "<!--" * 30_000, "<a =" * 30_000,
        "<a b='" * 30_000,
        "<title>" * 9 + "by " * 30_000, "(larger " * 30_000, "<a href=#a>x" * 3_000, "<img src=a.jpg>" * 2_000,
        "<p>" + "word " * 100_000 + "<img src=a.jpg>",
        "<h2>Illustrations</h2>" + "<a href='#a'>" * 2_000, "<style><!-- </style><img src=a.jpg alt='The wolf'>",
        "\ud800<img src='\ud800.jpg'>",
    ],
)  # fmt: skip
def test_no_page_is_too_broken_to_be_read(html):
    page = Page(html)
    for one in illustrations(page):
        assert len(one.context) <= 300 and "\n" not in one.caption
    assert set(book_facts(page, "1-h.htm")) == {"title", "author", "illustrator", "gutenberg_id"}


def test_a_comment_that_never_ends_does_not_swallow_the_book():
    assert plates("<style><!-- p {} </style><img src=a.jpg alt='The wolf'>") == {"a.jpg": ("The wolf", "alt")}


@pytest.mark.parametrize(
    "data",
    ["<img src=a.jpg alt='Café'>".encode("utf-16"), "\ufeff<img src=a.jpg alt='Café'>".encode(),
     "<meta charset=iso-8859-1><img src=a.jpg alt='Café'>".encode("cp1252"),
     "<meta charset=none><img src=a.jpg alt='Café'>".encode("cp1252"), "<meta charset=idna><img src=a.jpg alt='Café'>".encode("cp1252")],
)  # fmt: skip
def test_a_page_is_read_in_its_own_encoding(tmp_path, data):
    put(tmp_path / "1-h.htm", data), put(tmp_path / "a.jpg")
    assert captions(read(tmp_path)) == {"a.jpg": "Café"}


REAL = {  # what a reader of the books finds in them
    "15889": {"images/10b.png": "Fig. 2.—PLAN.", "images/7a.png": "", "images/15b.png": "Fig. 7.—PARKIA BIGLOBOSA."},
    "17024": {"images/fp055.jpg": "Portrait of a Young Soko",
        "images/map-fr.jpg": "MAP OF CONJECTURAL GEOGRAPHY OF CENTRAL AFRICA, FROM DR. LIVINGSTONE'S NOTES"},
    "19033": {"images/plate02.jpg": "Alice at the Mad Tea Party.", "images/i003.jpg": "", "images/cover.jpg": "",
        "images/i011.jpg": "IV—THE RABBIT SENDS IN A LITTLE BILL"},
    "24685": {"images/img-front.jpg": "A Perilous Escape", "images/img-title.jpg": "", "images/img-127.jpg": "Clove-hitch"},
    "27576": {"images/i146.jpg": "ACTIVE VOLCANO IN RÉUNION", "images/i108.jpg": "", "images/i139b.jpg": "The Scarlet Pimpernel"},
    "28353": {"images/ill_007.jpg": "A WILD BOAR AT BAY.", "images/ill_008.jpg": "THE FIRST VALENTINE.", "images/ill_009.jpg": "",
        "images/ill_016.jpg": "SHADOWS OF GREAT MEN."},
    "29021": {"images/image_002.jpg": "Cinderilla and her Prince", "images/image_164.jpg": '"HE THOUGHT THE PRINCESS WAS HIS QUEEN"',
        "images/seal.jpg": "", "images/image_c.jpg": ""},
}  # fmt: skip


MADE = {  # the ways of the real books: a page, and what a reader finds in it
    "1001": (  # a linked thumbnail, and the caption in the text below it, too
        '<p class="center"><a href="./images/1b.png"><img src="./images/1b_th.png" alt=" Fig. 2.&mdash;THE VALVE." /></a><br />'
        '\nFig. 2.&mdash;THE VALVE.</p><p>Steam enters.</p><p class="center"><img src="./images/2.png" alt=" Fig. 3." /><br />'
        '\nFig. 3.</p><p>It leaves.</p><p class="center"><img src="./images/3.png" alt=" Fig. 4.&mdash;ACER RUBRUM." /><br />'
        "\nFig. 4.&mdash;ACER RUBRUM.</p>",
        {"images/1b.png": "Fig. 2.—THE VALVE.", "images/2.png": "", "images/3.png": "Fig. 4.—ACER RUBRUM."},
    ),
    "1002": (  # a list of illustrations in capitals, and a map that is only linked
        '<h2>ILLUSTRATIONS</h2><p><a href="#fp5">1.</a> PORTRAIT OF A YOUNG OTTER</p>'
        "<p><a href='#map'>MAP</a> OF THE UPPER RIVER, FROM THE AUTHOR'S NOTES</p>"
        '<p>[<a href="images/map-full.jpg">Full-resolution</a> image of this map]</p><hr /><h2>CHAPTER I.</h2><p>They swim.</p>'
        '<div class="figcenter"><a name="fp5" id="fp5" /> <img src="images/fp5.jpg" alt="Portrait of a Young Otter"'
        ' title="Portrait of a Young Otter" /> <b>Portrait of a Young Otter</b></div><p>They dive.</p>'
        '<div class="figcenter"><a name="map" id="map" /><img src="images/map.jpg" alt="[Click to see full-resolution scan]" />'
        '<b>A Map of the Forest</b><br />[<a href="images/map-full.jpg">Click</a> to see a full-resolution scan]</div>',
        {"images/fp5.jpg": "Portrait of a Young Otter", "images/map-full.jpg": "MAP OF THE UPPER RIVER, FROM THE AUTHOR'S NOTES"},
    ),
    "1003": (  # thumbnails of numbered files, a cover, and a chapter whose heading is below the picture
        '<h1>THE HARE</h1><p class="figcenter"><a href="images/cover.jpg"><img src="images/cover_th.jpg" alt="Frontispiece" /></a></p>'
        "<p>It rained.</p><p class='figcenter'><a href='images/plate1.jpg'><img src='images/plate1_th.jpg' alt='The Hare at Tea.'></a>"
        '</p><p class="caption">The Hare at Tea.</p><p>"Sit down," said he.</p><p class="figright"><a href="images/i3.jpg">'
        '<img src="images/i3_th.jpg" alt="Illo3" /></a></p><p>They sat.</p><hr /><p><span class="pagenum">[Pg 9]</span></p>'
        '<p class="figcenter"><a href="images/i4.jpg"><img src="images/i4_th.jpg" alt="Illo4" /></a></p>'
        '<h2><a name="II"></a>II&mdash;THE HARE WRITES A LETTER</h2><p>Dear friend.</p>',
        {"images/plate1.jpg": "The Hare at Tea.", "images/i3.jpg": "", "images/cover.jpg": "",
         "images/i4.jpg": "II—THE HARE WRITES A LETTER"},
    ),
    "1004": (  # tags in capitals, CENTER, a title page
        '<A NAME="front"></A><CENTER> <IMG CLASS="imgcenter" SRC="images/front.jpg" ALT="A Narrow Passage" BORDER="2">'
        '<H3 CLASS="h3center"> A Narrow Passage </H3></CENTER><BR><BR><CENTER> <IMG SRC="images/title.jpg" ALT="Title page"></CENTER>'
        '<H1 ALIGN="center"> The Reef </H1><H3 ALIGN="center"> By the Rev. </H3><H3><A HREF="#knot"> REEF KNOTS </A></H3><P>We tied.'
        '</P><A NAME="knot"></A><CENTER> <IMG SRC="images/knot.jpg" ALT="Reef-knot"> <H4 CLASS="h4center"> Reef-knot </H4></CENTER>'
        "<P>And went.</P>",
        {"images/front.jpg": "A Narrow Passage", "images/title.jpg": "", "images/knot.jpg": "Reef-knot"},
    ),
    "1005": (  # small capitals below, which alt has large; an initial; verses beside the picture
        '<p>It smoked.</p><div class="figcenter"><img src="images/5.jpg" alt="A HOT SPRING IN R&Eacute;AL"'
        ' title="A HOT SPRING IN R\ufffdAL" /><p class="center smcap">a hot spring in r&eacute;al</p></div><h2>A SONG OF PEARS.</h2>'
        '<div class="figleft1"><img src="images/6.jpg" alt="T" title="T" /></div><p><span class="smcap">he</span> pears are ripe,<br />'
        ' and low.</p><p>Small it is.<br /></p><div class="figright"><img src="images/7.jpg" alt="The Blue Speedwell"'
        ' title="The Blue Speedwell" /></div><p>It opens.<br />It shuts.</p>',
        {"images/5.jpg": "A HOT SPRING IN RÉAL", "images/6.jpg": "", "images/7.jpg": "The Blue Speedwell"},
    ),
    "1006": (  # a caption of that class; a heading above two pictures, and one below
        '<p>He ran.</p><div class="figleft"><img src="images/7.jpg" alt="A STAG AT BAY." title="" />'
        '<span class="caption">A STAG AT BAY.</span></div><p>It turned.</p><hr /><h2><a name="L"></a>THE LAST LETTER.</h2>'
        '<div class="figcenter"><img src="images/8.jpg" alt="" title="" /></div>'
        '<div class="figright"><img src="images/9.jpg" alt="" title="" /></div><p>Ah, well.</p><hr />'
        '<div class="figcenter"><img src="images/10.jpg" alt="" title="" /></div><h3>SHADOWS OF THE HAND.</h3><p>Who can turn it?</p>',
        {"images/7.jpg": "A STAG AT BAY.", "images/8.jpg": "THE LAST LETTER.", "images/9.jpg": "",
         "images/10.jpg": "SHADOWS OF THE HAND."},
    ),
    "1007": (  # a plate before the title that only the list names; quotes; a printer's mark; a large initial
        '<div class="figcenter"><a name="pic_1" id="pic_1"></a><img src="images/2.jpg" alt="" /></div><h1>OLD TALES</h1>'
        '<h2>ILLUSTRATED BY<br />A FRIEND</h2><p>&nbsp;</p><div class="figcenter"><img src="images/seal.jpg" alt="" /></div>'
        "<p>&nbsp;</p><p>&nbsp;</p><h3>A. PRINTER &amp; C<sup>O</sup>. L<sup>TD</sup>.</h3><h2>THE ILLUSTRATIONS</h2><table>"
        '<tr><td><a href="#pic_1">The Miller and his Cat</a></td><td></td><td><i><a href="#pic_1">Frontispiece</a></i></td></tr>'
        '<tr><td><a href="#pic_2">"She thought it was the King"</a></td><td><i>facing</i></td><td><a href="#Page_9">9</a></td></tr>'
        "</table><h2>FOREWORD</h2>"
        '<div class="figleft"><img src="images/c.jpg" alt="C" /></div><p><i>hildren know</i> these.</p>'
        '<div class="figcenter"><a name="pic_2"></a><img src="images/17.jpg" alt="&quot;SHE THOUGHT IT WAS THE KING&quot;" />'
        '<span class="caption">&quot;SHE THOUGHT IT WAS THE KING&quot;</span></div>',
        {"images/2.jpg": "The Miller and his Cat", "images/17.jpg": '"SHE THOUGHT IT WAS THE KING"', "images/seal.jpg": "",
         "images/c.jpg": ""},
    ),
}  # fmt: skip


@pytest.mark.parametrize("number", MADE)
def test_made_books_give_the_printed_captions(number, tmp_path):
    page, expected = MADE[number]
    put(tmp_path / number / f"{number}-h.htm", BOOK.format(page).replace("<img src=images/end.png>", "").replace("images/drop.png", ""))
    for name in set(re.findall(r"images/\w[\w-]*\.\w+", page)):
        put(tmp_path / number / name)
    read_as_printed(tmp_path / number, number, expected)


# in the ways of these books: test_made_books_give_the_printed_captions
@pytest.mark.skipif(not (SHARED / "raw-books").is_dir(), reason="the real books are not beside the project")
@pytest.mark.parametrize("number", REAL)
def test_real_books_give_the_printed_captions(number):
    read_as_printed(SHARED / "raw-books" / number, number, REAL[number])


def read_as_printed(folder: Path, number: str, expected: dict[str, str]) -> None:
    listing = read(folder)
    said = captions(listing)
    assert {path: said[path] for path in expected} == expected
    for one in listing.found:
        if one.path.rpartition(".")[0].endswith("_th"):
            assert one.problem == f"thumbnail of {one.path.replace('_th.', '.')}"
    words = listing.words[next(iter(expected))]
    assert words.more["gutenberg_id"] == number and words.more["title"] and words.more["author"]
    assert not {"missing file"} & set(problems(listing).values())


# ---- choosing a reader, and refusing ----------------------------------------------------------------------------------


def test_what_a_source_is_is_recognised(tmp_path):
    for name in ("t.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet"):
        assert choose_reader(put(tmp_path / "files" / name, "")) == "manifest"
    assert choose_reader(put(tmp_path / "files/c.json", "")) == "coco"
    assert choose_reader(put(tmp_path / "files/s.tar", "")) == "webdataset"
    assert choose_reader(put(tmp_path / "files/1-h.HTML", "")) == "gutenberg"
    assert choose_reader(put(tmp_path / "tars/a.tar", "").parent) == "webdataset"
    assert choose_reader(put(tmp_path / "rows/data/a.parquet", "").parents[1]) == "huggingface"
    assert choose_reader(put(tmp_path / "saved/state.json", "").parent) == "huggingface"
    put(tmp_path / "mixed/a.tar", ""), put(tmp_path / "mixed/a.jpg")
    assert choose_reader(tmp_path / "mixed") == "folder"
    (tmp_path / "empty").mkdir()
    assert choose_reader(tmp_path / "empty") == "folder"
    assert [choose_reader(url) for url in ("s3://bucket/x", "https://example.org/x/", "memory://x")] == ["remote"] * 3


@pytest.mark.parametrize(
    ("source", "reader", "error", "message"),
    [
        ("", "foldr", ValueError, "--reader 'foldr' is unknown: did you mean folder"),
        ("nowhere", "auto", FileNotFoundError, "nowhere does not exist: give a folder of pictures"),
        ("a.jpg", "auto", FileNotFoundError, "a.jpg is a file: give a folder of pictures, or a table of pictures"),
        ("a.jpg", "folder", FileNotFoundError, "a.jpg is a file: give a folder"),
        ("a.jpg", "classes", FileNotFoundError, "a.jpg is a file: give a folder"),
        ("", "manifest", FileNotFoundError, "is a folder: --reader manifest takes a file"),
        ("", "coco", FileNotFoundError, "is a folder: --reader coco takes a file"),
        ("", "remote", ValueError, "--reader remote takes an address like s3://"),
        ("", "gutenberg", FileNotFoundError, "no books in .*: their pages must be named NUMBER-h.htm"),
        ("columns.csv", "auto", ValueError, r"names no pictures: its columns are \['a', 'b'\].*Rename the path column"),
        ("latin.csv", "auto", ValueError,
         "latin.csv, line 2: is not utf-8: byte 0xe9.*Save the table as UTF-8, or name its encoding: --encoding cp1252"),
        ("line.jsonl", "auto", ValueError, "line.jsonl, line 2: is not valid JSON.*Write one JSON object per line"),
        ("list.jsonl", "auto", ValueError, "list.jsonl, line 1: is not a JSON object.*Write one object per line"),
        ("deep.jsonl", "auto", ValueError, "deep.jsonl, line 1: is not valid JSON"),
        ("field.csv", "auto", ValueError, "field.csv, line 2: a quote is not closed"),
        ("broken.parquet", "auto", ValueError, "broken.parquet is not a readable Parquet file"),
        ("cut.json", "auto", ValueError, "cut.json is not a COCO file: it is not valid JSON. Give a captions_"),
        ("deep.json", "auto", ValueError, "deep.json is not a COCO file: it is not valid JSON"),
        ("list.json", "auto", ValueError, "list.json is not a COCO file: it holds a list"),
        ("keys.json", "auto", ValueError, r"it holds the keys \['a'\], not lists named images and annotations"),
        ("boxes.json", "auto", ValueError, "boxes.json is a COCO file without captions"),
        ("s3://bucket/x", "folder", ValueError, "--reader folder reads local files, and s3://bucket/x is an address"),
        ("nonsense://x", "auto", FileNotFoundError, "nonsense://x cannot be opened: Protocol not known.*Is the address right"),
        ("file:///nowhere/at/all", "auto", FileNotFoundError, "/nowhere/at/all does not exist"),
    ],
)  # fmt: skip
def test_refusals_name_the_file_and_the_way_out(tmp_path, source, reader, error, message):
    (
        put(tmp_path / "a.jpg"),
        put(tmp_path / "columns.csv", "a,b\n1,2\n"),
        put(tmp_path / "latin.csv", "file_name\n\xe9.jpg".encode("latin-1")),
    )
    (
        put(tmp_path / "line.jsonl", '{"file_name": "a.jpg"}\n{"file_name": \n'),
        put(tmp_path / "list.jsonl", "[1]"),
        put(tmp_path / "deep.jsonl", "[" * 50_000),
    )
    put(tmp_path / "field.csv", f'file_name,caption\na.jpg,"{"x" * 2**21}\n'), put(tmp_path / "broken.parquet", "PAR1 and nothing")
    (
        put(tmp_path / "cut.json", '{"images": [{"id"'),
        put(tmp_path / "deep.json", "[" * 50_000),
        put(tmp_path / "list.json", "[]"),
        put(tmp_path / "keys.json", '{"a": 1}'),
    )
    put(tmp_path / "boxes.json", json.dumps(coco(annotations=[{"bbox": [1, 2, 3, 4]}, 7])))
    if source.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="reads Parquet: pip install -e '.[data]'")
    with pytest.raises(error, match=message):
        read(source if "://" in source else tmp_path / source, reader)


def test_a_parquet_table_with_odd_columns_is_read_or_refused_by_name(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="reads Parquet: pip install -e '.[data]'")
    import pyarrow.parquet as pq

    put(tmp_path / "a.jpg")
    pictures = pa.array([{"bytes": b"x", "path": "a.jpg"}])
    pq.write_table(pa.table({"image": pictures, "caption": ["A wolf"]}), tmp_path / "inside.parquet")
    with pytest.raises(ValueError, match=r"inside.parquet names no pictures: its columns are \['image', 'caption'\].*--reader huggingface"):
        read(tmp_path / "inside.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a.jpg"])] * 2, names=["file_name", "file_name"]), tmp_path / "twice.parquet")
    try:
        assert problems(read(tmp_path / "twice.parquet")) == {"a.jpg": ""}
    except ValueError as error:
        assert "twice.parquet" in str(error)
    pq.write_table(pa.table({"image": pictures, "path": ["a.jpg"], "captions": [["A wolf", "One wolf"]]}), tmp_path / "both.parquet")
    assert captions(read(tmp_path / "both.parquet")) == {"a.jpg": "A wolf"}


# ---- the bytes ------------------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_fetched_has_a_reason(tmp_path, monkeypatch):
    put(tmp_path / "a.jpg", bytes(99))
    monkeypatch.setattr("data_tools.readers.files.MAX_BYTES", 50)
    for found, reason in [
        (Found("a.jpg"), "file too large"), (Found("gone.jpg"), "cannot be read"),
        (Found("a.jpg", where=Span("a.jpg", 0, 51)), "file too large"),
        (Found("x", where=Span("a.jpg", 60, 50)), "truncated or damaged"), (Found("x", where=Span("gone.tar", 0, 1)), "cannot be read"),
    ]:  # fmt: skip
        with pytest.raises(PictureError, match=reason):
            read_picture(tmp_path, found)


def test_a_listing_of_many_pictures_is_small(tmp_path):
    table = put(tmp_path / "t.csv", "file_name,caption\n" + "".join(f"images/{i:07d}.jpg,A wolf number {i}\n" for i in range(3000)))
    tracemalloc.start()
    listing = read(table)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(listing.found) == 3000 and size / 3000 < 1200, f"{size / 3000:.0f} bytes a picture"


def test_names_of_any_bytes_can_be_shown():
    assert shown("wolf \udcff é.jpg") == "wolf \\xff é.jpg"

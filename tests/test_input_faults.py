"""Faults of input, by their kinds: what is not read is named with the way out, and nothing disagrees."""

import csv
import io
import json
import os
import shlex
import struct
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from data_tools import inspect, prepare
from data_tools.pipeline import next_steps
from data_tools.pipeline.refusal import STOPPED, record_refusal
from data_tools.readers import choose_reader
from data_tools.readers.folder_scan import ELSEWHERE, LONE_TEXT, NOTHING_KNOWN, OTHER_SUFFIX, SAVED, SECOND_WORDS
from data_tools.readers.table_files import TableError, read_table
from data_tools.readers.webdataset import OTHER_NAME
from data_tools.report.reasons import EXPLANATIONS, family
from data_tools.text.captions import plain_text, raw_of
from tests.test_prepare import ROOT, pairs
from tests.test_reported import Made, image, table, tar
from tokun.config import Config, load_config
from tokun.data import captions, image_files
from tokun.data.shards import expand_shards
from tokun.tokenizers.text import normalize
from tokun.utils.console import home_path
from tokun.utils.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
A, B = image(1), image(2)


@pytest.fixture
def made(tmp_path, capsys):
    return lambda files, *options, source="": Made(tmp_path, files, capsys, *options, source=source)


# ---------------------------------------------------------------------------------------------------------------------
# files that vanish


def test_files_of_other_kinds_are_named_for_what_they_are(made):
    """Drawings, a camera's raw files, archives, spreadsheets: "neither a picture nor words" told nobody what to do."""
    other = {"a.svg": "<svg/>", "b.psd": "8BPS", "c.jxl": b"\xff\x0a", "d.NEF": "x"}
    packed = {"e.zip": "PK", "f.7z": "7z", "more.rar": "Rar!"}
    lists = {"captions.xlsx": "PK", "captions.yaml": "a.png: A wolf.", "captions.txt": "a.png\tA wolf.", "metadata.csv.gz": b"\x1f\x8b"}
    found = made({"a.png": A, "a.json": '{"caption": "A wolf."}', "coco_annotations.json": '{"images": []}', **other, **packed, **lists})
    reasons = found.reasons()
    assert found.captions == {"a.png": "A wolf."} and set(reasons) == {"coco_annotations.json", *other, *packed, *lists}
    for names, word in ((other, "format"), (packed, "unpack"), (lists, "captions in another form"), (["coco_annotations.json"], "COCO")):
        assert all(word in reasons[name] for name in names)
    assert set(reasons.values()) <= EXPLANATIONS.keys()


def test_members_of_a_tar_that_are_not_read_are_listed_or_counted(made):
    """A tar in a tar, a table in a tar, arrays and classes beside the pictures: in no row and in no count."""
    members = [
        ("a.png", A), ("a.txt", b"A wolf."), ("a.cls", b"5"), ("a.npy", b"x"), ("inner.tar", b"x"),
        ("metadata.csv", b"file_name,caption\n"),
        ("b.mp3", b"ID3"), ("b.txt", b"A song."), ("c.png", B), ("c.txt", b"A fox."), ("c.caption", b"A second."),
        ("c.png.txt", b"A third."),
    ]  # fmt: skip
    found = made({"t.tar": tar(members)})
    assert found.captions == {"t.tar/a.png": "A wolf.", "t.tar/c.png": "A fox."}
    assert {path.removeprefix("t.tar/") for path in found.reasons()} == {
        "inner.tar", "metadata.csv", "b.mp3", "b.txt", "c.caption", "c.png.txt",
    }  # fmt: skip
    assert "not read: 1 × .cls, 1 × .npy" in found.said and "unpack the tar" in found.reasons()["t.tar/metadata.csv"]


@pytest.mark.parametrize("name", ["pictures.zip", "shards.tar.gz", "PICTURES.TGZ", "x.7z"])
def test_a_compressed_source_is_told_to_be_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="is compressed: unpack it"):
        choose_reader(tmp_path / name)


def test_tables_that_disagree_are_told(made):
    """metadata.csv and metadata.jsonl of two versions of a data set: one of them won, and nobody knew which."""
    found = made({"a.png": A, "metadata.csv": "file_name,caption\na.png,A wolf.\n", "captions.json": '{"a.png": "A fox."}'})
    assert found.captions == {"a.png": "A wolf."} and "Captions of captions.json that are not read" in found.said


def test_empty_files_links_and_folders_named_like_files_all_have_a_row_or_are_entered(made, tmp_path):
    """A table of no bytes is refused; else an empty tar, a link to nowhere, a folder called x.png: nothing of it is lost."""
    (tmp_path / "in").mkdir()
    for name, target in (("gone.txt", "nowhere"), ("gone.dat", "nowhere"), ("b.txt", "real/w.txt")):
        (tmp_path / "in" / name).symlink_to(target)
    empty = dict.fromkeys(["e.tar", "p.parquet", "sub/empty.txt", "x.csv", "c.png"], b"")
    found = made(
        {
            "b.png": B,
            "real/w.txt": "A fox.",
            "x.png/a.png": A,
            "x.png/a.txt": "A wolf.",
            "t.tar/c.png": image(3),
            "t.tar/c.txt": "",
            **empty,
        }
    )
    assert found.captions == {"b.png": "A fox.", "x.png/a.png": "A wolf."}
    assert found.reasons().keys() == {*empty, "gone.txt", "gone.dat", "real/w.txt", "t.tar/c.png"} and all(found.reasons().values())


# ---------------------------------------------------------------------------------------------------------------------
# tables


def test_rows_that_name_no_picture_are_counted_with_their_line_wherever_the_table_is(made):
    """A table with rows was called empty when their path was."""
    some, none = "file_name,caption\n,x\na.png,A wolf.\n,y\n", "file_name,caption\n,x\n,y\n"
    for name, source in (("metadata.csv", ""), ("list.csv", "list.csv")):
        found = made({"a.png": A, name: some}, "--overwrite", source=source)
        assert found.captions == {"a.png": "A wolf."} and f"Rows of {name} that name no picture: 2, the first in line 2." in found.said
        found = made({name: none}, "--overwrite", source=source)
        assert found.status == 2 and "names no pictures: in all of its 2 rows the path is empty" in found.said
        made({name: some}, "--overwrite", source=source)


def test_a_table_that_is_given_may_be_half_filled_and_tells_of_rows_that_name_nothing(made, tmp_path):
    (tmp_path / "given.csv").write_text("\ufefffile_name;caption\r\na.png;A wolf, a fox\r\nb.png;\r\n;lost\r\n", encoding="utf-8")
    found = made({"a.png": A, "a.txt": "Old.", "b.png": B, "b.txt": "A hen."}, "--captions", str(tmp_path / "given.csv"))
    assert found.captions == {"a.png": "A wolf, a fox", "b.png": "A hen."} and "name no picture: 1, the first in line 4" in found.said


def test_rows_with_too_many_fields_are_counted_once_behind_a_cell_of_several_lines(tmp_path):
    """The rest of the cell was counted as rows of its own, and rows by their last lines."""
    (tmp_path / "t.csv").write_text(
        'file_name,caption\na.png,"A\nwolf, big\nby a mill", x\nb.png,ok\nc.png,a,b\nd.png,"x\ny",z\ne.png,ok\n'
    )
    with pytest.raises(TableError, match=r"line 2: 3 fields .* \(so have 2 more: lines 6, 7\)"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", '\ufeff"file_name";"caption"\r\n"a.png";"A wolf; big"\r\n'),
        ("metadata.jsonl", "\ufeff" + json.dumps({"file_name": "a.png", "text": ["A wolf; big"]}) + "\r\n\r\n"),
        ("captions.parquet", table([{"file_name": "a.png", "caption": ["A wolf; big"]}])),
        ("captions.json", '\ufeff[{"file_name": "a.png", "Prompt": "A wolf; big"}]'),
    ],
)
def test_marks_of_byte_order_line_ends_and_lists_in_cells_change_no_caption(made, name, content):
    assert made({"a.png": A, name: content}).captions == {"a.png": "A wolf; big"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("file_name,caption\na.png,A ship, a mill\nb.png,A cow\nc.png,A fox, a hen\nd.png,A, b\n", r"line 2: 3 fields.*2 more: lines 4, 5"),
        (b"file_name,caption\r\na.png,A wolf\rb.png,A fox\r\n", "carriage return without a line feed"),
        ("file_name,caption\na.png," + "a " * (1 << 20) + "\n", r"field of more than 1,048,576 characters"),
        ("file_name,caption\na.png,A wolf\n".encode("utf-16-le"), "--encoding utf-16-le"),
        ('file_name, caption\na.png, "A ship, a mill"\n', "no space between the comma and the opening quote"),
        ("﻿# by me\nfile_name,caption\na.png,A wolf\n", r"line 2: 2 fields where the header has 1"),
    ],
)
def test_a_fault_of_a_table_is_told_as_what_it_is(tmp_path, content, told):
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TableError, match=told):
        read_table(tmp_path / "t.csv")


def test_lines_separated_by_bars_and_an_unpaired_quote_inside_a_field(tmp_path):
    (tmp_path / "t.csv").write_text('file_name|caption\r\na.png|A 5" ship, a mill\r\n')
    assert [row.values for row in read_table(tmp_path / "t.csv")] == [{"file_name": "a.png", "caption": 'A 5" ship, a mill'}]


@pytest.mark.parametrize(
    ("name", "content", "status", "told"),
    [
        ("metadata.csv", "file_name,caption\n", 1, "metadata.csv has no rows below its header"),
        ("metadata.csv", "file_name,caption\na.png,N/A\nb.png,#N/A\n", 1, "All 2 captions in metadata.csv are empty"),
        ("metadata.csv", "file_name,text,caption\na.png,A wolf,\nb.png,x,A fox\n", 0,
         "from its column caption and, where that is empty, from text"),
        ("metadata.parquet", table([{"file_name": "a.png", "caption": {"en": "A wolf"}}]), 2,
         "the caption is no text in any of its 1 rows"),
        ("metadata.parquet", table([{"file_name": "a.png", "caption": b"A wolf"}]), 2, r"caption: bytes, not text"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": {"en": "A"}}\n{"file_name": "b.png", "text": "A fox"}\n', 0,
         "Rows of metadata.jsonl whose caption is no text: 1"),
        ("metadata.jsonl", '[{"file_name": "a.png", "text": "A wolf"}]', 2, "is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "A wolf"},\n', 2, "line 1: is not valid JSON"),
    ],
)  # fmt: skip
def test_a_table_whose_captions_are_none_says_why(made, name, content, status, told):
    """Header only, nested columns, bytes, other words for nothing: "no caption 100 %", and no word about the table."""
    found = made({"a.png": A, "b.png": B, name: content})
    assert found.status == status and told in found.said


def test_a_list_that_a_data_frame_wrote_into_a_cell_is_several_captions(made):
    """['A wolf.', 'A fox.'] became the caption, brackets and all."""
    found = made(
        {"a.png": A, "b.png": B, "metadata.csv": "file_name,caption\na.png,\"['A wolf.', 'A wolf by a mill.']\"\nb.png,['not a list\n"}
    )
    assert found.captions == {"a.png": "A wolf.", "b.png": "['not a list"}


FAULTY = {
    "metadata.csv": "file_name,caption\na.png,A ship, a mill\nb.png,A wolf\n",
    "sub/captions.jsonl": '{"file_name": "a.png", "text": "A wolf"\n',
    "captions.json": "A wolf.",
    "metadata.parquet": table([{"file": 1, "title": b"x"}]),
}


@pytest.mark.parametrize("name", FAULTY)
def test_of_a_refused_source_the_manifest_lists_every_file_and_the_fault(made, tmp_path, name):
    """Nothing was written at all: of ten tables one had a fault, and what else lay there was told by nobody."""
    found = made({"a.png": A, "b.png": B, "notes.pdf": "%PDF", name: FAULTY[name]})
    assert found.status == 2 and not found.captions and "out/manifest.parquet lists the files" in found.said
    assert found.rows.keys() == {"a.png", "b.png", "notes.pdf", name} and not any(row["shard"] for row in found.rows.values())
    reasons = found.reasons()
    assert reasons.pop(name).startswith(f"caption table: {name}") and set(reasons.values()) == {STOPPED}
    assert {family(reason) for reason in found.reasons().values()} <= EXPLANATIONS.keys()
    with pytest.raises(FileNotFoundError, match=r"prepare kept no picture there, and .*/manifest\.parquet says why"):
        expand_shards(str(tmp_path / "out"))
    (tmp_path / "in" / name).unlink()
    found = made({"a.txt": "A wolf.", "b.txt": "A fox."}, "--max-aspect", "3")
    assert found.status == 0 and len(found.captions) == 2, "the record of a refusal is replaced by any run"
    found = made({name: FAULTY[name]}, "--max-aspect", "3")
    assert found.status == 2 and len(found.captions) == 2 and "lists the files" not in found.said, "shards and their manifest stay"


def test_shards_laid_beside_the_record_of_a_refusal_are_not_replaced(made, tmp_path):
    """The record alone was asked, so another tool's shards went without --overwrite."""
    made({"a.png": A, "captions.json": "A wolf."})
    others = tar([("x.png", B), ("x.json", b'{"path": "x.png", "caption": "A mill."}')])
    (tmp_path / "out" / "train-00000.tar").write_bytes(others)
    (tmp_path / "in" / "captions.json").unlink()
    found = made({"a.txt": "A wolf."})
    assert found.status == 2 and "--overwrite" in found.said
    assert (tmp_path / "out" / "train-00000.tar").read_bytes() == others


def test_the_fault_of_a_table_in_a_folder_whose_name_is_not_utf8_is_recorded(tmp_path):
    """pyarrow refused the name in the manifest's reason, and its traceback hid the fault."""
    table = tmp_path / "in" / os.fsdecode(b"caf\xe9") / "captions.json"
    table.parent.mkdir(parents=True)
    table.write_text("A wolf.")
    (tmp_path / "in" / "a.png").write_bytes(A)
    error = TableError(f"{table} cannot be read for captions")
    assert record_refusal(str(tmp_path / "in"), str(tmp_path / "out"), error) == f"{tmp_path / 'out'}/manifest.parquet lists the files"
    reasons = {row["path"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()}
    name = "caf\\xe9/captions.json"
    assert reasons == {"a.png": STOPPED, name: f"caption table: {name} cannot be read for captions"}
    assert name in json.loads((tmp_path / "out" / "prepare.json").read_text())["refused"]


def test_the_fault_of_a_linked_table_is_its_own(tmp_path, monkeypatch, capsys):
    """With SOURCE . the message begins with ./: every picture got the table's fault as its own reason."""
    (tmp_path / "elsewhere.csv").write_text("file_name,caption\na.png,A wolf.\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(A)
    (tmp_path / "in" / "captions.csv").symlink_to(tmp_path / "elsewhere.csv")
    monkeypatch.chdir(tmp_path / "in")
    assert prepare.main([".", "--out", str(tmp_path / "out")]) == 2 and "captions.csv cannot be read" in capsys.readouterr().err
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    reasons = {row["path"]: row["reason"] for row in rows}
    assert reasons["a.png"] == STOPPED and reasons["captions.csv"].startswith("caption table: captions.csv cannot be read")


def test_the_fault_of_a_table_in_a_folder_of_the_sources_name_is_its_own_and_no_older_page_speaks_of_it(tmp_path, monkeypatch):
    """SOURCE in, with in/in/captions.csv: the folder was taken off twice, and every picture got the table's fault."""
    (tmp_path / "in" / "in").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(A)
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["in", "--style", "engraving", "--out", "out"]) == 1 and (tmp_path / "out" / "report.html").is_file(), (
        "no caption: nothing is kept"
    )
    table = tmp_path / "in" / "in" / "captions.json"
    table.write_text("{", encoding="utf-8")
    told = record_refusal("in", "out", TableError("in/in/captions.json cannot be read"))
    assert told == "out/manifest.parquet lists the files" and not (tmp_path / "out" / "report.html").exists()
    reasons = {row["path"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()}
    assert reasons["a.png"] == STOPPED and reasons["in/captions.json"] == "caption table: in/captions.json cannot be read"


# ---------------------------------------------------------------------------------------------------------------------
# sidecars and names


def test_a_raw_file_beside_its_picture_does_not_take_its_words(made):
    """IMG_1.CR2 begins like a TIFF: IMG_1.txt was called ambiguous, and IMG_1.jpg lost its caption."""
    raw = b"II*\0\x10\0\0\0CR\2\0"
    found = made({"a.jpg": image(1, "JPEG"), "a.CR2": raw, "a.txt": "A wolf.", "b": image(2), "b.txt": "A fox.", "c.dng": raw})
    assert found.captions == {"a.jpg": "A wolf.", "b": "A fox."} and set(found.reasons()) == {"a.CR2", "c.dng"}


def test_the_title_that_is_the_files_name_is_no_caption(made):
    """A photo service's IMG_1.jpg.json with "title": "IMG_1.jpg" and an empty description."""
    say = lambda title, text: json.dumps({"title": title, "description": text})  # noqa: E731
    found = made({"IMG_1.jpg": image(1, "JPEG"), "IMG_1.jpg.json": say("IMG_1.jpg", ""), "b.png": B, "b.png.json": say("b.png", "A fox."),
                  "c.png": image(3), "c.json": say("The owl", "")})  # fmt: skip
    assert found.captions == {"b.png": "A fox.", "c.png": "The owl"} and found.reasons() == {"IMG_1.jpg": "no caption"}


def test_rows_whose_pictures_lie_in_another_folder_are_read_and_told_where(made):
    """metadata.jsonl above images/, with bare names; a name that two folders have means neither."""
    found = made({"images/a.png": A, "metadata.jsonl": '{"file_name": "a.png", "text": "A wolf."}\n'})
    assert found.captions == {"images/a.png": "A wolf."} and "a.png is taken for images/a.png" in found.said
    found = made({"others/a.png": B}, "--overwrite")
    assert not found.captions and "Is that images/a.png? Paths are counted from the table's folder" in found.said


def test_upper_case_decomposed_names_and_backslashes_find_their_pictures(made):
    e = unicodedata.normalize("NFD", "é")
    found = made({"IMG.JPEG": image(1, "JPEG"), "IMG.JPEG.TXT": "A wolf.", f"caf{e}.png": B, "café.json": '{"caption": "A café."}',
                  "x y/c.png": image(3), "metadata.csv": "file_name,caption\n.\\x y\\c.png,An owl.\n"})  # fmt: skip
    assert set(found.captions.values()) == {"A wolf.", "A café.", "An owl."}


ODD_JSON = {
    "a": {"caption": {"en": "A wolf", "de": "Ein Wolf"}},
    "b": {"captions": [{"text": "A wolf"}]},
    "c": {"caption": 0.5},
    "f": {"caption": True},
}


@pytest.mark.parametrize("packed", [False, True])
def test_json_whose_caption_is_no_text_is_told_beside_a_picture_as_in_a_tar(made, packed):
    """No caption, said the manifest, of a picture with captions in two languages; and of broken JSON, in a tar alone."""
    files = {f"{name}.{kind}": image(number) if kind == "png" else json.dumps(ODD_JSON[name]).encode()
             for number, name in enumerate(ODD_JSON) for kind in ("png", "json")}  # fmt: skip
    files |= {"d.png": image(7), "d.json": b'{"caption": "A wo', "e.png": image(8), "e.json": b'{"caption": ["A fox.", "One fox."]}'}
    found = made({"t.tar": tar(files.items())} if packed else files)
    assert list(found.captions.values()) == ["A fox."]
    reasons = {path.removeprefix("t.tar/"): reason for path, reason in found.reasons().items()}
    assert reasons.pop("d.png") == "caption file is not valid JSON" and reasons.keys() == {f"{name}.png" for name in ODD_JSON}
    assert (
        all(reason.startswith("caption file: its caption is no text: ") for reason in reasons.values())
        and "'de': 'Ein Wolf'" in reasons["a.png"]
    )


def test_words_that_lie_or_are_named_as_no_words_are_read_are_told_where_to_put_them(made):
    """A folder of texts beside the folder of pictures, NAME.tags, NAME.xmp of a photo manager: "neither a picture nor words for one"."""
    beside = {"captions/a.txt": "A wolf", "labels/B.TXT": "A fox"}
    other = {"images/a.tags": "wolf", "images/a.png.md": "A wolf", "images/B.xmp": "<x/>", "images/b.yaml": "caption: A fox"}
    rest = {"images/notes.md": "#", "data.arrow": "ARROW1", "images/c.txt": "A hen"}
    found = made({"images/a.png": A, "images/b.png": B, **beside, **other, **rest})
    reasons = found.reasons()
    assert {reasons[name] for name in beside} == {ELSEWHERE} and {reasons[name] for name in other} == {OTHER_SUFFIX}
    assert [reasons[name] for name in rest] == [NOTHING_KNOWN, SAVED, LONE_TEXT] and set(reasons.values()) <= EXPLANATIONS.keys()


@pytest.mark.parametrize("name", ["data", "images", "annotations"])
def test_the_rows_of_a_json_may_stand_under_a_name(made, name):
    """{"data": [{"file_name": …}]} was taken for one picture called data whose caption is a list."""
    rows = [{"file_name": "a.png", "text": "A wolf."}, {"file_name": "b.png", "text": ["A fox.", "A red fox."]}]
    found = made({"a.png": A, "b.png": B, "metadata.json": json.dumps({"version": 1, name: rows})})
    assert found.captions == {"a.png": "A wolf.", "b.png": "A fox."}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"captions.csv": "a.png,A wolf\nb.png,A fox\n"}, "has no header: its first line is"),
        ({"captions.tsv": "a.png\tA wolf, big\n"}, "has no header: its first line is"),
        ({"captions.csv": "caption,where\nA wolf,a.png\n"}, "names no pictures: its columns are ['caption', 'where']"),
        ({"x.parquet": table([{"url": "http://example.org/a.png", "caption": "A wolf"}])}, "img2dataset"),
    ],
)
def test_a_table_without_header_or_with_addresses_alone_is_told_as_that(made, files, told):
    pictures = {} if "x.parquet" in files else {"a.png": A}
    found = made({**pictures, **files})
    assert found.status == 2 and told in found.said


def test_texts_in_two_languages_and_with_a_suffix_twice_are_told_how_to_be_named(made):
    found = made(
        {"a.png": A, "a.en.txt": "A wolf", "a.de.txt": "Ein Wolf", "b.png": B, "b.txt.txt": "A fox", "c.png": image(3), "c.Txt": "A hen"}
    )
    longer = ["a.en.txt", "a.de.txt", "b.txt.txt"]
    assert found.captions == {"c.png": "A hen"} and all("name it NAME.txt" in found.reasons()[name] for name in longer)
    assert set(found.reasons().values()) <= EXPLANATIONS.keys()


def test_words_in_a_tar_are_found_under_their_usual_names(made):
    """KEY.caption.txt was said to be left for another file of words, of which there was none; accents were composed in one name alone."""
    e, jpeg = unicodedata.normalize("NFD", "é"), image(2, "JPEG")
    found = made({"t.tar": tar([("a.JPG", jpeg), ("a.caption.TXT", b"A wolf."), ("b.png", A), ("b.prompt.txt", b"P"),
                                ("b.text.txt", b"A fox."), (f"{e}.png", image(3)), ("é.txt", b"A hen."),
                                ("c.png", image(4)), ("c.notes.txt", b"?")])})  # fmt: skip
    assert set(found.captions.values()) == {"A wolf.", "A fox.", "A hen."}
    assert found.reasons() == {"t.tar/b.prompt.txt": SECOND_WORDS, "t.tar/c.notes.txt": OTHER_NAME, "t.tar/c.png": "no caption"}
    assert {SECOND_WORDS, OTHER_NAME} <= EXPLANATIONS.keys()


# ---------------------------------------------------------------------------------------------------------------------
# keys


@pytest.mark.parametrize(
    ("members", "kept"),
    [
        ([("a.PNG", A), ("a.png", B), ("a.txt", b"which?")], []),
        ([("a.left.png", A), ("a.right.png", B), ("a.txt", b"which?")], []),
        ([("a.png", A), ("A.png", B), ("a.txt", b"small"), ("A.txt", b"BIG")], ["BIG", "small"]),
        ([("a .png", A), ("a.png", B), ("a .txt", b"blank"), ("a.txt", b"bare")], ["bare", "blank"]),
        ([("x/a.png", A), ("y/a.png", B), ("x/a.txt", b"of x"), ("y/a.json", b'{"caption": "of y"}')], ["of x", "of y"]),
        ([("a.png", A), ("a.thumb.JPG", image(3, "JPEG")), ("a.TXT", b"A wolf.")], ["A wolf."]),
    ],
)
def test_a_sample_of_a_tar_has_its_own_words_or_is_refused_as_ambiguous(made, members, kept):
    found = made({"t.tar": tar(members)})
    assert sorted(found.captions.values()) == kept
    refused = [reason for path, reason in found.reasons().items() if path.lower().endswith("png")]
    assert kept or (len(refused) == 2 and all("ambiguous" in reason for reason in refused))


def test_a_given_caption_saves_a_picture_of_a_tar_whose_own_words_cannot_be_read_or_told_apart(made, tmp_path):
    """In a folder --captions did, in a tar the picture of a broken JSON stayed rejected."""
    members = [("a.png", A), ("a.json", b'{"caption": "A wo'), ("b.left.png", B), ("b.right.png", image(3)), ("b.txt", b"which?"),
               ("c.png", image(4)), ("c.json", b'{"caption": {"en": "A hen"}}'), ("d.png", image(5)), ("d.txt", b"An owl.")]  # fmt: skip
    names = ["a.png", "b.left.png", "b.right.png", "c.png"]
    found = made({"t.tar": tar(members)})
    assert found.captions == {"t.tar/d.png": "An owl."} and {f"t.tar/{name}" for name in names} <= found.reasons().keys()
    (tmp_path / "given.csv").write_text("file_name,caption\n" + "".join(f"t.tar/{name},A wolf of {name}.\n" for name in names))
    found = made({}, "--captions", str(tmp_path / "given.csv"), "--overwrite")
    assert found.captions == {**{f"t.tar/{name}": f"A wolf of {name}." for name in names}, "t.tar/d.png": "An owl."}


# ---------------------------------------------------------------------------------------------------------------------
# text

KEPT_AS_THEY_ARE = [
    "ﬁsh m² ½ №5 ＦＵＬＬ 𝒜", "น้ำตก ไทย", "བོད་ཡིག", "ـ كـــتاب", "क़ ख़", "❤️ ❤︎ 1️⃣", "👩🏽‍🎨 👨‍👩‍👧‍👦",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "葛\U000e0100城",
    "x\u034fy \u061cع", "ǆ ſ İ ı̇", "a <3 b > c", "C:\\path\\n %20 {a,b}", "〆切 ㍿ ㈱", "H₂O", "𓀀 ᠪᠠ᠎ᠢ", "မြန်မာ ខ្ញុំ",
]  # fmt: skip


@pytest.mark.parametrize("text", KEPT_AS_THEY_ARE)
def test_letters_marks_and_selectors_of_any_script_reach_the_shard_and_the_tokenizer_as_they_are(text):
    text = unicodedata.normalize("NFC", text)
    assert plain_text(text) == text == normalize(text) and raw_of(text) == ""


def test_what_changes_is_kept_in_the_shard_whichever_file_it_came_from(made):
    odd = {"a": "co\u00adoperate", "b": "\u2068name\u2069 of a ship", "c": "<i>A</i> wolf &amp; fox"}
    found = made({**{f"{name}.png": image(number) for number, name in enumerate(odd)}, "a.txt": odd["a"],
                  "b.json": json.dumps({"caption": odd["b"]}), "metadata.csv": f"file_name,caption\nc.png,{odd['c']}\n"})  # fmt: skip
    assert found.captions == {"a.png": "cooperate", "b.png": "name of a ship", "c.png": "A wolf & fox"}
    raw = {path: record["raw_caption"] for path, (record, _) in pairs(found.out).items()}
    assert raw == {f"{name}.png": text for name, text in odd.items()}


# ---------------------------------------------------------------------------------------------------------------------
# one way to open a picture


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_size_in_the_header_is_that_of_the_upright_picture(kind):
    """Pillow turns a TIFF's size itself: the header's and the picture's disagreed, and bucketing took tall for wide."""
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = 6
    upright = Image.new("RGB", (60, 30), "white")
    upright.paste("black", (0, 0, 30, 30))
    buffer = io.BytesIO()
    upright.rotate(90, expand=True).save(buffer, kind, exif=exif)
    opened = image_files.decode(buffer.getvalue())
    assert opened.size == image_files.size_of(buffer.getvalue()) == (60, 30)
    assert np.asarray(opened.convert("L"))[:, :25].max() < 60


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken_at_its_own_size(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (60, 30), "black").save(buffer, kind, save_all=True, append_images=[Image.new("RGB", (60, 30), "white")])
    opened = image_files.decode(buffer.getvalue())
    assert opened.size == (60, 30) and np.asarray(opened).max() < 20


def pages(*images):
    """A TIFF of (picture, type of its page)."""
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer) as file:
        for one, kind in images:
            one.save(file, "TIFF", tiffinfo={254: kind, 0x112: 1})
            file.newFrame()
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_the_thumbnail_that_a_scanner_writes_first_is_not_the_picture(mode):
    """A TIFF whose first page is a reduced copy: 96 pixels of it were kept as the plate."""
    whole, small = Image.new(mode, (60, 30)), Image.new(mode, (20, 10))
    for made, size in (
        (pages((small, 1), (whole, 0)), (60, 30)),
        (pages((whole, 0), (small, 1)), (60, 30)),
        (pages((small, 1), (small, 1)), (20, 10)),
        (pages((small, 1)), (20, 10)),
    ):
        assert image_files.decode(made).size == image_files.size_of(made) == size


@pytest.mark.parametrize("what", ["pointer", "tag"])
def test_of_a_tiff_that_begins_with_a_reduced_page_and_is_damaged_behind_it_the_first_page_is_read(what):
    """A broken pointer to the next page, a text in the tag of reduced pages: Pillow reads the first page, and so did prepare."""
    small = Image.new("L", (20, 10), 7)
    if what == "pointer":
        made = bytearray(pages((small, 1)))
        order = "little" if made[:2] == b"II" else "big"
        at = int.from_bytes(made[4:8], order)
        entries = int.from_bytes(made[at : at + 2], order)
        made[at + 2 + 12 * entries : at + 6 + 12 * entries] = (len(made) + 10_000).to_bytes(4, order)
    else:
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info.tagtype[254] = 2
        info[254] = "one"
        buffer = io.BytesIO()
        small.save(buffer, "TIFF", tiffinfo=info)
        made = buffer.getvalue()
    assert image_files.decode(bytes(made)).size == (20, 10)


def test_a_tiff_of_two_pages_is_scaled_by_the_page_that_is_taken():
    low = Image.fromarray((np.arange(1800).reshape(30, 60) * 2).astype(np.uint16))
    opened = image_files.decode(pages((Image.new("I;16", (20, 10), 65535), 1), (low, 0)))
    assert opened.size == (60, 30) and np.asarray(opened).max() > 200


GRAYS = np.linspace(0, 255, 60).astype(np.uint8)[None].repeat(30, 0)


def gray_profile(gamma):
    """An ICC profile of one tone curve, as scanners of prints embed it."""
    tags = {
        b"desc": b"desc" + bytes(4) + (5).to_bytes(4, "big") + b"gray\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2),
    }
    body, table, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s6H4s", start + len(body), b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ", 2026, 1, 1, 0, 0, 0, b"acsp")
    return head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + struct.pack(">I", len(tags)) + table + body


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


L, RGB, WIDE = Image.fromarray(GRAYS), Image.fromarray(GRAYS).convert("RGB"), Image.fromarray(GRAYS.astype(np.uint16) * 257)
OPAQUE = Image.new("L", L.size, 255)
SAME = {
    "CMYK with Adobe's mark, whose inks are stored inverted": saved(RGB.convert("CMYK"), "JPEG", quality=95),
    "CMYK in a TIFF": saved(RGB.convert("CMYK"), "TIFF"),
    "luma and chroma in a TIFF of JPEG": saved(RGB.convert("YCbCr"), "TIFF", compression="jpeg", quality=95),
    "LAB": saved(ImageCms.profileToProfile(RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"), "TIFF"),
    "a palette of grays with an opaque alpha": saved(L.convert("P"), "PNG", transparency=bytes([255] * 256)),
    "16 bits in a big-endian TIFF": saved(Image.fromarray(np.asarray(WIDE).astype(">u2")), "TIFF"),
    "16 bits with a predictor": saved(WIDE, "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}),
    "16 bits where white is 0": saved(Image.fromarray(65535 - np.asarray(WIDE)), "TIFF", tiffinfo={262: 0}),
    "16 bits in JPEG 2000": saved(WIDE, "JPEG2000"),
    "12 bits in a PGM": b"P5 60 30 4095\n" + (np.asarray(WIDE) >> 4).astype(">u2").tobytes(),
    "floats up to 1": saved(Image.fromarray((GRAYS / 255).astype(np.float32)), "TIFF"),
    "an APNG whose default image is not of its animation": saved(
        L, "PNG", save_all=True, default_image=True, append_images=[Image.fromarray(255 - GRAYS)]
    ),
    "bytes behind the end": saved(L, "JPEG", quality=95) + b"rest" * 99,
    "a profile of gray's usual curve": saved(L, "PNG", icc_profile=gray_profile(2.2)),
    "a profile that is none": saved(L, "PNG", icc_profile=b"none"),
    "a profile of gray in a picture of colours": saved(RGB, "PNG", icc_profile=gray_profile(1.0)),
    "turned by XMP alone": saved(L.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, xmp=b'<x tiff:Orientation="6"/>'),
    "an orientation that there is not": saved(L, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_the_same_picture_in_another_coding_is_the_same_picture(kind):
    opened = image_files.decode_as(SAME[kind], 1)
    assert opened.size == image_files.size_of(SAME[kind]) == (60, 30)
    assert np.abs(np.asarray(opened).astype(int) - GRAYS).max() <= 8


@pytest.mark.parametrize("made", [L, WIDE, Image.merge("LA", (L, OPAQUE)), L.convert("P")], ids=["8", "16", "alpha", "palette"])
def test_a_profile_of_gray_is_applied_whatever_the_coding(made):
    opened = np.asarray(image_files.decode(saved(made, "PNG", icc_profile=gray_profile(1.0)))).astype(int)
    expected = 255 * np.where(GRAYS / 255 <= 0.0031308, 12.92 * GRAYS / 255, 1.055 * (GRAYS / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(opened - expected).mean() < 1  # a table of tones, which is coarse in the darkest ones


# ---------------------------------------------------------------------------------------------------------------------
# paths

FOLDERS = ["{a,b}", "{00..03}", "a #1", "#1", "a: b", "`x`", "trail\n", "null", "1e5", "@x", "'q'", "*all", "&ref", "!tag", " lead", "- x"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_printed_command_trains_on_the_folder_whatever_its_name_means_in_yaml(tmp_path, monkeypatch, folder):
    """data.train={a,b}/… was refused as YAML, "a #1" lost what follows the sign, and a line break became a space."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "train-00000.tar").write_bytes(b"")
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    typed = shlex.split(next_steps.training(folder, 40, val=False))
    config = load_config("c.yaml", [one for one in typed if one.startswith("data.train=")])
    assert [str(path) for path in expand_shards(config.data.train)] == [f"{folder}/train-00000.tar"]


ODD_FOLDERS = ["a b [v1]", "*", "s3:x", "caf\udce9", "new\nline", "~", "{a,b}", "hf:"]


@pytest.mark.parametrize("folder", ODD_FOLDERS)
def test_a_data_set_of_parquet_files_is_read_whatever_its_name(made, tmp_path, folder):
    """A second download called "train [1].parquet", and any folder with brackets: `datasets` takes names for patterns and found nothing."""
    rows = [{"image": {"bytes": data, "path": None}, "text": text} for data, text in ((A, "A wolf."), (B, "A fox."))]
    found = made({f"{folder}/train [1].parquet": table(rows)})
    assert found.status == 0 and sorted(found.captions.values()) == ["A fox.", "A wolf."]


@pytest.mark.parametrize("folder", ["a b [v1]", "s3:x", "caf\udce9"])
def test_shards_are_written_and_the_next_commands_printed_whatever_the_folders_name(tmp_path, folder):
    """The report took s3:x for an address, and a name that is not UTF-8 could be neither opened nor printed."""
    for name, content in (("in/a.png", A), ("in/a.txt", b"A wolf.")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    command = [
        sys.executable,
        "-m",
        "data_tools.prepare",
        "in",
        f"--out={folder}",
        "--style",
        "engraving",
        "--no-clean",
        "--workers",
        "1",
        "--val",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home"), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    line = next(one for one in done.stdout.split(b"\n  python ") if b"inspect" in one)
    again = b"cd %b && %b %b" % (os.fsencode(tmp_path), os.fsencode(sys.executable), line)
    inspected = subprocess.run(["bash", "-c", again], env=environment, capture_output=True)
    assert done.returncode == inspected.returncode == 0 and b"1 pairs" in inspected.stdout, done.stderr + inspected.stderr


def test_the_printed_commands_are_typed_as_the_running_one_was(tmp_path, monkeypatch):
    """`tokun train` was offered to someone who runs `python -m data_tools.prepare` in a clone and may have no command tokun."""
    offered = lambda: [line.split("--")[0].strip() for line in next_steps.training("s", 40, val=False).splitlines()]  # noqa: E731
    assert offered() == ["tokun inspect s", "tokun train", "tokun sample"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="data_tools.prepare"))
    monkeypatch.chdir(ROOT)
    assert offered() == ["python -m data_tools.inspect s", "python train.py", "python sample.py"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("another project's")
    assert offered() == ["python -m data_tools.inspect s", "python -m tokun train", "python -m tokun sample"]


@pytest.mark.parametrize("folder", ["-dash", "~nobody-of-this-name"])
def test_a_folder_that_looks_like_an_option_or_a_home_is_printed_so_that_it_is_none(tmp_path, monkeypatch, folder, capsys):
    monkeypatch.chdir(tmp_path)
    Image.open(io.BytesIO(A)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A wolf.")
    assert prepare.main([".", f"--out={folder}", "--style", "engraving", "--no-clean", "--workers", "1", "--val", "0"]) == 0
    line = next(one for one in capsys.readouterr().out.splitlines() if " inspect " in one)
    (shards,) = (one for one in shlex.split(line) if folder in one)
    assert inspect.main([shards]) == 0 and home_path(folder).name == folder


@pytest.mark.parametrize("out", ["-dash", "~nobody-of-this-name/x", "a [1], {b}\nc", "$HOME `x`"])
def test_the_line_that_training_ends_with_names_the_checkpoint_whatever_the_folder(tmp_path, monkeypatch, out):
    """`tokun sample --checkpoint -dash/checkpoint` is an option without its value."""
    from tokun.cli.sample_options import parse
    from tokun.training.generator import where_to

    (tmp_path / out / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = Config(out=out)
    typed = shlex.split(where_to(Path(out) / "checkpoint", config).partition("tokun sample ")[2])
    assert home_path(parse(typed).checkpoint).samefile(tmp_path / out / "checkpoint")
    typed = shlex.split(
        where_to(Path(out), replace(config, start=out, adapter=replace(config.adapter, rank=4))).partition("tokun sample ")[2]
    )
    assert parse(typed).adapter == parse(typed).checkpoint == (f"./{out}" if out[0] in "-~" else out)


def test_a_run_in_a_folder_that_cannot_hold_its_weights_is_refused_at_once(tmp_path, monkeypatch):
    """Only safetensors refuses a name that is not UTF-8, after the first stage was trained."""
    from tokun.training.run import lock_out

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"out='caf\\udce9' is not UTF-8"):
        lock_out(Config(out="caf\udce9"))
    assert not list(tmp_path.iterdir())


def test_settings_that_are_text_are_taken_as_typed_and_others_are_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    typed = ["out=2026", "start=null", "data.val=", "out='a b'", "train.steps=7", "train.precision=no", "seed=3"]
    config = load_config(tmp_path / "c.yaml", typed)
    assert (config.out, config.start, config.data.val, config.train.steps, config.train.precision, config.seed) == (
        "a b",
        "",
        "",
        7,
        "no",
        3,
    )


# ---------------------------------------------------------------------------------------------------------------------
# captions that say nothing


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([*["An engraving."] * 60, *(f"A ship, number {i}." for i in range(40))], "60 of the 100 captions are the same text"),
        (["An engraving.", "an engraving", "AN ENGRAVING!", " An  engraving "] * 10, "40 captions are only 1 different text"),
        ([f"A ship with {i} masts." for i in range(40)], ""),
        ([*["An engraving."] * 19], ""),
        ([f"Plate {i}." for i in range(40)], "40 of the 40 captions are only numbers, file names or addresses"),
        ([f"An engraving, no. {i} of {i + 100}" for i in range(30)], "only numbers"),
        ([f"IMG_{i:04}" for i in range(30)], "only numbers"),
        ([f"The wolf {i}.JPG" for i in range(30)], "file names"),
        ([f"https://example.org/prints?id={i}&lang=en" for i in range(30)], "addresses"),
        ([*(f"Fig. {i}" for i in range(25)), *(f"A wolf, fig. {i}" for i in range(15))], "25 of the 40"),
        ([*(f"Plate {i}" for i in range(15)), *(f"A wolf by tower {i}" for i in range(25))], ""),
        ([f"{i}年の狼" for i in range(30)], ""),
        ([f"Volk nr. {i}" for i in range(30)], "30 of the 30 captions have fewer than 4 words"),
        ([f"Een wolf bij toren {i}" for i in range(30)], ""),
        (["…", "!!!"] * 15, "only 2 different texts"),
    ],
)
def test_captions_that_are_mostly_alike_are_told(texts, told):
    seen = captions.Seen()
    for text in texts:
        seen.add({"caption": text})
    doubts = " ".join(seen.doubts(from_nothing=False))
    assert told in doubts and bool(doubts) == bool(told)
    counted = next_steps.Captions()
    for text in texts:
        counted.add({"shard": "train-00000.tar", "caption": text, "status": "kept", "reason": ""})
    assert (captions.alike(counted.as_json()) or captions.titles(counted.as_json())) == doubts


# ---------------------------------------------------------------------------------------------------------------------
# the museum's path


def test_captions_filled_in_by_hand_find_pictures_whatever_their_names(made, tmp_path):
    """captions.csv names pictures as the manifest does; backslashes, blanks at the end and bytes of another encoding were never found."""
    names = ["back\\slash.png", "plain.png", "two\nlines.png", " blank at the start.png", 'comma, and "quote".png', "caf\udce9.png"]
    found = made({name: image(number) for number, name in enumerate(names)})
    assert found.status == 1 and set(found.reasons().values()) == {"no caption"}
    filled = list(csv.reader(io.StringIO((tmp_path / "out" / "captions.csv").read_text("utf-8-sig"))))
    for number, row in enumerate(filled[1:]):
        row[1] = f"A wolf, number {number}."
    with open(tmp_path / "filled.csv", "w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet saves it
        csv.writer(file, delimiter=";").writerows(filled)
    found = made({}, "--captions", str(tmp_path / "filled.csv"))
    assert found.status == 0 and len(set(found.captions.values())) == len(names) and "without a picture" not in found.said


def test_the_table_to_fill_in_is_utf8_to_excel_and_keeps_what_a_spreadsheet_made_of_it(made, tmp_path):
    """Excel showed "Bär.png" as "BÃ¤r.png", and prepare wrote the museum's table anew, without its notes and its second captions."""
    found = made({"Bär.png": A, "b.png": B})
    written = tmp_path / "out" / "captions.csv"
    assert found.status == 1 and written.read_bytes() == b"\xef\xbb\xbffile_name,caption\nB\xc3\xa4r.png,\nb.png,\n"
    sheet = "File Name;Note;Caption\r\nBär.png;box 3;A bear.\r\nBär.png;;A bear; asleep.\r\ngone.png;lost;\r\n".replace(
        "A bear; asleep.", '"A bear; asleep."'
    )
    written.write_bytes(sheet.encode("utf-8-sig"))
    found = made({"c.png": image(3)}, "--captions", str(written))
    assert found.status == 0 and found.captions == {"Bär.png": "A bear."}
    assert written.read_bytes() == (sheet + "b.png;;\r\nc.png;;\r\n").encode("utf-8-sig")
    for mended in (written.read_bytes() + b"b.png;;A wolf.\r\n", b"caption\nA wolf.\n"):  # complete; of another kind
        written.write_bytes(mended)
        assert made({}, "--overwrite").status == 1 and written.read_bytes() == mended


NAMES = ("0.png", "1.png")
PICTURES = dict(zip(NAMES, (A, B), strict=True))
WITHOUT_CAPTIONS = {
    "a data set of pictures alone": ({"data/train.parquet": table([{"image": {"bytes": one, "path": None}} for one in (A, B)])}, ""),
    "a data set with columns of another kind": (
        {"train.parquet": table([{"image": {"bytes": one, "path": None}, "year": 1800} for one in (A, B)])},
        "",
    ),
    "a tar without words": ({"t.tar": tar(list(PICTURES.items()))}, ""),
    "a tar of empty words": (
        {"t.tar": tar([(name, one) for key, one in PICTURES.items() for name, one in ((key, one), (f"{key[0]}.txt", b" \n"))])}, ""
    ),
    "folders of classes": ({f"engraving/{name}": one for name, one in PICTURES.items()} | {"woodcut/a.png": image(3)}, ""),
    "a list of paths": ({**PICTURES, "list.csv": "file_name,year\n0.png,1800\n1.png,1801\n"}, "list.csv"),
    "a table of other columns beside them": ({**PICTURES, "metadata.csv": "file_name,year\n0.png,1800\n1.png,1801\n"}, ""),
    "a table whose captions are empty": (
        {**PICTURES, "metadata.jsonl": '{"file_name": "0.png", "text": ""}\n{"file_name": "1.png", "text": null}\n'}, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT_CAPTIONS)
def test_pictures_without_captions_get_them_from_the_table_that_is_filled_in_whatever_they_lie_in(made, tmp_path, kind):
    """The printed way out, prepare again with the filled captions.csv, was refused: the source itself had no caption column."""
    files, source = WITHOUT_CAPTIONS[kind]
    found = made(files, source=source)
    assert (found.status == 2) == (
        kind in ("a data set with columns of another kind", "a list of paths", "a table of other columns beside them")
    )
    if found.status == 2:  # a table with columns, none of them known: perhaps one has the captions
        assert "--caption-column" in found.said and "--allow-missing-captions" in found.said
        found = made(files, "--allow-missing-captions", source=source)
    assert "2 pictures have no caption" in found.said and "tokun train" not in found.said
    lines = (tmp_path / "out" / "captions.csv").read_text().splitlines()
    filled = [lines[0], *(f"{line}A wolf of {number}." for number, line in enumerate(lines[1:]))]
    (tmp_path / "filled.csv").write_text("\n".join(filled) + "\n")
    found = made({}, "--overwrite", "--captions", str(tmp_path / "filled.csv"), source=source)
    assert found.status == 0 and sorted(found.captions.values()) == ["A wolf of 0.", "A wolf of 1."]


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (36, "train --config lora start=bundled"),
        (3_000, "train --config finetune start=bundled"),
        (60_000, "train --config engraving-cpu 'data.train"),
    ],
)
def test_the_printed_training_suits_the_number_of_pictures(pictures, told):
    """Of 36 pictures a model from nothing was offered as the next step."""
    assert told in next_steps.training("shards", pictures, val=True)
    assert ("data.val= " in next_steps.training("shards", pictures, val=False)) == ("lora" not in told), "the config names held-out shards"


def test_many_pictures_are_offered_a_recipe_for_each_machine():
    """Of 40,000 paintings on a machine with a GPU the CPU's recipe alone was named."""
    told = next_steps.training("shards", 40_000, val=True).splitlines()
    for machine, config in (("two CPU cores (128 px, grey", "engraving-cpu "), ("a GPU with 80 GB (256 px, grey", "engraving ")):
        place = next(number for number, line in enumerate(told) if machine in line)
        assert f"train --config {config}" in told[place + 1]
    assert "a GPU" not in next_steps.training("shards", 3_000, val=True)


@pytest.mark.parametrize(
    ("side", "again"), [("--side=256", True), ("--side 300", True), ("", True), ("--side 360", False), ("--side 512", False)]
)
def test_pictures_too_small_for_the_gpu_recipes_crops_are_prepared_again_first(side, again):
    """Crops take as little as 1 / 1.4 of the short side: at 256 px nearly all were enlarged."""
    command = ["pictures", "--style", "oil", "--out", "shards", *side.split()]
    pixels = int(side[-3:] or 256)
    told = next_steps.training("shards", 40_000, val=True, command=command, side=pixels)
    assert ("tokun prepare pictures --style oil --out shards --side 360 --overwrite" in told) == again
    recipe = load_config("engraving")
    assert 360 >= recipe.image_tokenizer.image_size * recipe.image_tokenizer_train.crop_scale[1] > 352

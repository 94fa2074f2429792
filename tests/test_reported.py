"""What users of other tools for data sets and training have reported in public, tried on this one: each case says what it was about.

The situations are those of issue threads of webdataset, img2dataset, Hugging Face datasets, diffusers, kohya's scripts, open_clip, timm,
DALLE-pytorch, taming-transformers and their kin. Wanted is always the same: it is read, or it is refused, counted and named.
"""

import csv
import gzip
import io
import json
import os
import tarfile
import unicodedata

import pytest

from data_tools import inspect
from data_tools.prepare import main
from tests.test_prepare import manifest, pairs, picture
from tokun.data.shards import ShardIndex, expand_shards, write_shard
from tokun.data.tars import NO_FILE

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 132735\n"


def image(seed=0, kind="PNG", size=(96, 80), **options):
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind, **options)
    return buffer.getvalue()


def tar(members, **options):
    """[(name, bytes or TarInfo)] -> the bytes of a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as file:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
            file.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def table(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Made:
    """What prepare made of a folder: its status, what it said, {path: row} and {path: caption of the pair}."""

    def __init__(self, folder, files, capsys, *options, source=""):
        for name, content in files.items():
            path = folder / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.out = folder / "out"
        self.status = main(
            [
                str(folder / "in" / source),
                "--out",
                str(self.out),
                "--style",
                "engraving",
                "--workers",
                "1",
                "--no-clean",
                "--val",
                "0",
                *options,
            ]
        )
        done = capsys.readouterr()
        self.said = done.out + done.err
        self.rows = manifest(self.out) if (self.out / "manifest.parquet").exists() else {}
        self.captions = {path: record["caption"] for path, (record, _) in pairs(self.out).items()} if self.rows else {}

    def reasons(self):
        return {path: row["reason"] for path, row in self.rows.items() if row["status"] != "kept"}


@pytest.fixture
def made(tmp_path, capsys):
    return lambda files, *options, source="": Made(tmp_path, files, capsys, *options, source=source)


# ---------------------------------------------------------------------------------------------------------------------
# folders as they come


def test_files_that_systems_leave_behind_are_named_and_no_pictures(made):
    """A Mac's ._a.jpg and __MACOSX, Windows' Thumbs.db and desktop.ini, a notebook's checkpoints."""
    left = {
        "._a.png": b"\0\5\x16\7\0\2\0\0Mac OS X",
        "__MACOSX/._a.png": b"\0\5\x16\7",
        ".DS_Store": b"\0\0\0\1Bud1",
        "Thumbs.db": b"\xd0\xcf\x11\xe0",
        "desktop.ini": "[.ShellClassInfo]",
    }
    found = made({"a.png": image(1), "a.txt": "A wolf.", ".ipynb_checkpoints/a-checkpoint.png": image(1), **left})
    assert found.captions == {"a.png": "A wolf."} and set(found.rows) >= {"a.png", *left, ".ipynb_checkpoints/a-checkpoint.png"}


def test_pointers_of_git_lfs_are_called_by_their_name(made):
    """A data set cloned without git-lfs: pictures, tables and tars are three lines of text."""
    found = made({"a.png": image(1), "a.txt": "A wolf.", "b.png": LFS, "b.txt": "A fox.", "c.tar": LFS, "d.parquet": LFS})
    assert found.captions == {"a.png": "A wolf."} and "git lfs pull" in found.reasons()["b.png"]
    assert found.reasons()["c.tar"] and found.reasons()["d.parquet"]


def test_a_page_of_html_that_was_saved_as_a_picture_is_rejected(made):
    """A downloader that keeps the error page under the picture's name."""
    found = made(
        {
            "a.png": image(1),
            "a.txt": "A wolf.",
            "b.jpg": "<!DOCTYPE html><title>404</title>",
            "b.txt": "A fox.",
            "c.jpg": b"",
            "c.txt": "A hen.",
        }
    )
    assert found.captions == {"a.png": "A wolf."} and found.reasons() == {"b.jpg": "not a picture that can be read", "c.jpg": "empty file"}


def test_a_suffix_that_lies_does_not_lose_the_picture(made):
    """PNGs called .jpg, a .jfif, a .JPE, a picture without any suffix."""
    found = made(
        {
            "a.jpg": image(1),
            "b.jfif": image(2, "JPEG"),
            "c.JPE": image(3, "JPEG"),
            "d": image(4),
            **{f"{name}.txt": f"A wolf {name}." for name in "abcd"},
        }
    )
    assert found.captions == {"a.jpg": "A wolf a.", "b.jfif": "A wolf b.", "c.JPE": "A wolf c.", "d": "A wolf d."}


def test_caches_of_other_trainers_beside_the_pictures_are_named(made):
    """Latents (.npz), weights and a cache of sizes that another trainer left in the folder."""
    left = ["a.npz", "a_0096x0080_flux.npz", "model.safetensors", "cache.sqlite", "a.mask.npy"]
    found = made({"a.png": image(1), "a.txt": "A wolf.", **dict.fromkeys(left, b"PK\3\4")})
    assert found.captions == {"a.png": "A wolf."} and found.reasons() == dict.fromkeys(
        left, "not read: neither a picture nor words for one"
    )


def test_masks_beside_pictures_under_a_longer_name_do_not_take_their_captions(made):
    """a.png with a-mask.png and a.txt: the mask is a picture without a caption, and no second owner of a.txt."""
    found = made({"a.png": image(1), "a-mask.png": image(2), "a.txt": "A wolf."})
    assert found.captions == {"a.png": "A wolf."} and found.reasons() == {"a-mask.png": "no caption"}


def test_names_of_another_encoding_and_with_line_breaks_stay_files_of_their_own(made, tmp_path):
    """A disk of a system whose names were latin-1, and a name with a line break."""
    made({"a.png": image(1)})
    for number, name in enumerate([b"caf\xe9", b"two\nlines"], 2):
        path = os.path.join(os.fsencode(tmp_path / "in"), name)
        try:
            for suffix, content in ((b".png", image(number)), (b".txt", b"A wolf.")):
                with open(path + suffix, "wb") as file:
                    file.write(content)
        except OSError:
            pytest.skip("this disk has no such names")
    found = made({}, "--overwrite")
    assert len(found.rows) == 3 and list(found.captions.values()) == ["A wolf.", "A wolf."]


def test_pictures_by_split_in_folders_named_train_and_test_are_all_read(made):
    """An image folder with train/, validation/ and test/ and a metadata.csv in each."""
    files = {f"{split}/{i}.png": image(i) for i, split in enumerate(["train", "validation", "test"])}
    found = made(
        {
            **files,
            **{
                f"{split}/metadata.csv": f"file_name,text\n{i}.png,A wolf in {split}.\n"
                for i, split in enumerate(["train", "validation", "test"])
            },
        }
    )
    assert found.captions == {f"{split}/{i}.png": f"A wolf in {split}." for i, split in enumerate(["train", "validation", "test"])}


def book(number):
    """A page of a book with one picture."""
    page = (
        '<html><head><title>The Project Gutenberg eBook of Fables</title></head><body><div class="figcenter"><img '
        f'src="images/{number}.png" alt="A wolf."><p class="caption">A wolf by a mill, number {number}.</p></div></body></html>'
    )
    return {f"{number}/{number}-h.htm": page, f"{number}/images/{number}.png": image(number)}


LOOSE = {
    "loose.png": image(90),
    "loose.tar": tar([("k.png", image(91)), ("k.txt", b"A hen.")]),
    "notes.txt": "nobody's",
    "other.csv": "a,b\n1,2\n",
    "thing.bin": b"\1",
    "deep/er/x.png": image(92),
}


@pytest.mark.parametrize("kind", ["pictures", "classes", "books", "tars", "a data set", "a table beside them"])
def test_whatever_kind_a_folder_is_every_file_below_it_ends_in_the_manifest(made, kind):
    """One loose file, and the reader that was chosen for the others passed it over."""
    main_files = {
        "pictures": {f"{i}.png": image(i) for i in range(3)},
        "classes": {f"{style}/{i}.png": image(i) for i, style in enumerate(["engraving", "drawings", "painting"])},
        "books": book(11) | book(12), "tars": {f"{i}.tar": tar([("k.png", image(i)), ("k.txt", b"A wolf.")]) for i in range(9)},
        "a data set": {
            "data/train-00000-of-00001.parquet": table(
                [{"image": {"bytes": image(i), "path": f"{i}.png"}, "text": f"A wolf {i}."} for i in range(3)]
            )
        },
        "a table beside them": {"metadata.csv": "file_name,caption\na.png,A wolf.\n", "a.png": image(1)},
    }[kind]  # fmt: skip
    found = made({**main_files, **LOOSE}, "--captions-from-names")
    named = set(found.rows)
    for path in {**main_files, **LOOSE}:
        inside = (
            any(name.startswith((f"{path}/", "train/")) for name in named)
            if path.endswith((".tar", "parquet"))
            else path.endswith(("metadata.csv", "-h.htm"))
        )
        assert path in named or inside, f"{path} is in no row of {sorted(named)}"


def test_every_file_of_a_saved_data_set_with_loose_ones_beside_it_ends_in_the_manifest(made, tmp_path):
    """save_to_disk writes Arrow files; a picture and a note lie beside them."""
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": image(i), "path": f"{i}.png"} for i in range(3)], "text": [f"A wolf {i}." for i in range(3)]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "in"))
    found = made({"notes.txt": "nobody's", "loose.png": image(90)})
    assert {"notes.txt", "loose.png"} <= set(found.rows)
    assert {path for path in found.rows if path.endswith(".arrow")} == {"data-00000-of-00001.arrow"} and not found.captions


# ---------------------------------------------------------------------------------------------------------------------
# files of words


def test_a_caption_of_several_lines_keeps_all_of_them(made):
    """A text file with a line for each caption, or one that was wrapped: nothing is cut at the first line."""
    found = made({"a.png": image(1), "a.txt": "A wolf\r\nby a mill,\n\nat night.\n"})
    assert found.captions == {"a.png": "A wolf by a mill, at night."}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_a_file_of_words_in_another_encoding_is_read(made, encoding):
    """Notepad's UTF-16, a mark of byte order in front of the first word, a latin é."""
    found = made({"a.png": image(1), "a.txt": "A café by the mill.".encode(encoding)})
    assert found.captions == {"a.png": "A café by the mill."}


def test_two_files_of_words_of_one_picture_are_not_both_silently_one(made):
    """a.txt by a tagger and a.caption by a captioner: the one that is not read is named."""
    found = made({"a.png": image(1), "a.txt": "A wolf.", "a.caption": "A fox."})
    assert found.captions == {"a.png": "A wolf."} and found.reasons() == {
        "a.caption": "not read: its picture has another file of words, which is read"
    }


def test_a_json_of_a_downloader_with_a_caption_of_null_is_no_caption(made):
    """00000.json with "caption": null and a status: the word None became the caption."""
    found = made(
        {
            "a.png": image(1),
            "a.json": '{"caption": null, "status": "success", "url": "x"}',
            "b.png": image(2),
            "b.json": '{"caption": "None"}',
        }
    )
    assert not found.captions and found.reasons() == {"a.png": "no caption", "b.png": "no caption"}


def test_broken_json_beside_a_picture_is_told_of_that_picture(made):
    """A sidecar that was cut off while it was written."""
    found = made({"a.png": image(1), "a.json": '{"caption": "A wo', "b.png": image(2), "b.txt": "A fox."})
    assert found.captions == {"b.png": "A fox."} and "caption file" in found.reasons()["a.png"]


def test_numbers_are_captions_where_the_column_holds_them(made):
    """A JSONL made from a data frame: a title that is the year 1863 came out as a number and was dropped."""
    found = made({"a.png": image(1), "metadata.jsonl": '{"file_name": "a.png", "text": 1863}\n'})
    assert found.captions == {"a.png": "1863"}


def test_captions_json_by_file_name_with_objects_or_texts(made):
    """The one file of a trainer: {"a.png": {"caption": …}} or {"a.png": "…"}, with or without suffix."""
    found = made(
        {
            "a.png": image(1),
            "b.png": image(2),
            "c.png": image(3),
            "captions.json": json.dumps({"a.png": {"caption": "A wolf."}, "b.png": "A fox.", "c": "A hen."}),
        }
    )
    assert found.captions == {"a.png": "A wolf.", "b.png": "A fox.", "c.png": "A hen."}


# ---------------------------------------------------------------------------------------------------------------------
# tables


def test_the_columns_of_a_clip_trainers_csv_are_known(made):
    """filepath and title, separated by tabs, in a file called .csv."""
    found = made({"a.png": image(1), "data.csv": "filepath\ttitle\na.png\tA wolf, a fox\n"}, source="data.csv")
    assert found.captions == {"a.png": "A wolf, a fox"} and "its column title" in found.said


def test_excels_line_of_the_separator_is_told(made):
    """A first line "sep=;" that Excel writes."""
    found = made({"a.png": image(1), "metadata.csv": "sep=;\nfile_name;caption\na.png;A wolf\n"})
    assert found.status == 2 and "metadata.csv" in found.said and "line" in found.said


def test_a_last_column_without_a_name_is_told_with_its_number(made):
    """A comma at the end of each line: pandas makes a column Unnamed: 2 of it."""
    found = made({"a.png": image(1), "metadata.csv": "file_name,caption,\na.png,A wolf,\n"})
    assert found.status == 2 and "column 3 of 3 has no name" in found.said


def test_an_index_column_that_a_data_frame_wrote_is_told(made):
    """to_csv with its index: the first column has no name."""
    found = made({"a.png": image(1), "metadata.csv": ",file_name,caption\n0,a.png,A wolf\n"})
    assert found.status == 2 and "column 1 of 3 has no name" in found.said


def test_capital_names_of_columns_and_blanks_in_them(made):
    """TEXT and "File Name", as an old web data set has them."""
    found = made({"a.png": image(1), "metadata.csv": "File Name,TEXT\na.png,A wolf\n"})
    assert found.captions == {"a.png": "A wolf"}


def test_paths_with_backslashes_and_from_the_folder_above(made):
    """A table that was written on Windows, and one whose paths begin with ./"""
    found = made(
        {"sub/a.png": image(1), "sub/b.png": image(2), "metadata.csv": "file_name,caption\nsub\\a.png,A wolf\n./sub/b.png,A fox\n"}
    )
    assert found.captions == {"sub/a.png": "A wolf", "sub/b.png": "A fox"}


def test_rows_without_a_picture_and_pictures_without_a_row_are_both_counted(made):
    """metadata.jsonl of which half of the pictures was never downloaded."""
    found = made(
        {
            "a.png": image(1),
            "b.png": image(2),
            "metadata.jsonl": "".join(json.dumps({"file_name": f"{n}.png", "text": f"A wolf {n}."}) + "\n" for n in "axyz"),
        }
    )
    assert found.captions == {"a.png": "A wolf a."} and found.reasons() == {"b.png": "no caption"}
    assert "rows of captions without a picture" in found.said and "x.png, y.png, z.png" in found.said


def test_a_table_of_addresses_says_that_it_holds_no_pictures(made):
    """URL and TEXT of a web data set before anything was downloaded."""
    found = made({"part-0.parquet": table([{"URL": "http://x/1.jpg", "TEXT": "A wolf"}])}, source="part-0.parquet")
    assert found.status == 2 and "URL" in found.said and "names no pictures" in found.said


def test_a_table_with_pictures_of_null_and_an_empty_one(made):
    """Rows whose picture is null, and a shard of a data set with no row."""
    rows = [
        {"image": {"bytes": image(1), "path": "a.png"}, "text": "A wolf."},
        {"image": None, "text": "A fox."},
        {"image": {"bytes": None, "path": "gone.png"}, "text": "A hen."},
    ]
    found = made({"data/train-00000.parquet": table(rows)})
    assert list(found.captions.values()) == ["A wolf."] and len(found.rows) == 3 and all(found.reasons().values())


def test_a_list_of_paths_in_a_text_file_is_refused_with_what_is_read(made):
    """train.txt with a path a line, as trainers of image tokenizers want it."""
    found = made({"a.png": image(1), "train.txt": "a.png\n"}, source="train.txt")
    assert found.status == 2 and ".csv" in found.said


def test_accents_composed_in_the_table_and_decomposed_on_the_disk(made):
    """A Mac's disk, a table from Linux."""
    name = "caf\u00e9.png"
    found = made({unicodedata.normalize("NFD", name): image(1), "metadata.csv": f"file_name,caption\n{name},A wolf\n"})
    assert list(found.captions.values()) == ["A wolf"]


def test_a_field_longer_than_the_csv_modules_limit(made):
    """field larger than field limit (131072): a long description."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["file_name", "caption"], ["a.png", "A wolf. " * 30_000]])
    found = made({"a.png": image(1), "metadata.csv": buffer.getvalue()})
    assert found.captions["a.png"].startswith("A wolf. A wolf.")


# ---------------------------------------------------------------------------------------------------------------------
# tars and shards


def test_the_output_folder_of_a_downloader_is_read_and_its_by_products_are_named(made):
    """00000.tar with .jpg, .txt and .json, and beside it 00000.parquet and 00000_stats.json."""
    pair = [
        ("000000000.jpg", image(1, "JPEG")),
        ("000000000.txt", b"A wolf."),
        ("000000000.json", b'{"caption": "A wolf.", "status": "success"}'),
    ]
    found = made({"00000.tar": tar(pair), "00000.parquet": table([{"url": "x", "caption": "A wolf."}]), "00000_stats.json": '{"count": 1}'})
    assert found.captions == {"00000.tar/000000000.jpg": "A wolf."} and set(found.reasons()) == {"00000.parquet", "00000_stats.json"}


def test_pictures_first_and_words_behind_them_belong_together(made, tmp_path):
    """A tar made by `tar cf x.tar *.jpg *.txt`: readers that group neighbours lose every sample."""
    content = tar(
        [*((f"{i}.png", image(i)) for i in range(3)), *((f"{i}.json", json.dumps({"caption": f"A wolf {i}."}).encode()) for i in range(3))]
    )
    found = made({"a.tar": content})
    assert sorted(found.captions.values()) == ["A wolf 0.", "A wolf 1.", "A wolf 2."]
    assert len(ShardIndex([tmp_path / "in" / "a.tar"], one_of=("png",))) == 3


def test_names_with_dots_and_a_leading_point(made):
    """img.v1.jpg with img.v1.txt, ./a.png, and a folder with a dot."""
    found = made(
        {"a.tar": tar([("./img.v1.png", image(1)), ("./img.v1.txt", b"A wolf."), ("set.2/b.png", image(2)), ("set.2/b.txt", b"A fox.")])}
    )
    assert sorted(found.captions.values()) == ["A fox.", "A wolf."]


def test_members_with_very_long_names_and_headers_of_pax_and_gnu(made):
    """Names above a hundred characters, in both formats."""
    name = "x" * 150
    found = made(
        {
            f"{kind}.tar": tar([(f"{name}.png", image(kind)), (f"{name}.txt", b"A wolf.")], format=kind)
            for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        }
    )
    assert list(found.captions.values()) == ["A wolf.", "A wolf."]


def test_tars_joined_by_cat_are_not_read_in_silence_up_to_the_first_end(made, tmp_path):
    """cat a.tar b.tar > c.tar: readers stop at the first end mark, and half of the data set is gone."""
    one, two = (tar([(f"{i}.png", image(i)), (f"{i}.json", b'{"caption": "A wolf."}')]) for i in (1, 2))
    found = made({"c.tar": one + two})
    assert found.captions == {"c.tar/1.png": "A wolf."} and found.reasons() == {"c.tar": "damaged tar file"}
    index = ShardIndex([tmp_path / "in" / "c.tar"], one_of=("png",))
    assert len(index) == 1 and "joined" in index.skipped_summary()
    (damage,) = inspect.take_inventory([tmp_path / "in" / "c.tar"], verify=True).damaged
    assert "joined" in str(damage)
    assert not ShardIndex(write(tmp_path / "padded.tar", one + bytes(20_000)), one_of=("png",)).skipped, "zeros alone are no other tar"


def write(path, content):
    path.write_bytes(content)
    return [path]


def test_a_hard_link_in_a_tar_is_named(made, tmp_path):
    """GNU tar stores the second of two names of one file as a link without bytes."""
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.LNKTYPE, "a.png"
    content = tar([("a.png", image(1)), ("a.json", b'{"caption": "A wolf."}'), ("b.png", link), ("b.json", b'{"caption": "A fox."}')])
    found = made({"a.tar": content})
    assert found.captions == {"a.tar/a.png": "A wolf."} and found.reasons() == {"a.tar/b.png": "not a regular file"}
    assert ShardIndex([tmp_path / "in" / "a.tar"], one_of=("png",)).skipped == {"incomplete sample": 1, NO_FILE: 1}


def test_a_member_that_was_appended_again_is_ambiguous(tmp_path):
    """tar -r with a newer caption: tar itself takes the last, others the first."""
    path = tmp_path / "a.tar"
    path.write_bytes(
        tar(
            [
                ("a.png", image(1)),
                ("a.json", b'{"caption": "Old."}'),
                ("a.json", b'{"caption": "New."}'),
                ("b.png", image(2)),
                ("b.json", b'{"caption": "B."}'),
            ]
        )
    )
    index = ShardIndex([path], one_of=("png",))
    assert [index.key(i) for i in range(len(index))] == ["b"] and "a.tar/a" in index.skipped_summary()


def test_a_compressed_tar_is_told_to_be_one(made, tmp_path):
    """shard.tar.gz, and one that is compressed and called .tar."""
    content = gzip.compress(tar([("a.png", image(1)), ("a.txt", b"A wolf.")]))
    found = made({"a.tar.gz": content, "b.tar": content, "c.png": image(3), "c.txt": "A fox."})
    assert (
        found.captions == {"c.png": "A fox."}
        and found.reasons()["a.tar.gz"] == "compressed tar: unpack it to .tar first"
        and found.reasons()["b.tar"]
    )
    with pytest.raises(ValueError, match=r"b\.tar is not a readable tar"):
        ShardIndex([tmp_path / "in" / "b.tar"])


def test_a_tar_whose_writer_was_killed_gives_what_is_whole_and_says_so(made, tmp_path):
    """A shard cut in the middle of a member."""
    content = tar([(f"{i}.{kind}", image(i) if kind == "png" else b'{"caption": "A wolf."}') for i in range(3) for kind in ("png", "json")])
    found = made({"a.tar": content[: len(content) // 2]})
    assert found.captions and "a.tar" in found.reasons()
    assert ShardIndex([tmp_path / "in" / "a.tar"], one_of=("png",)).skipped["truncated shard"] == 1


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    """data/{00000..00003}.tar of which one was never copied: training went on with three quarters."""
    for number in (0, 1, 3):
        write_shard(tmp_path / f"{number:05d}.tar", [{"__key__": "a", "json": b"{}"}])
    with pytest.raises(FileNotFoundError, match=r"00002\.tar does not exist"):
        expand_shards(f"{tmp_path}/{{00000..00003}}.tar")


def test_an_empty_sample_list_says_what_is_wanted(tmp_path):
    """Shards whose pictures are called .image or .img: the loader hung without a sample."""
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "image": image(1), "json": b"{}"}])
    with pytest.raises(ValueError, match=r"no usable sample.*webp\|png.*1 incomplete sample"):
        ShardIndex([tmp_path / "a.tar"], one_of=("webp", "png")).usable()


# ---------------------------------------------------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("PNG", "P", {"transparency": b"\0\xff"}), ("PNG", "LA", {}), ("PNG", "1", {}), ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
     ("GIF", "P", {"save_all": True}), ("WEBP", "RGBA", {"lossless": True}),
     ("JPEG", "CMYK", {}), ("PNG", "I;16", {}), ("BMP", "P", {}), ("TIFF", "1", {"compression": "group4"})],
)  # fmt: skip
def test_every_mode_of_pillow_becomes_a_pair(made, kind, mode, options):
    """cannot write mode P as JPEG, cannot identify, images that come out black: palettes, masks, CMYK, one bit, sixteen."""
    buffer = io.BytesIO()
    one = picture(1, (96, 80), "RGB")
    one = one.convert("L").convert("I").point(lambda value: value * 256).convert("I;16") if mode == "I;16" else one.convert(mode)
    one.save(buffer, kind, **options)
    found = made({f"a.{kind.lower()}": buffer.getvalue(), "a.txt": "A wolf."})
    ((_, image_made),) = pairs(found.out).values()
    tones = image_made.convert("L").getextrema()
    assert found.captions and tones[0] < 80 and tones[1] > 170


def test_broken_metadata_does_not_lose_the_picture(made):
    """Corrupt EXIF data, a colour profile of nonsense: a warning that ends the run."""
    found = made(
        {
            "a.jpg": image(1, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"),
            "b.png": image(2, icc_profile=b"no profile"),
            "a.txt": "A wolf.",
            "b.txt": "A fox.",
        }
    )
    assert found.captions == {"a.jpg": "A wolf.", "b.png": "A fox."}


def test_a_picture_that_claims_to_be_huge_is_rejected_before_it_is_opened(made):
    """Image size exceeds limit, could be a decompression bomb: the worker died and its chunk with it."""
    head = image(1)
    bomb = head[:16] + (60_000).to_bytes(4, "big") * 2 + head[24:]
    found = made({"a.png": bomb, "a.txt": "A wolf.", "b.png": image(2), "b.txt": "A fox."})
    assert found.captions == {"b.png": "A fox."} and set(found.reasons()) == {"a.png"}


def test_the_same_picture_under_two_names_is_kept_once_and_the_other_names_it(made):
    """A scraped set with every picture twice: validation held the training pictures."""
    found = made({"a.png": image(1), "a.txt": "A wolf.", "b.png": image(1), "b.txt": "A wolf again."})
    assert len(found.captions) == 1 and "duplicate" in next(iter(found.reasons().values()))

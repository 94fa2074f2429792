"""Nothing is lost in silence: what users really put into folders, tables and tars, and where each file of it ends."""

from __future__ import annotations

import io
import json
import random
import shlex
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_tools.images.line_art_duplicates import look_the_same, sketch
from data_tools.pipeline.next_steps import CAPTIONS, steps
from data_tools.prepare import main
from data_tools.readers import READERS, Listing, Options, Words, choose_reader, find_words, shown
from tests.test_readers import captions, make_tar, problems, put
from tokun.data import expand_shards

pq = pytest.importorskip("pyarrow.parquet", reason="reads Parquet: pip install -e '.[data]'")


def read(source: Path, **options) -> Listing:
    return READERS[choose_reader(source)](source, Options(**options))


def picture(seed: int) -> bytes:
    tiles = np.random.default_rng(seed).integers(0, 256, (5, 6), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(tiles).resize((96, 80), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def manifest(out: Path) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(out / "manifest.parquet").to_pylist()}


def prepare(source: Path, out: Path, *options: str) -> int:
    return main([str(source), "--style", "engraving", "--out", str(out), "--workers", "1", "--no-clean", "--val", "0", *options])


# ---- every file ends in the manifest ------------------------------------------------------------------------------------


def test_every_file_of_a_mixed_folder_ends_in_the_manifest(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    put(source / "a.png", picture(1)), put(source / "a.txt", "A wolf."), put(source / "README.md", "# Prints")
    put(source / "alone.txt", "Words of no picture."), put(source / "stats.json", "{}"), put(source / "labels.csv", "a,b\n1,2\n")
    put(source / "deep/page.html", "<p>"), put(source / ".DS_Store", b"\0")
    make_tar(source / "00000.tar", [("1.png", picture(2)), ("1.txt", "A fox."), ("2.txt", "An owl without a picture.")])
    import pyarrow as pa

    pq.write_table(pa.table({"key": ["1"], "url": ["http://x"]}), source / "00000.parquet")
    put(source / "broken.parquet", "PAR1 and nothing")
    assert prepare(source, out) == 0
    rows = manifest(out)
    below = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    used = {row["words_from"] for row in rows.values()} | {"00000.tar"}
    assert below <= rows.keys() | used, "each file is a picture, words of one, or not read"
    assert {path for path, row in rows.items() if row["status"] == "kept"} == {"a.png", "00000.tar/1.png"}
    assert all(row["reason"].startswith("not read: ") for path, row in rows.items() if row["status"] != "kept")
    assert rows["00000.tar/2.txt"]["reason"] == "not read: words without a picture of their key"


def test_pictures_beside_a_data_set_and_tars_in_folders_below_are_read(tmp_path):
    pytest.importorskip("datasets", reason="reads data sets: pip install -e '.[data]'")
    import pyarrow as pa

    rows = {"image": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)], "caption": ["A wolf", "A fox", "An owl"]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data/validation-00000.parquet")
    put(tmp_path / "cover.jpg"), put(tmp_path / "cover.jpg.txt", "A cover")
    make_tar(tmp_path / "more/b.tar", [("x.jpg", b"x"), ("x.json", '{"text": "A stork"}')])
    listing = read(tmp_path)
    assert captions(listing) == {
        "cover.jpg": "A cover", "more/b.tar/x.jpg": "A stork",
        "validation/00000000": "A wolf", "validation/00000001": "A fox", "validation/00000002": "An owl",
    }  # fmt: skip


def test_a_source_without_pictures_says_what_lies_there(tmp_path):
    put(tmp_path / "notes.doc", "x"), put(tmp_path / "a.txt", "words")
    assert main([str(tmp_path), "--style", "engraving", "--out", str(tmp_path / "out")]) == 2


# ---- tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_say_the_same_as_a_source_and_beside_pictures(tmp_path, kind, beside):
    """Other columns, values that say nothing, several rows of one picture."""
    for name in "abc":
        put(tmp_path / f"{name}.jpg")
    rows = [("a.jpg", "A wolf"), ("b.jpg", "nan"), ("a.jpg", "One wolf"), ("c.jpg", "<NA>"), ("b.jpg", "None")]
    table = tmp_path / (f"metadata.{kind}" if beside else f"list.{kind}")
    if kind == "parquet":
        import pyarrow as pa

        pq.write_table(pa.table({"file_name": [a for a, _ in rows], "prompt": [b for _, b in rows]}), table)
    elif kind == "jsonl":
        put(table, "".join(json.dumps({"file_name": a, "prompt": b}) + "\n" for a, b in rows))
    else:
        sign = "," if kind == "csv" else "\t"
        put(table, "".join(f"{a}{sign}{b}\n" for a, b in [("file_name", "prompt"), *rows]))
    listing = read(tmp_path if beside else table)
    assert captions(listing) == {"a.jpg": "A wolf", "b.jpg": "", "c.jpg": ""}
    assert listing.words["a.jpg"].more["captions_all"] == ["A wolf", "One wolf"]
    assert any("column prompt" in note for note in listing.notes)


@pytest.mark.parametrize("name", ["metadata.csv", "list.csv", "metadata.jsonl", "metadata.tsv"])
def test_a_table_without_a_known_column_of_captions_names_its_columns(tmp_path, name):
    put(tmp_path / "a.jpg")
    table = '{"file_name": "a.jpg", "legende": "Un loup"}\n' if name.endswith("jsonl") else "file_name,legende\na.jpg,Un loup\n"
    path = put(tmp_path / name, table.replace(",", "\t") if name.endswith("tsv") else table)
    source = path if name == "list.csv" else tmp_path
    with pytest.raises(ValueError, match=r"its columns are file_name, legende.*--caption-column"):
        read(source, captions_needed=True)
    assert captions(read(source, caption_column="Legende")) == {"a.jpg": "Un loup"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('file_name,caption\na.jpg,"A wolf\nb.jpg,A fox\n', "line 2: a quote is not closed"),
        ("file_name,caption\na.jpg,A wolf, and a fox\n", "line 2: 3 fields where the header has 2"),
        ("file_name,caption\na.jpg\n", "line 2: 1 fields where the header has 2"),
        ("file_name,caption,caption\na.jpg,A wolf,A fox\n", "two columns have the same name"),
    ],
)
def test_a_table_that_would_lose_words_is_refused_with_its_line(tmp_path, text, message):
    put(tmp_path / "a.jpg"), put(tmp_path / "b.jpg"), put(tmp_path / "captions.csv", text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {"a.jpg": "A wolf", "b.jpg": ["A fox", "One fox"]},
        {"a.jpg": {"caption": "A wolf"}, "b.jpg": {"text": "A fox"}},
        [{"file_name": "a.jpg", "caption": "A wolf"}, {"image": "b.jpg", "text": "A fox"}],
        {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
         "annotations": [{"image_id": 1, "caption": "A wolf"}, {"image_id": 2, "caption": "A fox"}]},
    ],
)  # fmt: skip
def test_captions_json_is_read_in_its_usual_forms(tmp_path, tree):
    put(tmp_path / "a.jpg"), put(tmp_path / "b.jpg"), put(tmp_path / "captions.json", json.dumps(tree))
    assert captions(read(tmp_path)) == {"a.jpg": "A wolf", "b.jpg": "A fox"}


# ---- files of words, and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("wolf.jpg", "wolf.TXT"), ("wolf.jpg", "wolf.jpg.txt"), ("wolf.JPG", "wolf.caption"), ("wolf.v1.2.png", "wolf.v1.2.txt"),
        ("wolf.png", "WOLF.txt"), ("été.jpg", unicodedata.normalize("NFD", "été.txt")), ("wolf.jpg", "wolf.jpg.caption"),
    ],
)  # fmt: skip
def test_files_of_words_are_found_under_their_usual_names(tmp_path, picture, words):
    put(tmp_path / "set.v1" / picture), put(tmp_path / "set.v1" / words, "A wolf")
    listing = read(tmp_path)
    assert list(captions(listing).values()) == ["A wolf"] and not listing.unread


def test_of_two_files_of_words_the_nearer_is_read_and_the_other_named(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "a.jpg.txt", "A wolf"), put(tmp_path / "a.txt", "A fox"), put(tmp_path / "a.caption", "An owl")
    listing = read(tmp_path)
    assert captions(listing) == {"a.jpg": "A wolf"}
    assert dict(listing.unread) == dict.fromkeys(["a.caption", "a.txt"], "not read: its picture has another file of words, which is read")


def test_a_name_in_other_case_is_not_given_to_two_pictures(tmp_path):
    put(tmp_path / "Wolf.jpg"), put(tmp_path / "wolf.png"), put(tmp_path / "WOLF.txt", "which one?")
    listing = read(tmp_path)
    assert set(captions(listing).values()) == {""} and "WOLF.txt" in listing.unread


@pytest.mark.parametrize("name", ["copy of a thing.jpg", "map fr.jpg", "holiday upload batch.jpg", "the wolf and the lamb.jpg"])
def test_a_file_name_is_no_caption_unasked(tmp_path, name):
    put(tmp_path / name)
    listing = read(tmp_path)
    assert captions(listing) == {name: ""} and all(captions(listing, from_names=True).values())


@pytest.mark.parametrize(("row", "disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_rows_find_their_pictures_however_accents_are_written(tmp_path, row, disk):
    name = unicodedata.normalize(disk, "forêt é.jpg")
    put(tmp_path / name)
    put(tmp_path / "metadata.csv", unicodedata.normalize(row, "file_name,caption\nforêt é.jpg,A forest\n"))
    assert captions(read(tmp_path)) == {name: "A forest"}
    assert {path for path, problem in problems(read(tmp_path / "metadata.csv")).items() if not problem}


# ---- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        [("a.webp", b"1"), ("a.json", '{"caption": "one"}'), ("a.jpg", b"2"), ("a.json", '{"caption": "two"}')],
        [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.txt", "one"), ("a.txt", "two")],
        [("a.jpg", b"1"), ("a.png", b"2"), ("a.txt", "which?")],
        [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.txt", "which?")],
    ],
)
def test_a_key_whose_words_cannot_be_told_is_refused_by_name(tmp_path, members):
    listing = read(make_tar(tmp_path / "a.tar", [*members, ("b.jpg", b"3"), ("b.txt", "sure")]))
    assert captions(listing) == {"a.tar/b.jpg": "sure"}
    assert all("ambiguous" in problem for path, problem in problems(listing).items() if not path.endswith("b.jpg"))


@pytest.mark.parametrize("name", ["mask.png", "depth.png", "thumb.jpg", "seg.webp"])
def test_masks_and_thumbnails_of_a_sample_are_no_pictures(tmp_path, name):
    listing = read(make_tar(tmp_path / "a.tar", [(f"1.{name}", b"m"), ("1.jpg", b"1"), ("1.txt", "A wolf")]))
    assert captions(listing) == {"a.tar/1.jpg": "A wolf"} and "not read" in problems(listing)[f"a.tar/1.{name}"]


def test_keys_with_dots_keep_each_picture_with_its_words(tmp_path):
    members = [(f"set.v1/map.{i}.{kind}", f"map {i}") for i in range(3) for kind in ("jpg", "txt")]
    listing = read(make_tar(tmp_path / "a.tar", members))
    assert captions(listing) == {f"a.tar/set.v1/map.{i}.jpg": f"map {i}" for i in range(3)}


def test_of_several_columns_of_pictures_the_image_is_taken_or_none(tmp_path):
    datasets = pytest.importorskip("datasets", reason="reads data sets: pip install -e '.[data]'")
    rows = {"mask": [{"bytes": b"m", "path": None}], "image": [{"bytes": b"i", "path": None}], "text": ["A wolf"]}
    kinds = {"mask": datasets.Image(), "image": datasets.Image(), "text": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / "set"))
    from data_tools.readers import read_picture

    listing = read(tmp_path / "set")
    assert read_picture(listing.base, listing.found[0]) == b"i"
    kinds["left"] = kinds.pop("image")
    rows["left"] = rows.pop("image")
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="several picture columns, mask, left"):
        read(tmp_path / "two")


# ---- names of folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prints [v1]", "prints, new", "it's {a,b}", "two\nlines", "a * b ? c", "$HOME `x`"])
def test_the_printed_commands_run_as_they_stand(tmp_path, name):
    out = tmp_path / name
    put(out / "train-00000.tar", ""), put(out / "val-00000.tar", "")
    told = steps(str(out), [], {"kept": 9, "distinct": 9}, report="report.html", val=True)
    command = shlex.split(told[told.index("Next:") + 5 :])
    options = dict(one.split("=", 1) for one in command if one.startswith("data."))
    assert expand_shards(options["data.train"]) == [out / "train-00000.tar"]
    assert expand_shards(options["data.val"]) == [out / "val-00000.tar"] and str(out) in command


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(put(tmp_path / "work/x", "").parent)
    put(tmp_path / "home/in/a.png", picture(1)), put(tmp_path / "home/in/a.txt", "A wolf.")
    assert main(["~/in", "--style", "engraving", "--no-clean", "--workers", "1", "--out=~/shards"]) == 0
    assert (tmp_path / "home/shards/manifest.parquet").is_file() and not (tmp_path / "work/~").exists()


# ---- lookalikes ----------------------------------------------------------------------------------------------------------


def drawing(strokes: list[tuple[int, int, int, int]], side: int = 320) -> Image.Image:
    image = Image.new("L", (side, side), 255)
    for stroke in strokes:
        ImageDraw.Draw(image).line([length * side // 320 for length in stroke], fill=0, width=max(1, 6 * side // 320))
    return image


F = [(60, 40, 60, 280), (60, 40, 260, 40), (60, 150, 220, 150)]


def rounded(radius: int) -> Image.Image:
    image = Image.new("L", (320, 320), 255)
    ImageDraw.Draw(image).rounded_rectangle((60, 60, 260, 260), radius, outline=0, width=3)
    return image


LETTERS = {"F": F, "E": [*F, (60, 280, 260, 280)], "P": [*F, (240, 40, 240, 150)], "L": [F[0], (60, 280, 260, 280)]}


def outlined(text: str, width: int = 3) -> Image.Image:
    image = Image.new("L", (320, 320), 255)
    font = ImageFont.load_default(230)
    ImageDraw.Draw(image).text((160, 160), text, 255, font, "mm", stroke_width=width, stroke_fill=0)
    return image


def face(start: int, end: int, top: int) -> Image.Image:
    image = Image.new("L", (320, 320), 255)
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 60, 260, 260), outline=0, width=3), draw.arc((110, top, 210, top + 90), start, end, 0, 3)
    return image


def clock(*hands: tuple[int, int]) -> Image.Image:
    image = face(0, 1, 160)
    for hand in hands:
        ImageDraw.Draw(image).line((160, 160, *hand), 0, 3)
    return image


DRAWINGS = {
    "strokes": {name: drawing(strokes) for name, strokes in LETTERS.items()},
    "outlined round letters": {name: outlined(name) for name in "DOQCG"},
    "outlined letters with bows": {name: outlined(name, 2) for name in "BRPS5268ae"},
    "faces": {"smile": face(20, 160, 130), "frown": face(200, 340, 180), "nothing": face(0, 1, 160)},
    "clocks": {"three": clock((160, 90), (210, 160)), "nine": clock((160, 90), (110, 160)), "six": clock((160, 90), (160, 210))},
    "squares": {f"rounded by {r}": rounded(r) for r in (0, 40, 99)},
}


@pytest.mark.parametrize("kind", DRAWINGS)
def test_drawings_of_few_lines_that_differ_are_told_apart(kind):
    """F and E; D, O and Q in outlines, of which each place has as much ink; a smile and a frown."""
    sketches = {name: sketch(image) for name, image in DRAWINGS[kind].items()}
    assert [(a, b) for a, one in sketches.items() for b, other in sketches.items() if a < b and look_the_same(one, other)] == []


# A thin circle that is cropped more on one side is an ellipse, which may be told apart: faces and squares are not here.
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, images in DRAWINGS.items() for name in images if kind not in ("faces", "squares")]
)
def test_copies_of_a_drawing_are_still_the_same(kind, name):
    image = DRAWINGS[kind][name]
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    copies = [Image.open(buffer).convert("L"), image.resize((110, 110)), image.crop((8, 0, 320, 316)), image.crop((6, 6, 314, 314))]
    assert all(look_the_same(sketch(image), sketch(copy)) for copy in copies)


def test_prepare_keeps_letters_that_differ_and_drops_their_copies(tmp_path):
    letters = DRAWINGS["strokes"] | DRAWINGS["outlined round letters"]
    for name, image in letters.items():
        image.save(put(tmp_path / f"in/{name}.png", ""))
        image.resize((150, 150)).save(put(tmp_path / f"in/{name} small.jpg", ""), quality=60)
        put(tmp_path / f"in/{name}.txt", f"The letter {name}."), put(tmp_path / f"in/{name} small.txt", f"The letter {name}.")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    kept = {path for path, row in manifest(tmp_path / "out").items() if row["status"] == "kept"}
    assert {f"{name}.png" for name in letters} <= kept
    assert prepare(tmp_path / "in", tmp_path / "exact", "--duplicates", "exact") == 0
    assert all(row["status"] == "kept" for row in manifest(tmp_path / "exact").values())


# ---- captions that are missing, or say nothing ----------------------------------------------------------------------------


def test_the_way_of_a_museum_captions_first_and_then_training(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out [a]"
    for index in range(5):
        put(source / f"IMG_{index:04}.png", picture(index))
    put(source / "IMG_0000.txt", "A wolf.")
    assert prepare(source, out) == 0
    told = capsys.readouterr()
    assert "4 of 5 pictures have no caption" in told.err and "4 pictures have no caption and are not in the shards" in told.out
    assert "tokun train" not in told.out, "captions come first"
    table = (out / CAPTIONS).read_text("utf-8-sig")
    assert table == "file_name,caption\n" + "".join(f"IMG_{index:04}.png,\n" for index in range(1, 5))
    (out / CAPTIONS).write_text(
        table.replace("IMG_0002.png,", 'IMG_0002.png,"A fox, and an owl."').replace("IMG_0003.png,", "IMG_0003.png,A stork.")
    )
    command = next(line for line in told.out.splitlines() if "--captions" in line)
    assert main(shlex.split(command)[2:]) == 0
    kept = {path: row["caption"] for path, row in manifest(out).items() if row["status"] == "kept"}
    assert kept == {"IMG_0000.png": "A wolf.", "IMG_0002.png": "A fox, and an owl.", "IMG_0003.png": "A stork."}
    told = capsys.readouterr().out
    assert "A stork." in (out / CAPTIONS).read_text() and "tokun train" in told
    assert "2 pictures have no caption and are not in the shards. Train without them (Next), or give captions first:" in told
    command = next(line for line in told.splitlines() if "--allow-missing-captions" in line)
    assert main(shlex.split(command)[2:]) == 0, "the shards that are there are replaced"
    assert "2 pictures have no caption and are kept without one" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [["An engraving."], ["An engraving.", "A print."]])
def test_captions_that_are_all_alike_are_said_to_teach_nothing(tmp_path, capsys, texts):
    for index in range(24):
        put(tmp_path / f"in/{index}.png", picture(index)), put(tmp_path / f"in/{index}.txt", random.Random(index).choice(texts))
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert "a model cannot learn from them" in capsys.readouterr().out


def test_shards_say_where_words_are_from(tmp_path):
    put(tmp_path / "in/a.png", picture(1)), put(tmp_path / "in/metadata.csv", "file_name,caption\na.png,A wolf.\n")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert manifest(tmp_path / "out")["a.png"]["words_from"] == "metadata.csv"
    with tarfile.open(tmp_path / "out/train-00000.tar") as tar:
        assert "train-000000.json" in tar.getnames()
    assert find_words(tmp_path / "in", READERS["folder"](tmp_path / "in", Options()).found[0], Words()).caption == "" and shown("a") == "a"


# ---------------------------------------------------------------------------------------------------------------------
# words that cleaning changes

JOINED = {
    "Persian": "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627", "Persian plural of a Latin word": "PDF\u200c\u0647\u0627",
    "Sinhala": "\u0dc1\u0dca\u200d\u0dbb\u0dd3",
    "Malayalam, at a word's end": "\u0d05\u0d35\u0d28\u0d4d\u200d \u0d35\u0d28\u0d4d\u0d28\u0d41",
    "Devanagari": "\u0915\u094d\u200d\u0937 \u0915\u094d\u200c\u0937",
    "Bengali": "\u09b0\u200d\u09cd\u09af\u09be\u09ac", "Arabic form alone": "\u200d\u0647\u200d",
    "the year of the Hijra": "\u06f1\u06f4\u06f0\u06f0 \u0647\u200d.",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467 a family", "a painter with a skin tone": "\U0001f469\U0001f3fd\u200d\U0001f3a8",
    "a flag": "\U0001f3f3\ufe0f\u200d\U0001f308",
    "Mongolian": "\u182a\u1820\u180e\u1822", "Hebrew with points": "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",
    "Khmer": "\u1781\u17d2\u1798\u17c2\u179a", "a right-to-left mark": "\u05d0\u200f!",
}  # fmt: skip


@pytest.mark.parametrize("script", JOINED)
def test_what_spells_a_word_stays_and_the_text_tokenizer_agrees(script):
    """Joiners of no width taken out of Persian, Sinhala, Malayalam and emoji: other words, or four people for one family."""
    from data_tools.text.captions import clean_caption, plain_text, raw_of
    from tokun.tokenizers.text import normalize

    text = unicodedata.normalize("NFC", JOINED[script])
    assert plain_text(text) == text and raw_of(text) == "" and normalize(text) == text
    assert clean_caption(f"{text} {text} in a house").text.startswith(text)


@pytest.mark.parametrize(
    "text",
    [
        "A sh\u200dip",
        "ship\u200c.",
        "\ufeffA ship",
        "A sh\u00adip",
        "A\u200bship",
        "A \u2581 ship",
        "A \u202eship",
        "A\tship\x07",
        "\u201cA\u201d <b>ship</b>",
        "A\ud800ship",
    ],
)
def test_what_is_no_letter_goes_and_is_kept_as_it_was_found(text):
    from data_tools.text.captions import plain_text, raw_of
    from tokun.tokenizers.text import normalize

    plain = plain_text(text)
    assert plain != text and plain_text(plain) == plain == normalize(plain), "training changes nothing more"
    assert raw_of(text) == text.strip() or plain == " ".join(text.split())


def test_every_caption_that_cleaning_changes_is_kept_not_the_first_alone():
    from data_tools.readers.words import join_words, words_from

    words = words_from({"caption": ["A <b>ship</b>", "A boat"], "captions": {"Poetic": "O &amp; ship", "alt": "A ship"}})
    assert words.caption == "A ship" and words.raw == "A <b>ship</b>" and words.captions == {"poetic": "O & ship", "alt": "A ship"}
    assert words.more["raw_captions"] == {"poetic": "O &amp; ship"} and words.more["raw_captions_all"] == ["A <b>ship</b>", "A boat"]
    rows = join_words(words_from({"caption": "A ship"}), words_from({"caption": "A &lt; boat"}))
    assert rows.more["captions_all"] == ["A ship", "A < boat"] and rows.more["raw_captions_all"] == ["A ship", "A &lt; boat"]
    assert "raw_captions_all" not in join_words(words_from({"caption": "A ship"}), words_from({"caption": "A boat"})).more

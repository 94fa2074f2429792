"""A museum's catalogue: pictures with a table of titles, descriptions and techniques, as an archivist exports it from a spreadsheet."""

import io
import json
import os
import shlex

import numpy as np
import pytest
from PIL import Image

from data_tools.caption import main as caption_main
from data_tools.captioning.registers import REGISTERS
from data_tools.pipeline import next_steps
from data_tools.pipeline.next_steps import several_captions, steps
from data_tools.prepare import main
from data_tools.readers.caption_guess import TextColumns
from data_tools.readers.words import OF_REGISTERS
from tests.test_prepare import manifest, pairs
from tests.test_reported import Made, image, table, tar
from tokun.config import load_config

pytest.importorskip("pyarrow.parquet", reason="prepare writes Parquet: pip install -e '.[data]'")

SEEN = {
    "1.png": "A large moth sits on an oak leaf with its wings spread.",
    "2.png": "A ship in full sail leaves the harbour under dark clouds.",
    "3.png": "A small house stands between two tall trees by a stream.",
    "4.png": "A lion lies under a palm and looks at the viewer.",
    "5.png": "A wolf runs over a field of snow at night.",
}
TITLES = dict(zip(SEEN, ("The moth", "The ship", "The house", "The lion", "The wolf"), strict=True))
TECHNIQUES = dict(zip(SEEN, ("etching", "woodcut", "etching", "woodcut", "etching"), strict=True))
PICTURES = {name: image(number) for number, name in enumerate(SEEN)}
ASKED = ("--caption-column", "what is seen")


def catalogue(*, without=(), head="file;title;what is seen;technique"):
    rows = [f"{name};{TITLES[name]};{'' if name in without else SEEN[name]};{TECHNIQUES[name]}" for name in SEEN]
    return "\r\n".join([head, *rows, ""]).encode("utf-8-sig")


@pytest.fixture
def made(tmp_path, capsys):
    return lambda files, *options, source="": Made(tmp_path, files, capsys, *options, source=source)


def printed(said, *words):
    """The arguments of the first printed command for prepare that has these words."""
    return next(
        words_of[2:]
        for line in said.splitlines()
        if (words_of := shlex.split(line) if "tokun prepare" in line else []) and set(words) <= set(words_of)
    )


# ---- the column that was asked for ---------------------------------------------------------------------------------------


def test_the_printed_command_reads_the_filled_table_by_its_own_column_and_the_folders_by_the_one_that_was_asked_for(made, tmp_path, capsys):
    """It was refused, since captions.csv has no column "what is seen"; and without the option every caption was replaced by a title."""
    found = made({**PICTURES, "metadata.csv": catalogue(without=["5.png"])}, *ASKED)
    filled = tmp_path / "out" / "captions.csv"
    assert found.status == 0 and filled.read_text("utf-8-sig") == "file_name,caption\n5.png,\n"
    filled.write_text(f"file_name,caption\n5.png,{SEEN['5.png']}\n")
    assert main(printed(found.said, "--captions")) == 0
    assert Made(tmp_path, {}, capsys, *ASKED, "--captions", str(filled)).captions == SEEN


@pytest.mark.parametrize("name", ["given.csv", "given.json"])
def test_a_given_table_with_the_column_that_was_asked_for_is_read_by_it(made, tmp_path, name):
    row = {"file_name": "1.png", "caption": "Another one.", "what is seen": "A moth."}
    text = json.dumps([row]) if name.endswith("json") else "file_name,caption,what is seen\n1.png,Another one.,A moth.\n"
    (tmp_path / name).write_text(text)
    found = made({**PICTURES, "metadata.csv": catalogue()}, *ASKED, "--captions", str(tmp_path / name))
    assert found.captions == {**SEEN, "1.png": "A moth."}


@pytest.mark.parametrize("name", ["given.csv", "given.json"])
def test_a_given_table_without_either_column_is_refused_and_its_titles_replace_nothing(made, tmp_path, name):
    (tmp_path / name).write_text(json.dumps([{"file_name": "1.png", "title": "T"}]) if "json" in name else "file_name,title\n1.png,T\n")
    found = made({**PICTURES, "metadata.csv": catalogue()}, *ASKED, "--captions", str(tmp_path / name))
    assert found.status == 2 and not found.captions
    assert "has neither a column 'what is seen' (--caption-column) nor one named caption: its columns are file_name, title" in found.said
    assert "--allow-missing-captions" not in found.said


def test_a_given_json_of_captions_by_file_name_is_read_beside_a_column_that_was_asked_for(made, tmp_path):
    """Its captions have no column, so none of them was read, without a word."""
    (tmp_path / "given.json").write_text(json.dumps({"5.png": SEEN["5.png"]}))
    found = made({**PICTURES, "metadata.csv": catalogue(without=["5.png"])}, *ASKED, "--captions", str(tmp_path / "given.json"))
    assert found.captions == SEEN


def test_a_column_that_is_not_there_is_not_said_to_be_spared_by_an_option_that_does_not_spare_it(made):
    for more in ((), ("--allow-missing-captions",)):
        found = made({**PICTURES, "metadata.csv": catalogue()}, "--caption-column", "seen", *more)
        assert found.status == 2 and "has no column 'seen' (--caption-column): its columns are file, title, what_is_seen" in found.said
        assert "--allow-missing-captions" not in found.said and "Name one of them" in found.said


def test_captions_of_a_column_that_was_asked_for_are_not_replaced_by_those_of_a_guessed_one(made):
    files = {**PICTURES, "metadata.csv": catalogue()}
    assert made(files, *ASKED).captions == SEEN
    found = made({}, "--overwrite")
    assert found.status == 2 and found.captions == SEEN
    assert "--caption-column 'what is seen'" in found.said and "--caption-column title if that is meant" in found.said
    assert made({}, "--overwrite", "--caption-column", "title").captions == TITLES
    assert made({}, "--overwrite", *ASKED).captions == SEEN
    renamed = catalogue(head="file;title;caption;technique")
    assert made({"metadata.csv": renamed}, "--overwrite").captions == SEEN, "a column named caption is no guess"


# ---- the column that is guessed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["beside", "source", "json", "parquet of pictures"])
def test_titles_that_are_taken_for_captions_beside_sentences_are_told_with_the_command_that_takes_the_sentences(made, kind):
    rows = [{"file_name": name, "title": TITLES[name], "what is seen": SEEN[name], "technique": TECHNIQUES[name]} for name in SEEN]
    name, content = {
        "beside": ("metadata.csv", catalogue()),
        "source": ("list.csv", catalogue()),
        "json": ("metadata.json", json.dumps(rows)),
        "parquet of pictures": ("train.parquet", b""),
    }[kind]
    if kind == "parquet of pictures":
        content = table([{"image": {"bytes": PICTURES[row["file_name"]], "path": None}, **row} for row in rows])
    found = made({**({} if "parquet" in kind else PICTURES), name: content}, source="list.csv" if kind == "source" else "")
    assert found.status == 0 and sorted(found.captions.values()) == sorted(TITLES.values())
    told = found.said[found.said.index("Look at ") :]
    assert (
        f"Other columns of text in {name if 'parquet' not in kind else 'in'}: what_is_seen. --caption-column chooses one instead of title;"
        in found.said
    )
    assert "The captions are titles" in told and told.index("The captions are titles") < told.index("Next:")
    assert main(printed(told, "--caption-column", "what_is_seen")) == 0
    assert sorted(made({}, *ASKED, source="list.csv" if kind == "source" else "").captions.values()) == sorted(SEEN.values())


def test_other_columns_of_text_are_named_beside_a_guess_and_only_there(made):
    head, row = "file_name;description;notes;year;technique", "1.png;A large moth sits on an oak leaf.;With some foxing.;1890;etching"
    found = made({**PICTURES, "metadata.csv": f"{head}\n{row}\n"})
    assert "Other columns of text in metadata.csv: notes. --caption-column chooses one instead of description;" in found.said
    assert "The captions are titles" not in found.said
    for other, options in ((head.replace("description", "caption"), ()), (head, ("--caption-column", "description"))):
        found = made({"metadata.csv": f"{other}\n{row}\n"}, *options, "--overwrite")
        assert found.captions == {"1.png": "A large moth sits on an oak leaf."} and "Other columns" not in found.said


@pytest.mark.parametrize(
    ("record", "guessed"),
    [
        ({"file": "a.png", "title": "The moth", "seen": "A large moth sits on a leaf."}, ("title", ("seen",), "seen")),
        ({"file": "a.png", "title": "A moth and a leaf on a table", "seen": "A large moth sits there."}, ("title", ("seen",), "")),
        ({"file": "a.png", "text": "A moth sits on a leaf.", "place": "In the third box on the left side."}, ("text", ("place",), "")),
        ({"file": "a.png", "title": "Plate 17", "seen": "A large moth sits on a leaf."}, ("title", ("seen",), "seen")),
        ({"file": "a.png", "title": "The moth", "style": "etching", "number": "17", "date": "1890"}, None),
        ({"file": "a.png", "caption": "A moth.", "title": "The moth", "seen": "A large moth sits on a leaf."}, None),
        ({"file": "a.png", "caption": None, "title": "The moth", "seen": "A large moth sits on a leaf."}, ("title", ("seen",), "seen")),
        ({"file": "a.png", "seen": "A large moth sits on a leaf."}, None),
    ],
)  # fmt: skip
def test_a_column_is_a_guess_where_another_holds_text_and_the_better_one_has_sentences(record, guessed):
    columns = TextColumns()
    for _ in range(3):
        columns.add(record)
    found = columns.guess("metadata.csv")
    assert (found and (found.column, found.others, found.better)) == guessed


def test_a_better_column_that_only_one_of_two_tables_has_is_not_offered_for_both(made):
    files = {f"{folder}/{name}": one for folder, name, one in zip("ab", PICTURES, PICTURES.values())}
    found = made(
        {**files, "a/metadata.csv": catalogue(), "b/metadata.csv": "file;title;place\n2.png;The ship;In the third box on the left.\n"}
    )
    assert "Other columns of text in metadata.csv: what_is_seen" in found.said and "The captions are titles" not in found.said


# ---- a table under its own name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["catalogue.csv", "lists/Katalog 1.tsv"])
def test_the_only_table_with_captions_is_read_under_any_name_and_from_any_folder(made, place):
    """It was not read under its own name; under another, all its paths led nowhere, since they count from its folder."""
    content = catalogue(head="file;title;caption;technique").replace(b";", b"\t" if "tsv" in place else b";")
    found = made({**PICTURES, place: content, "prices.csv": "a,b\n1,2\n"})
    assert found.status == 0 and found.captions == SEEN
    assert f"Captions are read from {place}, which has rows for 5 of 5 pictures without words." in found.said
    assert ("5 rows are matched by file name instead: lists/1.png is taken for 1.png." in found.said) == ("/" in place)


def test_rows_in_a_table_beside_a_folder_of_pictures_are_matched_by_file_name(made, tmp_path):
    """A Kaggle set: labels.csv beside images/. Every remedy that was printed failed."""
    files = {f"images/{name}": one for name, one in PICTURES.items()}
    table = "image_name,description\n" + "".join(f"{name},{caption}\n" for name, caption in SEEN.items())
    wanted = {f"images/{name}": caption for name, caption in SEEN.items()}
    for options in ((), ("--captions", "labels.csv"), ("metadata.csv",)):
        name = "metadata.csv" if "metadata.csv" in options else "labels.csv"
        found = made(
            {**files, name: table}, "--overwrite", *(["--captions", str(tmp_path / "in" / name)] if "--captions" in options else [])
        )
        assert found.status == 0 and found.captions == wanted
        assert "5 rows are matched by file name instead: 1.png is taken for images/1.png." in found.said
        (tmp_path / "in" / name).unlink()


def test_a_file_name_that_could_mean_two_pictures_or_a_table_whose_paths_lead_somewhere_is_not_guessed(made, tmp_path):
    files = {f"{folder}/{name}": one for folder in "ab" for name, one in list(PICTURES.items())[:2]} | {"c/3.png": PICTURES["3.png"]}
    found = made({**files, "list.csv": "file_name,caption\n1.png,A moth.\n3.png,A ship.\n"})
    assert not found.captions, "half of the rows"
    found = made({"list.csv": "file_name,caption\n3.png,A ship.\nx/2.png,A house.\n"}, "--overwrite")
    assert not found.captions, "a path with folders means that path"
    found = made({"list.csv": "file_name,caption\n3.png,A ship.\n"}, "--overwrite")
    assert found.captions == {"c/3.png": "A ship."}
    found = made({"list.csv": "file_name,caption\na/1.png,A moth.\n3.png,A ship.\n"}, "--overwrite")
    assert found.captions == {"a/1.png": "A moth."} and "Is that c/3.png?" in found.said


def test_a_stray_table_or_what_is_no_file_is_left_alone_and_sidecars_come_first(made, tmp_path):
    """A link that leads nowhere ended prepare with a traceback, a pipe hung it, and a table of numbers ended it."""
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "nowhere.csv", tmp_path / "in" / "link.csv")
    os.mkfifo(tmp_path / "in" / "pipe.csv")
    texts = {f"{name[:-4]}.txt": caption for name, caption in SEEN.items()}
    found = made({**PICTURES, **texts, "export.jsonl": '{"image": 12, "text": "A wolf."}\n'})
    assert found.status == 0 and found.captions == SEEN
    found = made({"export.jsonl": '{"image": "1.png", "text": "Another.", "era": "Old."}\n'}, "--overwrite")
    assert found.captions == SEEN and "Captions are read from" not in found.said


def test_of_two_tables_with_captions_none_is_taken_and_both_are_offered(made, tmp_path, capsys):
    content = catalogue(head="file;title;caption;technique")
    found = made({**PICTURES, "one.csv": content, "two.csv": content.replace(b"A large moth", b"A moth")})
    assert found.status == 1 and "The table one.csv is not read; the last lines say why" in found.said
    told = found.said[found.said.index("Give captions first") :]
    assert told.index("from one.csv, if it holds captions") < told.index("from two.csv") < told.index("by hand")
    assert shlex.quote(str(tmp_path / "in" / "metadata.csv")) in told
    assert main(printed(told)) == 0
    assert Made(tmp_path, {}, capsys, "--captions", str(tmp_path / "in" / "one.csv")).captions == SEEN


@pytest.mark.parametrize(
    ("head", "why"),
    [("scan;caption", "(scan, caption) is known to name the pictures; rename that one to file_name"),
     ("file;seen", "(file, seen) is known to hold captions; rename that one to caption")],
)  # fmt: skip
def test_a_table_whose_columns_are_not_known_is_told_what_to_rename_instead_of_a_command_that_fails(made, head, why):
    found = made({**PICTURES, "list.csv": f"{head}\n1.png;A large moth sits on a leaf.\n"})
    assert found.status == 1 and f"not from list.csv, as it stands: none of its columns {why}" in found.said
    assert "--captions" not in found.said.partition("by hand")[0].rpartition("Give captions first")[2]


def test_a_spreadsheet_beside_pictures_without_captions_is_told_to_be_saved_as_a_table(made):
    told = made({**PICTURES, "catalogue.xlsx": b"PK\3\4", "~$catalogue.xlsx": b"\0"}).said
    assert (
        "from catalogue.xlsx, if it holds captions" in told and "save it as CSV UTF-8 under the name" in told and "in/metadata.csv" in told
    )
    assert "~$" not in told


def test_a_table_that_is_not_read_is_no_matter_where_no_caption_is_missing(made):
    found = made({**PICTURES, "metadata.csv": catalogue(head="file;title;caption;technique"), "prices.csv": "a,b\n1,2\n"})
    assert found.status == 0 and "prices.csv" not in found.said


def test_a_second_name_is_offered_where_the_first_is_taken_and_none_where_both_are(made):
    files = {**PICTURES, "more.csv": catalogue(head="file;title;caption;technique"), "metadata.csv": "file_name,caption\n1.png,A moth.\n"}
    assert "in/captions.csv and" in made(files).said
    found = made({"captions.csv": "file_name,caption\n2.png,A ship.\n"}, "--overwrite")
    assert "from more.csv, if it holds captions (beside other tables it is not read under this name): give it:" in found.said


@pytest.mark.parametrize("paths", ["{}", "/scans/{}", "../{}"])
def test_pictures_that_are_not_where_a_table_from_elsewhere_says_are_told_with_the_option_that_names_their_folder(made, tmp_path, paths):
    """ "missing file" of each picture, and nothing else."""
    rows = "".join(f"{paths.format(name)},{caption}\n" for name, caption in SEEN.items())
    found = made(
        {f"pictures/{name}": one for name, one in PICTURES.items()} | {"lists/list.csv": f"file_name,caption\n{rows}"},
        source="lists/list.csv",
    )
    assert found.status == 1 and f"5 of 5, the first {paths.format('1.png')}" in found.said
    told = f"Paths are counted from {tmp_path / 'in' / 'lists'}: --root names another folder"
    anew = "No path may contain '..': write the paths relative to one folder, and name it with --root"
    assert (anew if ".." in paths else told) in found.said
    if paths == "{}":
        assert made({}, "--root", str(tmp_path / "in" / "pictures"), source="lists/list.csv").captions == SEEN
    found = made({}, "--root", str(tmp_path / "in"), "--overwrite", source="lists/list.csv")
    assert (anew if ".." in paths else f"Paths are counted from --root {tmp_path / 'in'}.") in found.said


def test_a_coco_file_whose_pictures_are_elsewhere_names_the_option_too(made):
    coco = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "A moth."}]}
    found = made({"captions_x.json": json.dumps(coco)}, source="captions_x.json")
    assert found.status == 1 and "--root names another folder" in found.said


# ---- an export from a collection's database ------------------------------------------------------------------------------


def test_a_column_named_for_a_register_gives_captions_of_it(made, tmp_path):
    """Of a table with `description` and `era` the titles were lost: "Other columns of text: era"."""
    rows = "".join(f"{name},{caption},{TITLES[name]}\n" for name, caption in SEEN.items())
    found = made({**PICTURES, "list.csv": f"file_name,description,era\n{rows}"})
    assert found.captions == SEEN and "Other columns" not in found.said
    assert {record["captions"]["era"] for record, _ in pairs(tmp_path / "out").values()} == set(TITLES.values())
    assert set(OF_REGISTERS) == set(REGISTERS) - {"plain"}


@pytest.mark.parametrize("encoding", ["", "cp1252"])
def test_a_table_of_another_encoding_is_told_what_else_it_lacks_once_the_encoding_is_named(made, encoding):
    """With the advised --encoding the same advice came back, and the column that was missing was never named."""
    table = "Inventory no;Description\n1;A café by the sea.\n".encode("cp1252")
    found = made({**PICTURES, "export.csv": table}, *(["--encoding", encoding] if encoding else []))
    named = "none of its columns (inventory_no, description) is known to name the pictures; rename that one to file_name"
    assert (named in found.said) == bool(encoding) and ("name its encoding" in found.said) != bool(encoding)


def test_rows_without_the_suffix_of_their_pictures_are_merged_into_shards_as_prepare_reads_them(made, tmp_path):
    made(PICTURES, "--allow-missing-captions")
    table = tmp_path / "list.csv"
    table.write_text("file_name,description\n" + "".join(f"{name[:-4]},{caption}\n" for name, caption in SEEN.items()))
    assert caption_main([str(tmp_path / "out"), "--from", str(table), "--out", str(tmp_path / "described")]) == 0
    assert {record["path"]: record["caption"] for record, _ in pairs(tmp_path / "described").values()} == SEEN


# ---- no captions at all --------------------------------------------------------------------------------------------------


def test_drafts_of_the_bundled_model_are_offered_by_commands_that_run(made, tmp_path, monkeypatch):
    """Without captions and without a network there was no way but to type them all."""
    pytest.importorskip("tokun.cli.sample", reason="pip install -e .")
    found = made(PICTURES, "--allow-missing-captions")
    told = found.said[found.said.index("from rough drafts of the bundled model") :].splitlines()
    draw, again = (shlex.split(line)[2:] for line in told[1:3])
    assert draw == ["--image", str(tmp_path / "in"), "--out", f"{tmp_path / 'out'}-drafts"]
    assert again[-3:] == ["--captions", f"{tmp_path / 'out'}-drafts/captions.csv", "--overwrite"]
    table = tmp_path / "out-drafts" / "captions.csv"
    table.parent.mkdir()
    table.write_text(
        "\ufefffile_name,caption,confidence\n" + "".join(f"{name},{caption},0.31\n" for name, caption in SEEN.items()), encoding="utf-8"
    )
    assert main(again) == 0 and made({}, "--captions", str(table)).captions == SEEN


# ---- several captions ----------------------------------------------------------------------------------------------------


def several(number):
    return json.dumps({"file_name": f"{number}.png", "text": [SEEN[f"{number}.png"], TITLES[f"{number}.png"]]})


def test_pictures_with_several_captions_are_told_with_the_way_to_train_on_all_of_them(made, tmp_path):
    """The second of each was stored, trained by nobody and mentioned nowhere."""
    rows = "\n".join([several(1), several(2), json.dumps({"file_name": "3.png", "text": SEEN["3.png"]}), ""])
    found = made({**{name: PICTURES[name] for name in ("1.png", "2.png", "3.png")}, "metadata.jsonl": rows})
    assert found.captions == {name: SEEN[name] for name in ("1.png", "2.png", "3.png")}
    assert (
        "2 pictures have several captions: the first is the caption, the others are kept in captions_all and not trained on" in found.said
    )
    assert "a column for each register (plain: what is seen; era: a printed title" in found.said
    assert several_captions("shards/", 2) == several_captions("shards", 2), "the new folder would lie in the old one"
    merged = next(shlex.split(line) for line in found.said.splitlines() if "registers.csv" in line)
    registers = tmp_path / "registers.csv"
    registers.write_text("file_name,plain,era\n" + "".join(f"{name},{SEEN[name]},{TITLES[name]}\n" for name in ("1.png", "2.png", "3.png")))
    assert caption_main([str(registers) if one == "registers.csv" else one for one in merged[2:]]) == 0
    assert {path: record["captions"]["era"] for path, (record, _) in pairs(tmp_path / "out-captioned").items()} == {
        name: TITLES[name] for name in ("1.png", "2.png", "3.png")
    }


def test_several_captions_beside_a_picture_are_counted_and_those_of_pictures_that_are_left_out_are_not(made):
    files = {"1.png": PICTURES["1.png"], "1.json": json.dumps({"captions": ["A moth on a leaf.", "A large moth."]})}
    tiny = {"2.png": image(2, size=(20, 20)), "2.json": json.dumps({"captions": ["A ship at sea.", "A ship."]})}
    assert "1 picture has several captions" in made({**files, **tiny}).said


@pytest.mark.parametrize("register", ["plain", "era"])
def test_what_a_table_replaces_is_kept_and_is_era_where_prepare_was_told_so(made, tmp_path, register):
    """The guide said that the source text becomes era, which it did not after prepare."""
    made({"1.png": PICTURES["1.png"], "1.txt": TITLES["1.png"]}, "--register", register)
    (tmp_path / "t.csv").write_text(f"file_name,description\n1.png,{SEEN['1.png']}\n")
    assert caption_main([str(tmp_path / "out"), "--from", str(tmp_path / "t.csv"), "--out", str(tmp_path / "new")]) == 0
    record = pairs(tmp_path / "new")["1.png"][0]
    earlier = [one["text"] for one in record.get("earlier_captions", [])]
    assert (
        record["captions"].get("era") == (TITLES["1.png"] if register == "era" else None) and record["captions"]["plain"] == SEEN["1.png"]
    )
    assert earlier == ([] if register == "era" else [TITLES["1.png"]])


def test_one_caption_each_is_no_matter(made):
    assert "captions_all" not in made({**PICTURES, "metadata.csv": catalogue(head="file;title;caption;technique")}).said


# ---- the table to fill in ------------------------------------------------------------------------------------------------


def test_a_table_to_fill_in_is_removed_once_nothing_is_missing_unless_somebody_wrote_into_it(made, tmp_path):
    """It stayed, with its empty rows, and said that captions were missing which were there."""
    filled = tmp_path / "out" / "captions.csv"
    words = {name.replace("png", "txt"): seen for name, seen in SEEN.items()}
    made({**PICTURES, "1.txt": words["1.txt"]})
    assert filled.read_text("utf-8-sig").split() == ["file_name,caption", *(f"{number}.png," for number in range(2, 6))]
    assert made({name: words[name] for name in words if name != "5.txt"}, "--overwrite").status == 0 and filled.exists()
    assert made(words, "--overwrite").captions == SEEN and not filled.exists()
    for worked_on in ("file_name,caption\n1.png,A moth.\n2.png,\n", "file_name,caption,note\n2.png,,box 3\n", "file_name,caption\n1.png\n"):
        filled.write_text(worked_on)
        assert made({}, "--overwrite").status == 0 and filled.read_text() == worked_on
    filled.write_text("file_name,caption\n2.png,\n")
    made({}, "--overwrite", "--captions", str(filled))
    assert filled.exists(), "the command that names it can be typed again"


def test_captions_by_register_alone_have_their_plain_one_as_the_caption(made):
    """Every picture was rejected as without a caption."""
    rows = [{"file_name": name, "captions": {"plain": caption, "era": "Plate."}} for name, caption in SEEN.items()]
    assert made({**PICTURES, "metadata.jsonl": "\n".join(map(json.dumps, rows))}).captions == SEEN


# ---- what is held out ----------------------------------------------------------------------------------------------------


def test_folders_that_hold_out_half_of_the_pictures_are_told_with_the_option_that_divides_them(made):
    files = {f"{'ab'[number % 2]}/{number}.png": image(number) for number in range(24)}
    words = {name.replace("png", "txt"): f"A wolf by tree number {name}." for name in files}
    found = made({**files, **words}, "--val", "0.05")
    assert "12 of 24 pictures are held out (--val 0.05 asks for 1), since pictures of one folder" in found.said
    assert main(printed(found.said, "--val-by")) == 0
    found = made({}, "--val", "0.05", "--val-by", "picture", "--overwrite")
    assert (
        "are held out (" not in found.said
        and 1 <= sum(line.startswith("val pairs") and int(line.split()[2]) for line in found.said.splitlines()) <= 4
    )
    assert "--val-by 'none' is unknown: choose group or picture" in made({}, "--val-by", "none", "--overwrite").said


def test_doubtful_pictures_that_are_kept_without_captions_are_in_the_table_to_fill(tmp_path):
    """Of 120 pictures kept without captions, the table listed 77: the doubtful ones were missing."""
    half_tone = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    half_tone.paste(Image.open(io.BytesIO(image(1, size=(240, 300)))).convert("L"), (0, 0))
    half_tone.save(photo := io.BytesIO(), "PNG")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(photo.getvalue())
    (tmp_path / "in" / "2.png").write_bytes(image(2, size=(400, 300)))
    out = tmp_path / "out"
    assert (
        main(
            [
                str(tmp_path / "in"),
                "--out",
                str(out),
                "--style",
                "engraving",
                "--allow-missing-captions",
                "--keep-ambiguous",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert {path: row["status"] for path, row in manifest(out).items()} == {"1.png": "ambiguous", "2.png": "kept"}
    assert (out / "captions.csv").read_text("utf-8-sig").split() == ["file_name,caption", "1.png,", "2.png,"]


# ---- counts that agree ---------------------------------------------------------------------------------------------------


def test_pictures_without_a_caption_that_are_left_out_for_another_reason_are_counted_beside_the_others(made):
    """Of five without a caption four were said to have none: the fifth was too long."""
    names = list(SEEN)[:4]
    found = made(
        {**{name: PICTURES[name] for name in names}, "panorama.png": image(9, size=(400, 80)), "broken.png": b"x", "notes.doc": "x"}
    )
    assert "6 of 6 pictures have no caption" in found.said and found.reasons()["panorama.png"] == "too long"
    assert "4 pictures have no caption and are not in the shards; 1 more has none and is left out for another reason (above)." in found.said
    captioned = {f"{name[0]}.txt": "A wolf." for name in names} | {"panorama.txt": "A wolf."}
    assert "left out for another reason" not in made(captioned, "--overwrite").said


# ---- styles and techniques -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["table", "source", "sidecars", "tar"])
def test_a_style_that_is_overridden_is_told_with_the_number_of_pictures(made, kind):
    """--style replaced the style of each row without a word."""
    records = [{"file_name": name, "caption": SEEN[name], "style": style} for name, style in TECHNIQUES.items()]
    records[4]["style"], records[3]["style"] = "Engraving", ""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    texts = {f"{record['file_name'][0]}.json": json.dumps(record) for record in records}
    files, source = {
        "table": ({**PICTURES, "metadata.jsonl": lines}, ""),
        "source": ({**PICTURES, "list.jsonl": lines}, "list.jsonl"),
        "sidecars": ({**PICTURES, **texts}, ""),
        "tar": ({"t.tar": tar([(name, one.encode() if isinstance(one, str) else one) for name, one in (PICTURES | texts).items()])}, ""),
    }[kind]
    found = made(files, source=source)
    assert (
        "--style engraving replaces the style that 3 of the 5 pictures kept have of their own; without --style each keeps its own, if all "
        "have one." in found.said
    )
    if kind == "table":
        plain = "".join(json.dumps({**record, "style": ""}) + "\n" for record in records)
        again = made({"metadata.jsonl": plain}, "--overwrite")
        assert again.status == 0 and "replaces the style" not in again.said


def test_a_technique_is_kept_and_a_whole_training_is_told_to_take_the_style_all_the_same(made, monkeypatch):
    monkeypatch.setattr(next_steps, "FEW_PICTURES", 4)
    found = made({**PICTURES, "metadata.csv": catalogue(head="file;title;caption;technique")})
    records = [record for record, _ in pairs(found.out).values()]
    assert {record["path"]: record["technique"] for record in records} == TECHNIQUES
    assert {record["style"] for record in records} == {"engraving"} and "5 pictures have a technique" in found.said
    monkeypatch.undo()
    counts = {"kept": 600, "distinct": 600}
    told = steps("shards", [], counts, report="report.html", val=30, techniques=600)
    assert "600 pictures have a technique" in told and "start=bundled data.style_key=style" in told
    for few, techniques in ((counts, 0), ({"kept": 60, "distinct": 60}, 60)):
        assert "style_key" not in steps("shards", [], few, report="report.html", val=3, techniques=techniques)
    for name in ("engraving-cpu", "finetune"):
        assert load_config(f"configs/{name}.yaml", []).data.style_key == "technique", "else the hint is not needed"
    assert load_config("configs/lora.yaml", []).data.style_key == "style"

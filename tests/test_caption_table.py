"""caption --from: a table's captions in image shards; nothing lost in silence, and the same bytes after any kill."""

import json
import shutil
from pathlib import Path

import pytest

from data_tools.caption import main
from data_tools.captioning import described_rows, from_table
from data_tools.captioning.from_table import Options, merge
from data_tools.pipeline.next_steps import of_registers
from data_tools.readers.stored_pairs import read_pairs
from data_tools.readers.table_files import TableError
from data_tools.text.main_noun import Lexicon
from tests.kills import kills
from tests.test_caption import everything, picture, records, write_tar
from tokun.utils.errors import UserError

DATA = Path(__file__).parents[2] / "shared/data"
HEAD = "key\tuse\tkind\tdescription\tpoetic\n"


def shard(folder: Path, name: str, **captions: str) -> Path:
    """A shard whose keys have these printed captions."""
    folder.mkdir(parents=True, exist_ok=True)
    members: dict[str, bytes] = {}
    for key, caption in captions.items():
        record = {"caption": caption, "technique": "wood engraving", "path": f"box/{key}.jpg", "title": "A Book"}
        members |= {f"{key}.png": picture() + key.encode(), f"{key}.json": json.dumps(record).encode(), f"{key}.note.txt": b"kept"}
    return write_tar(folder / name, members)


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def museum(tmp_path):
    shard(tmp_path / "shards", "train-00000.tar", a="Fig. 3", b="The Duke", c="", d="A mill")
    shard(tmp_path / "shards", "val-00000.tar", e="Plate 2")
    return tmp_path / "shards"


def test_a_shard_that_is_replaced_meanwhile_is_noticed_whatever_its_size(museum, tmp_path, monkeypatch):
    """The new shard's bytes would have been read from the old one's places: one picture with another's words."""
    begin = from_table.begin

    def replaced(out, shards, *more):
        begin(out, shards, *more)
        (tmp_path / "other.tar").write_bytes((museum / "train-00000.tar").read_bytes())
        (tmp_path / "other.tar").replace(museum / "train-00000.tar")

    monkeypatch.setattr(from_table, "begin", replaced)
    with pytest.raises(UserError, match=r"train-00000\.tar changed while it was being read"):
        merge([museum], table(tmp_path / "c.tsv", ROWS), tmp_path / "out", Options())


ROWS = (
    HEAD
    + "a\t1\tship\tA ship in a storm.\tThe sea is up.\nb\t0\tother\tA page.\t\nc\t1\tbird\tTwo owls on a branch.\t\n"
    + "e\t1\tbird\tAn owl.\t\nz\t1\tbird\tA crow.\t\n"
)


# ---------------------------------------------------------------------------------------------------------------------
# what is written


def test_a_row_becomes_registers_subject_and_thing_and_the_printed_caption_era(museum, tmp_path):
    report = merge([museum], table(tmp_path / "c.tsv", ROWS), tmp_path / "out", Options(min_things=2))
    after = records(tmp_path / "out")
    assert list(after) == ["a", "c", "e"] and (tmp_path / "out/val-00000.tar").exists()  # splits stay apart
    ship = after["a"]
    assert ship["caption"] == "A ship in a storm." and ship["subject"] == "ship" and ship["technique"] == "wood engraving"
    assert ship["captions"] == {
        "plain": "A ship in a storm.", "poetic": "The sea is up.", "era": "Fig. 3", "alt": "Wood engraving: a ship in a storm."
    }  # fmt: skip
    assert {name: source["source"] for name, source in ship["caption_sources"].items()} == {
        "plain": "table", "poetic": "table", "era": "printed", "alt": "rule"
    }  # fmt: skip
    assert "poetic" not in after["c"]["captions"] and "era" not in after["c"]["captions"]  # nothing was printed
    assert [after[key].get("thing") for key in "ace"] == [None, "owl", "owl"]  # one ship is too few
    assert report.registers == {"alt": 3, "plain": 3, "era": 2, "poetic": 1} and report.written == 3 and report.pictures == 5


def test_pictures_and_further_members_keep_their_bytes(museum, tmp_path):
    merge([museum], table(tmp_path / "c.tsv", ROWS), tmp_path / "out", Options())
    before = {pair.key: pair for pair in read_pairs(museum / "train-00000.tar", [])}
    for pair in read_pairs(tmp_path / "out/train-00000.tar", []):
        assert pair.image == before[pair.key].image and pair.members["note.txt"] == b"kept"
        assert list(pair.members) == list(before[pair.key].members)


def test_what_is_left_out_is_counted_and_named_on_both_sides(museum, tmp_path, capsys):
    assert main([str(museum), "--from", str(table(tmp_path / "c.tsv", ROWS)), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 × use 0: b" in said and "1 × picture without a row: d" in said and "1 × row without a picture: line 6 (z)" in said
    named = [json.loads(line) for line in (tmp_path / "out/left-out.jsonl").read_text().splitlines()]
    assert {(one.get("key") or one["row"], one["reason"]) for one in named} == {
        ("b", "use 0"),
        ("d", "picture without a row"),
        ("z", "row without a picture"),
    }
    assert json.loads((tmp_path / "out/caption.json").read_text())["left_out"] == {
        "use 0": 1,
        "picture without a row": 1,
        "row without a picture": 1,
    }


def test_pictures_without_a_row_stay_when_asked(museum, tmp_path):
    merge([museum], table(tmp_path / "c.tsv", ROWS), tmp_path / "out", Options(keep_undescribed=True))
    assert records(tmp_path / "out")["d"] == records(museum)["d"] and "b" not in records(tmp_path / "out")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_records(museum, tmp_path, suffix):
    rows = [{"file_name": "box/a.jpg", "text": "A ship, at sea."}, {"file_name": "./box/c.jpg", "text": "Two owls."}]
    path = tmp_path / f"t{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        path.write_text('file_name,text\nbox/a.jpg,"A ship, at sea."\n./box/c.jpg,Two owls.\n')
    else:
        path.write_text("file_name\ttext\nbox/a.jpg\tA ship, at sea.\n./box/c.jpg\tTwo owls.\n")
    merge([museum], path, tmp_path / "out", Options())
    assert {key: one["caption"] for key, one in records(tmp_path / "out").items()} == {"a": "A ship, at sea.", "c": "Two owls."}


@pytest.mark.parametrize("path", ["box/a.jpg", "a.jpg", "scans/box/a.jpg", "a.png", "box\\a.jpg"])
def test_paths_are_those_of_the_record_of_the_member_or_end_alike(museum, tmp_path, path):
    merge([museum], table(tmp_path / "t.tsv", f"path\tcaption\n{path}\tA ship.\n"), tmp_path / "out", Options())
    assert list(records(tmp_path / "out")) == ["a"]


def test_own_era_alt_and_thing_of_a_table_come_first_and_the_printed_caption_is_kept(museum, tmp_path):
    text = "key\tplain\tera\talt\tthing\na\tA ship.\tShips of old\tA drawing of a ship.\tfrigate\n"
    merge([museum], table(tmp_path / "t.tsv", text), tmp_path / "out", Options())
    one = records(tmp_path / "out")["a"]
    assert one["captions"] == {"plain": "A ship.", "era": "Ships of old", "alt": "A drawing of a ship."} and one["thing"] == "frigate"
    assert [(old["register"], old["text"]) for old in one["earlier_captions"]] == [("caption", "Fig. 3")]


@pytest.mark.parametrize("nothing", ["#N/A", "N/A", "na", "NaN", " ", "<br/>"])
def test_what_a_spreadsheet_writes_into_empty_cells_is_no_caption(museum, tmp_path, nothing):
    text = f"key,caption,poetic\na,{nothing},The <b>sea</b> is up.\nc,A ship &amp; a storm.,{nothing}\n"
    report = merge([museum], table(tmp_path / "t.csv", text), tmp_path / "out", Options())
    found = records(tmp_path / "out")
    assert found["a"]["caption"] == "Fig. 3" and found["a"]["captions"] == {"poetic": "The sea is up."}
    assert found["c"]["caption"] == "A ship & a storm." and "poetic" not in found["c"]["captions"] and report.registers["plain"] == 1


def test_registers_alone_are_added_and_the_caption_stays(museum, tmp_path):
    merge([museum], table(tmp_path / "t.tsv", "key\tpoetic\na\tThe sea is up.\n"), tmp_path / "out", Options())
    one = records(tmp_path / "out")["a"]
    assert one["caption"] == "Fig. 3" and one["captions"] == {"poetic": "The sea is up."}


# ---------------------------------------------------------------------------------------------------------------------
# cells that hold more than one text


SEEN_AND_PRINTED = ["A large snake in a tree.", "Aboma."]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "tsv"])
def test_of_a_list_of_texts_the_first_is_the_caption_and_all_are_kept(museum, tmp_path, capsys, kind):
    """ "plain" was "['A large snake …', 'Aboma.']", as Python writes a list, and `alt` was made of it."""
    path = tmp_path / f"meta.{kind}"
    rows = [{"key": "a", "text": SEEN_AND_PRINTED, "poetic": ["Coiled.", "Asleep."]}, {"key": "c", "text": ["Two owls."], "poetic": None}]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:  # as pandas writes lists
        mark = {"csv": ";", "tsv": "\t"}[kind]
        lines = [mark.join([row["key"], *(str(row[name] or "") for name in ("text", "poetic"))]) for row in rows]
        path.write_text("\n".join([mark.join(["key", "text", "poetic"]), *lines, ""]))
    assert main([str(museum), "--from", str(path), "--out", str(tmp_path / "out")]) == 0
    one, other = records(tmp_path / "out").values()
    assert one["caption"] == one["captions"]["plain"] == "A large snake in a tree." and one["captions"]["poetic"] == "Coiled."
    assert one["captions"]["alt"] == "Wood engraving: a large snake in a tree."
    assert one["captions_all"] == [*SEEN_AND_PRINTED, "Coiled.", "Asleep."]
    assert other["caption"] == "Two owls." and "captions_all" not in other and "poetic" not in other["captions"]
    assert "1 row holds several texts in a cell: the first is the caption; all are kept in captions_all" in capsys.readouterr().out


def test_texts_that_the_pictures_have_kept_already_stay_in_captions_all(tmp_path):
    record = {"caption": "A snake.", "captions_all": ["A snake.", "Aboma."]}
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s/train-00000.tar", {"a.png": picture(), "a.json": json.dumps(record).encode()})
    path = table(tmp_path / "t.jsonl", json.dumps({"key": "a", "text": ["A boa.", "Aboma.", "Boa"]}) + "\n")
    merge([tmp_path / "s"], path, tmp_path / "out", Options())
    assert records(tmp_path / "out")["a"]["captions_all"] == ["A boa.", "Aboma.", "Boa", "A snake."]


@pytest.mark.parametrize("odd", [{"en": 1}, 7.5, True, [3, 4]])
def test_values_that_are_no_text_are_counted_and_never_captions(museum, tmp_path, capsys, odd):
    rows = [{"key": "a", "caption": odd, "poetic": "The sea.", "kind": odd}, {"key": "c", "caption": "Two owls.", "poetic": odd}]
    path = table(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(museum), "--from", str(path), "--out", str(tmp_path / "out")]) == 0
    one, other = records(tmp_path / "out").values()
    assert one["caption"] == "Fig. 3" and one["captions"] == {"poetic": "The sea."} and "subject" not in one
    assert other["captions"]["plain"] == "Two owls." and "poetic" not in other["captions"]
    said = capsys.readouterr().out
    assert f"1 × in column caption, the first in line 1 ({odd!r}): not read" in said
    assert "1 × in column poetic, the first in line 2" in said and "1 × in column kind, the first in line 1" in said


def test_numbers_are_texts_as_in_prepare(museum, tmp_path):
    path = table(tmp_path / "t.jsonl", json.dumps({"key": "a", "caption": 1871, "kind": 3}) + "\n")
    merge([museum], path, tmp_path / "out", Options())
    one = records(tmp_path / "out")["a"]
    assert one["captions"]["plain"] == "1871" and one["subject"] == "3"


def test_captions_by_register_in_one_column_are_read_as_prepare_reads_them(museum, tmp_path, capsys):
    rows = [
        {"key": "a", "captions": {"Plain": "A snake.", "era": "Aboma.", "none": 3}, "file_size": 3},
        {"key": "c", "captions": ["Two owls.", "Owls."], "file_size": 4},
    ]
    path = table(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(museum), "--from", str(path), "--out", str(tmp_path / "out")]) == 0
    one, other = records(tmp_path / "out").values()
    assert {name: one["captions"][name] for name in ("plain", "era")} == {"plain": "A snake.", "era": "Aboma."} and "none" not in one[
        "captions"
    ]
    assert one["caption"] == "A snake." and one["caption_sources"]["era"]["column"] == "captions" and other["caption"] == "Two owls."
    said = capsys.readouterr().out
    assert "plain from captions, era from captions" in said and "no captions  columns file_size" in said


def test_a_column_of_the_caption_comes_before_captions_by_register(museum, tmp_path, capsys):
    row = {"key": "a", "caption": "A boa.", "captions": {"plain": "A snake.", "era": "Aboma."}}
    path = table(tmp_path / "t.jsonl", json.dumps(row) + "\n")
    assert main([str(museum), "--from", str(path), "--out", str(tmp_path / "out")]) == 0
    one = records(tmp_path / "out")["a"]
    assert one["caption"] == "A boa." and one["captions"]["era"] == "Aboma." and one["caption_sources"]["plain"]["column"] == "caption"
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"key": "a", "text": {"en": 1}}], r"holds no text in text of its 1 rows, but other values: text of line 1 \(\{'en': 1\}\)"),
        ([{"key": ["a"], "text": "A ship."}], r"line 1: key is \['a'\], which names no picture\. Write one key as text"),
        (
            [{"image": {"path": "a.png"}, "text": "A ship."}],
            r"line 1: image is \{'path': 'a\.png'\}, which names no picture\. Write one path",
        ),
    ],
)
def test_tables_without_any_text_or_name_are_told_in_one_line(museum, tmp_path, rows, said):
    path = table(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TableError, match=said):
        merge([museum], path, tmp_path / "out", Options())


def test_a_run_that_wrote_lists_as_python_does_is_not_resumed(museum, tmp_path, monkeypatch):
    path = table(tmp_path / "t.jsonl", json.dumps({"key": "a", "text": SEEN_AND_PRINTED}) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(from_table, "NESTED", from_table.LAYOUT)
        merge([museum], path, tmp_path / "out", Options())
    with pytest.raises(UserError, match=r"was started with other inputs \(layout differ\)"):
        merge([museum], path, tmp_path / "out", Options())


# ---------------------------------------------------------------------------------------------------------------------
# what comes next


def test_training_on_the_new_folder_is_offered_with_a_word_on_the_registers(museum, tmp_path, capsys):
    """Questions alone were offered: the captions that had just been merged were not trained on by any printed command."""
    assert main([str(museum), "--from", str(table(tmp_path / "c.tsv", ROWS)), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert (
        f"tokun train --config lora start=bundled 'data.train={out}/train-*.tar' 'data.val={out}/val-*.tar' train.plain_share=0.7 "
        "out=runs/mine-lora" in said
    )
    assert (
        "Beside plain there are captions of the registers alt, era, poetic: lora trains on the plain captions alone; with "
        "train.plain_share=0.7, as above" in said
    )
    assert said.index("tokun train") < said.index("tokun questions")


def test_training_waits_where_most_pictures_have_no_caption_and_where_shards_have_other_names(museum, tmp_path, capsys):
    shard(tmp_path / "mine", "mine-0.tar", a="")
    path = table(tmp_path / "t.tsv", "key\tcaption\na\tA ship.\n")
    assert main([str(tmp_path / "mine"), "--from", str(path), "--out", str(tmp_path / "one")]) == 0
    assert "tokun train" not in capsys.readouterr().out
    shard(tmp_path / "few", "train-0.tar", a="", b="", c="")
    assert main([str(tmp_path / "few"), "--from", str(path), "--keep-undescribed", "--out", str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "tokun train" not in said and "Train when more of the pictures have captions: 1 of 3 do" in said


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (100, "lora trains on the plain captions alone; with train.plain_share=0.7, as above"),
        (3_000, "finetune draws 25% of its samples from all registers"),
        (60_000, "engraving-cpu draws 25% of its samples from all registers"),
    ],
)
def test_the_share_of_the_registers_is_that_of_the_config_which_is_offered(pictures, told):
    assert told in of_registers(["era"], pictures) and not of_registers([], pictures)


# ---------------------------------------------------------------------------------------------------------------------
# several folders


def test_folders_are_mixed_by_a_fixed_seed_split_by_split(tmp_path):
    for name in ("one", "two"):
        shard(tmp_path / name, "train-00000.tar", **{f"{name}-{i}": "Fig." for i in range(20)})
    shard(tmp_path / "two", "val-00000.tar", v="Fig.")
    rows = (
        "folder\tkey\tcaption\n"
        + "".join(f"{name}\t{name}-{i}\tA thing {i}.\n" for name in ("one", "two") for i in range(20))
        + "two\tv\tA ship.\n"
    )
    path = table(tmp_path / "t.tsv", rows)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        merge([str(tmp_path / "one"), str(tmp_path / "tw*/*.tar")], path, tmp_path / out, Options(seed=seed, shard_size=15))
    keys = list(records(tmp_path / "a"))
    assert everything(tmp_path / "a") == everything(tmp_path / "b") and keys != list(records(tmp_path / "c"))
    assert sorted(path.name for path in (tmp_path / "a").glob("*.tar")) == [
        "train-00000.tar",
        "train-00001.tar",
        "train-00002.tar",
        "val-00000.tar",
    ]
    assert len(keys) == len(set(keys)) == 41 and len({key.split("-")[0] for key in keys[:10]}) == 2
    assert records(tmp_path / "a")["v"]["folder"] == "two"


def test_keys_that_folders_share_become_unique(tmp_path):
    for name in ("one", "two"):
        shard(tmp_path / name, "train-00000.tar", a="Fig.", b="Fig.")
    rows = "folder\tkey\tcaption\n" + "".join(f"{name}\t{key}\t{name} {key}.\n" for name in ("one", "two") for key in "ab")
    merge([tmp_path / "one", tmp_path / "two"], table(tmp_path / "t.tsv", rows), tmp_path / "out", Options())
    after = records(tmp_path / "out")
    assert {key: one["caption"] for key, one in after.items()} == {f"{n}-{k}": f"{n} {k}." for n in ("one", "two") for k in "ab"}
    with pytest.raises(TableError, match=r"line 2: a is in .*column folder"):
        merge([tmp_path / "one", tmp_path / "two"], table(tmp_path / "u.tsv", "key\tcaption\na\tA ship.\n"), tmp_path / "out2", Options())


def test_a_key_twice_in_one_folder_is_refused_counted_and_named(tmp_path):
    shard(tmp_path / "s", "train-00000.tar", a="x", b="y")
    shard(tmp_path / "s", "train-00001.tar", a="z")
    report = merge([tmp_path / "s"], table(tmp_path / "t.tsv", "key\tcaption\na\tA ship.\nb\tA mill.\n"), tmp_path / "out", Options())
    assert list(records(tmp_path / "out")) == ["b"] and report.left_out == {"key twice in one folder": 2}


def test_members_named_from_the_current_folder_on_have_the_keys_that_training_reads(tmp_path):
    """`tar cf shard.tar ./` names them so."""
    record = json.dumps({"caption": ""}).encode()
    members = {"./a.png": picture(), "./a.json": record, "./in/b.PNG": picture(), "./in/b.json": record}
    write_tar(tmp_path / "train-00000.tar", members)
    rows = table(tmp_path / "t.tsv", "key\tcaption\na\tA ship.\nin/b\tA mill.\n")
    merge([tmp_path / "train-00000.tar"], rows, tmp_path / "out", Options())
    assert {key: one["caption"] for key, one in records(tmp_path / "out").items()} == {"a": "A ship.", "in/b": "A mill."}


# ---------------------------------------------------------------------------------------------------------------------
# killed, and typed again


def test_killed_at_every_change_of_the_disk_it_ends_with_the_same_bytes(museum, tmp_path):
    path = table(tmp_path / "c.tsv", ROWS)
    merge([museum], path, tmp_path / "whole", Options())
    out = tmp_path / "out"
    times = 0
    for _ in kills(lambda: merge([museum], path, out, Options()), out):
        merge([museum], path, out, Options())
        assert everything(out) == everything(tmp_path / "whole")
        shutil.rmtree(out)
        times += 1
    assert times > 8


def test_whole_shards_are_not_written_again_and_other_input_is_refused(museum, tmp_path):
    path, out = table(tmp_path / "c.tsv", ROWS), tmp_path / "out"
    merge([museum], path, out, Options())
    times = {one: one.stat().st_mtime_ns for one in out.glob("*.tar")}
    before = everything(out)
    merge([museum], path, out, Options())
    assert everything(out) == before and all(one.stat().st_mtime_ns == time for one, time in times.items())
    with pytest.raises(ValueError, match="sha256 differ"):
        merge([museum], table(path, ROWS.replace("storm", "calm")), out, Options())
    with pytest.raises(ValueError, match=r"folder of train-00000\.tar itself"):
        merge([museum], path, museum, Options())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key\tcaption\nx\tA ship.\n", r"no row belongs to a picture.*'x' \(line 2\).*key 'a'"),
        ("name\tcaption\na\tA ship.\n", "names no pictures: its columns are name, caption"),
        ("key\tBild\na\tA ship.\n", "columns are key, bild.*--caption-column"),
        ("key\tcaption\na\tA ship.\na\tA boat.\n", "lines 2 and 3 are both about a"),
        ("key\tcaption\n\tA ship.\n", "line 2: key is empty"),
        ("key\tcaption\na\tA\tship.\n", "line 2: 3 fields"),
        ("key\tuse\tcaption\na\t0\tA ship.\n", "no picture is left"),
        ("key\tcaption\n", "a header but no rows"),
    ],
)
def test_tables_that_do_not_fit_are_told_in_one_line(museum, tmp_path, capsys, text, said):
    with pytest.raises(TableError, match=said):
        merge([museum], table(tmp_path / "t.tsv", text), tmp_path / "out", Options())
    assert main([str(museum), "--from", str(tmp_path / "t.tsv"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") < 4  # the bar and the line


def test_another_caption_column_and_captions_that_are_alike(tmp_path, capsys):
    shard(tmp_path / "s", "train-00000.tar", **{f"k{i}": "" for i in range(30)})
    path = table(tmp_path / "t.csv", "key,Bildtext\n" + "".join(f"k{i},An engraving.\n" for i in range(30)))
    assert main([str(tmp_path / "s"), "--from", str(path), "--caption-column", "bildtext", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "plain from bildtext" in said and "WARNING" in said and "only 1 different" in said


# ---------------------------------------------------------------------------------------------------------------------
# things, and the real table


real = pytest.mark.skipif(not (DATA / "descriptions.tsv").is_file(), reason="the descriptions are not beside the project (../shared)")
NOUNS = [
    "moth",
    "knight",
    "man",
    "head",
    "horse",
    "portrait",
    "raft",
    "ship",
    "schoolboy",
    "boy",
    "boat",
    "leaf",
    "acorn",
    "oak",
    "beetle",
    "shell",
    "lid",
    "view",
    "seal",
    "shield",
    "temple",
    "front",
    "row",
    "column",
    "box",
    "wolf",
    "sledge",
    "glove",
    "table",
    "lady",
    "girl",
    "couch",
    "trader",
    "hat",
    "bridle",
    "wing",
    "jaw",
]
ADJECTIVES = [
    "spread",
    "armed",
    "bearded",
    "burning",
    "large",
    "sailing",
    "tall",
    "thin",
    "long",
    "curved",
    "spiral",
    "worn",
    "round",
    "tilted",
    "wooden",
    "street",
    "stag",
]
PLURALS = {"man": "men", "leaf": "leaves", "wolf": "wolves", "box": "boxes"}


def made_descriptions():
    """Sentences in which each noun ends a phrase and each adjective stands before one, several times."""
    for number, noun in enumerate(NOUNS * 4):
        adjective, other = ADJECTIVES[number % len(ADJECTIVES)], NOUNS[(7 * number + 3) % len(NOUNS)]
        yield f"A {adjective} {noun} beside the {other}."
        yield f"Two {PLURALS.get(noun, noun + 's')} on a {other}."


@pytest.fixture(scope="module", params=["made", pytest.param("real", marks=real)])
def lexicon(request):
    """Of sentences made on the spot, and of the real descriptions where they lie beside the project."""
    table = described_rows.read_table(DATA / "descriptions.tsv") if request.param == "real" else ()
    return Lexicon.learn((row.values["description"] for row in table) if request.param == "real" else made_descriptions())


@pytest.mark.parametrize(
    ("description", "thing"),
    [
        ("A moth with spread wings, seen from above.", "moth"),
        ("Two armed knights fighting.", "knight"),
        ("Portrait of a bearded man in a hat.", "man"),
        ("The head of a horse with a bridle.", "horse"),
        ("A burning raft floating beside a large sailing ship.", "raft"),
        ("Many schoolboys crowded around a table.", "schoolboy"),
        ("A tall, thin man walking.", "man"),
        ("Three men and a boy in a boat.", "man"),
        ("Leaves and acorns of an oak.", "leaf"),
        ("A stag beetle with long curved jaws.", "beetle"),
        ("Two views of a spiral shell, one showing its lid.", "shell"),
        ("A worn round seal with a tilted shield.", "seal"),
        ("A temple front with a row of columns.", "temple"),
        ("A wooden box and a lid.", "box"),
        ("Wolves chasing a sledge.", "wolf"),
        ("A lady's glove on a table.", "glove"),
        ("A girl lying asleep on a couch.", "girl"),
        ("Two street traders side by side.", "trader"),
    ],
)
def test_the_thing_is_the_main_noun(lexicon, description, thing):
    assert lexicon.thing(description) == thing


def test_alt_text_keeps_names_large(lexicon):
    assert described_rows.alt_text("wood engraving", "A moth with spread wings.", lexicon) == "Wood engraving: a moth with spread wings."
    assert described_rows.alt_text("", "A moth.", lexicon) == "A moth."
    assert described_rows.alt_text("etching", "Two owls.", lexicon) == "Etching: two owls."


def made_collection(folder: Path, n: int = 60) -> tuple[list[Path], Path, set[str]]:
    """Shards of n prints and n plates, a table with rows of all and of two others, and the keys whose use is 0."""
    shards, unused = [], set()
    lines = ["folder\tkey\tuse\tkind\tdescription\tpoetic\tsocial"]
    sentences = list(made_descriptions())
    for name, front in (("engravings", "val-"), ("plates", "pval-")):
        keys = [f"{front}{number:06d}" for number in range(n)]
        unused |= set(keys[7::25])
        shards.append(shard(folder / name, "val-00000.tar", **{key: f"{key.title()}." for key in keys}))
        for number, key in enumerate([*keys, f"{front}999999"]):
            use, text = "01"[key not in unused], sentences[number % len(sentences)]
            more = ("A line that sings.", "Look at this!") if number % 3 == 0 else ("", "")
            lines.append("\t".join((name, key, use, ("ship", "people")[number % 2], text, *more)))
    return shards, table(folder / "descriptions.tsv", "\n".join(lines) + "\n"), unused


def test_a_made_collection_of_prints_and_plates_is_described(tmp_path):
    shards, path, unused = made_collection(tmp_path)
    report = merge(shards, path, tmp_path / "out", Options(min_things=2))
    assert report.written == 120 - len(unused) and report.left_out == {"use 0": len(unused), "row without a picture": 2}
    after = records(tmp_path / "out")
    assert all({"plain", "era", "alt"} <= set(one["captions"]) and one["subject"] for one in after.values())
    assert sum("poetic" in one["captions"] for one in after.values()) > 30 and sum("thing" in one for one in after.values()) > 60
    first = after["val-000000"]
    assert first["caption"] == "A spread moth beside the head." and first["thing"] == "moth" and first["subject"] == "ship"
    images = {pair.key: pair.image for path in shards for pair in read_pairs(path, [])}
    assert all(images[pair.key] == pair.image for pair in read_pairs(tmp_path / "out/val-00000.tar", []))


# of a made collection: the test above
@pytest.mark.slow
@real
def test_the_real_validation_prints_are_described(tmp_path):
    shards = [DATA / "engravings/val-00000.tar", DATA / "plates/val-00000.tar"]
    report = merge(shards, DATA / "descriptions.tsv", tmp_path / "out", Options())
    assert report.written == 882 and report.left_out["use 0"] == 3 and report.left_out["row without a picture"] == 29794 - 885
    after = records(tmp_path / "out")
    assert all({"plain", "era", "alt"} <= set(one["captions"]) and one["subject"] for one in after.values())
    assert sum("thing" in one for one in after.values()) > 500
    moth = after["val-000002"]
    assert moth["caption"] == "A stag beetle with long curved jaws, seen from above." and moth["thing"] == "beetle"
    images = {pair.key: pair.image for path in shards for pair in read_pairs(path, [])}
    assert all(images[pair.key] == pair.image for pair in read_pairs(tmp_path / "out/val-00000.tar", []))

"""One reader of tables: strict, the same in every format, and told with file and line."""

import io
import json
from pathlib import Path

import pytest

from data_tools.readers.table_files import Row, TableError, caption_column, read_table, value_of

DATA = Path(__file__).parents[2] / "shared/data"
ROWS = [("a.png", "A ship, at sea."), ("b.png", 'He said "no".'), ("c.png", "Tête-à-tête 雪"), ("d.png", None)]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(path: Path, **how) -> list[tuple]:
    return [tuple(row.values.values()) for row in read_table(path, **how)]


def fault(path: Path, **how) -> str:
    with pytest.raises(TableError) as error:
        read_table(path, **how)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# one behaviour


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_same_rows_come_out_of_every_format(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        write(path, 'File Name,caption\r\na.png,"A ship, at sea."\r\nb.png,"He said ""no""."\r\nc.png,Tête-à-tête 雪\r\nd.png,NaN\r\n')
    elif suffix == ".tsv":
        write(path, 'File-Name\tcaption\na.png\tA ship, at sea.\nb.png\tHe said "no".\nc.png\tTête-à-tête 雪\nd.png\tnull\n')
    elif suffix == ".jsonl":
        write(path, "".join(json.dumps({"file_name": name, "Caption": text}) + "\n" for name, text in ROWS))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        names, texts = map(list, zip(*ROWS))
        pq.write_table(pa.table({"File name": names, "caption": texts, "image": [b"x"] * 4}), path)
    table = read_table(path)
    assert table.columns == ("file_name", "caption") and len(table) == 4
    assert [tuple(row.values.values()) for row in table] == ROWS == rows(path)  # and a second time
    assert next(iter(table)).line == {".csv": 2, ".tsv": 2}.get(suffix, 1)


def test_what_says_nothing_is_no_value():
    for nothing in ("", " ", "nan", "NaN", "<NA>", "None", "null", "NULL", float("nan"), None):
        assert value_of(nothing) is None, nothing
    assert [value_of(x) for x in ("Nancy", "0", 0, "none of them", False)] == ["Nancy", "0", 0, "none of them", False]


def test_lines_are_those_of_the_file_where_cells_and_blank_lines_span_several(tmp_path):
    path = write(tmp_path / "t.csv", 'key,caption\n\na,"One\ntwo"\nb,x\n')
    assert list(read_table(path)) == [Row(3, {"key": "a", "caption": "One\ntwo"}), Row(5, {"key": "b", "caption": "x"})]


@pytest.mark.parametrize(("head", "separator"), [("key,caption", ","), ("key;caption", ";"), ("key\tcaption", "\t")])
def test_the_separator_of_a_csv_is_the_one_of_its_head(tmp_path, head, separator):
    path = write(tmp_path / "t.csv", f"\ufeff{head}\na{separator}A ship\n")
    assert rows(path) == [("a", "A ship")] and read_table(path).columns == ("key", "caption")


def test_one_column_old_line_ends_and_separators_of_lines_in_text(tmp_path):
    assert rows(write(tmp_path / "one.csv", "caption\nA ship\n")) == [("A ship",)]
    assert rows(write(tmp_path / "mac.csv", "key,caption\ra,A ship\rb,A mill\r")) == [("a", "A ship"), ("b", "A mill")]
    assert rows(write(tmp_path / "u.tsv", "key\tcaption\na\tA\u2028ship\x0bx\n")) == [("a", "A\u2028ship\x0bx")]
    assert rows(write(tmp_path / "x.txt", "key|caption\na|A ship\n"), separator="|", quoting="none") == [("a", "A ship")]


def test_a_table_that_is_no_plain_file_is_opened_as_one_says(tmp_path):
    data = b"key,caption\na,A ship\n"
    assert rows(Path("in/an/archive.csv"), open_file=lambda: io.BytesIO(data)) == [("a", "A ship")]


# ---------------------------------------------------------------------------------------------------------------------
# tabs and quotes


@pytest.mark.parametrize(
    "cell",
    ['"Hold!" cried the guard', '"The wolf and the lamb', '"Hold!"', 'A gun of 5"', '""Hold"" he said', "'tis he"],
    ids=["begins quoted", "quote without end", "all quoted", "inch", "doubled", "apostrophe"],
)
def test_tabs_without_quoting_are_read_as_they_stand(tmp_path, cell):
    path = write(tmp_path / "t.tsv", f"key\tcaption\na\tA ship\nb\t{cell}\nc\tA mill\n")
    assert rows(path) == [("a", "A ship"), ("b", cell), ("c", "A mill")]
    assert "without quoting" in read_table(path).how


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ('"key"\t"caption"\n"b"\t"Hold!"\n', "Hold!"),
        ('key\tcaption\nb\t"He said ""no"""\n', 'He said "no"'),
        ('key\tcaption\nb\t"One\ttwo"\n', "One\ttwo"),
        ('key\tcaption\nb\t"One\ntwo"\n', "One\ntwo"),
    ],
    ids=["head in quotes", "doubled quotes", "tab inside", "line break inside"],
)
def test_tabs_with_quoting_are_told_by_what_only_quoting_explains(tmp_path, text, cell):
    path = write(tmp_path / "t.tsv", text)
    assert rows(path) == [("b", cell)] and read_table(path).how == "tab separated, quoted"


def test_quoting_is_decided_by_hand(tmp_path):
    path = write(tmp_path / "t.tsv", 'key\tcaption\nb\t"Hold!"\n')
    assert rows(path) == [("b", '"Hold!"')] and rows(path, quoting="csv") == [("b", "Hold!")]
    path = write(tmp_path / "q.csv", 'key,caption\nb,"The wolf\n')
    assert rows(path, quoting="none") == [("b", '"The wolf')]
    with pytest.raises(ValueError, match="auto, none, csv"):
        read_table(path, quoting="some")


def test_csv_module_and_pandas_tables_come_back_as_they_went(tmp_path):
    import csv

    texts = ['"Hold!" he said', "tab\there", "line\nbreak", 'inch "', "plain, with commas", "semi; colon"]
    for number, (suffix, sep, quoting) in enumerate(
        [(".csv", ",", 0), (".csv", ";", 1), (".tsv", "\t", 0), (".tsv", "\t", 1), (".csv", "\t", 2)]
    ):
        path = tmp_path / f"{number}{suffix}"
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter=sep, quoting=quoting).writerows([("key", "caption"), *((f"k{i}", t) for i, t in enumerate(texts))])
        assert [row[1] for row in rows(path)] == texts, (suffix, sep, quoting)


def test_a_made_table_of_descriptions_is_read_whole(tmp_path):
    texts = ('Two owls; one says "no", the other ‘yes’.', "'Tis a ship, at sea…", "Tête-à-tête — 雪", '"Hold!" he said', 'A 5" gun, 1887')
    made = [("prints", f"val-{i:06d}", "01"[i % 9 > 0], "ship", texts[i % 5], texts[i % 3] if i % 4 else None, None) for i in range(2000)]
    columns = ("folder", "key", "use", "kind", "description", "poetic", "social")
    table = read_table(write(tmp_path / "t.tsv", "".join("\t".join(cell or "" for cell in row) + "\n" for row in (columns, *made))))
    assert table.columns == columns and [tuple(row.values.values()) for row in table] == made


# of a made table: the test above
@pytest.mark.skipif(not (DATA / "descriptions.tsv").is_file(), reason="the descriptions are not beside the project (../shared)")
def test_the_table_of_descriptions_is_read_whole():
    table = read_table(DATA / "descriptions.tsv")
    assert table.columns == ("folder", "key", "use", "kind", "description", "poetic", "social") and len(table) == 29794
    assert all(row.values["description"] for row in table)


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong is told


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('key,caption\na,"The wolf\nb,A horse\nc,A mill\n', 2, "a quote is not closed"),
        ('key,caption\na,x\nb,"The wolf\nc,"A horse"\n', 3, "is not closed before line 4"),
        ('f,caption\na.png,"The wolf\nb.png,A horse\nc.png,A gun of 5"\nd.png,x\n', 2, "includes line 3"),
        ('f,caption\n1,"The wolf\n2,A horse\n3,A gun of 5"\n', 2, "includes line 3"),
        ('key,caption\na,"Hold!" he said\n', 2, "text follows a closing quote"),
        ("key,caption\na,A ship, a mill\n", 2, "3 fields where the header has 2"),
        ("key,caption,use\na,A ship\n", 2, "2 fields where the header has 3"),
        ("key,caption,Caption\na,b,c\n", 1, "'caption' and 'Caption'"),
        ("key,,caption\na,b,c\n", 1, "column 2 of 3 has no name"),
        ("key,caption\na,\0\n", 2, "zero byte"),
    ],
)
def test_faults_of_a_csv_name_the_line_and_the_way_out(tmp_path, text, line, said):
    told = fault(write(tmp_path / "t.csv", text))
    assert f"line {line}: " in told and said in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key\tcaption\na\tA\tship\n", "line 2: 3 fields where the header has 2"),
        ("key\tcaption\na\tA ship\nb\n", "line 3: 1 fields where the header has 2"),
        ("key\tcaption\na\tA\nship\n", "line 3: 1 fields"),
        ('"key"\t"caption"\na\t"The wolf\nb\tx\n', "line 2: a quote is not closed"),
    ],
)
def test_faults_of_a_tsv(tmp_path, text, said):
    assert said in fault(write(tmp_path / "t.tsv", text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"key": "a"}\n{"key": \n', "line 2: is not valid JSON"),
        ('{"key": "a"}\n\n["a"]\n', "line 3: is not a JSON object"),
        ('{"key": "a", "key": "b"}\n', "line 1: the name 'key' appears twice"),
        ('{"Key": "a", "key": "b"}\n', "line 1: two columns have the same name"),
        ("\n", "is empty"),
    ],
)
def test_faults_of_a_jsonl(tmp_path, text, said):
    assert said in fault(write(tmp_path / "t.jsonl", text))


def test_faults_of_a_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert "not a readable Parquet file" in fault(write(tmp_path / "t.parquet", "key,caption\n"))
    pq.write_table(pa.table({"Key": ["a"], "key": ["b"]}), tmp_path / "two.parquet")
    assert "two columns have the same name" in fault(tmp_path / "two.parquet")


def test_bytes_that_are_not_utf8_are_named_with_what_they_may_be(tmp_path):
    path = write(tmp_path / "t.csv", "key,caption\na,A ship\nb,Tête\n".encode("cp1252"))
    told = fault(path)
    assert "line 3" in told and "0xea" in told and "Tête" in told and "--encoding cp1252" in told
    assert rows(path, encoding="cp1252") == [("a", "A ship"), ("b", "Tête")]
    path = write(tmp_path / "x.tsv", "key\tcaption\na\tTête\n".encode("utf-16"))
    assert "utf-16" in fault(path) and rows(path, encoding="utf-16") == [("a", "Tête")]
    with pytest.raises(ValueError, match="encoding 'klingon'"):
        read_table(path, encoding="klingon")


def test_empty_unknown_and_missing_files(tmp_path):
    assert "is empty" in fault(write(tmp_path / "t.csv", ""))
    assert "not a table" in fault(write(tmp_path / "t.xlsx", "x"))
    assert len(read_table(write(tmp_path / "head.csv", "key,caption\n"))) == 0
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.csv")


# ---------------------------------------------------------------------------------------------------------------------
# the column of captions


@pytest.mark.parametrize(
    ("head", "taken"), [("key,Text", "text"), ("key,prompt", "prompt"), ("title,caption", "caption"), ("key,Description", "description")]
)
def test_known_names_of_captions_are_recognised(tmp_path, head, taken):
    assert caption_column(read_table(write(tmp_path / "t.csv", f"{head}\na,b\n"))) == taken


def test_another_name_is_asked_for_and_its_absence_told(tmp_path):
    table = read_table(write(tmp_path / "t.csv", "key,Bild Text\na,b\n"))
    assert caption_column(table, "Bild Text") == "bild_text"
    with pytest.raises(TableError, match=r"columns are key, bild_text.*--caption-column"):
        caption_column(table)
    with pytest.raises(TableError, match=r"no column 'words'.*key, bild_text"):
        caption_column(table, "words")

"""Promises of the viewer's sheets: nothing on them tells what is right, and answers are scored as they were meant."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.small_runs import needs
from tokun.evaluate import __main__ as evaluate
from tokun.evaluate import viewer, viewer_score
from tokun.evaluate.viewer import Shown

KINDS = ("bird", "fish", "ship", "people")


def pairs(n: int, *, shape: tuple[int, int] = (64, 64)) -> list[Shown]:
    return [
        Shown(f"key-{i:03d}", f"A {KINDS[i % 4]} with the number {i}, seen from the side.", KINDS[i % 4], Image.new("L", shape, i))
        for i in range(n)
    ]


# --- choosing -------------------------------------------------------------------------------------------------------


def test_wrong_captions_are_of_pairs_that_are_not_on_the_sheet_and_one_is_of_the_same_kind():
    every = pairs(120)
    kind_of = {pair.caption: pair.kind for pair in every}
    questions = viewer.ask(every, 24, 1)
    shown = {q.pair.caption for q in questions}
    wrong = [option for q in questions for option in q.options if option != q.pair.caption]
    assert len(wrong) == len(set(wrong)) == 72 and not shown & set(wrong)  # nor is one used twice
    for q in questions:
        assert q.options[viewer.LETTERS.index(q.right)] == q.pair.caption and len(set(q.options)) == 4
    assert all([kind_of[option] for option in q.options].count(q.pair.kind) == 2 for q in questions)
    assert len({q.right for q in questions}) == 4 and [q.number for q in questions] == list(range(1, 25))


def test_the_same_seed_makes_the_same_sheet_and_another_one_another():
    every = pairs(60)
    assert viewer.ask(every, 12, 3) == viewer.ask(every, 12, 3)
    assert [q.pair.key for q in viewer.ask(every, 12, 3)] != [q.pair.key for q in viewer.ask(every, 12, 4)]


def test_captions_that_read_alike_are_never_offered_together():
    every = [Shown(str(i), f"Caption {i % 12}.", "bird", Image.new("L", (8, 8))) for i in range(60)]
    questions = viewer.ask(every, 6, 0)
    assert len({q.pair.caption for q in questions}) == 6 and all(len(set(q.options)) == 4 for q in questions)
    with pytest.raises(ValueError, match=r"60 pairs of 12 captions are too few for 10 pictures .*--viewer-n"):
        viewer.ask(every, 10, 0)


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path) -> tuple[Path, Path, list[viewer.Question]]:
    questions = viewer.ask(
        [*pairs(70), *(Shown("wide", f"A wide one {i}.", "sea", Image.new("RGB", (90, 30), "red")) for i in range(70))], 30, 5
    )
    viewer.write(questions, tmp_path / "shown", tmp_path / "keys" / "a.json", {"of": "generated", "seed": 5})
    return tmp_path / "shown", tmp_path / "keys" / "a.json", questions


def test_sheets_forms_and_page_are_there_and_the_key_is_apart(written):
    folder, key, questions = written
    assert {path.name for path in folder.iterdir()} == {
        "naming-1.png",
        "naming-2.png",
        "matching-1.png",
        "matching-2.png",
        "names.txt",
        "answers.txt",
        "page.html",
    }
    with Image.open(folder / "naming-1.png") as naming, Image.open(folder / "matching-1.png") as matching:
        assert naming.width == matching.width and matching.height > naming.height
    page = (folder / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert [picture["options"] for picture in data["pictures"]] == [list(q.options) for q in questions]
    assert set(data["pictures"][0]) == {"number", "picture", "options"} and not any(
        q.pair.key in page for q in questions if q.pair.key != "wide"
    )
    assert [row["right"] for row in json.loads(key.read_text())["pictures"]] == [q.right for q in questions]


def test_captions_on_a_sheet_are_whole():
    from tokun.render.grids import captioned_grid

    picture, long = Image.new("L", (64, 64)), "word " * 60
    one, two = (captioned_grid([picture], [[long] * n], cell=240) for n in (1, 2))
    assert two.height - one.height > captioned_grid([picture], [long], cell=240).height - captioned_grid([picture], [""], cell=240).height


def test_a_caption_cannot_leave_the_page_s_data():
    (question,) = viewer.ask(
        [Shown("a", "</script><b>", "", Image.new("L", (8, 8)))] + [Shown(str(i), f"caption {i}", "") for i in range(3)], 1, 0
    )
    assert "</script><b>" not in viewer.page([question], "t")


# --- scoring --------------------------------------------------------------------------------------------------------


def scored(key: Path, answers: str, tmp_path: Path, names: str | None = None, **options) -> dict[str, float]:
    (tmp_path / "answers.txt").write_text(answers, encoding="utf-8")
    letters, named = viewer_score.read_answers(tmp_path / "answers.txt")
    if names is not None:
        (tmp_path / "names.txt").write_text(names, encoding="utf-8")
        named = viewer_score.read_names(tmp_path / "names.txt")
    return {figure.name: figure for figure in viewer_score.score(viewer_score.read_key(key), letters, named, **options)}


WAYS = ["{n} {a}", "{n}: {A}", "{n}) ({a})", "{n},{a}", "No. {n} - {A}.", "{n}. {a})", "**{n}** {a}", "{n}\t{A}"]


@pytest.mark.parametrize("way", WAYS)
def test_answers_may_be_written_in_many_ways(written, way, tmp_path):
    _, key, questions = written
    text = "# my answers\n\n" + "\n".join(way.format(n=q.number, a=q.right, A=q.right.upper()) for q in questions)
    found = scored(key, text, tmp_path)
    assert (
        found["right caption of four"].value == 1 and found["right caption of four"].n == 30 and found["right caption of four"].low > 0.88
    )
    assert "skipped" in found["something nameable"].note


def test_the_page_s_table_has_letters_and_names(written, tmp_path):
    _, key, questions = written
    rows = [
        f'{q.number},{q.right if i else "abcd"["abcd".index(q.right) - 1]},"{"a bird, or so" if i < 6 else ""}"'
        for i, q in enumerate(questions)
    ]
    found = scored(key, "number,answer,name\n" + "\n".join(rows), tmp_path)
    for separator in (";", "\t"):  # as spreadsheets write it
        table = "number,answer,name\n" + "\n".join(rows)
        assert scored(key, table.replace(",", separator), tmp_path) == found
    assert found["right caption of four"].value == pytest.approx(29 / 30) and found["something nameable"].value == 0.2
    birds = [q for q in questions[:6] if q.pair.kind == "bird"]
    assert found["named in a word of the own caption"].value == pytest.approx(len(birds) / 30)
    kinds = {q.pair.kind for q in questions}
    assert {name for name in found if name.startswith("right, ")} == {f"right, {kind}" for kind in kinds}


def test_names_that_say_nothing_are_none(written, tmp_path):
    _, key, questions = written
    right = "\n".join(f"{q.number} {q.right}" for q in questions)
    lines = [f"{q.number}: {('', '-', '?', 'Nothing', 'none.', 'a ship')[q.number % 6]}" for q in questions]
    assert scored(key, right, tmp_path, "\n".join(lines))["something nameable"].value == pytest.approx(5 / 30)
    with pytest.raises(ValueError, match=r"1 of 30 pictures have no line of names: 30"):
        scored(key, right, tmp_path, "\n".join(lines[:-1]))


@pytest.mark.parametrize("change, error", [
    (lambda lines: lines[:-2], r"2 of 30 pictures have no answer: 29, 30\. Answer each"),
    (lambda lines: ["1:", *lines[1:]], r"1 of 30 pictures have no answer: 1\."),
    (lambda lines: ["1 e", *lines[1:]], r"1 e: the captions have the letters a to d"),
    (lambda lines: [*lines, "31 a"], r"no picture has the number 31; the key has 1 to 30"),
    (lambda lines: [*lines, "2 a", "2 b"], r"answers picture 2 twice"),
    (lambda lines: ["b", *lines[1:]], r"line 1: 'b' does not begin with a picture number"),
    (lambda lines: ["number answer", *lines], r"the header 'number answer' has no column `number`; write number,answer,name, separated by"),
    (lambda lines: ["1 a moth", *lines[1:]], r"line 1: 'a moth' is not a letter"),
])  # fmt: skip
def test_what_is_missing_or_wrong_is_named(written, change, error, tmp_path):
    _, key, questions = written
    with pytest.raises(ValueError, match=error):
        scored(key, "\n".join(change([f"{q.number} {q.right}" for q in questions])), tmp_path)


def test_missing_answers_may_count_as_wrong(written, tmp_path):
    _, key, questions = written
    found = scored(key, "\n".join(f"{q.number} {q.right}" for q in questions[:15]), tmp_path, missing_wrong=True)
    assert found["right caption of four"].value == 0.5 and "15 without an answer" in found["right caption of four"].note


def test_a_file_that_is_no_key_is_refused(tmp_path):
    (tmp_path / "key.json").write_text('{"pictures": [{"number": 1}]}')
    with pytest.raises(ValueError, match="is not the key of a viewer's sheet"):
        viewer_score.read_key(tmp_path / "key.json")
    with pytest.raises(FileNotFoundError, match="name the key"):
        viewer_score.read_key(tmp_path / "none.json")


def test_the_command_prints_the_table(written, tmp_path, capsys):
    _, key, questions = written
    (tmp_path / "answers.txt").write_text("\n".join(f"{q.number} a" for q in questions))
    viewer_score.main(["score", str(key), str(tmp_path / "answers.txt")])
    assert re.search(r"generated: right caption of four +\| \S+ +\| \S+ to \S+ +\| 30 ", capsys.readouterr().out)


# --- the room -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs("torchmetrics", reason="the extra eval is not installed")
def test_the_room_makes_sheets_of_every_source_and_goes_on_where_it_was(checkpoint_folder, toy_shards, tmp_path, monkeypatch):
    arguments = ["--checkpoint", str(checkpoint_folder), "--shards", str(toy_shards), "--only", "viewer", "--viewer-n", "3",
                 "--n-samples", "8", "--viewer-of", "generated,reconstructions,originals,prompted", "--seed", "2",
                 "--out", str(tmp_path)]  # fmt: skip
    evaluate.main(arguments)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["figures"]["viewer"]
    assert [figure["value"] for figure in figures] == [3, 3, 3, 3]
    keys = {path.stem: json.loads(path.read_text())["pictures"] for path in (tmp_path / "viewer-keys").iterdir()}
    assert (
        [row["key"] for row in keys["originals"]]
        == [row["key"] for row in keys["reconstructions"]]
        == [row["key"] for row in keys["prompted"]]
    )
    sheets = {name: np.asarray(Image.open(tmp_path / "viewer" / name / "naming-1.png")) for name in keys}
    assert not np.array_equal(sheets["originals"], sheets["reconstructions"]) and not np.array_equal(
        sheets["originals"], sheets["prompted"]
    )
    before = {path: path.read_bytes() for path in (tmp_path / "viewer").rglob("*.*")}
    monkeypatch.setattr("tokun.inference.model.Tokun.sample", lambda *a, **o: pytest.fail("all is drawn"))
    evaluate.main(arguments)
    assert before == {path: path.read_bytes() for path in (tmp_path / "viewer").rglob("*.*")}


def test_an_unknown_source_names_the_sources(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--shards", "x", "--out", "y", "--only", "viewer", "--viewer-of", "painted"])
    assert "--viewer-of painted: the sources are generated, reconstructions, originals, prompted" in capsys.readouterr().err

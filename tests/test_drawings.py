"""Promises of tokun/align/drawings.py and of sample.py --reward: drawings under a limit, chosen and judged."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.test_clip import tiny_clip
from tokun.align import drawings, rewards
from tokun.cli import sample
from tokun.config import RewardConfig

pytest.importorskip("resvg_py", reason="rendering back needs resvg_py (extra 'svg')")


def test_the_best_of_several_is_chosen_by_its_drawing(shaped_model, shaped_folder, tmp_path, capsys):
    common = ["--checkpoint", str(shaped_folder), "--prompt", "A disc.", "--n", "1", "--best-of", "3", "--svg", "--max-bytes", "900"]
    sample.main([*common, "--reward", "svg", "--out", str(tmp_path)])
    (line,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    (likeness,) = rewards.make([RewardConfig("svg", max_bytes=900)], shaped_model)
    scores = likeness(shaped_model.sample(42, 3, prompt="A disc."))
    assert line["index"] == max(range(3), key=lambda k: scores[k]) and (tmp_path / "000042-00.svg").stat().st_size <= 900
    for options, told in (
        (["--reward", "svg", "--clip", "x"], "--clip MODEL is the same as --reward clip=MODEL"),
        (["--reward", "sgv"], "kind is 'sgv'"),
    ):
        with pytest.raises((SystemExit, ValueError)) as error:
            sample.main([*common, *options, "--out", str(tmp_path)])
        assert told in str(error.value) + capsys.readouterr().err


def test_the_best_of_several_is_the_one_whose_words_the_model_is_surest_of(shaped_model, shaped_folder, tmp_path):
    sample.main(["--checkpoint", str(shaped_folder), "--n", "2", "--best-of", "4", "--reward", "likelihood", "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    candidates = shaped_model.sample(42, n=8)
    assert [line["index"] for line in lines] == [min(range(i, i + 4), key=lambda k: candidates[k].caption_nll) for i in (0, 4)]


def test_descriptions_are_drawn_judged_and_compared_and_taken_up_again(shaped_folder, checkpoint_folder, tmp_path, capsys):
    clip = tiny_clip(tmp_path / "clip")
    save_file({"weight": torch.ones(1, 16) / 16, "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    (tmp_path / "held-out.txt").write_text("A disc.\nA square.\n")
    (tmp_path / "again").symlink_to(shaped_folder)
    argv = [
        "--checkpoint",
        str(shaped_folder),
        "--against",
        str(tmp_path / "again"),
        "--descriptions",
        str(tmp_path / "held-out.txt"),
        "--best-of",
        "2",
    ]
    argv += ["--aesthetic", str(tmp_path / "head.safetensors"), "--clip", clip, "--max-bytes", "800", "--out", str(tmp_path / "report")]
    drawings.main(argv)
    found = json.loads((tmp_path / "report" / "figures.json").read_text())
    names = [figure["name"] for figure in found["figures"][str(shaped_folder)]]
    assert names == ["aesthetic", "likeness", "kilobytes"]
    assert all(figure["value"] == 0 for figure in found["figures"]["difference"])  # the same model
    svgs = sorted((tmp_path / "report" / "checkpoint").glob("*.svg"))
    assert len(svgs) == 2 and all(path.stat().st_size <= 800 for path in svgs)
    before = [path.stat().st_mtime_ns for path in svgs]
    drawings.main(argv)
    assert before == [path.stat().st_mtime_ns for path in svgs] and "| difference: likeness" in capsys.readouterr().out


def test_without_another_model_the_start_answers_about_both(tiny_model, checkpoint_folder, shaped_folder, tmp_path):
    asked = tmp_path / "asked.tsv"
    asked.write_text("description\tquestion\tanswer\nA disc.\tIs it round?\tyes\nA disc.\tIs it a ship?\tno\n")
    answering = dataclasses.replace(tiny_model, tasks=("joint", "text_to_image", "question"))
    answering.save(tmp_path / "answering")
    argv = ["--checkpoint", str(checkpoint_folder), "--descriptions", str(asked), "--vqa", "own", "--out", str(tmp_path / "report")]
    drawings.main([*argv, "--against", str(tmp_path / "answering")])
    found = json.loads((tmp_path / "report" / "figures.json").read_text())["scores"]
    assert all(0 < scores["right answers"][0] < 1 for scores in found.values()) and len(found) == 2
    (tmp_path / "silent").symlink_to(shaped_folder)
    with pytest.raises(ValueError, match="not trained on the task 'question'"):
        drawings.main([*argv[:-1], str(tmp_path / "refused"), "--against", str(tmp_path / "silent")])


def test_right_answers_and_beauty_make_one_score():
    class Sure:
        def yes(self, images, questions):
            return [0.9 if "disc" in question else 0.2 for question in questions]

    class Plain:
        def score(self, images):
            return [5.0]

    judges = object.__new__(drawings.Judges)
    judges.vqa, judges.aesthetic = Sure(), Plain()
    found = judges(None, drawings.Described("A disc.", (("Is it a disc?", "yes"), ("Is it a ship?", "no"))))
    assert found["right answers"] == pytest.approx(0.85) and found["aesthetic"] == 0.5
    assert found["F-beta"] == pytest.approx(1.25 * 0.85 * 0.5 / (0.25 * 0.85 + 0.5))


def test_a_question_without_an_answer_is_one_clear_line(tmp_path):
    path = tmp_path / "asked.tsv"
    path.write_text("description\tquestion\tanswer\nA disc.\tIs it round?\tyes\nA disc.\tIs it a ship?\tNo\nA star.\tIs it a star?\t\n")
    with pytest.raises(ValueError, match=r"asked.tsv, line 4: question 'Is it a star\?' has the answer ''; it must be yes or no"):
        drawings.read(str(path))
    path.write_text(path.read_text().replace("star?\t\n", "star?\tyes\n"))
    assert [(one.text, len(one.asked)) for one in drawings.read(str(path))] == [("A disc.", 2), ("A star.", 1)]
    path.write_text("description\tquestion\nA disc.\tIs it round?\n")
    with pytest.raises(ValueError, match="has no column answer"):
        drawings.read(str(path))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('"A disc.\tIs it round?\tyes', "line 3: a quote is not closed. Enclose the whole field in quotes"),
        ('"Disc" shown.\tIs it round?\tyes', "line 3: text follows a closing quote. Enclose"),
        ("A disc.\tyes", "line 3: 2 fields where the header has 3. Give every row all fields"),
        ("A disc.\tIs it \tround?\tyes", "line 3: 4 fields where the header has 3"),
        ("A caf\udce9.\tIs it round?\tyes", "is not UTF-8"),
    ],
)
def test_a_table_of_questions_that_is_broken_is_one_clear_line(row, told, tmp_path):
    path = tmp_path / "asked.tsv"
    head = 'description\tquestion\tanswer\n"A ""disc""."\tDoes it say "disc"?\tyes\n'
    path.write_text(head)
    assert [one.text for one in drawings.read(str(path))] == ['A "disc".']
    path.write_bytes((head + row + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(f"asked.tsv{', ' if told.startswith('line') else ' '}{told}")):
        drawings.read(str(path))

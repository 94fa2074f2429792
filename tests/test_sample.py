"""sample.py as people type it: files, promises, and clear words for mistakes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tokun.cli import sample
from tokun.inference import picture_files, prompt_tags
from tokun.inference.folders import BUNDLED
from tokun.inference.load import load
from tokun.utils import console
from tokun.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
needs_bundle = pytest.mark.skipif(not BUNDLED.is_dir(), reason="no checkpoint is bundled in this checkout")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_grid_single_pictures_and_a_record_of_every_sample_are_written(checkpoint_folder, tmp_path, capsys):
    sample.main(["--checkpoint", str(checkpoint_folder), "--seed", "7", "--n", "3", "--out", str(tmp_path)])
    found = records(tmp_path)
    assert [r["index"] for r in found] == [0, 1, 2] and all(r["seed"] == 7 and r["caption"].strip() for r in found)
    assert {"tags", "image_nll", "caption_nll", "pmi", "codes"} <= found[0].keys()
    for index in range(3):
        with Image.open(tmp_path / f"000007-{index:02d}.png") as picture:
            assert picture.size == (32, 32)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 150
    printed = capsys.readouterr().out
    assert all(r["caption"] in printed for r in found)


@pytest.mark.parametrize("batch_size", ["1", "3", "16"])
def test_the_first_of_many_are_the_few_for_any_batch_size(checkpoint_folder, tmp_path, batch_size):
    common = ["--checkpoint", str(checkpoint_folder), "--seed", "42"]
    sample.main([*common, "--n", "6", "--out", str(tmp_path / "many")])
    sample.main([*common, "--n", "4", "--batch-size", batch_size, "--out", str(tmp_path / "few")])
    keep = ("codes", "caption_ids", "caption", "tags")
    many, few = ([{k: r[k] for k in keep} for r in records(tmp_path / name)] for name in ("many", "few"))
    assert many[:4] == few


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--checkpoint", "no/such/folder/at/all"], "neither a local folder"),
        (["--style", "cubism"], "engraving"),
        (["--temperature", "-1"], "temperature"),
        (["--seed", "-3"], "seed"),
        (["--top-p", "0"], "top_p"),
        (["--prompt", "   "], "prompt"),
        (["--prompt", ""], "prompt"),
        (["--seed", str(2**70)], "seed"),
    ],
)
def test_a_mistake_is_named(checkpoint_folder, tmp_path, arguments, named):
    checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", str(checkpoint_folder)]
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        sample.main([*checkpoint, "--n", "1", "--out", str(tmp_path), *arguments])


@pytest.mark.parametrize("options", [[], ["--best-of", "2"]])
def test_the_tags_of_a_prompt_are_inferred_once_for_all_batches(checkpoint_folder, tmp_path, monkeypatch, options):
    asked, own = [], prompt_tags.likelihoods
    monkeypatch.setattr(prompt_tags, "likelihoods", lambda *given: asked.append(1) or own(*given))
    run(checkpoint_folder, tmp_path, "--prompt", "a tree", "--n", "3", "--batch-size", "1", *options)
    assert len(records(tmp_path)) == 3 and len(asked) == 1


@pytest.mark.slow
@needs_bundle
def test_the_bundled_model_gives_sixteen_captioned_pictures(tmp_path):
    """Single draws; .ci/run types the README's command, which chooses each pair among eight."""
    sample.main(["--seed", "42", "--n", "16", "--best-of", "1", "--out", str(tmp_path)])
    found = records(tmp_path)
    assert len(found) == 16 and all(r["caption"].strip() for r in found)


@pytest.mark.slow
@needs_bundle
def test_the_bundled_model_chooses_and_keeps_its_seed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "sample.py", "--seed", "42", "--n", "4", "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = records(tmp_path)
    model = load()
    assert model.defaults.best_of > 1 and len(found) == 4 and all(r["caption"].strip() for r in found)
    few = model.best_of(42, 3, model.defaults.best_of, batch_size=3)
    assert [p.codes for p in few] == [r["codes"] for r in found[:3]]
    assert [p.caption_ids for p in few] == [r["caption_ids"] for r in found[:3]]
    drawn = model.sample(42, indices=[r["index"] for r in found[:3]])
    assert [(p.codes, p.caption_ids) for p in drawn] == [(p.codes, p.caption_ids) for p in few], "a choice is a sample of its seed"


@needs_bundle
def test_the_bundle_is_small_and_holds_no_pickle():
    files = [p for p in BUNDLED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") <= 48 * 2**20
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert (BUNDLED / "README.md").is_file()


# --- the other directions -----------------------------------------------------------------------------------------------


def run(checkpoint_folder, out, *arguments):
    sample.main(["--checkpoint", str(checkpoint_folder), "--out", str(out), *arguments])


def test_words_are_printed_with_their_confidence_and_kept(checkpoint_folder, tmp_path, capsys):
    Image.effect_noise((40, 50), 60).save(tmp_path / "plate.png")
    run(checkpoint_folder, tmp_path, "--image", str(tmp_path / "plate.png"), "--registers", "plain, alt", "--n", "2")
    found = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [words["register"] for words in found] == ["plain", "plain", "alt", "alt"] and all(
        0 < words["confidence"] < 1 for words in found
    )
    printed = capsys.readouterr().out
    assert all(words["text"] in printed for words in found)
    run(checkpoint_folder, tmp_path, "--image", str(tmp_path / "plate.png"), "--question", "what is shown?")
    run(checkpoint_folder, tmp_path, "--rewrite", "a ship", "--register", "poetic")
    assert len((tmp_path / "words.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def folder_of_pictures(folder):
    (folder / "box 1").mkdir(parents=True)
    for number, name in enumerate(("b.png", "box 1/ä, c.tif", "a.JPG")):
        Image.effect_noise((40 + number, 50), 60).save(folder / name)
    (folder / "notes.txt").write_text("none")
    (folder / "broken.png").write_bytes(b"no picture")


def test_a_folder_of_pictures_gets_a_table_of_drafts_that_prepare_reads(checkpoint_folder, tmp_path, capsys):
    prepare = pytest.importorskip("data_tools.prepare", reason="pip install -e '.[data]'")
    folder_of_pictures(tmp_path / "scans")
    run(checkpoint_folder, tmp_path / "drafts", "--image", str(tmp_path / "scans"))
    with open(tmp_path / "drafts" / "captions.csv", encoding="utf-8-sig", newline="") as file:
        rows = {row["file_name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a.JPG", "b.png", "box 1/ä, c.tif"} and all(0 < float(row["confidence"]) < 1 for row in rows.values())
    assert "left out: broken.png: " in capsys.readouterr().out
    with Image.open(tmp_path / "drafts" / "page-001.png") as page:
        assert page.width > 3 * 224 and not (tmp_path / "drafts" / "page-002.png").exists()
    corrected = (tmp_path / "drafts" / "captions.csv").read_text(encoding="utf-8-sig").replace(rows["a.JPG"]["caption"], "By hand.", 1)
    (tmp_path / "drafts" / "captions.csv").write_text(corrected, encoding="utf-8-sig")
    run(checkpoint_folder, tmp_path / "drafts", "--image", str(tmp_path / "scans"))
    assert "By hand." in (tmp_path / "drafts" / "captions.csv").read_text(encoding="utf-8-sig"), "a second start keeps what was corrected"
    run(checkpoint_folder, tmp_path / "one", "--image", str(tmp_path / "scans" / "b.png"))
    one = json.loads((tmp_path / "one" / "words.jsonl").read_text(encoding="utf-8"))
    assert one["text"] == rows["b.png"]["caption"]  # as for the picture alone
    command = [str(tmp_path / "scans"), "--captions", str(tmp_path / "drafts" / "captions.csv"), "--out", str(tmp_path / "shards")]
    prepare.main([*command, "--style", "engraving", "--no-clean", "--min-side", "8", "--workers", "1", "--allow-missing-captions"])
    assert "pairs written                                          3" in capsys.readouterr().out


def test_drafts_of_a_killed_run_are_kept_and_questions_are_asked_of_several_pictures(checkpoint_folder, tmp_path, monkeypatch, capsys):
    folder_of_pictures(tmp_path / "scans")
    names = [str(tmp_path / "scans" / name) for name in ("a.JPG", "b.png")]
    run(checkpoint_folder, tmp_path / "whole", "--image", *names, "--registers", "plain,alt")
    seen, say = [], sample.say

    def killed(model, args, picture=None):
        seen.append(picture.size)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return say(model, args, picture)

    monkeypatch.setattr(sample, "say", killed)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_folder, tmp_path / "killed", "--image", *names, "--registers", "plain,alt")
    run(checkpoint_folder, tmp_path / "killed", "--image", *names, "--registers", "plain,alt")
    assert seen == [(42, 50), (40, 50), (40, 50)]
    texts = [(tmp_path / name / "words.jsonl").read_text(encoding="utf-8") for name in ("whole", "killed")]
    assert texts[0] == texts[1] and [json.loads(line)["register"] for line in texts[0].splitlines()] == ["plain", "alt"] * 2
    run(checkpoint_folder, tmp_path / "asked", "--image", *names, "--question", "what is shown?")
    assert not (tmp_path / "asked" / "captions.csv").exists()
    with pytest.raises(UserError, match="no-such does not exist"):
        run(checkpoint_folder, tmp_path / "asked", "--image", *names, str(tmp_path / "no-such"))
    with pytest.raises(UserError, match="is the folder of the pictures"):
        run(checkpoint_folder, tmp_path / "scans", "--image", str(tmp_path / "scans"))
    with pytest.raises(UserError, match="holds no picture"):
        run(checkpoint_folder, tmp_path / "asked", "--image", str(tmp_path / "asked" / ".." / "asked"), "--out", str(tmp_path / "none"))


def test_completion_interpolation_variation_and_choice_write_pairs(checkpoint_folder, tmp_path):
    Image.effect_noise((40, 50), 60).save(tmp_path / "plate.png")
    plate = str(tmp_path / "plate.png")
    run(checkpoint_folder, tmp_path / "a", "--complete", plate, "--keep", "0,0,1,0.5", "--n", "2")
    run(checkpoint_folder, tmp_path / "b", "--invert", plate, "--caption", "a ship", "--vary", "0.2", "--n", "2")
    run(checkpoint_folder, tmp_path / "c", "--best-of", "2", "--n", "2")
    run(checkpoint_folder, tmp_path / "d", "--interpolate", "1", "2", "--steps", "4", "--svg", "--max-bytes", "3000")
    assert [path.stat().st_size <= 3000 for path in (tmp_path / "d").glob("*.svg")] == [True] * 4
    assert [len(records(tmp_path / name)) for name in "abcd"] == [2, 2, 2, 4]
    assert records(tmp_path / "a")[0]["codes"][:8] == records(tmp_path / "a")[1]["codes"][:8]
    with Image.open(tmp_path / "d" / "strip.png") as strip, Image.open(tmp_path / "d" / "interpolation.gif") as moving:
        assert strip.size == (4 * 32, 32) and moving.n_frames == 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--question", "what?"], "--image"), (["--invert", "a.png"], "--caption"), (["--keep", "0,1"], "four numbers"),
        (["--image", "a.png", "--rewrite", "b"], "not allowed with"), (["--clip", "a:b", "--best-of", "1"], "--best-of"),
        (["--video"], "--interpolate"),
        (["--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--image", "a.png", "--prompt", "a ship"], "--prompt has no effect with --image"),
        (["--image", "a.png", "--temperature", "0.5"], "--temperature has no effect"),
        (["--image", "a.png", "--question", "what?", "--registers", "alt"], "--registers has no effect with --question"),
        (["--complete", "a.png", "--guidance-scale", "3"], "--guidance-scale has no effect with --complete"),
        (["--complete", "a.png", "--n", "1001"], "the limit is 1,000"),
        (["--invert", "a.png", "--caption", "a", "--top-p", "0.5"], "--top-p has no effect with --invert"),
        (["--interpolate", "1", "2", "--n", "4"], "--steps the number"),
        (["--best-of", "2", "--shard-size", "2"], "--shard-size has no effect with --best-of"),
        (["--vary", "7"], "--vary has no effect here"), (["--steps", "3"], "--steps has no effect"),
        (["--max-bytes", "3000"], "add --svg"), (["--steps", "12"], "--steps has no effect"),
        (["--interpolate", "1", "2", "--seed", "42"], "leave out --seed"),
        (["--image", "a.png", "--registers", "alt", "--register", "plain"], "leave out --register"),
        (["--svg", "--max-bytes", "10"], "is too small"), (["--svg", "--shard-size", "5"], "--svg has no effect on shards"),
        (["--wandb", "--shard-size", "5"], "--wandb has no effect on shards"), (["--n", "²"], "whole number"),
        (["--seed", "1.5"], "--seed"), (["--seed", ""], "--seed"), (["--interpolate", "1", "x"], "--interpolate"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_told(capsys, arguments, named):
    with pytest.raises(SystemExit):
        sample.parse(arguments)
    assert named in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_status_130(capsys, monkeypatch):
    monkeypatch.delenv("TOKUN_TRACEBACK", raising=False)

    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        console.run("sample.py", work)
    said = capsys.readouterr().err
    assert ended.value.code == 130 and said.strip().count("\n") == 0 and "stopped by Ctrl-C" in said
    monkeypatch.setenv("TOKUN_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        console.run("sample.py", work)


def test_a_shorter_run_leaves_no_picture_of_the_longer_one_before_and_nothing_else_is_touched(checkpoint_folder, tmp_path):
    run(checkpoint_folder, tmp_path, "--seed", "7", "--n", "3")
    (tmp_path / "000007-99.png").write_bytes(b"of the user")
    (tmp_path / "notes.txt").write_text("mine")
    run(checkpoint_folder, tmp_path, "--seed", "8", "--n", "1")
    there = ["000007-99.png", "000008-00.png", "earlier", "grid.png", "notes.txt", "samples.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    kept = ["000007-00.png", "000007-01.png", "000007-02.png", "grid.png", "samples.jsonl"]
    assert sorted(path.name for path in (tmp_path / "earlier" / "1").iterdir()) == kept
    run(checkpoint_folder, tmp_path, "--interpolate", "8", "9", "--steps", "3")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"steps-8-000009-00.png", "steps-8-000009-02.png", "strip.png", "interpolation.gif"} <= names and "000008-00.png" not in names, (
        "a step is no sample of a seed"
    )
    run(checkpoint_folder, tmp_path, "--seed", "8", "--n", "1")
    assert not {"strip.png", "interpolation.gif"} & {path.name for path in tmp_path.iterdir()}
    assert {"strip.png", "interpolation.gif", "steps-8-000009-01.png"} <= {path.name for path in (tmp_path / "earlier" / "3").iterdir()}


def test_a_print_of_the_run_before_can_be_completed_twice(checkpoint_folder, tmp_path):
    """The run that completes it must not move it away: sheet.png shows it, and the same command is typed again."""
    run(checkpoint_folder, tmp_path, "--seed", "7", "--n", "2")
    plate = tmp_path / "000007-00.png"
    for _ in range(2):
        run(checkpoint_folder, tmp_path, "--complete", str(plate), "--keep", "top", "--n", "1")
        assert plate.is_file() and (tmp_path / "sheet.png").is_file()
    assert sorted(path.name for path in (tmp_path / "earlier" / "1").glob("*.png")) == ["000007-00.png", "000007-01.png", "grid.png"]
    assert not (tmp_path / "earlier" / "2").exists()


def test_a_completion_completed_again_under_its_own_name_is_kept(checkpoint_folder, tmp_path):
    run(checkpoint_folder, tmp_path, "--seed", "7", "--n", "1")
    run(checkpoint_folder, tmp_path, "--seed", "7", "--complete", str(tmp_path / "000007-00.png"), "--keep", "top", "--n", "1")
    made = tmp_path / "completed-000007-00.png"
    before = made.read_bytes()
    run(checkpoint_folder, tmp_path, "--seed", "7", "--complete", str(made), "--keep", "left", "--n", "1")
    assert [path.read_bytes() for path in (tmp_path / "earlier").rglob(made.name)] == [before]


def test_a_list_of_before_that_names_files_elsewhere_removes_none(checkpoint_folder, tmp_path):
    (tmp_path / "keep.png").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    for line in ('{"file_name": "../keep.png"}', '{"seed": "../", "index": 1}', "[1]", '{"seed": 7, "index": 1, "file_name": "grid.jpg"}'):
        (out / "samples.jsonl").write_text(line + "\n")
        picture_files.put_aside(out)
    assert (tmp_path / "keep.png").exists()
    (out / "000007-01.png").write_bytes(b"x")
    (out / "samples.jsonl").write_text('{"seed": 7, "index": 1}\n')  # as earlier versions wrote it
    moved = picture_files.put_aside(out)
    assert not (out / "000007-01.png").exists() and (moved / "000007-01.png").exists()

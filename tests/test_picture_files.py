"""Promises of tokun/inference/picture_files.py: samples as single pictures, whatever their number.

A stop loses one batch, and the same command goes on."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.kills import kills
from tokun.cli import sample
from tokun.inference import picture_files
from tokun.render import scale


@dataclass
class Drawn:
    """As much of a pair as is written."""

    index: int
    seed: int = 3

    @property
    def image(self):
        return Image.new("L", (8, 8), self.index % 256)

    @property
    def caption(self):
        return f"A ship {self.index}."

    def record(self):
        return {"seed": self.seed, "index": self.index, "caption": self.caption, "pmi": 1.0}


def draw(indices):
    return [Drawn(index) for index in indices]


def files(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def write(out, n, *, drawing=draw, **asked):
    out.mkdir(exist_ok=True)
    picture_files.write(drawing, n, out, asked, batch_size=4)


def test_more_than_a_thousand_samples_are_single_pictures_unless_shards_are_asked_for(tmp_path, monkeypatch, capsys):
    """More than 1,000 switched to shards unasked."""
    model = SimpleNamespace(
        plan=lambda **options: None, draw=lambda seed, indices, plan: draw(indices), defaults=SimpleNamespace(best_of=1)
    )
    monkeypatch.setattr(sample.tokun, "load", lambda *arguments, **options: model)
    monkeypatch.setattr(sample.bulk, "identity", lambda model: {})
    sample.main(["--seed", "3", "--n", "1003", "--batch-size", "500", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert len(list(tmp_path.glob("000003-*.png"))) == 1003 and not list(tmp_path.glob("*.tar"))
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1003
    assert "--shard-size 1000" in said and "3 more in" in said and "1003 pairs in" in said


def test_a_stop_loses_the_batch_that_was_being_drawn_and_no_other(tmp_path):
    asked = []

    def until(indices):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(indices)
        return draw(indices)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", 18, drawing=until)
    assert asked == [range(0, 4), range(4, 8), range(8, 12)]
    (tmp_path / "out" / "000003-05.png").unlink()  # one of a finished batch is gone: that batch is drawn again
    asked.clear()
    again = []
    write(tmp_path / "out", 18, drawing=lambda indices: again.append(indices) or draw(indices))
    assert again == [range(4, 8), range(12, 16), range(16, 18)]
    write(tmp_path / "whole", 18)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_killed_at_every_change_of_the_disk_and_typed_again_it_ends_with_the_same_bytes(tmp_path):
    """Over the pictures of an earlier, longer run: none may be left among the new ones, none lost."""
    write(tmp_path / "before", 9, other=1)
    write(tmp_path / "whole", 6)
    out, times = tmp_path / "out", 0
    shutil.copytree(tmp_path / "before", out)
    for _ in kills(lambda: write(out, 6), out):
        write(out, 6)
        assert files(out) == files(tmp_path / "whole")
        assert files(out / "earlier" / "1") == files(tmp_path / "before") and len(list((out / "earlier").iterdir())) == 1
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        times += 1
    assert times > 20


def test_the_same_run_again_replaces_its_own_files_and_another_leaves_them_in_a_folder_of_their_own(tmp_path, capsys):
    """A second command replaced the pictures of the first without a word."""
    write(tmp_path, 6)
    first = files(tmp_path)
    write(tmp_path, 6)
    assert files(tmp_path) == first and not (tmp_path / "earlier").exists() and not capsys.readouterr().out
    for number, n in enumerate((4, 3), start=1):
        write(tmp_path, n, drawing=lambda indices: [Drawn(index, seed=9) for index in indices])
        assert capsys.readouterr().out == f"the pictures that were in {tmp_path} are now in {tmp_path / 'earlier' / str(number)}\n"
    assert files(tmp_path / "earlier" / "1") == first and len(files(tmp_path / "earlier" / "2")) == 6


def test_a_batch_begun_again_by_the_same_run_loses_no_picture_of_the_finished_one(tmp_path):
    """Killed in the second, equal run, the pictures of the first went as those of an unfinished batch, though its list has them."""
    write(tmp_path / "before", 6)
    out, times = tmp_path / "out", 0
    shutil.copytree(tmp_path / "before", out)
    for _ in kills(lambda: write(out, 6), out):
        write(out, 3, other=1)
        listed = [json.loads(line)["file_name"] for line in (out / "earlier/1/samples.jsonl").read_text().splitlines()]
        assert listed and {path.name for path in (out / "earlier/1").glob("*.png")} >= {*listed}
        assert len(list(out.glob("000003-*.png"))) == 3
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        times += 1
    assert times > 20


def interpolate(out, n, first):
    out.mkdir(exist_ok=True)
    asked = SimpleNamespace(out=out, complete=None, invert=None, interpolate=(first, first + 1), svg=False, video=False, wandb=False)
    sample.write_pairs([Drawn(index, seed=first) for index in range(n)], asked, scale.NOT)


def test_steps_of_an_interpolation_that_was_killed_do_not_stay_beside_those_of_the_next(tmp_path):
    """No list had them yet, so the next run took them for a user's own files."""
    out, times = tmp_path / "out", 0
    for _ in kills(lambda: interpolate(out, 4, 1), out):
        out.mkdir(exist_ok=True)
        interpolate(out, 2, 5)
        assert sorted(path.name for path in out.glob("steps-*.png")) == ["steps-5-000006-00.png", "steps-5-000006-01.png"]
        assert len(records(out)) == 2 and not (out / ".samples").exists()
        shutil.rmtree(out)
        out.mkdir()
        times += 1
    assert times > 6


def records(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_a_caption_with_a_line_separator_hides_no_picture(tmp_path, monkeypatch, capsys):
    """U+2028 ends a line for Python's splitlines: the record fell in two, the picture stayed beside the next run's list.

    Its batch was drawn again."""
    monkeypatch.setattr(Drawn, "caption", property(lambda self: f"A ship\u2028and \x85 a mill, {self.index}."))
    write(tmp_path, 6)
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000003-00.png", "000003-01.png", "000003-02.png", "grid.png"]
    assert len(list((tmp_path / "earlier/1").glob("000003-*.png"))) == 6
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "b", 8, drawing=lambda indices: draw(indices) if indices[0] < 4 else (_ for _ in ()).throw(KeyboardInterrupt))
    drawn = []
    write(tmp_path / "b", 8, drawing=lambda indices: drawn.extend(indices) or draw(indices))
    assert drawn == [4, 5, 6, 7]


def test_the_finished_batches_of_a_run_that_was_stopped_are_kept_with_their_list(tmp_path):
    def stopped(indices):
        if indices.start:
            raise KeyboardInterrupt
        return draw(indices)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 12, drawing=stopped)
    write(tmp_path, 2)
    kept = tmp_path / "earlier" / "1"
    assert sorted(files(kept)) == [*(f"000003-{k:02d}.png" for k in range(4)), "samples.jsonl"]
    assert [json.loads(line)["index"] for line in (kept / "samples.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert len(files(tmp_path)) == 4


def test_what_is_refused_removes_nothing_of_the_run_before(tmp_path):
    write(tmp_path, 4)
    before = files(tmp_path)

    def refused(indices):
        raise ValueError("style 'nonsense' is unknown")

    with pytest.raises(ValueError, match="nonsense"):
        write(tmp_path, 4, drawing=refused, other=1)
    assert files(tmp_path) == before


def test_many_pictures_of_an_unfinished_run_are_not_thrown_away_for_another(tmp_path, monkeypatch):
    """A day of sampling, Ctrl-C, and one letter of the command typed otherwise."""
    monkeypatch.setattr(picture_files, "MANY", 7)
    for before, kept in ((8, True), (4, False)):

        def stopped(indices, before=before):
            if indices.start >= before:
                raise KeyboardInterrupt
            return draw(indices)

        out = tmp_path / str(before)
        with pytest.raises(KeyboardInterrupt):
            write(out, 12, drawing=stopped, top_p=0.9)
        if kept:
            with pytest.raises(ValueError, match=r"top_p: 0\.9 there, 0\.8 here.*--out"):
                write(out, 12, top_p=0.8)
            assert len(list(out.glob("*.png"))) == 8
        else:
            write(out, 12, top_p=0.8)


def test_the_best_of_a_later_batch_are_those_of_a_long_run(tiny_model):
    whole = tiny_model.best_of(5, 3, 2)
    assert tiny_model.best_of(5, 1, 2, first=2) == whole[2:]


def test_a_picture_of_a_batch_that_was_never_finished_goes_with_the_next_run(tmp_path):
    (tmp_path / ".samples").mkdir()
    (tmp_path / ".samples" / "asked.json").write_text("{}")
    (tmp_path / ".samples" / "0000000000.begun").write_text(json.dumps({"seed": 9, "index": 1, "file_name": "000009-01.png"}) + "\n")
    (tmp_path / "000009-01.png").write_bytes(b"half a pict")
    write(tmp_path, 1)
    assert sorted(files(tmp_path)) == ["000003-00.png", "grid.png", "samples.jsonl"]

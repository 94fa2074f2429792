"""Promises of tokun/utils/checkpoint.py."""

import itertools
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.kills import dies
from tokun.utils import checkpoint
from tokun.utils.checkpoint import (
    BestCheckpoints,
    TrainerStates,
    Writer,
    read_record,
    recover_directory,
    require_same,
    snapshot,
    whole_directory,
    write_record,
)


def put(folder, text):
    with whole_directory(folder) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "file").write_text(text)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_directory_is_replaced_whole(tmp_path):
    put(tmp_path / "deep" / "a", "old")
    put(tmp_path / "deep" / "a", "new")
    assert contents(tmp_path) == {"deep/a/sub/file": "new"}


def test_a_block_that_raises_leaves_the_old_directory(tmp_path):
    put(tmp_path / "a", "old")
    with pytest.raises(KeyError), whole_directory(tmp_path / "a") as aside:
        (aside / "half").write_text("half")
        raise KeyError
    assert contents(tmp_path / "a") == {"sub/file": "old"}
    put(tmp_path / "a", "new")  # and what it left aside does not get into the next
    assert contents(tmp_path) == {"a/sub/file": "new"}


def test_killed_before_any_change_of_the_disk_and_again_the_folder_is_the_old_or_the_new(tmp_path):
    for first in itertools.count():
        for second in itertools.count():
            put(tmp_path / "a", "old")
            (tmp_path / "a.old").mkdir()  # a user's own
            fell = [dies(partial(put, tmp_path / "a", text), tmp_path, change) for text, change in (("new", first), ("newer", second))]
            recover_directory(tmp_path / "a")
            assert contents(tmp_path / "a") in ({"sub/file": text} for text in ("old", "new", "newer")) and (tmp_path / "a.old").is_dir()
            if not fell[1]:
                assert contents(tmp_path / "a") == {"sub/file": "newer"}
                break
            shutil.rmtree(tmp_path)
        if not fell[0]:
            break
        shutil.rmtree(tmp_path)
    assert first > 5


def test_recovering_changes_nothing_where_nothing_was_lost(tmp_path):
    recover_directory(tmp_path / "a")
    put(tmp_path / "a", "new")
    put(tmp_path / ".a.old", "old")
    recover_directory(tmp_path / "a")
    assert contents(tmp_path / "a") == {"sub/file": "new"}


def test_processes_that_ask_at_once_whether_a_folder_can_be_written_do_not_get_in_each_others_way(tmp_path, monkeypatch):
    names, write = set(), Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: names.add(path.name) or write(path, content))
    for pid in (7, 8):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        checkpoint.require_writable(tmp_path)
    assert len(names) == 2, "each has a file of its own"
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: len(content))  # another took it away
    checkpoint.require_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_require_same_names_every_difference(tmp_path):
    made = {"train": {"lr": 1, "steps": 5}, "seed": 0}
    require_same(tmp_path, made, {"seed": 0, "train": {"steps": 5, "lr": 1}})
    with pytest.raises(ValueError) as error:
        require_same(tmp_path / "x", made, {"train": {"lr": 2, "steps": 5}, "grid": [4, 4]})
    for words in ("train.lr: 1 there, 2 here", "seed: 0 there, None here", "grid: None there, [4, 4] here", str(tmp_path / "x"), "delete"):
        assert words in str(error.value)
    assert "steps" not in str(error.value)
    with pytest.raises(ValueError, match="and 4 more"):
        require_same(tmp_path, {str(i): i for i in range(10)}, {})


def test_the_last_states_are_kept(tmp_path):
    states = TrainerStates(tmp_path / "state", keep=2)
    assert states.steps() == [] and states.latest() is None
    for step in (500, 20, 1000):
        put(states.path(step), str(step))
    (tmp_path / "state" / "step-00002000.partial").mkdir()  # a run was killed while it wrote this
    assert states.steps() == [20, 500, 1000] and states.latest() == 1000
    states.prune()
    assert states.steps() == [500, 1000]
    TrainerStates(tmp_path / "state", keep=0).prune()  # one is always left
    assert states.steps() == [1000]
    states.clear()
    assert states.steps() == []


def test_a_record_comes_back_and_a_broken_one_counts_as_none(tmp_path):
    path = tmp_path / "new" / "stage.json"
    assert read_record(path) is None
    write_record(path, {"b": [1, 2.5], "a": {"é": None}})
    assert read_record(path) == {"b": [1, 2.5], "a": {"é": None}}
    assert [p.name for p in path.parent.iterdir()] == ["stage.json"]
    path.write_text('{"a": ')
    assert read_record(path) is None


def test_shards_are_told_apart_by_name_and_size(tmp_path):
    for name, size in (("a", 3), ("b", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    paths = [tmp_path / "a", tmp_path / "b"]
    before = checkpoint.files_fingerprint(paths)
    assert before == checkpoint.files_fingerprint(paths) != checkpoint.files_fingerprint(paths[:1])
    (tmp_path / "b").write_bytes(b"x" * 5)
    assert before != checkpoint.files_fingerprint(paths)


def test_a_snapshot_stays_what_it_was_and_keeps_ties(tmp_path):
    weight = torch.arange(4.0)
    tree = {"model": {"head": weight, "embedding": weight, "rows": weight[:2]}, "steps": [torch.tensor(3), ("a", 1.5)]}
    copy = snapshot(tree)
    torch.save(copy, tmp_path / "state.pt")
    weight.zero_()
    for state in (copy, torch.load(tmp_path / "state.pt", weights_only=True)):
        assert state["model"]["head"].tolist() == [0, 1, 2, 3] and state["model"]["rows"].tolist() == [0, 1]
        assert state["steps"] == [torch.tensor(3), ("a", 1.5)]
    assert copy["model"]["head"] is copy["model"]["embedding"]


def test_what_is_written_beside_the_training_shows_when_it_is_whole_and_in_order(tmp_path):
    go, said, done = threading.Event(), [], []
    writer = Writer(said.append)

    def slow(folder):
        (folder / "file").write_text("half")
        assert go.wait(10)
        (folder / "file").write_text("whole")

    writer.put(tmp_path / "a", slow, lambda: done.append("a"))
    assert not (tmp_path / "a").exists() and not done  # the training goes on meanwhile
    go.set()
    writer.put(tmp_path / "b", lambda folder: (folder / "file").write_text("next"), lambda: done.append(contents(tmp_path)))
    assert contents(tmp_path / "a") == {"file": "whole"}  # the second waited for the first
    writer.wait()
    assert done == ["a", {"a/file": "whole", "b/file": "next"}] and not said
    writer.close()


def test_a_write_that_fails_beside_the_training_is_told_and_the_next_one_is_made(tmp_path):
    said: list[str] = []
    writer = Writer(said.append)

    def full(folder):
        (folder / "file").write_text("half")
        raise OSError(28, "No space left on device")

    writer.put(tmp_path / "a", full, lambda: None)
    writer.put(tmp_path / "b", lambda folder: (folder / "file").write_text("b"), lambda: None)
    writer.wait()
    assert len(said) == 1 and "No space left" in said[0] and "will try again" in said[0]
    assert contents(tmp_path) == {"b/file": "b"}
    writer.put(tmp_path / "c", lambda folder: folder / 1, lambda: None)
    with pytest.raises(TypeError):  # our own mistakes do not pass as a full disk
        writer.wait()


def test_the_best_are_kept_whatever_the_order_and_none_that_is_not_a_number(tmp_path):
    best = BestCheckpoints(tmp_path / "best", keep=2)
    for step, loss in [(10, 3.0), (20, 2.0), (30, float("nan")), (40, 2.5), (50, 2.0), (60, 9.0)]:
        wanted = best.wants(step, loss)
        assert wanted == (step in (10, 20, 40, 50))
        if wanted:
            with best.put(step, loss, {"seed": 0}) as folder:
                (folder / "weights").write_text(str(step))
    assert [(r["step"], r["loss"], r["settings"]) for r in best.records()] == [(20, 2.0, {"seed": 0}), (50, 2.0, {"seed": 0})]
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["step-00000020", "step-00000050"]
    assert best.wants(20, 2.0)  # a resumed run comes by again, and writes the same
    assert not BestCheckpoints(tmp_path / "none", keep=0).wants(1, 0.0)


def test_other_shards_are_said_in_words_and_other_settings_by_their_values(tmp_path):
    made, asked = {"shards": "0" * 16, "lr": 1.0, "fingerprint": "a"}, {"shards": "1" * 16, "lr": 2.0, "fingerprint": "b"}
    with pytest.raises(ValueError, match=r"fingerprint: 'a' there, 'b' here; lr: 1.0 there, 2.0 here; shards: the files are not those"):
        checkpoint.require_same(tmp_path, made, asked)

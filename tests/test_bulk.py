"""Promises of tokun/inference/bulk.py: many samples in shards, the same bytes for any number of processes and interruptions."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.kills import kills
from tests.small_runs import start_fork
from tokun.cli import sample
from tokun.inference import bulk

pq = pytest.importorskip("pyarrow.parquet", reason="the table needs the extra 'data'")


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    return bulk.generate(tiny_model, 5, 70, tmp_path_factory.mktemp("many") / "out", {"batch_size": 16}, shard_size=20)


def test_shards_and_table_hold_the_samples_of_the_seed(tiny_model, whole):
    assert list(files(whole)) == [
        "samples-00000.tar",
        "samples-00001.tar",
        "samples-00002.tar",
        "samples-00003.tar",
        "samples.json",
        "samples.parquet",
    ]
    pairs = tiny_model.sample(5, indices=[0, 25, 69])
    table = pq.read_table(whole / "samples.parquet").to_pylist()
    assert [row["index"] for row in table] == list(range(70)) and pq.ParquetFile(whole / "samples.parquet").num_row_groups == 4
    for pair in pairs:
        row = table[pair.index]
        assert (row["caption"], row["style"], row["shard"]) == (pair.caption, pair.tags.style, f"samples-{pair.index // 20:05d}.tar")
        with tarfile.open(whole / row["shard"]) as tar:
            record = json.load(tar.extractfile(f"000005-{pair.index:07d}.json"))
            image = Image.open(tar.extractfile(f"000005-{pair.index:07d}.png"))
            assert record == json.loads(json.dumps(pair.record())) and np.array_equal(np.asarray(image), np.asarray(pair.image))


def test_the_files_do_not_depend_on_processes_or_interruptions(tiny_model, whole, tmp_path):
    for rank in (1, 0):
        bulk.generate(tiny_model, 5, 70, tmp_path / "shared", {"batch_size": 16}, shard_size=20, rank=rank, world=2)
    assert files(tmp_path / "shared") == files(whole)
    (tmp_path / "shared" / "samples-00002.tar").unlink()
    (tmp_path / "shared" / "samples-00003.tar.partial").write_bytes(b"half")
    (tmp_path / "shared" / "samples.parquet").unlink()
    bulk.generate(tiny_model, 5, 70, tmp_path / "shared", {"batch_size": 16}, shard_size=20)
    (tmp_path / "shared" / "samples-00003.tar.partial").unlink()
    assert files(tmp_path / "shared") == files(whole)


def test_a_record_of_an_earlier_version_without_a_batch_size_is_gone_on_with(tiny_model, whole, tmp_path):
    bulk.generate(tiny_model, 5, 20, tmp_path / "out", {}, shard_size=20)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record.pop("batch_size") == 16
    (tmp_path / "out" / "samples.json").write_text(json.dumps(record))
    bulk.generate(tiny_model, 5, 20, tmp_path / "out", {}, shard_size=20)


@pytest.mark.parametrize(
    ("seed", "n", "options", "named"),
    [(5, 70, {"style": "nonsense"}, "<style:nonsense>"), (-1, 70, {}, "seed is -1"), (5, 70, {"temperature": 1e39}, "temperature"),
     (5, 70, {"prompt": " "}, "holds no text"),
     (5, 10**20, {}, "n is 1000")],
)  # fmt: skip
def test_what_is_refused_leaves_nothing_that_stands_in_the_way(tiny_model, tmp_path, seed, n, options, named):
    with pytest.raises(ValueError, match=named):
        bulk.generate(tiny_model, seed, n, tmp_path / "out", options, shard_size=20)
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_named_with_the_way_out(tiny_model, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "samples.parquet").unlink()
    shard = tmp_path / "out" / "samples-00001.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"samples-00001\.tar is damaged .* delete it"):
        bulk.generate(tiny_model, 5, 70, tmp_path / "out", {}, shard_size=20)
    shard.unlink()
    bulk.generate(tiny_model, 5, 70, tmp_path / "out", {}, shard_size=20)
    assert files(tmp_path / "out") == files(whole)


def test_other_samples_are_not_mixed_in(tiny_model, whole):
    before = files(whole)
    for seed, n, options, named in (
        (6, 70, {}, "seed"),
        (5, 71, {}, "n: 70"),
        (5, 70, {"temperature": 0.5}, "temperature"),
        (5, 70, {"batch_size": 7}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=named):
            bulk.generate(tiny_model, seed, n, whole, options, shard_size=20)
    colder = copy.copy(tiny_model)
    colder.defaults = replace(tiny_model.defaults, text_temperature=0.1)  # the checkpoint's own settings draw them too
    with pytest.raises(ValueError, match="text_temperature"):
        bulk.generate(colder, 5, 70, whole, {}, shard_size=20)
    assert files(whole) == before
    (whole / "samples.json").rename(whole / "aside.json")
    with pytest.raises(ValueError, match=r"without a complete samples\.json"):
        bulk.generate(tiny_model, 5, 70, whole, {}, shard_size=20)
    (whole / "aside.json").rename(whole / "samples.json")


def test_compiled_samples_are_not_mixed_with_plain_ones(tiny_model, whole, monkeypatch):
    other = not bulk.decoder.is_compiled(tiny_model.generator)
    monkeypatch.setattr(bulk.decoder, "is_compiled", lambda generator: other)
    with pytest.raises(ValueError, match="compiled: None there, 'native' here" if other else "compiled: 'native' there, None here"):
        bulk.generate(tiny_model, 5, 70, whole, {"batch_size": 16}, shard_size=20)


def test_killed_and_typed_again_the_command_ends_with_the_same_files(checkpoint_folder, tmp_path):
    def command(out: str) -> list[str]:
        return [
            "--checkpoint",
            str(checkpoint_folder),
            "--seed",
            "3",
            "--n",
            "50",
            "--shard-size",
            "20",
            "--out",
            str(tmp_path / out),
            "--batch-size",
            "20",
        ]

    first = start_fork(tmp_path / "said.txt", sample.main, command("killed"), WORLD_SIZE="1")
    while first.is_alive() and not (tmp_path / "killed" / "samples-00000.tar").exists():
        time.sleep(0.01)
    first.kill()
    first.join()
    for name in ("killed", "whole"):
        sample.main(command(name))
    for path in (tmp_path / "killed").glob("*.partial*"):
        path.unlink()
    assert files(tmp_path / "killed") == files(tmp_path / "whole") and len(files(tmp_path / "whole")) == 5


def test_a_stop_within_a_shard_loses_the_batch_that_was_being_drawn_and_no_other(tiny_model, whole, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a shard of a thousand: what was drawn of it is there when the same command is typed again."""
    drawn, stop, draw_once = [], 3, type(tiny_model).draw

    def draw_until(model, seed, indices, plan):
        if len(drawn) == stop:
            raise KeyboardInterrupt
        drawn.append(indices)
        return draw_once(model, seed, indices, plan)

    monkeypatch.setattr(type(tiny_model), "draw", draw_until)
    with pytest.raises(KeyboardInterrupt):
        bulk.generate(tiny_model, 5, 70, tmp_path / "out", {"batch_size": 16}, shard_size=70)
    assert drawn == [range(0, 16), range(16, 32), range(32, 48)]
    part = next((tmp_path / "out" / ".samples-00000").glob("*16.tar"))
    part.write_bytes(part.read_bytes()[:700])  # one is damaged: it is drawn again
    drawn.clear()
    stop = 100
    bulk.generate(tiny_model, 5, 70, tmp_path / "out", {"batch_size": 16}, shard_size=70)
    assert drawn == [range(16, 32), range(48, 64), range(64, 70)]
    assert list(files(tmp_path / "out")) == ["samples-00000.tar", "samples.json", "samples.parquet"]
    drawn.clear()
    bulk.generate(tiny_model, 5, 70, tmp_path / "fresh", {"batch_size": 16}, shard_size=70)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_killed_at_every_change_of_the_disk_and_typed_again_it_ends_with_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    """With the folder's lock and the batches of an unfinished shard in place."""
    pairs = tiny_model.sample(5, 4)
    monkeypatch.setattr(type(tiny_model), "draw", lambda model, seed, indices, plan: [pairs[i] for i in indices])
    monkeypatch.setattr(bulk, "identity", lambda model: {})

    def generate(out: Path) -> None:
        bulk.generate(tiny_model, 5, 4, out, {"batch_size": 1}, shard_size=2)

    generate(tmp_path / "whole")
    out, times = tmp_path / "out", 0
    for _ in kills(lambda: generate(out), out):
        generate(out)
        assert files(out) == files(tmp_path / "whole")
        shutil.rmtree(out)
        times += 1
    assert times > 20

"""Tracking: what is logged can be read back, a resumed run stays one run, and a failing tracker ends nothing."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps

from tokun.render.grids import captioned_grid
from tokun.training import tracking
from tokun.training.tracking import NullTracker, Tracker, make_tracker

CAPTIONS = ["A fox in the snow.", "", "Ünïcødé “quotes”, 日本語, 😀\nand a second line", "x" * 1000]
SHAPES = (32, 32), (32, 32), (24, 32), (32, 16)  # a model draws several
IMAGES = [Image.new("L", shape, shade) for shape, shade in zip(SHAPES, (10, 90, 170, 250), strict=True)]
GRID = captioned_grid(IMAGES, CAPTIONS)
CONFIG = {"seed": 7, "model": {"width": 64}, "out": Path("somewhere")}


# ---------------------------------------------------------------------------------------------------- W&B


def records_of(wandb_file: Path):
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB, chunked records)."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = wandb_file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)  # checksum, length, 1 whole 2 first 3 middle 4 last
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_offline_run(run_dir: Path) -> dict:
    """{"id", "history": [row], "images": {name: [(step, path, caption)]}} of one `offline-run-*` folder."""
    run_id, history, images = None, [], {}
    for record in records_of(next(run_dir.glob("*.wandb"))):
        if record.HasField("run"):
            run_id = record.run.run_id
        if not record.HasField("history"):
            continue
        row = {}
        for item in record.history.item:
            place = row
            *parents, last = list(item.nested_key) or [item.key]
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = json.loads(item.value_json)
        history.append(row)
        for name, value in row.items():
            if not isinstance(value, dict):
                continue
            several = value["_type"] == "images/separated"
            paths = value["filenames"] if several else [value["path"]]
            captions = value["captions"] if several else [value["caption"]]
            images.setdefault(name, []).extend(
                (row["step"], run_dir / "files" / path, caption) for path, caption in zip(paths, captions, strict=True)
            )
    return {"id": run_id, "history": history, "images": images}


def assert_same_pixels(path: Path, expected: Image.Image) -> None:
    with Image.open(path) as image:
        assert image.size == expected.size
        assert image.convert(expected.mode).tobytes() == expected.tobytes()


def log_a_training(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log({"train/loss": 5 - step / 8, "learning_rate": torch.tensor(0.5**step)}, step=step)
    tracker.log_grid("samples", GRID, IMAGES, CAPTIONS, step=steps[-1])
    tracker.log_image("reconstructions", IMAGES[0], step=steps[-1], caption="left: original \ud800\x00")
    tracker.finish()


@pytest.fixture(scope="module")
def offline_runs(tmp_path_factory):
    """A run of steps 0..4 that is stopped and resumed from step 3: both folders, oldest first, and what was printed."""
    pytest.importorskip("wandb")
    directory = tmp_path_factory.mktemp("runs") / "a" / "b"
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import test_tracking as t\n"
        "for steps in (range(5), range(3, 7)):\n"
        "    tracker = t.make_tracker('wandb', project='p', name='n', directory=Path(sys.argv[2]), config=t.CONFIG)\n"
        "    t.log_a_training(tracker, steps)\n"
        "    time.sleep(1.1)\n"  # W&B names a folder by the second
    )
    # a process of its own: W&B keeps its service, its console capture and its exit hooks as long as the process lives
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", script, str(Path(__file__).parent), str(directory)],
        env={**tracking.os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    folders = sorted((directory / "wandb").glob("offline-run-*"))
    return SimpleNamespace(directory=directory, output=done.stdout, errors=done.stderr, runs=[read_offline_run(f) for f in folders])


def test_wandb_offline_keeps_every_number_under_its_step(offline_runs):
    first, second = offline_runs.runs
    for run, steps in ((first, range(5)), (second, range(3, 7))):
        rows = [row for row in run["history"] if "train/loss" in row]
        assert [row["step"] for row in rows] == list(steps)
        assert [row["train/loss"] for row in rows] == [5 - step / 8 for step in steps]
        assert [row["learning_rate"] for row in rows] == [0.5**step for step in steps]


def test_wandb_offline_keeps_the_grid_and_each_picture_with_its_exact_caption(offline_runs):
    images = offline_runs.runs[0]["images"]
    [(step, path, listing)] = images["samples"]
    assert step == 4
    assert_same_pixels(path, GRID)
    assert listing == "\n".join(f"{k}. {caption}" for k, caption in enumerate(CAPTIONS, start=1))
    assert [caption for _, _, caption in images["samples/pairs"]] == CAPTIONS
    for original, (_, path, _) in zip(IMAGES, images["samples/pairs"], strict=True):
        left, top = (32 - original.width) // 2, (32 - original.height) // 2
        assert_same_pixels(path, ImageOps.expand(original, (left, top, left, top), 255))
    assert "do not match" not in offline_runs.errors, "W&B distorts pictures of a list that differ in shape"
    assert images["reconstructions"][0][2] == "left: original \ufffd\ufffd"


def test_a_resumed_run_is_the_same_wandb_run(offline_runs):
    first, second = offline_runs.runs
    assert first["id"] == second["id"] == (offline_runs.directory / "wandb_id.txt").read_text().strip()
    assert [path.name for path in offline_runs.directory.iterdir() if path.name.endswith("tmp")] == []


def test_wandb_says_in_one_line_where_the_run_is_and_how_to_upload_it(offline_runs):
    lines = offline_runs.output.splitlines()
    assert len(lines) == 2, "one for each start"
    for line in lines:
        assert "offline (WANDB_MODE=offline)" in line
        pattern = line.split("wandb sync ")[1]
        assert len(list(Path("/").glob(pattern.lstrip("/")))) == 2


class FakeWandb:
    """As much of W&B as decides where a run goes; `online` is what a start online raises."""

    class errors:
        class Error(Exception): ...

    def __init__(self, key=False, online=None, configured="online"):
        self.key, self.online, self.configured, self.started, self.logged = key, online, configured, [], []
        self.Settings = SimpleNamespace

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode=self.configured))

    def login(self, prompt):
        assert prompt is False
        if isinstance(self.key, Exception):
            raise self.key
        return self.key

    def teardown(self): ...

    def init(self, *, mode, id, dir, **_):
        self.started.append((mode, id))
        if mode == "online" and self.online:
            raise self.online
        run = SimpleNamespace(dir=f"{dir}/wandb/x/files", url="https://x", define_metric=lambda *_, **__: None)
        run.log, run.finish = self.logged.append, lambda: None
        return run


@pytest.fixture
def start(monkeypatch, tmp_path):
    def start(fake, mode=None, **options):
        monkeypatch.setattr(tracking, "need", lambda *_, **__: fake)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        return make_tracker("wandb", project="p", name=None, directory=tmp_path, config={}, **options)

    return start


@pytest.mark.parametrize(
    ("fake", "wandb_mode", "modes"),
    [
        (FakeWandb(key=True), None, ["online"]),
        (FakeWandb(key=False), None, ["offline"]),
        (FakeWandb(key=FakeWandb.errors.Error("too short")), None, ["offline"]),
        (FakeWandb(key=True), "offline", ["offline"]),
        (FakeWandb(key=True), "disabled", ["disabled"]),
        (FakeWandb(key=False), "online", ["offline"]),
        (FakeWandb(key=True, configured="offline"), None, ["offline"]),
        (FakeWandb(key=True, configured="offline"), "online", ["online"]),
        (FakeWandb(key=True, online=FakeWandb.errors.Error("no route")), None, ["online", "offline"]),
    ],
)
def test_wandb_goes_online_with_a_key_and_never_asks_for_one(start, capsys, fake, wandb_mode, modes):
    start(fake, wandb_mode)
    assert [mode for mode, _ in fake.started] == modes
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_id_from_a_checkpoint_goes_before_the_one_in_the_directory(start):
    fake = FakeWandb()
    first = start(fake).run_id
    assert start(fake).run_id == first
    assert start(fake, resume_id="given").run_id == "given"
    assert start(fake).run_id == "given"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FakeWandb.errors.Error("lost")])
def test_a_tracker_that_fails_is_counted_and_warned_about_once(start, capsys, error):
    tracker = start(FakeWandb())

    def fail(*_):
        raise error

    tracker._run.log = tracker._run.finish = fail
    with pytest.warns(RuntimeWarning, match="metrics of step 1") as caught:
        tracker.log({"loss": 1.0}, step=1)
        tracker.log({"loss": 1.0}, step=2)
        tracker.finish()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert tracker.failures == 3
    assert "3 calls failed" in capsys.readouterr().out


def test_a_mistake_of_the_caller_is_not_taken_for_a_failing_tracker(start):
    tracker = start(FakeWandb())
    with pytest.raises(ValueError, match="could not convert"):
        tracker.log({"loss": "high"}, step=1)
    with pytest.raises(ValueError, match="4 pictures but 1 captions"):
        tracker.log_grid("samples", GRID, IMAGES, ["one"], step=1)
    assert tracker.failures == 0


# ---------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_keeps_numbers_pictures_and_exact_captions_and_a_resumed_run_is_one_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(5), range(3, 7)):
        log_a_training(make_tracker("tensorboard", project="p", name="n", directory=tmp_path, config=CONFIG), steps)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(7))
    assert [event.value for event in events.Scalars("learning_rate")] == [0.5**step for step in range(7)]
    grid = events.Images("samples")[-1]
    assert (grid.step, grid.width, grid.height) == (6, *GRID.size)
    for k, caption in enumerate(CAPTIONS):
        assert events.Images(f"samples/pairs/{k:02d}")[-1].width == IMAGES[k].width
        if caption:
            text = events.Tensors(f"samples/pairs/{k:02d}/text_summary")[-1].tensor_proto.string_val[0]
            assert text.decode() == caption
    assert '"seed": 7' in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()


# ---------------------------------------------------------------------------------------------------- all


def test_null_tracker_takes_everything_and_writes_nothing(tmp_path):
    for kind, main_process in (("none", True), ("wandb", False), ("tensorboard", False)):
        directory = tmp_path / "runs"
        tracker = make_tracker(kind, project="p", name=None, directory=directory, config=CONFIG, main_process=main_process)
        assert isinstance(tracker, NullTracker)
        log_a_training(tracker, range(3))
        assert not directory.exists() and tracker.failures == 0


def test_an_unknown_kind_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match="'mlflow': choose one of wandb, tensorboard, none"):
        make_tracker("mlflow", project="p", name=None, directory=tmp_path, config={}, main_process=False)


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_missing_package_names_its_extra(monkeypatch, tmp_path, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ImportError, match=r"\[train\]"):
        make_tracker(kind, project="p", name=None, directory=tmp_path, config={})

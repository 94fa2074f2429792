"""One run at a time in a folder: the second is refused and told who holds it, a kill lets go, a child that outlives its parent does not hold on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kills import kills
from tokun.utils import lock

ROOT = Path(__file__).resolve().parents[1]
HOLD = "import sys, time; from pathlib import Path; from tokun.utils import lock; lock.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
FORK = "import os, sys, time; from pathlib import Path; from tokun.utils import lock; lock.hold(Path(sys.argv[1])); os.fork() or time.sleep(20); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    started = []

    def start(code=HOLD):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_process_is_told_who_holds_the_folder_and_a_kill_lets_go(tmp_path, holder):
    process = holder()
    with (
        pytest.raises(lock.InUse, match=rf"in use by process {process.pid} on \S+ since \d{{4}}-.* \(.*choose another folder with --out"),
        lock.alone_in(tmp_path, option="--out"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.alone_in(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_child_that_was_forked_does_not_hold_the_folder_when_its_parent_is_killed(tmp_path, holder):
    process = holder(FORK)
    process.kill()
    process.wait()
    with lock.alone_in(tmp_path):
        pass


def test_a_process_may_hold_a_folder_several_times(tmp_path):
    with lock.alone_in(tmp_path), lock.alone_in(tmp_path / "." / "x" / ".."):
        assert (tmp_path / lock.NAME).is_file()
    assert not (tmp_path / lock.NAME).exists()


def test_a_folder_made_for_the_lock_alone_goes_with_it(tmp_path):
    with lock.alone_in(tmp_path / "made"):
        assert (tmp_path / "made" / lock.NAME).is_file()
    assert not (tmp_path / "made").exists()
    with lock.alone_in(tmp_path / "used"):
        (tmp_path / "used" / "file").write_text("")
    (tmp_path / "there").mkdir()
    with lock.alone_in(tmp_path / "there"):
        pass
    assert (tmp_path / "used" / "file").is_file() and (tmp_path / "there").is_dir()


def test_what_another_host_left_is_told(tmp_path, capsys):
    (tmp_path / lock.NAME).write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "then", "command": "train.py"}))
    with lock.alone_in(tmp_path):
        pass
    assert "process 7 on elsewhere" in capsys.readouterr().err
    (tmp_path / lock.NAME).write_text("half a rec")  # of a kill while it was written
    with lock.alone_in(tmp_path):
        pass


def test_without_flock_the_file_is_the_lock_and_a_process_that_is_gone_lets_go(tmp_path, monkeypatch, holder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = lock._myself()
    monkeypatch.setattr(lock, "fcntl", None)
    for pid, host, word in ((os.getppid(), mine["host"], "delete"), (gone.pid, "elsewhere", "delete")):
        (tmp_path / lock.NAME).write_text(json.dumps({**mine, "pid": pid, "host": host}))
        with pytest.raises(lock.InUse, match=rf"process {pid} on {host}.*{word}"):
            lock.hold(tmp_path)
    (tmp_path / lock.NAME).write_text(json.dumps({**mine, "pid": gone.pid}))
    with lock.alone_in(tmp_path):
        pass


def test_a_kill_at_any_change_of_the_disk_leaves_a_folder_that_can_be_held(tmp_path):
    for _ in kills(lambda: lock.let_go(lock.hold(tmp_path)), below=tmp_path):
        start = time.monotonic()
        with lock.alone_in(tmp_path):
            pass
        assert time.monotonic() - start < 1

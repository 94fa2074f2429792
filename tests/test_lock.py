"""One run at a time in a folder: the second is refused and told who holds it, a kill lets go, and no orphan holds on."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from tests.kills import kills
from tests.small_runs import write_config
from tokun.cli import train
from tokun.inference import bulk
from tokun.utils import console, lock
from tokun.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HOLD = (
    "import sys, time; from pathlib import Path; from tokun.utils import lock; lock.hold(Path(sys.argv[1])); print('held', flush=True); "
    "time.sleep(60)"
)
FORK = (
    "import os, sys, time; from pathlib import Path; from tokun.utils import lock; lock.hold(Path(sys.argv[1])); os.fork() or "
    "time.sleep(20); print('held', flush=True); time.sleep(60)"
)


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
    mine = {name: value for name, value in lock.this_process().items() if name != "started"}  # as earlier versions wrote it
    monkeypatch.setattr(lock, "fcntl", None)
    for pid, host, word in ((os.getppid(), mine["host"], "delete"), (gone.pid, "elsewhere", "delete")):
        (tmp_path / lock.NAME).write_text(json.dumps({**mine, "pid": pid, "host": host}))
        with pytest.raises(lock.InUse, match=rf"process {pid} on {host}.*{word}"):
            lock.hold(tmp_path)
    (tmp_path / lock.NAME).write_text(json.dumps({**mine, "pid": gone.pid}))
    with lock.alone_in(tmp_path):
        pass


def test_a_kill_at_any_change_of_the_disk_leaves_a_folder_that_can_be_held(tmp_path):
    for _ in kills(lambda: lock.release(lock.hold(tmp_path)), below=tmp_path):
        start = time.monotonic()
        with lock.alone_in(tmp_path):
            pass
        assert time.monotonic() - start < 1


RANK = (
    "import sys, time; from pathlib import Path; from tokun.utils import lock; lock.hold(Path(sys.argv[1]), rank=int(sys.argv[2])); "
    "print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def process_of(tmp_path):
    started = []

    def start(job, rank):
        env = os.environ | {"MASTER_ADDR": "here", "MASTER_PORT": str(job)}
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        started.append(process)
        return process.stdout.readline() == "held\n", process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_processes_of_one_job_share_a_folder_and_those_of_another_are_refused(tmp_path, process_of, monkeypatch):
    monkeypatch.setattr(lock, "WAIT", 0.2)
    assert process_of(1, 0)[0] and process_of(1, 1)[0]
    for rank in (0, 1):
        held, refused = process_of(2, rank)
        assert not held and "is in use by process" in refused.stderr.read()
    with pytest.raises(lock.InUse, match="is in use by process"):
        lock.hold(tmp_path)


def test_a_job_is_refused_while_a_late_process_of_another_is_still_at_work(tmp_path, process_of, monkeypatch):
    """The first process of the other has ended, its second still writes."""
    monkeypatch.setattr(lock, "WAIT", 0.2)
    held, late = process_of(1, 1)
    assert held
    with pytest.raises(lock.InUse, match=rf"in use by process {late.pid}"):
        lock.hold(tmp_path)
    assert not (tmp_path / lock.NAME).exists(), "what is refused holds nothing"
    late.kill()
    late.wait()
    with lock.alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir()), "nor is anything left of a process that was killed"


def test_a_lock_that_is_held_for_a_moment_by_nobody_known_is_waited_for(tmp_path):
    """Another process of the job asks who holds the file that this one has made and not locked yet."""
    with open(tmp_path / f"{lock.NAME}-1", "w") as asked:
        fcntl.flock(asked, fcntl.LOCK_EX)
        ends = threading.Timer(0.3, fcntl.flock, (asked, fcntl.LOCK_UN))
        ends.start()
        with lock.alone_in(tmp_path, rank=1):
            assert not ends.is_alive()
        ends.join()


START = """
import fcntl, os, random, sys, time
from pathlib import Path
from tokun.utils import lock
flock = fcntl.flock
def slow(*args):
    time.sleep(random.random() / 500)
    flock(*args)
    time.sleep(random.random() / 500)
fcntl.flock = slow
go = os.pipe()
children = []
for rank in range(4):
    if not (child := os.fork()):
        os.close(go[1])
        os.read(go[0], 1)
        random.seed(rank)
        for number in range(30):
            lock.release(lock.hold(Path(sys.argv[1]), rank=rank))
        os._exit(0)
    children.append(child)
os.close(go[1])
sys.exit(sum(os.waitpid(child, 0)[1] for child in children) > 0)
"""


def test_four_processes_of_one_job_that_start_at_once_all_hold_the_folder(tmp_path):
    job = os.environ | {"MASTER_ADDR": "here", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-c", START, str(tmp_path)], cwd=ROOT, env=job, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_told_with_the_option_for_another(tmp_path, monkeypatch, number):
    """A disk mounted read-only, a share of somebody else's: the lock's own path and an errno were all that was said."""

    def refused(*arguments):
        raise OSError(number, os.strerror(number), arguments[0])

    monkeypatch.setattr(lock.os, "open", refused)
    with pytest.raises(UserError, match=r"cannot be written \(.*\): choose another folder with --out"):
        lock.hold(tmp_path, option="--out")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{", json.dumps({"pid": 10**20, "host": socket.gethostname()}).encode()])
def test_a_lock_file_that_says_nothing_is_held_by_nobody(tmp_path, monkeypatch, content):
    """An empty file of a full disk, one cut short, one of another tool."""
    for flock in (lock.fcntl, None):
        monkeypatch.setattr(lock, "fcntl", flock)
        (tmp_path / lock.NAME).write_bytes(content)
        with lock.alone_in(tmp_path):
            assert json.loads((tmp_path / lock.NAME).read_bytes())["pid"] == os.getpid()


def test_a_folder_reached_by_a_link_or_another_spelling_is_the_same_folder(tmp_path, holder):
    holder()
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    for name in (link, f"{tmp_path}/./", tmp_path / "not-there" / ".."):
        with pytest.raises(lock.InUse, match="in use by process"):
            lock.hold(Path(name))


def test_a_file_of_the_users_whose_name_begins_like_a_lock_stays(tmp_path):
    names = (".lockfile", ".lock-old", ".lock-1x")
    for name in names:
        (tmp_path / name).write_text("")
    with lock.alone_in(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("command", ["prepare", "caption", "caption --from", "questions", "encode", "sample", "train"])
def test_every_command_that_writes_a_folder_is_refused_while_another_process_holds_it(command, tmp_path, process_of, capsys, tiny_model):
    """Two downloads into one folder, two trainings with one output, two captioners of the same shards: each half wrote over the other."""
    from data_tools import caption, encode, prepare, questions, toy

    shards, table = tmp_path.with_name(f"{tmp_path.name}-shards"), tmp_path.with_name(f"{tmp_path.name}.tsv")
    toy.write_shards(shards, 4, 0, 32, "train")
    with tarfile.open(shards / "train-00000.tar") as tar:
        key = tar.getnames()[0].partition(".")[0]
    table.write_text(f"key\tcaption\n{key}\tA ship.\n")
    assert process_of(1, 0)[0]
    before = sorted(tmp_path.rglob("*"))
    out, config = ["--out", str(tmp_path)], write_config(shards, shards)
    done = {
        "prepare": lambda: prepare.main([str(shards), *out, "--style", "toy", "--workers", "1"]),
        "caption": lambda: caption.main([str(shards), *out]),
        "caption --from": lambda: caption.main([str(shards), *out, "--from", str(table)]),
        "questions": lambda: questions.main([str(shards), *out]),
        "encode": lambda: console.status("encode", lambda: encode.main(["--config", str(config), f"out={tmp_path}", "data.val="])),
        "train": lambda: console.status("train", lambda: train.main(["--config", str(config), f"out={tmp_path}"])),
        "sample": lambda: console.status("sample", lambda: bulk.generate(tiny_model, 1, 4, tmp_path, {}, shard_size=2)),
    }[command]()
    assert done == 2 and f"{tmp_path} is in use by process" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_without_flock_a_pid_that_was_given_to_another_process_since_does_not_hold_the_folder(tmp_path, monkeypatch, holder):
    """A lock file left by a crash, and months later some other program has that number."""
    alive = holder("import time; print('held', flush=True); time.sleep(60)")
    monkeypatch.setattr(lock, "fcntl", None)
    here = {**lock.this_process(), "pid": alive.pid}
    (tmp_path / lock.NAME).write_text(json.dumps({**here, "started": lock._started(alive.pid)}))
    with pytest.raises(lock.InUse, match=rf"process {alive.pid} on"):
        lock.hold(tmp_path)
    (tmp_path / lock.NAME).write_text(json.dumps({**here, "started": "1"}))
    with lock.alone_in(tmp_path):
        pass
    (tmp_path / lock.NAME).write_text(json.dumps({**here, "pid": os.getpid(), "machine": "a container of the same name"}))
    with pytest.raises(lock.InUse, match="delete"):
        lock.hold(tmp_path)

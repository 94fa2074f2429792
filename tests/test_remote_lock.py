"""Two processes with one --out in object storage: the second is refused and told who holds it; a killed one's is taken over by a rule."""

import json
import time

import pytest

from data_tools import prepare
from data_tools.pipeline import remote_lock
from data_tools.pipeline.storage_backends import open_store
from tests.test_prepare import picture
from tokun.utils import lock

pytest.importorskip("fsspec")


@pytest.fixture
def store(request):
    found = open_store(f"memory://{request.node.name.partition('[')[0]}/out")
    found.remove(lock.NAME)
    return found


def leave(store, **holder):
    store.write(lock.NAME, json.dumps({**lock.this_process(), "id": "other", "renewed": time.time(), **holder}).encode())


def test_the_second_process_is_told_who_holds_the_folder_and_nothing_is_left_of_the_first(store):
    with remote_lock.alone_in(store) as still_ours:
        still_ours()
        assert json.loads(store.read(lock.NAME))["command"]
        with (
            pytest.raises(lock.InUse, match=r"memory://.*/out is in use by process \d+ on \S+ since .*--out.*5 minutes.*delete memory://"),
            remote_lock.alone_in(store),
        ):
            pass
    assert not store.exists(lock.NAME)


@pytest.mark.parametrize(
    ("left", "taken"),
    [
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "renewed": time.time() - 3600}, True),
        ({"started": "1"}, True),  # of this machine, and another process has its pid now
        ({"host": "elsewhere", "renewed": None}, True),
    ],
)
def test_a_lock_is_taken_over_when_its_holder_is_gone_or_no_longer_renews_it(store, left, taken, monkeypatch):
    """A spot instance that was taken away in the middle of a run."""
    monkeypatch.setattr(remote_lock, "SETTLE", 0)
    leave(store, **{"pid": 1, **left})
    if taken:
        with remote_lock.alone_in(store):
            pass
        return
    with pytest.raises(lock.InUse, match="process 1 on elsewhere"), remote_lock.alone_in(store):
        pass
    assert store.exists(lock.NAME), "what is refused removes no lock of another"


def test_a_lock_is_renewed_and_one_that_was_taken_meanwhile_is_told_before_anything_is_published(store, monkeypatch):
    monkeypatch.setattr(remote_lock, "RENEW", 0.01)
    with remote_lock.alone_in(store) as still_ours:
        first = json.loads(store.read(lock.NAME))["renewed"]
        end = time.monotonic() + 10
        while json.loads(store.read(lock.NAME))["renewed"] == first and time.monotonic() < end:
            time.sleep(0.01)
        assert json.loads(store.read(lock.NAME))["renewed"] > first
        monkeypatch.setattr(remote_lock, "stamped", lambda own: json.dumps({"id": "other"}).encode())
        leave(store, pid=7, host="elsewhere")
        with pytest.raises(lock.InUse, match="taken over"):
            still_ours()
    assert store.exists(lock.NAME), "it is the other's"


def test_where_objects_cannot_be_created_exclusively_the_later_of_two_is_refused(store, monkeypatch):
    monkeypatch.setattr(remote_lock, "SETTLE", 0)
    monkeypatch.setattr(type(store.files()), "pipe_file", pipe_without_mode(type(store.files()).pipe_file))
    with remote_lock.alone_in(store):
        assert store.exists(lock.NAME)
    monkeypatch.setattr(remote_lock.time, "sleep", lambda seconds: leave(store, pid=7, host="elsewhere"))  # the other writes meanwhile
    with pytest.raises(lock.InUse, match="process 7 on elsewhere"), remote_lock.alone_in(store):
        pass


def pipe_without_mode(pipe):
    return lambda self, path, value: pipe(self, path, value)


def test_prepare_with_an_address_is_refused_while_another_writes_there(store, tmp_path, capsys):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A wolf.")
    leave(store, pid=7, host="elsewhere")
    command = [str(tmp_path), "--out", store.place, "--style", "engraving", "--workers", "1", "--no-clean", "--val", "0"]
    assert prepare.main(command) == 2 and "in use by process 7 on elsewhere" in capsys.readouterr().err
    store.remove(lock.NAME)
    assert prepare.main(command) == 0 and "train-00000.tar" in store.list() and lock.NAME not in store.list()

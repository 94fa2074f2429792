"""Promises of data_tools/pipeline/storage_backends.py, the same for a folder and for object storage."""

from __future__ import annotations

import pytest

from data_tools.pipeline.storage_backends import Store, is_url, open_store


@pytest.fixture(params=["folder", "file://", "memory://"])
def store(request, tmp_path) -> Store:
    if request.param == "folder":
        return open_store(tmp_path / "out")
    fsspec = pytest.importorskip("fsspec")
    if request.param == "memory://":
        fsspec.filesystem("memory").store.clear()
        return open_store("memory://bucket/out")
    return open_store(f"file://{tmp_path}/out")


def test_what_is_written_is_read_listed_moved_and_removed(store):
    assert store.list() == [] and not store.exists("a.tar")
    store.write("a.tar", b"0123456789")
    store.write("aside/b.json", b"{}")
    store.write("aside/b.json", b"[1]")
    assert store.read("a.tar") == b"0123456789" and store.read_parts("a.tar", [(3, 4), (0, 2), (9, 0)]) == [b"3456", b"01", b""]
    assert store.read("aside/b.json") == b"[1]" and store.list() == ["a.tar", "aside"] and store.list("aside") == ["b.json"]
    store.move("aside/b.json", "c.json")
    assert store.list("aside") == [] and store.read("c.json") == b"[1]"
    store.write("aside/d/e.json", b"1")
    store.remove("aside")
    store.remove("not there")
    assert store.exists("c.json") and not store.exists("aside/d/e.json")
    with pytest.raises(FileNotFoundError):
        store.read("aside/d/e.json")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.write("a.json", b"old")

    def disk_is_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        store.write("a.json", b"new")
    assert store.read("a.json") == b"old" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_addresses_are_told_from_paths():
    assert is_url("s3://bucket/x") and is_url("file:///x") and not is_url("C:/x") and not is_url("a/b")


def test_what_cannot_be_read_raises_whether_the_storage_raises_it_or_hands_it_over(store, monkeypatch):
    store.write("a.tar", b"0123456789")
    with pytest.raises(FileNotFoundError):
        store.read_parts("b.tar", [(0, 1)])
    if hasattr(store, "files"):
        monkeypatch.setattr(type(store.files()), "cat_ranges", lambda *_, **__: [b"0", ConnectionError("gone")])
        with pytest.raises(ConnectionError):
            store.read_parts("a.tar", [(0, 1), (1, 1)])

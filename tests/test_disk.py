"""Promises of data_tools/pipeline/disk.py, each beside the list or dict that it stands for."""

from __future__ import annotations

import pickle
import random
import tracemalloc

import pytest

from data_tools.pipeline.disk import MANY, DiskDict, DiskList


def test_a_list_on_disk_is_that_list():
    items = [(number, f"item {number}") for number in range(2 * MANY + 7)]
    there = DiskList(iter(items))
    assert there == items and items == there and there == DiskList(items) and there != items[:-1] and there != "items"
    assert len(there) == len(items) and there[-1] == items[-1] and there[3:9:2] == items[3:9:2]
    assert list(there.part(5, MANY + 9)) == items[5 : MANY + 9] and list(there.part(9, 5)) == []
    assert pickle.loads(pickle.dumps(there)) == items
    there.append("one more")
    assert there[len(items)] == "one more"
    with pytest.raises(IndexError, match="of 2008 items"):
        there[2008]


def test_a_dict_on_disk_is_that_dict_in_the_order_of_its_keys():
    items = {f"{number}/a\udcff b.jpg": number for number in range(2 * MANY + 7)} | {"é": -1, "\ud800": -2, "\U0001f43a": -3}
    names = random.Random(0).sample(list(items), len(items))
    there = DiskDict((name, items[name]) for name in names)
    assert there == items and list(there) == sorted(items) and list(there.ordered()) == [items[name] for name in sorted(items)]
    assert list(there.pairs("12/")) == [("12/a\udcff b.jpg", 12)] and list(there.pairs("no")) == []
    assert pickle.loads(pickle.dumps(there)) == items
    assert there.setdefault("é", 5) == -1 and there.get("none") is None and "none" not in there
    del there["é"]
    with pytest.raises(KeyError):
        del there["é"]


def test_a_dict_may_be_written_to_while_it_is_read():
    there = DiskDict((f"{number:05d}", number) for number in range(3 * MANY))
    for name, value in there.pairs():
        there[name] = -value
    assert list(there.ordered()) == [-number for number in range(3 * MANY)]


def test_memory_does_not_grow_with_the_items():
    tracemalloc.start()
    there = DiskList(f"item {number}" for number in range(20 * MANY))
    named = DiskDict((item, item) for item in there)
    assert sum(map(len, there)) == sum(map(len, named.ordered()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # the items alone are 1.2 MB

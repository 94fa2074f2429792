"""Promises of tokun/utils/task_engine.py, with real processes and a real Ray cluster of two nodes."""

from __future__ import annotations

import os

import pytest

from tokun.utils.task_engine import WorkerDied, open_engine


def square(number: int) -> int:
    return number * number


def exit_hard(number: int) -> int:
    os._exit(1)


def complain(number: int) -> int:
    raise ValueError(f"task {number} is wrong")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_run_once_and_named_by_its_number(workers):
    with open_engine("local", workers=workers) as engine:
        assert sorted(engine.run(square, range(20))) == [(number, number * number) for number in range(20)]
        assert list(engine.run(square, [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_the_error_of_the_run(workers):
    with open_engine("local", workers=workers) as engine, pytest.raises(ValueError, match=r"task \d is wrong"):
        list(engine.run(complain, range(3)))


def test_a_worker_that_is_killed_is_an_error_not_a_wait_for_ever():
    with open_engine("local", workers=2) as engine, pytest.raises(WorkerDied, match="--workers 1"):
        list(engine.run(exit_hard, range(3)))


def test_mistakes_are_told_with_the_way_out():
    with pytest.raises(ValueError, match="local or ray"):
        open_engine("spark")
    with pytest.raises(ValueError, match="--workers 0"):
        open_engine("local", workers=0)
    with pytest.raises(ValueError, match="--engine ray"):
        open_engine("local", address="head:6379")

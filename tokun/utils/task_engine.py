"""Task engines: run a list of independent tasks in processes on this machine or on a Ray cluster.

    with open_engine("local", workers=8) as engine:
        for number, result in engine.run(function, tasks):
            ...

A task is an argument with a small result; it writes its own output. Tasks finish in any order, so no output may depend on
the order. Knows nothing of pictures.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tokun.utils.errors import UserError
from tokun.utils.memory import keep_memory
from tokun.utils.optional_packages import need

ENGINES = ("local", "ray")


class WorkerDied(UserError, RuntimeError):
    """A worker process was killed from outside, usually because memory ran out."""


def add_options(parser: argparse.ArgumentParser, task: str, places: str) -> None:
    """Options that say where the tasks run. `task`: what one of them does; `places`: what every node must reach."""
    group = parser.add_argument_group(f"where it runs, {task} at a time")
    add = group.add_argument
    add("--workers", type=int, default=1, help="processes (%(default)s)")
    add("--engine", default="local", metavar="NAME", help=f"{' or '.join(ENGINES)} (%(default)s)")
    add("--ray-address", default="", metavar="HOST:PORT", help=f"of a Ray cluster, whose nodes must reach {places}")
    add("--gpus-per-task", type=float, default=0, metavar="N", help="GPUs of a Ray cluster for each (%(default)s)")


def is_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the options of `add_options` ask for other processes than this one. Raises UserError for options of Ray without it."""
    if args.engine == "local" and (args.ray_address or args.gpus_per_task):
        open_engine(args.engine, address=args.ray_address, gpus=args.gpus_per_task)
    return args.engine != "local" or args.workers != 1


def engine_of(args: argparse.Namespace) -> TaskEngine:
    """The engine that the options of `add_options` name. Raises as `open_engine` does."""
    return open_engine(args.engine, workers=args.workers, address=args.ray_address, gpus=args.gpus_per_task)


def open_engine(name: str, *, workers: int = 1, address: str = "", gpus: float = 0) -> TaskEngine:
    """The engine with that name. `address`: of a Ray cluster; without one Ray starts on this machine. `gpus`: per task, for Ray.

    Raises UserError for an unknown name or fewer than one worker, ImportError if Ray is not installed.
    """
    if name not in ENGINES:
        raise UserError(f"--engine {name!r} is unknown: choose {' or '.join(ENGINES)}")
    if workers < 1:
        raise UserError(f"--workers {workers} must be 1 or more")
    if (address or gpus) and name != "ray":
        raise UserError(f"--ray-address {address!r} and --gpus-per-task {gpus} need --engine ray")
    if name == "ray":
        return RayEngine(workers, address, gpus)
    return TaskEngine() if workers == 1 else ProcessEngine(workers)


def absolute(place: str) -> str:
    """The path of a file or folder as a task in another folder finds it; what is none here, such as a Hub id or an address, as it is."""
    return str(Path(place).absolute()) if Path(place).exists() else place


class TaskEngine(AbstractContextManager):
    """Runs tasks one after another in this process."""

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(number of the task, its result), in order of completion. An error in a task ends the run."""
        for number, task in enumerate(tasks):
            yield number, function(task)

    def __exit__(self, *_: object) -> None:
        pass


class ProcessEngine(TaskEngine):
    """Runs tasks in processes on this machine, with few submitted at a time."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        # spawn: forking a process with threads may hang, and every platform has spawn
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin_worker)

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        waiting: dict[Future[Any], int] = {}
        try:
            for number, task in enumerate(tasks):
                waiting[self.pool.submit(function, task)] = number
                if len(waiting) >= 2 * self.workers:
                    yield from self.ended(waiting)
            while waiting:
                yield from self.ended(waiting)
        except BrokenProcessPool as error:
            numbers = ", ".join(str(number) for number in sorted(waiting.values())[:4])
            raise WorkerDied(
                f"a worker process died in one of the tasks {numbers}, perhaps because memory ran out: "
                "run again with --workers 1, which resumes"
            ) from error

    @staticmethod
    def ended(waiting: dict[Future[Any], int]) -> Iterator[tuple[int, Any]]:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting[future], future.result()
            del waiting[future]

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def begin_worker() -> None:
    keep_memory()
    end_with_parent()


def end_with_parent() -> None:
    """In a worker: exit when the main process is gone. Otherwise the workers of a killed run wait forever."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class RayEngine(TaskEngine):
    """Runs tasks on a Ray cluster, one core each. Every node must be able to reach their inputs and outputs."""

    def __init__(self, workers: int, address: str, gpus: float) -> None:
        self.gpus = gpus
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray = need("ray", extra="ray")
        self.started = not self.ray.is_initialized()
        if self.started:
            try:
                where = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
                self.ray.init(**where, log_to_driver=False, logging_level="warning")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"--ray-address {address!r} cannot be reached ({error}): start it with `ray start --head`") from error

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        remote = self.ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=3)(function)
        waiting: dict[Any, int] = {}
        most = 2 * max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        try:
            for number, task in enumerate(tasks):
                waiting[remote.remote(task)] = number
                if len(waiting) >= most:
                    yield from self.ended(waiting)
            while waiting:
                yield from self.ended(waiting)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the task's own error, as with the other engines
        except self.ray.exceptions.RayError as error:
            raise WorkerDied(f"the Ray cluster lost a task ({type(error).__name__}): run again to resume") from error

    def ended(self, waiting: dict[Any, int]) -> Iterator[tuple[int, Any]]:
        for future in self.ray.wait(list(waiting), num_returns=1)[0]:
            yield waiting[future], self.ray.get(future)
            del waiting[future]

    def __exit__(self, *_: object) -> None:
        if self.started:
            self.ray.shutdown()

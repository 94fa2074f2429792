"""How the tests run: one thread for each process, the fixtures of tests/fixtures.py, the files that take long before the others."""

import gc
import os
import shutil

import pytest

# one thread for each process of the tests: several tests run at once (pytest-xdist), and these sizes gain nothing from more
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import torch once again, seconds each
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # what the processor says that it can do is not tried by six compilations

IN_MEMORY, LEAST_FREE = "/dev/shm", 6 * 2**30  # for the tests' folders: syncing a file to a disk takes as long as a test of it


def in_memory() -> bool:
    """Whether there is a folder in memory with room for them."""
    return os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > LEAST_FREE


if in_memory():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", IN_MEMORY)

LONG = (
    "launch", "compiled", "fine_tuning_launch", "grpo", "prepare", "coherence", "app", "caption", "ray", "sample", "training", "resume",
    "evaluate", "notebook", "encode", "svg", "caption_table", "tracking", "questions", "planner", "recognition", "adapters", "native",
    "reported_runs",
    "shapes", "local_hub", "viewer", "cropping",
)  # fmt: skip
# left out by `pytest -m "not slow"`, beside what is marked where it stands: files that start launchers, clusters, notebooks or train whole
# runs, and tests of a finished run
SLOW_FILES = {
    f"test_{name}" for name in (
        "launch", "fine_tuning_launch", "resume", "training", "coherence", "notebook", "ray", "real_engravings",
        "adapters", "grpo", "input_faults", "native", "planner", "serving", "viewer",  # the longest of the others
    )
}  # fmt: skip
SLOW_FIXTURES = {"finished", "browser", "offline_runs"}


def pytest_configure(config: pytest.Config) -> None:
    """The fixtures import torch: the process that only hands the tests to others (pytest-xdist) does without."""
    if "PYTEST_XDIST_WORKER" in os.environ or config.option.collectonly or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_finish() -> None:
    """What is imported stays: without it, garbage is collected in a tenth less of all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of many seconds come first, so that at the end no process waits for one of them."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    for item in items:
        if item.path.stem in SLOW_FILES or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)

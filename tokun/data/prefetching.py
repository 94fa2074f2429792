"""Prefetch batches in a thread. Knows nothing of their contents."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int, *, depth: int = 2, burst: int = 1) -> Generator[T, None, None]:
    """make(start), make(start + 1), …, computed ahead in one thread, `burst` at a time. The reader gets an error in its item's place.

    Small items are best made many at a time: their code and data then stay in the processor's caches, which the training step otherwise
    takes over, and the two threads contend for the GIL less often.
    """
    ready: queue.Queue[list[Any]] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        step = start
        while not stop.is_set():
            made: list[Any] = []
            try:
                for number in range(step, step + burst):
                    made.append(make(number))
            except Exception as error:  # passed to the reader, which raises it
                ready.put([*made, error])
                return
            ready.put(made)
            step += burst

    thread = threading.Thread(target=work, daemon=True, name="tokun-prefetch")
    thread.start()
    try:
        while True:
            for item in ready.get():
                if isinstance(item, Exception):
                    raise item
                yield item
    finally:
        stop.set()
        while thread.is_alive():  # it may be blocked on a full queue
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.01)

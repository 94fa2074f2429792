"""Training loops that take turns, each in its own process or thread, so that other load on the machine affects all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from tokun.training import health


class Over(Exception):
    """Ends a loop that waits at its gate."""


@dataclasses.dataclass
class Turn:
    seconds: float
    processor: float
    waited: float
    memory: float
    tokens: int = 0


class Gate:
    """In a loop's process or thread: called before each step, it blocks until it is the loop's turn."""

    def __init__(self, pipe: Connection, device: torch.device):
        self.pipe, self.device = pipe, device
        self.left, self.waited, self.since = 0, 0.0, 0.0

    def __call__(self) -> None:
        if self.left == 0:
            self.next_turn()
        self.left -= 1

    def next_turn(self) -> None:
        """Report the last turn, if any, and wait for the next."""
        synchronise(self.device)
        until = time.perf_counter()
        settle()
        self.pipe.send(self.turn(until) if self.since else None)
        self.left = self.pipe.recv()
        if not self.left:
            raise Over
        self.waited, self.processor, self.since = 0.0, time.process_time(), time.perf_counter()

    def turn(self, until: float) -> Turn:
        return Turn(until - self.since, time.process_time() - self.processor, self.waited, health.peak_memory(self.device))


def live(pipe: Connection, work: Callable[..., None], make: Callable[..., Any], key: tuple[Any, ...], change: Callable[[], Any]) -> None:
    """A loop's process: runs `work` behind its gate until told to end."""
    made = make(*key)
    try:
        with change():
            work(made, Gate(pipe, made.device))
    except (Over, EOFError):  # EOFError: the other side is gone
        pass
    except BaseException as error:
        pipe.send(RuntimeError(f"{work.__name__}: {error!r}"))
        raise


class Loop:
    """The handle of a training loop in its own process (or thread). `work(setting, gate)` runs there, with a setting made from
    `setting.key()`; `setting.device` is its device, `setting.tokens` the tokens of each step."""

    def __init__(
        self,
        name: str,
        work: Callable[..., None],
        setting: Any,
        change: Callable[[], Any] = contextlib.nullcontext,
        *,
        thread: bool = False,
    ):
        self.name, self.setting, self.step = name, setting, 0
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        asked = {"target": live, "args": (theirs, work, type(setting), setting.key(), change), "daemon": True}
        self.process = threading.Thread(**asked) if thread else context.Process(**asked)
        self.process.start()
        if not thread:
            theirs.close()
        self._told()  # it waits before its first step

    def turn(self, steps: int) -> Turn:
        self.pipe.send(steps)
        turn = self._told()
        turn.tokens = sum(self.setting.tokens[self.step : self.step + steps])
        self.step += steps
        return turn

    def end(self) -> None:
        self.pipe.send(0)
        self.process.join()

    def _told(self) -> Any:
        told = self.pipe.recv()
        if isinstance(told, Exception):
            raise told
        return told


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settle() -> None:
    """Wait until the loop's background threads are idle too."""
    before = time.process_time()
    while True:
        time.sleep(0.05)
        now = time.process_time()
        if now - before < 0.005:
            return
        before = now


def compare(loops: list[Loop], *, steps: int, rounds: int) -> dict[str, list[Turn]]:
    """Turns of all loops, round by round, each round starting with another loop, after two warm-up rounds."""
    turns: dict[str, list[Turn]] = {loop.name: [] for loop in loops}
    for number in range(-2, rounds):
        for i in range(len(loops)):
            loop = loops[(number + i) % len(loops)]
            turn = loop.turn(steps)
            if number >= 0:
                turns[loop.name].append(turn)
    for loop in loops:
        loop.end()
    return turns


def ratio(turns: list[Turn], reference: list[Turn]) -> float:
    """The median over rounds of the ratio of tokens per second."""
    return statistics.median((t.tokens / t.seconds) / (r.tokens / r.seconds) for t, r in zip(turns, reference, strict=True))


def median(turns: list[Turn], value: Callable[[Turn], float]) -> float:
    return statistics.median(map(value, turns))

"""Graphs that several threads compile at the same time: their children are shared.

Two threads that bring the same graph while neither is done share each child: the first starts it, the others wait for
the same result, and each decodes it for its own graph. They walk down the ladder together, since what they see is the
same; a kill is told to one of them only. Equal graphs are those that have the same key in Inductor's own cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from sandbox.results import JobResult

#: Starts a child: its job id, and its result to come.
Start = Callable[[], tuple[str, Future[JobResult]]]


@dataclass
class _Child:
    job_id: str
    future: Future[JobResult]
    waiting: int = 0
    told: bool = False


class Flight:
    """One graph on its way, with one child for each step of the ladder. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[str, _Child] = {}

    def result(self, step: str, start: Start, cancel: Callable[[str], object]) -> tuple[JobResult, bool]:
        """Wait for the child of ``step``, which the first thread starts.

        Args:
            start: called by the first thread. What it raises goes to its caller; the next thread then starts one.
            cancel: called with the job id if this thread is interrupted and no other waits for the child.

        Returns:
            how the child ended, and whether this thread is the first to hear of it.
        """
        with self._lock:
            child = self._children.get(step)
            if child is None:
                child = self._children[step] = _Child(*start())
            child.waiting += 1
        try:
            result = child.future.result()
        except BaseException:
            with self._lock:
                child.waiting -= 1
                last = child.waiting == 0
                if last:
                    self._children.pop(step, None)  # who comes later starts another
            if last:
                cancel(child.job_id)
            raise
        with self._lock:
            child.waiting -= 1
            first, child.told = not child.told, True
        return result, first


class Flights:
    """The graphs that are on their way, by key. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[str, tuple[Flight, int]] = {}

    @contextlib.contextmanager
    def joined(self, key: str | None) -> Iterator[Flight]:
        """The flight of ``key``, for as long as the block lasts; it ends with its last thread. Without a key: one of
        its own."""
        if key is None:
            yield Flight()
            return
        with self._lock:
            flight, members = self._flights.get(key, (Flight(), 0))
            self._flights[key] = (flight, members + 1)
        try:
            yield flight
        finally:
            with self._lock:
                flight, members = self._flights.pop(key)
                if members > 1:
                    self._flights[key] = (flight, members - 1)

    def __len__(self) -> int:
        with self._lock:
            return len(self._flights)

"""Who may start: jobs wait, first come first served, until the memory that they may take is free.

A running job holds a reservation: what it was granted minus what it uses by now, since that is missing from the free
memory already. A new one gets what it asks for, or what is left, but not less than `memory.min_bytes`. So the number of
jobs side by side follows from the memory, too.

One process knows only its own reservations. Others on the host or in the pod are seen by what they use.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from sandbox.errors import RefusedError
from sandbox.memory import Free, Memory
from sandbox.policy import MemorySettings

#: Seconds after which the first in the queue looks again: what other processes give back wakes nobody.
LOOK_SECONDS: Final = 0.5


class Grant:
    """The memory that one running job may take."""

    def __init__(self, granted: int, wanted: int, free: Free | None) -> None:
        self.bytes = granted
        """Bytes, at most those asked for."""
        self._wanted = wanted
        self._free = free
        self._used = 0

    def tell(self, used_bytes: int) -> None:
        """What the job uses by now, in bytes."""
        self._used = used_bytes

    @property
    def outstanding(self) -> int:
        """Bytes that it may still take."""
        return max(0, self.bytes - self._used)

    def explain(self) -> str:
        """Why it is less than the job's limit, or "" if it is not."""
        if self._free is None or self.bytes >= self._wanted:
            return ""
        return (
            f"granted {self.bytes} of limits.memory_bytes = {self._wanted}, because {self._free.source} had only "
            f"{self._free.bytes} bytes free when it started"
        )


class Admission:
    """The queue and the reservations of one process. Thread-safe."""

    def __init__(self, look: Callable[[], Free | None], now: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            look: what is free now; None if nobody knows, then every job gets what it asks for.
            now: a clock in seconds that never goes back.
        """
        self._look = look
        self._now = now
        self._change = threading.Condition()
        self._queue: deque[object] = deque()
        self._grants: set[Grant] = set()

    @contextlib.contextmanager
    def granted(
        self, settings: MemorySettings, wanted: int, still_wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[Grant | None]:
        """Wait for memory and hold it for the block; None as soon as ``still_wanted`` says no, which is asked again at
        every :meth:`poke`.

        Args:
            settings: what to keep free, what to grant at least, how long to wait.
            wanted: what the job may use at most, in bytes.

        Raises:
            RefusedError: it was not free within `memory.wait_seconds`.
        """
        grant = self._wait(settings, wanted, still_wanted)
        try:
            yield grant
        finally:
            if grant is not None:
                with self._change:
                    self._grants.discard(grant)
                    self._change.notify_all()

    def poke(self) -> None:
        """Have everyone who waits ask again whether it is still wanted."""
        with self._change:
            self._change.notify_all()

    def _wait(self, settings: MemorySettings, wanted: int, still_wanted: Callable[[], bool]) -> Grant | None:
        ticket = object()
        with self._change:
            self._queue.append(ticket)
            deadline = self._now() + settings.wait_seconds
            try:
                while still_wanted():
                    first = self._queue[0] is ticket
                    late = self._now() >= deadline
                    if first or late:
                        free = self._look()
                        left = wanted if free is None else free.bytes - settings.reserve_bytes - self._outstanding()
                        if first and left >= min(wanted, settings.min_bytes):
                            grant = Grant(min(wanted, left), wanted, free)
                            self._grants.add(grant)
                            return grant
                        if late:
                            raise RefusedError(self._refusal(settings, wanted, free, first))
                    rest = deadline - self._now()
                    self._change.wait(min(rest, LOOK_SECONDS) if first else rest)
                return None
            finally:
                self._queue.remove(ticket)
                self._change.notify_all()  # who was second may be first now

    def _outstanding(self) -> int:
        return sum(grant.outstanding for grant in self._grants)

    def _refusal(self, settings: MemorySettings, wanted: int, free: Free | None, first: bool) -> str:
        needs = f"it needs {min(wanted, settings.min_bytes)} bytes (memory.min_bytes, or its own limit if that is less)"
        waited = f"no memory became free within memory.wait_seconds = {settings.wait_seconds:g} s: {needs}"
        state = "nobody knows what is free" if free is None else f"{free.source} has {free.bytes} bytes free"
        held = (
            f"memory.reserve_bytes keeps {settings.reserve_bytes} of them, and running jobs "
            f"({len(self._grants)}) may still take {self._outstanding()}"
        )
        queue = "" if first else "; other jobs wait before it"
        advice = "raise the memory of the pod or host, or lower limits.memory_bytes, parallel_jobs or memory.min_bytes"
        return f"{waited}, {state}, {held}{queue}. To change it: {advice}"


_shared = Admission(Memory().free)


def shared() -> Admission:
    """That of this process: all its sandboxes take from the same memory."""
    return _shared


def _forked() -> None:
    global _shared
    _shared = Admission(Memory().free)  # a thread that is not in the fork may have held the lock


os.register_at_fork(after_in_child=_forked)

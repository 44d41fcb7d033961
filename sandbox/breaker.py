"""The circuit breaker: when the sandbox itself keeps failing, jobs end at once instead of each waiting for a time-out.

    closed ── `failures` jobs in a row fail by our fault ──▶ open ── `open_seconds` later ──▶ half open: one job tries
       ▲                                                      ▲                                    │
       └────────────────────── it succeeds ───────────────────┼────────────────────────────────────┤
                                                              └───────────── it fails ─────────────┘

The pattern is that of M. Nygard, Release It!, chapter "Stability Patterns". What a job does itself, a crash for
example, is a success here: the sandbox has done its work. What a child only says counts as neither: no graph can open
the breaker for the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from sandbox.errors import RefusedError
from sandbox.policy import BreakerSettings

State = Literal["off", "closed", "open", "half_open"]


class Breaker:
    """One circuit breaker. Thread-safe."""

    def __init__(self, settings: BreakerSettings, now: Callable[[], float] = time.monotonic) -> None:
        """``now``: a clock in seconds that never goes back."""
        self._settings = settings
        self._now = now
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._open_until: float | None = None
        self._trying = False
        # What a job says counts only for the stretch, closed or half open, in which it began.
        self._stretch = 0
        self._problem = ""
        self.opened = 0
        """How often it has opened, a count."""

    @property
    def state(self) -> State:
        """What the next job will meet; `half_open` also while one tries."""
        with self._lock:
            if not self._settings.failures:
                return "off"
            if self._open_until is None:
                return "closed"
            return "half_open" if self._now() >= self._open_until else "open"

    def enter(self) -> int:
        """A job begins. Returns what :meth:`leave` must be given, whatever becomes of the job.

        Raises:
            RefusedError: it is open, or half open and another job tries.
        """
        with self._lock:
            if self._open_until is not None:
                left = self._open_until - self._now()
                if left > 0 or self._trying:
                    raise RefusedError(
                        f"the circuit breaker is open: {self._in_a_row} jobs in a row failed by the sandbox's own "
                        f"fault, the last one with: {self._problem}. "
                        + (f"The next try is in {left:.0f} s" if left > 0 else "Another job is trying now")
                    )
                self._trying = True
                self._stretch += 1
            return self._stretch

    def leave(self, stretch: int, works: bool | None, problem: str = "") -> None:
        """A job has ended.

        Args:
            stretch: what :meth:`enter` gave.
            works: whether the sandbox did its part. None: nobody can say, as of a job that was cancelled.
            problem: what failed, for people.
        """
        with self._lock:
            if stretch != self._stretch or not self._settings.failures:
                return
            self._trying = False
            if works:
                self._in_a_row, self._open_until = 0, None
            elif works is False:
                self._in_a_row += 1
                self._problem = problem[:500]
                if self._in_a_row >= self._settings.failures:  # after a try too: only a success sets it back
                    self._open_until = self._now() + self._settings.open_seconds
                    self._stretch += 1
                    self.opened += 1

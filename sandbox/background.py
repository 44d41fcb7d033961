"""Work that no answer waits for: done in the order in which it was asked for, by a thread that lives as long as there
is some. An idle process has no thread of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

Work = Callable[[], None]


class Background:
    """A queue of work and its thread. Thread-safe."""

    def __init__(self, swallowed: Callable[[BaseException], None]) -> None:
        """``swallowed``: is told of what a piece of work raises."""
        self._swallowed = swallowed
        self._change = threading.Condition()
        self._waiting: deque[Work] = deque()
        self.thread: threading.Thread | None = None

    def add(self, work: Work, most: int = 1000) -> None:
        """Have ``work`` done after the next :meth:`wake`; at once, in this thread, if ``most`` pieces wait already."""
        with self._change:
            if len(self._waiting) < most:
                self._waiting.append(work)
                return
        self._do(work)

    def wake(self) -> None:
        """See that what was added is done. If there is no thread to be had it is done here."""
        with self._change:
            if not self._waiting or self.thread is not None:
                return
            thread = threading.Thread(target=self._run, name="sandbox-background", daemon=True)
            self.thread = thread
        try:
            thread.start()
        except RuntimeError:
            self._run()

    def wait(self, seconds: float) -> bool:
        """Wait until all is done, at most so long. Returns whether it is."""
        self.wake()
        deadline = time.monotonic() + seconds
        with self._change:
            while self.thread is not None and self.thread is not threading.current_thread():
                if not self._change.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    return False
        return True

    def _run(self) -> None:
        while True:
            with self._change:
                if not self._waiting:
                    self.thread = None
                    self._change.notify_all()
                    return
                work = self._waiting.popleft()
            self._do(work)

    def _do(self, work: Work) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - counted; the work after it is done all the same
            self._swallowed(error)

"""Threads for work that nobody waits for, and what keeps it apart from the service's own compiles and forks."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from sandbox.inductor import compat

#: Seconds that a fork of the host waits for a graph that is being loaded, at most.
FORK_SECONDS: Final = 5.0
_LOCK_SECONDS: Final = 0.2


class Task:
    """What :class:`Workers` do: ``run``, or ``drop`` if they are closed before it has begun. Neither raises."""

    def __init__(self, run: Callable[[], None], drop: Callable[[], None]) -> None:
        self.run = run
        self.drop = drop


class Workers:
    """A few threads, first come first served. They end when there is nothing to do. Thread-safe."""

    def __init__(self, limit: int) -> None:
        """``limit``: threads at most, a count."""
        self._limit = limit
        self._changed = threading.Condition()
        self._queue: deque[Task] = deque()
        self._threads: set[threading.Thread] = set()
        self.closed = False

    def add(self, task: Task) -> None:
        """Have ``task`` done; if there is no thread to be had, it is dropped."""
        with self._changed:
            taken = not self.closed and (len(self._threads) >= self._limit or self._start() or bool(self._threads))
            if taken:
                self._queue.append(task)
        if not taken:
            task.drop()

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name="sandbox-deferred", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads.add(thread)
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._threads.discard(threading.current_thread())
                    self._changed.notify_all()
                    return
                task = self._queue.popleft()
            try:
                task.run()
            except BaseException:
                with self._changed:  # or wait() would wait for it for ever
                    self._threads.discard(threading.current_thread())
                    self._changed.notify_all()
                raise
            del task

    def wait(self, seconds: float | None = None) -> bool:
        """Block until there is nothing to do; False if that took longer than ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._threads, seconds)

    def close(self) -> None:
        """Begin nothing more, and drop what waits. What runs is the caller's to cancel, before :meth:`wait`."""
        with self._changed:
            self.closed = True
            dropped = list(self._queue)
            self._queue.clear()
        for task in dropped:
            task.drop()


class _Exclusive:
    """Held while a graph is loaded and saved: by Dynamo's lock the service's own compiles keep out of it, and by ours
    a fork does. Should one come all the same, its child gives the locks up that died with the thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forking = False
        self._used = False
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._in_child)

    def _before(self) -> None:
        self._forking = self._lock.acquire(timeout=FORK_SECONDS)

    def _after(self) -> None:
        if self._forking:
            self._lock.release()

    def _in_child(self) -> None:
        self._lock = threading.Lock()
        if self._used and not compat.compile_lock._is_owned():
            compat.compile_lock._at_fork_reinit()

    @contextlib.contextmanager
    def held(self, wanted: Callable[[], bool]) -> Iterator[bool]:
        """Yields whether it is held: not if ``wanted()`` has become false meanwhile."""
        self._used = True
        while not compat.compile_lock.acquire(timeout=_LOCK_SECONDS):
            if not wanted():
                yield False
                return
        try:
            with self._lock:
                yield wanted()
        finally:
            compat.compile_lock.release()


exclusive = _Exclusive()

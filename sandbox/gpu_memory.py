"""How much of the GPUs' memory a job's processes hold, by NVML: for jobs that may use a GPU.

NVML is asked in the serving process, never in the forkserver or a child, and by a thread of its own: a driver that
hangs must not hold up what watches the job's time. It counts what a CUDA context takes, too. It names processes as the
host does: in a container with process ids of its own it knows none of ours. What is not measured is told, and counts
as nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any, Final

from sandbox.ledger import Held
from sandbox.results import Leak, Mechanism, State

#: Seconds between two questions while a job is watched.
ASK_SECONDS: Final = 0.1
#: Seconds after which an answer is too old to go by: the driver hangs.
STALE_SECONDS: Final = 2.0
#: Seconds that the driver gets to take apart the context of a process that has ended.
ENDING_SECONDS: Final = 2.0
Sizes = Mapping[int, int | None]
"""Bytes by pid; None: NVML does not tell them."""


class _Asker:
    """A thread of this process that asks NVML as long as somebody wants to know."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._changed = threading.Condition()
        self._watchers = 0
        self._running = False
        self._hurry = False
        self._answers = 0
        self._at = 0.0
        self._sizes: Sizes = {}
        self._error = ""

    def begin(self) -> None:
        """Somebody wants to know."""
        with self._changed:
            self._watchers += 1
            if not self._running:
                self._running = True
                self._sizes, self._error, self._at = {}, "", time.monotonic()
                threading.Thread(target=self._ask, name="sandbox-nvml", daemon=True).start()

    def end(self) -> None:
        """Not any more."""
        with self._changed:
            self._watchers -= 1
            self._changed.notify_all()

    def next(self, seconds: float) -> tuple[Sizes, str]:
        """An answer that was asked for from now on, or after so long the last one: sizes, and what is wrong with it."""
        with self._changed:
            wanted = self._answers + 2  # the next may have been asked for before
            while self._answers < wanted and seconds > 0:
                self._hurry = True
                self._changed.notify_all()
                begun = time.monotonic()
                self._changed.wait(seconds)
                seconds -= time.monotonic() - begun
        return self.last()

    def last(self) -> tuple[Sizes, str]:
        """The last answer, and what is wrong with it."""
        with self._changed:
            old = time.monotonic() - self._at > STALE_SECONDS
            return self._sizes, self._error or ("it does not answer" if old else "")

    def _ask(self) -> None:
        nvml: Any = None
        while True:
            try:
                if nvml is None:
                    nvml = _started()
                sizes, error = _by_pid(nvml), ""
            except Exception as raised:  # noqa: BLE001 - no library, no driver, another version: a class each; it is told
                sizes, error = {}, f"{type(raised).__name__}: {raised}"
                _ended(nvml)
                nvml = None  # another one may be better
            with self._changed:
                self._sizes, self._error, self._at = sizes, error, time.monotonic()
                self._answers += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._hurry or not self._watchers, ASK_SECONDS)
                self._hurry = False
                if not self._watchers:
                    self._running = False
                    break
        _ended(nvml)


_lock = threading.Lock()
_asker: list[_Asker] = []


def _here() -> _Asker:
    """That of this process; a fork starts its own."""
    with _lock:
        if not _asker or _asker[0].pid != os.getpid():
            _asker[:] = [_Asker()]
        return _asker[0]


def _started() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def _ended(nvml: Any) -> None:
    if nvml is not None:
        with contextlib.suppress(Exception):  # it may be what has failed; whoever was to know was told
            nvml.nvmlShutdown()


def _by_pid(nvml: Any) -> dict[int, int | None]:
    found: dict[int, int | None] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index)):
            size, known = process.usedGpuMemory, found.get(process.pid, 0)
            found[process.pid] = None if size is None or known is None else known + size
    return found


class GpuMemory:
    """Of one job, from its start to :meth:`left`."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        """The most that one look has found."""
        self._wrong = ""
        self._seen: set[int] = set()
        self._asker = _here()
        self._asker.begin()

    @property
    def mechanism(self) -> Mechanism:
        """Enforced if a process of the job was seen to hold some memory, and nothing was wrong with any answer."""
        if self._wrong:
            return Mechanism(state=State.UNAVAILABLE, reason=f"NVML: {self._wrong}")
        if not self._seen:
            return Mechanism(
                state=State.PARTIAL, reason="NVML has named no process of the job; it may have used no GPU"
            )
        return Mechanism(state=State.ENFORCED)

    def sample(self, pids: Collection[int]) -> int:
        """Bytes that ``pids`` hold, on all GPUs, by the last answer; 0 where NVML does not tell. Does not wait."""
        return self._count(pids, *self._asker.last())

    def _count(self, pids: Collection[int], sizes: Sizes, wrong: str) -> int:
        found = {pid: held for pid, held in sizes.items() if pid in pids}
        if sizes and os.getpid() not in sizes:
            wrong = (
                wrong
                or "it names other processes than those of this container, or not this one, which must be on a GPU"
            )
        if None in found.values():
            wrong = wrong or "it does not tell how much a process holds"
        if wrong:
            self._wrong = wrong
            return 0
        self._seen |= found.keys()
        held = sum(size or 0 for size in found.values())
        self.peak_bytes = max(self.peak_bytes, held)
        return held

    def left(self) -> list[Leak]:
        """What those that were seen to hold some still hold, when the job is over: waits a moment for the driver."""
        deadline = time.monotonic() + ENDING_SECONDS
        try:
            held: dict[int, int] = {}
            while self._seen and (seconds := deadline - time.monotonic()) > 0:
                sizes, wrong = self._asker.next(seconds)
                held = {} if wrong else {pid: size or 0 for pid, size in sizes.items() if pid in self._seen}
                if not held:
                    break
        finally:
            self._asker.end()
        texts = [f"pid {pid} holds {size} bytes of GPU memory" for pid, size in sorted(held.items())]
        return [Held("gpu_memory", text).leak("child", reclaimed=False) for text in texts]

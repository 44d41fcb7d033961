"""How much of the GPUs' memory a job's processes hold, by NVML: for jobs that may use a GPU.

NVML is asked in the serving process, never in the forkserver or a child. It counts what a CUDA context takes, too. It
names processes as the host does: in a container with process ids of its own it knows none of ours, and says so.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from typing import Any, Final

from sandbox.ledger import Held
from sandbox.results import Leak, Mechanism, State

#: Seconds that the driver gets to take apart the context of a process that has ended.
ENDING_SECONDS: Final = 2.0
_lock = threading.Lock()
_nvml: dict[int, Any] = {}


class GpuMemory:
    """Of one job. What cannot be measured is told by :attr:`mechanism`, and counts as nothing."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        """The most that one look has found."""
        self._seen: set[int] = set()
        try:
            self._nvml = _started()
            by_pid = self._by_pid()
        except Exception as error:  # noqa: BLE001 - no library, no driver, or one that is too old: a class each
            self._nvml = None
            self.mechanism = _unavailable(f"NVML: {type(error).__name__}: {error}")
            return
        if by_pid and os.getpid() not in by_pid:
            self.mechanism = _unavailable("NVML names processes by other ids than those of this container")
        else:
            self.mechanism = Mechanism(state=State.ENFORCED)

    def sample(self, pids: Collection[int]) -> int:
        """Bytes that ``pids`` hold now, on all GPUs; 0 where NVML does not tell."""
        found = {pid: held for pid, held in self._now().items() if pid in pids}
        self._seen |= found.keys()
        held = sum(found.values())
        self.peak_bytes = max(self.peak_bytes, held)
        return held

    def left(self) -> list[Leak]:
        """What those that were seen to hold some still hold, when the job is over: waits a moment for the driver."""
        deadline = time.monotonic() + ENDING_SECONDS
        while self._nvml is not None and self._seen:
            held = {pid: size for pid, size in self._now().items() if pid in self._seen}
            if not held or time.monotonic() > deadline:
                texts = [f"pid {pid} holds {size} bytes of GPU memory" for pid, size in sorted(held.items())]
                return [Held("gpu_memory", text).leak("child", reclaimed=False) for text in texts]
            time.sleep(0.01)
        return []

    def _now(self) -> dict[int, int]:
        if self._nvml is None:
            return {}
        try:
            return self._by_pid()
        except self._nvml.NVMLError as error:
            self.mechanism = _unavailable(f"NVML: {error}")
            return {}

    def _by_pid(self) -> dict[int, int]:
        nvml, found = self._nvml, dict[int, int]()
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(device):
                found[process.pid] = found.get(process.pid, 0) + (process.usedGpuMemory or 0)
        return found


def _started() -> Any:
    """NVML, started once in this process; a fork starts its own.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        pynvml.NVMLError: there is no driver.
    """
    import pynvml

    with _lock:
        if os.getpid() not in _nvml:
            pynvml.nvmlInit()
            _nvml[os.getpid()] = pynvml
    return pynvml


def _unavailable(reason: str) -> Mechanism:
    return Mechanism(state=State.UNAVAILABLE, reason=reason)

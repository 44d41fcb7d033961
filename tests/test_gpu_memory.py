"""GPU memory of jobs that may use a GPU. There is none here: what NVML tells is made up, of processes that are real."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sandbox
from sandbox.jobs import Job
from sandbox.limits import MIB
from sandbox.policy import Policy
from sandbox.processes import read_stat
from sandbox.results import JobResult, State, Status

#: Of the context that the service itself holds.
CONTEXT = 500 * MIB


@pytest.fixture(scope="module")
def box() -> Iterator[sandbox.Sandbox]:
    policy = Policy(name="gpu", forkserver={"import_torch": False, "warm_up": False, "standby": 0})
    with sandbox.Sandbox(policy) as one:
        one.wait_ready()
        yield one


class Nvml:
    """Two GPUs: the service is on the first; on the second each process of which a file says how much it holds."""

    class NVMLError(Exception):
        pass

    def __init__(self, folder: Path, *, own: bool = True) -> None:
        self.folder = folder
        self.own = own
        self.fails = False
        self.after_the_end = False
        self.hangs = False
        self.released = threading.Event()
        self.begun = 0

    def nvmlInit(self) -> None:
        self.begun += 1

    def nvmlShutdown(self) -> None:
        self.begun -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[Any]:
        if self.hangs:
            self.released.wait(60.0)
        if self.fails:
            raise self.NVMLError("GPU is lost")
        if device == 0:
            return [SimpleNamespace(pid=os.getpid() if self.own else 1, usedGpuMemory=CONTEXT)]
        found = []
        for file in self.folder.glob("*"):
            if self.after_the_end or read_stat(int(file.name)) is not None:
                found.append(SimpleNamespace(pid=int(file.name), usedGpuMemory=int(file.read_text() or 0)))
        return found


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvml]:
    from sandbox import gpu_memory

    fake = Nvml(tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu_memory, "_asker", [])
    yield fake
    fake.released.set()
    deadline = time.monotonic() + 10.0
    while any(thread.name == "sandbox-nvml" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake.begun == 0 or fake.hangs, "NVML is still in use"


def waits(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


def run(box: sandbox.Sandbox, folder: Path, size: int, seconds: float, *, gpu: bool = True) -> JobResult:
    """A job that may use the GPU, and seems to hold so much of its memory."""
    job = sandbox.callable_job(waits, seconds)
    job = Job(job.spec.model_copy(update={"gpu": gpu}), job.payload)
    future = box.submit(job)
    while not future.done():
        if box.forkserver_pid is not None:
            for process in sandbox_workers(box.forkserver_pid):
                (folder / str(process)).write_text(str(size))
        time.sleep(0.005)
    return future.result()


def sandbox_workers(template: int) -> list[int]:
    from sandbox.processes import walk

    return [stat.pid for stat in walk(template) if stat.pid != template]


def test_a_job_that_takes_too_much_is_killed(box: sandbox.Sandbox, nvml: Nvml, tmp_path: Path) -> None:
    result = run(box, tmp_path, 9 << 30, 60.0)
    assert result.status is Status.MEMORY_LIMIT
    assert "bytes of GPU memory, limits.gpu_memory_bytes = 8589934592" in result.detail
    assert result.usage.wall_seconds < 5.0


def test_what_a_job_holds_is_told(box: sandbox.Sandbox, nvml: Nvml, tmp_path: Path) -> None:
    result = run(box, tmp_path, 100 * MIB, 1.0)
    assert result.status is Status.OK, result.detail
    assert result.usage.peak_gpu_memory_bytes >= 100 * MIB
    assert result.enforcement.mechanisms["gpu_memory"].state is State.ENFORCED
    assert result.leaks.leaks == ()


def test_what_is_left_is_a_leak(
    box: sandbox.Sandbox, nvml: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandbox import gpu_memory

    monkeypatch.setattr(gpu_memory, "ENDING_SECONDS", 0.05)
    nvml.after_the_end = True
    result = run(box, tmp_path, 100 * MIB, 1.0)
    assert result.status is Status.OK, result.detail
    assert {leak.kind for leak in result.leaks.leaks} == {"gpu_memory"}
    assert all("bytes of GPU memory" in leak.object and not leak.reclaimed for leak in result.leaks.leaks)


@pytest.mark.parametrize("why", ["library", "container", "driver", "hang"])
def test_where_nvml_does_not_tell_the_report_says_so(
    box: sandbox.Sandbox, nvml: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "library":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml.own = why != "container"
    nvml.fails = why == "driver"
    nvml.hangs = why == "hang"
    monkeypatch.setattr("sandbox.gpu_memory.STALE_SECONDS", 0.1)
    result = run(box, tmp_path, 9 << 30 if why == "container" else 100 * MIB, 0.5)
    assert result.status is Status.OK, result.detail
    assert result.usage.wall_seconds < 5.0
    mechanism = result.enforcement.mechanisms["gpu_memory"]
    assert mechanism.state is State.UNAVAILABLE
    told = {"library": "ModuleNotFoundError", "container": "this container", "driver": "GPU is lost"}
    assert told.get(why, "does not answer") in mechanism.reason


def test_a_job_that_may_use_no_gpu_is_not_looked_at(box: sandbox.Sandbox, nvml: Nvml, tmp_path: Path) -> None:
    nvml.fails = True
    result = run(box, tmp_path, 9 << 30, 0.3, gpu=False)
    assert result.status is Status.OK and "gpu_memory" not in result.enforcement.mechanisms

"""Every phase of a job times every manner of going wrong: the status, the time of the kill, and nothing left."""

from __future__ import annotations

import time

import faultpoints
import pytest
from conftest import leaves_nothing

import sandbox
from sandbox import faults
from sandbox.limits import MIB, Limits
from sandbox.results import JobResult, Status

#: `build` is the compiler, a process of its own; the others are injection points.
PHASES = ("check_spec", "unpickle", "run", "build", "send_reply", "leave")
KINDS = (
    "raise", "sys_exit", "exit", "sigsegv", "sigabrt", "sigkill", "sigstop", "busy_loop", "oom_slow", "fork_bomb",
    "fd_exhaustion", "disk_hog", "stderr_flood", "garbage", "orphan",
)  # fmt: skip
#: Of those that must hit it; the others may take their time on a loaded machine.
WALL = 2.0
LIMITS = Limits(
    wall_seconds=30.0,
    memory_bytes=512 * MIB,
    processes=50,
    open_files=256,
    disk_bytes=64 * MIB,
    stderr_bytes=MIB,
)


def expected(phase: str, manner: str) -> Status:
    """What each cell of the table must say."""
    if phase == "leave":
        # The reply is complete before the worker leaves: whatever it does then loses nothing.
        return Status.OK
    if manner == "orphan":
        return Status.OK  # and a leak, which is asserted apart
    if manner in ("sigstop", "busy_loop"):
        return Status.TIMEOUT
    if manner == "oom_slow":
        return Status.MEMORY_LIMIT  # an allocation fails, in the worker or its compiler, or the watchdog sees it first
    if manner == "fork_bomb":
        return Status.VIOLATION
    if manner == "disk_hog":
        return Status.OUTPUT_LIMIT
    if manner == "stderr_flood":
        return Status.OUTPUT_LIMIT
    if manner == "garbage":
        # The compiler's process does not hold the job's socket: it can write what it likes.
        return Status.OK if phase == "build" else Status.PROTOCOL_ERROR
    if phase == "build":
        return Status.COMPILE_ERROR  # a compiler that dies in any way is an error of the compile
    if phase == "check_spec" and manner in ("raise", "sys_exit", "exit", "fd_exhaustion"):
        return Status.SANDBOX_ERROR  # an exit before anything of the job was unpickled
    if manner == "raise":
        return {"run": Status.COMPILE_ERROR, "unpickle": Status.UNSERIALIZABLE}.get(phase, Status.CRASHED)
    if manner == "fd_exhaustion":
        return Status.VIOLATION if phase in ("run", "unpickle") else Status.CRASHED
    return Status.CRASHED


SIGNALS = {"sigsegv": "SIGSEGV", "sigabrt": "SIGABRT", "sigkill": "SIGKILL"}


@pytest.mark.parametrize("manner", KINDS)
@pytest.mark.parametrize("phase", PHASES)
def test_crash_table(faulty: sandbox.Sandbox, phase: str, manner: str) -> None:
    with leaves_nothing(faulty):
        started = time.monotonic()
        result = run(faulty, phase, manner)
        elapsed = time.monotonic() - started
        status = expected(phase, manner)
        assert result.status is status, result
        assert bool(result.detail) == (status is not Status.OK)
        if status is Status.TIMEOUT:
            assert elapsed < WALL + 1.0, f"killed {elapsed - WALL:.2f} s after its deadline"
        if status is Status.CRASHED and manner in SIGNALS:
            assert result.signal == SIGNALS[manner]
        if status is Status.OK:
            assert result.value == 42
        if manner == "orphan" and phase != "leave":
            # The process in between may have ended, and nobody has waited for it, or be about to.
            assert {"orphan"} <= set(result.leaks.counts()) <= {"orphan", "process", "zombie"}
            assert all(leak.reclaimed for leak in result.leaks.leaks)
        # The next job is not touched by it.
        assert faulty.submit(sandbox.callable_job(faultpoints.build)).result(timeout=30).status is Status.OK


def run(faulty: sandbox.Sandbox, phase: str, manner: str) -> JobResult:
    if phase == "build":
        wall = WALL if expected(phase, manner) is Status.TIMEOUT else LIMITS.wall_seconds
        limits = LIMITS.model_copy(update={"wall_seconds": wall})
        job = sandbox.callable_job(faultpoints.build, manner, limits=limits)
        return faulty.submit(job).result(timeout=30)
    job = sandbox.callable_job(faultpoints.build, limits=LIMITS)
    with faults.inject(manner, f"child.{phase}", into=faulty, times=1) as injection:
        result = faulty.submit(job).result(timeout=30)
    assert len(injection.given) == 1
    return result

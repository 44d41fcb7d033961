"""Every phase of a job times every manner of going wrong: the status, the time of the kill, and nothing left."""

from __future__ import annotations

import time

import faultpoints
import pytest

import sandbox
from sandbox.limits import MIB, Limits
from sandbox.results import JobResult, Status

WALL = 1.5
LIMITS = Limits(
    wall_seconds=WALL,
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
    if manner == "setsid_grandchild":
        return Status.OK  # and a leak, which is asserted apart
    if manner in ("sigstop", "busy_loop"):
        return Status.TIMEOUT
    if manner == "memory_hog":
        return Status.MEMORY_LIMIT  # an allocation fails, in the worker or its compiler, or the watchdog sees it first
    if manner == "fork_bomb":
        return Status.VIOLATION
    if manner == "disk_hog":
        return Status.OUTPUT_LIMIT
    if manner == "stderr_flood":
        return Status.OUTPUT_LIMIT
    if manner == "garbage_reply":
        # The compiler's process does not hold the job's socket: it can write what it likes.
        return Status.OK if phase == "build" else Status.PROTOCOL_ERROR
    if phase == "build":
        return Status.COMPILE_ERROR  # a compiler that dies in any way is an error of the compile
    if manner == "raise":
        return {"run": Status.COMPILE_ERROR, "unpickle": Status.UNSERIALIZABLE}.get(phase, Status.CRASHED)
    if manner == "fd_hog":
        return Status.VIOLATION if phase in ("run", "unpickle") else Status.CRASHED
    return Status.CRASHED


SIGNALS = {"sigsegv": "SIGSEGV", "sigabrt": "SIGABRT", "sigkill": "SIGKILL"}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("manner", faultpoints.MANNERS)
@pytest.mark.parametrize("phase", faultpoints.PHASES)
def test_crash_table(light: sandbox.Sandbox, phase: str, manner: str) -> None:
    started = time.monotonic()
    result = run(light, f"{phase}:{manner}")
    elapsed = time.monotonic() - started
    status = expected(phase, manner)
    assert result.status is status, result
    assert bool(result.detail) == (status is not Status.OK)
    assert elapsed < WALL + 1.0, f"killed {elapsed - WALL:.2f} s after its deadline"
    if status is Status.CRASHED and manner in SIGNALS:
        assert result.signal == SIGNALS[manner]
    if status is Status.OK:
        assert result.value == 42
    if manner == "setsid_grandchild" and phase != "leave":
        # The process in between may have ended, and nobody has waited for it, or be about to.
        assert {"orphan"} <= set(result.leaks.counts()) <= {"orphan", "process", "zombie"}
        assert all(leak.reclaimed for leak in result.leaks.leaks)
    # The next job is not touched by it.
    assert run(light, ":").status is Status.OK


def run(light: sandbox.Sandbox, fault: str) -> JobResult:
    environment = {**light.environment(), "SANDBOX_TEST_FAULT": fault}
    job = sandbox.callable_job(faultpoints.build, limits=LIMITS, environment=environment)
    return light.submit(job, name=fault).result(timeout=30)

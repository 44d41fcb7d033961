"""How a job ended, as a pure function of what was seen: a crash never passes for a failure of ours."""

from __future__ import annotations

import signal

import pytest

from sandbox.child import EXIT_BAD_REQUEST, EXIT_MEMORY, EXIT_UNCONFINED
from sandbox.results import KILLERS, Mechanism, State, Status
from sandbox.verdict import Evidence, judge
from sandbox.wire import Exited, Reply, safe_dumps

JOB = "job-0123456789ab"


def ended(**how: object) -> Exited:
    return Exited(job_id=JOB, **how)  # type: ignore[arg-type]


def reply(status: Status) -> Reply:
    return Reply(job_id=JOB, status=status, detail="said the child")


#: A filter without a listener.
FILTERED = {"seccomp": Mechanism(state=State.PARTIAL)}
GOOD = {"reply": reply(Status.OK), "payload": safe_dumps(42)}


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (Evidence(exited=ended(exit_code=0), **GOOD), Status.OK),
        # What happens after a complete good reply loses nothing.
        (Evidence(exited=ended(signal=11), **GOOD), Status.OK),
        (Evidence(exited=ended(exit_code=0), reply=reply(Status.OK), payload=b"garbage"), Status.PROTOCOL_ERROR),
        # The first cause recorded wins, also over a good reply that came later.
        (Evidence(cause=(Status.TIMEOUT, "late"), exited=ended(signal=9), **GOOD), Status.TIMEOUT),
        (Evidence(cause=(Status.PROTOCOL_ERROR, "garbage"), exited=ended(signal=9)), Status.PROTOCOL_ERROR),
        (Evidence(cause=(Status.PROTOCOL_ERROR, "garbage"), exited=ended(signal=11)), Status.CRASHED),
        (Evidence(truncated=True, exited=ended(signal=11)), Status.CRASHED),
        (Evidence(truncated=True, exited=ended(exit_code=0)), Status.PROTOCOL_ERROR),
        # A child may blame the sandbox only if it ends cleanly.
        (Evidence(reply=reply(Status.SANDBOX_ERROR), exited=ended(exit_code=0)), Status.SANDBOX_ERROR),
        (Evidence(reply=reply(Status.SANDBOX_ERROR), exited=ended(signal=11)), Status.CRASHED),
        (Evidence(reply=reply(Status.UNSERIALIZABLE), exited=ended(signal=6)), Status.CRASHED),
        (Evidence(reply=reply(Status.COMPILE_ERROR), exited=ended(exit_code=0)), Status.COMPILE_ERROR),
        # Our own exit codes are ours only before the job has begun.
        (Evidence(exited=ended(exit_code=EXIT_UNCONFINED), last_words="why"), Status.SANDBOX_ERROR),
        (Evidence(started=True, exited=ended(exit_code=EXIT_UNCONFINED)), Status.CRASHED),
        (Evidence(started=True, exited=ended(exit_code=EXIT_BAD_REQUEST)), Status.CRASHED),
        (Evidence(started=True, exited=ended(exit_code=EXIT_MEMORY)), Status.MEMORY_LIMIT),
        # Before it has begun nothing of the job has run: an exit then is no crash of a compiler, a signal may be.
        (Evidence(exited=ended(exit_code=3)), Status.SANDBOX_ERROR),
        (Evidence(started=True, exited=ended(exit_code=3)), Status.CRASHED),
        (Evidence(exited=ended(signal=signal.SIGXCPU)), Status.CPU_LIMIT),
        (Evidence(exited=ended(signal=signal.SIGXFSZ)), Status.OUTPUT_LIMIT),
        (Evidence(exited=ended(signal=signal.SIGKILL)), Status.CRASHED),
        # A forbidden system call counts more than what was replied, and more than garbage.
        (Evidence(exited=ended(signal=9, violation="ptrace")), Status.VIOLATION),
        (Evidence(exited=ended(exit_code=0, violation="ptrace"), **GOOD), Status.VIOLATION),
        (Evidence(cause=(Status.PROTOCOL_ERROR, "x"), exited=ended(signal=9, violation="ptrace")), Status.VIOLATION),
        (Evidence(cause=(Status.TIMEOUT, "late"), exited=ended(signal=9, violation="ptrace")), Status.TIMEOUT),
        # Only a filter that cannot tell the name kills by SIGSYS.
        (Evidence(exited=ended(signal=signal.SIGSYS)), Status.CRASHED),
        (Evidence(exited=ended(signal=signal.SIGSYS), mechanisms=FILTERED), Status.VIOLATION),
        # A keeper that could not begin is ours; one that failed with the job under way may be the job's doing.
        (Evidence(exited=ended(refused="no namespace")), Status.SANDBOX_ERROR),
        (Evidence(forked=True, exited=ended(refused="no memory")), Status.CRASHED),
        (Evidence(), Status.SANDBOX_ERROR),
        (Evidence(forked=True), Status.CRASHED),
        (Evidence(forked=True, reply=reply(Status.COMPILE_ERROR)), Status.COMPILE_ERROR),
        (Evidence(forked=True, reply=reply(Status.SANDBOX_ERROR)), Status.CRASHED),
        (Evidence(reply=reply(Status.UNSERIALIZABLE), exited=ended(exit_code=7)), Status.CRASHED),
        # A slow exit after the reply, ended by us, does not change what was replied.
        (Evidence(ordered=True, reply=reply(Status.COMPILE_ERROR), exited=ended(signal=9)), Status.COMPILE_ERROR),
        (Evidence(ordered=True, reply=reply(Status.SANDBOX_ERROR), exited=ended(signal=9)), Status.CRASHED),
    ],
)
def test_verdicts(seen: Evidence, status: Status) -> None:
    found, detail, value = judge(seen)
    assert found is status
    assert (value == 42) == (status is Status.OK)
    assert bool(detail) == (status is not Status.OK)
    if seen.exited is not None and seen.exited.signal not in (None, signal.SIGKILL) and status is not Status.OK:
        assert found in KILLERS, "a crash that may be repeated in the serving process"

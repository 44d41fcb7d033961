"""From what was seen of a job to how it ended: the status, one line why, and the value."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from sandbox.child import EXIT_BAD_REQUEST, EXIT_MEMORY, EXIT_NO_PARENT, EXIT_UNCONFINED
from sandbox.envelopes import Exited, Reply
from sandbox.errors import WireError
from sandbox.results import Mechanism, State, Status, printable
from sandbox.unpickle import safe_loads

#: What a worker that could not reply says by its exit code, as long as the job itself had not begun.
_OURS = {
    EXIT_UNCONFINED: "a required confinement is unavailable",
    EXIT_BAD_REQUEST: "the child refused the request",
    EXIT_NO_PARENT: "the child could not send its reply",
}

#: What the keeper found when it was over.
_BREACHES = {
    "memory": (Status.MEMORY_LIMIT, "the job's cgroup had used up limits.memory_bytes: killed by the kernel"),
    "processes": (Status.VIOLATION, "more than limits.processes when the worker ended"),
    "threads": (Status.VIOLATION, "the job's cgroup refused one more process or thread: limits.threads"),
}
#: What a child may say only if it ends cleanly: the ladders of these may end with a compile in the serving process.
_BLAMES_US = frozenset({Status.SANDBOX_ERROR, Status.PROTOCOL_ERROR, Status.UNSERIALIZABLE})


@dataclass
class Evidence:
    """What the monitor has seen of one job."""

    cause: tuple[Status, str] | None = None
    """The first breach that the monitor recorded."""
    started: bool = False
    """The worker has checked its spec and confined itself: what follows is the job's doing."""
    forked: bool = False
    """The keeper has forked the worker."""
    reply: Reply | None = None
    payload: bytes = b""
    truncated: bool = False
    """The reply ended in the middle of a frame."""
    ordered: bool = False
    """We had the tree killed."""
    exited: Exited | None = None
    mechanisms: dict[str, Mechanism] = field(default_factory=dict)
    last_words: str = ""
    """The tail of stdout and stderr."""


def judge(seen: Evidence, allowed: frozenset[str] = frozenset()) -> tuple[Status, str, object]:
    """Status, one line why, and value. The first cause recorded wins; a complete good reply is a cause, too.

    A child may say of itself that it is well or that the compiler raised. It may blame the sandbox only if it ends
    cleanly: a graph that crashes its compiler must not get at the ladder of our own failures, which may end with a
    compile in the serving process.

    Args:
        allowed: classes, as `module:name`, that the value may hold besides plain data.
    """
    exited = seen.exited
    if seen.cause is not None:
        status, detail = seen.cause
        if status is Status.PROTOCOL_ERROR and exited is not None and exited.violation:
            return *_by_call(exited.violation), None
        if status is Status.PROTOCOL_ERROR and exited is not None and exited.signal not in (None, signal.SIGKILL):
            # It sent garbage and crashed; the keeper, when it is told to kill, sends SIGKILL only.
            return *_by_signal(exited.signal or 0, seen.mechanisms), None
        return status, detail, None
    if exited is not None and exited.violation:
        # Whatever it has replied meanwhile: one of its processes did what no compiler does.
        return *_by_call(exited.violation), None
    if seen.reply is not None and seen.reply.status is Status.OK:
        try:
            return Status.OK, "", safe_loads(seen.payload, allowed)
        except WireError as error:
            return Status.PROTOCOL_ERROR, str(error), None
    if exited is None:
        if seen.reply is not None and seen.reply.status not in _BLAMES_US:
            return seen.reply.status, printable(seen.reply.detail), None
        return Status.CRASHED if seen.forked else Status.SANDBOX_ERROR, "the keeper did not report", None
    if exited.refused:
        # With the job under way nobody can say whose fault it was: the safe answer is the job's.
        return Status.CRASHED if seen.forked else Status.SANDBOX_ERROR, printable(exited.refused), None
    if exited.breach:
        return *_BREACHES[exited.breach], None
    # A worker that did not exit after its reply was killed by us: that is not how it ended.
    by_us = seen.ordered and exited.signal == signal.SIGKILL and seen.reply is not None
    if exited.signal is not None and not by_us:
        return *_by_signal(exited.signal, seen.mechanisms), None
    if seen.reply is not None:
        if seen.reply.status in _BLAMES_US and exited.exit_code != 0:
            return Status.CRASHED, f"the child blamed the sandbox ({seen.reply.status.value}) and did not exit", None
        return seen.reply.status, printable(seen.reply.detail), None
    if seen.truncated:
        return Status.PROTOCOL_ERROR, "the reply is truncated", None
    if exited.exit_code == EXIT_MEMORY:
        return Status.MEMORY_LIMIT, "an allocation failed under limits.memory_bytes", None
    if exited.exit_code is not None and not seen.started:
        # Nothing of the job was unpickled yet: no reason to take its graph for one that kills.
        lines = seen.last_words.strip().splitlines()
        why = _OURS.get(exited.exit_code, f"the child exited with {exited.exit_code} before it began")
        return Status.SANDBOX_ERROR, f"{why}: {printable(lines[-1]) if lines else 'no word'}", None
    return Status.CRASHED, f"the child exited with {exited.exit_code} without a reply", None


def _by_call(name: str) -> tuple[Status, str]:
    return Status.VIOLATION, f"made a forbidden system call: {printable(name)}"


def _by_signal(number: int, mechanisms: dict[str, Mechanism]) -> tuple[Status, str]:
    name = signal_name(number)
    if number == signal.SIGXCPU:
        return Status.CPU_LIMIT, f"died of {name}: RLIMIT_CPU behind limits.cpu_seconds"
    if number == signal.SIGXFSZ:
        return Status.OUTPUT_LIMIT, f"died of {name}: RLIMIT_FSIZE behind limits.disk_bytes"
    seccomp = mechanisms.get("seccomp")
    # Only a filter without a listener kills by itself.
    if number == signal.SIGSYS and seccomp is not None and seccomp.state is State.PARTIAL:
        return Status.VIOLATION, f"died of {name}: a system call that the seccomp filter forbids"
    hint = " (nobody of ours sent it; perhaps the kernel's out-of-memory killer)" if number == signal.SIGKILL else ""
    return Status.CRASHED, f"the child died of {name}{hint}"


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11; `signal 40` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

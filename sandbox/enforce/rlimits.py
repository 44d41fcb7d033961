"""Kernel limits per process: the hard stop behind the watchdog.

What is deliberately not set: RLIMIT_AS, because CUDA reserves far more addresses than memory; RLIMIT_NPROC, because
it counts per user, over all containers of the host, and spares root; RLIMIT_MEMLOCK, because pinned buffers need it.
"""

from __future__ import annotations

import math
import resource
import signal
from typing import NamedTuple

from sandbox.limits import Demand, Limits
from sandbox.results import Mechanism, State


class _Wanted(NamedTuple):
    name: str
    which: int
    soft: int
    hard: int


def apply(demand: Demand, limits: Limits) -> Mechanism:
    """Set the limits on this process and all that it will start.

    A limit that the host holds lower stays lower, and the state is `partial`, with the name of the limit in the
    reason: a job then fails earlier than its policy says.
    """
    if demand == "off":
        return Mechanism(state=State.OFF)
    reasons = []
    failed = 0
    wanted = _wanted(limits)
    for limit in wanted:
        try:
            reason = _set(limit)
        except (OSError, ValueError) as error:
            failed += 1
            reason = f"{limit.name} could not be set: {error}"
        if reason:
            reasons.append(reason)
    # Python ignores SIGXFSZ, so that a write past the limit is only an OSError, which compilers' caches swallow. The
    # default action ends the process, and the signal says why.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if failed == len(wanted):
        return Mechanism(state=State.UNAVAILABLE, reason="; ".join(reasons))
    if reasons:
        return Mechanism(state=State.PARTIAL, reason="; ".join(reasons))
    return Mechanism(state=State.ENFORCED)


def lower_memory(limit_bytes: int) -> None:
    """Lower the limit on memory that :func:`apply` has set, if it has, to so much from now on: a job may be granted
    less than its policy says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    lower = data_bytes() + limit_bytes
    if soft != resource.RLIM_INFINITY and lower < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (lower, min(lower, hard)))


def _wanted(limits: Limits) -> list[_Wanted]:
    data = data_bytes() + limits.memory_bytes
    # One second more than the watchdog allows, so that its word, which counts the whole tree, comes first. SIGXCPU
    # at the soft limit tells what happened; SIGKILL at the hard limit is for those that catch it.
    cpu = math.ceil(limits.cpu_seconds) + 1
    return [
        _Wanted("RLIMIT_DATA", resource.RLIMIT_DATA, data, data),
        _Wanted("RLIMIT_CPU", resource.RLIMIT_CPU, cpu, cpu + 1),
        _Wanted("RLIMIT_NOFILE", resource.RLIMIT_NOFILE, limits.open_files, limits.open_files),
        _Wanted("RLIMIT_FSIZE", resource.RLIMIT_FSIZE, limits.disk_bytes, limits.disk_bytes),
        # POSIX message queues outlive their processes, and no compiler uses them.
        _Wanted("RLIMIT_MSGQUEUE", resource.RLIMIT_MSGQUEUE, 0, 0),
        # 1, not 0: a core_pattern that pipes to a program (systemd-coredump, apport) ignores 0, but the kernel
        # takes 1 as "no dump" there, and a file of one byte is too small to be begun.
        _Wanted("RLIMIT_CORE", resource.RLIMIT_CORE, 1, 1),
    ]


def _set(limit: _Wanted) -> str:
    """Set one limit, as far as the host's hard limit allows. Returns what is not as wanted, or ""."""
    _, ceiling = resource.getrlimit(limit.which)
    soft, hard = limit.soft, limit.hard
    lower = ceiling != resource.RLIM_INFINITY and ceiling < hard
    if lower:
        soft, hard = min(soft, ceiling), ceiling
    resource.setrlimit(limit.which, (soft, hard))
    if lower and limit.which != resource.RLIMIT_CORE:
        return f"{limit.name} is {ceiling}, the host's hard limit, not {limit.hard}"
    return ""


def data_bytes() -> int:
    """Size of this process's private writable memory (VmData), in bytes: what RLIMIT_DATA counts.

    In a fork of the template it holds the template's; the limit of a job comes on top. 0 where the kernel does not
    tell (gVisor): then the limit is the stricter for it.
    """
    with open("/proc/self/status", "rb", buffering=0) as status:
        for line in status.read(65_536).splitlines():
            if line.startswith(b"VmData:"):
                return int(line.split()[1]) * 1024
    return 0

"""What a process may become and with whom it dies: prctl(2), umask, the out-of-memory killer's choice."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

from sandbox.enforce import libc
from sandbox.limits import Demand
from sandbox.results import Mechanism, State

#: Being root means nothing, a change of user brings no capability back, none can be made ambient; all of it locked.
_SECUREBITS: Final = 0b1110_1111


def become_subreaper() -> None:
    """Make this process the parent of every orphan below it.

    Raises:
        OSError: if the kernel refuses (none since Linux 3.4 does).
    """
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: signal.Signals, expected_ppid: int) -> None:
    """Have the kernel send this process a signal when its parent dies; if it is dead already, end at once.

    "Parent" is the *thread* that forked: with a parent of many threads, the signal comes when that thread ends.
    The setting is lost in a fork, and when a set-uid program is executed.

    Raises:
        OSError: if the kernel refuses.
    """
    libc.prctl(libc.PR_SET_PDEATHSIG, number)
    if os.getppid() != expected_ppid:
        os.kill(os.getpid(), number)
        # Only reached when the signal is blocked or handled.
        os._exit(128 + number)


def forbid_new_privileges(demand: Demand) -> Mechanism:
    """Set no_new_privs: no program executed from here on gains rights from set-uid bits or file capabilities."""
    if demand == "off":
        return Mechanism(state=State.OFF)
    try:
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        reached = libc.prctl(libc.PR_GET_NO_NEW_PRIVS) == 1
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    if not reached:
        return Mechanism(state=State.UNAVAILABLE, reason="the kernel accepted it but does not report it as set")
    return Mechanism(state=State.ENFORCED)


def drop_capabilities(demand: Demand) -> Mechanism:
    """Empty every set of capabilities, so that a child of root can do no more than any user who owns root's files."""
    if demand == "off":
        return Mechanism(state=State.OFF)
    # The bounding set and the secure bits need CAP_SETPCAP: who has not got it has little to give up.
    with contextlib.suppress(OSError):
        for number in range(64):  # EINVAL after the last that the kernel knows
            libc.prctl(libc.PR_CAPBSET_DROP, number)
    with contextlib.suppress(OSError):
        libc.prctl(libc.PR_SET_SECUREBITS, _SECUREBITS)
    with contextlib.suppress(OSError):  # Linux before 4.3 has no ambient set; what is left of it shows below
        libc.prctl(libc.PR_CAP_AMBIENT, libc.PR_CAP_AMBIENT_CLEAR_ALL)
    try:
        libc.drop_capabilities()
        left = {name: mask for name, mask in _capabilities().items() if mask}
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    if set(left) - {"CapBnd"}:
        return Mechanism(state=State.UNAVAILABLE, reason=f"the kernel accepted it but still reports {left}")
    if left and libc.prctl(libc.PR_GET_NO_NEW_PRIVS) != 1:
        return Mechanism(state=State.PARTIAL, reason="a program with file capabilities or set-uid bit brings some back")
    return Mechanism(state=State.ENFORCED)


def _capabilities() -> dict[str, int]:
    """The capability sets of this process, by the kernel's names for them."""
    with open("/proc/self/status", "rb", buffering=0) as status:
        lines = (line.split() for line in status.read(65_536).splitlines() if line.startswith(b"Cap"))
        return {line[0].decode().rstrip(":"): int(line[1], 16) for line in lines}


def adopt_orphans(demand: Demand) -> Mechanism:
    """Become the subreaper, as the mechanism ``process_tree``."""
    if demand == "off":
        return Mechanism(state=State.OFF)
    try:
        become_subreaper()
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    return Mechanism(state=State.ENFORCED)


def prefer_as_oom_victim() -> bool:
    """Make the kernel's out-of-memory killer choose this process and its children before the service.

    Returns whether it took; it is no mechanism of the policy, only a courtesy to the host, so a kernel without it
    (gVisor) is no failure.
    """
    try:
        handle = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False  # said in the docstring
    try:
        os.write(handle, b"1000")
        return True
    except OSError:
        return False  # said in the docstring
    finally:
        os.close(handle)

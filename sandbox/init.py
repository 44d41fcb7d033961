"""The first process of a job, forked by its keeper: it finishes the namespaces, then becomes or starts the worker.

    keeper  (the host's process ids)
      └─ init  (pid 1 of the job's)
          └─ worker  (pid 2)
              └─ g++, ptxas, …

With own process ids it stays as their init: the kernel gives it every orphan, and kills all of them with it. It is
not the worker itself, because the kernel lets no signal of default action from inside reach pid 1: an abort would
not end it. It tells the keeper how the worker ended and then waits to be killed, so that the keeper can first list
what is still running. It runs no code of the job and holds none of its descriptors, but it lies within the job's
reach: what it reports is not proof.

Without own process ids this process is the worker.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NoReturn

from sandbox.child import EXIT_UNCONFINED
from sandbox.enforce import cgroups, check, libc, namespaces
from sandbox.enforce.privileges import prefer_as_oom_victim
from sandbox.errors import EnforcementError
from sandbox.limits import Confinement
from sandbox.results import Enforcement

#: Seconds from the fork until the worker is there: a mount may have to wait for a file server.
START_SECONDS: Final = 30.0
_MAX_MESSAGE: Final = 64 << 10
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


def channel() -> tuple[socket.socket, socket.socket]:
    """The keeper's end, which is told the sender's pid by the kernel, and that of :func:`main`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def receive(ours: socket.socket) -> tuple[dict[str, Any], int]:
    """One message and the pid of its sender, as this process sees it. An empty one at the end, or if it is garbage:
    the job may have got hold of the other end.

    Raises:
        TimeoutError: none came in time.
    """
    data, ancillary, _flags, _address = ours.recvmsg(_MAX_MESSAGE, socket.CMSG_SPACE(_CREDENTIALS.size))
    pid = next((_CREDENTIALS.unpack(d)[0] for _, kind, d in ancillary if kind == socket.SCM_CREDENTIALS), 0)
    try:
        message = json.loads(data)
    except ValueError:
        return {}, pid
    return message if isinstance(message, dict) else {}, pid


def main(
    report: socket.socket,
    entered: namespaces.Entered,
    confinement: Confinement,
    scratch: Path,
    read: Iterable[str],
    group: cgroups.Group | None,
    run: Callable[[int], NoReturn],
) -> NoReturn:
    """Run in the fork of the keeper. ``run`` is the worker's part; it is given the pid of the worker's parent."""
    keeper = os.getppid()
    try:
        # Before /proc becomes read-only; the worker inherits it.
        prefer_as_oom_victim()
        states = namespaces.close_off(entered, scratch, read)
        check(confinement, states)
        if entered.own_pids:
            os.chdir("/")
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)  # which means for pid 1: not from inside
            # Our parent has no pid in here. If it is dead already, the message below finds nobody.
            libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
        _send(report, {"states": Enforcement(mechanisms=states).model_dump(mode="json")})
        if entered.own_pids:
            keeper = os.getpid()
            worker = os.fork()
            if worker:
                _reap(report, worker)
    except EnforcementError as error:
        _send(report, {"refused": str(error)})
        os._exit(EXIT_UNCONFINED)
    except BaseException:  # noqa: BLE001 - a fork of the keeper must never return into it
        _send(report, {"failed": traceback.format_exc()[-3000:]})
        os._exit(1)
    _begin(report, confinement, group)
    run(keeper)


def _begin(report: socket.socket, confinement: Confinement, group: cgroups.Group | None) -> None:
    """In the worker: into the cgroup before anything is run or allocated for the job."""
    problem = ""
    if group is not None:
        try:
            group.join()
        except OSError as error:
            problem = f"the cgroup was made but cannot be joined: {libc.reason(error)}"
    _send(report, {"worker": True, "cgroup": problem})
    report.close()
    if problem and confinement.cgroup == "require":
        os._exit(EXIT_UNCONFINED)


def _reap(report: socket.socket, worker: int) -> NoReturn:
    """As pid 1: collect what ends, tell of the worker, and wait to be killed."""
    keep_only({report.fileno()})
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            signal.pause()
            continue
        if pid == worker:
            _send(report, {"status": status, "cpu_seconds": usage.ru_utime + usage.ru_stime})


def _send(report: socket.socket, message: dict[str, Any]) -> None:
    try:
        report.send(json.dumps(message).encode())
    except OSError:
        os._exit(1)  # the keeper is dead; nobody is left to tell


def keep_only(keep: set[int]) -> None:
    """Close every descriptor but 0, 1, 2 and ``keep``."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))

"""The template process: imports torch once, warms up, and forks one keeper per job.

It runs in a process of its own (`python -c`, started by :mod:`sandbox.forkserver`), never in the parent:

    parent ──control socket──▶ template ──fork──▶ keeper ──fork──▶ worker ──fork──▶ g++, ptxas, …

It is the only process that forks while holding torch, so it must have exactly one OS thread whenever it does:
this is checked at every fork, since a second thread (an OpenMP team, say) would leave locks held in the child.
Nothing of a job runs here. It ends when the control socket closes, that is, when the parent is gone.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from sandbox import hugepages, keeper, ledger, scratch, trackers
from sandbox.enforce import cgroups, libc, prepare_template
from sandbox.enforce.privileges import become_subreaper, die_with_parent
from sandbox.limits import Confinement, Limits
from sandbox.processes import Process, descendants, read_stat
from sandbox.results import printable

#: Control messages are small; what is larger (spec, payload) goes to the worker by the job's own socket.
MAX_MESSAGE = 64 * 1024
#: Leaks of the template in one answer, a count at most. An upgrade of packages takes the names from hundreds of files
#: that it has mapped, and a message has an end.
MAX_TOLD = 100
#: Seconds that ended threads may take to leave the kernel's list after the warm-up.
THREAD_SECONDS = 1.0
#: Seconds that a child which has ended may take to be gone, before it counts as a zombie.
REAP_SECONDS = 0.02
#: Seconds for the kill of processes that outlived their keepers; the parent waits for the answer meanwhile.
STRAY_SECONDS = 2.0
#: Seconds that keepers get to clean up once the parent is gone, before they are killed, too.
GRACE_SECONDS = 1.0


def main(control_fd: int) -> None:
    """Serve fork requests until the parent is gone. Never returns."""
    # Inherited from the thread that started us. Without SIGCHLD no keeper would see a worker's end.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    control = socket.socket(fileno=control_fd)
    settings = json.loads(control.recv(MAX_MESSAGE))
    # A preloaded module may hang in C code, where no handler of ours runs.
    die_with_parent(signal.SIGKILL, settings["parent_pid"])
    # Ctrl-C and a polite kill of the session are the parent's to handle; it ends us by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = settings["sys_path"]
    try:
        report = _warm(settings)
    except BaseException as error:  # whatever it is, the parent must be told why
        _send(control, {"event": "failed", "reason": f"{type(error).__name__}: {error}"})
        raise
    become_subreaper()
    # Keepers report by their own sockets; the kernel reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # From here on the loop below sees the parent's end and cleans up after it; the signal wakes it if it was stopped.
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGCONT)
    gc.collect()
    gc.freeze()  # the collector must not touch, and so copy, pages that children share
    _send(control, {"event": "ready", **report, "huge_bytes": hugepages.collapse()})
    _serve(control, Path(settings["root"]), settings["cgroup_parent"])


def _warm(settings: dict[str, Any]) -> dict[str, Any]:
    """Import and warm up as the policy says; returns facts for the parent."""
    started = time.monotonic()
    if settings["import_torch"]:
        # By name, as a worker does it: this module itself knows no torch.
        importlib.import_module("sandbox.inductor.job")
        importlib.import_module("sandbox.inductor.warmup").prepare(settings["warm_up"], settings["gpus_hidden"])
    importlib.import_module(trackers.TRACKER)
    importlib.import_module("sandbox.callables")
    for module in settings["preload"]:
        importlib.import_module(module)
    prepare_template(os.environ)
    # A thread that was joined may take a moment to be gone from the kernel's list.
    deadline = time.monotonic() + THREAD_SECONDS
    while (threads := thread_count()) != 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    if threads != 1:
        raise RuntimeError(
            f"the template has {threads} OS threads after its warm-up ({', '.join(_thread_names())}); forking it would "
            f"be unsafe. A module in forkserver.preload may have started one: {settings['preload']}"
        )
    return {"pid": os.getpid(), "seconds": time.monotonic() - started, "threads": threads}


def _serve(control: socket.socket, root: Path, cgroup_parent: str) -> None:
    keepers: set[tuple[int, int]] = set()  # pid and start time: a pid alone may be somebody else's by now
    before, grown = ledger.take(ipc=False), dict[str, str]()
    while True:
        try:
            message, fds, _flags, _address = socket.recv_fds(control, MAX_MESSAGE, 8)
        except ConnectionResetError:
            message, fds = b"", []
        if not message:
            _outlive_parent(root, cgroup_parent)
        request = json.loads(message)
        strays = _kill_strays(keepers)
        if request["op"] == "leave":
            os._exit(0)
        if request["op"] == "fork":
            answer = _fork(request, fds, keepers)
            for fd in fds:
                os.close(fd)  # theirs: whoever waits for their end must not wait for us
            _send(control, {**answer, "strays": strays, "leaks": grown})
            if thread_count() != 1:
                os._exit(1)  # it would refuse for ever: a new one can fork, and the keepers go on without us
            if answer.get("cgroup") and not request["standby"]:
                cgroups.stir()
        # After the answer to a fork, so that no job waits for it: what has grown is told with the next answer.
        grown = _grown(before)
        if request["op"] == "inspect":
            _send(control, {"event": "inspected", "threads": thread_count(), "strays": strays, "leaks": grown})


def _grown(before: ledger.Snapshot) -> dict[str, str]:
    """What this process holds that it did not hold before its first fork: kind by description."""
    held = ledger.differences(before, ledger.take(ipc=False))
    if any(each.kind == "zombie" for each in held):
        time.sleep(REAP_SECONDS)  # the kernel may be about to reap it
        held = ledger.differences(before, ledger.take(ipc=False))
    # Children are keepers, and whatever else is among them is killed as a stray.
    grown = [each for each in held if each.kind != "process"][:MAX_TOLD]
    return {printable(each.text, ledger.MAX_TEXT): each.kind for each in grown}


def _lives(pid: int, start_ticks: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.start_ticks == start_ticks and not stat.dead


def _children() -> list[Process]:
    own = os.getpid()
    return [process for process in descendants(own) if process.ppid == own]


def _kill_strays(keepers: set[tuple[int, int]]) -> int:
    """Kill the processes whose keeper was killed: they are handed to us, the subreaper. Returns how many.

    One that forks and exits as fast as it can is a new pid each time, so all are killed until none is seen.
    """
    killed = 0
    deadline = time.monotonic() + STRAY_SECONDS
    while True:
        # Each is asked for by its pid. The kernel's list of our children may lack some when others end meanwhile
        # (proc_tid_children(5)): a keeper that it lacked once would be a stray the next time.
        keepers.difference_update({(pid, ticks) for pid, ticks in keepers if not _lives(pid, ticks)})
        strays = [process for process in _children() if (process.pid, process.start_ticks) not in keepers]
        if not strays or time.monotonic() > deadline:
            return killed
        below = [process for stray in strays for process in descendants(stray.pid)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in (*strays, *below):
                try:
                    os.kill(process.pid, number)
                except ProcessLookupError:
                    continue  # gone
        killed += len(strays)


def _fork(request: dict[str, Any], fds: list[int], keepers: set[tuple[int, int]]) -> dict[str, Any]:
    threads = thread_count()
    if threads != 1:
        return {"event": "refused", "job_id": request["job_id"], "reason": f"{threads} OS threads in the template"}
    folder = Path(request["scratch"])
    try:
        confinement = Confinement.model_validate_json(request["confinement"])
        limits = Limits.model_validate_json(request["limits"])
        # Not by the keeper, which would wait for the lock that our own move into a cgroup holds: see `cgroups.stir`.
        state, group = cgroups.enter(confinement, limits, cgroups.group_name(folder))
    except Exception as error:  # noqa: BLE001 - one job's trouble; the others need the template
        return {"event": "refused", "job_id": request["job_id"], "reason": f"{type(error).__name__}: {error}"[:2000]}
    order = keeper.Order(
        job_id=request["job_id"],
        folder=folder,
        standby=request["standby"],
        gpu=request["gpu"],
        confinement=confinement,
        limits=limits,
        state=state,
        group=group,
    )
    try:
        pid = libc.fork()
    except OSError as error:
        if group is not None:
            group.close()
            group.remove()
        return {"event": "refused", "job_id": request["job_id"], "reason": f"fork failed: {error}"}
    if pid == 0:
        keeper.main(order, fds)  # never returns
    if group is not None:
        group.close()
    stat = read_stat(pid)
    start_ticks = stat.start_ticks if stat is not None else 0  # None: it has ended already
    keepers.add((pid, start_ticks))
    return {
        "event": "forked",
        "job_id": request["job_id"],
        "pid": pid,
        "start_ticks": start_ticks,
        "cgroup": group is not None,
    }


def thread_count() -> int:
    """OS threads of this process, a count."""
    return len(os.listdir("/proc/self/task"))


def _thread_names() -> list[str]:
    return [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    try:
        control.send(json.dumps(message).encode()[:MAX_MESSAGE])
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent is gone: the next read sees the end


def _outlive_parent(root: Path, cgroup_parent: str) -> NoReturn:
    """The parent is gone without a word: see that every job ends, then remove the root, and end.

    Keepers have seen the same end of file and clean up; one that a job has stopped cannot, and is killed.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while _children() and time.monotonic() < deadline:
        time.sleep(0.01)
    _kill_strays(set())
    cgroups.sweep(cgroups.group_names(root), cgroup_parent)
    scratch.remove(root)
    os._exit(0)

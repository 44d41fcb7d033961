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
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from sandbox import keeper
from sandbox.enforce.privileges import become_subreaper, die_with_parent
from sandbox.processes import descendants, kill_tree

#: Control messages are small; what is larger (spec, payload) goes to the worker by the job's own socket.
MAX_MESSAGE = 64 * 1024
#: Seconds that ended threads may take to leave the kernel's list after the warm-up.
THREAD_SECONDS = 1.0


def main(control_fd: int) -> None:
    """Serve fork requests until the parent is gone. Never returns."""
    control = socket.socket(fileno=control_fd)
    settings = json.loads(control.recv(MAX_MESSAGE))
    root = settings["root"]
    parent: int = settings["parent_pid"]
    signal.signal(signal.SIGTERM, lambda *_: _leave(root, parent))
    # Ctrl-C in a terminal is the parent's to handle; it ends us by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGTERM, parent)
    sys.path[:] = settings["sys_path"]
    try:
        report = _warm(settings)
    except BaseException as error:  # whatever it is, the parent must be told why
        _send(control, {"event": "failed", "reason": f"{type(error).__name__}: {error}"})
        raise
    become_subreaper()
    # Keepers report by their own sockets; the kernel reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # the collector must not touch, and so copy, pages that children share
    _send(control, {"event": "ready", **report})
    _serve(control, root, parent)


def _warm(settings: dict[str, Any]) -> dict[str, Any]:
    """Import and warm up as the policy says; returns facts for the parent."""
    started = time.monotonic()
    if settings["import_torch"]:
        # By name, as a worker does it: this module itself knows no torch.
        importlib.import_module("sandbox.inductor.job")
        if settings["warm_up"]:
            importlib.import_module("sandbox.inductor.compile").warm_up()
    for module in settings["preload"]:
        importlib.import_module(module)
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


def _serve(control: socket.socket, root: str, parent: int) -> None:
    keepers: set[int] = set()
    while True:
        try:
            message, fds, _flags, _address = socket.recv_fds(control, MAX_MESSAGE, 8)
        except ConnectionResetError:
            message, fds = b"", []
        if not message:
            _leave(root, parent)
        request = json.loads(message)
        # The kernel reaps keepers (SIGCHLD is ignored), so a pid that is no child any more has ended.
        children = {process.pid for process in descendants(os.getpid()) if process.ppid == os.getpid()}
        keepers &= children
        for stray in children - keepers:
            # A process whose keeper was killed is handed to us, its subreaper.
            kill_tree(stray, include_root=True)
        if request["op"] == "fork":
            _send(control, _fork(control, request, fds, keepers))
        elif request["op"] == "inspect":
            _send(control, {"event": "inspected", "threads": thread_count(), "fds": _open_fds(), "strays": 0})
        for fd in fds:
            os.close(fd)


def _fork(control: socket.socket, request: dict[str, Any], fds: list[int], keepers: set[int]) -> dict[str, Any]:
    threads = thread_count()
    if threads != 1:
        return {"event": "refused", "job_id": request["job_id"], "reason": f"{threads} OS threads in the template"}
    try:
        pid = os.fork()
    except OSError as error:
        return {"event": "refused", "job_id": request["job_id"], "reason": f"fork failed: {error}"}
    if pid == 0:
        keeper.main(request, fds)  # never returns
    keepers.add(pid)
    return {"event": "forked", "job_id": request["job_id"], "pid": pid, "fds": _open_fds(), "threads": threads}


def thread_count() -> int:
    """OS threads of this process, a count."""
    return len(os.listdir("/proc/self/task"))


def _thread_names() -> list[str]:
    return [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    try:
        control.send(json.dumps(message).encode()[:MAX_MESSAGE])
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent is gone; nobody is left to tell


def _leave(root: str, parent: int) -> None:
    """End. If the parent is gone, nobody else removes the scratch root; while it lives, its jobs need it."""
    if os.getppid() != parent:
        shutil.rmtree(root, ignore_errors=True)
    os._exit(0)

"""Preloaded into the test template: breaks a phase of the worker in the manner that the job's environment names.

`SANDBOX_TEST_FAULT=PHASE:MANNER`. The production code has no hook for this: its functions are replaced here, in the
template, before anything is forked.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from sandbox import child

PHASES = ("check_spec", "unpickle", "run", "build", "send_reply", "leave")
MIB = 1 << 20


def _raise() -> None:
    raise RuntimeError("injected")


def _memory_hog() -> None:
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1024)) * (8 * 1024))


def _fork_bomb() -> None:
    # The limit of the job kills it; this bound is for the case that it does not.
    for _ in range(400):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    time.sleep(60)


def _fd_hog() -> None:
    kept = []
    while len(kept) < 100_000:
        kept.append(os.open(os.devnull, os.O_RDONLY))


def _disk_hog() -> None:
    for number in range(4000):
        with open(f"hog-{number}", "wb") as file:
            file.write(bytes(MIB))


def _stderr_flood() -> None:
    for _ in range(100_000):
        os.write(2, b"flood " * 1000)


def _garbage() -> None:
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), b"this is not a frame, it is garbage of a compiler gone mad " * 4)
        except OSError:
            pass


def _stays() -> None:
    """A grandchild in a session of its own that outlives the worker."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(120)
        os._exit(0)


def _busy() -> None:
    while True:
        pass


MANNERS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "sys_exit": lambda: sys.exit(3),
    "os_exit": lambda: os._exit(3),
    "sigsegv": lambda: ctypes.string_at(0),
    "sigabrt": lambda: os.abort(),
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigstop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "busy_loop": _busy,
    "memory_hog": _memory_hog,
    "fork_bomb": _fork_bomb,
    "fd_hog": _fd_hog,
    "disk_hog": _disk_hog,
    "stderr_flood": _stderr_flood,
    "garbage_reply": _garbage,
    "setsid_grandchild": _stays,
}


def compiler(manner: str) -> None:
    """A compiler that goes wrong; when it runs out of memory it says what GCC's cc1plus says."""
    try:
        MANNERS[manner]()
    except MemoryError:
        print("cc1plus: out of memory allocating 65536 bytes")
        sys.exit(1)


def build() -> int:
    """The job of the table: it has a compiler run, as a process of its own, and waits for it."""
    fault = os.environ.get("SANDBOX_TEST_FAULT", ":")
    phase, manner = fault.split(":")
    code = "print('built')"
    if phase == "build":
        code = f"import faultpoints; faultpoints.compiler({manner!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("compiler.out", "w+") as output:  # a file: a survivor that holds a pipe would hold us up
        done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=output)
        output.seek(0)
        if done.returncode:
            raise RuntimeError(f"the compiler ended with {done.returncode}: {output.read(1000)}")
    return 42


def _broken(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        fault = os.environ.get("SANDBOX_TEST_FAULT", ":")
        if phase == "check_spec":
            fault = json.loads(args[0].envelope)["environment"].get("SANDBOX_TEST_FAULT", ":")
        wanted, manner = fault.split(":")
        if wanted == phase:
            MANNERS[manner]()
        return function(*args, **kwargs)

    return replacement


for _phase in PHASES:
    if _phase != "build":
        setattr(child, _phase, _broken(_phase, getattr(child, _phase)))

__all__ = ["MANNERS", "PHASES", "build", "socket"]

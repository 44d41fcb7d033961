"""What the hostile programs of tests/testcases/escape share, and how one is run: all of this is the job's side.

Preloaded into the template of the escape tests, so that a program needs no import from a disk that it may not read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import pickle
import platform
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

#: System calls that Python has no name for: (x86-64, aarch64).
NUMBERS = {
    "add_key": (248, 217), "bpf": (321, 280), "clone": (56, 220), "clone3": (435, 435), "delete_module": (176, 106),
    "execveat": (322, 281), "fsopen": (430, 430), "init_module": (175, 105), "io_uring_setup": (425, 425),
    "iopl": (172, -1), "kexec_load": (246, 104), "keyctl": (250, 219), "landlock_create_ruleset": (444, 444),
    "mount": (165, 40), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pivot_root": (155, 41), "process_vm_readv": (310, 270),
    "ptrace": (101, 117), "reboot": (169, 142), "sethostname": (170, 161), "setns": (308, 268), "syslog": (103, 116),
    "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282),
}  # fmt: skip
CLONE_PARENT, CLONE_NEWNS, CLONE_NEWUSER = 0x00008000, 0x00020000, 0x10000000
_MACHINE = ("x86_64", "aarch64").index(platform.machine())
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Absent(Exception):
    """The attempt cannot be made here at all, and why: there is nothing of its kind to attack."""


def call(name: str, *arguments: int | bytes | ctypes.Array[Any] | None) -> int:
    """A system call by name. Raises OSError, Absent."""
    number = NUMBERS[name][_MACHINE]
    if number < 0:
        raise Absent(f"no {name} on {platform.machine()}")
    return numbered(number, *arguments)


def numbered(number: int, *arguments: int | bytes | ctypes.Array[Any] | None) -> int:
    """A system call by its number. Raises OSError."""
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    ctypes.set_errno(0)
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def reaches(expected: int | tuple[int, ...], name: str, *arguments: Any) -> str:
    """A call with arguments that make it fail with ``expected`` once it has passed the check of rights, so that
    whoever has the right does no harm with it. Raises OSError if it fails before that."""
    try:
        call(name, *arguments)
    except OSError as error:
        if error.errno not in (expected if isinstance(expected, tuple) else (expected,)):
            raise
    return f"{name} passed the check of rights"


def forked(function: Callable[[], Any]) -> Any:
    """``function()`` in a child of this job, for what would spoil the worker itself. Raises its OSError."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = [0, function()]
            except OSError as error:
                answer = [error.errno or errno.EIO, None]
            os.write(write, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):  # a filter that kills: the worker dies of the same
        os.kill(os.getpid(), os.WTERMSIG(status))
    number, value = json.loads(text)
    if number:
        raise OSError(number, os.strerror(number))
    return value


def keeper() -> int:
    """The pid of the process above the worker. Raises ProcessLookupError where it has none that we could name."""
    if os.getppid() == 0:
        raise ProcessLookupError(errno.ESRCH, "the keeper has no number in this PID namespace")
    return os.getppid()


def set_name(name: str) -> None:
    """What `ps` calls this process: at most 15 characters."""
    _libc.prctl(15, name.encode()[:15], 0, 0, 0)


def set_dumpable(value: int) -> None:
    """prctl(PR_SET_DUMPABLE). Raises OSError."""
    if _libc.prctl(4, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def detach(name: str) -> bool:
    """Leave the job by a session of one's own and a double fork. True in the survivor, whose name is ``name``."""
    if os.fork():
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    set_name(name)
    return True


def read_by(command: list[str], **settings: Any) -> str:
    """What another program prints. Raises OSError for EACCES if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
    if done.returncode:
        raise PermissionError(errno.EACCES, done.stdout[-200:])
    return done.stdout


def channel() -> int:
    """The worker's own socket."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                return int(name)
    raise Absent("no socket")


def frame(kind: str, payload: bytes = b"", **envelope: Any) -> bytes:
    """A frame of the wire, in the name of this job unless ``envelope`` says otherwise."""
    own = os.path.basename(os.getcwd()).rpartition("-")[0]
    head = json.dumps({"kind": kind, "job_id": own, **envelope}).encode()
    digest = hashlib.sha256(head + payload).digest()
    return struct.pack("!4sIQ32s", b"SBX1", len(head), len(payload), digest) + head + payload


def reply(value: Any = 42, path: str | None = None, content: bytes = b"", **envelope: Any) -> bytes:
    """A reply that says all is well, and hands back one file of the given content, if a path is given."""
    if path is not None:
        item = {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        envelope.setdefault("artifacts", [item])
    return frame("reply", pickle.dumps(value, 5), status="ok", **envelope)


def say(data: bytes) -> None:
    """Write on the worker's channel, and end without the worker's own reply."""
    os.write(channel(), data)
    os._exit(0)


def own_artifact(mark: str, name: str) -> str:
    """A path for a kernel in the job's own folder; it is handed back as `inductor/zz/MARK.NAME`."""
    os.makedirs("artifacts/inductor/zz", exist_ok=True)
    return f"artifacts/inductor/zz/{mark}.{name}"


def capabilities(status: str, which: str = "CapEff") -> int:
    """The capabilities in the text of a /proc/PID/status, as a bit mask."""
    return int(status.split(f"{which}:")[1].split()[0], 16)


def raise_capabilities() -> None:
    """capset(2) with all that the bounding set lets one have. Raises OSError."""
    with open("/proc/self/status") as file:
        most = capabilities(file.read(), "CapBnd")
    low, high = most & 0xFFFFFFFF, most >> 32
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def cgroup_files(of_service: str) -> list[tuple[str, str]]:
    """(root of the hierarchy, own group) per hierarchy in which this job is in another group than the service.

    Raises Absent where there is none.
    """
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split() for line in file]
    with open("/proc/self/cgroup") as file:
        lines = file.read().splitlines()
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if line in of_service.splitlines() or path == "/":
            continue
        for words in mounts:
            kind, options = words[words.index("-") + 1], words[-1].split(",")
            if (kind == "cgroup2" and not controllers) or (kind == "cgroup" and controllers.split(",")[0] in options):
                found.append((words[4], words[4] + path))
    if not found:
        raise Absent("no control group of its own")
    return found


def run(name: str, source: str, at: dict[str, Any]) -> dict[str, Any]:
    """The job: make the attempt, and say how it went as far as the program knows."""
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    try:
        return {"outcome": "returned", "got": names["attempt"](SimpleNamespace(**at))}
    except Absent as reason:
        return {"outcome": "absent", "how": str(reason)}
    except OSError as error:
        return {
            "outcome": "refused",
            "how": errno.errorcode.get(error.errno or 0, type(error).__name__),
            "text": str(error),
        }


def sibling(token: str, mark: str) -> None:
    """A job beside the hostile ones, with something of each kind to take from it or to do to it."""
    from _multiprocessing import SemLock

    signal.signal(signal.SIGRTMIN + 1, lambda *_: open("signalled", "w").close())
    for name in ("precious", "doomed"):
        with open(name, "w") as file:
            file.write(token)
    held = open("held", "w+")
    held.write(token)
    held.flush()
    os.unlink("held")
    buffer = ctypes.create_string_buffer(token.encode())
    with contextlib.suppress(OSError), open(f"/dev/shm/{mark}", "w") as shared:
        shared.write(token)
    semaphore = None
    with contextlib.suppress(OSError):
        semaphore = SemLock(1, 1, 1, f"/{mark}-semaphore", False)
    with open("facts.new", "w") as file:
        json.dump({"address": ctypes.addressof(buffer), "fd": held.fileno()}, file)
    os.rename("facts.new", "facts")
    while not os.path.exists("stop"):
        time.sleep(0.02)
    del semaphore, buffer

"""The kinds of faults: what goes wrong, where it can, and the limits under which it shows soon.

A fault is a kind at a point. Points are named after the process that has the fault and what it is doing then:

    host        for as long as the injection lasts: the state of the host process itself
    parent.*    in the host process, around one job
    forkserver.*, keeper.*, child.*    in that process, around one job; `child` is the worker
    wire.*      in the frame of that name, in the process that sends it
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from sandbox.limits import MIB

CHILD: Final = tuple(
    f"child.{phase}"
    for phase in ("receive", "check_spec", "confine", "unpickle", "run", "spawn", "collect", "send_reply", "leave")
)
KEEPER: Final = ("keeper.confine", "keeper.wait", "keeper.clean")
FORKSERVER: Final = ("forkserver.before_fork", "forkserver.during_fork", "forkserver.after_fork")
WIRE: Final = ("wire.request", "wire.started", "wire.reply", "wire.ready", "wire.exited")
PARENT: Final = ("parent.run", "parent.folder", "parent.fork", "parent.watch", "parent.adopt")
HOST: Final = ("host",)
#: Every injection point.
POINTS: Final = (*HOST, *PARENT, *FORKSERVER, *KEEPER, *CHILD, *WIRE)

#: Reached when the work is done or goes on without whoever is there: a hang there is not the job's, and its wall time
#: is not lowered.
LATE: Final = frozenset({"child.leave", "keeper.wait", "keeper.clean", "forkserver.after_fork", "wire.exited"})

#: The worker's points with the default first, the frames likewise; and those where the limits of the job hold.
_IN_WORKER: Final = tuple(sorted(CHILD, key=lambda point: point != "child.run"))
_REPLY_FIRST: Final = tuple(sorted(WIRE, key=lambda point: point != "wire.reply"))
_CONFINED: Final = ("child.run", "child.unpickle", "child.spawn")
#: Seconds that a hang lasts if nothing ends it.
_LONG: Final = 3600.0
#: Seconds that a delayed frame is late.
DELAY_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Kind:
    """One way to go wrong."""

    name: str
    does: str
    """One line for people."""
    points: tuple[str, ...]
    """Where it can be injected; the first is the default."""
    act: Callable[[], Any] | None = None
    """What the process does at a point of forkserver, keeper or child. The other points have their own code."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Limits of the job that has the fault, where they are lower than its own: so a hang need not cost minutes."""


class InjectedFault(RuntimeError):
    """What the kind `raise` raises."""


def _send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _raise() -> NoReturn:
    raise InjectedFault("injected")


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt("injected")


def _hang_with_gil() -> NoReturn:
    libc = ctypes.PyDLL(None)  # unlike CDLL it keeps the GIL
    while True:  # a signal ends one sleep
        libc.sleep(int(_LONG))


def _busy() -> NoReturn:
    while True:
        pass


def _memory_slow() -> None:
    kept: list[bytearray] = []
    for _ in range(8192):  # 64 GiB; the limit of the job ends it long before
        kept.append(bytearray(os.urandom(1024)) * (8 * 1024))


def _memory_sudden() -> None:
    bytearray(1 << 42)


def _fork_bomb() -> None:
    # The limit of the job ends it; this bound is for the case that it does not.
    for _ in range(400):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    time.sleep(60)


def _thread_bomb() -> None:
    threading.stack_size(256 * 1024)  # so that their number is the limit, not the memory of their stacks
    for _ in range(4000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    time.sleep(60)


def _fd_hog() -> None:
    kept: list[int] = []
    while len(kept) < 100_000:
        kept.append(os.open(os.devnull, os.O_RDONLY))


def _disk_hog() -> None:
    for number in range(4000):
        with open(f"hog-{number}", "wb") as file:
            file.write(bytes(MIB))


def _stderr_flood() -> None:
    for _ in range(100_000):
        os.write(2, b"flood " * 1000)


def _no_writing(number: int) -> Callable[[], None]:
    """Every file that this process opens for writing from now on fails with ``number``."""

    def act() -> None:
        import builtins
        import io

        real = os.open
        text = os.strerror(number)

        def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(number, text, path)
            return real(path, flags, *args, **kwargs)

        real_open: Any = io.open

        def io_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int) and set(mode) & set("wax+"):
                raise OSError(number, text, file)
            return real_open(file, mode, *args, **kwargs)

        os.open = os_open
        io.open = builtins.open = io_open

    return act


def _leak_semaphores() -> None:
    libc = ctypes.CDLL(None)
    libc.sem_open.restype = ctypes.c_void_p
    libc.sem_open(f"/sandbox-fault-{os.getpid()}".encode(), os.O_CREAT, 0o600, 1)  # where it is forbidden, none leaks
    libc.semget(0, 1, 0o600)


def _leak_shared_memory() -> None:
    try:
        with open(f"/dev/shm/sandbox-fault-{os.getpid()}", "wb") as file:
            file.write(bytes(4096))
    except OSError:
        pass  # where it is forbidden, none leaks
    ctypes.CDLL(None).shmget(0, 4096, 0o600)


def _leak_descriptors() -> None:
    for _ in range(20):
        os.open(os.devnull, os.O_RDONLY)


def _orphan() -> None:
    """A grandchild in a session of its own that outlives the worker."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(120)
        os._exit(0)


def _tracker_death() -> None:
    """multiprocessing's resource tracker is started, given something to track, and killed."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    resource_tracker.register("/sandbox-fault", "shared_memory")
    pid = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _garbage() -> None:
    """On every socket that it holds."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), b"this is not a frame, it is garbage of a compiler gone mad " * 4)
        except OSError:
            pass  # closed by now, or nobody listens


def _second_thread() -> None:
    threading.Thread(target=time.sleep, args=(_LONG,), daemon=True).start()


_HANGS: Final = {"wall_seconds": 2.0}
_SIGNALS: Final = {
    "sigsegv": lambda: ctypes.string_at(0),
    "sigbus": _send(signal.SIGBUS),
    "sigfpe": _send(signal.SIGFPE),
    "sigill": _send(signal.SIGILL),
    "sigabrt": os.abort,
    "sigkill": _send(signal.SIGKILL),
    "sigterm": _send(signal.SIGTERM),
    "sigsys": _send(signal.SIGSYS),
    "sigtrap": _send(signal.SIGTRAP),
}
_ANYWHERE: Final = (*_IN_WORKER, *KEEPER, *FORKSERVER)
_ERRNO: Final = ("child.run", "child.unpickle", "parent.folder", "parent.adopt")

_ALL: Final = (
    *(Kind(name, f"dies of {name.upper()}", _ANYWHERE, act) for name, act in _SIGNALS.items()),
    Kind("exit", "ends with os._exit(3)", _ANYWHERE, lambda: os._exit(3)),
    Kind("sys_exit", "raises SystemExit(3)", _IN_WORKER, lambda: sys.exit(3)),
    Kind("raise", "raises an exception", (*_ANYWHERE, *PARENT), _raise),
    Kind("interrupt", "raises KeyboardInterrupt", _IN_WORKER, _interrupt),
    Kind("hang", "sleeps for an hour without the GIL", _ANYWHERE, lambda: time.sleep(_LONG), _HANGS),
    Kind("hang_gil", "sleeps for an hour and holds the GIL", _ANYWHERE, _hang_with_gil, _HANGS),
    Kind("busy_loop", "computes for ever", _IN_WORKER, _busy, _HANGS),
    Kind("sigstop", "stops itself", _ANYWHERE, _send(signal.SIGSTOP), _HANGS),
    Kind("oom_slow", "takes memory, 8 MiB after 8 MiB", _IN_WORKER, _memory_slow, {"memory_bytes": 512 * MIB}),
    Kind("oom_sudden", "asks for 4 TiB at once", _IN_WORKER, _memory_sudden),
    Kind("fork_bomb", "forks 400 processes", _IN_WORKER, _fork_bomb, {"processes": 16}),
    Kind("thread_bomb", "starts 4,000 threads", _CONFINED, _thread_bomb, {"threads": 100}),
    Kind(
        "fd_exhaustion",
        "opens files until there is no descriptor left",
        (*_IN_WORKER, "parent.run"),
        _fd_hog,
        {"open_files": 256},
    ),
    Kind("disk_hog", "writes 4 GiB into its folder", _IN_WORKER, _disk_hog, {"disk_bytes": 64 * MIB}),
    Kind("stderr_flood", "writes 600 MB to stderr", _IN_WORKER, _stderr_flood, {"stderr_bytes": MIB}),
    Kind("enospc", "writing fails: no space left on the device", _ERRNO, _no_writing(28)),
    Kind("eio", "writing fails: input/output error", _ERRNO, _no_writing(5)),
    Kind("read_only", "writing fails: read-only file system", _ERRNO, _no_writing(30)),
    Kind("leak_semaphore", "leaves a POSIX and a SysV semaphore", _CONFINED, _leak_semaphores),
    Kind("leak_shm", "leaves POSIX and SysV shared memory", _CONFINED, _leak_shared_memory),
    Kind("leak_fd", "leaves 20 descriptors open", _CONFINED, _leak_descriptors),
    Kind("orphan", "leaves a process in a session of its own", _IN_WORKER, _orphan),
    Kind("tracker_death", "starts multiprocessing's resource tracker, which is killed", _CONFINED, _tracker_death),
    Kind("unserializable", "returns what cannot be sent", ("child.run",)),
    Kind("garbage", "writes garbage on every socket it holds", _IN_WORKER, _garbage),
    Kind("second_thread", "the template gets a second thread", ("forkserver.before_fork",), _second_thread),
    Kind("truncated", "half of a frame, then the end", _REPLY_FIRST, limits=_HANGS),
    Kind("stalled", "half of a frame, then silence", _REPLY_FIRST, limits=_HANGS),
    Kind("lost", "a frame that is not sent", _REPLY_FIRST, limits=_HANGS),
    Kind("garbled", "one bit of a frame is flipped", _REPLY_FIRST),
    Kind("duplicated", "a frame that is sent twice", _REPLY_FIRST),
    Kind("delayed", "a frame that is sent a second late", _REPLY_FIRST),
    Kind("oversized", "a frame that announces an exbibyte", _REPLY_FIRST),
    Kind("foreign", "a whole frame of another job", _REPLY_FIRST),
    Kind("clock_jump", "the wall clock jumps by a day, forwards or back", ("parent.run",)),
    Kind("clock_skip", "the monotonic clock skips an hour while the job runs", ("parent.run",)),
    Kind("closed_stdio", "the host has closed stdin, stdout and stderr", HOST),
    Kind("sigchld_reaper", "the host's SIGCHLD handler reaps every child", HOST),
    Kind("sigchld_ignored", "the host ignores SIGCHLD", HOST),
    Kind("fd_limit", "the host has few descriptors left, perhaps none", ("parent.run",)),
    Kind("read_only_tmp", "the host's temporary folder cannot be written", HOST),
)

#: Every kind by name.
KINDS: Final = {kind.name: kind for kind in _ALL}


@dataclass(frozen=True)
class Shot:
    """One fault: a kind at a point, and the number that its random choices follow from."""

    kind: str
    point: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind} at {self.point}"


def mutate(shot: Shot, frame: bytes, foreign: bytes) -> bytes:
    """What a fault of the wire makes of a whole frame. ``foreign``: the frame as another job's would be."""
    chance = random.Random(shot.seed)
    if shot.kind in ("truncated", "stalled"):
        return frame[: len(frame) // 2]
    if shot.kind == "lost":
        return b""
    if shot.kind == "duplicated":
        return frame + frame
    if shot.kind == "garbled":
        # Not in the lengths: a frame that lies about those is `stalled`, `truncated` or `oversized`.
        at = chance.choice([*range(4), *range(16, len(frame))])
        return frame[:at] + bytes([frame[at] ^ (1 << chance.randrange(8))]) + frame[at + 1 :]
    if shot.kind == "oversized":
        return frame[:8] + (1 << 60).to_bytes(8, "big") + frame[16:]
    if shot.kind == "foreign":
        return foreign
    return frame

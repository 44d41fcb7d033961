"""What is held: a snapshot before, one after, and what is there that was not.

The worker looks at itself: descriptors, threads, maps of deleted files, zombies, registrations at a resource tracker.
All of that ends with its process. The keeper looks at what may not: names in /dev/shm, SysV objects, files, processes;
:mod:`sandbox.reclaim` says which of it is the job's, and removes it. The template looks at itself between forks.
"""

from __future__ import annotations

import os
import stat as stat_module
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Final, Literal

from sandbox.processes import Process, walk
from sandbox.results import Leak, LeakKind, printable

SHM: Final = "/dev/shm"
#: Files told by name below each folder; more are told as one count.
MAX_FILES: Final = 1000
#: Characters of one leak's description, at most.
MAX_TEXT: Final = 300
#: Frames of one call stack, the innermost ones, at most.
MAX_FRAMES: Final = 16

Owner = Literal["child", "forkserver", "parent"]
SysvKind = Literal["sem", "shm", "msg"]
_LEAK_KINDS: Final[dict[SysvKind, LeakKind]] = {
    "sem": "sysv_semaphore",
    "shm": "shared_memory",
    "msg": "message_queue",
}
#: What may outlive the process that made it.
KERNEL_LEAKS: Final[frozenset[LeakKind]] = frozenset(
    {"posix_semaphore", "sysv_semaphore", "shared_memory", "message_queue", "temp_file"}
)
#: Which kind a descriptor is, by the beginning of what /proc/PID/fd says of it; all others are `fd`.
_FD_KINDS: Final[tuple[tuple[str, LeakKind], ...]] = (
    ("socket:", "socket"),
    ("pipe:", "pipe"),
    ("anon_inode:[eventfd", "eventfd"),
    ("anon_inode:[eventpoll", "epoll"),
    ("anon_inode:[timerfd", "timerfd"),
    ("anon_inode:[signalfd", "signalfd"),
    ("anon_inode:inotify", "inotify"),
    ("anon_inode:[pidfd", "pidfd"),
    ("pidfd:", "pidfd"),  # since Linux 6.9
    ("/memfd:", "memfd"),
    # The unified memory of a process is there as long as its CUDA context.
    ("/dev/nvidia-uvm", "cuda_context"),
    ("/dev/nvidia", "gpu_handle"),
)
#: Maps that are "(deleted)" by their nature: anonymous shared memory, rings of asynchronous I/O, and the semaphore
#: behind each lock of `multiprocessing`, which has a name only for a moment.
_ANONYMOUS: Final = (b"/dev/zero", b"/[aio]", b"/dev/shm/sem.")
Inode = tuple[int, int]
"""Device and inode number."""


@dataclass(frozen=True)
class PosixObject:
    """A name in /dev/shm: a semaphore (`sem.NAME`) or shared memory."""

    name: str
    inode: Inode
    uid: int
    folder: bool = False


@dataclass(frozen=True)
class SysvObject:
    """A SysV semaphore set, shared memory segment or message queue."""

    kind: SysvKind
    id: int
    uid: int
    created: int
    """Time of the last change of owner or mode, normally of the creation, in seconds since the epoch."""
    pids: frozenset[int]
    """Creator and last users, as far as the kernel keeps them; for a semaphore set see :func:`semaphore_pids`."""
    attached: int = 0
    """How often a segment is mapped."""
    semaphores: int = 0
    """Semaphores in a set."""


@dataclass(frozen=True)
class Snapshot:
    """What was held at one moment. Fields that could not be read (of a process that is gone) are empty."""

    fds: Mapping[int, str] = field(default_factory=dict)
    posix: Mapping[str, PosixObject] = field(default_factory=dict)
    sysv: Mapping[tuple[SysvKind, int], SysvObject] = field(default_factory=dict)
    files: Mapping[str, Inode] = field(default_factory=dict)
    """Path to inode of every file below the given folders, at most ``MAX_FILES`` a folder."""
    more_files: Mapping[str, int] = field(default_factory=dict)
    """Files that were only counted, by folder; the count stops at 100,000."""
    processes: Mapping[tuple[int, int], Process] = field(default_factory=dict)
    """Live processes below, by pid and start time."""
    zombies: Mapping[tuple[int, int], Process] = field(default_factory=dict)
    """Children that have ended and that the process has not waited for."""
    threads: Mapping[int, str] = field(default_factory=dict)
    deleted_maps: frozenset[tuple[int, str]] = frozenset()
    """Inode and path of mapped files that have no name any more."""


@dataclass(frozen=True)
class Held:
    """One thing that is held, told for people, with what is needed to remove it."""

    kind: LeakKind
    text: str
    handle: PosixObject | SysvObject | Process | None = None
    thread: int | None = None
    """The kernel's number of a thread."""

    def leak(self, owner: Owner, reclaimed: bool = False, stack: tuple[str, ...] = ()) -> Leak:
        """The entry of a leak report."""
        text = printable(self.text, MAX_TEXT)
        return Leak(kind=self.kind, object=text, owner=owner, reclaimed=reclaimed, stack=stack)


def take(pid: int | None = None, folders: tuple[Path, ...] = (), ipc: bool = True, own: bool = True) -> Snapshot:
    """What process ``pid`` (default: this one) holds now; with ``ipc`` also what /dev/shm and SysV IPC hold. Without
    ``own`` only that, and the folders: no descriptors, threads, maps and processes.

    /dev/shm and the SysV objects are those of the namespaces of the *calling* process: for a job in namespaces of
    its own, call it in the keeper.
    """
    # By this number /proc knows us, also if it is that of another PID namespace than ours.
    target = int(os.readlink("/proc/self")) if pid is None else pid
    below = [stat for stat in walk(target) if stat.pid != target] if own else []
    files: dict[str, Inode] = {}
    more: dict[str, int] = {}
    for folder in folders:
        found, rest = _files(folder)
        files |= found
        if rest:
            more[str(folder)] = rest
    return Snapshot(
        fds=descriptors(target) if own else {},
        posix=_posix() if ipc else {},
        sysv={(found.kind, found.id): found for found in sysv_objects()} if ipc else {},
        files=files,
        more_files=more,
        processes={stat.key: stat.process for stat in below if not stat.dead},
        zombies={stat.key: stat.process for stat in below if stat.dead and stat.ppid == target},
        threads=_threads(target) if own else {},
        deleted_maps=_deleted_maps(target) if own else frozenset(),
    )


def differences(before: Snapshot, after: Snapshot) -> tuple[Held, ...]:
    """Everything in ``after`` that was not in ``before``, by kind."""
    return tuple(_differences(before, after))


def compare(before: Snapshot, after: Snapshot, owner: Owner) -> tuple[Leak, ...]:
    """As :func:`differences`, as entries of a leak report, nothing reclaimed.

    For a process of its own namespaces, or where other processes of the host are known to be quiet: in shared
    namespaces it also tells of what others have made meanwhile. :func:`sandbox.reclaim.reclaim` tells only what is
    proven.
    """
    return tuple(held.leak(owner) for held in _differences(before, after))


def _differences(before: Snapshot, after: Snapshot) -> Iterator[Held]:
    for fd, target in sorted(after.fds.items()):
        if before.fds.get(fd) != target:
            yield Held(fd_kind(target), fd_text(fd, target))
    for name, posix in sorted(after.posix.items()):
        if before.posix.get(name, posix).inode != posix.inode or name not in before.posix:
            kind: LeakKind = "posix_semaphore" if name.startswith("sem.") else "shared_memory"
            yield Held(kind, f"{SHM}/{name}", posix)
    for (sysv_kind, number), sysv in sorted(after.sysv.items()):
        if (old := before.sysv.get((sysv_kind, number))) is None or old.created != sysv.created:
            # There is no kind of its own for message queues: they are memory in the kernel.
            kind = _LEAK_KINDS[sysv_kind]
            yield Held(kind, f"SysV {_SYSV_NAMES[sysv_kind]} {number}", sysv)
    for path, inode in sorted(after.files.items()):
        if before.files.get(path) != inode:
            yield Held("temp_file", path)
    for folder, count in sorted(after.more_files.items()):
        if count > before.more_files.get(folder, 0):
            yield Held("temp_file", f"{folder}: {count} more files")
    for key, process in sorted(after.processes.items()):
        if key not in before.processes:
            yield Held("process", f"pid {process.pid} ({process.command})", process)
    for key, process in sorted(after.zombies.items()):
        if key not in before.zombies:
            yield Held("zombie", f"pid {process.pid} ({process.command})", process)
    for thread, name in sorted(after.threads.items()):
        if thread not in before.threads:
            yield Held("thread", f"thread {thread} ({name})", thread=thread)
    for number, path in sorted(after.deleted_maps - before.deleted_maps):
        yield Held("deleted_map", f"inode {number}, {path}")


_SYSV_NAMES: Final[dict[SysvKind, str]] = {
    "sem": "semaphore set",
    "shm": "shared memory",
    "msg": "message queue",
}


def descriptors(pid: int) -> dict[int, str]:
    """What /proc says of each open descriptor of a process; none if it is gone or not ours to look into."""
    folder = f"/proc/{pid}/fd"
    found: dict[int, str] = {}
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return found  # gone, or not ours to look into
    for name in names:
        try:
            found[int(name)] = os.readlink(f"{folder}/{name}")
        except (FileNotFoundError, ProcessLookupError):
            continue  # closed since; the one that has listed the folder always is
        except PermissionError:
            return {}  # its folder can be listed, and it has rights that we have not
    return found


def fd_kind(target: str) -> LeakKind:
    """Which kind of leak a descriptor is, by what /proc says of it."""
    return next((kind for start, kind in _FD_KINDS if target.startswith(start)), "fd")


def fd_text(fd: int, target: str) -> str:
    """How reports name a descriptor."""
    return f"fd {fd} -> {target}"


def python_thread(number: int) -> tuple[str, tuple[str, ...]]:
    """Name and call stack, outermost first, of the Python thread that the kernel knows by ``number``; empty if it is
    none of Python's."""
    for thread in threading.enumerate():
        if thread.native_id == number and thread.ident is not None:
            return thread.name, call_stack(frames(sys._current_frames().get(thread.ident)))
    return "", ()


Frames = list[tuple[CodeType, int]]
"""A call stack, innermost first: code and line."""


def frames(frame: FrameType | None) -> Frames:
    """The innermost frames of a call stack: cheap to take, see :func:`call_stack`."""
    found: Frames = []
    while frame is not None and len(found) < MAX_FRAMES:
        found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return found


def call_stack(found: Frames) -> tuple[str, ...]:
    """A call stack as text, outermost first, `file:line function`."""
    return tuple(f"{code.co_filename}:{line} {code.co_qualname}" for code, line in reversed(found))


def _deleted_maps(pid: int) -> frozenset[tuple[int, str]]:
    found = set()
    for line in read_lines(f"/proc/{pid}/maps", b" (deleted)\n"):
        if line.endswith(b" (deleted)"):
            # address, mode, offset, device, inode, path
            *_, inode, path = line.removesuffix(b" (deleted)").split(None, 5)
            if not path.startswith(_ANONYMOUS):
                found.add((int(inode), path.decode("utf-8", "backslashreplace")))
    return frozenset(found)


def links(fds: Iterable[int]) -> dict[int, str]:
    """What these descriptors of this process lead to; those that are closed are left out."""
    found = {}
    for fd in fds:
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # closed
    return found


def _threads(pid: int) -> dict[int, str]:
    found: dict[int, str] = {}
    try:
        names = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return found  # gone
    for name in names:
        for line in read_lines(f"/proc/{pid}/task/{name}/comm"):
            found[int(name)] = line.decode("utf-8", "replace")
    return found


def _posix() -> dict[str, PosixObject]:
    found: dict[str, PosixObject] = {}
    try:
        with os.scandir(SHM) as entries:
            for entry in entries:
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # unlinked since
                folder = stat_module.S_ISDIR(info.st_mode)
                found[entry.name] = PosixObject(entry.name, (info.st_dev, info.st_ino), info.st_uid, folder)
    except FileNotFoundError:
        return found  # a host without /dev/shm
    return found


def sysv_objects() -> Iterator[SysvObject]:
    """The SysV objects of this process's IPC namespace."""
    for kind in _SYSV_NAMES:
        lines = read_lines(f"/proc/sysvipc/{kind}")
        if not lines:
            continue  # a kernel without SysV IPC
        columns = lines[0].decode().split()
        for line in lines[1:]:
            row = dict(zip(columns, map(int, line.split()), strict=False))
            pids = {row.get(name, 0) for name in ("cpid", "lpid", "lspid", "lrpid")} - {0}
            yield SysvObject(
                kind=kind,
                id=row[{"sem": "semid", "shm": "shmid", "msg": "msqid"}[kind]],
                uid=row["uid"],
                created=row["ctime"],
                pids=frozenset(pids),
                attached=row.get("nattch", 0),
                semaphores=row.get("nsems", 0),
            )


def read_lines(path: str, text: bytes = b"") -> list[bytes]:
    """A /proc file; no lines if its process is gone, if it is not ours to read, or not in this kernel; or if ``text``
    is not in it."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
            return data.splitlines() if text in data else []
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def _files(folder: Path) -> tuple[dict[str, Inode], int]:
    """Files below a folder, links not followed: the first ``MAX_FILES`` by name, and a count of the rest."""
    found: dict[str, Inode] = {}
    rest = 0
    queue = [str(folder)]
    while queue and rest < 100_000:
        try:
            with os.scandir(queue.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
                    elif len(found) < MAX_FILES:
                        info = entry.stat(follow_symlinks=False)
                        found[entry.path] = (info.st_dev, info.st_ino)
                    else:
                        rest += 1
        except OSError:
            continue  # vanished since, not ours to read, or too deep for a path
    return found, rest

"""What is held: a snapshot before a job, one after it, and what is still there that was not.

Attribution is the hard part. In namespaces of its own everything a job leaves is its own, and ends with them. In
namespaces shared with other processes only what is *proven* to be the job's is touched: a file in /dev/shm whose
inode a process of the job was seen to hold, a SysV object whose creator or only user was a process of the job. What
ends with its process anyway (memfd, anonymous mappings, descriptors) is not looked for after the process is dead.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat as stat_module
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from sandbox import processes
from sandbox.results import Leak, LeakKind, printable

SHM: Final = "/dev/shm"
#: Files told by name below each folder; more are told as one count.
MAX_FILES: Final = 1000

Owner = Literal["child", "forkserver", "parent"]
#: Characters of one leak's description, at most.
MAX_TEXT: Final = 300
SysvKind = Literal["sem", "shm", "msg"]
_LEAK_KINDS: Final[dict[SysvKind, LeakKind]] = {
    "sem": "sysv_semaphore",
    "shm": "shared_memory",
    "msg": "message_queue",
}
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
    processes: Mapping[tuple[int, int], processes.Process] = field(default_factory=dict)
    """Live processes below, by pid and start time."""
    threads: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What proves that something is the job's."""

    own_shm: bool = False
    """The job has a /dev/shm of its own, mounted in its own mount namespace."""
    own_ipc: bool = False
    """The job has an IPC namespace of its own."""
    own_folders: bool = False
    """The folders of the snapshot are the job's own and will be removed."""
    pids: frozenset[int] = frozenset()
    """Every pid that was seen in the job's tree (`TreeMeter.seen`), none of them alive any more."""
    inodes: frozenset[Inode] = frozenset()
    """Inodes in /dev/shm that processes of the job were seen to hold (:func:`mapped_inodes`)."""


@dataclass(frozen=True)
class Held:
    """One thing that is held, told for people, with what is needed to remove it."""

    kind: LeakKind
    text: str
    handle: PosixObject | SysvObject | processes.Process | None = None

    def leak(self, owner: Owner, reclaimed: bool = False) -> Leak:
        """The entry of a leak report."""
        return Leak(kind=self.kind, object=printable(self.text, MAX_TEXT), owner=owner, reclaimed=reclaimed)


def take(pid: int | None = None, folders: tuple[Path, ...] = (), ipc: bool = True) -> Snapshot:
    """What process ``pid`` (default: this one) holds now; with ``ipc`` also what /dev/shm and SysV IPC hold.

    /dev/shm and the SysV objects are those of the namespaces of the *calling* process: for a job in namespaces of
    its own, call it in the keeper.
    """
    target = os.getpid() if pid is None else pid
    files: dict[str, Inode] = {}
    more: dict[str, int] = {}
    for folder in folders:
        found, rest = _files(folder)
        files |= found
        if rest:
            more[str(folder)] = rest
    return Snapshot(
        fds=_fds(target),
        posix=_posix() if ipc else {},
        sysv={(found.kind, found.id): found for found in _sysv()} if ipc else {},
        files=files,
        more_files=more,
        processes={(p.pid, p.start_ticks): p for p in processes.descendants(target)},
        threads=_threads(target),
    )


def differences(before: Snapshot, after: Snapshot) -> tuple[Held, ...]:
    """Everything in ``after`` that was not in ``before``, by kind."""
    return tuple(_differences(before, after))


def compare(before: Snapshot, after: Snapshot, owner: Owner) -> tuple[Leak, ...]:
    """As :func:`differences`, as entries of a leak report, nothing reclaimed.

    For a process of its own namespaces, or where other processes of the host are known to be quiet: in shared
    namespaces it also tells of what others have made meanwhile. :func:`reclaim` tells only what is proven.
    """
    return tuple(held.leak(owner) for held in _differences(before, after))


def reclaim(held: Iterable[Held], evidence: Evidence) -> tuple[Leak, ...]:
    """Remove what is proven to be the job's and tell what became of it. Call it when its processes are dead.

    What is not proven is neither touched nor told. Only for what a child has left: leaks of the forkserver and of the
    service are told by :func:`compare` and never touched.
    """
    leaks = []
    for each in held:
        handle = each.handle
        if isinstance(handle, PosixObject):
            if evidence.own_shm:
                leaks.append(each.leak("child", True))  # ends with its mount namespace
            elif handle.inode in evidence.inodes:
                leaks.append(each.leak("child", _unlink(handle)))
        elif isinstance(handle, SysvObject):
            if evidence.own_ipc:
                leaks.append(each.leak("child", True))  # ends with its IPC namespace
            elif _is_of(handle, evidence.pids):
                leaks.append(each.leak("child", _remove(handle)))
        elif isinstance(handle, processes.Process):
            now = processes.read_stat(handle.pid)
            gone = now is None or now.dead or now.start_ticks != handle.start_ticks
            leaks.append(each.leak("child", gone))
        elif each.kind == "temp_file":
            leaks.append(each.leak("child", evidence.own_folders))
        else:
            leaks.append(each.leak("child", True))  # a descriptor or thread: ended with its process
    return tuple(leaks)


def mapped_inodes(pids: Iterable[int]) -> set[Inode]:
    """Inodes in /dev/shm that these processes have mapped or open now. Processes that are gone hold none.

    Call it while they live. Costs about a millisecond for a process with torch in it.
    """
    found: set[Inode] = set()
    for pid in pids:
        for line in _lines(f"/proc/{pid}/maps"):
            if b" " + SHM.encode() + b"/" in line:
                _, _, _, device, inode, *_ = line.split()
                major, _, minor = device.partition(b":")
                found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
        for fd, target in _fds(pid).items():
            if target.startswith(SHM + "/"):
                try:
                    info = os.stat(f"/proc/{pid}/fd/{fd}")
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue  # closed or gone since
                found.add((info.st_dev, info.st_ino))
    return found


def semaphore_pids(semaphores: SysvObject) -> frozenset[int]:
    """Pids that last operated on each semaphore of a set; the kernel keeps no creator. Empty if it is gone."""
    found = (_libc.semctl(semaphores.id, number, _GETPID) for number in range(semaphores.semaphores))
    return frozenset(pid for pid in found if pid > 0)


_IPC_RMID: Final = 0
_GETPID: Final = 11
_libc = ctypes.CDLL(None, use_errno=True)


def _differences(before: Snapshot, after: Snapshot) -> Iterator[Held]:
    for fd, target in sorted(after.fds.items()):
        if before.fds.get(fd) != target:
            yield Held("fd", f"fd {fd} -> {target}")
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
    for thread, name in sorted(after.threads.items()):
        if thread not in before.threads:
            yield Held("thread", f"thread {thread} ({name})")


_SYSV_NAMES: Final[dict[SysvKind, str]] = {
    "sem": "semaphore set",
    "shm": "shared memory",
    "msg": "message queue",
}


def _fds(pid: int) -> dict[int, str]:
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
    return found


def _threads(pid: int) -> dict[int, str]:
    found: dict[int, str] = {}
    try:
        names = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return found  # gone
    for name in names:
        for line in _lines(f"/proc/{pid}/task/{name}/comm"):
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


def _sysv() -> Iterator[SysvObject]:
    for kind in _SYSV_NAMES:
        lines = _lines(f"/proc/sysvipc/{kind}")
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


def _lines(path: str) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []  # gone, not ours to read, or not in this kernel


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


def _is_of(sysv: SysvObject, pids: frozenset[int]) -> bool:
    """Whether every process that the kernel still names was the job's, and nobody has it mapped."""
    users = semaphore_pids(sysv) if sysv.kind == "sem" else sysv.pids
    return bool(users) and users <= pids and sysv.attached == 0


def _remove(sysv: SysvObject) -> bool:
    if sysv.kind == "sem":
        result = _libc.semctl(sysv.id, 0, _IPC_RMID)
    elif sysv.kind == "shm":
        result = _libc.shmctl(sysv.id, _IPC_RMID, None)
    else:
        result = _libc.msgctl(sysv.id, _IPC_RMID, None)
    # Already removed (EIDRM, EINVAL) is as good; of another user (EPERM) is not.
    return result == 0 or ctypes.get_errno() in (errno.EIDRM, errno.EINVAL)


def _unlink(posix: PosixObject) -> bool:
    """Remove a name from /dev/shm if it still is the same file."""
    path = f"{SHM}/{posix.name}"
    try:
        info = os.lstat(path)
        if posix.folder or (info.st_dev, info.st_ino) != posix.inode:
            return False
        os.unlink(path)
    except FileNotFoundError:
        return True  # its owner's resource tracker was faster
    except OSError:
        return False  # another user's in a sticky folder: told as not reclaimed
    return True

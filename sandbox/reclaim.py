"""What a dead job has left in the kernel: what proves that it is the job's, and its removal.

In namespaces of its own everything a job leaves is its own, and ends with them. In namespaces shared with other
processes only what is *proven* to be the job's is touched: a file in /dev/shm whose inode a process of the job was
seen to hold, a SysV object whose creator or only user was a process of the job.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sandbox import processes
from sandbox.ledger import (
    SHM,
    Held,
    Inode,
    PosixObject,
    SysvObject,
    descriptors,
    differences,
    read_lines,
    sysv_objects,
    take,
)
from sandbox.results import Leak

#: How the name of a :class:`Record` ends, after that of the job's scratch folder.
RECORD_SUFFIX: Final = ".held"
#: Bytes of a record: tens of thousands of objects.
_MAX_RECORD: Final = 1 << 20
_IPC_RMID: Final = 0
_GETPID: Final = 11
_libc = ctypes.CDLL(None, use_errno=True)


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
                leaks.append(each.leak("child", unlink(handle)))
        elif isinstance(handle, SysvObject):
            if evidence.own_ipc:
                leaks.append(each.leak("child", True))  # ends with its IPC namespace
            elif is_of_pids(handle, evidence.pids):
                leaks.append(each.leak("child", remove(handle)))
        elif isinstance(handle, processes.Process):
            now = processes.read_stat(handle.pid)
            gone = now is None or now.dead or now.start_ticks != handle.start_ticks
            leaks.append(each.leak("child", gone))
        elif each.kind == "temp_file":
            leaks.append(each.leak("child", evidence.own_folders))
        else:
            leaks.append(each.leak("child", True))  # a descriptor or thread: ended with its process
    return tuple(leaks)


class Record:
    """A file beside the job's scratch folder that says what the job was seen to hold in shared namespaces.

    If its keeper is killed, whoever cleans up after it can tell by it what is the job's (:func:`recorded`). Who can
    forge it, can remove what it names himself: the root is the user's alone.
    """

    def __init__(self, scratch: Path) -> None:
        self._path = record_path(scratch)
        self._written = ""

    def write(self, inodes: Iterable[Inode], sysv: Iterable[SysvObject]) -> None:
        """Keep it up to date; a job that holds nothing gets none."""
        known = {"posix": sorted(inodes), "sysv": sorted((each.kind, each.id, each.created) for each in sysv)}
        text = json.dumps(known) if any(known.values()) else ""
        if text and text != self._written:
            new = self._path.with_suffix(".new")
            try:
                new.write_text(text)
                new.replace(self._path)
                self._written = text
            except OSError:
                return  # a full disk: it is only for the case that the keeper is killed; the next look tries again

    def remove(self) -> None:
        """The job's objects are removed."""
        with contextlib.suppress(OSError):  # none; or something else in its place, which the service removes
            self._path.unlink()


def record_path(scratch: Path) -> Path:
    """Where the record of the job with this scratch folder lies."""
    return scratch.with_name(f"{scratch.name}{RECORD_SUFFIX}")


def recorded(path: Path) -> tuple[Held, ...]:
    """What a :class:`Record` names and what is still there: to be given to :func:`remove_held`."""
    try:
        known = json.loads(_read(path))
        inodes = {(int(device), int(inode)) for device, inode in known["posix"]}
        sysv = {(str(kind), int(number), int(created)) for kind, number, created in known["sysv"]}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return ()  # none, a half one of a disk that was full, or not a keeper's
    now = take(os.getpid())
    nothing = replace(now, posix={}, sysv={})
    return tuple(
        held
        for held in differences(nothing, now)
        if (isinstance(held.handle, PosixObject) and held.handle.inode in inodes)
        or (isinstance(held.handle, SysvObject) and (held.handle.kind, held.handle.id, held.handle.created) in sysv)
    )


def _read(path: Path) -> bytes:
    """Without Landlock and own mounts a job may have put anything there; a FIFO is not waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(handle, _MAX_RECORD)
    finally:
        os.close(handle)


def remove_held(held: Held) -> str:
    """Remove an object that is proven to be a dead job's, unless somebody uses it. Returns why it is still there."""
    handle = held.handle
    if isinstance(handle, PosixObject):
        if handle.inode in mapped_inodes(processes.numbers_in("/proc")):
            return "a live process holds it"
        return "" if unlink(handle) else "the kernel refuses"
    if isinstance(handle, SysvObject):
        if handle.attached:
            return "a live process has it attached"
        return "" if remove(handle) else "the kernel refuses"
    raise ValueError(f"{held.text} is not an object of the kernel's")


def used_by(pids: frozenset[int]) -> list[SysvObject]:
    """The SysV objects of which the kernel names no other users than ``pids``, mapped or not."""
    return [each for each in sysv_objects() if (users := _users(each)) and users <= pids]


def mapped_inodes(pids: Iterable[int]) -> set[Inode]:
    """Inodes in /dev/shm that these processes have mapped or open now. Processes that are gone hold none.

    Call it while they live. Costs about a millisecond for a process with torch in it.
    """
    found: set[Inode] = set()
    for pid in pids:
        for line in read_lines(f"/proc/{pid}/maps"):
            if b" " + SHM.encode() + b"/" in line:
                _, _, _, device, inode, *_ = line.split()
                major, _, minor = device.partition(b":")
                found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
        for fd, target in descriptors(pid).items():
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


def is_of_pids(sysv: SysvObject, pids: frozenset[int]) -> bool:
    """Whether every process that the kernel still names was the job's, and nobody has it mapped."""
    users = _users(sysv)
    return bool(users) and users <= pids and sysv.attached == 0


def _users(sysv: SysvObject) -> frozenset[int]:
    return semaphore_pids(sysv) if sysv.kind == "sem" else sysv.pids


def remove(sysv: SysvObject) -> bool:
    """Remove a SysV object; returns whether it is gone."""
    if sysv.kind == "sem":
        result = _libc.semctl(sysv.id, 0, _IPC_RMID)
    elif sysv.kind == "shm":
        result = _libc.shmctl(sysv.id, _IPC_RMID, None)
    else:
        result = _libc.msgctl(sysv.id, _IPC_RMID, None)
    # Already removed (EIDRM, EINVAL) is as good; of another user (EPERM) is not.
    return result == 0 or ctypes.get_errno() in (errno.EIDRM, errno.EINVAL)


def unlink(posix: PosixObject) -> bool:
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

"""What a dead job has left in the kernel: what proves that it is the job's, and its removal.

In namespaces of its own everything a job leaves is its own, and ends with them. In namespaces shared with other
processes only what is *proven* to be the job's is touched: a file in /dev/shm whose inode a process of the job was
seen to hold, a SysV object whose creator or only user was a process of the job.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sandbox import processes
from sandbox.ledger import SHM, Held, Inode, PosixObject, SysvObject, descriptors, read_lines
from sandbox.results import Leak

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
    users = semaphore_pids(sysv) if sysv.kind == "sem" else sysv.pids
    return bool(users) and users <= pids and sysv.attached == 0


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

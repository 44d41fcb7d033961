"""Landlock: the files, the TCP and UDP ports, the abstract sockets and the signals that are within a job's reach.

Three system calls and two structures, called through ctypes. landlockpy 0.2.0 and py-landlock 0.1.1, which bind the
same calls, were looked at and left: both are weeks or months old and would be code of a third party at the one place
that has to be right; landlockpy starts `ldconfig` and a compiler to find libc at its first call; neither says which
of the rights asked for an older kernel has dropped, which is what a report of `partial` is made of; and what has to
be decided with care, which rights a file, a folder, a device get, stays with the caller either way.

Source: Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h of Linux; the system calls have
the same numbers on all architectures.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from enum import IntFlag
from typing import Final

from sandbox.enforce import libc
from sandbox.enforce.paths import Paths
from sandbox.limits import Demand
from sandbox.results import Mechanism, State

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1
#: Below it no file can be renamed from one folder into another, not within the scratch folder either, which is how
#: Triton and others finish a file.
_OLDEST_ABI: Final = 2


class Fs(IntFlag):
    """LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15
    RESOLVE_UNIX = 1 << 16


#: What each version of the interface added: rights on files, on ports (TCP bind and connect; UDP bind and send),
#: scopes (abstract sockets, signals).
_FILES: Final = {1: (1 << 13) - 1, 2: Fs.REFER, 3: Fs.TRUNCATE, 5: Fs.IOCTL_DEV, 9: Fs.RESOLVE_UNIX}
_PORTS: Final = {4: 0b0011, 10: 0b1100}
_SCOPES: Final = {6: 0b11}
#: What a job can do where the version that forbids it is missing. Of 9 and 10 the seccomp filter is there, too: a job
#: has no socket to connect or to send by.
_OPEN_BEFORE: Final = {
    3: "files outside can be truncated, where their mode allows it",
    4: "TCP is not denied",
    5: "devices that can be read take any ioctl",
    6: "abstract sockets and signals reach outside",
}

_READ: Final = Fs.EXECUTE | Fs.READ_FILE | Fs.READ_DIR
_DEVICE: Final = Fs.READ_FILE | Fs.READ_DIR | Fs.WRITE_FILE | Fs.TRUNCATE | Fs.IOCTL_DEV
#: All but device files, which nobody without a capability can make, and programs: what a job has written, it can load
#: as a library but not start.
_WRITE: Final = Fs((1 << 17) - 1) & ~(Fs.EXECUTE | Fs.MAKE_CHAR | Fs.MAKE_BLOCK | Fs.IOCTL_DEV)
#: What a rule on a file may hold; the other rights are a folder's.
_OF_A_FILE: Final = Fs.EXECUTE | Fs.WRITE_FILE | Fs.READ_FILE | Fs.TRUNCATE | Fs.IOCTL_DEV | Fs.RESOLVE_UNIX


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("ports", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """Version of the kernel's Landlock.

    Raises:
        OSError: it has none (ENOSYS), or it is not switched on (EOPNOTSUPP).
    """
    return libc.syscall(_CREATE_RULESET, 0, 0, _VERSION)


def restrict(demand: Demand, readable: Paths, writable: Iterable[str]) -> Mechanism:
    """Confine this thread, and all that it will start, to what is named.

    Needs no_new_privs. What is open already stays open. Rules follow the file, not its name, so a link is what it
    leads to. Besides files: no TCP or UDP, no abstract socket and no signal that leaves the job, and no process
    outside can be traced or looked into.

    Args:
        demand: what the policy says.
        readable: what may be read and executed, and the devices.
        writable: folders in which everything may be done but to start a program.
    """
    if demand == "off":
        return Mechanism(state=State.OFF)
    try:
        version = abi()
        if version < _OLDEST_ABI:
            reason = f"Landlock {version} of this kernel forbids renaming between folders, which compilers do"
            return Mechanism(state=State.UNAVAILABLE, reason=reason)
        _restrict(version, readable, writable)
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    missing = [text for since, text in _OPEN_BEFORE.items() if version < since]
    if missing:
        return Mechanism(state=State.PARTIAL, reason=f"Landlock {version} of this kernel: {'; '.join(missing)}")
    return Mechanism(state=State.ENFORCED)


def _restrict(version: int, readable: Paths, writable: Iterable[str]) -> None:
    handled = _known(_FILES, version)
    ruleset = _Ruleset(handled, _known(_PORTS, version), _known(_SCOPES, version))
    # An older kernel takes a longer structure if what it does not know is zero.
    handle = libc.syscall(_CREATE_RULESET, ctypes.addressof(ruleset), ctypes.sizeof(ruleset), 0)
    try:
        for paths, rights in ((readable.read, _READ), (readable.devices, _DEVICE), (writable, _WRITE)):
            for path in paths:
                _allow(handle, path, rights & handled)
        libc.syscall(_RESTRICT_SELF, handle, 0)
    finally:
        os.close(handle)


def _allow(handle: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # gone since it was found, or not to be reached by this user: then there is nothing to allow
    try:
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            rights &= _OF_A_FILE
        rule = _PathBeneath(rights, beneath)
        libc.syscall(_ADD_RULE, handle, _PATH_BENEATH, ctypes.addressof(rule), 0)
    finally:
        os.close(beneath)


def _known(table: dict[int, int], version: int) -> int:
    return sum(int(rights) for since, rights in table.items() if version >= since)

"""The few C calls that Python 3.11 has no name for. Loaded once, in the template; usable in a fresh fork."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_SLAVE: Final = 0x80000

_SYS_MOUNT_SETATTR: Final = 442  # on every architecture
_MNT_DETACH: Final = 0x2
_MADV_COLLAPSE: Final = 25
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_MOUNT_ATTR_RDONLY: Final = 0x1

PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39
PR_CAPBSET_DROP: Final = 24
PR_SET_SECUREBITS: Final = 28
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)
_holding = ctypes.PyDLL(None, use_errno=True)  # its calls keep the interpreter's lock
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.prctl.restype = ctypes.c_int
_libc.unshare.argtypes = [ctypes.c_int]
_libc.unshare.restype = ctypes.c_int
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.mount.restype = ctypes.c_int
_libc.capset.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_libc.capset.restype = ctypes.c_int
_libc.syscall.restype = ctypes.c_long

_CAPABILITY_VERSION_3 = 0x20080522


def _check(result: int, call: str) -> int:
    """``result``, unless it reports an error.

    Raises:
        OSError: with the errno that the call has left.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: int) -> int:
    """syscall(2): a system call that libc has no function for, with numbers and addresses. Raises OSError."""
    return _check(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)), f"syscall({number})")


def prctl(option: int, argument: int = 0) -> int:
    """prctl(2) with one argument, a number. Raises OSError."""
    return _check(_libc.prctl(option, argument, 0, 0, 0), f"prctl({option})")


def prctl_read(option: int) -> int:
    """prctl(2) that stores an int, for example `PR_GET_PDEATHSIG`. Raises OSError."""
    value = ctypes.c_int()
    _check(_libc.prctl(option, ctypes.addressof(value), 0, 0, 0), f"prctl({option})")
    return value.value


def fork() -> int:
    """fork(2) without what modules have registered for a fork (`os.register_at_fork`), which takes 2 ms with PyTorch.
    For a process with one thread, whose child runs none of their code. Raises OSError."""
    return _check(_holding.fork(), "fork")


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2). Raises OSError."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]), f"mount({target})")


def unmount(path: str) -> None:
    """umount2(2), lazily. Raises OSError."""
    _check(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"umount2({path})")


def collapse(address: int, size: int) -> None:
    """madvise(2): put pages together to huge ones. Raises OSError; EINVAL before Linux 6.1."""
    _check(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(_MADV_COLLAPSE)), "madvise")


def set_read_only(path: str, on: bool, recursive: bool = False) -> None:
    """mount_setattr(2): whether a mount can be written through; with ``recursive`` also all that is mounted below.
    Raises OSError; ENOSYS before Linux 5.12."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY if on else 0, 0 if on else _MOUNT_ATTR_RDONLY, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _check(result, f"mount_setattr({path})")


def drop_capabilities() -> None:
    """Give up every capability of this thread: effective, permitted, inheritable. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none), "capset")


def reason(error: OSError) -> str:
    """One plain line for a refused call: what was tried, what the kernel said, and what that usually means."""
    meaning = {
        errno.EPERM: "not permitted: a container without CAP_SYS_ADMIN, a seccomp profile, or user namespaces off",
        errno.EACCES: "not permitted by a security module (AppArmor, SELinux)",
        errno.EINVAL: "this kernel was built without it, or the process has several threads",
        errno.ENOSYS: "this kernel does not have it",
        errno.EOPNOTSUPP: "this kernel has it, but it is switched off at boot",
        errno.ENOSPC: "the host's limit of namespaces is used up or zero (/proc/sys/user/max_*_namespaces)",
        errno.EUSERS: "namespaces are nested too deep",
    }.get(error.errno or 0)
    return f"{error.strerror} ({meaning})" if meaning else str(error.strerror)

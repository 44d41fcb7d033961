"""seccomp: a filter for system calls that no compiler makes, and the name of the one that was made.

A call that belongs to an attack stops its process and is told to the keeper, which kills the job: status `violation`,
with the call's name, whichever process of the tree made it. Calls that libraries make out of habit get an error. All
others pass at full speed: the kernel remembers which numbers a filter always allows.

The filter is a program of the kernel's classic BPF, made by the few lines of assembler below. libseccomp was looked
at and left: pyseccomp 0.1.2, of 2021, is a layer of ctypes over a library that slim images do not have, and what it
is good for, filters over dozens of architectures and thousands of rules, is not needed for one list on two.

Source: Documentation/userspace-api/seccomp_filter.rst and include/uapi/linux/seccomp.h of Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import platform
import socket
import struct
from typing import Final, NamedTuple

from sandbox.enforce import libc
from sandbox.limits import Demand
from sandbox.results import Mechanism, State


class _Machine(NamedTuple):
    column: int
    """Where its numbers stand in the table."""
    audit: int
    """AUDIT_ARCH_*: what the kernel calls it. Programs of 32 bits on the same machine have another."""
    seccomp: int


_MACHINES: Final = {
    "x86_64": _Machine(0, 0xC000003E, 317),
    "aarch64": _Machine(1, 0xC00000B7, 277),
}
#: System calls that end the job, with their numbers on x86-64 and aarch64; -1 where there is none.
_FORBIDDEN: Final = {
    # Into other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # Other mounts, other roots, other namespaces.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "open_tree_attr": (467, 467), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "setns": (308, 268),
    # Past the checks on paths.
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    # Large parts of the kernel that have had holes, and its keys.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "fanotify_init": (300, 262), "lookup_dcookie": (212, 18), "modify_ldt": (154, -1),
    # The host itself.
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "vhangup": (153, 58),
    "clock_settime": (227, 112), "settimeofday": (164, 170), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, -1), "ioperm": (173, -1),
}  # fmt: skip
#: System calls that get an error, and why they end no job.
_REFUSED: Final = {
    # glibc asks for it first and takes `clone` then, whose flags are not behind a pointer.
    "clone3": ((435, 435), errno.ENOSYS),
    # What reads the clock's state uses the calls that set it.
    "adjtimex": ((159, 171), errno.EPERM),
    "clock_adjtime": ((305, 266), errno.EPERM),
    "memfd_secret": ((447, 447), errno.EPERM),
    # The sockets of a pair are connected; a GPU job's own, which CUDA listens on, must not lead to a daemon's.
    "connect": ((42, 203), errno.EACCES),
}
#: Programs can be started from it, which Landlock does not see. libffi and some JIT compilers ask for it first and
#: have another way. CUDA shares memory by it.
_MEMFD: Final = ("memfd_create", (319, 279), errno.EPERM)
#: Calls of which only some uses are forbidden: see `_with_arguments`.
_SOCKET, _SOCKETPAIR, _CLONE, _UNSHARE, _PRLIMIT = (41, 198), (53, 199), (56, 220), (272, 97), (302, 261)
_PRCTL = (157, 167)
#: What descriptors can be sent by, and what a worker sends its listener by; refused after that. Those that are under
#: way and never received count for the user, over all his processes: with enough of them the service could send none
#: to the forkserver (ETOOMANYREFS), and no job would start.
_PASSING: Final = {"sendmsg": (46, 211), "sendmmsg": (307, 269)}

_AF_NETLINK: Final = 16
#: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; and NEWTIME, which in `clone` is another thing.
_NAMESPACES: Final = 0x7E020000
_NEWTIME: Final = 0x80
#: x86-64 marks the calls of its x32 programs by this bit, under which the same calls have other numbers.
_X32: Final = 0x40000000

_KILL_PROCESS: Final = 0x80000000
_NOTIFY: Final = 0x7FC00000
_ERRNO: Final = 0x00050000
_ALLOW: Final = 0x7FFF0000

# struct seccomp_data: number, architecture, instruction pointer, six arguments.
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_ARGUMENT: Final = 16  # the lower half of the first: both machines are little-endian
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06

_SET_MODE_FILTER: Final = 1
#: Without it, kernels before 5.16 slow a filtered process down to guard its secrets from code within it.
_SPEC_ALLOW: Final = 1 << 2
_NEW_LISTENER: Final = 1 << 3
_NOTIF_RECV: Final = 0xC0502100
#: struct seccomp_notif: id, pid, flags, then struct seccomp_data.
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")

Instruction = tuple[int, int, int, int]


def machine() -> _Machine | None:
    """The table's machine that this is, or None."""
    return _MACHINES.get(platform.machine())


def prepare() -> None:
    """In the template: make the programs, which its forks then have."""
    here = machine()
    if here is not None:
        for gpu in (False, True):
            program(here.column, here.audit, _NOTIFY, gpu)


@functools.cache
def program(column: int, audit: int, on_violation: int, gpu: bool) -> bytes:
    """The filter, as an array of struct sock_filter."""
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, on_violation),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if column == 0:
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, on_violation)]
    refused = {name: (numbers[column], code) for name, (numbers, code) in _REFUSED.items()}
    if not gpu:
        refused[_MEMFD[0]] = (_MEMFD[1][column], _MEMFD[2])
    for number in (numbers[column] for numbers in _FORBIDDEN.values()):
        code += _when(number, [(_RETURN, 0, 0, on_violation)]) if number >= 0 else []
    for number, error in refused.values():
        code += _when(number, [(_RETURN, 0, 0, _ERRNO | error)])
    code += _with_arguments(column, on_violation, gpu)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _passing(column: int) -> bytes:
    """The second filter, for after the report."""
    code = [(_LOAD, 0, 0, _NUMBER)]
    for numbers in _PASSING.values():
        code += _when(numbers[column], [(_RETURN, 0, 0, _ERRNO | errno.EPERM)])
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _with_arguments(column: int, on_violation: int, gpu: bool) -> list[Instruction]:
    first, second = (_LOAD, 0, 0, _ARGUMENT), (_LOAD, 0, 0, _ARGUMENT + 8)
    violation, allow = (_RETURN, 0, 0, on_violation), (_RETURN, 0, 0, _ALLOW)
    # glibc asks nscd for users by a local socket, and the kernel for addresses by netlink, and does without either.
    habit = (_RETURN, 0, 0, _ERRNO | errno.EACCES)
    # Streams and packets reach only what they are connected to; datagrams take any address,
    # that of a service's socket in the file system for one.
    connected = [
        *(second, (_AND, 0, 0, 0xF)),  # without SOCK_CLOEXEC and SOCK_NONBLOCK
        *((_EQUAL, 1, 0, socket.SOCK_STREAM), (_EQUAL, 0, 1, socket.SOCK_SEQPACKET), allow, habit),
    ]
    # A pair of sockets that are connected to each other is all that a compiler needs; CUDA listens on a local socket.
    paired = [first, (_EQUAL, 1, 0, socket.AF_UNIX), violation, *connected]
    local, netlink = (_EQUAL, 2, 0, socket.AF_UNIX), (_EQUAL, len(connected) if gpu else 1, 0, _AF_NETLINK)
    made = [first, local, netlink, violation, *(connected if gpu else [habit])]
    cloned = [first, (_ANY_BIT, 0, 1, _NAMESPACES), violation, allow]
    unshared = [first, (_ANY_BIT, 0, 1, _NAMESPACES | _NEWTIME), violation, allow]
    # Everybody asks for limits of his own (0); those of another process of the same user could be lowered as well.
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    limited = [first, (_EQUAL, 0, 1, 0), allow, refuse]
    # What lets nobody look into it, the watchdog cannot measure.
    hidden = [first, (_EQUAL, 1, 0, libc.PR_SET_DUMPABLE), allow, second, (_EQUAL, 1, 0, 0), allow, refuse]
    return [
        instruction
        for numbers, body in (
            (_SOCKET, made),
            (_SOCKETPAIR, paired),
            (_CLONE, cloned),
            (_UNSHARE, unshared),
            (_PRLIMIT, limited),
            (_PRCTL, hidden),
        )
        for instruction in _when(numbers[column], body)
    ]


def _when(number: int, body: list[Instruction]) -> list[Instruction]:
    """``body``, which has to end in a return whichever way it goes, for one system call."""
    return [(_EQUAL, 0, len(body), number), *body]


def install(demand: Demand, *, gpu: bool, report: int | None) -> Mechanism:
    """Filter the system calls of this thread and of all that it will start. Needs no_new_privs.

    Args:
        demand: what the policy says.
        gpu: whether the job may use a GPU, for which memfd_create is allowed.
        report: a socket to the keeper. It is sent the filter's listener, and is closed. Without one, a forbidden call
            fails with ENOSYS and ends nothing.
    """
    try:
        if demand == "off":
            return Mechanism(state=State.OFF)
        here = machine()
        if here is None:
            return Mechanism(state=State.UNAVAILABLE, reason=f"there is no table of calls for {platform.machine()}")
        try:
            listener = _load(here, program(here.column, here.audit, _NOTIFY, gpu), _NEW_LISTENER)
        except OSError as error:
            # EBUSY: a container manager listens already. EINVAL: Linux before 5.0, gVisor.
            if error.errno not in (errno.EBUSY, errno.EINVAL):
                return Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
            _load(here, program(here.column, here.audit, _KILL_PROCESS, gpu), 0)
            _load(here, _passing(here.column), 0)
            why = "another filter has a listener" if error.errno == errno.EBUSY else "this kernel has no listener"
            return Mechanism(state=State.PARTIAL, reason=f"a violation is told without its name: {why}")
        try:
            if report is not None:
                _send(report, listener)
        finally:
            os.close(listener)
        _load(here, _passing(here.column), 0)
        return Mechanism(state=State.ENFORCED)
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    finally:
        if report is not None:
            os.close(report)


def _load(here: _Machine, code: bytes, flags: int) -> int:
    """Install a program; returns what the call does, a listener if one was asked for."""
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    return libc.syscall(here.seccomp, _SET_MODE_FILTER, flags | _SPEC_ALLOW, ctypes.addressof(filter_))


def _send(report: int, listener: int) -> None:
    with socket.socket(fileno=os.dup(report)) as keeper, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        # If the keeper is gone, we end with it.
        socket.send_fds(keeper, [b"L"], [listener])


def receive_listener(report: socket.socket) -> int | None:
    """In the keeper: the descriptor that the worker has sent, or None if it has closed the socket without."""
    try:
        _, fds, _, _ = socket.recv_fds(report, 1, 1)
    except ConnectionResetError:
        return None
    return fds[0] if fds else None


def read_violation(listener: int) -> str:
    """In the keeper, when the listener is readable: the call that a process of the job waits in, or "" if it is gone.

    No answer is given: the process waits until it is killed.
    """
    notification = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, notification, True)
    except (FileNotFoundError, InterruptedError):
        return ""
    _, _, _, number, audit, _, first, *_ = _NOTIFICATION.unpack(notification)
    return name_of(number, audit, first)


def name_of(number: int, audit: int, first: int) -> str:
    """A system call for people, with what was asked of it: `ptrace`, `socket(AF_INET)`, `clone(CLONE_NEW*)`."""
    here = machine()
    if here is None or audit != here.audit:
        return f"system call {number} of a 32-bit program"
    if here.column == 0 and number >= _X32:
        return f"system call {number - _X32} of an x32 program"
    for name, numbers in _FORBIDDEN.items():
        if numbers[here.column] == number:
            return name
    if number in (_SOCKET[here.column], _SOCKETPAIR[here.column]):
        family = first & 0xFFFFFFFF
        with contextlib.suppress(ValueError):
            return f"socket({socket.AddressFamily(family).name})"
        return f"socket({family})"
    named = {_CLONE[here.column]: "clone", _UNSHARE[here.column]: "unshare"}
    return f"{named[number]}(CLONE_NEW*)" if number in named else f"system call {number}"

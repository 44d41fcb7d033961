"""Own network, SysV objects and /dev/shm for one job, through namespaces of the kernel.

Called in the keeper, which has one thread and forks the job's worker afterwards. It talks to the outside through
inherited sockets, which namespaces do not touch. All of it ends, with everything in it, with the last process.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from sandbox.enforce import libc
from sandbox.limits import MIB, Confinement, Demand
from sandbox.results import Mechanism, State

SHM = "/dev/shm"
#: Size of a job's own /dev/shm, in bytes. The memory of its files is nobody's resident memory: this is its limit.
SHM_BYTES = 64 * MIB
_CAP_SYS_ADMIN = 21


def enter(confinement: Confinement, shm_bytes: int = SHM_BYTES) -> dict[str, Mechanism]:
    """Move this process into namespaces of its own, each as far as the host allows.

    Without CAP_SYS_ADMIN a user namespace comes first, in which this user has the same id and all capabilities;
    they are given up again before this returns.
    """
    plan: dict[str, tuple[Demand, Callable[[], Mechanism]]] = {
        "ipc_namespace": (confinement.ipc_namespace, _ipc),
        "mount_namespace": (confinement.mount_namespace, lambda: _mount(shm_bytes)),
        "network_namespace": (confinement.network_namespace, _network),
    }
    result = {name: Mechanism(state=State.OFF) for name in plan}
    wanted = {name: enter_one for name, (demand, enter_one) in plan.items() if demand != "off"}
    if not wanted:
        return result
    own_user = not is_privileged()
    if own_user and confinement.run_as:
        refused = Mechanism(state=State.UNAVAILABLE, reason="without CAP_SYS_ADMIN not together with run_as")
        return result | dict.fromkeys(wanted, refused)
    if own_user:
        try:
            _enter_user_namespace()
        except OSError as error:
            refused = Mechanism(state=State.UNAVAILABLE, reason=f"no user namespace: {libc.reason(error)}")
            return result | dict.fromkeys(wanted, refused)
    for name, enter_one in wanted.items():
        try:
            result[name] = enter_one()
        except OSError as error:
            result[name] = Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    if own_user:
        libc.drop_capabilities()
    return result


def is_privileged() -> bool:
    """Whether this process has CAP_SYS_ADMIN in effect."""
    with open("/proc/self/status", "rb", buffering=0) as status:
        for line in status.read(65_536).splitlines():
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def _enter_user_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    libc.unshare(libc.CLONE_NEWUSER)
    # Without this denial the kernel lets no unprivileged process write its gid_map.
    _write("/proc/self/setgroups", b"deny")
    _write("/proc/self/uid_map", f"{user} {user} 1".encode())
    _write("/proc/self/gid_map", f"{group} {group} 1".encode())


def _ipc() -> Mechanism:
    return _unshare(libc.CLONE_NEWIPC, "ipc")


def _network() -> Mechanism:
    # Its loopback stays down: nothing in a compile needs it.
    return _unshare(libc.CLONE_NEWNET, "net")


def _mount(shm_bytes: int) -> Mechanism:
    state = _unshare(libc.CLONE_NEWNS, "mnt")
    if state.state is not State.ENFORCED:
        return state
    # Not MS_PRIVATE: with it a running job would keep a volume busy that the host unmounts. As a slave it follows
    # the host's unmounts, and nothing that is mounted here shows outside.
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_SLAVE)
    if not os.path.isdir(SHM):
        return Mechanism(state=State.PARTIAL, reason=f"this host has no {SHM}; own mounts, but nothing to replace")
    before = os.stat(SHM).st_dev
    options = f"mode=1777,size={shm_bytes},nr_inodes=4096"
    try:
        libc.mount("tmpfs", SHM, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, options)
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=f"no own {SHM}: {libc.reason(error)}")
    if os.stat(SHM).st_dev == before:
        return Mechanism(state=State.UNAVAILABLE, reason=f"a mount on {SHM} was accepted but is not there")
    return Mechanism(state=State.ENFORCED)


def _unshare(flag: int, name: str) -> Mechanism:
    link = f"/proc/self/ns/{name}"
    before = os.readlink(link)
    libc.unshare(flag)
    if os.readlink(link) == before:
        return Mechanism(state=State.UNAVAILABLE, reason="unshare was accepted but the namespace is the old one")
    return Mechanism(state=State.ENFORCED)


def _write(path: str, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)

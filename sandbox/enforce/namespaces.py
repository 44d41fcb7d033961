"""Own network, SysV objects, /dev/shm, /tmp and process ids for one job, through namespaces of the kernel.

In two steps. :func:`enter` is called in the keeper, which has one thread: the namespaces that it shares with the job,
and a mount namespace in which only /dev/shm is new. :func:`close_off` is called in the keeper's first child: a second
mount namespace, in which all but the job's scratch folder is read-only. The keeper itself still sees the host's
files and processes: it has to measure, to kill and to clean up. Both talk to the outside through inherited sockets,
which namespaces do not touch. All of it ends, with everything in it, with the last process.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.enforce import libc
from sandbox.limits import MIB, Confinement, Demand
from sandbox.results import Mechanism, State

SHM = "/dev/shm"
#: Folders for temporary files that every user of a host can write.
TEMPORARY = ("/tmp", "/var/tmp")
#: Size of a job's own /dev/shm, and of each of its other temporary folders, in bytes. The memory of their files is
#: nobody's resident memory: this is its limit.
SHM_BYTES = 64 * MIB
_CAP_SYS_ADMIN = 21
#: What stays read-only in a /proc that can be written: the kernel's own switches, which belong to root.
_KERNEL_SWITCHES = ("sys", "sysrq-trigger", "irq", "bus", "fs", "acpi", "scsi", "driver")


@dataclass
class Entered:
    """Which namespaces a keeper has made for its job."""

    states: dict[str, Mechanism] = field(default_factory=dict)
    own_user: bool = False
    """In a user namespace, where it has all capabilities until they are given up."""
    own_mounts: bool = False
    own_shm: bool = False
    """/dev/shm is the job's own."""
    own_pids: bool = False
    """The next child of this process is pid 1 of the job's process ids."""
    gpu: bool = False
    """The job may use a GPU: CUDA names its threads by files in /proc, and does not start if it cannot."""


def enter(confinement: Confinement, shm_bytes: int = SHM_BYTES, root: str = "/", *, gpu: bool = False) -> Entered:
    """Move this process into namespaces of its own, each as far as the host allows. The folder ``root`` stays where it
    is, also if it lies in /dev/shm. ``gpu``: whether the job may use a GPU.

    Without CAP_SYS_ADMIN a user namespace comes first, in which this user has the same id and all capabilities. Its
    first child needs them; then give them up (`libc.drop_capabilities`).
    """
    entered = Entered(gpu=gpu)
    plan: dict[str, tuple[Demand, Callable[[], Mechanism]]] = {
        "ipc_namespace": (confinement.ipc_namespace, _ipc),
        "mount_namespace": (confinement.mount_namespace, lambda: _mount(shm_bytes, entered, root)),
        "network_namespace": (confinement.network_namespace, _network),
        "pid_namespace": (confinement.pid_namespace, lambda: _pids(entered)),
    }
    entered.states = {name: Mechanism(state=State.OFF) for name in plan}
    wanted = {name: enter_one for name, (demand, enter_one) in plan.items() if demand != "off"}
    if not wanted:
        return entered
    if not is_privileged():
        if confinement.run_as:
            refused = Mechanism(state=State.UNAVAILABLE, reason="without CAP_SYS_ADMIN not together with run_as")
            entered.states |= dict.fromkeys(wanted, refused)
            return entered
        try:
            if number := try_user_namespace():
                raise OSError(number, os.strerror(number))
            _enter_user_namespace()
        except OSError as error:
            refused = Mechanism(state=State.UNAVAILABLE, reason=f"no user namespace: {libc.reason(error)}")
            entered.states |= dict.fromkeys(wanted, refused)
            return entered
        entered.own_user = True
    for name, enter_one in wanted.items():
        try:
            entered.states[name] = enter_one()
        except OSError as error:
            entered.states[name] = Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    return entered


def close_off(entered: Entered, scratch: Path, read: Iterable[str] = (), size: int = SHM_BYTES) -> dict[str, Mechanism]:
    """Finish the namespaces of :func:`enter`, in the first child of the process that has entered them.

    Own /tmp and /var/tmp, in which only ``scratch`` and what ``read`` names shows; everything but these, /dev/shm
    and ``scratch`` read-only; the own process ids in /proc. Folders beside ``scratch`` are those of other jobs and
    are hidden, too. This process has no capability in its user namespace afterwards.

    Args:
        scratch: the job's folder.
        read: absolute paths that the job has to read.
        size: of each temporary folder, in bytes.
    """
    states = dict(entered.states)
    if entered.own_mounts:
        libc.unshare(libc.CLONE_NEWNS)
        reason = states["mount_namespace"].reason
        problems = [reason] if reason else []
        if entered.own_pids:
            states["pid_namespace"] = _own_proc(states["pid_namespace"])
        problems += _only_scratch(entered, os.path.realpath(scratch), read, size)
        if problems:
            states["mount_namespace"] = Mechanism(state=State.PARTIAL, reason="; ".join(problems))
    elif entered.own_pids:
        reason = "no own mounts: /proc shows the processes of the host, which cannot be signalled"
        states["pid_namespace"] = Mechanism(state=State.PARTIAL, reason=reason)
    if entered.own_user:
        libc.drop_capabilities()
    return states


def is_privileged() -> bool:
    """Whether this process has CAP_SYS_ADMIN in effect."""
    with open("/proc/self/status", "rb", buffering=0) as status:
        for line in status.read(65_536).splitlines():
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


@functools.cache
def try_user_namespace() -> int:
    """Why this process cannot be in a user namespace of its own, as an errno; 0 if it can.

    Tried in a fork, once: some hosts let one be made but not our ids be mapped into it (AppArmor of Ubuntu 24.04; root
    without CAP_SETFCAP), and nobody gets out of it again: the job would run as the overflow user, 65534.
    """
    pid = os.fork()
    if pid == 0:
        number = errno.EPERM
        try:
            _enter_user_namespace()
            number = 0
        except OSError as error:
            number = error.errno or errno.EPERM
        finally:
            os._exit(number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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


def _pids(entered: Entered) -> Mechanism:
    if entered.gpu and not entered.own_mounts:
        reason = "CUDA finds its threads in /proc, which without own mounts shows the host's process ids"
        return Mechanism(state=State.UNAVAILABLE, reason=reason)
    # Python has no name for the link of the children's namespace: it differs from our own as soon as it is new.
    before = os.readlink("/proc/self/ns/pid_for_children")
    libc.unshare(libc.CLONE_NEWPID)
    try:
        entered.own_pids = os.readlink("/proc/self/ns/pid_for_children") != before
    except FileNotFoundError:
        entered.own_pids = True  # the kernel has no name for it before it has a process
    if not entered.own_pids:
        return Mechanism(state=State.UNAVAILABLE, reason="unshare was accepted but the namespace is the old one")
    return Mechanism(state=State.ENFORCED)


def _mount(shm_bytes: int, entered: Entered, root: str) -> Mechanism:
    state = _unshare(libc.CLONE_NEWNS, "mnt")
    if state.state is not State.ENFORCED:
        return state
    # Not MS_PRIVATE: with it a running job would keep a volume busy that the host unmounts. As a slave it follows
    # the host's unmounts, and nothing that is mounted here shows outside.
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_SLAVE)
    if not os.path.isdir(SHM):
        entered.own_mounts = True
        return Mechanism(state=State.PARTIAL, reason=f"this host has no {SHM}")
    before = os.stat(SHM).st_dev
    root = os.path.realpath(root)
    kept = _open_in(root, [SHM])
    try:
        _tmpfs(SHM, shm_bytes)
        if kept is not None:
            _make_target(root, kept)
            libc.mount(f"/proc/self/fd/{kept}", root, None, libc.MS_BIND | libc.MS_REC)
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=f"no own {SHM}: {libc.reason(error)}")
    finally:
        if kept is not None:
            os.close(kept)
    if os.stat(SHM).st_dev == before:
        return Mechanism(state=State.UNAVAILABLE, reason=f"a mount on {SHM} was accepted but is not there")
    entered.own_mounts = entered.own_shm = True
    return Mechanism(state=State.ENFORCED)


def _own_proc(state: Mechanism) -> Mechanism:
    try:
        libc.mount("proc", "/proc", "proc", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)
    except OSError as error:
        # A container masks files in /proc, and the kernel shows no user namespace a whole one then.
        reason = f"/proc shows the processes of the host, which cannot be signalled: {libc.reason(error)}"
        return Mechanism(state=State.PARTIAL, reason=reason)
    if os.readlink("/proc/self") != str(os.getpid()):
        return Mechanism(state=State.PARTIAL, reason="a mount on /proc was accepted but is not there")
    return state


def _only_scratch(entered: Entered, scratch: str, read: Iterable[str], size: int) -> list[str]:
    """Returns what could not be reached."""
    hidden = {os.path.realpath(place) for place in TEMPORARY if os.path.isdir(place)} | {os.path.dirname(scratch)}
    # What lies in a hidden folder and is needed is opened before, and shown again at its place.
    needed = {path: handle for path in (*read, scratch) if (handle := _open_in(path, hidden, scratch)) is not None}
    writable = [SHM] if entered.own_shm else []
    problems: list[str] = []
    done: list[str] = []
    os.umask(0o022)  # the worker may become another user, and sets its own
    try:
        for place in sorted(hidden):
            if os.path.isdir(place):  # one that lies in another is gone with it
                _tmpfs(place, size)
                done.append(place)
        writable += done
        for path in sorted(needed, key=len):
            _make_target(path, needed[path])
            libc.mount(f"/proc/self/fd/{needed[path]}", path, None, libc.MS_BIND | libc.MS_REC)
            done.append(path)
    except OSError as error:
        # Half of it would hide what the job needs.
        problems.append(f"no own temporary folders: {libc.reason(error)}")
        for path in reversed(done):
            libc.unmount(path)
        writable = [SHM] if entered.own_shm else []
    finally:
        for handle in needed.values():
            os.close(handle)
    try:
        if problems:
            libc.mount(scratch, scratch, None, libc.MS_BIND | libc.MS_REC)
        threads = _own_threads(entered) if entered.gpu else []
        libc.set_read_only("/", True, recursive=True)
        for path in ({scratch, *writable} - set(read)).union(threads):
            libc.set_read_only(os.path.realpath(path), False)
        if not os.statvfs("/").f_flag & os.ST_RDONLY:
            problems.append("/ can be written: mount_setattr was accepted but has no effect")
    except OSError as error:
        problems.append(f"the rest is not read-only, which needs Linux 5.12: {libc.reason(error)}")
    return problems


def _own_threads(entered: Entered) -> list[str]:
    """What of /proc can be written so that the worker can name its threads, as mounts of their own."""
    if not entered.own_pids:
        tasks = f"/proc/{os.getpid()}/task"  # without an init this process is the worker
        libc.mount(tasks, tasks, None, libc.MS_BIND)
        return [tasks]
    if os.readlink("/proc/self") != str(os.getpid()):
        return []  # the host's: it shows the processes of others
    for switch in (f"/proc/{name}" for name in _KERNEL_SWITCHES):
        if os.path.exists(switch):
            libc.mount(switch, switch, None, libc.MS_BIND | libc.MS_REC)
    return ["/proc"]


def _tmpfs(place: str, size: int) -> None:
    options = f"mode=1777,size={size},nr_inodes=4096"
    libc.mount("tmpfs", place, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, options)


def _open_in(path: str, hidden: Iterable[str], always: str = "") -> int | None:
    """A handle on ``path`` if it lies in a hidden folder, or is ``always``; None if not, or if it is gone."""
    if path == always or any((path + "/").startswith(place + "/") for place in hidden):
        try:
            return os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return None  # gone, or not for this user: nothing that a job could read
    return None


def _make_target(path: str, handle: int) -> None:
    """A folder or an empty file to mount on, if there is none."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(f"/proc/self/fd/{handle}"):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o644))


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

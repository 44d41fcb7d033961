"""A cgroup for each job: the kernel counts its memory and its tasks, and stops it where the policy says.

Only where the host has delegated a place for it, in cgroup v2 or v1; nothing of the host is moved or limited. The
place is looked for in /proc/self/cgroup and /proc/self/mountinfo, or named by the policy:

- v2: the own cgroup or one above it, in which this user may make cgroups and whose children have, or can be given,
  the controllers memory and pids. A cgroup that holds processes cannot limit children (the root of the host is
  exempt), so it is mostly one above. Never one above a limit: the job would escape it.
- v1: below the own cgroup, in each controller's hierarchy.

A job's cgroup bears the names of its forkserver's scratch root and of its scratch folder. So what a crashed run has
left is found by name, and whether its owner lives is told by the root's lock.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from sandbox.enforce.libc import reason
from sandbox.limits import Confinement, Limits
from sandbox.results import Mechanism, State

#: What a place must give, and what it may give besides.
NEEDED: Final = ("memory", "pids")
_WANTED: Final = (*NEEDED, "cpu")
_V2: Final = "v2"
#: No swap for a job: v2; v1, where it is the sum of memory and swap. Not there without swap accounting.
_SWAP: Final = ("memory.swap.max", "memory.memsw.limit_in_bytes")
#: Period of the CPU quota, in microseconds: the kernel's default.
_PERIOD: Final = 100_000
#: Seconds for the removal of a cgroup whose processes are dead: the kernel lets go of them a moment later.
_REMOVE_SECONDS: Final = 1.0
#: Seconds for the kill of what a dead owner has left running.
_KILL_SECONDS: Final = 2.0


@dataclass(frozen=True)
class Place:
    """A cgroup in which cgroups of jobs can be made, with what it gives them."""

    folder: str
    controllers: frozenset[str]
    version: str


class Seen(NamedTuple):
    """What the kernel counted of a job."""

    oom_kills: int = 0
    """Processes that were killed because the job's memory was used up."""
    refused_forks: int = 0
    """Processes and threads that were refused because the job had too many."""
    peak_bytes: int = 0
    """Most memory, page cache and kernel memory included; 0 if the kernel does not tell (v2 before Linux 5.19)."""


class NotDelegated(Exception):
    """This host gives us no place for cgroups; the message says why."""


class Group:
    """The cgroup of one job, in each place that is needed for its controllers."""

    def __init__(self, name: str, places: tuple[Place, ...], limits: Limits) -> None:
        """Make it and set its limits.

        Raises:
            OSError: the kernel refuses; nothing is left of it.
        """
        self.folders: list[tuple[str, Place]] = []
        self.joins: list[int] = []
        """Descriptors that :meth:`join` needs."""
        try:
            for place in places:
                folder = os.path.join(place.folder, name)
                os.mkdir(folder, 0o755)
                self.folders.append((folder, place))
                for file, value in _settings(place, limits):
                    try:
                        _write(f"{folder}/{file}", value)
                    except FileNotFoundError:
                        if file not in _SWAP:
                            raise
                self.joins.append(os.open(os.path.join(folder, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            self.close()
            self.remove()
            raise

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers that are on."""
        return frozenset().union(*(place.controllers for _, place in self.folders))

    def join(self) -> None:
        """Move this process into it, for good. Raises OSError."""
        try:
            for fd in self.joins:
                os.write(fd, b"0")
        finally:
            self.close()

    def lower_memory(self, limit_bytes: int) -> None:
        """Lower the limit on memory; a job may be granted less than its policy says. Raises OSError."""
        for folder, place in self.folders:
            if "memory" in place.controllers:
                v2 = place.version == _V2
                _write(f"{folder}/{'memory.max' if v2 else 'memory.limit_in_bytes'}", str(limit_bytes))
                with contextlib.suppress(FileNotFoundError):
                    if not v2:
                        _write(f"{folder}/{_SWAP[1]}", str(limit_bytes))

    def close(self) -> None:
        """Close what :meth:`join` needs."""
        while self.joins:
            os.close(self.joins.pop())

    def kill(self) -> None:
        """Kill every process in it at once, where the kernel can (v2, Linux 5.14)."""
        for folder, _ in self.folders:
            with contextlib.suppress(FileNotFoundError):  # an older kernel: the caller kills by pid
                _write(f"{folder}/cgroup.kill", "1")

    def seen(self) -> Seen:
        """What the kernel has counted up to now."""
        oom_kills = refused = peak = 0
        for folder, place in self.folders:
            if "memory" in place.controllers:
                v2 = place.version == _V2
                oom_kills += _keyed(f"{folder}/{'memory.events' if v2 else 'memory.oom_control'}", "oom_kill")
                peak = max(peak, _number(f"{folder}/{'memory.peak' if v2 else 'memory.max_usage_in_bytes'}"))
            if "pids" in place.controllers:
                refused += _keyed(f"{folder}/pids.events", "max")
        return Seen(oom_kills, refused, peak)

    def remove(self) -> None:
        """Remove it, once its processes are dead. What cannot be removed is found by :func:`sweep` later."""
        for folder, _ in self.folders:
            _remove(folder)


def stir() -> None:
    """Move this process into the cgroup that it is in. That changes nothing, but a move waits for a grace period of RCU
    (10 to 20 ms), and one that follows within the next one does not: so the job's own move need not wait."""
    own = _own()
    for mount in _mounts():
        names = [""] if mount.kind == "cgroup2" else sorted(mount.controllers & own.keys())
        folder = mount.folder(own.get(names[0], "")) if names else None
        if folder is not None:
            with contextlib.suppress(OSError):  # read-only, or not ours to write: then the job waits
                _write(f"{folder}/cgroup.procs", "0")
                return


def enter(confinement: Confinement, limits: Limits, name: str) -> tuple[Mechanism, Group | None]:
    """Make the cgroup ``name`` for a job, as the policy says. Nobody is in it yet: see :meth:`Group.join`."""
    if confinement.cgroup == "off":
        return Mechanism(state=State.OFF), None
    wanted = _WANTED if limits.cores else NEEDED
    try:
        places = find(confinement.cgroup_parent, wanted)
        group = Group(name, places, limits)
    except NotDelegated as problem:
        return Mechanism(state=State.UNAVAILABLE, reason=str(problem)), None
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=f"{error.filename}: {reason(error)}"), None
    missing = [controller for controller in wanted if controller not in group.controllers]
    if missing:
        return Mechanism(state=State.PARTIAL, reason=f"no controller {' and '.join(missing)} here"), group
    return Mechanism(state=State.ENFORCED), group


def find(parent: str = "", wanted: tuple[str, ...] = NEEDED) -> tuple[Place, ...]:
    """Where this process may make cgroups of jobs.

    Args:
        parent: a folder of cgroup v2 or v1 that the policy names.
        wanted: the controllers that are switched on there for v2; others that are on already are used as well. Empty:
            none, for who only looks.

    Raises:
        NotDelegated: nowhere.
    """
    mounts = list(_mounts())
    if parent:
        return (_named(parent, mounts, wanted),)
    own = _own()
    places: list[Place] = []
    problems: list[str] = []
    for mount in mounts:
        if mount.kind == "cgroup2" and (folder := mount.folder(own.get("", ""))) is not None:
            try:
                places.append(_v2_place(folder, mount.point, wanted))
                break
            except NotDelegated as problem:
                problems.append(str(problem))
    found = set().union(*(place.controllers for place in places))
    for mount in mounts:
        names = mount.controllers & set(_WANTED) - found if mount.kind == "cgroup" else set()
        for controller in sorted(names):
            folder = mount.folder(own.get(controller, ""))
            if folder is not None and os.access(folder, os.W_OK):
                # Controllers that are mounted together (cpu,cpuacct) share one cgroup.
                places.append(Place(folder, frozenset(names), "v1"))
                found |= names
                break
            problems.append(f"{folder or mount.point} is not writable")
    if not found & set(NEEDED):
        raise NotDelegated("; ".join(problems) or "no cgroup file system is mounted")
    return tuple(places)


def left(names: str, parent: str = "") -> list[str]:
    """The folders of cgroups of ours. ``names``: a glob pattern, what :func:`group_name` or :func:`group_names` says.
    ``parent``: the policy's `cgroup_parent`."""
    try:
        places = find(parent, ())
    except (NotDelegated, OSError):
        return []  # then none was made
    return [str(folder) for place in places for folder in Path(place.folder).glob(names)]


def sweep(names: str, parent: str = "") -> int:
    """Kill what runs in these cgroups of ours (see :func:`left`), and remove them. Returns how many there were.

    Only for a scratch root that is ours, or whose lock nobody holds.
    """
    found = left(names, parent)
    for folder in found:
        _kill_all(folder)
        _remove(folder)
    return len(found)


def group_names(root: Path) -> str:
    """A pattern for the cgroups of all jobs of a scratch root."""
    return f"{glob.escape(root.name)}.*"


def group_name(scratch: Path) -> str:
    """The name of the cgroup of the job with this scratch folder."""
    return f"{scratch.parent.name}.{scratch.name}"


class _Mount(NamedTuple):
    kind: str
    point: str
    root: str
    controllers: frozenset[str]

    def folder(self, path: str) -> str | None:
        """Where the cgroup ``path`` of /proc/self/cgroup shows in this mount; None if it does not."""
        if not path or not (path + "/").startswith(self.root.rstrip("/") + "/"):
            return None
        return os.path.normpath(f"{self.point}/{path[len(self.root.rstrip('/')) :]}")


def _mounts() -> Iterator[_Mount]:
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            _, _, _, root, point, *_ = left.split(" ")
            names = frozenset(options.split(",")) if kind == "cgroup" else frozenset()
            yield _Mount(kind, point.encode().decode("unicode_escape"), root, names)


def _own() -> dict[str, str]:
    """The own cgroup by controller; that of v2 under the empty name."""
    found: dict[str, str] = {}
    for line in _read("/proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        found |= dict.fromkeys(names.split(","), path)
    return found


def _named(parent: str, mounts: list[_Mount], wanted: tuple[str, ...]) -> Place:
    folder = os.path.normpath(parent)
    for mount in sorted(mounts, key=lambda each: -len(each.point)):
        if (folder + "/").startswith(mount.point + "/"):
            if mount.kind == "cgroup2":
                return _usable(folder, wanted)
            if os.access(folder, os.W_OK):
                return Place(folder, mount.controllers & set(_WANTED), "v1")
            break
    raise NotDelegated(f"confinement.cgroup_parent = {parent!r} is no cgroup, or not writable")


def _v2_place(own: str, top: str, wanted: tuple[str, ...]) -> Place:
    folder, problems = own, []
    while True:
        try:
            return _usable(folder, wanted)
        except NotDelegated as problem:
            problems.append(str(problem))
        if folder == top:
            break
        limited = [
            file
            for file in ("memory.max", "memory.high", "pids.max", "cpu.max")
            if not _is_unlimited(f"{folder}/{file}")
        ]
        if limited:
            problems.append(f"{folder} has a limit ({', '.join(limited)}) that a job above it would escape")
            break
        folder = os.path.dirname(folder)
    raise NotDelegated("; ".join(problems))


def _usable(folder: str, wanted: tuple[str, ...]) -> Place:
    """A cgroup of v2, with the controllers that its children have or were given now."""
    available = set(_read(f"{folder}/cgroup.controllers").split())
    lacking = [controller for controller in NEEDED if controller not in available]
    if lacking:
        raise NotDelegated(f"{folder} has no controller {' and '.join(lacking)}")
    if not (os.access(folder, os.W_OK) and os.access(f"{folder}/cgroup.procs", os.W_OK)):
        raise NotDelegated(f"{folder} is not writable")
    control = f"{folder}/cgroup.subtree_control"
    for controller in wanted:  # one more changes how the host shares among all that is beside a job
        if controller in available and controller not in _read(control).split():
            try:
                _write(control, f"+{controller}")
            except OSError as error:
                if controller not in NEEDED:
                    continue  # the caller sees that it is not there
                if error.errno == errno.EBUSY:
                    raise NotDelegated(f"{folder} holds processes, so its children cannot be limited") from None
                raise NotDelegated(f"{control}: {reason(error)}") from None
    on = frozenset(_read(control).split())
    if not wanted and not on.issuperset(NEEDED):  # so none of ours is in it
        raise NotDelegated(f"{folder} passes on no controller {' and '.join(sorted(set(NEEDED) - on))}")
    return Place(folder, on & frozenset(_WANTED), _V2)


def _settings(place: Place, limits: Limits) -> Iterator[tuple[str, str]]:
    """Files and values, for what the kernel has."""
    v2 = place.version == _V2
    if "memory" in place.controllers:
        size = str(limits.memory_bytes)
        yield "memory.max" if v2 else "memory.limit_in_bytes", size
        yield (_SWAP[0], "0") if v2 else (_SWAP[1], size)
        if v2:
            yield "memory.oom.group", "1"
    if "pids" in place.controllers:
        # One more than the watchdog allows, so that its word comes first: it kills, this only refuses.
        yield "pids.max", str(limits.threads + 1)
    if "cpu" in place.controllers and limits.cores:
        quota = max(1000, int(limits.cores * _PERIOD))
        if v2:
            yield "cpu.max", f"{quota} {_PERIOD}"
        else:
            yield "cpu.cfs_period_us", str(_PERIOD)
            yield "cpu.cfs_quota_us", str(quota)


def _kill_all(folder: str) -> None:
    with contextlib.suppress(OSError):
        _write(f"{folder}/cgroup.kill", "1")
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        try:
            # 0 is one of another PID namespace, which has no number here; to `kill` it is our own process group.
            pids = [pid for pid in map(int, _read(f"{folder}/cgroup.procs").split()) if pid]
        except OSError:
            return  # gone meanwhile
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # another user's: not ours to kill
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _remove(folder: str) -> None:
    deadline = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            os.rmdir(folder)
            return
        except FileNotFoundError:
            return
        except OSError:
            # The job may have made cgroups of its own in it; and the dead take a moment to leave.
            for inner, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(inner)
            if not os.path.exists(folder) or time.monotonic() > deadline:
                return
            time.sleep(0.002)


def _is_unlimited(path: str) -> bool:
    try:
        return _read(path).startswith("max")
    except FileNotFoundError:
        return True  # no such controller here


def _keyed(path: str, key: str) -> int:
    for line in _read_if(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _number(path: str) -> int:
    return int(_read_if(path) or 0)


def _read_if(path: str) -> str:
    try:
        return _read(path)
    except FileNotFoundError:
        return ""  # not in this kernel


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(handle, text.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(handle)

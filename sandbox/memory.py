"""How much memory is free for jobs: the least that the host and each memory cgroup above this process have left.

Sources. Of the host: MemAvailable of /proc/meminfo, "an estimate of how much memory is available for starting new
applications, without swapping" (proc_meminfo(5)). Of a cgroup: its limit minus its usage, without the page cache that
was not touched lately (`inactive_file`), which the kernel gives up first. That is the working set by which Kubernetes
decides on evictions (https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/). Version 2:
memory.max and memory.high, memory.current, memory.stat (Documentation/admin-guide/cgroup-v2.rst). Version 1:
memory.limit_in_bytes, memory.usage_in_bytes, memory.stat with its `total_` and `hierarchical_` lines
(Documentation/admin-guide/cgroup-v1/memory.rst).

Swap is not counted: a compile that swaps is one that times out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

#: A limit of version 1 that is none: the largest number of pages, in bytes, is just below this on every machine.
_NO_LIMIT: Final = 1 << 60


class Free(NamedTuple):
    """What one bound leaves."""

    bytes: int
    """Free memory, never negative."""
    source: str
    """Which bound it is, for people: `the host`, `the cgroup /pod (memory.max = 4096 MiB)`."""


class Memory:
    """Reads the bounds, afresh at each call; takes well below a millisecond. Thread-safe."""

    def __init__(self, root: Path = Path("/")) -> None:
        """``root``: where /proc and the cgroup file systems are found."""
        self._root = root

    def free(self) -> Free | None:
        """The tightest bound, or None if the system tells nothing."""
        return min(self.bounds(), key=lambda bound: bound.bytes, default=None)

    def bounds(self) -> list[Free]:
        """Every bound that applies: the host, then the cgroups from this process's own upwards."""
        found = []
        available = _table(self._root / "proc/meminfo").get("MemAvailable:")
        if available is not None:
            found.append(Free(available * 1024, "the host"))
        for version, mount, path in self._cgroups():
            folder = mount / path.strip("/")
            while True:
                name = "/" if folder == mount else f"/{folder.relative_to(mount)}"
                bound = (_version_2 if version == 2 else _version_1)(folder, name)
                if bound is not None:
                    found.append(bound)
                if folder == mount:
                    break
                folder = folder.parent
        return found

    def _cgroups(self) -> Iterator[tuple[int, Path, str]]:
        """Version, mount point and this process's path below it, of each hierarchy that may hold memory."""
        paths: dict[int, str] = {}
        for line in _read(self._root / "proc/self/cgroup").splitlines():
            number, controllers, path = (*line.split(":", 2), "", "")[:3]
            if number == "0" and not controllers:
                paths[2] = path
            elif "memory" in controllers.split(","):
                paths[1] = path
        for line in _read(self._root / "proc/self/mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if len(fields) < 5 or len(kind) < 3:
                continue
            version = 2 if kind[0] == "cgroup2" else 1 if kind[0] == "cgroup" and "memory" in kind[2].split(",") else 0
            if version in paths:
                path = _below(_plain(fields[3]), paths.pop(version))
                yield version, self._root / _plain(fields[4]).strip("/"), path


def _below(root: str, path: str) -> str:
    """``path`` as seen from a mount that shows ``root``. A container that is shown another part than its path names
    (the path is one of the host, or leads out of its namespace) has its own cgroup as the root of the mount."""
    if ".." in path.split("/"):
        return "/"
    if root == "/":
        return path
    return path[len(root) :] if path == root or path.startswith(f"{root}/") else "/"


def _version_2(folder: Path, name: str) -> Free | None:
    limits = [(limit, file) for file in ("memory.max", "memory.high") if (limit := _number(folder / file)) is not None]
    used = _number(folder / "memory.current")
    if not limits or used is None:
        return None
    limit, file = min(limits)
    cache = _table(folder / "memory.stat").get("inactive_file", 0)
    return _left(limit, used, cache, name, file)


def _version_1(folder: Path, name: str) -> Free | None:
    stat = _table(folder / "memory.stat")
    own, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if own is None or used is None:
        return None
    # Also the limits of cgroups above that a container is not shown.
    limit = min(own, stat.get("hierarchical_memory_limit", own))
    file = "memory.limit_in_bytes" if limit == own else "a limit above it"
    if limit >= _NO_LIMIT:
        return None
    return _left(limit, used, stat.get("total_inactive_file", 0), name, file)


def _left(limit: int, used: int, cache: int, name: str, file: str) -> Free:
    left = limit - max(0, used - cache)
    return Free(max(0, left), f"the cgroup {name} ({file} = {limit >> 20} MiB)")


def _read(path: Path) -> str:
    """A whole file, or "" where there is none that this process may read: then this bound is not known."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None  # `max` is no number


def _table(path: Path) -> dict[str, int]:
    """`name number` lines, whatever else they hold."""
    fields = (line.split() for line in _read(path).splitlines())
    return {each[0]: int(each[1]) for each in fields if len(each) > 1 and each[1].isdecimal()}


def _plain(field: str) -> str:
    """A field of mountinfo without its octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)

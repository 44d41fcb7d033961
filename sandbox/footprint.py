"""Which processes a sandbox keeps, what they are, and the memory that they hold."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from sandbox.meter import sizes
from sandbox.processes import read_file, walk

Role = Literal["forkserver", "keeper", "init", "worker", "tool"]


class Resident(BaseModel):
    """One process, at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pid: int
    role: Role
    """`forkserver` is the template; each child has a keeper, an init if it has process ids of its own, and a worker;
    `tool` is what a worker has started."""
    command: str
    """Name of the program, at most 15 characters."""
    standby: bool
    """Whether it belongs to a child that waits for a job."""
    pss_bytes: int
    """Proportional set size: memory that it shares is divided by the number of those that share it. Their sum is what
    all of them take. 0 if it may not be read."""
    private_bytes: int
    """Memory that no other process has. 0 if it may not be read."""
    wakeups: int
    """How often its first thread has been given a core so far, a count; if it does not grow, it sleeps."""


def residents(template: int, standbys: frozenset[int]) -> list[Resident]:
    """The template and what lives below it. ``standbys``: the keepers of those that wait. Takes some 2 ms for each
    100 MB that a process shows."""
    found: list[Resident] = []
    roles: dict[int, Role] = {}
    waiting: set[int] = set()
    for stat in walk(template):
        if stat.dead:
            continue
        above = roles.get(stat.ppid)
        role: Role = "tool"
        if stat.pid == template:
            role = "forkserver"
        elif above == "forkserver":
            role = "keeper"
        elif above in ("keeper", "init"):
            role = "init" if above == "keeper" and _is_init(stat.pid) else "worker"
        roles[stat.pid] = role
        if stat.pid in standbys or stat.ppid in waiting:
            waiting.add(stat.pid)
        private, pss = sizes(stat.pid)
        found.append(
            Resident(
                pid=stat.pid,
                role=role,
                command=stat.command,
                standby=stat.pid in waiting,
                pss_bytes=pss,
                private_bytes=private,
                wakeups=_wakeups(stat.pid),
            )
        )
    return found


def _is_init(pid: int) -> bool:
    """Whether it is the first of a PID namespace."""
    return _field(pid, b"NSpid:").endswith(b"\t1")


def _wakeups(pid: int) -> int:
    return sum(int(_field(pid, name) or 0) for name in (b"voluntary_ctxt_switches:", b"nonvoluntary_ctxt_switches:"))


def _field(pid: int, name: bytes) -> bytes:
    lines = (read_file(f"/proc/{pid}/status") or b"").splitlines()
    return next((line.removeprefix(name) for line in lines if line.startswith(name)), b"")

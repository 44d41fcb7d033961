"""What earlier runs that were killed have left on this host, and the removal of what is provably ours.

A crash of service, template and keeper at once leaves what no process of ours is there to remove. The proof that
something is ours, and that nobody uses it any more, is a scratch root whose lock nobody holds (:mod:`sandbox.scratch`):

- the root itself, and a folder of copies in a cache, which is held by such a lock, too;
- a process of this user whose environment has its home or temporary folder in such a root;
- a cgroup that bears its name, with what runs in it;
- an object in /dev/shm or a SysV object that a keeper has recorded in such a root (:class:`sandbox.reclaim.Record`).

What only looks like ours is told apart and never touched.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from sandbox import artifacts, ledger, processes, reclaim, scratch
from sandbox.enforce import cgroups
from sandbox.results import printable

Kind = Literal["process", "shared_object", "cgroup", "adoption", "scratch_root"]
#: Seconds that a killed process may take to be gone.
KILL_SECONDS: Final = 2.0
_HOMES: Final = (b"HOME=", b"TMPDIR=")


@dataclass(frozen=True)
class Leftover:
    """One thing that is provably ours and that no live run owns."""

    kind: Kind
    object: str
    """What it is, for people."""
    proof: str
    """Why it is ours, and nobody's any more."""
    root: Path
    """The folder whose lock proves it."""
    handle: processes.Process | ledger.Held | None = None

    def remove(self) -> str:
        """Remove it, if it is still so. Returns why it could not be removed; empty if it is gone."""
        with scratch.abandoned(self.root) as ours:
            if not ours:
                if self.root.exists():
                    return "somebody holds the lock by now"
                return "its scratch root is gone by now, and the proof with it" if self.handle is not None else ""
            if isinstance(self.handle, processes.Process):
                return _kill(self.handle)
            if self.handle is not None:
                return reclaim.remove_held(self.handle)
            if self.kind == "cgroup":
                cgroups.sweep(os.path.basename(self.object))
                return "it still holds processes" if os.path.exists(self.object) else ""
            if any(_objects(self.root)):
                return "it holds the only proof of objects that are still used"
            return "; ".join(scratch.remove(self.root))


def find(caches: Iterable[Path] = ()) -> list[Leftover]:
    """Everything that is provably ours and that nobody owns, in the order in which it has to be removed.

    Args:
        caches: folders that take kernel files, to be searched for copies in the making.
    """
    roots = _abandoned(Path(tempfile.gettempdir()), scratch.root_prefix())
    found = [*_processes(), *(each for root in roots for each in _objects(root))]
    for root in roots:
        for group in cgroups.left(cgroups.group_names(root)):
            found.append(Leftover("cgroup", group, f"it bears the name of {root}, whose lock nobody holds", root))
    for cache in caches:
        for folder in _abandoned(cache, artifacts.MAKING):
            proof = "copies of kernel files in the making, whose lock nobody holds"
            found.append(Leftover("adoption", str(folder), proof, folder))
    for root in roots:
        found.append(Leftover("scratch_root", str(root), "the lock of its process is held by nobody", root))
    return found


def sweep() -> None:
    """Remove what dead forkservers of this user that had this temporary folder have left; a new one calls it. What
    cannot be removed stays for `sandbox doctor --leaks` to tell."""
    here = Path(tempfile.gettempdir())
    if _abandoned(here, scratch.root_prefix()):
        for each in find():
            if each.root.parent == here:
                each.remove()


def unproven() -> list[str]:
    """What a job may have left, or anything else of this user's: in /dev/shm names that no process holds, SysV objects
    that no living process is known to have used. Told, never touched."""
    now = ledger.take(os.getpid())
    uid = os.geteuid()
    held = reclaim.mapped_inodes(processes.numbers_in("/proc"))
    found = []
    for name, posix in sorted(now.posix.items()):
        if posix.uid == uid and posix.inode not in held and not posix.folder:
            found.append(f"{ledger.SHM}/{printable(name)}: no process that we may look into holds it")
    for (kind, number), sysv in sorted(now.sysv.items()):
        users = reclaim.semaphore_pids(sysv) if kind == "sem" else sysv.pids
        if sysv.uid == uid and not sysv.attached and not any(processes.read_stat(pid) for pid in users):
            made = datetime.fromtimestamp(sysv.created, UTC).isoformat(" ", "seconds")
            found.append(f"SysV {kind} {number}, made {made}: no process that has used it lives")
    return found


def _abandoned(parent: Path, prefix: str) -> list[Path]:
    found = []
    for folder in sorted(parent.glob(f"{prefix}*")):
        with scratch.abandoned(folder) as ours:
            if ours:
                found.append(folder)
    return found


def _processes() -> Iterator[Leftover]:
    """Processes of this user, children before their parents, whose home or temporary folder lies in a root that nobody
    holds. The environment is the one that a process was started with: a keeper and a worker have the template's."""
    uid = os.geteuid()
    in_root = re.compile(rf"(/.*/{re.escape(scratch.root_prefix())}[A-Za-z0-9_]{{8}})(/|$)".encode())
    known: dict[Path, bool] = {}
    for pid in sorted(processes.numbers_in("/proc"), reverse=True):
        try:
            stat = processes.read_stat(pid)
            if stat is None or stat.dead or pid == os.getpid():
                continue
            # Root may have had its workers run as another user.
            if uid != 0 and os.stat(f"/proc/{pid}").st_uid != uid:
                continue
            environment = (processes.read_file(f"/proc/{pid}/environ") or b"").split(b"\0")
        except (PermissionError, FileNotFoundError):
            continue  # not ours to look into, or gone
        for entry in environment:
            match = in_root.match(entry.partition(b"=")[2]) if entry.startswith(_HOMES) else None
            if match is None:
                continue
            root = Path(os.fsdecode(match[1]))
            if root not in known:
                with scratch.abandoned(root) as ours:
                    known[root] = ours
            if known[root]:
                name = entry.partition(b"=")[0].decode()
                proof = f"its {name} lies in {root}, whose lock nobody holds"
                yield Leftover("process", f"pid {pid} ({stat.command})", proof, root, stat.process)
                break


def _objects(root: Path) -> Iterator[Leftover]:
    for path in sorted(root.glob(f"*{reclaim.RECORD_SUFFIX}")):
        for held in reclaim.recorded(path):
            yield Leftover("shared_object", held.text, f"recorded by a keeper in {path}", root, held)


def _kill(process: processes.Process) -> str:
    if not processes.send_signal(process.pid, process.start_ticks, signal.SIGKILL):
        return ""  # gone
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        now = processes.read_stat(process.pid)
        if now is None or now.dead or now.start_ticks != process.start_ticks:
            return ""
        time.sleep(0.005)
    return f"it was killed, and has not ended within {KILL_SECONDS:.0f} s"

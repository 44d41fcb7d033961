"""Process trees, read from /proc: who belongs to a job, what it uses, and how all of it dies.

Nothing here keeps a handle between calls. A process is named by its pid *and* its start time, so that a pid that
the kernel has given to someone else in the meantime is never signalled. A process that vanishes while it is being
read is the normal case, not an error.

Trees are followed along parents. That is complete only below a subreaper (`PR_SET_CHILD_SUBREAPER`): an orphan
becomes the subreaper's child, whatever it did with `setsid` and double forks.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
#: A walk stops at so many processes: above any limit of a policy, far below an endless chase.
MAX_WALK: Final = 131_072
_PF_EXITING: Final = 0x4
_WALL: Final = 0x40000000  # __WALL: also children whose exit signal is not SIGCHLD (clone)

Reaped = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Process:
    """One process; ``start_ticks`` (clock ticks since boot) tells it from a later owner of the same pid."""

    pid: int
    start_ticks: int
    ppid: int
    command: str
    """Name of the program (`comm`), at most 15 characters."""


class Stat(NamedTuple):
    """What /proc/PID/stat says; times in clock ticks, ``rss_pages`` in pages."""

    pid: int
    command: str
    state: str
    ppid: int
    faults: int
    own_ticks: int
    reaped_ticks: int
    threads: int
    start_ticks: int
    rss_pages: int
    flags: int
    """What the kernel marks it with: PF_*, of include/linux/sched.h."""
    exit_code: int
    """How it has ended or is ending, as `waitpid` has it; 0 to a process that may not look into it."""
    may_look: bool
    """Whether this process may look into it. Not to be seen any more when it is ending."""

    @property
    def dead(self) -> bool:
        """Whether only the exit status is left. A first thread that has ended also shows as a zombie while other
        threads of the process run on; such a process lives."""
        return self.state in "ZX" and self.threads <= 1

    @property
    def key(self) -> tuple[int, int]:
        """What names this process and no other: pid and start time."""
        return self.pid, self.start_ticks

    @property
    def process(self) -> Process:
        """What is kept of it."""
        return Process(self.pid, self.start_ticks, self.ppid, self.command)


def read_stat(pid: int, thread: int | None = None) -> Stat | None:
    """What the kernel says about a process (or one thread of it), or None if it is gone."""
    data = read_file(f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat")
    if not data:
        return None
    # The name may hold spaces and parentheses; the last one ends it.
    head, _, tail = data.rpartition(b")")
    rest = tail.split()
    command = head.partition(b"(")[2].decode("utf-8", "replace")
    return Stat(
        pid=pid,
        command=command if command.isprintable() else ascii(command),
        state=rest[0].decode("ascii"),
        ppid=int(rest[1]),
        faults=int(rest[7]) + int(rest[9]),
        own_ticks=int(rest[11]) + int(rest[12]),
        reaped_ticks=int(rest[13]) + int(rest[14]),
        threads=int(rest[17]),
        start_ticks=int(rest[19]),
        rss_pages=int(rest[21]),
        flags=int(rest[6]),
        exit_code=int(rest[49]) if len(rest) > 49 else 0,
        may_look=rest[23] not in (b"0", b"1"),  # the address of its code
    )


def read_file(path: str) -> bytes | None:
    """A whole /proc file, or None if its process is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None  # gone
    try:
        data = os.read(handle, 65_536)
        while data and (more := os.read(handle, 65_536)):
            data += more
        return data
    except ProcessLookupError:
        return None  # gone between open and read
    finally:
        os.close(handle)


def numbers_in(folder: str) -> list[int]:
    """The numeric names in a /proc folder; none if its process is gone."""
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]
    except (FileNotFoundError, ProcessLookupError):
        return []  # gone


@functools.cache
def _kernel_lists_children() -> bool:
    """Whether the kernel has CONFIG_PROC_CHILDREN. Distribution kernels do, some small ones do not."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def _children(stat: Stat) -> list[int]:
    """Pids of the children of every thread of a process, with CONFIG_PROC_CHILDREN."""
    pid = stat.pid
    threads = [pid] if stat.threads == 1 else numbers_in(f"/proc/{pid}/task")
    found: list[int] = []
    for thread in threads:
        found += map(int, (read_file(f"/proc/{pid}/task/{thread}/children") or b"").split())
    return found


def walk(root_pid: int) -> Iterator[Stat]:
    """The root and everything below it, zombies too, each parent before its children.

    A process is yielded before its children are looked up, so that a caller that stops it first sees all that it
    has forked. Stops at ``MAX_WALK`` processes.
    """
    root = read_stat(root_pid)
    if root is None:
        return
    table = None if _kernel_lists_children() else _scan()
    queue, seen = deque([root]), {root_pid}
    while queue and len(seen) <= MAX_WALK:
        stat = queue.popleft()
        yield stat
        for child in _children(stat) if table is None else table.get(stat.pid, ()):
            if child not in seen and (found := read_stat(child)) is not None:
                seen.add(child)
                queue.append(found)


def _scan() -> dict[int, list[int]]:
    """Children by parent, from one look at all of /proc."""
    table: dict[int, list[int]] = {}
    for pid in numbers_in("/proc"):
        if (stat := read_stat(pid)) is not None:
            table.setdefault(stat.ppid, []).append(pid)
    return table


def runs(stat: Stat) -> bool:
    """Whether one of its threads may still run an instruction of its program. One that is ending does not, but the
    kernel may take a while to take its memory apart, before it is dead."""
    numbers = numbers_in(f"/proc/{stat.pid}/task") if stat.threads > 1 else ()
    threads = [read_stat(stat.pid, number) for number in numbers] or [stat]
    return any(each is not None and each.state not in "ZX" and not each.flags & _PF_EXITING for each in threads)


def descendants(root_pid: int, include_root: bool = False) -> list[Process]:
    """The live processes below ``root_pid``, parents first; zombies are left out. Empty if the root is gone."""
    return [stat.process for stat in walk(root_pid) if not stat.dead and (include_root or stat.pid != root_pid)]


def reap(on_reaped: Reaped | None = None) -> bool:
    """Collect every child of this process that has ended, without waiting. Returns whether any child is left.

    ``on_reaped`` gets pid, raw wait status and CPU seconds (its own and of all that it had reaped itself).
    """
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG | _WALL)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if on_reaped is not None:
            on_reaped(pid, status, usage.ru_utime + usage.ru_stime)


def send_signal(pid: int, start_ticks: int, number: signal.Signals) -> bool:
    """Signal the process that has this pid and this start time. Returns False if it is gone or not ours to signal."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False  # gone
    except OSError:
        handle = -1  # no pidfd here (old kernel, a seccomp profile) or no free descriptor: check, then kill
    try:
        stat = read_stat(pid)
        if stat is None or stat.start_ticks != start_ticks or stat.dead:
            return False
        # The pidfd was opened before the check: it names the process that was checked, or one that is gone.
        if handle >= 0:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False  # gone, or of another user: the caller's next scan shows it again
    finally:
        if handle >= 0:
            os.close(handle)


def kill_tree(
    root_pid: int, include_root: bool = False, deadline_seconds: float = 2.0, on_reaped: Reaped | None = None
) -> int:
    """Kill everything below ``root_pid``, and the root too if asked. Returns how many processes were killed.

    First all are stopped, until two scans in a row find nothing new: a stopped process forks no more, so what is
    then killed is everything. With ``root_pid`` this process itself, ended children are reaped on the way (see
    :func:`reap` for ``on_reaped``) and the end is certain: no child is left. A process that cannot die (in
    uninterruptible sleep, of another user) is left behind at the deadline; `descendants` tells.

    Raises:
        ValueError: if this process is asked to kill itself.
    """
    own = root_pid == os.getpid()
    if own and include_root:
        raise ValueError("kill_tree cannot kill the process that it runs in")
    root = read_stat(root_pid)
    if root is None:
        return 0
    start = time.monotonic()
    pending: dict[tuple[int, int], Stat] = {}
    quiet = 0
    while quiet < 2 and time.monotonic() - start < deadline_seconds / 2:
        quiet += 1
        for stat in _below(root, include_root):
            if stat.key not in pending:
                quiet = 0
                pending[stat.key] = stat
                _send(stat, signal.SIGSTOP, own)
        if own and not reap(on_reaped):
            break  # no child at all
    killed: set[tuple[int, int]] = set()
    pause = 0.0002
    while True:
        pending |= {stat.key: stat for stat in _below(root, include_root)}
        # The root goes last: while it stands, it is what the others are found by.
        for stat in [s for s in reversed(pending.values()) if s.pid != root_pid or len(pending) == 1]:
            now = read_stat(stat.pid)
            if now is None or now.start_ticks != stat.start_ticks or now.dead:
                del pending[stat.key]
            elif _send(stat, signal.SIGKILL, own):
                killed.add(stat.key)
        if not reap(on_reaped) if own else not pending:
            return len(killed)
        if time.monotonic() - start > deadline_seconds:
            return len(killed)
        time.sleep(pause)
        pause = min(pause * 2, 0.005)


def _below(root: Stat, include_root: bool) -> Iterator[Stat]:
    """The live processes of the tree, if its root is still the same process."""
    for stat in walk(root.pid):
        if stat.pid == root.pid and stat.start_ticks != root.start_ticks:
            return
        if not stat.dead and (include_root or stat.pid != root.pid):
            yield stat


def _send(stat: Stat, number: signal.Signals, own: bool) -> bool:
    if own and stat.ppid == os.getpid():
        # Our own child: its pid is not free before we reap it. No check, because a process that forks and exits
        # as fast as it can (a fork bomb that hops from pid to pid) would outrun it.
        try:
            os.kill(stat.pid, number)
        except PermissionError:
            return False
        return True
    return send_signal(stat.pid, stat.start_ticks, number)

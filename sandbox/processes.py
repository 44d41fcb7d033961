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
import stat as stat_module
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
#: A walk stops at so many processes: above any limit of a policy, far below an endless chase.
MAX_WALK: Final = 131_072
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

    @property
    def dead(self) -> bool:
        """Whether only the exit status is left. A first thread that has ended also shows as a zombie while other
        threads of the process run on; such a process lives."""
        return self.state in "ZX" and self.threads <= 1

    @property
    def key(self) -> tuple[int, int]:
        """What names this process and no other: pid and start time."""
        return self.pid, self.start_ticks


def read_stat(pid: int, thread: int | None = None) -> Stat | None:
    """What the kernel says about a process (or one thread of it), or None if it is gone."""
    data = _read(f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat")
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
    )


def _read(path: str) -> bytes | None:
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


def _numbers(folder: str) -> list[int]:
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
    threads = [pid] if stat.threads == 1 else _numbers(f"/proc/{pid}/task")
    found: list[int] = []
    for thread in threads:
        found += map(int, (_read(f"/proc/{pid}/task/{thread}/children") or b"").split())
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
    for pid in _numbers("/proc"):
        if (stat := read_stat(pid)) is not None:
            table.setdefault(stat.ppid, []).append(pid)
    return table


def descendants(root_pid: int, include_root: bool = False) -> list[Process]:
    """The live processes below ``root_pid``, parents first; zombies are left out. Empty if the root is gone."""
    return [
        Process(stat.pid, stat.start_ticks, stat.ppid, stat.command)
        for stat in walk(root_pid)
        if not stat.dead and (include_root or stat.pid != root_pid)
    ]


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


@dataclass(frozen=True)
class TreeUsage:
    """What a process tree uses."""

    cpu_seconds: float
    """User and system time, ended processes included, in seconds. Never falls from one sample to the next."""
    memory_bytes: int
    """Memory that only this tree holds, in bytes."""
    processes: int
    """Processes below the root, zombies included because each holds a pid."""
    threads: int
    """Threads of those processes."""


@dataclass
class _Known:
    """What was last read of one process: sizes in bytes, as of ``faults`` page faults and ``rss_bytes``."""

    faults: int
    rss_bytes: int
    private: int = 0
    shares: int = 0
    read_at: float = 0.0

    def read(self, stat: Stat) -> None:
        """Read it anew; ``stat`` is from just before."""
        self.private, self.shares = _exact(stat.pid)
        self.read_at = time.monotonic()
        self.faults, self.rss_bytes = stat.faults, stat.rss_pages * PAGE_BYTES


class TreeMeter:
    """Measures one job: ``root_pid`` is its keeper, a plain fork of the template.

    *Memory.* The resident size of a fork is mostly the template's. `smaps_rollup` says what is its own, but costs
    about 2 ms for every 100 MB of resident size. So it is read when the sum of what each process could hold exceeds
    ``memory_limit_bytes``, and otherwise only so often that it takes less than ``exact_share`` of the time; in
    between, the last exact value plus the growth of the resident size since then stands for it. Pages that
    processes of the tree share with each other (a job that forks) are private to none of them; for these the
    proportional sizes are summed and the whole template is taken off. Both sums are lower bounds, so that no job
    is killed for memory that is not its own. Not seen: files in a tmpfs that no process maps (a job's /dev/shm
    has a size limit of its own), page tables, huge pages of hugetlbfs, GPU memory.

    *CPU.* The time of an ended process is found in its parent once that has waited for it. Lost is the time of
    children whose parent ignores SIGCHLD, if they live and die between two samples. Resolution: one clock tick
    (10 ms) for each process.
    """

    #: Seconds of exact reading in one sample; what is left over is read in the next one, unless the limit is reached.
    MAX_READING = 0.05

    def __init__(self, root_pid: int, memory_limit_bytes: int, exact_share: float = 0.02) -> None:
        self.root_pid = root_pid
        self.memory_limit_bytes = memory_limit_bytes
        self.peak_memory_bytes = 0
        self.seen: set[int] = set()
        """Every pid seen below the root so far: evidence of what is the job's."""
        self._exact_share = exact_share
        self._next_reading = 0.0
        self._cpu_seconds = 0.0
        self._known: dict[tuple[int, int], _Known] = {}
        root = read_stat(root_pid)
        self._root_start = None if root is None else root.start_ticks
        self._template_bytes = _anonymous(root_pid)

    def sample(self) -> TreeUsage:
        """Measure now. All but the CPU time is zero when the root is gone."""
        ticks = processes = threads = 0
        live: list[Stat] = []
        for stat in walk(self.root_pid):
            if stat.pid == self.root_pid and stat.start_ticks != self._root_start:
                break  # the root is gone and its pid is someone else's
            ticks += stat.own_ticks + stat.reaped_ticks
            if stat.pid != self.root_pid:
                processes += 1
                threads += stat.threads
                self.seen.add(stat.pid)
            if not stat.dead:
                live.append(_with_memory(stat))
        self._cpu_seconds = max(self._cpu_seconds, ticks / TICKS_PER_SECOND)
        memory = self._memory(live)
        self.peak_memory_bytes = max(self.peak_memory_bytes, memory)
        return TreeUsage(self._cpu_seconds, memory, processes, threads)

    def _memory(self, live: list[Stat]) -> int:
        known = {s.key: self._known.get(s.key) or _Known(s.faults, s.rss_pages * PAGE_BYTES) for s in live}
        # A fork or an end changes what the others hold alone, without a fault of theirs.
        same_tree = known.keys() == self._known.keys()
        self._known = known
        bounds: dict[tuple[int, int], int] = {}
        stale: list[Stat] = []
        for stat in live:
            last, rss = known[stat.key], stat.rss_pages * PAGE_BYTES
            if same_tree and last.read_at and last.faults == stat.faults and last.rss_bytes == rss:
                bounds[stat.key] = max(last.private, last.shares)
            else:
                bounds[stat.key] = rss
                stale.append(stat)
        begin = now = time.monotonic()
        due = now >= self._next_reading
        total = sum(bounds.values())
        unread = sorted(stale, key=lambda s: (known[s.key].read_at, -s.rss_pages))
        while unread and (due or total > self.memory_limit_bytes) and now - begin <= self.MAX_READING:
            stat = unread.pop(0)
            last = known[stat.key]
            last.read(stat)
            total += max(last.private, last.shares) - bounds[stat.key]
            now = time.monotonic()
        memory = self._sum(live)
        if memory > self.memory_limit_bytes and unread:
            # A job may die of this number: no estimate, and all of it from one moment.
            for stat in live:
                known[stat.key].read(stat)
            memory = self._sum(live)
            now = time.monotonic()
        if len(unread) < len(stale):
            self._next_reading = now + (now - begin) / self._exact_share
        return memory

    def _sum(self, live: list[Stat]) -> int:
        grown = sum(max(0, s.rss_pages * PAGE_BYTES - self._known[s.key].rss_bytes) for s in live)
        private = sum(each.private for each in self._known.values())
        shares = sum(each.shares for each in self._known.values()) - self._template_bytes
        return max(private, shares) + grown


def _rollup(pid: int) -> bytes | None:
    try:
        return _read(f"/proc/{pid}/smaps_rollup")
    except PermissionError:
        return None  # not ours to read: another user's, or it has made itself undumpable


def can_read_exactly(pid: int) -> bool:
    """Whether the kernel tells the private memory of a process to this one."""
    return bool(_rollup(pid))


def _exact(pid: int) -> tuple[int, int]:
    """Bytes that only this process holds, and its proportional share of all anonymous and shared memory."""
    data = _rollup(pid)
    if not data:
        # Gone; or not ours to read, a kernel without it, or a process whose first thread has ended. Then what is
        # not backed by files stands for both, which counts the template's share as the job's.
        size = _anonymous(pid)
        return size, size
    sizes: dict[bytes, int] = {}
    for line in data.splitlines()[1:]:
        name, _, size_kib = line.partition(b":")
        sizes[name] = int(size_kib.split()[0]) * 1024
    private = sizes.get(b"Private_Clean", 0) + sizes.get(b"Private_Dirty", 0) + sizes.get(b"SwapPss", 0)
    # Linux before 5.4 does not tell anonymous from file pages here; then only private pages count.
    return private, sizes.get(b"Pss_Anon", 0) + sizes.get(b"Pss_Shmem", 0) + sizes.get(b"SwapPss", 0)


def _anonymous(pid: int) -> int:
    """Resident bytes that are not backed by a file, shared with other processes or not. 0 if it is gone."""
    fields = (_read(f"/proc/{pid}/statm") or b"").split()
    if fields and fields[1] == b"0":
        for thread in _numbers(f"/proc/{pid}/task"):  # its first thread has ended, see Stat.dead
            fields = (_read(f"/proc/{pid}/task/{thread}/statm") or b"").split()
            if fields and fields[1] != b"0":
                break
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES if fields else 0


def _with_memory(stat: Stat) -> Stat:
    """A process whose first thread has ended shows no memory there; another thread does."""
    if stat.rss_pages or stat.threads <= 1:
        return stat
    for thread in _numbers(f"/proc/{stat.pid}/task"):
        found = read_stat(stat.pid, thread)
        if found is not None and found.rss_pages:
            return stat._replace(rss_pages=found.rss_pages)
    return stat


class DiskUsage(NamedTuple):
    """What a folder holds."""

    bytes: int
    """Allocated bytes (`st_blocks`), hard links once."""
    entries: int
    """Files, folders, links and the like, a count."""
    complete: bool
    """False if something was not counted: too many entries, too deep, or not ours to read."""


def disk_usage(folder: Path | str) -> int:
    """Allocated bytes below ``folder``; see :func:`survey`, which also tells of what it had to leave out."""
    return survey(folder).bytes


def survey(folder: Path | str, max_entries: int = 100_000, max_depth: int = 64) -> DiskUsage:
    """Add up what lies below ``folder`` while others write there.

    Follows no link, also when a folder is replaced by a link meanwhile. What vanishes is not counted. 0 entries if
    the folder itself is not there.
    """
    total = entries = 0
    complete = True
    linked: set[tuple[int, int]] = set()
    stack: list[tuple[int, list[str]]] = []  # an open folder, and its folders that are still to be visited
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        name, parent = os.fspath(folder), None
        while True:
            try:
                handle = os.open(name, flags, dir_fd=parent)
            except (FileNotFoundError, NotADirectoryError):
                handle = -1  # vanished, or replaced by a file or a link
            except OSError:
                handle, complete = -1, False  # not ours to read, or no free descriptor
            if handle >= 0:
                inner: list[str] = []
                stack.append((handle, inner))
                with os.scandir(handle) as found:
                    for entry in found:
                        if entries >= max_entries:
                            return DiskUsage(total, entries, False)
                        try:
                            info = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue  # vanished
                        entries += 1
                        if stat_module.S_ISDIR(info.st_mode):
                            inner.append(entry.name)
                        elif info.st_nlink > 1:
                            if (info.st_dev, info.st_ino) in linked:
                                continue
                            linked.add((info.st_dev, info.st_ino))
                        total += info.st_blocks * 512
                if inner and len(stack) >= max_depth:
                    inner.clear()
                    complete = False
            while stack and not stack[-1][1]:
                os.close(stack.pop()[0])
            if not stack:
                return DiskUsage(total, entries, complete)
            parent, name = stack[-1][0], stack[-1][1].pop()
    finally:
        for open_folder, _ in stack:
            os.close(open_folder)

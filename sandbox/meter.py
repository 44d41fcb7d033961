"""What a job uses, measured from outside: the memory, CPU time and processes of its tree, and its scratch folder."""

from __future__ import annotations

import os
import stat as stat_module
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sandbox.processes import PAGE_BYTES, TICKS_PER_SECOND, Stat, numbers_in, read_file, read_stat, walk


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

    def __init__(self, root_pid: int, memory_limit_bytes: int, exact_share: float = 0.005) -> None:
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

    @property
    def live(self) -> frozenset[int]:
        """The pids of the last sample's live processes, the root's among them."""
        return frozenset(pid for pid, _ in self._known)

    def cpu(self) -> float:
        """CPU time of the tree so far, in seconds, without a look at its memory, which takes longer."""
        ticks = sum(stat.own_ticks + stat.reaped_ticks for stat in walk(self.root_pid))
        return ticks / TICKS_PER_SECOND

    def nameless_bytes(self, device: int) -> int:
        """Allocated bytes of the files on ``device`` that the processes of the last sample hold open and that have no
        name any more, so that no survey of a folder finds them. Not seen: those that are mapped and closed."""
        found: dict[int, int] = {}
        for pid, _ in self._known:
            try:
                numbers = numbers_in(f"/proc/{pid}/fd")
            except PermissionError:
                continue  # it has made itself undumpable: its memory cannot be read exactly either
            for number in numbers:
                try:
                    info = os.stat(f"/proc/{pid}/fd/{number}")
                except OSError:
                    continue  # closed meanwhile, or not ours to look at
                if info.st_dev == device and info.st_nlink == 0 and stat_module.S_ISREG(info.st_mode):
                    found[info.st_ino] = info.st_blocks * 512
        return sum(found.values())

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
        return read_file(f"/proc/{pid}/smaps_rollup")
    except PermissionError:
        return None  # not ours to read: another user's, or it has made itself undumpable


def sizes(pid: int) -> tuple[int, int]:
    """Private memory and proportional set size of a process, in bytes; zeros if it is gone or not ours to read."""
    fields = (line.split() for line in (_rollup(pid) or b"").splitlines())
    found = {each[0]: int(each[1]) * 1024 for each in fields if len(each) == 3}
    private = found.get(b"Private_Clean:", 0) + found.get(b"Private_Dirty:", 0) + found.get(b"SwapPss:", 0)
    return private, found.get(b"Pss:", 0) + found.get(b"SwapPss:", 0)


def can_read_exactly(pid: int) -> bool:
    """Whether the kernel tells the private memory of a process to this one: it decides that when the file is opened,
    and to read it would cost milliseconds."""
    try:
        os.close(os.open(f"/proc/{pid}/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False  # gone, another user's, undumpable; or not in this kernel
    return True


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
    fields = (read_file(f"/proc/{pid}/statm") or b"").split()
    if fields and fields[1] == b"0":
        for thread in numbers_in(f"/proc/{pid}/task"):  # its first thread has ended, see Stat.dead
            fields = (read_file(f"/proc/{pid}/task/{thread}/statm") or b"").split()
            if fields and fields[1] != b"0":
                break
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES if fields else 0


def _with_memory(stat: Stat) -> Stat:
    """A process whose first thread has ended shows no memory there; another thread does."""
    if stat.rss_pages or stat.threads <= 1:
        return stat
    for thread in numbers_in(f"/proc/{stat.pid}/task"):
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


def survey(folder: Path | str, max_entries: int = 20_000, max_depth: int = 64) -> DiskUsage:
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
                        except OSError:
                            entries, complete = entries + 1, False  # not ours to look at
                            continue
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

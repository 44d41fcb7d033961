"""The keeper: one small process per job that owns the job's process tree.

It is subreaper of the tree, so that nothing can leave it: not by setsid, not by a double fork. It waits for the
worker's end, for the parent's order to kill, and for the parent's death, whichever comes first; then it kills
what is left of the tree, removes what the job left in the kernel (semaphores, shared memory), tells the parent
with an `exited` frame, and ends. It runs no code of the job. It lives on if the template dies: so a job in
flight is not lost with the forkserver.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import select
import signal
import socket
import stat
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from sandbox import child, init, ledger, scratch
from sandbox.enforce import Place, cgroups, check, libc, paths, prepare_keeper, seccomp
from sandbox.enforce.namespaces import TEMPORARY, Entered
from sandbox.errors import EnforcementError, WireError
from sandbox.init import keep_only
from sandbox.limits import Confinement, Limits
from sandbox.processes import (
    TICKS_PER_SECOND,
    Process,
    descendants,
    kill_tree,
    read_file,
    read_stat,
    reap,
    runs,
    send_signal,
    walk,
)
from sandbox.reclaim import Evidence, Record, mapped_inodes, reclaim, used_by
from sandbox.results import Enforcement, Leak, Mechanism, State, printable
from sandbox.wire import Exited, KeeperReady, encode_frame, send_frame

#: Seconds that a frame to the parent may take; the parent reads all the time, so this is only a guard.
SEND_SECONDS = 5.0
#: Seconds between two looks at what the job holds in a /dev/shm that it shares with the host, and at its cgroup.
LOOK_SECONDS = 0.25
#: Order of the parent to kill; with the other one, the worker first prints its stacks.
KILL, KILL_WITH_STACKS = b"K", b"S"
#: To the keeper of a standby child: its job begins. The job's memory limit follows, 8 bytes, big-endian.
BEGIN = b"B"
#: Seconds that a worker has to print its stacks, before it is killed.
STACKS_SECONDS = 0.1
#: Characters of a path in a job's own /tmp that is looked at: each look walks the whole path.
MAX_PATH = 1000
#: Seconds for the kill of the whole tree; a tree that forks as fast as it can takes the longest.
KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Order:
    """What a keeper is forked for."""

    job_id: str
    """Of a standby, its own name."""
    folder: Path
    """The job's scratch folder."""
    standby: bool
    gpu: bool
    confinement: Confinement
    limits: Limits
    state: Mechanism
    """Of the cgroup."""
    group: cgroups.Group | None
    """The cgroup, which the keeper removes in the end."""


def main(order: Order, fds: list[int]) -> NoReturn:
    """Run in the fork of the template. ``fds``: the job's socket, its stderr pipe, the keeper's socket."""
    code = 1
    try:
        job_fd, stderr_fd, keeper_fd = fds
        keep_only({job_fd, stderr_fd, keeper_fd, *(order.group.joins if order.group is not None else ())})
        code = _keep(order, job_fd, stderr_fd, socket.socket(fileno=keeper_fd))
    except BaseException:  # noqa: BLE001 - a fork of the template must never return into its loop
        _confess(order.job_id, fds, traceback.format_exc())
    finally:
        os._exit(code)


def _confess(job_id: str, fds: list[int], text: str) -> None:
    """Our own failure: to the parent if it still listens, else into the template's log."""
    try:
        report = Exited(job_id=job_id, refused=f"the keeper failed: {printable(text[-1500:])}")
        with socket.socket(fileno=fds[2]) as parent:
            send_frame(parent, report, b"", SEND_SECONDS)
    except (WireError, OSError, IndexError):
        os.write(2, text.encode(errors="replace"))


def _keep(order: Order, job_fd: int, stderr_fd: int, parent: socket.socket) -> int:
    os.setsid()
    job_id, folder, confinement, group = order.job_id, order.folder, order.confinement, order.group
    # Before SIGCHLD is watched: the wake-up pipe makes `poll` return when any process of the tree ends.
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        check(confinement, {"cgroup": order.state})
        entered = prepare_keeper(confinement, root=str(folder.parent), gpu=order.gpu)
        entered.states["cgroup"] = order.state
        before = ledger.take(own=False)
        # The template's own folder, in which we still are, holds what its warm-up has built.
        read = paths.needed(os.environ, gpu=False, extra=(os.getcwd(), *confinement.read)).read
        ours, theirs = init.channel()
        report, report_end = socket.socketpair()
        place = Place(str(folder), tempfile.gettempdir(), entered.own_shm, report_end.fileno())
        own = os.getpid()
        first = libc.fork() if entered.own_pids else os.fork()  # without own ones it is the worker
        if first == 0:
            try:
                signal.set_wakeup_fd(-1)
                report_end.detach()  # closed once the worker is confined
                for fd in (wake_read, wake_write, parent.fileno(), ours.fileno(), report.fileno()):
                    os.close(fd)
                work = functools.partial(child.main, job_id, order.standby, place, job_fd, stderr_fd)
                init.main(theirs, entered, confinement, folder, read, group, work)  # never returns
            finally:
                os._exit(1)
        try:
            os.close(job_fd)
            theirs.close()
            report_end.close()
            if group is not None:
                group.close()
            if entered.own_user:
                libc.drop_capabilities()
            worker = _started(ours, entered, confinement)
            tree = _Tree(worker, first, ours, entered, group, order.limits, Record(folder), order.standby)
            return _see_through(job_id, folder, parent, report, wake_read, tree, before)
        finally:
            # What is left is init, which the kernel takes 15 ms for: after the report. Or something went wrong with us,
            # and the tree does not outlive it.
            kill_tree(own, deadline_seconds=KILL_SECONDS)
    except EnforcementError as error:
        send_frame(parent, Exited(job_id=job_id, refused=str(error)), b"", SEND_SECONDS)
        return 0
    finally:
        if group is not None:
            group.remove()


def _started(ours: socket.socket, entered: Entered, confinement: Confinement) -> int:
    """Wait until the worker is there; returns its pid.

    Raises:
        EnforcementError: something required is missing.
        RuntimeError: the first process failed or ended.
    """
    ours.settimeout(init.START_SECONDS)
    while True:
        message, pid = init.receive(ours)
        if "states" in message:
            entered.states |= Enforcement.model_validate(message["states"], strict=False).mechanisms
        elif "worker" in message:
            if message["cgroup"]:
                entered.states["cgroup"] = Mechanism(state=State.UNAVAILABLE, reason=str(message["cgroup"]))
            check(confinement, entered.states)
            return pid
        elif "refused" in message:
            raise EnforcementError(str(message["refused"]))
        else:
            raise RuntimeError(f"the first process of the job failed: {message.get('failed', 'it ended')}")


def _see_through(
    job_id: str,
    folder: Path,
    parent: socket.socket,
    report: socket.socket,
    wake_read: int,
    tree: _Tree,
    before: ledger.Snapshot,
) -> int:
    """From the worker's start to the keeper's own end."""
    try:
        ready = KeeperReady(
            job_id=job_id,
            pid=tree.worker,
            init=tree.first if tree.entered.own_pids else None,
            enforcement=Enforcement(mechanisms=tree.entered.states),
        )
        send_frame(parent, ready, b"", SEND_SECONDS)
        if tree.waits:
            _rehearse(job_id, tree, before, folder)
        _wait(parent, report, wake_read, tree)
    except WireError:
        tree.orphaned = True  # the parent is gone: clean up all the same
    leaks = _clean(tree, before, folder)
    tree.record.remove()
    seen = tree.group.seen() if tree.group is not None else cgroups.Seen()
    if tree.orphaned:
        kill_tree(os.getpid(), deadline_seconds=KILL_SECONDS)
        scratch.remove(folder)
        return 0
    exited = Exited(
        job_id=job_id,
        exit_code=None if tree.status is None or tree.status < 0 else tree.status,
        signal=-tree.status if tree.status is not None and tree.status < 0 else None,
        cpu_seconds=tree.cpu_seconds(),
        breach=_breach(tree, seen),
        peak_memory_bytes=seen.peak_bytes,
        leaks=tuple(leaks[: child.MAX_LEAKS]),
        violation=tree.violation,
    )
    try:
        send_frame(parent, exited, b"", SEND_SECONDS)
    except WireError:
        scratch.remove(folder)
    return 0


class _Tree:
    """What the keeper knows of the job's processes."""

    def __init__(
        self,
        worker: int,
        first: int,
        ours: socket.socket,
        entered: Entered,
        group: cgroups.Group | None,
        limits: Limits,
        record: Record,
        waits: bool,
    ) -> None:
        self.worker = worker
        self.first = first  # pid 1 of the job's own process ids; without them it is the worker
        self.init = ours
        self.entered = entered
        self.group = group
        self.limits = limits
        self.record = record
        self.waits = waits  # a standby that has no job yet
        stat = read_stat(worker)
        self.readable = stat is not None and stat.may_look  # else nobody tells how it ends before it is dead
        self.told_cpu = 0.0  # CPU seconds of the worker at its end
        self.status: int | None = None  # exit code, or the negative signal, once the worker has ended
        self.orphaned = False  # the parent is gone
        self.ordered = False  # the kill was ordered: by the parent, or by what the job has done
        self.violation = ""  # the system call that the filter has stopped
        self.pids = {worker, first}  # every process of the job that was seen
        self.left = 0  # live processes besides the worker when the job was over
        self.inodes: set[ledger.Inode] = set()  # what they were seen to hold in a shared /dev/shm

    def note(self, pid: int, status: int, _cpu_seconds: float) -> None:
        """A process of the tree was collected."""
        self.pids.add(pid)
        # With init everything else ends, too: the kernel has killed it, for memory.
        if pid == self.first and self.status is None:
            self.status = os.waitstatus_to_exitcode(status)

    def hear(self) -> None:
        """Init says how the worker ended. What else comes is a job's that has its descriptor, or init's end."""
        message, sender = init.receive(self.init)
        status, cpu_seconds = message.get("status"), message.get("cpu_seconds")
        if sender == self.first and self.status is None and isinstance(status, int) and 0 <= status < 1 << 16:
            self.status = os.waitstatus_to_exitcode(status)
            self.told_cpu = cpu_seconds if isinstance(cpu_seconds, float) else 0.0

    def cpu_seconds(self) -> float:
        """CPU time of the tree, all of whose processes but init are dead. /proc counts in clock ticks what init has
        collected, init itself more finely what its first child had used."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        stat = read_stat(self.first) if self.entered.own_pids else None
        ticks = stat.own_ticks + stat.reaped_ticks if stat is not None else 0
        return usage.ru_utime + usage.ru_stime + max(ticks / TICKS_PER_SECOND, self.told_cpu)

    def none_left(self) -> None:
        """Nobody is under the filter any more, so nobody of the job runs. Since Linux 6.11 the kernel says so when the
        last one begins to end, and takes up to 20 ms then to take its memory apart; its status is known already."""
        stat = read_stat(self.worker)
        if self.status is None and self.readable and stat is not None and not stat.dead and not runs(stat):
            self.status = os.waitstatus_to_exitcode(stat.exit_code)
            nanoseconds = (read_file(f"/proc/{self.worker}/schedstat") or b"0").split()[0]
            ticks = stat.own_ticks + stat.reaped_ticks
            self.told_cpu = max(ticks / TICKS_PER_SECOND, int(nanoseconds) / 1e9)

    def begin(self, memory_bytes: int) -> None:
        """A standby has got its job, which was granted so much memory."""
        self.waits = False
        if self.group is not None and memory_bytes < self.limits.memory_bytes:
            with contextlib.suppress(OSError):  # v1, and it uses more by now: the watchdog and the rlimit have it
                self.group.lower_memory(memory_bytes)

    def look(self) -> None:
        """In namespaces that are shared with the host, what the job's processes hold is how its objects are known."""
        own_shm, own_ipc = self.entered.own_shm, self.has("ipc_namespace")
        if own_shm and own_ipc:
            return
        pids = {process.pid for process in descendants(os.getpid())}
        self.pids |= pids
        if not own_shm:
            self.inodes |= mapped_inodes(pids)
        # For the case that we are killed.
        self.record.write(self.inodes, () if own_ipc else used_by(frozenset(self.pids)))

    def has(self, mechanism: str) -> bool:
        """Whether a mechanism is fully enforced on this job."""
        found = self.entered.states.get(mechanism)
        return found is not None and found.state is State.ENFORCED


def _rehearse(job_id: str, tree: _Tree, before: ledger.Snapshot, folder: Path) -> None:
    """What a keeper does at the end, once for nothing, for the reason of :func:`child._rehearse`."""
    descendants(os.getpid())
    _temporary(tree)
    tree.cpu_seconds()
    seen = tree.group.seen() if tree.group is not None else cgroups.Seen()
    ledger.differences(before, ledger.take(folders=(folder / "tmp",), own=False))
    encode_frame(Exited(job_id=job_id, breach=_breach(tree, seen)))


def _wait(parent: socket.socket, report: socket.socket, wake_read: int, tree: _Tree) -> None:
    """Until the worker has ended, or the parent orders the kill, or is gone, or the job makes a forbidden call."""
    poll = select.poll()
    listener: int | None = None
    for watched in (parent.fileno(), report.fileno(), wake_read):
        poll.register(watched, select.POLLIN)
    if tree.entered.own_pids:
        poll.register(tree.init.fileno(), select.POLLIN)
    # There is something to look at while the job runs in shared namespaces, or in a cgroup.
    alone = tree.entered.own_shm and tree.has("ipc_namespace") and tree.group is None
    interval = None if alone else LOOK_SECONDS * 1000
    while tree.status is None:
        if not tree.waits:
            tree.look()
            if tree.group is not None and tree.group.seen().oom_kills:
                tree.ordered = True  # v1 has killed one process of the tree, and the others may wait for it for ever
                return
        for fd, events in poll.poll(None if tree.waits else interval):
            if fd == wake_read:
                os.read(wake_read, 4096)
            elif fd == tree.init.fileno():
                tree.hear()
                if events & select.POLLHUP:
                    poll.unregister(fd)  # init is dead: its end says the rest
            elif fd == report.fileno():
                listener = seccomp.receive_listener(report)
                poll.unregister(report)
                if listener is not None:
                    poll.register(listener, select.POLLIN)
            elif fd == listener:
                if events & select.POLLIN:
                    tree.violation = seccomp.read_violation(listener)
                else:
                    poll.unregister(listener)
                    tree.none_left()
                if tree.violation:
                    tree.ordered = True
                    return
            else:
                try:
                    order = parent.recv(1)
                except ConnectionResetError:
                    order = b""  # the parent died with our word unread
                if order == BEGIN:
                    tree.begin(int.from_bytes(parent.recv(8, socket.MSG_WAITALL)))
                    continue
                tree.ordered = True
                tree.orphaned = not order
                if order == KILL_WITH_STACKS:
                    _print_stacks(tree, wake_read)
                return
        reap(tree.note)


def _print_stacks(tree: _Tree, wake_read: int) -> None:
    """Have the worker say where it hangs. One that is stopped cannot; one that ends meanwhile is not waited for."""
    stat = read_stat(tree.worker)
    if stat is not None and not stat.dead and stat.state not in "Tt":
        send_signal(stat.pid, stat.start_ticks, child.STACKS_SIGNAL)
        select.select([wake_read, tree.init.fileno()], [], [], STACKS_SECONDS)


def _clean(tree: _Tree, before: ledger.Snapshot, folder: Path) -> list[Leak]:
    """Kill what is left of the tree, then remove what it left in the kernel."""
    left = [process for process in descendants(os.getpid()) if process.pid not in (tree.worker, tree.first)]
    tree.pids |= {process.pid for process in left}
    tree.left = len(left)
    tree.look()
    # Whom the parent has ordered to be killed has left nothing behind.
    leaks = [] if tree.ordered else _survivors(left)
    if tree.group is not None:
        tree.group.kill()
    if tree.entered.own_pids:
        # All but init, whose root is then as the job has left it: nobody changes it while it is read.
        if any(runs(stat) for stat in walk(tree.first) if stat.pid != tree.first):
            kill_tree(tree.first, deadline_seconds=KILL_SECONDS)
        leaks += _temporary(tree) if tree.has("mount_namespace") else []
        if tree.status is None:
            tree.status = -signal.SIGKILL  # by us, just now; init has not yet told
    else:
        kill_tree(os.getpid(), deadline_seconds=KILL_SECONDS, on_reaped=tree.note)
    after = ledger.take(folders=(folder / "tmp",), own=False)
    evidence = Evidence(
        own_shm=tree.entered.own_shm,
        own_ipc=tree.has("ipc_namespace"),
        own_folders=True,
        pids=frozenset(tree.pids),
        inodes=frozenset(tree.inodes),
    )
    # All else is of the keeper itself, not of the job.
    held = [each for each in ledger.differences(before, after) if each.kind in ledger.KERNEL_LEAKS]
    return [*leaks, *reclaim(held, evidence)]


def _survivors(left: list[Process]) -> list[Leak]:
    """The processes that outlived the worker, and what they hold of a GPU. They are killed next."""
    found = []
    pids = {process.pid for process in left}
    for process in left:
        text = f"pid {process.pid} ({process.command})"
        held = [ledger.Held("process" if process.ppid in pids else "orphan", text)]
        for fd, target in ledger.descriptors(process.pid).items():
            if (kind := ledger.fd_kind(target)) in ("gpu_handle", "cuda_context"):
                held.append(ledger.Held(kind, f"{ledger.fd_text(fd, target)} of {text}"))
        found += [each.leak("child", reclaimed=True) for each in held]
    return found


def _breach(tree: _Tree, seen: cgroups.Seen) -> Literal["", "memory", "processes", "threads"]:
    if tree.left >= tree.limits.processes:
        return "processes"  # a fork bomb may use up the memory before the watchdog has looked
    if seen.oom_kills:
        return "memory"
    return "threads" if seen.refused_forks else ""


def _temporary(tree: _Tree) -> list[Leak]:
    """Files in the job's own /tmp and /var/tmp, which end with its mount namespace; at most ``child.MAX_LEAKS``."""
    root = f"/proc/{tree.first}/root"
    found: list[str] = []
    for place in TEMPORARY:
        try:
            own = os.stat(root + place).st_dev
        except OSError:
            continue  # no such folder, or init has ended before us
        queue = [root + place]
        while queue:
            with contextlib.suppress(OSError), os.scandir(queue.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # survivors still run: gone meanwhile
                        info = entry.stat(follow_symlinks=False)
                        # What is mounted in there (code, the scratch folder) is not the job's temporary file.
                        if info.st_dev == own and len(entry.path) < MAX_PATH:
                            (queue if stat.S_ISDIR(info.st_mode) else found).append(entry.path)
    texts = (printable(path.removeprefix(root), ledger.MAX_TEXT) for path in sorted(found)[: child.MAX_LEAKS])
    return [Leak(kind="temp_file", object=text, owner="child", reclaimed=True) for text in texts]

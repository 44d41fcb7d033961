"""The keeper: one small process per job that owns the job's process tree.

It is subreaper of the tree, so that nothing can leave it: not by setsid, not by a double fork. It waits for the
worker's end, for the parent's order to kill, and for the parent's death, whichever comes first; then it kills
what is left of the tree, removes what the job left in the kernel (semaphores, shared memory), tells the parent
with an `exited` frame, and ends. It runs no code of the job. It lives on if the template dies: so a job in
flight is not lost with the forkserver.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

from sandbox import child, ledger, scratch
from sandbox.enforce import Place, prepare_keeper, seccomp
from sandbox.errors import EnforcementError, WireError
from sandbox.limits import Confinement
from sandbox.processes import Process, descendants, kill_tree, read_stat, reap
from sandbox.reclaim import Evidence, Record, mapped_inodes, reclaim, used_by
from sandbox.results import Enforcement, Leak, Mechanism, State, printable
from sandbox.wire import Exited, KeeperReady, send_frame

#: Seconds that a frame to the parent may take; the parent reads all the time, so this is only a guard.
SEND_SECONDS = 5.0
#: Seconds between two looks at what the job holds in a /dev/shm that it shares with the host.
LOOK_SECONDS = 0.25
#: Order of the parent to kill; with the other one, the worker first prints its stacks.
KILL, KILL_WITH_STACKS = b"K", b"S"
#: Seconds that a worker has to print its stacks, before it is killed.
STACKS_SECONDS = 0.1
#: Seconds for the kill of the whole tree; a tree that forks as fast as it can takes the longest.
KILL_SECONDS = 10.0


def main(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Run in the fork of the template. ``fds``: the job's socket, its stderr pipe, the keeper's socket."""
    code = 1
    try:
        job_fd, stderr_fd, keeper_fd = fds
        _keep_only({job_fd, stderr_fd, keeper_fd})
        code = _keep(request, job_fd, stderr_fd, socket.socket(fileno=keeper_fd))
    except BaseException:  # noqa: BLE001 - a fork of the template must never return into its loop
        _confess(request, fds, traceback.format_exc())
    finally:
        os._exit(code)


def _confess(request: dict[str, Any], fds: list[int], text: str) -> None:
    """Our own failure: to the parent if it still listens, else into the template's log."""
    try:
        report = Exited(job_id=request["job_id"], refused=f"the keeper failed: {printable(text[-1500:])}")
        with socket.socket(fileno=fds[2]) as parent:
            send_frame(parent, report, b"", SEND_SECONDS)
    except (WireError, OSError, IndexError, KeyError):
        os.write(2, text.encode(errors="replace"))


def _keep(request: dict[str, Any], job_fd: int, stderr_fd: int, parent: socket.socket) -> int:
    os.setsid()
    job_id: str = request["job_id"]
    folder = Path(request["scratch"])
    confinement = Confinement.model_validate_json(request["confinement"])
    # Before SIGCHLD is watched: the wake-up pipe makes `poll` return when any process of the tree ends.
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        mechanisms = prepare_keeper(confinement)
    except EnforcementError as error:
        send_frame(parent, Exited(job_id=job_id, refused=str(error)), b"", SEND_SECONDS)
        return 0
    own_shm = mechanisms["mount_namespace"].state is State.ENFORCED
    report, report_end = socket.socketpair()
    place = Place(str(folder), tempfile.gettempdir(), own_shm, report_end.fileno())
    before = ledger.take()
    own = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        report_end.detach()  # closed once the worker is confined
        for fd in (wake_read, wake_write, parent.fileno(), report.fileno()):
            os.close(fd)
        child.main(job_id, place, job_fd, stderr_fd, own)  # never returns
    os.close(job_fd)
    report_end.close()
    tree = _Tree(worker, mechanisms, Record(folder))
    try:
        return _see_through(job_id, folder, parent, report, wake_read, tree, before)
    finally:
        # Whatever went wrong with us, the tree does not outlive it.
        kill_tree(os.getpid(), deadline_seconds=KILL_SECONDS)


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
        ready = KeeperReady(job_id=job_id, pid=tree.worker, enforcement=Enforcement(mechanisms=tree.mechanisms))
        send_frame(parent, ready, b"", SEND_SECONDS)
        _wait(parent, report, wake_read, tree)
    except WireError:
        tree.orphaned = True  # the parent is gone: clean up all the same
    leaks = _clean(tree, before, folder)
    tree.record.remove()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if tree.orphaned:
        scratch.remove(folder)
        return 0
    exited = Exited(
        job_id=job_id,
        exit_code=None if tree.status is None or tree.status < 0 else tree.status,
        signal=-tree.status if tree.status is not None and tree.status < 0 else None,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
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

    def __init__(self, worker: int, mechanisms: dict[str, Mechanism], record: Record) -> None:
        self.worker = worker
        self.record = record
        self.mechanisms = mechanisms
        self.status: int | None = None  # exit code, or the negative signal, once the worker has ended
        self.orphaned = False  # the parent is gone
        self.ordered = False  # the parent ordered the kill, or the job called for it
        self.violation = ""  # the system call that the filter has stopped
        self.pids = {worker}  # every process of the job that was seen
        self.inodes: set[ledger.Inode] = set()  # what they were seen to hold in a shared /dev/shm

    def note(self, pid: int, status: int, _cpu_seconds: float) -> None:
        """A process of the tree was collected."""
        self.pids.add(pid)
        if pid == self.worker:
            self.status = os.waitstatus_to_exitcode(status)

    def look(self) -> None:
        """In namespaces that are shared with the host, what the job's processes hold is how its objects are known."""
        own_shm, own_ipc = self.has("mount_namespace"), self.has("ipc_namespace")
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
        found = self.mechanisms.get(mechanism)
        return found is not None and found.state is State.ENFORCED


def _wait(parent: socket.socket, report: socket.socket, wake_read: int, tree: _Tree) -> None:
    """Until the worker has ended, or the parent orders the kill, or is gone, or the job makes a forbidden call."""
    poll = select.poll()
    listener: int | None = None
    for watched in (parent.fileno(), report.fileno(), wake_read):
        poll.register(watched, select.POLLIN)
    # Only in shared namespaces there is something to look at while the job runs.
    interval = None if tree.has("mount_namespace") and tree.has("ipc_namespace") else LOOK_SECONDS * 1000
    while tree.status is None:
        tree.look()
        for fd, events in poll.poll(interval):
            if fd == wake_read:
                os.read(wake_read, 4096)
            elif fd == report.fileno():
                listener = seccomp.receive_listener(report)
                poll.unregister(report)
                if listener is not None:
                    poll.register(listener, select.POLLIN)
            elif fd == listener:
                if events & select.POLLIN:
                    tree.violation = seccomp.read_violation(listener)
                else:
                    poll.unregister(listener)  # nobody is under the filter any more
                if tree.violation:
                    tree.ordered = True
                    return
            else:
                try:
                    order = parent.recv(1)
                except ConnectionResetError:
                    order = b""  # the parent died with our word unread
                tree.ordered = True
                tree.orphaned = not order
                if order == KILL_WITH_STACKS:
                    _print_stacks(tree.worker, wake_read)
                return
        reap(tree.note)


def _print_stacks(worker: int, wake_read: int) -> None:
    """Have the worker say where it hangs. One that is stopped cannot; one that ends meanwhile is not waited for."""
    stat = read_stat(worker)
    if stat is not None and not stat.dead and stat.state not in "Tt":
        os.kill(worker, child.STACKS_SIGNAL)  # our own child: the pid is not free before we reap it
        select.select([wake_read], [], [], STACKS_SECONDS)


def _clean(tree: _Tree, before: ledger.Snapshot, folder: Path) -> list[Leak]:
    """Kill what is left of the tree, then remove what it left in the kernel."""
    left = descendants(os.getpid())
    pids = {process.pid for process in left}
    tree.pids |= pids
    tree.look()
    # Whom the parent has ordered to be killed has left nothing behind.
    survivors = [] if tree.ordered else _survivors(left, tree.worker)
    kill_tree(os.getpid(), deadline_seconds=KILL_SECONDS, on_reaped=tree.note)
    after = ledger.take(folders=(folder / "tmp",))
    evidence = Evidence(
        own_shm=tree.has("mount_namespace"),
        own_ipc=tree.has("ipc_namespace"),
        own_folders=True,
        pids=frozenset(tree.pids),
        inodes=frozenset(tree.inodes),
    )
    # All else is of the keeper itself, not of the job.
    held = [each for each in ledger.differences(before, after) if each.kind in ledger.KERNEL_LEAKS]
    return [*survivors, *reclaim(held, evidence)]


def _survivors(left: list[Process], worker: int) -> list[Leak]:
    """The processes that outlived the worker, and what they hold of a GPU. They are killed next."""
    found = []
    pids = {process.pid for process in left} - {worker}
    for process in left:
        if process.pid == worker:
            continue
        text = f"pid {process.pid} ({process.command})"
        held = [ledger.Held("process" if process.ppid in pids else "orphan", text)]
        for fd, target in ledger.descriptors(process.pid).items():
            if (kind := ledger.fd_kind(target)) in ("gpu_handle", "cuda_context"):
                held.append(ledger.Held(kind, f"{ledger.fd_text(fd, target)} of {text}"))
        found += [each.leak("child", reclaimed=True) for each in held]
    return found


def _keep_only(keep: set[int]) -> None:
    """Close every descriptor but 0, 1, 2 and ``keep``."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))

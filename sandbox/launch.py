"""One child as the service holds it: its scratch folder, its channels, its keeper. And how it is made and ended."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import artifacts, ledger, scratch
from sandbox.enforce import cgroups, identity
from sandbox.envelopes import KeeperReady
from sandbox.forkserver import Forkserver, Keeper, socket_pair
from sandbox.limits import Confinement, Limits
from sandbox.meter import TreeMeter, can_read_exactly
from sandbox.processes import kill_tree, read_stat, runs, walk
from sandbox.results import Leak, Mechanism, State

#: Seconds that a keeper has to kill the tree and report, before it is killed itself: with that a job ends within one
#: second after its deadline, also if its keeper hangs.
KILL_SECONDS = 0.7


@dataclass
class Launched:
    """A child that was forked. It belongs to whoever holds this, who has to see to its end and then call
    :meth:`close`."""

    name: str
    """By which its keeper knows it: the job's id, or a standby's own."""
    folder: Path
    worker: socket.socket
    keeper: socket.socket
    stderr: int
    process: Keeper
    forkserver: Forkserver
    confinement: Confinement
    limits: Limits
    made: dict[int, str]
    """Descriptors that were opened for it, and what they lead to."""
    standby: bool = False
    template: int | None = None
    """Pid of the template that it was forked from."""
    mechanisms: dict[str, Mechanism] = field(default_factory=dict)
    """What its keeper has enforced."""
    pid: int | None = None
    """The worker, once its keeper has told it."""
    start_ticks: int = 0
    """When the worker was started, as /proc tells it."""
    init: int | None = None
    """The init of the job's own process ids, if it has some."""
    meter: TreeMeter | None = None
    cpu_seconds: float = 0.0
    """Of a standby: what it had used before its job."""

    def ready(self, report: KeeperReady) -> None:
        """Its keeper says that the worker is there."""
        stat = read_stat(report.pid)
        self.pid, self.start_ticks = report.pid, stat.start_ticks if stat else 0
        self.init = report.init
        self.mechanisms.update(report.enforcement.mechanisms)

    def measure(self) -> None:
        """Begin to measure its tree, as the policy says."""
        if self.confinement.watchdog == "off":
            state = Mechanism(state=State.OFF, reason="only wall time, reply and stderr are watched")
        else:
            self.meter = TreeMeter(self.process.pid, self.limits.memory_bytes)
            state = Mechanism(state=State.ENFORCED)
            if not can_read_exactly(self.process.pid):
                reason = "private memory is estimated: smaps_rollup is not readable"
                state = Mechanism(state=State.PARTIAL, reason=reason)
        self.mechanisms["watchdog"] = state

    def close(self) -> None:
        """Close the descriptors."""
        self.worker.close()
        self.keeper.close()
        if self.stderr >= 0:
            os.close(self.stderr)
            self.stderr = -1

    def dismiss(self) -> None:
        """Have its keeper kill it, as when this process dies. Whoever waits for its word is woken."""
        for channel in (self.worker, self.keeper):
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """End a child that has no job. Returns when nothing of it is left."""
        self.dismiss()
        see_dead(self)
        self.close()
        check_closed(self.name, self.made, self.forkserver)
        self.clear_away()

    def clear_away(self) -> None:
        """All but init is dead: wait until the keeper has ended, and what it held with it, and remove the folder. What
        remains is told as a leak."""
        if not ended(self.process, KILL_SECONDS):
            see_dead(self, leaves=False)
            text, gone = f"pid {self.process.pid}, the keeper of {self.name}", not self.process.alive()
            self.forkserver.tell(Leak(kind="orphan", object=text, owner="forkserver", reclaimed=gone))
        if self.confinement.cgroup != "off":  # its keeper removes it, unless it was killed or has failed
            cgroups.sweep(cgroups.group_name(self.folder), self.confinement.cgroup_parent)
        for text in scratch.remove(self.folder):
            self.forkserver.tell(Leak(kind="temp_file", object=text[:300], owner="child", reclaimed=False))


def launch(
    forkserver: Forkserver,
    name: str,
    confinement: Confinement,
    limits: Limits,
    *,
    standby: bool = False,
    gpu: bool = False,
) -> Launched:
    """Fork a child.

    Args:
        forkserver: where it comes from.
        name: the job's id; of a standby, which has no job yet, one of its own.
        confinement, limits, gpu: what its keeper has to know.

    Raises:
        ForkserverError: it could not be forked; nothing is left of it.
        OSError: this process lacks descriptors or disk for it; nothing is left of it.
    """
    with contextlib.ExitStack() as failed, contextlib.ExitStack() as theirs:
        folder = forkserver.root.folder(name)
        failed.callback(scratch.remove, folder)
        for inner in ("home", "tmp", *(f"{artifacts.FOLDER}/{kind}" for kind in artifacts.KINDS)):
            (folder / inner).mkdir(parents=True)
        user = identity.user_of(confinement)
        if user is not None:
            identity.hand_over(folder, user)
        worker, worker_end = socket_pair(socket.SOCK_STREAM)
        failed.callback(worker.close)
        theirs.callback(worker_end.close)
        keeper, keeper_end = socket_pair(socket.SOCK_STREAM)
        failed.callback(keeper.close)
        theirs.callback(keeper_end.close)
        stderr, stderr_end = os.pipe2(os.O_CLOEXEC)
        failed.callback(os.close, stderr)
        theirs.callback(os.close, stderr_end)
        ends = (worker_end.fileno(), stderr_end, keeper_end.fileno())
        made = ledger.links((worker.fileno(), keeper.fileno(), stderr, *ends))
        # The template makes it before it forks, and may die in between.
        if confinement.cgroup != "off":
            failed.callback(cgroups.sweep, cgroups.group_name(folder), confinement.cgroup_parent)
        template = forkserver.pid
        process = forkserver.fork(name, folder, confinement, limits, ends, standby=standby, gpu=gpu)
        failed.pop_all()
    return Launched(
        name, folder, worker, keeper, stderr, process, forkserver, confinement, limits, made, standby, template
    )


def check_closed(name: str, made: dict[int, str], forkserver: Forkserver) -> None:
    """A descriptor that was ``made`` for a child and is still open in the service is a leak of ours. A number that
    leads elsewhere by now was closed and is somebody else's."""
    now = ledger.links(made)
    for fd, target in made.items():
        if now.get(fd) == target:
            held = ledger.Held(ledger.fd_kind(target), f"{ledger.fd_text(fd, target)} of {name}")
            forkserver.tell(held.leak("parent"))


def ended(process: Keeper, seconds: float) -> bool:
    """Wait for the end of a keeper, which is no child of ours. Returns whether it has ended."""
    end = time.monotonic() + seconds
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:  # gone; or no pidfd here, or no free descriptor: look again and again
        while process.alive() and time.monotonic() < end:
            time.sleep(0.001)
        return not process.alive()
    try:
        # The handle is older than the look: it names the process that is looked at, or one that is gone.
        if process.alive():
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(max(0.0, end - time.monotonic()) * 1000)
        return not process.alive()
    finally:
        os.close(handle)


def only_init_lives(child: Launched, mechanisms: dict[str, Mechanism]) -> bool:
    """Whether nothing of a job lives but its init, so that nobody changes its files any more. The keeper ends it.

    Looked up in /proc, not believed: a report may be forged. Init runs our code, and nothing else as long as the job
    could not get hold of it: Landlock keeps it from that, whichever user it is.
    """
    landlock = mechanisms.get("landlock")
    if landlock is None or landlock.state not in (State.ENFORCED, State.PARTIAL):
        return False
    above = (child.process.pid, child.init)
    for _ in range(2):  # the kernel may leave out children when others end while it lists them
        if any(stat.pid not in above and runs(stat) for stat in walk(child.process.pid)):
            return False
    # Last: as long as it lives, it is what all others are found below.
    return child.process.alive()


def see_dead(child: Launched, leaves: bool = True) -> None:
    """Return only when every process of the job is dead: then nobody changes its files any more.

    ``leaves``: whether its keeper is about to end, having said that all others are dead. If it does not end, it was
    stopped by the job, or its report was forged.
    """
    if leaves and ended(child.process, KILL_SECONDS):
        return
    if child.process.alive():
        kill_tree(child.process.pid, include_root=True)
    worker = read_stat(child.pid) if child.pid is not None else None
    if worker is not None and worker.start_ticks == child.start_ticks:
        kill_tree(worker.pid, include_root=True)
    child.forkserver.sweep()
    if child.confinement.cgroup != "off":
        cgroups.sweep(cgroups.group_name(child.folder), child.confinement.cgroup_parent)

"""Children that wait for a job: forked, measured and confined ahead, so that a job only has to be sent to one.

Each is for one job, like any other child. It is confined by the policy's limits, confinement and environment; a job
that differs in one of them, but for a lower memory limit, gets a fresh child. So does one that may use a GPU, and one
that steps back behind others, which has to be done before the confinement. A used one is replaced in the background,
when few jobs run. One that has died meanwhile costs its job nothing but a fresh child.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import uuid
from collections.abc import Callable, Sized

from sandbox.background import Background
from sandbox.envelopes import KeeperReady, Prepare, Started, parse_envelope
from sandbox.errors import ForkserverError
from sandbox.forkserver import Forkserver
from sandbox.jobs import Environment, Spec
from sandbox.keeper import BEGIN
from sandbox.launch import Launched, launch
from sandbox.policy import Policy
from sandbox.processes import read_stat
from sandbox.wire import recv_frame, send_frame

#: Seconds that a new one may take to be ready.
READY_SECONDS = 30.0
#: Seconds that a job waits for one that is being made, at most.
MAKING_SECONDS = 0.25
#: Bytes that a job must have been granted to get one: several times what the rehearsal has left in it.
LEAST_BYTES = 256 << 20


class Standbys:
    """Those of one forkserver. Thread-safe."""

    def __init__(
        self,
        forkserver: Forkserver,
        policy: Policy,
        swallowed: Callable[[BaseException], None],
        jobs: Sized,
    ) -> None:
        """
        Args:
            forkserver: where they come from.
            policy: how many there are and what confines them.
            swallowed: is told of those that have failed.
            jobs: the jobs that run or wait at the moment.
        """
        self._forkserver = forkserver
        self._policy = policy
        self.background = Background(swallowed)
        """Where new ones are made."""
        self._swallowed = swallowed
        self._jobs = jobs
        self._lock = threading.Condition()
        self._ready: list[tuple[Launched, Environment]] = []
        self._making: tuple[Launched, Environment] | None = None
        self._filling = False
        self._closed = False
        forkserver.on_ready = self.refill

    @property
    def ready(self) -> int:
        """Those that wait for a job now, a count."""
        with self._lock:
            return len(self._ready)

    @property
    def keepers(self) -> frozenset[int]:
        """Pids of the keepers of those that wait."""
        with self._lock:
            return frozenset(child.process.pid for child, _ in self._ready)

    def take(self, spec: Spec) -> Launched | None:
        """One that fits the job, told that its job begins; None if there is none. The caller sends the request. One
        that is being made is waited for, at most ``MAKING_SECONDS``: it is ready sooner than one that is begun now."""
        while (child := self._fitting(spec)) is not None:
            memory = spec.limits.memory_bytes
            if _idle(child) and child.template == self._forkserver.ready_pid:
                with contextlib.suppress(OSError):
                    child.keeper.send(BEGIN + memory.to_bytes(8))
                    if child.meter is not None:
                        child.meter.memory_limit_bytes = memory
                        child.cpu_seconds = child.meter.cpu()  # what it has rehearsed is not the job's
                    self._forkserver.forks += 1
                    return child
            self._swallowed(ForkserverError("a standby child had ended"))
            self.background.add(child.abandon)
            self.background.wake()
        return None

    def refill(self) -> None:
        """Have those that are missing made in the background, if few enough jobs run: they need the cores first."""
        with self._lock:
            count = self._policy.forkserver.standby
            if self._filling or self._closed or not count or self._busy():
                return
            if len(self._ready) >= count and not self._stale(self._policy.allowed(os.environ)):
                return
            self._filling = True
        self.background.add(self._fill)
        self.background.wake()

    def close(self) -> None:
        """End all. Idempotent."""
        with self._lock:
            self._closed = True
            children = [child for child, _ in self._ready]
            self._ready.clear()
            if self._making is not None:
                self._making[0].dismiss()
        for child in children:  # at once, not one after the other
            child.dismiss()
        for child in children:
            child.abandon()

    def _busy(self) -> bool:
        return 2 * len(self._jobs) >= (len(os.sched_getaffinity(0)) or 1)

    def _fitting(self, spec: Spec) -> Launched | None:
        policy = self._policy
        same = spec.limits.model_copy(update={"memory_bytes": policy.limits.memory_bytes})
        if (
            spec.gpu
            or spec.nice
            or spec.limits.memory_bytes > policy.limits.memory_bytes
            or spec.limits.memory_bytes < min(LEAST_BYTES, policy.limits.memory_bytes)
            or (same, spec.confinement) != (policy.limits, policy.confinement)
        ):
            return None
        deadline = time.monotonic() + MAKING_SECONDS
        with self._lock:
            while True:
                for number, (child, environment) in enumerate(self._ready):
                    if environment == spec.environment:
                        del self._ready[number]
                        return child
                left = deadline - time.monotonic()
                if self._making is None or self._making[1] != spec.environment or left <= 0:
                    return None
                self._lock.wait(left)

    def _stale(self, environment: Environment) -> list[Launched]:
        """Those that no job fits any more, or whose template is gone, and with it the pages that they shared."""
        template = self._forkserver.ready_pid
        return [child for child, theirs in self._ready if theirs != environment or child.template != template]

    def _fill(self) -> None:
        """In the background: replace what is stale, make what is missing."""
        try:
            while True:
                environment = self._policy.allowed(os.environ)
                with self._lock:
                    stale = self._stale(environment)
                    self._ready = [each for each in self._ready if each[0] not in stale]
                    missing = len(self._ready) < self._policy.forkserver.standby
                    wanted = missing and not self._closed and not self._busy() and self._forkserver.ready_pid
                    # Under the lock in which it was decided: who asks from now on starts it again.
                    self._filling = bool(wanted)
                for child in stale:
                    child.abandon()
                if not wanted:
                    return
                self._make(environment)
        except BaseException:
            with self._lock:
                self._filling = False
            raise

    def _make(self, environment: Environment) -> None:
        """One more.

        Raises:
            ForkserverError, WireError, OSError: it could not be made; nothing is left of it.
        """
        limits, confinement = self._policy.limits, self._policy.confinement
        name = f"standby-{uuid.uuid4().hex[:12]}"
        child = launch(self._forkserver, name, confinement, limits, standby=True)
        try:
            with self._lock:
                self._making = child, environment
                if self._closed:
                    child.dismiss()
            send_frame(
                child.worker,
                Prepare(job_id=name, limits=limits, confinement=confinement, environment=environment),
                b"",
                READY_SECONDS,
            )
            child.ready(parse_envelope(recv_frame(child.keeper, 0, READY_SECONDS).envelope, KeeperReady))
            parse_envelope(recv_frame(child.worker, 0, READY_SECONDS).envelope, Started)
            child.measure()
            if child.meter is not None:
                child.meter.sample()
        except BaseException:
            with self._lock:
                self._making, closed = None, self._closed
                self._lock.notify_all()
            child.abandon()
            if not closed:
                raise
            return
        with self._lock:
            self._making, closed = None, self._closed
            if not closed:
                self._ready.append((child, environment))
            self._lock.notify_all()
        if closed:
            child.abandon()


def _idle(child: Launched) -> bool:
    """Whether it lives, is not stopped, and has said nothing: its end closes its channels."""
    worker = read_stat(child.pid) if child.pid is not None else None
    if worker is None or worker.start_ticks != child.start_ticks or worker.state in "Tt":
        return False
    poll = select.poll()
    for channel in (child.worker, child.keeper):
        poll.register(channel, select.POLLIN)
    return not poll.poll(0) and child.process.alive()

"""The executor: jobs in, futures out.

    submit(job) ─▶ a free slot ─▶ breaker ─▶ forkserver ─▶ memory ─▶ monitor.run ─▶ Future[JobResult]

Each slot is a thread. One job is one child. The executor repeats a job only when the forkserver itself failed before
the child ran; what to do after a job's own failure is the ladder's word (:mod:`sandbox.fallback`), which the caller
asks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path

from sandbox import admission
from sandbox.background import Background
from sandbox.breaker import Breaker
from sandbox.capsule import Writer
from sandbox.enforce import identity
from sandbox.errors import ForkserverError, RefusedError, SandboxError
from sandbox.footprint import Resident, residents
from sandbox.forkserver import Forkserver
from sandbox.jobs import Job
from sandbox.monitor import Cancel, run
from sandbox.policy import Policy, load
from sandbox.report import Recorder, Stats
from sandbox.results import JobResult, LeakReport, Status
from sandbox.standby import Standbys

#: How often a job is offered to a fresh forkserver when the one before died under it, a count.
FORKSERVER_TRIES = 3
#: Kernels built side by side in one job when the policy says 0, a count at most: each g++ takes some 300 MB, each
#: helper for Triton's 80.
MAX_KERNEL_THREADS = 8
MAX_TRITON_HELPERS = 16
#: Seconds that :meth:`Sandbox.close` waits for jobs that it has cancelled.
CLOSE_SECONDS = 5.0


class Sandbox:
    """Runs jobs in fresh, confined, limited children.

        with Sandbox("default") as sandbox:
            future = sandbox.submit(sandbox_job)
            result = future.result()

    The forkserver starts in the background with :meth:`start` or the first job. Thread-safe. In a process that
    the host has forked, start a new one: the old one refuses.
    """

    def __init__(self, policy: str | Path | Policy = "default", *, cache: dict[str, Path] | None = None) -> None:
        """
        Args:
            policy: a shipped name, a path to a TOML file, or a Policy.
            cache: folders that take the kernel files, by kind (`inductor`, `triton`). Default: a temporary folder.

        Raises:
            PolicyError: the policy is wrong.
            EnforcementError: the user of `confinement.run_as` cannot be had.
            ForkserverError: the temporary folder cannot be written.
        """
        self.policy = load(policy)
        self.recorder = Recorder()
        self.recorder.policy = self.policy.name
        self._pid = os.getpid()
        identity.user_of(self.policy.confinement)  # refused now, not at the first job
        self._tasks: dict[str, _Task] = {}
        self._forkserver = Forkserver(self.policy, self.environment())
        self._background = Background(self.recorder.swallowed)
        self._standbys = Standbys(self._forkserver, self.policy, self.recorder.swallowed, self._tasks)
        self._finalizer = weakref.finalize(self, _end, self._forkserver, self._standbys, self._background, self._pid)
        self._own_cache = self._forkserver.root.path / "cache"
        self._cache = cache
        self._admission = admission.shared()
        self._breaker = Breaker(self.policy.breaker)
        self.slots = self.policy.parallel_jobs or usable_cores()
        self._capsules = Writer(self.policy, self.recorder.swallowed)
        self._lock = threading.Lock()
        self._pending: deque[_Task] = deque()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        _OPEN.add(self)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the forkserver in the background, so that its warm-up overlaps with other work."""
        self._check()
        self._forkserver.start()

    def wait_ready(self, seconds: float | None = None) -> None:
        """Block until children can be forked.

        Raises:
            ForkserverError: the forkserver could not be started.
        """
        self._check()
        self._forkserver.wait_ready(seconds)

    @property
    def forkserver_pid(self) -> int | None:
        """Pid of the forkserver's template process, None when none is running."""
        return self._forkserver.pid

    def submit(
        self, job: Job, *, name: str = "", step: str = "first", cache: dict[str, Path] | None = None
    ) -> Future[JobResult]:
        """Run ``job`` in a fresh child.

        Args:
            job: the work; its spec was validated when it was made.
            name: what reports call it.
            step: which step of the ladder this is, for reports.
            cache: folders for the kernel files, instead of the sandbox's own.

        Returns:
            A future that always gets a JobResult, never an exception, whatever the child does. It can be cancelled
            while the job waits; :meth:`cancel` also kills a running one.

        Raises:
            SandboxError: the sandbox was closed, or belongs to the process that forked this one.
        """
        self._check()
        job = self._filled(job)
        targets = cache or self._cache or {kind: self._own_cache / kind for kind in ("inductor", "triton")}
        task = _Task(job, Future(), Cancel(), targets, str(name or job.spec.kind), str(step), time.monotonic())
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox was closed")
            if job.spec.job_id in self._tasks:
                raise SandboxError(f"{job.spec.job_id} is waiting or running already: make a new job")
            if len(self._threads) < self.slots:
                thread = threading.Thread(target=self._drain, name="sandbox-job", daemon=True)
                try:
                    thread.start()
                    self._threads.add(thread)
                except RuntimeError as error:
                    if not self._threads:  # otherwise those that run take it in their turn
                        raise SandboxError(f"no thread can be started for {job.spec.job_id}: {error}") from None
            self._tasks[job.spec.job_id] = task
            self._pending.append(task)
        return task.future

    def cancel(self, job_id: str, reason: str = "cancelled by the caller") -> bool:
        """Kill a running or waiting job; returns whether there was one. Its future gets status `cancelled`."""
        with self._lock:
            task = self._tasks.get(job_id)
            if task is None:
                return False
            waiting = task in self._pending
            if waiting:
                self._pending.remove(task)
        task.cancel.cancel(reason)
        self._forkserver.poke()
        self._admission.poke()
        if waiting:
            # Not running, but whoever waits for the future must be told, also if its owner has cancelled it.
            task.future.set_running_or_notify_cancel()
            self._settle(task, _failed(task.job, Status.CANCELLED, reason))
        return True

    @property
    def foreign(self) -> bool:
        """Whether this process is a fork of the one that made the sandbox: it needs one of its own."""
        return os.getpid() != self._pid

    def stats(self) -> Stats:
        """The counts so far."""
        forkserver = self._forkserver
        return self.recorder.snapshot(
            children=forkserver.forks,
            restarts=forkserver.restarts,
            forkserver_seconds=float(forkserver.facts.get("seconds", 0.0)),
            leaks=forkserver.leaks(),
            breaker=self._breaker.state,
            breaker_opened=self._breaker.opened,
        )

    def processes(self) -> list[Resident]:
        """The forkserver, its standby children and the jobs of this moment, with the memory that they hold: the sum
        of `pss_bytes` is what the sandbox takes besides this process. Some 40 ms with a full template."""
        template = self._forkserver.pid
        return residents(template, self._standbys.keepers) if template is not None else []

    def kernel_threads(self, target: str) -> int:
        """How many kernels the next job should build side by side, a count: the policy's word, or else this job's share
        of the cores beside the jobs that run, at least one. ``target``: what it compiles for, as of the spec."""
        with self._lock:
            jobs = min(len(self._tasks) + 1, self.slots)
        most = MAX_KERNEL_THREADS if target == "cpu" else MAX_TRITON_HELPERS
        return self.policy.kernel_threads or max(1, min(usable_cores() // jobs, most))

    @property
    def standbys(self) -> int:
        """Children that wait for a job at this moment, a count."""
        return self._standbys.ready

    def settle(self, seconds: float) -> bool:
        """Wait, at most so long, until what no answer waits for is done: the ends of keepers, removals, new standby
        children. Returns whether it is."""
        deadline = time.monotonic() + seconds
        with self._lock:
            ending = [] if self._tasks else list(self._threads)
        for thread in ending:  # each has answered, and asks for a new standby child after that
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    return False
        return all(
            each.wait(max(0.0, deadline - time.monotonic())) for each in (self._background, self._standbys.background)
        )

    def environment(self) -> dict[str, str]:
        """What a child may see of this process's environment now, by the policy's allow-list."""
        return self.policy.allowed(os.environ)

    def close(self) -> None:
        """Cancel what runs, end the forkserver, remove every temporary file. Idempotent; takes seconds at most."""
        if os.getpid() != self._pid:
            return  # a fork of the host: everything belongs to the process that made it
        with self._lock:
            already, self._closed = self._closed, True
            tasks, threads = list(self._tasks), list(self._threads)
        if already:
            return
        # First, so that nobody goes on waiting for a forkserver.
        self._forkserver.begin_close()
        for job_id in tasks:
            self.cancel(job_id, "the sandbox was closed")
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
                self._forkserver.tell_running(thread)
        _end(self._forkserver, self._standbys, self._background, self._pid)
        self._capsules.close(max(1.0, deadline - time.monotonic()))

    def _filled(self, job: Job) -> Job:
        """The job with the policy's word for all that its maker left out."""
        policy = {
            "limits": self.policy.limits,
            "confinement": self.policy.confinement,
            "trace_leaks": self.policy.trace_leaks,
            "environment": self.environment(),
        }
        missing = {name: value for name, value in policy.items() if name not in job.spec.model_fields_set}
        return Job(job.spec.model_copy(update=missing), job.payload) if missing else job

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise SandboxError("this sandbox belongs to the process that forked this one: make a new one")
        if self._closed:
            raise SandboxError("the sandbox was closed")

    def _drain(self) -> None:
        """One slot: run jobs until none waits. A thread lives as long as there is work."""
        while True:
            with self._lock:
                if not self._pending:
                    self._threads.discard(threading.current_thread())
                    return
                task = self._pending.popleft()
            try:
                result = self._run(task)
            except Exception as error:  # noqa: BLE001 - the caller must get an answer; the error is in it
                self.recorder.swallowed(error)
                result = _failed(task.job, Status.SANDBOX_ERROR, f"{type(error).__name__}: {error}")
            # Counted, whatever they raise: a slot that ended here would never come back.
            try:
                self._settle(task, result)
            except Exception as error:  # noqa: BLE001 - the caller must get an answer all the same
                self.recorder.swallowed(error)
                with contextlib.suppress(InvalidStateError):
                    task.future.set_result(result)
            try:
                self._background.wake()
                self._standbys.refill()
            except Exception as error:  # noqa: BLE001 - the next job asks again
                self.recorder.swallowed(error)

    def _settle(self, task: _Task, result: JobResult) -> None:
        with self._lock:
            self._tasks.pop(task.job.spec.job_id, None)
        if (folder := self._capsules.place(result)) is not None:
            result = result.model_copy(update={"capsule": str(folder)})
        try:
            self.recorder.job(result, task.name, task.step)
        except Exception as error:  # noqa: BLE001 - a report that cannot be written must not keep the answer back
            self.recorder.swallowed(error)
        with contextlib.suppress(InvalidStateError):  # its owner has cancelled the future, and so has an answer
            task.future.set_result(result)
        self._capsules.leave(task.job, result, task.name, task.step)

    def _run(self, task: _Task) -> JobResult:
        if not task.future.set_running_or_notify_cancel():
            return _failed(task.job, Status.CANCELLED, "the future was cancelled")
        try:
            stretch = self._breaker.enter()
        except RefusedError as error:
            return _failed(task.job, Status.SANDBOX_ERROR, str(error))
        works, problem = None, ""
        try:
            result = self._admitted(task)
            works, problem = _works(result), result.detail
            return result
        except RefusedError as error:  # no memory: whether the sandbox works is not known
            return _failed(task.job, Status.SANDBOX_ERROR, str(error)).model_copy(update={"no_memory": True})
        except Exception as error:
            works, problem = False, f"{type(error).__name__}: {error}"
            raise
        finally:
            self._breaker.leave(stretch, works, problem)

    def _admitted(self, task: _Task) -> JobResult:
        """Run the job when there are a forkserver and memory.

        Raises:
            RefusedError: no memory became free in time.
            OSError: as :func:`sandbox.monitor.run`.
        """
        problem = ""
        wanted = task.job.spec.limits.memory_bytes

        def still_wanted() -> bool:
            return task.cancel.reason is None

        with contextlib.ExitStack() as held:
            grant: admission.Grant | None = None
            standbys: Standbys | None = self._standbys
            for _ in range(FORKSERVER_TRIES):
                if not still_wanted():
                    break
                try:
                    # First the forkserver, whose memory is then among what is in use.
                    self._forkserver.wait_ready(wanted=still_wanted)
                    if grant is None:
                        grant = held.enter_context(self._admission.granted(self.policy.memory, wanted, still_wanted))
                    if grant is None or not still_wanted():
                        break
                    queued = time.monotonic() - task.submitted
                    job = _limited(task.job, grant.bytes)
                    result = run(
                        self._forkserver,
                        job,
                        task.cancel,
                        task.targets,
                        queued,
                        grant.tell,
                        standbys=standbys,
                        background=self._background,
                    )
                except ForkserverError as error:
                    standbys = None
                    self.recorder.swallowed(error)
                    problem = str(error)
                else:
                    less = grant.explain() if result.status is Status.MEMORY_LIMIT else ""
                    return result.model_copy(update={"detail": f"{result.detail}; {less}"}) if less else result
        if task.cancel.reason is not None:
            return _failed(task.job, Status.CANCELLED, task.cancel.reason)
        return _failed(task.job, Status.SANDBOX_ERROR, problem)


@dataclass(frozen=True)
class _Task:
    """A submitted job with what belongs to it."""

    job: Job
    future: Future[JobResult]
    cancel: Cancel
    targets: dict[str, Path]
    name: str
    step: str
    submitted: float


def usable_cores() -> int:
    """Cores that this process may use, a count."""
    return len(os.sched_getaffinity(0)) or 1


def _failed(job: Job, status: Status, detail: str) -> JobResult:
    return JobResult(job_id=job.spec.job_id, status=status, detail=detail, leaks=LeakReport(job_id=job.spec.job_id))


def _limited(job: Job, memory_bytes: int) -> Job:
    """The job with what it was granted as its limit, for watchdog, rlimit and cgroup."""
    limits = job.spec.limits
    if memory_bytes == limits.memory_bytes:
        return job
    limits = limits.model_copy(update={"memory_bytes": memory_bytes})
    return Job(job.spec.model_copy(update={"limits": limits}), job.payload)


def _works(result: JobResult) -> bool | None:
    """Whether the sandbox did its part, as far as this process saw; None if it cannot say."""
    if result.status is Status.SANDBOX_ERROR:
        return None if result.by_child else False
    return None if result.status is Status.CANCELLED else True


def _end(forkserver: Forkserver, standbys: Standbys, background: Background, pid: int) -> None:
    """What is left to do for a sandbox that is closed, was dropped, or is still open when the interpreter ends."""
    if os.getpid() == pid:
        standbys.close()
        for each in (standbys.background, background):
            each.wait(CLOSE_SECONDS)
            if (thread := each.thread) is not None:
                forkserver.tell_running(thread)
        forkserver.close()


_OPEN: weakref.WeakSet[Sandbox] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sandbox in list(_OPEN):
        sandbox.close()

"""Children for one thing that is to be compiled, one after the other down the policy's ladder, until one makes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox import fallback
from sandbox.errors import CompileFailed, SandboxError, UnserializableError, WireError
from sandbox.executor import Sandbox
from sandbox.inductor import failures
from sandbox.inductor.inflight import Flight, Flights
from sandbox.jobs import Job, Scalar, new_job_id
from sandbox.policy import Policy, Step
from sandbox.quarantine import Entry, Quarantine
from sandbox.results import KILLERS, JobResult, LeakReport, Status, printable

log = logging.getLogger("sandbox")


@dataclass(frozen=True)
class Way:
    """How the children of one walk are started, and what is made of what they reply."""

    load: Callable[[Any, str], Any]
    """Called with the reply and the job id; the walk returns what it returns, which is not None."""
    key: str
    """By which the thing is quarantined."""
    facts: dict[str, str]
    """What else that key holds."""
    overrides: Mapping[str, Scalar]
    """Inductor settings that replace the caller's."""
    steps: tuple[Step, ...] = ("retry", "reduced")
    """Steps of the ladder that it takes; any other ends it."""
    first: str = "first"
    """What reports call the first child."""
    nice: int = 0
    waited_for: bool = True
    """Whether somebody waits, and is to be told the end."""


class _NotSubmitted(Exception):
    """The sandbox takes no job."""


#: One child: called with its step, returns what was made of its reply, or None, and how it ended.
Attempt = Callable[[fallback.ChildStep], tuple[Any, JobResult]]


class Walk:
    """The children of one thing. For one thread."""

    def __init__(self, policy: Policy, sandbox: Sandbox, flights: Flights, quarantine: Quarantine, name: str) -> None:
        """``name``: of the thing, for logs and reports."""
        self._policy = policy
        self._sandbox = sandbox
        self._recorder = sandbox.recorder
        self._flights = flights
        self._quarantine = quarantine
        self._name = name
        self._history: list[fallback.Attempt] = []
        self._flight = Flight()  # the children that it shares with other threads
        self.killed: list[JobResult] = []
        """The children that it has killed."""
        self.told = True
        """Whether this thread was the first to hear how the last child ended."""

    def down(self, way: Way, attempt: Attempt, shared: str | None) -> tuple[Any, Step, JobResult]:
        """Side by side with other threads that do the same.

        Args:
            attempt: starts a child by :meth:`child`; an UnserializableError of it is how that child ended.
            shared: what two walks must have in common to share their children; None: it shares none.

        Returns:
            what was made of the reply, or None and the ladder's last step; and how the last child ended.
        """
        self._history.clear()
        self.killed.clear()
        with self._flights.joined(shared) as self._flight:
            return self._steps(way, attempt)

    def child(
        self, job: Job, way: Way, step: fallback.ChildStep, folders: Callable[[], dict[str, Path]], also: str = ""
    ) -> tuple[Any, JobResult]:
        """One child, or the end of the one that another thread has started for the same.

        Args:
            folders: gives the user's cache folders by kind of artifact.
            also: what tells it from another child of the same step.

        Returns:
            what ``way`` makes of its reply, or None, and how it ended.
        """
        job_id = job.spec.job_id

        def start() -> tuple[str, Future[JobResult]]:
            try:
                return job_id, self._sandbox.submit(job, name=self._name, step=name, cache=folders())
            except TimeoutError:
                raise
            except (SandboxError, OSError, RuntimeError) as error:
                # It was closed meanwhile, or has no descriptor or thread left: the ladder knows what to do.
                self._recorder.swallowed(error)
                raise _NotSubmitted(f"the job cannot be submitted: {type(error).__name__}: {error}") from error

        name = (way.first if step == "first" else step) + also
        try:
            # What a signal handler of the caller raises meanwhile (a deadline, Ctrl-C) is the caller's; none of our own
            # code raises a TimeoutError here.
            result, self.told = self._flight.result(name, start, self._interrupted)
        except _NotSubmitted as error:
            return None, no_child(Status.SANDBOX_ERROR, str(error), job_id)
        if not result.ok:
            if self.told and result.leaks.leaks:
                log.warning("%s left behind: %s", result.job_id, result.leaks.counts())
            return None, result
        try:
            return way.load(result.value, result.job_id), result
        except WireError as error:
            return None, no_child(Status.PROTOCOL_ERROR, str(error), result.job_id)
        except CompileFailed as error:
            # One of its kernels, which had a child of its own: what the graph's ladder says of that.
            status = Status(error.status) if error.status in set(Status) else Status.SANDBOX_ERROR
            return None, no_child(status, f"a kernel of it: {error}", result.job_id)
        except TimeoutError:
            raise
        except OSError as error:
            return None, no_child(Status.SANDBOX_ERROR, f"the artifact cannot be loaded: {error}", result.job_id)

    def _interrupted(self, job_id: str) -> None:
        """Ctrl-C in the caller: the child must not go on."""
        self._sandbox.cancel(job_id, "the caller was interrupted")

    def _steps(self, way: Way, attempt: Attempt) -> tuple[Any, Step, JobResult]:
        step: fallback.ChildStep = "first"
        while True:
            try:
                output, result = attempt(step)
            except UnserializableError as error:
                output, result = None, no_child(Status.UNSERIALIZABLE, str(error))
            if output is not None:
                return output, "raise", result
            if self.told and result.status in KILLERS and not starved(self._policy, result):
                self.killed.append(result)
            self._history.append(fallback.Attempt(step=step, status=result.status, no_memory=result.no_memory))
            history = tuple(self._history)
            log.log(
                # One says what is raised anyway, the other that a compile which nobody waits for ends with the sandbox.
                logging.INFO
                if result.status is (Status.COMPILE_ERROR if way.waited_for else Status.CANCELLED)
                else logging.WARNING,
                "%s: %s: %s: %s%s",
                self._name,
                result.job_id,
                result.detail,
                fallback.explain(self._policy, result.status, history),
                f"; crash capsule: {result.capsule}" if result.capsule else "",
                extra={"job_id": result.job_id},
            )
            following = fallback.decide(self._policy, result.status, history)
            if (following != "retry" and following != "reduced") or following not in way.steps:
                self._remember(way)
                return None, following, result
            self._recorder.fallback(following)
            step = following

    def _remember(self, way: Way) -> None:
        """No child made it: if one was killed, no later compile of the same tries again."""
        if self.killed:
            last = self.killed[-1]
            self._quarantine.add(
                way.key, last.status, last.job_id, self._name, last.detail, way.facts, kills=len(self.killed)
            )


def no_child(status: Status, detail: str, job_id: str = "") -> JobResult:
    """How it ended where no child was started, or its reply was of no use."""
    job_id = job_id or new_job_id()
    return JobResult(job_id=job_id, status=status, detail=detail, leaks=LeakReport(job_id=job_id))


def starved(policy: Policy, result: JobResult) -> bool:
    """Whether a job ran out of memory where less was free than the policy allows: that says nothing of its graph."""
    return result.status is Status.MEMORY_LIMIT and result.usage.memory_granted_bytes < policy.limits.memory_bytes


def reason_of(result: JobResult) -> str:
    """The short word under which an in-process compile is counted."""
    if result.status is Status.UNSERIALIZABLE:
        # In a child the class of the exception comes first.
        detail = result.detail.removeprefix("UnserializableError: ")
        return f"unserializable: {detail.partition(':')[0].strip()[:60]}"
    return result.status.value


def told_of(entry: Entry, name: str) -> str:
    """What people are told of a thing that is in quarantine."""
    return (
        f"{name} is in quarantine since {entry.since:%Y-%m-%d %H:%M} UTC: {printable(entry.job_id)} ended "
        f"with {entry.status.value} (sandbox quarantine show {entry.digest[:12]})"
    )


def exception_of(result: JobResult, *, bare: bool = False) -> BaseException:
    """What is raised where the ladder ends with `raise`: for `compile_error` what the compiler raised. ``bare``: as of
    :func:`sandbox.inductor.failures.rebuild_exception`."""
    if result.status is Status.COMPILE_ERROR and result.failure is not None:
        error = failures.rebuild_exception(result.failure, bare=bare)
        error.add_note(f"raised in the sandboxed child of {result.job_id}")
        return error
    # In the message, not a note: of an exception that a backend raises Dynamo shows no notes.
    again = f" (to run it again: sandbox replay {result.capsule})" if result.capsule else ""
    error = CompileFailed(result.status.value, result.detail + again, result.job_id)
    if result.stderr_tail:
        words = "\n".join(printable(line) for line in result.stderr_tail[-4000:].splitlines())
        error.add_note(f"the child's last words:\n{words}")
    return error

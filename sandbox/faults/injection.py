"""Arming a fault, in the host process: `inject` for one kind, `Plan` for a seeded sequence.

As long as an injection lasts, the functions at the points of the parent are replaced by name. A job that gets a fault
takes it along on its own thread; what must happen in another process travels with the fork request.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandbox import artifacts, executor, monitor, scratch
from sandbox.errors import PolicyError, SandboxError
from sandbox.executor import Sandbox
from sandbox.faults.kinds import DELAY_SECONDS, KINDS, LATE, POINTS, InjectedFault, Shot, mutate
from sandbox.forkserver import Forkserver
from sandbox.jobs import Job
from sandbox.results import JobResult
from sandbox.standby import Standbys
from sandbox.wire import encode_frame

_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO, "read_only": errno.EROFS}


@dataclass(frozen=True)
class Plan:
    """A seeded sequence of faults: the same seed, kinds, points and rate give the same sequence.

    Jobs take from it in the order in which they start.
    """

    seed: int
    kinds: tuple[str, ...] = ()
    """Names of kinds to choose from. Empty: all that have a point in ``points``."""
    points: tuple[str, ...] = tuple(point for point in POINTS if point not in ("host", "parent.run"))
    """Points to choose from. Default: all but `host` and `parent.run`, where a fault hits whatever else this process
    does (it has no descriptor left, say)."""
    rate: float = 1.0
    """How many of the jobs get a fault, from 0 to 1."""

    def shot(self, number: int) -> Shot | None:
        """The fault of the job with this number, counted from 0; None for one that is spared."""
        chance = random.Random(f"{self.seed} {number}")
        if chance.random() >= self.rate:
            return None
        places = {name: [point for point in KINDS[name].points if point in self.points] for name in self.kinds or KINDS}
        name = chance.choice([name for name, points in places.items() if points])
        return Shot(name, chance.choice(places[name]), chance.getrandbits(32))


@dataclass
class Injection:
    """An injection at work."""

    into: Sandbox
    plan: Plan | Shot
    times: int | None
    given: list[Shot] = field(default_factory=list)
    """The faults that were given to jobs so far, in order."""
    _jobs: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self) -> Shot | None:
        """The fault of the next job."""
        with self._lock:
            number, self._jobs = self._jobs, self._jobs + 1
            if self.times is not None and len(self.given) >= self.times:
                return None
            shot = self.plan if isinstance(self.plan, Shot) else self.plan.shot(number)
            if shot is not None:
                self.given.append(shot)
            return shot


@contextlib.contextmanager
def inject(
    what: str | Shot | Plan, at: str | None = None, *, into: Sandbox | None = None, times: int | None = None
) -> Iterator[Injection]:
    """As long as the block lasts, jobs of a sandbox have the fault.

        with faults.inject("sigsegv", at="child.run", times=1) as injection:
            model(x)  # the first child of it dies
        assert injection.given

    Args:
        what: the name of a kind (see :data:`KINDS`), a :class:`Shot`, or a :class:`Plan`.
        at: the point; default: the first of the kind.
        into: the sandbox; default: that of :func:`sandbox.install`.
        times: how many children have it; default: all.

    The limits of a kind (:attr:`Kind.limits`) hold for the jobs that have the fault, where they are lower than the
    job's own. A kind at the point `host` changes this process until the block ends; the SIGCHLD ones need the main
    thread. Of several injections into one sandbox the newest is asked first; a job that it spares, or for which it has
    none left, is offered to the one before.

    Raises:
        PolicyError: the policy of the sandbox does not say `allow_faults`, or there is no such kind or point.
        SandboxError: there is no sandbox, or the state of the host cannot be changed from here.
    """
    target = into if into is not None else _installed()
    if not target.policy.allow_faults:
        raise PolicyError(
            f"the policy {target.policy.name!r} says allow_faults = false: no fault can be injected into its sandbox. "
            "For tests take a policy of your own that says true, or "
            "load(NAME).model_copy(update={'allow_faults': True})"
        )
    injection = Injection(target, _checked(what, at), times)
    shot = injection.plan
    if isinstance(shot, Shot) and shot.point == "host":
        injection.given.append(shot)
        with HOST_STATES[shot.kind]():
            yield injection
        return
    with _lock:
        _armed.append(injection)
        if len(_armed) == 1:
            _replace()
    try:
        yield injection
    finally:
        with _lock:
            _armed.remove(injection)
            if not _armed:
                _restore()


def _checked(what: str | Shot | Plan, at: str | None) -> Plan | Shot:
    for name in what.kinds if isinstance(what, Plan) else (what if isinstance(what, str) else what.kind,):
        if name not in KINDS:
            raise PolicyError(f"no kind of fault {name!r}: allowed are {', '.join(KINDS)}")
    if isinstance(what, Plan):
        for point in what.points:
            if point not in POINTS:
                raise PolicyError(f"no injection point {point!r}: allowed are {', '.join(POINTS)}")
        if "host" in what.points:
            raise PolicyError("a plan gives faults to jobs; a state of the host is injected by the name of its kind")
        if not any(point in what.points for name in what.kinds or KINDS for point in KINDS[name].points):
            raise PolicyError(f"no kind of the plan can happen at one of its points: {', '.join(what.points)}")
        return what
    kind = KINDS[what if isinstance(what, str) else what.kind]
    shot = Shot(kind.name, at or kind.points[0]) if isinstance(what, str) else what
    if shot.point not in POINTS:
        raise PolicyError(f"no injection point {shot.point!r}: allowed are {', '.join(POINTS)}")
    if shot.point not in kind.points:
        raise PolicyError(f"{kind.name} cannot happen at {shot.point}: allowed are {', '.join(kind.points)}")
    return shot


def _installed() -> Sandbox:
    from sandbox.inductor.install import installed

    scheme = installed()
    if scheme is None:
        raise SandboxError("no sandbox to inject into: call sandbox.install() first, or name one with into=")
    return scheme.sandbox


# In the parent: which fault the job of this thread has, and the points.

_lock = threading.Lock()
#: Clocks and limits are the whole process's: of two jobs that change one at a time, the first would put back what the
#: second still needs, and the second what the first had set.
_one_state = threading.Lock()
_armed: list[Injection] = []
_replaced: list[tuple[Any, str, Any]] = []
_job = threading.local()


def _here(point: str) -> Shot | None:
    shot: Shot | None = getattr(_job, "shot", None)
    return shot if shot is not None and shot.point == point else None


def _run(function: Callable[..., JobResult]) -> Callable[..., JobResult]:
    def replacement(forkserver: Forkserver, job: Job, *args: Any, **kwargs: Any) -> JobResult:
        mine = (each for each in reversed(tuple(_armed)) if each.into._forkserver is forkserver)
        shot = next((shot for each in mine if (shot := each.draw()) is not None), None)
        if shot is None:
            return function(forkserver, job, *args, **kwargs)
        _job.shot = shot
        try:
            with _around(shot):
                return function(forkserver, _limited(job, shot), *args, **kwargs)
        finally:
            _job.shot = None

    return replacement


def _limited(job: Job, shot: Shot) -> Job:
    limits = job.spec.limits
    lower = {
        name: value
        for name, value in (KINDS[shot.kind].limits if shot.point not in LATE else {}).items()
        if value < getattr(limits, name)
    }
    return Job(job.spec.model_copy(update={"limits": limits.model_copy(update=lower)}), job.payload) if lower else job


def _ask(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def replacement(self: Forkserver, request: dict[str, Any], *args: Any) -> dict[str, Any]:
        shot: Shot | None = getattr(_job, "shot", None)
        if shot is not None and request["op"] == "fork":
            request = {**request, "fault": asdict(shot)}
        return function(self, request, *args)

    return replacement


def _take(function: Callable[..., Any]) -> Callable[..., Any]:
    """A job that has a fault gets a fresh child, which passes all points."""

    def replacement(self: Standbys, spec: Any) -> Any:
        return None if getattr(_job, "shot", None) is not None else function(self, spec)

    return replacement


def _fails(point: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the parent that raises where the fault says so."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        shot = _here(point)
        if shot is not None and shot.kind in _ERRNO:
            number = _ERRNO[shot.kind]
            raise OSError(number, f"{os.strerror(number)} (injected)")
        if shot is not None and shot.kind == "raise":
            raise InjectedFault("injected")
        return function(*args, **kwargs)

    return replacement


def _request(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def replacement(envelope: Any, payload: Any = b"") -> list[Any]:
        shot = _here("wire.request")
        if shot is None:
            return function(envelope, payload)
        foreign = envelope.model_copy(update={"job_id": "job-000000000000"})
        if shot.kind == "delayed":
            time.sleep(DELAY_SECONDS)
        frame = mutate(shot, b"".join(function(envelope, payload)), b"".join(encode_frame(foreign, payload)))
        return [frame] if frame else []

    return replacement


def _replace() -> None:
    for owner, name, wrap in (
        (executor, "run", lambda function: _fails("parent.run", function)),
        (executor, "run", _run),
        (scratch.Root, "folder", lambda function: _fails("parent.folder", function)),
        (Forkserver, "fork", lambda function: _fails("parent.fork", function)),
        (Forkserver, "_ask", _ask),
        (Standbys, "take", _take),
        (monitor, "_watch", lambda function: _fails("parent.watch", function)),
        (monitor, "encode_frame", _request),
        (artifacts, "adopt", lambda function: _fails("parent.adopt", function)),
    ):
        _replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, wrap(getattr(owner, name)))


def _restore() -> None:
    while _replaced:
        setattr(*_replaced.pop())


# States of the host.


@contextlib.contextmanager
def _around(shot: Shot) -> Iterator[None]:
    """What lasts as long as the job, in the host."""
    chance = random.Random(shot.seed)
    with contextlib.ExitStack() as stack:
        if shot.point == "parent.run" and shot.kind != "raise":
            stack.enter_context(_one_state)
            if shot.kind == "clock_jump":
                stack.enter_context(_wall_clock(chance.choice((-1, 1)) * 86_400.0))
            elif shot.kind == "clock_skip":
                stack.enter_context(_monotonic_clock())
            elif shot.kind == "fd_exhaustion":
                stack.enter_context(_few_descriptors(0))
            elif shot.kind == "fd_limit":
                stack.enter_context(_few_descriptors(chance.randrange(13)))
        yield


@contextlib.contextmanager
def _wall_clock(jump: float) -> Iterator[None]:
    real = time.time
    time.time = lambda: real() + jump
    try:
        yield
    finally:
        time.time = real


class _Clock:
    """Stands in for the module `time` in the monitor: an hour is gone as soon as the job runs."""

    def __init__(self) -> None:
        self._calls = 0

    def monotonic(self) -> float:
        self._calls += 1
        return time.monotonic() + (3600.0 if self._calls > 1 else 0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextlib.contextmanager
def _monotonic_clock() -> Iterator[None]:
    setattr(monitor, "time", _Clock())  # noqa: B010 - a module's import, which is not exported
    try:
        yield
    finally:
        setattr(monitor, "time", time)  # noqa: B010


@contextlib.contextmanager
def _few_descriptors(spare: int) -> Iterator[None]:
    """This process can open ``spare`` more files, no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, len(os.listdir("/proc/self/fd")) + 64), hard))
        while True:
            try:
                kept.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for _ in range(min(spare, len(kept))):
            os.close(kept.pop())
        yield
    finally:
        for fd in kept:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def _closed_stdio() -> Iterator[None]:
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in range(3)]
    for fd in range(3):
        os.close(fd)
    try:
        yield
    finally:
        for fd, old in enumerate(kept):
            os.dup2(old, fd)
            os.close(old)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextlib.contextmanager
def _sigchld(handler: Any) -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGCHLD, handler)
    except ValueError:
        raise SandboxError("the handler of SIGCHLD can only be changed in the main thread") from None
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _read_only_tmp() -> Iterator[None]:
    """Nothing can be made in the temporary folder, nor in the root that the sandbox has there already. /proc/self is a
    folder in which nobody, root neither, can make a file."""

    def refused(*_: object) -> Path:
        raise OSError(errno.EROFS, f"{os.strerror(errno.EROFS)} (injected)")

    before, variable, folder = tempfile.tempdir, os.environ.get("TMPDIR"), scratch.Root.folder
    setattr(scratch.Root, "folder", refused)  # noqa: B010
    tempfile.tempdir = os.environ["TMPDIR"] = "/proc/self"
    try:
        yield
    finally:
        setattr(scratch.Root, "folder", folder)  # noqa: B010
        tempfile.tempdir = before
        os.environ.pop("TMPDIR")
        if variable is not None:
            os.environ["TMPDIR"] = variable


#: What holds a state of the host, by kind.
HOST_STATES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "closed_stdio": _closed_stdio,
    "sigchld_reaper": lambda: _sigchld(_reap),
    "sigchld_ignored": lambda: _sigchld(signal.SIG_IGN),
    "read_only_tmp": _read_only_tmp,
}

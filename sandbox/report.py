"""Counts of what happened, for reports: the models that `sandbox.stats()` and `--report` give."""

from __future__ import annotations

import threading
from collections import Counter, deque

from pydantic import BaseModel, ConfigDict

from sandbox.results import JobResult, Leak, Usage

#: Rows of single jobs that are kept, a count; the counters go on beyond it. About 4 KB each.
MAX_ROWS = 1000
#: Different reasons that are kept apart, a count; the rest is `other`.
MAX_REASONS = 500


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class JobRow(_Model):
    """One child, for tables."""

    job_id: str
    name: str
    """What was compiled: the graph's name and Dynamo's compile id, or the function."""
    step: str
    """Which step of the ladder started it: `first`, `retry` or `reduced`; `quick`: the first of `progressive`."""
    status: str
    detail: str
    usage: Usage
    leaks: int
    artifacts: int
    enforcement: dict[str, str]
    capsule: str = ""
    """Folder of its crash capsule; empty if it has none."""


class LeakRow(_Model):
    """One thing that was left behind, for tables."""

    job_id: str
    """The job that left it; empty for what the forkserver or this process holds."""
    kind: str
    object: str
    """What it is: a path, a pid with its command, `fd 7 -> socket:[123]`."""
    owner: str
    """`child`, `forkserver`, or `parent`: this process, of what the sandbox itself has made in it."""
    reclaimed: bool
    """Whether it was removed, or has ended with its process."""
    stack: tuple[str, ...] = ()
    """Where it was made, with the policy's `trace_leaks`; of a thread, where it was."""


class Stats(_Model):
    """What happened in this process so far. All numbers are counts unless a unit is named."""

    policy: str = ""
    mode: str = ""
    graphs: int = 0
    """Graphs that were given to the sandbox to compile; cache hits never reach it."""
    in_child: int = 0
    """Graphs whose artifact came from a child."""
    in_process: int = 0
    """Graphs compiled in this process."""
    eager: int = 0
    """Graphs that run uncompiled; in the mode `async`, also those that still do."""
    raised: int = 0
    """Graphs whose compile raised to the caller."""
    in_process_reasons: dict[str, int] = {}
    """Why graphs and kernels were compiled in this process, a count per reason."""
    launches: dict[str, int] = {}
    """Triton kernels that a direct launch had to compile, a count for each of `in_child`, `in_process` and `raised`."""
    pending: int = 0
    """Of the modes `async` and `progressive`: graphs whose better code is under way, now."""
    switched: int = 0
    """Graphs that run their better code by now."""
    kept: dict[str, int] = {}
    """Why graphs keep the code that they began with, a count per reason."""
    outcomes: dict[str, int] = {}
    """How children ended, a count per status."""
    fallbacks: dict[str, int] = {}
    """Steps of the ladder that were taken after a failure, a count per step."""
    leaks: dict[str, int] = {}
    """What jobs left behind, and what the sandbox itself holds that it should not, a count per kind."""
    leaked: tuple[LeakRow, ...] = ()
    """The newest leaks, one by one, at most 1,000."""
    children_started: int = 0
    forkserver_restarts: int = 0
    forkserver_seconds: float = 0.0
    """Start and warm-up of the newest forkserver, in seconds."""
    breaker: str = "closed"
    """State of the circuit breaker: `closed`, `open`, `half_open` or `off`."""
    breaker_opened: int = 0
    """How often it has opened."""
    enforcement: dict[str, str] = {}
    """State per mechanism: the weakest that any job saw."""
    swallowed: dict[str, int] = {}
    """Errors of ours that were survived without telling the caller, a count per kind."""
    jobs: tuple[JobRow, ...] = ()
    """The newest jobs, at most 1,000."""


_WEAKEST = ("unavailable", "partial", "off", "enforced")


class Recorder:
    """Collects the counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.policy = ""
        self.mode = ""
        self._graphs: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._launches: Counter[str] = Counter()
        self._pending = 0
        self._switched = 0
        self._kept: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._leaks: Counter[str] = Counter()
        self._swallowed: Counter[str] = Counter()
        self._enforcement: dict[str, str] = {}
        self._rows: deque[JobRow] = deque(maxlen=MAX_ROWS)
        self._leaked: deque[LeakRow] = deque(maxlen=MAX_ROWS)

    def graph(self, where: str) -> None:
        """A graph is settled. ``where``: `in_child`, `in_process`, `eager` or `raised`."""
        with self._lock:
            self._graphs[where] += 1

    def launch(self, where: str) -> None:
        """What a direct launch had to compile is settled. ``where``: `in_child`, `in_process` or `raised`."""
        with self._lock:
            self._launches[where] += 1

    def reason(self, reason: str) -> None:
        """Why a graph is compiled in this process. The words may be a child's: they are kept up to a number."""
        with self._lock:
            known = reason in self._reasons or len(self._reasons) < MAX_REASONS
            self._reasons[reason if known else "other"] += 1

    def began(self) -> None:
        """The better code of a graph is under way."""
        with self._lock:
            self._pending += 1

    def switched(self, was: str) -> None:
        """It is there. ``was``: what the graph was counted as."""
        with self._lock:
            self._pending -= 1
            self._switched += 1
            self._graphs[was] -= 1
            self._graphs["in_child"] += 1

    def switched_back(self, was: str, reason: str) -> None:
        """The better code is not used any more."""
        with self._lock:
            self._switched -= 1
            self._graphs["in_child"] -= 1
            self._graphs[was] += 1
        self.kept(reason)

    def kept(self, reason: str, *, begun: bool = False) -> None:
        """A graph keeps the code that it began with. ``begun``: its better code was under way."""
        with self._lock:
            self._pending -= begun
            known = reason in self._kept or len(self._kept) < MAX_REASONS
            self._kept[reason if known else "other"] += 1

    def fallback(self, step: str) -> None:
        """A step of the ladder was taken."""
        with self._lock:
            self._fallbacks[step] += 1

    def swallowed(self, error: BaseException) -> None:
        """An error of ours was survived."""
        with self._lock:
            self._swallowed[type(error).__name__] += 1

    def job(self, result: JobResult, name: str, step: str) -> None:
        """A child has ended."""
        states = result.enforcement.states()
        row = JobRow(
            job_id=result.job_id,
            name=name,
            step=step,
            status=result.status.value,
            detail=result.detail,
            usage=result.usage,
            leaks=len(result.leaks.leaks),
            artifacts=len(result.artifacts),
            enforcement=states,
            capsule=result.capsule,
        )
        with self._lock:
            self._outcomes[result.status.value] += 1
            self._leaks.update(result.leaks.counts())
            self._leaked.extend(_row(leak, result.job_id) for leak in result.leaks.leaks)
            for mechanism, state in states.items():
                known = self._enforcement.get(mechanism, state)
                self._enforcement[mechanism] = min(known, state, key=_WEAKEST.index)
            self._rows.append(row)

    def snapshot(
        self,
        children: int = 0,
        restarts: int = 0,
        forkserver_seconds: float = 0.0,
        leaks: tuple[Leak, ...] = (),
        breaker: str = "closed",
        breaker_opened: int = 0,
    ) -> Stats:
        """The counts as a model, with what forkserver and circuit breaker know; ``leaks``: what belongs to no job."""
        with self._lock:
            leaked = self._leaks + Counter(leak.kind for leak in leaks)
            return Stats(
                policy=self.policy,
                mode=self.mode,
                graphs=sum(self._graphs.values()),
                in_child=self._graphs["in_child"],
                in_process=self._graphs["in_process"],
                eager=self._graphs["eager"],
                raised=self._graphs["raised"],
                in_process_reasons=dict(self._reasons),
                launches=dict(self._launches),
                pending=self._pending,
                switched=self._switched,
                kept=dict(self._kept),
                outcomes=dict(self._outcomes),
                fallbacks=dict(self._fallbacks),
                leaks=dict(leaked),
                leaked=(*self._leaked, *(_row(leak, "") for leak in leaks))[-MAX_ROWS:],
                children_started=children,
                forkserver_restarts=restarts,
                forkserver_seconds=forkserver_seconds,
                breaker=breaker,
                breaker_opened=breaker_opened,
                enforcement=dict(sorted(self._enforcement.items())),
                swallowed=dict(self._swallowed),
                jobs=tuple(self._rows),
            )


def _row(leak: Leak, job_id: str) -> LeakRow:
    return LeakRow(job_id=job_id, **leak.model_dump())

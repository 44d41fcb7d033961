"""How one graph is compiled: in a child, and down the policy's ladder if that fails.

graph ─▶ payload ─▶ job ─▶ child ─▶ reply ─▶ artifacts in the cache ─▶ loaded
            │         ▲        │
            │         └─ retry, reduced ◀─ fallback.decide ─▶ in_process │ eager │ raise
            └─ UnserializableError ────────────┘
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch

from sandbox import fallback
from sandbox.errors import (
    CompileFailed,
    JobError,
    PolicyError,
    QuarantineError,
    SandboxError,
    UnserializableError,
    WireError,
)
from sandbox.executor import Sandbox
from sandbox.inductor import (
    aoti,
    cached,
    compat,
    deferred,
    eager,
    failures,
    identity,
    kernels,
    logs,
    payload,
    registrations,
    reply,
    traced,
)
from sandbox.inductor.inflight import Flight, Flights
from sandbox.inductor.later import Kept, Later
from sandbox.inductor.workers import Workers
from sandbox.jobs import FxGraphSpec, Job, Scalar, digest, new_job_id
from sandbox.policy import Policy, Step
from sandbox.quarantine import Entry, Quarantine
from sandbox.quarantine_files import keep_of, store_of
from sandbox.results import KILLERS, JobResult, LeakReport, Status, printable

log = logging.getLogger("sandbox")

Mode = Literal["normal", "serialize", "subprocess", "async", "progressive"]
MODES: Final[tuple[str, ...]] = get_args(Mode)
#: Those that start children.
WITH_CHILDREN: Final = ("subprocess", "async", "progressive")
#: Those in which graphs run before they are compiled, or well compiled.
DEFERRED: Final = ("async", "progressive")
#: Seconds that :meth:`Scheme.close` waits for a graph that is being loaded, at most.
CLOSE_SECONDS: Final = 1.5


def check_mode(mode: str) -> Mode:
    """``mode``, if it is one.

    Raises:
        PolicyError: naming those that are.
    """
    for known in get_args(Mode):
        if mode == known:
            return known  # type: ignore[no-any-return]
    raise PolicyError(f"no compile mode {mode!r}: allowed are {', '.join(MODES)}")


class Scheme:
    """A policy and a mode at work: compiles graphs for Inductor. Thread-safe."""

    def __init__(self, policy: Policy, mode: Mode) -> None:
        self.policy = policy
        self.mode = mode
        self.sandbox = Sandbox(policy)
        self.sandbox.recorder.mode = mode
        slots = self.sandbox.slots
        # In `progressive` one is left to the quick compiles, which somebody waits for.
        self.workers = Workers(slots if mode == "async" else max(1, slots - 1))
        self.flights = Flights()
        self.closed = False
        _OPEN.add(self)
        self._warned: set[str] = set()
        self._warned_lock = threading.Lock()
        self.refused = registrations.Refused()
        settings = policy.quarantine
        self.quarantine = Quarantine(store_of(settings, self._not_usable), keep_of(settings))

    def compile(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        inputs_to_check: Sequence[int],
        graph_kwargs: dict[str, Any],
        region: str | None = None,
    ) -> Any:
        """One post-AOT graph to an OutputCode. Arguments as of Inductor's `fx_codegen_and_compile`.

        Raises:
            the exception that in-process Inductor would have raised, for `compile_error`.
            CompileFailed: the ladder ends with `raise` for another status.
        """
        return _Compile(self, gm, example_inputs, inputs_to_check, graph_kwargs, region).run()

    def close(self) -> None:
        """End the forkserver and cancel what runs. Graphs whose better code is under way stay as they are."""
        self.closed = True
        if self.sandbox.foreign:
            return
        self.workers.close()
        self.sandbox.close()
        self.workers.wait(CLOSE_SECONDS)

    def _not_usable(self, error: QuarantineError) -> None:
        self.sandbox.recorder.swallowed(error)
        self.warn_once("quarantine", f"{error}. Further ones are only counted, as QuarantineError")

    def warn_once(self, reason: str, message: str) -> None:
        """One warning per reason and process."""
        with self._warned_lock:
            if reason in self._warned:
                return
            self._warned.add(reason)
        log.warning(message)


_OPEN: weakref.WeakSet[Scheme] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the sandboxes are closed: no thread may be loading a graph while the interpreter ends."""
    for scheme in list(_OPEN):
        scheme.close()


@dataclass(frozen=True)
class _Way:
    """How the children of one walk down the ladder are started, and what is made of what they reply."""

    load: Callable[[Any, str], Any]
    """Called with the reply and the job id; the walk returns what it returns."""
    key: str
    """By which the graph is quarantined."""
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


class _Compile:
    """One graph on its way."""

    def __init__(
        self,
        scheme: Scheme,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        inputs_to_check: Sequence[int],
        graph_kwargs: dict[str, Any],
        region: str | None,
    ) -> None:
        self.scheme = scheme
        self.policy = scheme.policy
        self.recorder = scheme.sandbox.recorder
        self.gm = gm
        self.example_inputs = example_inputs
        self.inputs_to_check = inputs_to_check
        self.graph_kwargs = graph_kwargs
        self.region = region
        self.compile_id = str(compat.CompileContext.current_compile_id() or "")
        direction = "backward" if graph_kwargs.get("is_backward") else "forward"
        self.name = f"{direction} graph {graph_kwargs.get('graph_id', '?')} [{self.compile_id}]"
        self.history: list[fallback.Attempt] = []
        self.killed: list[JobResult] = []  # the children that it has killed
        self.data: bytes | None = None  # the payload; the same for each child
        self.same: tuple[str, str] | None = None  # what another thread's graph must have to be the same
        if (key := cached.key_of(gm)) is not None:
            self.same = key, payload.taken_for_granted(example_inputs)
        self.flight = Flight()  # the children that it shares with other threads
        self.told = True  # whether this thread was the first to hear how the last one ended
        self.folders: dict[str, Path] | None = None  # where artifacts go; None: where the caches are then

    def run(self) -> Any:
        if eager.mixes(self.gm, self.graph_kwargs, uncompiled=False):
            return self._eager()
        if self.scheme.mode == "normal":
            return self._in_process("mode_normal")
        if self.scheme.mode in DEFERRED and self._may_run_first():
            return self._deferred()
        return self._waited_for()

    @functools.cached_property
    def target(self) -> str:
        """What it is compiled for."""
        return _target(self.gm, self.example_inputs)

    def _waited_for(self) -> Any:
        """The modes `subprocess` and `serialize`."""
        if not aoti.wanted():
            return self._down(self._way(self._load))
        with aoti.staging() as staged:
            self.folders = {**cache_folders(), "aoti": staged}
            return self._down(self._way(functools.partial(self._package, staged=staged)))

    def _down(self, way: _Way) -> Any:
        if (entry := self.scheme.quarantine.get(way.key)) is not None:
            return self._quarantined(entry)
        output, step, result = self._walk(way)
        if output is None:
            return self._ends(step, result)
        self.recorder.graph("in_process" if self.scheme.mode == "serialize" else "in_child")
        if self.scheme.mode == "serialize":
            self.recorder.reason("mode_serialize")
        return output

    def _way(self, load: Callable[[Any, str], Any], overrides: Mapping[str, Scalar] | None = None, **rest: Any) -> _Way:
        facts = identity.made_for(self.policy, self.target)
        if overrides:
            # Other settings, another chance; in the policy's own table, so that all of it is one fact.
            facts["settings"] = ", ".join(f"{name} = {value}" for name, value in sorted(overrides.items()))[:500]
        key = identity.quarantine_key(self.gm, self.example_inputs, facts)
        return _Way(load, key, facts, overrides or {}, **rest)

    def _walk(self, way: _Way) -> tuple[Any, Step, JobResult]:
        """Children, down the ladder, side by side with other threads that compile the same. Returns what ``way`` made
        of the reply, or None and the ladder's last step, and how the last child ended."""
        with self.scheme.flights.joined(self._shared(way)) as self.flight:
            return self._steps(way)

    def _shared(self, way: _Way) -> str | None:
        """What two compiles must have in common to share their children: all that a job is made of."""
        if self.same is None or self.scheme.mode == "serialize":
            return None
        return repr((self.same, self.folders or cache_folders(), way.overrides, way.nice, way.waited_for))

    def _steps(self, way: _Way) -> tuple[Any, Step, JobResult]:
        step: fallback.ChildStep = "first"
        while True:
            try:
                output, result = self._attempt(step, way)
            except UnserializableError as error:
                output, result = None, self._no_child(Status.UNSERIALIZABLE, str(error))
            if output is not None:
                return output, "raise", result
            if self.told and result.status in KILLERS and not starved(self.policy, result):
                self.killed.append(result)
            self.history.append(fallback.Attempt(step=step, status=result.status, no_memory=result.no_memory))
            history = tuple(self.history)
            log.log(
                # One says what is raised anyway, the other that a compile which nobody waits for ends with the sandbox.
                logging.INFO
                if result.status is (Status.COMPILE_ERROR if way.waited_for else Status.CANCELLED)
                else logging.WARNING,
                "%s: %s: %s: %s%s",
                self.name,
                result.job_id,
                result.detail,
                fallback.explain(self.policy, result.status, history),
                f"; crash capsule: {result.capsule}" if result.capsule else "",
                extra={"job_id": result.job_id},
            )
            following = fallback.decide(self.policy, result.status, history)
            if (following != "retry" and following != "reduced") or following not in way.steps:
                self._remember(way)
                return None, following, result
            self.recorder.fallback(following)
            step = following

    def _ends(self, step: Step, result: JobResult) -> Any:
        """What the ladder says when no child has made it."""
        self.recorder.fallback(step)
        if step == "in_process":
            return self._in_process(_reason(result))
        if step == "eager":
            return self._eager(result)
        self.recorder.graph("raised")
        raise self._exception(result)

    def _remember(self, way: _Way) -> None:
        """No child made it: if one was killed, no later compile of this graph tries again."""
        if self.killed:
            last = self.killed[-1]
            self.scheme.quarantine.add(
                way.key, last.status, last.job_id, self.name, last.detail, way.facts, kills=len(self.killed)
            )

    def _quarantined(self, entry: Entry) -> Any:
        """A graph that has killed a child gets no second one."""
        step = fallback.decide_quarantined(self.policy, entry.status)
        self.recorder.fallback("quarantined")
        self.recorder.fallback(step)
        detail = (
            f"{self.name} is in quarantine since {entry.since:%Y-%m-%d %H:%M} UTC: {printable(entry.job_id)} ended "
            f"with {entry.status.value} (sandbox quarantine show {entry.digest[:12]})"
        )
        self.scheme.warn_once(entry.digest, f"{detail}; next: {step}")
        if step == "eager":
            return self._eager(self._no_child(entry.status, detail, entry.job_id))
        self.recorder.graph("raised")
        raise CompileFailed(entry.status.value, detail, entry.job_id)

    def _attempt(self, step: fallback.ChildStep, way: _Way) -> tuple[Any, JobResult]:
        """One child. Returns what ``way`` makes of its reply, or None, and how the child ended."""
        target = self.target
        if target != "cpu" and not self.policy.gpu:
            raise UnserializableError("gpu_not_granted", f"a graph for {target}, and the policy says gpu = false")
        if aoti.wanted():
            aoti.check_sendable(self.graph_kwargs, target)
        self.scheme.refused.check(self.gm)
        data = self._encoded()
        sandbox = self.scheme.sandbox
        spec = FxGraphSpec(
            job_id=new_job_id(),
            payload_sha256=digest(data),
            payload_bytes=len(data),
            limits=self.policy.limits,
            confinement=self.policy.confinement,
            target=target,
            gpu=self.policy.gpu and target != "cpu",
            kernel_threads=sandbox.kernel_threads,
            compile_id=self.compile_id[:64] or None,
            environment=sandbox.environment(),
            config_overrides={**way.overrides, **(self.policy.reduced if step == "reduced" else {})},
            nice=way.nice,
        )
        try:
            job = Job(spec, data)
        except JobError as error:
            raise UnserializableError("payload_too_large", str(error)) from None
        if self.scheme.mode == "serialize":
            return self._serialized(spec, data, way)
        name = way.first if step == "first" else step

        def start() -> tuple[str, Future[JobResult]]:
            folders = self.folders or cache_folders()
            return spec.job_id, sandbox.submit(job, name=self.name, step=name, cache=folders)

        try:
            result, self.told = self.flight.result(name, start, self._interrupted)
        except (SandboxError, OSError, RuntimeError) as error:
            # It was closed meanwhile, or has no descriptor or thread left: the ladder knows what to do.
            self.recorder.swallowed(error)
            detail = f"the job cannot be submitted: {type(error).__name__}: {error}"
            return None, self._no_child(Status.SANDBOX_ERROR, detail, spec.job_id)
        if not result.ok:
            if self.told and result.leaks.leaks:
                log.warning("%s left behind: %s", result.job_id, result.leaks.counts())
            if result.status is Status.UNSERIALIZABLE:
                self.scheme.refused.note(self.gm, result.detail)
            return None, result
        try:
            return way.load(result.value, result.job_id), result
        except WireError as error:
            return None, self._no_child(Status.PROTOCOL_ERROR, str(error), result.job_id)
        except OSError as error:
            return None, self._no_child(Status.SANDBOX_ERROR, f"the artifact cannot be loaded: {error}", result.job_id)

    def _encoded(self) -> bytes:
        """The payload. Made once: whoever compiles may change the graph later."""
        try:
            if self.data is None:
                self.data = payload.encode(
                    self.gm, self.example_inputs, self.inputs_to_check, self.graph_kwargs, self.region
                )
            return self.data
        except UnserializableError:
            raise
        except Exception as error:
            # Settings, contexts and graphs of other people: what surprises us must not stop their compile.
            raise UnserializableError("not_encodable", f"{type(error).__name__}: {error}") from error

    def _interrupted(self, job_id: str) -> None:
        """Ctrl-C in the caller: the child must not go on."""
        self.scheme.sandbox.cancel(job_id, "the caller was interrupted")

    def _load(self, value: Any, job_id: str) -> Any:
        output = reply.decode_graph(
            value, self.gm, self.example_inputs, self.inputs_to_check, self.graph_kwargs, self.region
        )
        self._remember_kernels(output, value)
        self._replay_logs(value, job_id)
        return output

    def _package(self, value: Any, job_id: str, staged: Path) -> Any:
        output = aoti.decode(reply.check_package(value), self.gm, staged)
        self._replay_logs(value, job_id)
        return output

    def _remember_kernels(self, output: Any, value: Any) -> None:
        try:
            cached.remember(output.cache_key, value["kernels"])
        except OSError as error:
            self.recorder.swallowed(error)  # a later process takes Inductor's own, slower way

    def _replay_logs(self, value: Any, job_id: str) -> None:
        if self.told and (dropped := logs.replay_logs(value, job_id)):
            log.info("%s: %d records for loggers that are not torch's were dropped", job_id, dropped)

    # The modes `async` and `progressive`.

    def _may_run_first(self) -> bool:
        """Whether the graph can run at once and be exchanged: not if its compiled form is what is asked for, and not
        if uncompiled it draws other random numbers."""
        asked_for = aoti.wanted() or compat.makes_packages()
        return not asked_for and not eager.seeded_on_gpu(self.gm)

    def _deferred(self) -> Any:
        """The graph as it is, or compiled in a hurry; and better code when a child has made it."""
        if self.graph_kwargs.get("cudagraphs"):
            compat.BoxedBool.disable(self.graph_kwargs["cudagraphs"])
        self.folders = cache_folders()
        kept: Kept | None = None
        try:
            with deferred.keeping_strides(self.gm):
                self._encoded()
        except UnserializableError as error:
            kept = Kept(_reason(self._no_child(Status.UNSERIALIZABLE, str(error))), str(error))
        if self.scheme.mode == "async":
            self.recorder.graph("eager")
            return self._exchanged(eager.eager_class()(self.gm), "eager", kept)
        if kept is not None:
            return self._waited_for()  # no child, quick or not: what the ladder says of that
        return self._progressive()

    def _progressive(self) -> Any:
        quick = self._way(self._load, self.policy.quick, first="quick")
        if (entry := self.scheme.quarantine.get(quick.key)) is not None:
            return self._quarantined(entry)
        output, step, result = self._walk(quick)
        if output is not None:
            self.recorder.graph("in_child")
            return self._exchanged(output, "in_child")
        first = self._ends(step, result)
        # Not compiled: the caller's own settings may do what the quick ones could not.
        return self._exchanged(first, "eager") if step == "eager" and not self.killed else first

    def _exchanged(self, first: Any, was: str, kept: Kept | None = None) -> Any:
        """``first``, and better code later, unless there is a reason why not."""
        later = Later(self.name, self.gm, self.example_inputs, self.inputs_to_check, self.graph_kwargs, self.region)

        folders = self.folders = self.folders or cache_folders()

        def load(value: Any, job_id: str) -> bool:
            with kernels.kept_in(folders["inductor"]):
                later.load(value, functools.partial(self._remember_kernels, value=value))
            self._replay_logs(value, job_id)
            return True

        steps: tuple[Step, ...] = ("retry", "reduced") if was == "eager" else ("retry",)
        way = self._way(load, steps=steps, nice=self.policy.deferred.nice, waited_for=False)
        if was == "in_child" and not later.keeps_strides(first):
            kept = Kept("strides", "the quick compile has not kept them")
        if (entry := self.scheme.quarantine.get(way.key)) is not None:
            kept = Kept("quarantined", f"since {entry.since:%Y-%m-%d %H:%M} UTC, after {entry.status.value}")
        if kept is not None:
            self.recorder.kept(kept.reason)
            self.scheme.warn_once(kept.reason, f"{self.name} keeps the code that it began with ({was}): {kept}")
            code = first if was == "eager" else later.never(first)
        else:
            code = later.exchanged(first, was, lambda: self._better(way), self.scheme.workers, self.recorder)
        if was == "eager":
            traced.note(code, self.gm, self.graph_kwargs)
        return code

    def _better(self, way: _Way) -> None:
        """In a thread that nobody waits for.

        Raises:
            Kept: there is no better code.
        """
        self.history.clear()
        self.killed.clear()
        made, _, result = self._walk(way)
        self.data = None
        if not made:
            raise Kept(_reason(result), result.detail)

    def _serialized(self, spec: FxGraphSpec, data: bytes, way: _Way) -> tuple[Any, JobResult]:
        """The mode `serialize`: through payload and reply, but in this process. For debugging."""
        from sandbox.inductor import compile as child_side

        package = str((self.folders or {}).get("aoti", ""))
        value = child_side.run(data, spec.config_overrides, spec.kernel_threads, aoti_folder=package)
        result = JobResult(job_id=spec.job_id, status=Status.OK, leaks=LeakReport(job_id=spec.job_id))
        return way.load(value, spec.job_id), result

    def _in_process(self, reason: str) -> Any:
        self.recorder.graph("in_process")
        self.recorder.reason(reason)
        if reason != "mode_normal":
            self.scheme.warn_once(reason, f"{self.name} is compiled in this process: {reason}")
        return compat.compile_in_process(
            self.gm, self.example_inputs, self.inputs_to_check, self.graph_kwargs, self.region
        )

    def _eager(self, result: JobResult | None = None) -> Any:
        """The graph itself. ``result``: why it is not compiled; None where its forward pass was not, either."""
        if aoti.wanted() and result is not None:
            # There is nothing to run in its place: whoever makes a package wants files.
            self.recorder.graph("raised")
            raise self._exception(result)
        if eager.mixes(self.gm, self.graph_kwargs, uncompiled=True):
            self.recorder.graph("raised")
            status = result.status.value if result is not None else "eager"
            raise CompileFailed(
                status,
                f"{self.name} recomputes random numbers on a GPU, its forward graph was compiled, and uncompiled it "
                "would draw others and give wrong gradients; set torch._inductor.config.fallback_random = True or "
                f"quarantine the forward graph too ({result.detail if result is not None else ''})",
                result.job_id if result is not None else "",
            )
        self.recorder.graph("eager")
        eager.note(self.graph_kwargs)
        return eager.eager_class()(self.gm)

    def _no_child(self, status: Status, detail: str, job_id: str = "") -> JobResult:
        job_id = job_id or new_job_id()
        return JobResult(job_id=job_id, status=status, detail=detail, leaks=LeakReport(job_id=job_id))

    def _exception(self, result: JobResult) -> BaseException:
        if result.status is Status.COMPILE_ERROR and result.failure is not None:
            error = failures.rebuild_exception(result.failure)
            error.add_note(f"raised in the sandboxed child of {result.job_id}")
            return error
        # In the message, not a note: of an exception that a backend raises Dynamo shows no notes.
        again = f" (to run it again: sandbox replay {result.capsule})" if result.capsule else ""
        error = CompileFailed(result.status.value, result.detail + again, result.job_id)
        if result.stderr_tail:
            words = "\n".join(printable(line) for line in result.stderr_tail[-4000:].splitlines())
            error.add_note(f"the child's last words:\n{words}")
        return error


def starved(policy: Policy, result: JobResult) -> bool:
    """Whether a job ran out of memory where less was free than the policy allows: that says nothing of its graph."""
    return result.status is Status.MEMORY_LIMIT and result.usage.memory_granted_bytes < policy.limits.memory_bytes


def _reason(result: JobResult) -> str:
    """The short word under which an in-process compile is counted."""
    if result.status is Status.UNSERIALIZABLE:
        # In a child the class of the exception comes first.
        detail = result.detail.removeprefix("UnserializableError: ")
        return f"unserializable: {detail.partition(':')[0].strip()[:60]}"
    return result.status.value


def _target(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """What the graph is compiled for: `cpu`, or `cuda:CAPABILITY` of the first tensor on a GPU."""
    made = (node.meta.get("val") for node in gm.graph.nodes)
    for value in (*example_inputs, *made):
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            if torch.version.hip:
                return f"hip:{torch.cuda.get_device_properties(value.device).gcnArchName.partition(':')[0]}"
            major, minor = torch.cuda.get_device_capability(value.device)
            return f"cuda:{major}{minor}"
    return "cpu"


def cache_folders() -> dict[str, Path]:
    """The user's cache folders now, by kind of artifact."""
    inductor, debug = Path(compat.runtime_cache_dir()), Path(payload.debug_root())
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    triton = os.environ.get("TRITON_CACHE_DIR")
    return {
        "inductor": inductor,
        "triton": Path(triton) if triton else inductor / "triton" / str(device),
        "debug": debug,
    }


__all__ = ["MODES", "WITH_CHILDREN", "Mode", "Scheme", "check_mode"]

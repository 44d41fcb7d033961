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
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from pydantic import ValidationError

from sandbox import fallback
from sandbox.errors import (
    CompileFailed,
    JobError,
    PolicyError,
    QuarantineError,
    UnserializableError,
)
from sandbox.executor import Sandbox
from sandbox.gpus import Gpus
from sandbox.inductor import (
    aoti,
    cached,
    compat,
    deferred,
    devices,
    eager,
    identity,
    kernels,
    logs,
    payload,
    registrations,
    reply,
    traced,
)
from sandbox.inductor.inflight import Flights
from sandbox.inductor.later import Kept, Later
from sandbox.inductor.walk import Walk, Way, exception_of, no_child, reason_of, told_of
from sandbox.inductor.workers import Workers
from sandbox.jobs import FxGraphSpec, Job, Scalar, digest, new_job_id
from sandbox.policy import Policy, Step
from sandbox.quarantine import Entry, Quarantine
from sandbox.quarantine_files import keep_of, store_of
from sandbox.results import JobResult, LeakReport, Status

log = logging.getLogger("sandbox")

Mode = Literal["normal", "serialize", "subprocess", "async", "progressive"]
MODES: Final[tuple[str, ...]] = get_args(Mode)
#: Those that start children.
WITH_CHILDREN: Final = ("subprocess", "async", "progressive")
#: Those in which graphs run before they are compiled, or well compiled.
DEFERRED: Final = ("async", "progressive")
#: Why a child without a GPU gives up, as of `walk.reason_of`.
NEEDS_GPU: Final = "unserializable: needs_gpu"
#: Different warnings of one process, a count at most.
MAX_WARNED: Final = 500
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
            if reason in self._warned or len(self._warned) >= MAX_WARNED:
                return  # the words may be a child's
            self._warned.add(reason)
        log.warning(message)


_OPEN: weakref.WeakSet[Scheme] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the sandboxes are closed: no thread may be loading a graph while the interpreter ends."""
    for scheme in list(_OPEN):
        scheme.close()


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
        self.walk = Walk(scheme.policy, scheme.sandbox, scheme.flights, scheme.quarantine, self.name)
        self.data: bytes | None = None  # the payload; the same for each child
        self.same: tuple[str, str] | None = None  # what another thread's graph must have to be the same
        if (key := cached.key_of(gm)) is not None:
            self.same = key, payload.taken_for_granted(example_inputs)
        self.needs_gpu = False  # a child has said so
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
    def device(self) -> torch.device | None:
        """The GPU that it is compiled for, or None."""
        return _device(self.gm, self.example_inputs)

    @functools.cached_property
    def target(self) -> str:
        """What it is compiled for."""
        return _target(self.device)

    def _cache_folders(self) -> dict[str, Path]:
        return cache_folders(None if self.device is None else self.device.index)

    def _waited_for(self) -> Any:
        """The modes `subprocess` and `serialize`."""
        if not aoti.wanted():
            return self._down(self._way(self._load))
        with aoti.staging() as staged:
            self.folders = {**self._cache_folders(), "aoti": staged}
            return self._down(self._way(functools.partial(self._package, staged=staged)))

    def _down(self, way: Way) -> Any:
        if (entry := self.scheme.quarantine.get(way.key)) is not None:
            return self._quarantined(entry)
        output, step, result = self._walk(way)
        if output is None:
            return self._ends(step, result)
        self.recorder.graph("in_process" if self.scheme.mode == "serialize" else "in_child")
        if self.scheme.mode == "serialize":
            self.recorder.reason("mode_serialize")
        return output

    def _way(self, load: Callable[[Any, str], Any], overrides: Mapping[str, Scalar] | None = None, **rest: Any) -> Way:
        facts = identity.made_for(self.policy, self.target)
        if overrides:
            # Other settings, another chance; in the policy's own table, so that all of it is one fact.
            facts["settings"] = ", ".join(f"{name} = {value}" for name, value in sorted(overrides.items()))[:500]
        key = identity.quarantine_key(self.gm, self.example_inputs, facts)
        return Way(load, key, facts, overrides or {}, **rest)

    def _walk(self, way: Way) -> tuple[Any, Step, JobResult]:
        """Returns what ``way`` made of the reply, or None and the ladder's last step, and how the last child ended."""
        return self.walk.down(way, functools.partial(self._attempt, way=way), self._shared(way))

    def _shared(self, way: Way) -> str | None:
        """What two compiles must have in common to share their children: all that a job is made of."""
        if self.same is None or self.scheme.mode == "serialize":
            return None
        return repr((self.same, self.folders or self._cache_folders(), way.overrides, way.nice, way.waited_for))

    def _ends(self, step: Step, result: JobResult) -> Any:
        """What the ladder says when no child has made it."""
        self.recorder.fallback(step)
        if step == "in_process":
            return self._in_process(reason_of(result))
        if step == "eager":
            return self._eager(result)
        self.recorder.graph("raised")
        raise exception_of(result)

    def _quarantined(self, entry: Entry) -> Any:
        """A graph that has killed a child gets no second one."""
        step = fallback.decide_quarantined(self.policy, entry.status)
        self.recorder.fallback("quarantined")
        self.recorder.fallback(step)
        detail = told_of(entry, self.name)
        self.scheme.warn_once(entry.digest, f"{detail}; next: {step}")
        if step == "eager":
            return self._eager(no_child(entry.status, detail, entry.job_id))
        self.recorder.graph("raised")
        raise CompileFailed(entry.status.value, detail, entry.job_id)

    def _attempt(self, step: fallback.ChildStep, *, way: Way) -> tuple[Any, JobResult]:
        """One child. Returns what ``way`` makes of its reply, or None, and how the child ended."""
        if self.needs_gpu and not self.policy.gpu:
            raise UnserializableError("needs_gpu", "a child has said so, and the policy says gpu = false")
        overrides = {**way.overrides, **(self.policy.reduced if step == "reduced" else {})}
        measured = self.needs_gpu or compat.measures(overrides)
        output, result = self._child(step, way, overrides, on_gpu=self.policy.gpu and measured)
        if reason_of(result) == NEEDS_GPU and not self.needs_gpu:
            self.needs_gpu = True
            if self.policy.gpu:
                output, result = self._child(step, way, overrides, on_gpu=True)
        return output, result

    def _child(
        self, step: fallback.ChildStep, way: Way, overrides: dict[str, Scalar], *, on_gpu: bool
    ) -> tuple[Any, JobResult]:
        target, gpus = self.target, self._gpus(on_gpu)
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
            gpu=self.policy.gpu and target != "cpu" and gpus is None,
            gpus=gpus,
            # Each takes memory of its own, which may be what there was too little of.
            kernel_threads=1 if step == "reduced" else sandbox.kernel_threads(target),
            compile_id=self.compile_id[:64] or None,
            environment=sandbox.environment(),
            config_overrides=overrides,
            nice=way.nice,
        )
        try:
            job = Job(spec, data)
        except JobError as error:
            raise UnserializableError("payload_too_large", str(error)) from None
        if self.scheme.mode == "serialize":
            return self._serialized(spec, data, way)
        also = ", on the GPU" if spec.gpu else ""
        output, result = self.walk.child(job, way, step, lambda: self.folders or self._cache_folders(), also)
        if result.status is Status.UNSERIALIZABLE:
            self.scheme.refused.note(self.gm, result.detail)
        return output, result

    def _gpus(self, on_gpu: bool) -> Gpus | None:
        """What a child without a GPU is told of those here; None if it needs to know of none, or gets them."""
        if self.device is None or on_gpu:
            return None
        if torch.version.hip:
            if self.policy.gpu:
                return None
            raise UnserializableError("gpu_not_granted", f"a graph for {self.target}, and the policy says gpu = false")
        try:
            return devices.here().model_copy(update={"current": self.device.index or 0})
        except (RuntimeError, ValidationError) as error:
            raise UnserializableError("gpu_facts", f"{type(error).__name__}: {error}") from error

    def _encoded(self) -> bytes:
        """The payload. Made once: whoever compiles may change the graph later."""
        try:
            if self.data is None:
                self.data = payload.encode(
                    self.gm, self.example_inputs, self.inputs_to_check, self.graph_kwargs, self.region
                )
            return self.data
        except (UnserializableError, TimeoutError):  # a deadline of the caller's, by a signal
            raise
        except Exception as error:
            # Settings, contexts and graphs of other people: what surprises us must not stop their compile.
            raise UnserializableError("not_encodable", f"{type(error).__name__}: {error}") from error

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
        if self.walk.told and (dropped := logs.replay_logs(value, job_id)):
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
        self.folders = self._cache_folders()
        kept: Kept | None = None
        try:
            with deferred.keeping_strides(self.gm):
                self._encoded()
        except UnserializableError as error:
            kept = Kept(reason_of(no_child(Status.UNSERIALIZABLE, str(error))), str(error))
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
        return self._exchanged(first, "eager") if step == "eager" and not self.walk.killed else first

    def _exchanged(self, first: Any, was: str, kept: Kept | None = None) -> Any:
        """``first``, and better code later, unless there is a reason why not."""
        later = Later(self.name, self.gm, self.example_inputs, self.inputs_to_check, self.graph_kwargs, self.region)

        folders = self.folders = self.folders or self._cache_folders()

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

    def _better(self, way: Way) -> None:
        """In a thread that nobody waits for.

        Raises:
            Kept: there is no better code.
        """
        made, _, result = self._walk(way)
        self.data = None
        if not made:
            raise Kept(reason_of(result), result.detail)

    def _serialized(self, spec: FxGraphSpec, data: bytes, way: Way) -> tuple[Any, JobResult]:
        """The mode `serialize`: through payload and reply, but in this process. For debugging."""
        from sandbox.inductor import compile as child_side

        package = str((self.folders or {}).get("aoti", ""))
        # One kernel after the other: the service never forks.
        value = child_side.run(data, spec.config_overrides, 1, aoti_folder=package)
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
            raise exception_of(result)
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


def _device(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> torch.device | None:
    """That of the first tensor on a GPU."""
    made = (node.meta.get("val") for node in gm.graph.nodes)
    for value in (*example_inputs, *made):
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            return value.device
    return None


def _target(device: torch.device | None) -> str:
    """`cpu`, `cuda:CAPABILITY`, or `hip:ARCH`."""
    if device is None:
        return "cpu"
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


def cache_folders(device: int | None = None) -> dict[str, Path]:
    """The user's cache folders now, by kind of artifact. ``device``: the number of the GPU that it is for; None: of the
    current one."""
    inductor, debug = Path(compat.runtime_cache_dir()), Path(payload.debug_root())
    if device is None:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    triton = os.environ.get("TRITON_CACHE_DIR")
    return {
        "inductor": inductor,
        "triton": Path(triton) if triton else inductor / "triton" / str(device),
        "debug": debug,
    }


__all__ = ["MODES", "WITH_CHILDREN", "Mode", "Scheme", "check_mode"]

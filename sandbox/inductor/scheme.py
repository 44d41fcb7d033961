"""How one graph is compiled: in a child, and down the policy's ladder if that fails.

graph ─▶ payload ─▶ job ─▶ child ─▶ reply ─▶ artifacts in the cache ─▶ loaded
            │         ▲        │
            │         └─ retry, reduced ◀─ fallback.decide ─▶ in_process │ eager │ raise
            └─ UnserializableError ────────────┘
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
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
from sandbox.executor import Sandbox, usable_cores
from sandbox.inductor import cached, compat, eager, failures, identity, logs, payload, reply
from sandbox.jobs import FxGraphSpec, Job, Scalar, digest, new_job_id
from sandbox.policy import Policy, Step
from sandbox.quarantine import Entry, Quarantine
from sandbox.quarantine_files import keep_of, store_of
from sandbox.results import KILLERS, JobResult, LeakReport, Status, printable

log = logging.getLogger("sandbox")

Mode = Literal["normal", "serialize", "subprocess"]
MODES: Final[tuple[str, ...]] = get_args(Mode)
#: Those that start children.
WITH_CHILDREN: Final = ("subprocess",)
#: Kernels built side by side in one job when the policy says 0, a count at most.
MAX_KERNEL_THREADS = 8


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
        self.closed = False
        self._warned: set[str] = set()
        self._warned_lock = threading.Lock()
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
        """End the forkserver and cancel what runs."""
        self.closed = True
        self.sandbox.close()

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

    def run(self) -> Any:
        if eager.mixes(self.gm, self.graph_kwargs, uncompiled=False):
            return self._eager()
        if self.scheme.mode == "normal":
            return self._in_process("mode_normal")
        facts = identity.made_for(self.policy, _target(self.gm, self.example_inputs))
        key = identity.quarantine_key(self.gm, self.example_inputs, facts)
        if (entry := self.scheme.quarantine.get(key)) is not None:
            return self._quarantined(entry)
        output, step, result = self._walk(key, facts)
        if output is None:
            return self._ends(step, result)
        self.recorder.graph("in_child" if self.scheme.mode == "subprocess" else "in_process")
        if self.scheme.mode == "serialize":
            self.recorder.reason("mode_serialize")
        return output

    def _walk(self, key: str, facts: dict[str, str]) -> tuple[Any, Step, JobResult]:
        """Children, down the ladder. Returns the loaded artifact, or None and the ladder's last step, and how the last
        child ended."""
        step: fallback.ChildStep = "first"
        while True:
            try:
                output, result = self._attempt(step)
            except UnserializableError as error:
                output, result = None, self._no_child(Status.UNSERIALIZABLE, str(error))
            if output is not None:
                return output, "raise", result
            if result.status in KILLERS and not starved(self.policy, result):
                self.killed.append(result)
            self.history.append(fallback.Attempt(step=step, status=result.status, no_memory=result.no_memory))
            history = tuple(self.history)
            log.log(
                logging.INFO if result.status is Status.COMPILE_ERROR else logging.WARNING,
                "%s: %s: %s: %s%s",
                self.name,
                result.job_id,
                result.detail,
                fallback.explain(self.policy, result.status, history),
                f"; crash capsule: {result.capsule}" if result.capsule else "",
                extra={"job_id": result.job_id},
            )
            following = fallback.decide(self.policy, result.status, history)
            self.recorder.fallback(following)
            if following == "in_process" or following == "eager" or following == "raise":
                self._remember(key, facts)
                return None, following, result
            step = following

    def _ends(self, step: Step, result: JobResult) -> Any:
        """What the ladder says when no child has made it."""
        if step == "in_process":
            return self._in_process(_reason(result))
        if step == "eager":
            return self._eager(result)
        self.recorder.graph("raised")
        raise self._exception(result)

    def _remember(self, key: str, facts: dict[str, str]) -> None:
        """No child made it: if one was killed, no later compile of this graph tries again."""
        if self.killed:
            last = self.killed[-1]
            self.scheme.quarantine.add(
                key, last.status, last.job_id, self.name, last.detail, facts, kills=len(self.killed)
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

    def _attempt(self, step: fallback.ChildStep) -> tuple[Any, JobResult]:
        """One child. Returns the loaded artifact, or None, and how the child ended."""
        target = _target(self.gm, self.example_inputs)
        if target != "cpu" and not self.policy.gpu:
            raise UnserializableError("gpu_not_granted", f"a graph for {target}, and the policy says gpu = false")
        overrides: dict[str, Scalar] = dict(self.policy.reduced) if step == "reduced" else {}
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
            kernel_threads=self.policy.kernel_threads or min(usable_cores(), MAX_KERNEL_THREADS),
            compile_id=self.compile_id[:64] or None,
            environment=sandbox.environment(),
            config_overrides=overrides,
        )
        try:
            job = Job(spec, data)
        except JobError as error:
            raise UnserializableError("payload_too_large", str(error)) from None
        if self.scheme.mode == "serialize":
            return self._serialized(spec, data)
        try:
            future = sandbox.submit(job, name=self.name, step=step, cache=cache_folders())
        except (SandboxError, OSError, RuntimeError) as error:
            # It was closed meanwhile, or has no descriptor or thread left: the ladder knows what to do.
            self.recorder.swallowed(error)
            detail = f"the job cannot be submitted: {type(error).__name__}: {error}"
            return None, self._no_child(Status.SANDBOX_ERROR, detail, spec.job_id)
        result = self._wait(future, spec.job_id)
        if not result.ok:
            if result.leaks.leaks:
                log.warning("%s left behind: %s", result.job_id, result.leaks.counts())
            return None, result
        try:
            return self._load(result.value, result.job_id), result
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

    def _wait(self, future: Future[JobResult], job_id: str) -> JobResult:
        try:
            return future.result()
        except BaseException:
            # Ctrl-C in the caller: the child must not go on.
            self.scheme.sandbox.cancel(job_id, "the caller was interrupted")
            raise

    def _load(self, value: Any, job_id: str) -> Any:
        output = reply.decode_graph(
            value, self.gm, self.example_inputs, self.inputs_to_check, self.graph_kwargs, self.region
        )
        try:
            cached.remember(output.cache_key, value["kernels"])
        except OSError as error:
            self.recorder.swallowed(error)  # a later process takes Inductor's own, slower way
        if dropped := logs.replay_logs(value, job_id):
            log.info("%s: %d records for loggers that are not torch's were dropped", job_id, dropped)
        return output

    def _serialized(self, spec: FxGraphSpec, data: bytes) -> tuple[Any, JobResult]:
        """The mode `serialize`: through payload and reply, but in this process. For debugging."""
        from sandbox.inductor import compile as child_side

        value = child_side.run(data, spec.config_overrides, spec.kernel_threads)
        result = JobResult(job_id=spec.job_id, status=Status.OK, leaks=LeakReport(job_id=spec.job_id))
        return self._load(value, spec.job_id), result

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

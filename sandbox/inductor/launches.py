"""Direct launches of Triton kernels: what `kernel[grid](...)` has to compile is compiled in a child.

    launch ─▶ in Triton's cache? ─no─▶ job ─▶ child ─▶ entry of the cache ─▶ Triton finds it
                                        ▲        │
                                        └─ retry ◀─ fallback.decide ─▶ in_process │ raise

Triton looks into its cache before it compiles. So what stands before its compile makes the entry by a child, and leaves
the rest, loading included, to Triton. A kernel has no uncompiled form: where a ladder says `eager`, this raises.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sandbox import fallback
from sandbox.errors import CompileFailed, JobError, UnserializableError, WireError
from sandbox.inductor import compat, identity, launch
from sandbox.inductor.scheme import WITH_CHILDREN, Scheme
from sandbox.inductor.walk import Walk, Way, exception_of, reason_of, told_of
from sandbox.jobs import Job, TritonLaunchSpec, digest, new_job_id
from sandbox.quarantine import Entry
from sandbox.results import JobResult

#: The private names of Triton that this needs; without one of them launches compile in this process.
NEEDED: Final = ("JITFunction", "ASTSource", "triton_cache", "triton_environment", "triton_knobs")


def calls(compile_launch: Callable[..., Any], current: Callable[[], Scheme | None]) -> Callable[..., Any]:
    """What stands in for Triton's `JITFunction._do_compile`, given here.

    Args:
        current: the scheme of the calling thread; None if there is none.
    """

    @functools.wraps(compile_launch)
    def call(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: Any
    ) -> Any:
        scheme = current()
        if scheme is not None and scheme.mode in WITH_CHILDREN and scheme.policy.triton_launches:
            _, _, target, backend, *_ = self.device_caches[device]
            _Launch(scheme, self, signature, constexprs, attrs, options, target, backend).run()
        return compile_launch(self, key, signature, device, constexprs, options, attrs, warmup)

    return call


class _Launch:
    """One kernel with one signature."""

    def __init__(
        self, scheme: Scheme, kernel: Any, signature: Mapping[str, Any], constants: Any, attrs: Any, options: Any,
        target: Any, backend: Any,
    ) -> None:  # fmt: skip
        self.scheme = scheme
        self.policy = scheme.policy
        self.recorder = scheme.sandbox.recorder
        self.kernel = kernel
        self.signature = signature
        self.constants = constants or {}
        self.attrs = attrs
        self.options = options
        self.target = target
        self.variables = compat.triton_environment()
        self.source = compat.ASTSource(kernel, signature, constants, attrs)
        key = compat.triton_cache.get_cache_key(self.source, backend, options, env_vars=self.variables)
        self.hash = hashlib.sha256(key.encode()).hexdigest()
        self.name = f"kernel {kernel.fn.__module__}.{kernel.fn.__qualname__}"
        self.walk = Walk(scheme.policy, scheme.sandbox, scheme.flights, scheme.quarantine, self.name)

    def run(self) -> None:
        """See to it that the entry is there, or that this process may make it.

        Raises:
            the exception that Triton would have raised, for `compile_error`.
            CompileFailed: the ladder ends with `raise` or `eager` for another status.
        """
        if self._there():
            return
        facts = identity.made_for(self.policy, f"{self.target.backend}:{self.target.arch}")
        parts = ["triton launch", self.hash, *(f"{name}: {fact}" for name, fact in sorted(facts.items()))]
        way = Way(self._load, hashlib.sha256("\n".join(parts).encode()).hexdigest(), facts, {})
        if (entry := self.scheme.quarantine.get(way.key)) is not None:
            self._quarantined(entry)
        shared = f"{self.hash} {compat.triton_knobs.cache.dir}"
        made, step, result = self.walk.down(way, functools.partial(self._attempt, way=way), shared)
        if made:
            self.recorder.launch("in_child")
            return
        self.recorder.fallback(step)
        if step == "in_process":
            reason = reason_of(result)
            self.recorder.launch("in_process")
            self.recorder.reason(reason)
            self.scheme.warn_once(f"launch: {reason}", f"{self.name} is compiled in this process: {result.detail}")
            return
        self.recorder.launch("raised")
        raise exception_of(result)

    def _there(self) -> bool:
        if compat.triton_knobs.compilation.always_compile:
            return False
        name = f"{self.source.name[:150]}.json"
        group = compat.triton_cache.get_cache_manager(self.hash).get_group(name)
        return name in (group or {})

    def _attempt(self, step: fallback.ChildStep, *, way: Way) -> tuple[Any, JobResult]:
        if (why := _not_ours()) is not None:
            raise UnserializableError("triton_hooks", why)
        data = launch.encode(
            self.kernel, self.signature, self.constants, self.attrs, self.options, self.target, self.variables
        )
        sandbox = self.scheme.sandbox
        spec = TritonLaunchSpec(
            job_id=new_job_id(),
            payload_sha256=digest(data),
            payload_bytes=len(data),
            limits=self.policy.limits,
            confinement=self.policy.confinement,
            target=f"{self.target.backend}:{self.target.arch}",
            environment=sandbox.environment(),
        )
        try:
            job = Job(spec, data)
        except JobError as error:
            raise UnserializableError("payload_too_large", str(error)) from None
        return self.walk.child(job, way, step, {"triton": Path(compat.triton_knobs.cache.dir)})

    def _load(self, value: Any, job_id: str) -> bool:
        """Whether Triton will find what came back."""
        if not self._there():
            raise WireError(f"{job_id} has made no entry {self.hash} of Triton's cache")
        return True

    def _quarantined(self, entry: Entry) -> None:
        step = fallback.decide_quarantined(self.policy, entry.status)
        self.recorder.fallback("quarantined")
        self.recorder.fallback(step)
        self.recorder.launch("raised")
        raise CompileFailed(entry.status.value, told_of(entry, self.name), entry.job_id)


def _not_ours() -> str | None:
    """Why what Triton would do here cannot be done elsewhere: somebody has put code of his own into it."""
    knobs = compat.triton_knobs
    for group, name in (
        ("runtime", "add_stages_inspection_hook"), ("runtime", "jit_cache_hook"), ("cache", "manager_class"),
    ):  # fmt: skip
        if getattr(getattr(knobs, group), name, None) is not None:
            return f"triton.knobs.{group}.{name} is set"
    for name in ("override", "dump_ir", "always_compile"):
        if getattr(knobs.compilation, name, False):
            return f"triton.knobs.compilation.{name} is set"
    return None


__all__ = ["NEEDED", "calls"]

"""Direct launches of Triton kernels: what `kernel[grid](...)` has to compile is compiled in a child.

    launch ─▶ in Triton's cache? ─no─▶ job ─▶ child ─▶ entry of the cache ─▶ Triton finds it
                                        ▲        │
                                        └─ retry ◀─ fallback.decide ─▶ in_process │ raise

Triton looks into its cache before it compiles. So what stands before its compile makes the entry by a child, and leaves
the rest, loading included, to Triton. A kernel has no uncompiled form: where a ladder says `eager`, this raises.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sandbox import fallback
from sandbox.artifacts import MAX_JSON
from sandbox.errors import CompileFailed, JobError, UnserializableError, WireError
from sandbox.inductor import compat, identity, launch
from sandbox.inductor.scheme import WITH_CHILDREN, Scheme
from sandbox.inductor.walk import Walk, Way, exception_of, reason_of, told_of
from sandbox.jobs import Job, TritonLaunchSpec, digest, new_job_id
from sandbox.policy import Ladder, Policy
from sandbox.quarantine import Entry
from sandbox.results import JobResult

#: The private names of Triton that this needs; without one of them launches compile in this process.
NEEDED: Final = ("compile_launch", "ASTSource", "CompiledKernel", "triton_cache", "triton_environment", "triton_knobs")
#: Backends that a job may compile for.
BACKENDS: Final = ("cuda", "hip")
#: Facts of a kernel by which Triton and its launcher allocate, each a count or bytes.
_COUNTS: Final = ("shared", "num_warps", "num_ctas", "tmem_size", "global_scratch_size", "profile_scratch_size")
#: Dimensions of a tensor descriptor, at most: CUDA has no more, and the launcher's C code has room for as many.
_DIMENSIONS: Final = 5


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


def compiles(compile_source: Callable[..., Any], current: Callable[[], Scheme | None]) -> Callable[..., Any]:
    """What stands in for `triton.compile`, given here: by it Inductor's kernels are compiled in the service, where it
    tunes them by running them, or has found that one takes too many registers. A graph's own kernels are in the cache.

    Args:
        current: the scheme of the calling thread; None if there is none.
    """

    @functools.wraps(compile_source)
    def call(src: Any, target: Any = None, options: Any = None, *args: Any, **kwargs: Any) -> Any:
        scheme = current()
        if (
            scheme is not None
            and scheme.mode in WITH_CHILDREN
            and scheme.policy.triton_launches
            and type(src) is compat.ASTSource  # not what is written in another language than Triton
            and not (args or kwargs)
        ):
            target, backend, chosen = compat.triton_options(src, target, options)
            _Launch(scheme, src.fn, src.signature, src.constants, src.attrs, chosen, target, backend).run()
        return compile_source(src, target, options, *args, **kwargs)

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
        self.backend = backend
        self.variables = dict(compat.triton_environment())
        self.source = compat.ASTSource(kernel, signature, constants, attrs)
        key = compat.triton_cache.get_cache_key(self.source, backend, options, env_vars=self.variables)
        if (hook := compat.triton_knobs.runtime.add_stages_inspection_hook) is not None:
            key += hook()[0]  # as Triton does; what is there under that key was made with it
        self.hash = hashlib.sha256(key.encode()).hexdigest()
        self.folder = Path(compat.triton_knobs.cache.dir)
        # As Triton calls the folder and the files of an entry (3.6, 3.7).
        self.entry = base64.b32encode(bytes.fromhex(self.hash)).decode().rstrip("=")
        self.file = self.source.name[:150]
        self.name = f"kernel {kernel.fn.__module__}.{kernel.fn.__qualname__}"
        self.walk = Walk(_without_reduced(scheme.policy), scheme.sandbox, scheme.flights, scheme.quarantine, self.name)

    def run(self) -> None:
        """See to it that the entry is there, or that this process may make it.

        Raises:
            the exception that Triton would have raised, for `compile_error`.
            CompileFailed: the ladder ends with `raise` or `eager` for another status.
        """
        if not compat.triton_knobs.compilation.always_compile and self._there() is None:
            return
        facts = identity.made_for(self.policy, f"{self.target.backend}:{self.target.arch}")
        way = Way(self._load, identity.key_of(f"triton launch {self.hash}", facts), facts, {})
        if (entry := self.scheme.quarantine.get(way.key)) is not None:
            self._quarantined(entry)
        made, step, result = self.walk.down(
            way, functools.partial(self._attempt, way=way), f"{self.hash} {self.folder}"
        )
        if made:
            self.recorder.launch("in_child")
            return
        self._forget()  # what is there is of no use, and Triton would read it
        if step == "in_process":
            self.recorder.fallback(step)
            reason = reason_of(result)
            self.recorder.launch("in_process")
            self.recorder.reason(reason)
            self.scheme.warn_once(f"launch: {reason}", f"{self.name} is compiled in this process: {result.detail}")
            return
        self._raised()
        raise exception_of(result, bare=True)

    def _there(self) -> str | None:
        """None if Triton will find a whole entry; else what is wrong with what is there."""
        name = self.file
        try:
            group = compat.triton_cache.get_cache_manager(self.hash).get_group(f"{name}.json") or {}
            missing = {f"{name}.json", f"{name}.{self.backend.binary_ext}"} - group.keys()
            return f"it lacks {sorted(missing)}" if missing else self._unsound(Path(group[f"{name}.json"]))
        except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    def _unsound(self, path: Path) -> str | None:
        """What Triton should not be given to read: it builds a class of the facts, and allocates by them."""
        if path.stat().st_size > MAX_JSON:
            return f"the facts of the kernel take more than {MAX_JSON} bytes"
        facts = json.loads(path.read_bytes())
        target = {"backend": self.target.backend, "arch": self.target.arch, "warp_size": self.target.warp_size}
        if facts.get("hash") != self.hash or facts.get("target") != target:
            return "it is of another kernel or target"
        for name in _COUNTS:
            value = facts.get(name, 0)
            if type(value) is not int or not 0 <= value < 1 << 31:
                return f"{name} is {value!r:.50}"
        for described in facts.get("tensordesc_meta") or ():
            if described is not None and len(described.get("block_size", ())) > _DIMENSIONS:
                return "a tensor descriptor has too many dimensions"
        return None

    def _forget(self) -> None:
        for name in (f"__grp__{self.file}.json", f"{self.file}.json"):
            with contextlib.suppress(OSError):  # a folder that is not ours to write: Triton cannot write there either
                (self.folder / self.entry / name).unlink(missing_ok=True)

    def _attempt(self, step: fallback.ChildStep, *, way: Way) -> tuple[Any, JobResult]:
        if (why := _not_ours()) is not None:
            raise UnserializableError("triton_hooks", why)
        if self.target.backend not in BACKENDS:
            raise UnserializableError("target", f"a kernel for {self.target.backend}; known are {', '.join(BACKENDS)}")
        try:
            job = self._job()
        except (UnserializableError, TimeoutError):  # a deadline is the caller's
            raise
        except JobError as error:
            raise UnserializableError("payload_too_large", str(error)) from None
        except Exception as error:
            # Kernels, options and attributes of other people: what surprises us must not stop their launch.
            raise UnserializableError("not_encodable", f"{type(error).__name__}: {error}") from error
        return self.walk.child(job, way, step, lambda: {"triton": self.folder})

    def _job(self) -> Job:
        data = launch.encode(
            self.kernel, self.signature, self.constants, self.attrs, self.options, self.target, self.variables
        )
        spec = TritonLaunchSpec(
            job_id=new_job_id(),
            payload_sha256=digest(data),
            payload_bytes=len(data),
            limits=self.policy.limits,
            confinement=self.policy.confinement,
            target=f"{self.target.backend}:{self.target.arch}",
            environment=self.scheme.sandbox.environment(),
            entry=self.entry,
            function=self.file,
        )
        return Job(spec, data)

    def _load(self, value: Any, job_id: str) -> bool:
        """Whether Triton will find what came back, and can read it."""
        if isinstance(value, dict) and isinstance(name := value.get("name"), str) and name != self.hash:
            # What it is made of, or which ptxas there is, looks otherwise from there.
            raise UnserializableError("name", f"in a child the kernel's entry is {name[:80]!r}, not {self.hash!r}")
        if (why := self._there()) is None:
            manager = compat.triton_cache.get_cache_manager(self.hash)
            try:
                compat.CompiledKernel(self.source, manager.get_group(f"{self.file}.json"), self.hash)
                return True
            except Exception as error:  # noqa: BLE001 - a child's words are read here, by Triton
                why = f"{type(error).__name__}: {error}"
        self._forget()
        raise WireError(f"{job_id} has made no entry {self.hash} that Triton can use: {why}")

    def _raised(self) -> None:
        """Whatever the ladder calls its end."""
        self.recorder.fallback("raise")
        self.recorder.launch("raised")

    def _quarantined(self, entry: Entry) -> None:
        self.recorder.fallback("quarantined")
        self._raised()
        raise CompileFailed(entry.status.value, told_of(entry, self.name), entry.job_id)


def _without_reduced(policy: Policy) -> Policy:
    """``policy``, whose ladders leave out the step `reduced`: a kernel has no settings of Inductor's to reduce."""
    steps = {name: tuple(step for step in ladder if step != "reduced") for name, ladder in policy.ladder}
    return policy.model_copy(update={"ladder": Ladder(**steps)})


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


__all__ = ["NEEDED", "calls", "compiles"]

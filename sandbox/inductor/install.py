"""Hooking into Inductor: `install()`, `uninstall()`, and which scheme compiles the current graph."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sandbox.errors import SandboxError
from sandbox.inductor import cached, compat, launches, traced
from sandbox.inductor.deferred import KEPT, Saving, deferred_class, keeps_more
from sandbox.inductor.eager import eager_class
from sandbox.inductor.scheme import DEFERRED, WITH_CHILDREN, Mode, Scheme, check_mode
from sandbox.inductor.totals import total
from sandbox.policy import Policy, load
from sandbox.report import Stats

_lock = threading.RLock()
_installed: Scheme | None = None
_schemes: dict[tuple[str, str, int], Scheme] = {}
#: Keys of the schemes that a backend made: graphs that it compiled may still have a backward pass to compile.
_of_backends: set[tuple[str, str, int]] = set()
_original: compat.Compile | None = None
_original_save: Any = None
_original_aot: Any = None
_original_launch: Any = None
#: The scheme of the graph being compiled, when a backend names one; it wins over the installed one.
_current: contextvars.ContextVar[Scheme | None] = contextvars.ContextVar("sandbox_scheme", default=None)


def install(policy: str | Path | Policy = "default", mode: str = "subprocess") -> None:
    """Compile every Inductor graph of this process in the sandbox from now on.

    The forkserver starts in the background: its warm-up overlaps with what the caller does next. A second call
    replaces policy and mode. With another policy the forkserver of the first ends, and its counts go, unless a
    backend made it; with the same policy it stays, for when the mode changes back.

    Args:
        policy: a shipped name, a path to a TOML file, or a Policy.
        mode: `subprocess` (each graph in a child), `async` (the same, but the graph runs uncompiled until it is
            compiled, and nobody waits), `progressive` (compiled in a hurry, then better, for which nobody waits),
            `serialize` (through the same bytes, in this process; for debugging) or `normal` (in this process;
            counted).

    Raises:
        PolicyError: policy or mode are wrong; nothing has changed then.
        IncompatibleTorchError: this PyTorch lacks a private name that we build on.
        ForkserverError: the temporary folder cannot be written.
    """
    global _installed
    scheme = scheme_for(policy, mode)
    with _lock:
        replaced, _installed = _installed, scheme
        if replaced is None or replaced.policy == scheme.policy or _key(replaced) in _of_backends:
            return
        _schemes.pop(_key(replaced), None)
    replaced.close()


def uninstall() -> None:
    """Undo :func:`install` and end every forkserver of this process. Graphs compiled so far stay usable."""
    global _installed, _original, _original_save, _original_aot, _original_launch
    with _lock:
        schemes = list(_schemes.values())
        _schemes.clear()
        _of_backends.clear()
        _installed = None
        if _original is not None:
            compat.replace_compile(_original)
            compat.replace_save_graph(_original_save)
            compat.wrap_aot_autograd(lambda _: _original_aot)
            if _original_launch is not None:
                launch, source, scaling = _original_launch
                compat.restore_scaling(scaling)
                compat.wrap_launches(lambda _: launch)
                compat.wrap_triton_compile(lambda _: source)
                _original_launch = None
            cached.remove()
            compat.enable_worker_pool()
            _original = None
    for scheme in schemes:
        scheme.close()
    with _lock:
        if _original is None:
            cached.remove()  # a graph that was being loaded meanwhile has put it back


def wait(seconds: float | None = None) -> bool:
    """Block until no compile is under way that nobody waits for: those of the modes `async` and `progressive`.

    Args:
        seconds: at most that long; None: as long as it takes, which the limits of the policy bound.

    Returns:
        Whether none is. Each graph has its better code then, or `sandbox.stats().kept` says why not.
    """
    end = None if seconds is None else time.monotonic() + seconds
    with _lock:
        schemes = [scheme for key, scheme in _schemes.items() if key[2] == os.getpid()]
    return all([s.workers.wait(None if end is None else max(0.0, end - time.monotonic())) for s in schemes])


def stats() -> Stats:
    """Counts of this process: of the installed sandbox and of those that the backend `sandbox` made; else zero."""
    with _lock:
        schemes = [scheme for key, scheme in _schemes.items() if key[2] == os.getpid()]
    return total([scheme.sandbox.stats() for scheme in schemes])


def installed() -> Scheme | None:
    """The scheme of :func:`install`, or None."""
    return _installed


def _key(scheme: Scheme) -> tuple[str, str, int]:
    return scheme.policy.model_dump_json(), scheme.mode, os.getpid()


def scheme_for(policy: str | Path | Policy, mode: str, *, backend: bool = False) -> Scheme:
    """The scheme of this policy and mode, started if it is new; hooks Inductor if that is not done yet.

    Args:
        policy, mode: as of :func:`install`.
        backend: a backend asks, so a later :func:`install` must not close it.

    Raises:
        PolicyError, IncompatibleTorchError: as :func:`install`.
    """
    loaded, checked = load(policy), check_mode(mode)
    key = (loaded.model_dump_json(), checked, os.getpid())
    with _lock:
        scheme = _schemes.get(key)
        if scheme is None or scheme.closed:
            compat.check()
            scheme = _schemes[key] = Scheme(loaded, checked)
            if backend:
                _of_backends.add(key)
            if checked in WITH_CHILDREN:
                scheme.sandbox.start()
        _hook()
        return scheme


def compile_inner(scheme: Scheme, gm: Any, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's `compile_fx_inner` under ``scheme``: forward graphs at once, backward graphs when they come."""
    with using(scheme):
        return compat.compile_fx_inner(gm, example_inputs, **kwargs)


@contextlib.contextmanager
def using(scheme: Scheme) -> Iterator[None]:
    """Inside the block, ``scheme`` has the word for what this thread compiles or loads from a cache."""
    token = _current.set(scheme)
    try:
        yield
    finally:
        _current.reset(token)


def _in_children() -> bool:
    scheme = _current.get() or _installed
    return scheme is not None and scheme.mode in WITH_CHILDREN


def _key_for(gm: Any, key: str) -> str:
    """Under which key this thread looks for a graph. Code of other modes does as well, where there is some."""
    scheme = _current.get() or _installed
    if scheme is None or scheme.mode not in DEFERRED or not keeps_more(gm) or cached.holds(key):
        return key
    return key + KEPT


def _hook() -> None:
    global _original, _original_save, _original_aot, _original_launch
    if _original is None:
        _original = compat.replace_compile(_dispatch)
        _original_save = compat.replace_save_graph(_save_graph)
        _original_aot = compat.wrap_aot_autograd(traced.calls)
        if all(map(compat.has, launches.NEEDED)):
            _original_launch = (
                compat.wrap_launches(lambda original: launches.calls(original, _scheme_of_launches)),
                compat.wrap_triton_compile(lambda original: launches.compiles(original, _scheme_of_kernels)),
                compat.guard_scaling(_not_scaled),
            )
        cached.install(_in_children, _key_for)
        compat.set_ptxas_path()  # before anybody asks Triton for its version; children do the same
        # A process that only uses the backend keeps Inductor's own workers for its other compiles.
        compat.disable_worker_pool(_in_children)


def _dispatch(
    gm: Any,
    example_inputs: Sequence[Any],
    inputs_to_check: Sequence[int],
    compile_region_name: str | None = None,
    **graph_kwargs: Any,
) -> Any:
    """What stands in for Inductor's `fx_codegen_and_compile`."""
    scheme = _usable(_current.get() or _installed)
    if scheme is None:
        return compat.compile_in_process(gm, example_inputs, inputs_to_check, graph_kwargs, compile_region_name)
    try:
        return scheme.compile(gm, example_inputs, inputs_to_check, graph_kwargs, compile_region_name)
    finally:
        with _lock:
            if _original is None:
                cached.remove()  # uninstall() came in between, and loading has put it back


def _usable(scheme: Scheme | None) -> Scheme | None:
    """``scheme``, or another in its place: the host has forked and needs a forkserver of its own, or it was closed
    before the backward pass of what it compiled was needed."""
    if scheme is not None and (scheme.sandbox.foreign or scheme.closed):
        return scheme_for(scheme.policy, scheme.mode)
    return scheme


def _scheme_of_launches() -> Scheme | None:
    """Kernels are compiled as :func:`install` says; those of a process that only uses the backend are left alone."""
    return _usable(_installed)


def _scheme_of_kernels() -> Scheme | None:
    """Those of a graph may also be of a scheme that only this thread has; after its end they are nobody's."""
    scheme = _current.get() or _installed
    return None if scheme is None or scheme.closed or scheme.sandbox.foreign else scheme


def _not_scaled(error: Exception) -> None:
    scheme = _current.get() or _installed
    if scheme is not None:
        scheme.sandbox.recorder.swallowed(error)
        scheme.warn_once("scaling", f"a kernel keeps the blocks that it was compiled with: {error}")


def _save_graph(key: str, compiled_graph: Any, *args: Any, **kwargs: Any) -> Any:
    """What stands in for `FxGraphCache._save_graph`: uncompiled graphs have nothing to save, deferred ones not yet."""
    if isinstance(compiled_graph, eager_class()):
        return None
    if _original_save is None:
        raise SandboxError("the cache hook was called after uninstall()")
    later = isinstance(compiled_graph, deferred_class())
    key = key.removesuffix(KEPT) + (KEPT if later and compiled_graph.more else "")
    compiled_graph._fx_graph_cache_key = key  # by which AOTAutograd's cache will ask for it
    if later:
        compiled_graph.save_with(Saving(_original_save, key, *args, **kwargs))
        return None
    return _original_save(key, compiled_graph, *args, **kwargs)


#: For `compile_fx(inner_compile=...)`.
def inner_of(scheme: Scheme) -> Any:
    """`compile_inner` bound to ``scheme``."""
    return functools.partial(compile_inner, scheme)


__all__ = ["Mode", "install", "installed", "scheme_for", "stats", "uninstall", "wait"]

"""The child's side of an `fx_graph` job: payload in, reply (plain data) out."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from sandbox.errors import UnserializableError
from sandbox.inductor import aoti, compat, counting, helpers, kernels, logs, payload, registrations, reply
from sandbox.inductor.constants import put as put_constants

#: Inductor's caches on other machines: a child has no network, and asking for it would end the job.
_REMOTE: Final = (
    "fx_graph_remote_cache",
    "autotune_remote_cache",
    "bundled_autotune_remote_cache",
    "remote_gemm_autotune_cache",
)


#: C++ compilers side by side, a count at most: each takes some 300 MB.
MAX_COMPILERS: Final = 8


def run(
    data: bytes,
    config_overrides: dict[str, Any],
    kernel_threads: int,
    debug_root: str | None = None,
    aoti_folder: str = "",
    on_gpu: bool = False,
) -> dict[str, Any]:
    """Compile the graph of a payload and return the reply: plain builtin data only.

    The caller has set `TORCHINDUCTOR_CACHE_DIR` and `TRITON_CACHE_DIR` to a folder of this job alone.

    Args:
        data: what :func:`sandbox.inductor.payload.encode` made.
        config_overrides: Inductor settings by dotted name that replace the caller's.
        kernel_threads: kernels of this graph that are built side by side, a count; of those in C++ at most 8.
        debug_root: folder for the files of TORCH_COMPILE_DEBUG. None: the one that the payload names.
        aoti_folder: folder for the files of an AOTInductor package, an absolute path.
        on_gpu: whether this process may use a GPU itself, which forks of it could not.

    Raises:
        UnserializableError: when the graph cannot be rebuilt here or its result cannot be sent.
        BaseException: whatever the compiler raises.
    """
    # What the template remembers of it went with its environment.
    getattr(compat.set_ptxas_path, "cache_clear", lambda: None)()
    compat.set_ptxas_path()  # before Triton is asked for its version: else the parent looks for other names
    request = payload.decode(data)
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(private_folders())
        stack.enter_context(request.contexts())
        stack.enter_context(threads(min(kernel_threads, MAX_COMPILERS)))
        stack.enter_context(helpers.side_by_side(1 if on_gpu else kernel_threads))
        stack.enter_context(compat.inductor_config.patch(settings(config_overrides, kernel_threads)))
        compat.find_libdevice()
        # Inductor's own default lies below the current folder.
        root = debug_root or request.settings["debug_root"]
        stack.enter_context(compat.dynamo_config.patch(debug_dir_root=root))
        stack.enter_context(compat.inductor_config.patch({"trace.debug_dir": None}))
        captured = stack.enter_context(logs.captured(request.settings["loggers"]))
        loaded = request.load()
        stack.enter_context(compat.tracing(loaded.tracing))
        if loaded.compile_id is not None:
            stack.enter_context(compat.compile_context(_compile_context(loaded.compile_id)))
        if loaded.choices is not None:
            stack.enter_context(compat.V.set_choices_handler(loaded.choices))
        stack.enter_context(compat.disable_current_modes())
        stack.enter_context(compat.DebugContext())
        if put_constants(loaded.gm):
            loaded.fake_mode.allow_non_fake_inputs = True  # as inputs of what puts them there
        constants, symbols = reply.constants_of(loaded.gm), reply.symbols_of(loaded.fake_mode.shape_env)
        counted = counting.Counts()
        built = stack.enter_context(kernels.recorded())
        if loaded.aot:
            stack.enter_context(aoti.building(aoti_folder))
        if loaded.aot or loaded.graph_kwargs.get("cpp_wrapper"):
            stack.enter_context(_plain_headers())
        try:
            code = compat.compile_in_process(
                loaded.gm, loaded.example_inputs, loaded.inputs_to_check, loaded.graph_kwargs, loaded.region
            )
        except Exception as error:
            if (unknown := registrations.missing_op(error)) is not None:
                raise unknown from error
            raise
        value = _encoded(code, loaded, constants, symbols, aoti_folder)
        value["kernels"] = dict(built)
        value["counts"] = counted.deltas()
    value["logs"] = captured.told_of(root, request.settings["debug_root"])
    value["logs_left_out"] = captured.left_out
    value["warnings"] = logs.warnings_data(caught)
    return value


def _encoded(
    code: Any, loaded: payload.Loaded, constants: dict[int, str], symbols: frozenset[str], aoti_folder: str
) -> dict[str, Any]:
    if loaded.aot:
        return {"aoti": aoti.encode(code, aoti_folder, constants)}
    if not isinstance(code, compat.CompiledFxGraph):
        raise UnserializableError("output_code", f"{type(code).__name__} is loaded in-process only")
    return reply.encode_graph(code, loaded.fake_mode.shape_env, constants, symbols)


def settings(overrides: dict[str, Any], kernel_threads: int) -> dict[str, Any]:
    """Inductor's settings in a child: the caller's ``overrides`` that it knows, and how kernels are built."""
    known = compat.inductor_config._config
    unknown = sorted(name for name in overrides if name not in known)
    if unknown:
        warnings.warn(f"no Inductor setting is called {', '.join(unknown)}; left out", stacklevel=2)
    settings = {name: value for name, value in overrides.items() if name in known}
    settings.update({name: False for name in _REMOTE if name in known})
    # Our own threads build C++ kernels; Inductor's worker processes are never started (see threads).
    settings["compile_threads"] = max(1, kernel_threads)
    settings["worker_start_method"] = "fork"
    return settings


def _compile_context(compile_id: str) -> Any:
    try:
        return compat.CompileContext(compat.CompileId.from_string(compile_id))
    except (AttributeError, ValueError):
        return compat.CompileContext(None)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """A pool of ``count`` threads for C++ kernels, ended afterwards; and no worker process for Triton's."""
    pool: list[ThreadPoolExecutor] = []
    lock = threading.Lock()

    def make() -> ThreadPoolExecutor:
        with lock:
            if not pool:
                pool.append(ThreadPoolExecutor(max(1, count), thread_name_prefix="kernel"))
            return pool[0]

    with (
        compat.replaced(compat.AsyncCompile, "pool", staticmethod(make)),
        compat.replaced(compat.AsyncCompile, "use_process_pool", classmethod(lambda cls: False)),
        compat.replaced(compat.async_compile, "maybe_warm_pool", lambda: None),
    ):
        try:
            yield
        finally:
            for made in pool:
                made.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def private_folders() -> Iterator[None]:
    """Headers that Inductor precompiles anew go below the job's cache folder; those it has are kept in use."""
    folder = os.path.join(compat.runtime_cache_dir(), "precompiled_headers")
    with (
        compat.replaced(compat.codecache, "_HEADER_DIR", folder),
        compat.replaced(compat.codecache, "_HEADER_LOCK_DIR", os.path.join(folder, "locks")),
    ):
        yield


@contextlib.contextmanager
def _plain_headers() -> Iterator[None]:
    """Headers are not precompiled: a C++ wrapper has one file for each, so that would take longer than it saves."""

    def plain(header: str, command: str, **options: Any) -> str:
        folder = os.path.join(compat.runtime_cache_dir(), "plain_headers")
        found: str = compat.codecache.write(f"#include <{header}>\n", "h", specified_dir=folder)[1]
        return found

    with compat.replaced(compat.codecache, "_precompile_header", plain):
        yield

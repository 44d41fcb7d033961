"""The child's side of an `fx_graph` job: payload in, reply (plain data) out; and the template's warm-up."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError
from sandbox.inductor import compat, counting, devices, kernels, logs, payload, reply

#: Inductor's caches on other machines: a child has no network, and asking for it would end the job.
_REMOTE: Final = (
    "fx_graph_remote_cache",
    "autotune_remote_cache",
    "bundled_autotune_remote_cache",
    "remote_gemm_autotune_cache",
)


def run(
    data: bytes, config_overrides: dict[str, Any], kernel_threads: int, debug_root: str | None = None
) -> dict[str, Any]:
    """Compile the graph of a payload and return the reply: plain builtin data only.

    The caller has set `TORCHINDUCTOR_CACHE_DIR` and `TRITON_CACHE_DIR` to a folder of this job alone.

    Args:
        data: what :func:`sandbox.inductor.payload.encode` made.
        config_overrides: Inductor settings by dotted name that replace the caller's.
        kernel_threads: C++ kernels of this graph that are built side by side, a count.
        debug_root: folder for the files of TORCH_COMPILE_DEBUG. None: the one that the payload names.

    Raises:
        UnserializableError: when the graph cannot be rebuilt here or its result cannot be sent.
        BaseException: whatever the compiler raises.
    """
    request = payload.decode(data)
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(_private_folders())
        stack.enter_context(request.contexts())
        stack.enter_context(_threads(kernel_threads))
        stack.enter_context(compat.inductor_config.patch(_settings(config_overrides, kernel_threads)))
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
        constants, symbols = reply.constants_of(loaded.gm), reply.symbols_of(loaded.fake_mode.shape_env)
        counted = counting.Counts()
        built = stack.enter_context(kernels.recorded())
        code = compat.compile_in_process(
            loaded.gm, loaded.example_inputs, loaded.inputs_to_check, loaded.graph_kwargs, loaded.region
        )
        if not isinstance(code, compat.CompiledFxGraph):
            raise UnserializableError("output_code", f"{type(code).__name__} is loaded in-process only")
        value = reply.encode_graph(code, loaded.fake_mode.shape_env, constants, symbols)
        value["kernels"] = dict(built)
        value["counts"] = counted.deltas()
    value["logs"] = captured.told_of(root, request.settings["debug_root"])
    value["logs_left_out"] = captured.left_out
    value["warnings"] = logs.warnings_data(caught)
    return value


def _settings(overrides: dict[str, Any], kernel_threads: int) -> dict[str, Any]:
    known = compat.inductor_config._config
    unknown = sorted(name for name in overrides if name not in known)
    if unknown:
        warnings.warn(f"no Inductor setting is called {', '.join(unknown)}; left out", stacklevel=2)
    settings = {name: value for name, value in overrides.items() if name in known}
    settings.update({name: False for name in _REMOTE if name in known})
    # Our own threads build C++ kernels; Inductor's worker processes are never started (see _threads).
    settings["compile_threads"] = max(1, kernel_threads)
    settings["worker_start_method"] = "fork"
    return settings


def _compile_context(compile_id: str) -> Any:
    try:
        return compat.CompileContext(compat.CompileId.from_string(compile_id))
    except (AttributeError, ValueError):
        return compat.CompileContext(None)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
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
def _private_folders() -> Iterator[None]:
    """Headers that Inductor precompiles anew go below the job's cache folder; those it has are kept in use."""
    folder = os.path.join(compat.runtime_cache_dir(), "precompiled_headers")
    with (
        compat.replaced(compat.codecache, "_HEADER_DIR", folder),
        compat.replaced(compat.codecache, "_HEADER_LOCK_DIR", os.path.join(folder, "locks")),
    ):
        yield


# Warm-up ------------------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Compile a few small graphs, so that no child repeats the probes, the header and the lazy imports.

    For the template, before its first fork: afterwards this process has the one thread that it had before.
    The folder of the precompiled header stays while this process lives; everything else is removed.
    """
    _no_progress_thread()
    before = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    folder = tempfile.mkdtemp(prefix="sandbox-warm-up-")
    try:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
        os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
        if devices.present():
            # Lowering asks CUDA here and there, even with the GPUs hidden, and what has asked cannot be forked.
            try:
                _warm_compiler()
            except Exception as error:  # noqa: BLE001 - graphs for the GPU need no C++ compiler
                warnings.warn(f"the C++ compiler could not be warmed up: {error}", stacklevel=2)
        else:
            for data in _samples():
                run(data, {}, min(len(os.sched_getaffinity(0)), 8))
        counting.reset()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_kernels()
        for entry in os.listdir(os.path.join(folder, "inductor")) if os.path.isdir(folder + "/inductor") else []:
            if entry != "precompiled_headers":
                shutil.rmtree(os.path.join(folder, "inductor", entry), ignore_errors=True)


def _no_progress_thread() -> None:
    """tqdm starts a thread that watches progress bars, which a process that forks must not have."""
    tqdm = getattr(torch.hub, "tqdm", None)
    if tqdm is not None and hasattr(tqdm, "monitor_interval"):
        tqdm.monitor_interval = 0


def _forget_kernels() -> None:
    """Kernels of the warm-up are gone from disk; no child may find them in memory."""
    compat.codecache.PyCodeCache.cache_clear()
    for name in ("CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache"):
        getattr(compat.codecache, name).cache_clear()


def _warm_compiler() -> None:
    """Build one C++ kernel: the vector-ISA probe and the precompiled header are what costs most by far."""
    source = """
        #include <torch/csrc/inductor/cpp_prefix.h>
        extern "C" void kernel(const float* in_ptr0, float* out_ptr0) { out_ptr0[0] = in_ptr0[0]; }
    """
    with _private_folders(), _threads(1), compat.inductor_config.patch(_settings({}, 1)):
        os.makedirs(compat.runtime_cache_dir(), exist_ok=True)
        built = compat.AsyncCompile().cpp_pybinding(["const float*", "float*"], textwrap.dedent(source))
        getattr(built, "result", lambda: None)()


def _samples() -> list[bytes]:
    """Payloads of small graphs that between them touch what most graphs touch.

    Traced with fake tensors only: Dynamo and the autograd engine would start CUDA, and threads, in the template.
    """

    def inference(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.softmax(torch.nn.functional.gelu(x @ y), -1).sum(0) + torch.arange(8),)

    def backward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, mean, rstd = torch.ops.aten.native_layer_norm(torch.ops.aten.addmm(x, x, w), [8], None, None, 1e-5)
        mask = torch.ops.aten.bernoulli.p(torch.ops.aten.empty_like(out), 0.5)
        grad, _, _ = torch.ops.aten.native_layer_norm_backward(
            out * mask, x, [8], mean, rstd, None, None, [True, False, False]
        )
        return grad.t() @ x, grad.sum(0, keepdim=True), torch.ops.aten.convolution_backward(
            x.view(1, 1, 8, 8), x.view(1, 1, 8, 8), w.view(1, 1, 8, 8)[..., :1, :1], None, [1, 1], [0, 0], [1, 1],
            False, [0, 0], 1, [True, False, False],
        )[0]  # fmt: skip

    def shapes(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat([x, x * 2]).relu().mean(0),)

    square = torch.ones(8, 8)
    return [
        _sample(inference, (square, square)),
        _sample(backward, (square, square), is_backward=True),
        _sample(shapes, (torch.ones(6, 8),), dynamic=True),
    ]


def _sample(
    function: Callable[..., Any],
    arguments: tuple[torch.Tensor, ...],
    *,
    is_backward: bool = False,
    dynamic: bool = False,
) -> bytes:
    table = compat.decompositions()
    gm = compat.make_fx(function, table, "symbolic" if dynamic else "fake")(*arguments)
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    kwargs = {
        "cudagraphs": compat.BoxedBool(False),
        "static_input_idxs": (),
        "is_backward": is_backward,
        "is_inference": not is_backward,
        "graph_id": 0,
        "cpp_wrapper": False,
        "fx_wrapper": False,
        "boxed_forward_device_index": None,
        "layout_opt": None,
        "extern_node_serializer": None,
    }
    with compat.tracing(compat.TracingContext(compat.detect_fake_mode(inputs))):
        return payload.encode(gm, inputs, [], kwargs)

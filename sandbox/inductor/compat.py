"""Every private PyTorch name that this package builds on, in one table, checked at start.

Other modules say ``compat.GraphLowering`` and so on: the name is looked up in :data:`NAMES` on first use, so that
importing this module imports no torch. :func:`check` looks all of them up and says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
import operator
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from sandbox.errors import CompileFailed, IncompatibleTorchError

#: The PyTorch releases that the table was checked against.
VERSIONS: Final = ("2.11", "2.13")


@dataclass(frozen=True)
class Private:
    """Where a private name lives: `module:attribute.path`, and the releases in which it was seen."""

    where: str
    seen: tuple[str, ...] = VERSIONS


#: Our word for it -> where it lives. A name seen in one release only is optional, and its users ask :func:`has`.
NAMES: Final[Mapping[str, Private]] = {
    # The hook point and what stands behind it.
    "compile_fx": Private("torch._inductor.compile_fx:fx_codegen_and_compile"),
    "compile_fx_inner": Private("torch._inductor.compile_fx:compile_fx_inner"),
    "whole_compile_fx": Private("torch._inductor.compile_fx:compile_fx"),
    "LazyGraphModule": Private("torch.fx._lazy_graph_module:_LazyGraphModule"),
    "function_modes": Private("torch._C:_len_torch_function_stack"),
    "AotAutograd": Private("torch._dynamo.backends.common:AotAutograd"),
    "InProcessFxCompile": Private("torch._inductor.compile_fx:_InProcessFxCompile"),
    # How a fake tensor is described and made again.
    "UnpickleState": Private("torch.fx._graph_pickler:_UnpickleState"),
    "TensorPickleData": Private("torch.fx._graph_pickler:_TensorPickleData"),
    "MetaTensorDescriber": Private("torch._subclasses.meta_utils:MetaTensorDescriber"),
    "is_opaque_type": Private("torch._library.opaque_object:is_opaque_type"),
    "maybe_to_fake_obj": Private("torch._library.fake_class_registry:maybe_to_fake_obj"),
    "is_opaque_value_type": Private("torch._library.opaque_object:is_opaque_value_type"),
    "ValueRangesSLoc": Private("torch.fx.experimental.symbolic_shapes:ValueRangesSLoc"),
    "SLoc": Private("torch._guards:SLoc"),
    # Contexts of a compile.
    "TracingContext": Private("torch._guards:TracingContext"),
    "tracing": Private("torch._guards:tracing"),
    "CompileContext": Private("torch._guards:CompileContext"),
    "CompileId": Private("torch._guards:CompileId"),
    "compile_context": Private("torch._guards:compile_context"),
    "detect_fake_mode": Private("torch._guards:detect_fake_mode"),
    "compile_lock": Private("torch._dynamo.convert_frame:compile_lock"),
    "V": Private("torch._inductor.virtualized:V"),
    "DebugContext": Private("torch._inductor.debug:DebugContext"),
    # Graphs, fake tensors, symbols.
    "FakeTensor": Private("torch._subclasses.fake_tensor:FakeTensor"),
    "FakeTensorMode": Private("torch._subclasses.fake_tensor:FakeTensorMode"),
    "FakeScriptObject": Private("torch._library.fake_class_registry:FakeScriptObject"),
    "OperatorBase": Private("torch._ops:OperatorBase"),
    "OpOverload": Private("torch._ops:OpOverload"),
    "OpOverloadPacket": Private("torch._ops:OpOverloadPacket"),
    "OpNamespace": Private("torch._ops:_OpNamespace"),
    "HigherOrderOperator": Private("torch._ops:HigherOrderOperator"),
    "higher_order_ops": Private("torch._ops:_higher_order_ops"),
    "ShapeEnv": Private("torch.fx.experimental.symbolic_shapes:ShapeEnv"),
    "SYMPY_INTERP": Private("torch.fx.experimental.symbolic_shapes:SYMPY_INTERP"),
    "PythonPrinter": Private("torch.utils._sympy.printers:PythonPrinter"),
    "SymNode": Private("torch.fx.experimental.sym_node:SymNode"),
    "sympy_functions": Private("torch.utils._sympy.functions"),
    "shape_env_from_inputs": Private("torch._inductor.utils:shape_env_from_inputs"),
    "disable_current_modes": Private("torch.utils._python_dispatch:_disable_current_modes"),
    "OrderedSet": Private("torch.utils._ordered_set:OrderedSet"),
    # User Triton kernels.
    "kernel_side_table": Private("torch._higher_order_ops.triton_kernel_wrap:kernel_side_table"),
    "triton_kernel_wrapper_functional": Private(
        "torch._higher_order_ops.triton_kernel_wrap:triton_kernel_wrapper_functional"
    ),
    "triton_kernel_wrapper_mutation": Private(
        "torch._higher_order_ops.triton_kernel_wrap:triton_kernel_wrapper_mutation"
    ),
    # The compiled graph.
    "CompiledAOTI": Private("torch._inductor.output_code:CompiledAOTI"),
    "LINKER_SCRIPT": Private("torch._inductor.codecache:_LINKER_SCRIPT"),
    "AotWeights": Private("torch.export.pt2_archive._package_weights:Weights"),
    "AotWeight": Private("torch.export.pt2_archive._package_weights:TensorProperties"),
    "OutputCode": Private("torch._inductor.output_code:OutputCode"),
    "CompiledFxGraph": Private("torch._inductor.output_code:CompiledFxGraph"),
    "CompiledFxGraphConstantsWithGm": Private("torch._inductor.output_code:CompiledFxGraphConstantsWithGm"),
    "GraphLowering": Private("torch._inductor.graph:GraphLowering"),
    "CachedMetricsDeltas": Private("torch._inductor.metrics:CachedMetricsDeltas"),
    "metrics": Private("torch._inductor.metrics"),
    "counters": Private("torch._dynamo.utils:counters"),
    "PlaceholderInfo": Private("torch._inductor.cudagraph_utils:PlaceholderInfo"),
    "CudagraphCachedInfo": Private("torch._inductor.cudagraph_utils:CudagraphCachedInfo"),
    "GraphPartitionMap": Private("torch._inductor.utils:GraphPartitionMap"),
    "BoxedBool": Private("torch._inductor.utils:BoxedBool"),
    # Settings that travel.
    "inductor_config": Private("torch._inductor.config"),
    "functorch_config": Private("torch._functorch.config"),
    "dynamo_config": Private("torch._dynamo.config"),
    "lowering": Private("torch._inductor.lowering"),
    "device_codegens": Private("torch._inductor.codegen.common:device_codegens"),
    "post_grad_patterns": Private("torch._inductor.fx_passes.post_grad:pass_patterns"),
    "custom_op_definitions": Private("torch._library.custom_ops:OPDEFS"),
    "c10d": Private("torch.distributed.distributed_c10d"),
    "FakeStore": Private("torch.testing._internal.distributed.fake_pg:FakeStore"),
    "make_quantized": Private("torch:_make_per_tensor_quantized_tensor"),
    "make_quantized_channels": Private("torch:_make_per_channel_quantized_tensor"),
    "allow_flags": Private("torch.backends:__allow_nonbracketed_mutation"),
    "list_mode_options": Private("torch._inductor:list_mode_options"),
    "in_bad_fork": Private("torch.cuda:_is_in_bad_fork"),
    "mkldnn_layout": Private("torch:_mkldnn"),
    "make_fx": Private("torch.fx.experimental.proxy_tensor:make_fx"),
    "decompositions": Private("torch._inductor.decomposition:select_decomp_table"),
    # Kernels: where they are built and loaded.
    "async_compile": Private("torch._inductor.async_compile"),
    "AsyncCompile": Private("torch._inductor.async_compile:AsyncCompile"),
    "load_triton_kernel": Private("torch._inductor.async_compile:_load_triton_kernel_from_source"),
    "codecache": Private("torch._inductor.codecache"),
    "CppCodeCache": Private("torch._inductor.codecache:CppCodeCache"),
    "vec_isas": Private("torch._inductor.cpu_vec_isa:supported_vec_isa_list"),
    "x86_flags": Private("torch._inductor.cpu_vec_isa:x86_isa_checker"),
    "FxGraphCache": Private("torch._inductor.codecache:FxGraphCache"),
    # Which ptxas: its version is part of the name of every kernel in Triton's cache, and asked for once.
    "set_ptxas_path": Private("torch._inductor.runtime.compile_tasks:_set_triton_ptxas_path"),
    # Direct launches of Triton kernels, in Triton 3.6 and 3.7: without these names they compile in this process.
    "JITFunction": Private("triton.runtime.jit:JITFunction", ("2.13",)),
    "compile_launch": Private("triton.runtime.jit:JITFunction._do_compile", ("2.13",)),
    "ASTSource": Private("triton.compiler:ASTSource", ("2.13",)),
    "CompiledKernel": Private("triton.compiler:CompiledKernel", ("2.13",)),
    "triton_cache": Private("triton.runtime.cache", ("2.13",)),
    "triton_environment": Private("triton._C.libtriton:get_cache_invalidating_env_vars", ("2.13",)),
    "triton_knobs": Private("triton.knobs", ("2.13",)),
    # A child without a GPU answers for one.
    "CudaInterface": Private("torch._dynamo.device_interface:CudaInterface"),
    "fake_tensor": Private("torch._subclasses.fake_tensor"),
    "triton_helpers": Private("torch._inductor.runtime.triton_helpers"),
    "CachingAutotuner": Private("torch._inductor.runtime.triton_heuristics:CachingAutotuner"),
    "triton_codegen": Private("torch._inductor.codegen.triton"),
    "TritonBenchmarkRequest": Private("torch._inductor.autotune_process:TritonBenchmarkRequest"),
    "runtime_cache_dir": Private("torch._inductor.runtime.runtime_utils:cache_dir"),
    "structured_trace": Private("torch._logging._internal:trace_log"),
}

_EXTRA_ATTRIBUTES: Final = (
    # Attributes that we replace or call and that no import above proves.
    "torch._inductor.codecache:CppCodeCache.load_async",
    "torch._inductor.codecache:CppCodeCache._load_library",
    "torch._inductor.codecache:write",
    "torch._inductor.codecache:code_hash",
    "torch._inductor.codecache:_precompile_header",
    "torch._inductor.codecache:_HEADER_DIR",
    "torch._inductor.codecache:_HEADER_LOCK_DIR",
    "torch._inductor.async_compile:AsyncCompile.use_process_pool",
    "torch._inductor.async_compile:AsyncCompile.pool",
    "torch._inductor.async_compile:AsyncCompile.triton",
    "torch._inductor.codecache:LambdaFuture",
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner._precompile_config",
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner._dynamic_scale_rblock",
    "torch._inductor.codegen.triton:async_compile",
    "torch._inductor.async_compile:maybe_warm_pool",
    "torch._inductor.codecache:FxGraphCache._save_graph",
    "torch._inductor.codecache:FxGraphCache.prepare_key",
    "torch._inductor.codecache:FxGraphCache._get_tmp_dir_for_key",
    "torch._inductor.codecache:CacheBase.get_system",
    "torch._dynamo.device_interface:_device_initialized",
    "torch.cuda:_cached_device_count",
    "torch._inductor.output_code:CompiledFxGraph.after_deserialization",
    "torch._inductor.output_code:CompiledFxGraph.prepare_for_serialization",
    "torch._inductor.graph:GraphLowering.save_output_code",
    "torch.fx.experimental.symbolic_shapes:ShapeEnv.evaluate_expr",
    "torch.fx.experimental.symbolic_shapes:ShapeEnv.evaluate_symexpr",
)

#: What a PyTorch that was built without `torch.distributed` lacks, and nobody asks for there.
_DISTRIBUTED: Final = ("c10d", "FakeStore")


def _look_up(where: str) -> Any:
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = _look_up(NAMES[name].where)
    except (ImportError, AttributeError) as error:
        raise IncompatibleTorchError(_complaint([f"{NAMES[name].where} ({error})"])) from None
    # Only what never moves is kept; the hook point is looked up anew each time.
    if name != "compile_fx":
        globals()[name] = found
    return found


def has(name: str) -> bool:
    """Whether this PyTorch has the private name that :data:`NAMES` calls ``name``."""
    try:
        _look_up(NAMES[name].where)
    except (ImportError, AttributeError):
        return False
    return True


def check() -> None:
    """Look up every private name in use.

    Raises:
        IncompatibleTorchError: naming each name that this PyTorch lacks, its version, and the versions known.
    """
    missing = []
    import torch.distributed

    left_out = () if torch.distributed.is_available() else _DISTRIBUTED
    places = [entry.where for name, entry in NAMES.items() if set(VERSIONS) <= set(entry.seen) and name not in left_out]
    for where in (*places, *_EXTRA_ATTRIBUTES):
        try:
            _look_up(where)
        except (ImportError, AttributeError) as error:
            missing.append(f"{where} ({error})")
    if missing:
        raise IncompatibleTorchError(_complaint(missing))


def _complaint(missing: list[str]) -> str:
    import torch

    return (
        f"PyTorch {torch.__version__} lacks private names that this package builds on (it was checked against "
        f"{' and '.join(VERSIONS)}): {'; '.join(missing)}"
    )


Compile = Callable[..., Any]


def replace_compile(replacement: Compile) -> Compile:
    """Put ``replacement`` where Inductor looks `fx_codegen_and_compile` up, and return what stood there.

    It is called as `(gm, example_inputs, inputs_to_check, compile_region_name=None, **graph_kwargs)`; releases
    before 2.12 may leave `compile_region_name` out.
    """
    module: Any = importlib.import_module("torch._inductor.compile_fx")
    before: Compile = module.fx_codegen_and_compile
    module.fx_codegen_and_compile = replacement
    return before


def replace_save_graph(replacement: Any) -> Any:
    """Put ``replacement`` where Inductor saves a compiled graph in its cache, and return what stood there.

    It is called as `(key, compiled_graph, example_inputs, local, remote_cache)`.
    """
    cache = importlib.import_module("torch._inductor.codecache").FxGraphCache
    before = cache._save_graph
    cache._save_graph = staticmethod(replacement)
    return before


def wrap_aot_autograd(wrap: Callable[[Compile], Compile]) -> Compile:
    """Put ``wrap(what stands there)`` where Dynamo's backends hand a program to AOTAutograd; return what stood there.

    It is called as `(self, gm, example_inputs, **kwargs)` and returns what Dynamo calls in the program's place.
    """
    backend = _look_up(NAMES["AotAutograd"].where)
    before: Compile = backend.__call__
    backend.__call__ = wrap(before)
    return before


def is_inductors_own(backend: Any) -> bool:
    """Whether an `AotAutograd` hands what it makes of an inference program to Inductor, and to nobody else on the way:
    not to a backend that changes the graph and asks Inductor then. Not with `freezing` either, by which parameters are
    taken out of the program. As `compile_fx` puts it together in 2.11 and 2.13."""
    compiler = getattr(getattr(backend, "kwargs", {}).get("inference_compiler"), "compiler_fn", None)
    function: Any = getattr(compiler, "func", None)
    if getattr(function, "__module__", "") != "torch._inductor.compile_fx":
        return False
    inner: Any = inspect.getclosurevars(function).nonlocals.get("inner_compile")
    while True:
        if isinstance(inner, functools.partial):
            inner = inner.func
        elif getattr(getattr(inner, "__code__", None), "co_filename", "") == contextlib.__file__:
            # By `config.patch`, a ContextDecorator, where there are settings for this compile alone.
            inner = inspect.getclosurevars(inner).nonlocals.get("func")
        else:
            break
    own = getattr(inner, "__module__", "") == "sandbox.inductor.install" and not hasattr(inner, "__wrapped__")
    return own or inner is _look_up(NAMES["compile_fx_inner"].where)


def wrap_launches(wrap: Callable[[Compile], Compile]) -> Compile:
    """Put ``wrap(what stands there)`` where Triton compiles what a launch needs, and return what stood there.

    It is called as `(self, key, signature, device, constexprs, options, attrs, warmup)`.
    """
    kernel = _look_up(NAMES["JITFunction"].where)
    before: Compile = kernel._do_compile
    kernel._do_compile = wrap(before)
    return before


def wrap_triton_compile(wrap: Callable[[Compile], Compile]) -> Compile:
    """Put ``wrap(what stands there)`` where `triton.compile` is looked up, and return what stood there. Launches do not
    look there. It is called as `(src, target=None, options=None)`."""
    module: Any = importlib.import_module("triton")
    before: Compile = module.compile
    module.compile = wrap(before)
    return before


def triton_options(source: Any, target: Any, options: Any) -> tuple[Any, Any, Any]:
    """Target, backend and options of a compile, as `triton.compile` finds them (3.6, 3.7)."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.driver import driver

    target = target or driver.active.get_current_target()
    backend = make_backend(target)
    return target, backend, backend.parse_options({**(options or {}), **source.parse_options()})


def make_fx(function: Compile, decompositions: Any, mode: str) -> Compile:
    """`torch.fx`'s tracer of tensor programs; ``mode`` is `fake` or `symbolic`."""
    traced: Compile = _look_up(NAMES["make_fx"].where)(function, decomposition_table=decompositions, tracing_mode=mode)
    return traced


def forget_device_count() -> None:
    """Have `torch.cuda.device_count` and Dynamo's table of device interfaces look anew."""
    for module, name, value in (
        ("torch.cuda", "_cached_device_count", None),
        ("torch._dynamo.device_interface", "_device_initialized", False),
        ("torch._dynamo.device_interface", "caching_worker_device_properties", {}),
        ("torch._dynamo.device_interface", "caching_worker_current_devices", {}),
    ):
        setattr(importlib.import_module(module), name, value)


def compile_in_process(
    gm: Any, example_inputs: Any, inputs_to_check: Any, graph_kwargs: dict[str, Any], region: str | None = None
) -> Any:
    """Inductor's own compile in this process, whatever stands at the hook point. Returns an OutputCode."""
    scheme = _look_up(NAMES["InProcessFxCompile"].where)()
    if hasattr(scheme, "compile_region_name"):
        scheme.compile_region_name = region
    return scheme.codegen_and_compile(gm, example_inputs, inputs_to_check, graph_kwargs)


def compile_configuration(kernel: Any, configuration: Any) -> None:
    """One of a kernel's, into Triton's cache. ``kernel``: a `CachingAutotuner`, which is left as it is."""
    kernel._precompile_config(configuration)


@contextmanager
def written_ahead() -> Iterator[None]:
    """Inside the block Inductor's code generator, and nobody else, takes it that there is somebody to compile a Triton
    kernel as soon as it is written: it calls `AsyncCompile.triton` then, and again when the graph is loaded."""
    generator = _look_up(NAMES["triton_codegen"].where).async_compile
    generator.use_process_pool = lambda: True
    try:
        yield
    finally:
        del generator.use_process_pool


def find_libdevice() -> None:
    """Have Triton use the libdevice that Inductor's settings name: part of the name of each kernel's entry."""
    find = getattr(importlib.import_module("torch._inductor.runtime.compile_tasks"), "_set_triton_libdevice_path", None)
    if find is not None:  # since 2.13
        find()


def guard_scaling(skipped: Callable[[Exception], None]) -> Compile:
    """Where a kernel takes too many registers, Inductor compiles another configuration when it loads it. It is not
    needed: one whose compile the sandbox has given up is told to ``skipped``. Returns what stood there."""
    tuner = _look_up(NAMES["CachingAutotuner"].where)
    before: Compile = tuner._dynamic_scale_rblock

    @functools.wraps(before)
    def scale(self: Any) -> None:
        try:
            before(self)
        except CompileFailed as error:
            skipped(error)

    tuner._dynamic_scale_rblock = scale
    return before


def restore_scaling(before: Compile) -> None:
    """Undo :func:`guard_scaling`."""
    _look_up(NAMES["CachingAutotuner"].where)._dynamic_scale_rblock = before


@contextmanager
def raw_stream() -> Iterator[None]:
    """Generated code for a GPU imports `torch._C._cuda_getCurrentRawStream`, which a PyTorch for the CPU lacks."""
    import torch

    name = "_cuda_getCurrentRawStream"
    lacking = not hasattr(torch._C, name)
    if lacking:
        setattr(torch._C, name, lambda device: 0)
    try:
        yield
    finally:
        if lacking:
            delattr(torch._C, name)


@contextmanager
def lent_device_guard() -> Iterator[None]:
    """Inside the block, tensors on `cuda` have the guard of those on the CPU, which does nothing. CUDA's own asks the
    driver, and a PyTorch for the CPU has none, without which some of Python's operators raise for FakeTensors. For all
    threads: not for a process that uses a GPU."""
    import torch

    library = ctypes.CDLL(os.path.join(torch.__path__[0], "lib", "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # 2.11, 2.13
    before = guards[1]
    guards[1] = guards[0]
    try:
        yield
    finally:
        guards[1] = before


@contextmanager
def triton_driver(driver: Any) -> Iterator[Callable[[], None]]:
    """Inside the block, ``driver`` is Triton's. Yields what makes it so again, if somebody has chosen another."""
    from triton.runtime.driver import driver as known

    before = known._active
    known.set_active(driver)
    try:
        yield lambda: known.set_active(driver)
    finally:
        known._active = before


#: Settings of Inductor's with which it runs kernels to choose the fastest while it compiles (2.11, 2.13).
_MEASURED: Final = (
    "max_autotune", "max_autotune_gemm", "benchmark_fusion", "benchmark_combo_kernel", "triton.multi_kernel",
)  # fmt: skip


def measures(overrides: Mapping[str, Any]) -> bool:
    """Whether Inductor, as it is set but for ``overrides``, runs kernels to choose the fastest while it compiles for a
    GPU."""
    config = _look_up(NAMES["inductor_config"].where)
    found = {name: operator.attrgetter(name)(config) for name in _MEASURED if name in config._config}
    return any({**found, **{name: value for name, value in overrides.items() if name in found}}.values())


def makes_packages() -> bool:
    """Whether compiled graphs are wanted as such, to be kept: a bundled cache, a precompile, `standalone_compile`."""
    functorch, dynamo = _look_up(NAMES["functorch_config"].where), _look_up(NAMES["dynamo_config"].where)
    return bool(
        getattr(functorch, "bundled_autograd_cache", False)
        or getattr(functorch, "force_non_lazy_backward_lowering", False)
        or getattr(dynamo, "caching_precompile", False)
    )


_pool_lock = threading.Lock()
_pool_before: list[tuple[Any, str, Any]] = []


def disable_worker_pool(when: Callable[[], bool] = lambda: True) -> None:
    """Keep Inductor from starting and from using its own worker processes, while ``when()``. Idempotent.

    Dynamo's backend starts them ahead, and whatever asks whether they are to be used does, too.
    """
    module: Any = importlib.import_module("torch._inductor.async_compile")
    with _pool_lock:
        if _pool_before:
            return
        warm, use = module.maybe_warm_pool, vars(module.AsyncCompile)["use_process_pool"]
        _pool_before[:] = [(module, "maybe_warm_pool", warm), (module.AsyncCompile, "use_process_pool", use)]
        module.maybe_warm_pool = lambda: None if when() else warm()
        module.AsyncCompile.use_process_pool = classmethod(lambda cls: not when() and use.__func__(cls))


def enable_worker_pool() -> None:
    """Undo :func:`disable_worker_pool`."""
    with _pool_lock:
        for owner, name, value in _pool_before:
            setattr(owner, name, value)
        _pool_before.clear()


def hints_of(shape_env: Any) -> dict[Any, Any]:
    """Symbol -> the value it had when traced. The attribute was renamed between 2.11 and 2.13."""
    for name in ("backed_var_to_val", "var_to_val"):
        if hasattr(shape_env, name):
            found: dict[Any, Any] = getattr(shape_env, name)
            return found
    raise IncompatibleTorchError(_complaint(["ShapeEnv.backed_var_to_val"]))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is ``value`` inside the block. For modules and classes, static and class methods included."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

"""The payload of an `fx_graph` job: a graph with everything that decides what Inductor makes of it.

Two pickles in one: settings (applied first, before any object of the graph is made) and the graph.
Real weights never travel: parameters reach a graph as fake inputs, and of the tracing context only plain facts go.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError
from sandbox.inductor import compat, groups, logs, pickling, registrations, sidetable

#: Settings that belong to this process (folders, pools) or that the child decides itself.
_CONFIG_LEFT: Final = frozenset(
    {
        "compile_threads", "worker_start_method", "quiesce_async_compile_pool", "cudagraph_policy",
        "trace.upload_tar", "trace.debug_dir", "aot_inductor.dump_aoti_minifier", "aot_inductor.repro_level",
        "fx_graph_cache", "fx_graph_remote_cache", "bundled_autograd_cache", "fx_compile_mode",
        # They have run by now: above the hook, in this process.
        "pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "custom_partitioner_fn",
    }
)  # fmt: skip
_FUNCTORCH_LEFT: Final = frozenset({"enable_autograd_cache", "enable_remote_autograd_cache"})
#: The few Dynamo settings that Inductor reads.
_DYNAMO_SENT: Final = ("suppress_errors", "use_lazy_graph_module", "dynamic_shapes")


@dataclass
class Request:
    """A payload taken apart in a child. Call :meth:`contexts`, then :meth:`load` inside them."""

    settings: dict[str, Any]
    graph: bytes

    @contextlib.contextmanager
    def contexts(self) -> Iterator[None]:
        """Every setting of the parent that Inductor reads is in force inside the block."""
        with contextlib.ExitStack() as stack:
            _apply_torch_state(self.settings["torch"], stack)
            groups.pretend(self.settings["groups"])
            for name in ("inductor", "functorch", "dynamo"):
                module = getattr(compat, f"{name}_config")
                stack.enter_context(module.patch(_different(module, self.settings[name])))
            for op in _forced_fallbacks(self.settings["fallbacks"]):
                stack.enter_context(compat.lowering.force_fallback(op))
            yield

    def load(self) -> Loaded:
        """Make the graph and the contexts that go with it."""
        shape_env = compat.ShapeEnv()
        fake_mode = compat.FakeTensorMode(
            allow_non_fake_inputs=self.settings["allow_non_fake_inputs"], shape_env=shape_env
        )
        data = pickling.loads(self.graph, fake_mode)
        registrations.check(data["needs"], data["gm"])
        sidetable.install(data["side_table"])
        tracing = compat.TracingContext(fake_mode)
        facts = data["tracing"]
        tracing.aot_graph_name = facts["aot_graph_name"]
        tracing.force_unspec_int_unbacked_size_like = facts["force_unspec_int_unbacked_size_like"]
        tracing.params_flat = []
        if facts["bw_donated_idxs"] is not None:
            tracing.fw_metadata = _ForwardFacts(facts["bw_donated_idxs"])
        if facts["effects"]:
            cache = tracing.hop_dispatch_set_cache.get_cache(torch.ops.higher_order.invoke_subgraph)
            if cache is not None:
                cache.effects_cache.update(facts["effects"])
        return Loaded(
            data["gm"], data["example_inputs"], data["inputs_to_check"], _graph_kwargs(data), tracing, fake_mode,
            data["choices"], self.settings["compile_id"], data["region"], data["aot"],
        )  # fmt: skip


@dataclass
class _ForwardFacts:
    """The one fact of AOTAutograd's metadata that code generation reads."""

    bw_donated_idxs: list[int]


@dataclass
class Loaded:
    """What :meth:`Request.load` made."""

    gm: torch.fx.GraphModule
    example_inputs: list[Any]
    inputs_to_check: list[int]
    graph_kwargs: dict[str, Any]
    tracing: Any
    fake_mode: Any
    choices: Any
    compile_id: str | None
    region: str | None
    aot: bool


def encode(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    inputs_to_check: Sequence[int],
    graph_kwargs: dict[str, Any],
    region: str | None = None,
) -> bytes:
    """Everything that a child needs to compile ``gm`` as this process would, as bytes.

    Call it where Inductor would compile: it reads the contexts and settings of the calling thread.

    Raises:
        UnserializableError: with a reason such as `aot_inductor`, `fake_tensor`, `opaque_constant`, `script_object`,
            `by_value`, `config`, `not_picklable`.
    """
    tracing = compat.TracingContext.try_get()
    fake_mode = _fake_mode(tracing, example_inputs)
    context = compat.CompileContext.try_get()
    settings = {
        "torch": _torch_state(),
        "inductor": _config(compat.inductor_config, _CONFIG_LEFT),
        "functorch": _config(compat.functorch_config, _FUNCTORCH_LEFT),
        "dynamo": {name: _setting(compat.dynamo_config, name) for name in _DYNAMO_SENT},
        "fallbacks": _fallbacks(),
        "loggers": logs.levels(),
        "debug_root": debug_root(),
        "compile_id": str(context.compile_id) if context is not None and context.compile_id is not None else None,
        "allow_non_fake_inputs": bool(fake_mode.allow_non_fake_inputs) if fake_mode is not None else False,
        "groups": groups.described(),
        "path": [entry for entry in sys.path if entry],
    }
    graph = {
        # First, so that the child's environment is filled before a symbol refers to it.
        "shape_env": fake_mode.shape_env if fake_mode is not None else None,
        "gm": gm,
        "example_inputs": [_fake(value, fake_mode) for value in example_inputs],
        "inputs_to_check": list(inputs_to_check),
        "graph_kwargs": _plain_kwargs(graph_kwargs),
        "decompositions": _decompositions(graph_kwargs.get("get_decomp_fn")),
        "side_table": sidetable.used_by(gm),
        "tracing": _tracing_facts(tracing),
        "choices": _choices(),
        "region": region,
        "aot": compat.V.aot_compilation is True,
        "needs": registrations.needed(gm),
    }
    return pickle.dumps((pickling.dumps(settings), pickling.dumps(graph)), protocol=5)


def taken_for_granted(example_inputs: Sequence[Any]) -> str:
    """What code generation builds on and neither the graph nor Inductor's key for its caches says: what is known of
    symbolic sizes by now, and which inputs a backward graph may write into. A child's reply brings only the guards that
    are new. Where :func:`encode` would be called."""
    tracing = compat.TracingContext.try_get()
    fake_mode = _fake_mode(tracing, example_inputs)
    known: list[Any] = [_tracing_facts(tracing)["bw_donated_idxs"]]
    if (env := fake_mode.shape_env if fake_mode is not None else None) is not None:
        asserts = [item.expr for items in env.deferred_runtime_asserts.values() for item in items]
        known += [compat.hints_of(env), env.var_to_range, env.replacements, sorted(map(str, env.size_like))]
        known += [[guard.expr for guard in env.guards], asserts]
    return repr(known)


def decode(payload: bytes) -> Request:
    """Take a payload apart. In a child only: it unpickles."""
    settings, graph = pickle.loads(payload)
    loaded = pickle.loads(settings)
    for entry in loaded["path"]:
        if entry not in sys.path:
            sys.path.append(entry)
    return Request(loaded, graph)


# The graph's own arguments ------------------------------------------------------------------------------------


def _fake_mode(tracing: Any, example_inputs: Sequence[Any]) -> Any:
    found = tracing.fake_mode if tracing is not None else None
    return found if found is not None else compat.detect_fake_mode(list(example_inputs))


def _fake(value: Any, fake_mode: Any) -> Any:
    """An example input without its data: code generation reads sizes, strides, dtype and device."""
    if not isinstance(value, torch.Tensor) or isinstance(value, compat.FakeTensor):
        return value
    mode = fake_mode if fake_mode is not None else compat.FakeTensorMode(shape_env=compat.ShapeEnv())
    return mode.from_tensor(value, static_shapes=True)


def _plain_kwargs(graph_kwargs: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in graph_kwargs.items() if name != "get_decomp_fn"}
    # Inductor ignores it (but for its authors' own builds, where no PyTorch of ours is).
    kept["extern_node_serializer"] = None
    kept["cudagraphs"] = bool(kept.get("cudagraphs"))
    kept["boxed_forward_device_index"] = None
    return kept


def _decompositions(get_table: Any) -> dict[Any, Any] | None:
    """Where the caller's decompositions differ from Inductor's own; None where they do not."""
    if get_table is None or get_table is compat.decompositions:
        return None
    own, table = compat.decompositions(), get_table()
    if own is table:
        return None
    different = {op: table.get(op) for op in {**own, **table} if own.get(op) is not table.get(op)}
    return different or None


def _graph_kwargs(data: dict[str, Any]) -> dict[str, Any]:
    kwargs = dict(data["graph_kwargs"])
    kwargs["cudagraphs"] = compat.BoxedBool(kwargs["cudagraphs"])
    if data["decompositions"] is not None:
        table = {**compat.decompositions(), **data["decompositions"]}
        table = {op: function for op, function in table.items() if function is not None}
        kwargs["get_decomp_fn"] = lambda: table
    return kwargs


def _tracing_facts(tracing: Any) -> dict[str, Any]:
    metadata = tracing.fw_metadata if tracing is not None else None
    donated = metadata.bw_donated_idxs if metadata is not None else None
    effects: dict[str, Any] = {}
    if tracing is not None:
        cache = tracing.hop_dispatch_set_cache.get_cache(torch.ops.higher_order.invoke_subgraph)
        effects = dict(getattr(cache, "effects_cache", {}))
    return {
        "aot_graph_name": tracing.aot_graph_name if tracing is not None else None,
        "force_unspec_int_unbacked_size_like": bool(
            tracing is not None and tracing.force_unspec_int_unbacked_size_like
        ),
        "bw_donated_idxs": None if donated is None else list(donated),
        "effects": effects,
    }


def _choices() -> Any:
    """Inductor's heuristics, when somebody replaced them."""
    choices = compat.V.choices
    return None if type(choices).__module__ == "torch._inductor.choices" else choices


# Settings -----------------------------------------------------------------------------------------------------


def _config(module: Any, left: frozenset[str]) -> dict[str, Any]:
    """Every setting that can travel. A custom pass that cannot is an error: without it the code would differ."""
    found: dict[str, Any] = {}
    for name, value in module._get_dict().items():
        if name in left:
            continue
        if value is None or type(value) in (bool, int, float, str):
            found[name] = value
            continue
        if name.startswith("_") and not callable(value):
            # Lists about saving configurations, not about code.
            continue
        try:
            pickling.dumps(value)
        except UnserializableError as error:
            raise UnserializableError("config", f"{module.__name__}.{name}: {error}") from None
        found[name] = value
    return found


def debug_root() -> str:
    """Where this process keeps the files of TORCH_COMPILE_DEBUG."""
    return str(compat.inductor_config.trace.debug_dir or compat.dynamo_config.debug_dir_root)


def _setting(module: Any, name: str) -> Any:
    return getattr(module, name, None)


def _different(module: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings ``wanted`` that this process knows and has otherwise. To set all takes some 5 ms."""
    here = module._get_dict()
    found: dict[str, Any] = {}
    for name, value in wanted.items():
        if name in module._config:
            # Of other types two values may be equal and not the same: True and 1, or whatever a class says.
            plain = value is None or type(value) in (bool, int, float, str)
            if not (plain and name in here and type(here[name]) is type(value) and here[name] == value):
                found[name] = value
    return found


#: The name of an operator, which PyTorch puts together anew each time.
_name_of: Final = functools.cache(str)


def _fallbacks() -> list[str]:
    """The operators that Inductor does not lower here, but calls."""
    lowerings = list(compat.lowering.lowerings.items())
    return sorted(_name_of(op) for op, function in lowerings if hasattr(function, "_is_fallback_handler"))


def _forced_fallbacks(names: list[str]) -> list[Any]:
    wanted = set(names).difference(_fallbacks())
    return [op for op in list(compat.lowering.lowerings) if _name_of(op) in wanted] if wanted else []


def _torch_state() -> dict[str, Any]:
    """The process-wide switches of torch that Inductor reads."""
    backends = torch.backends
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized": torch.utils.deterministic.fill_uninitialized_memory,
        "default_dtype": torch.get_default_dtype(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "mkldnn": backends.mkldnn.enabled,
        "cudnn_benchmark": backends.cudnn.benchmark,
        "cudnn_deterministic": backends.cudnn.deterministic,
        "flags": {path: _read(path) for path in _FLAGS},
    }


#: Attributes below torch.backends that Inductor reads and that can be set as plain values.
_FLAGS: Final = (
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn.fp32_precision",
    "mkldnn.fp32_precision",
)


def _read(path: str) -> Any:
    owner: Any = torch.backends
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner if owner is None or isinstance(owner, bool | str | int) else None


def _write(path: str, value: Any) -> None:
    owner: Any = torch.backends
    *parents, last = path.split(".")
    for part in parents:
        owner = getattr(owner, part)
    if getattr(owner, last, None) != value:
        setattr(owner, last, value)


def _apply_torch_state(state: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """Set the switches. A child runs one job, but the template warms up through here too: so all is put back."""
    before = _torch_state()

    # A module that a child imports may have forbidden to set them but by each one's own context manager.
    @compat.allow_flags()  # type: ignore[untyped-decorator]
    def apply(wanted: dict[str, Any]) -> None:
        torch.use_deterministic_algorithms(wanted["deterministic"], warn_only=wanted["deterministic_warn_only"])
        torch.utils.deterministic.fill_uninitialized_memory = wanted["fill_uninitialized"]
        torch.set_default_dtype(wanted["default_dtype"])
        torch.set_float32_matmul_precision(wanted["matmul_precision"])
        torch.backends.mkldnn.set_flags(wanted["mkldnn"])
        torch.backends.cudnn.benchmark = wanted["cudnn_benchmark"]
        torch.backends.cudnn.deterministic = wanted["cudnn_deterministic"]
        for path, value in wanted["flags"].items():
            if value is not None:
                _write(path, value)

    stack.callback(apply, before)
    apply(state)
    stack.enter_context(torch.set_grad_enabled(state["grad"]))
    # Inductor bakes torch.get_num_threads() into CPU kernels. Asking torch for more threads here would start
    # OpenMP's; the generated code only needs the number.
    stack.enter_context(_pretend_threads(state["threads"]))


@contextlib.contextmanager
def _pretend_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads
    torch.get_num_threads = lambda: count
    try:
        yield
    finally:
        torch.get_num_threads = before

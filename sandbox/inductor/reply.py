"""The reply of an `fx_graph` job: a compiled graph as plain data, and how the parent loads it.

The child's word is taken for what the generated code computes, which is no more than running it does. Everything
else is checked: no pickle, no evaluation of text, every value's type against a table; malformed data is a WireError.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import sympy
import torch

from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import compat, counting, expressions, kernels, logs, tensors
from sandbox.inductor.failures import failure_of, rebuild_exception
from sandbox.inductor.logs import replay_logs

__all__ = [
    "constants_of", "decode_graph", "encode_graph", "failure_of", "rebuild_exception", "replay_logs", "symbols_of",
]  # fmt: skip

_CACHE_KEY: Final = re.compile(r"^[a-z0-9]{8,128}$")
_IDENTIFIER: Final = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,511}$")

#: Fields of CompiledFxGraph that are text, numbers or nothing: their types.
_PLAIN: Final[dict[str, tuple[type, ...]]] = {
    "cache_key": (str,),
    "source_code": (str,),
    "runnable_graph_str": (str,),
    "inductor_post_grad_graph_str": (str,),
    "disabled_cudagraphs_reason": (str, type(None)),
    "extern_libs_key": (str, type(None)),
    "inductor_provenance_mapping_str": (str, type(None)),
    "inductor_provenance_stack_traces_str": (str, type(None)),
    "_boxed_call": (bool, type(None)),
    "_wrap_compiled_regions": (bool,),
    "_defers_input_alignment": (bool,),
}


# In the child -------------------------------------------------------------------------------------------------


def constants_of(gm: torch.fx.GraphModule) -> dict[int, str]:
    """`{id of tensor: attribute}` of a graph module's own tensors: what the parent holds under the same name."""
    found: dict[int, str] = {}
    for name, value in [*gm.named_parameters(), *gm.named_buffers()]:
        found[id(value)] = name
    for prefix, module in gm.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[id(value)] = f"{prefix}.{name}" if prefix else name
    return found


def symbols_of(shape_env: Any) -> frozenset[str]:
    """Names of the symbols that ``shape_env`` knows: before a compile, those that the parent knows too."""
    return frozenset(_symbols(shape_env))


def encode_graph(code: Any, shape_env: Any, constants: dict[int, str], symbols: frozenset[str]) -> dict[str, Any]:
    """A CompiledFxGraph, and the guards that its lowering added to ``shape_env``, as plain data.

    Args:
        code: what Inductor returned.
        shape_env: the child's ShapeEnv; its list of guards was empty before.
        constants: :func:`constants_of` the graph before it was compiled.
        symbols: :func:`symbols_of` the environment before; a guard over others cannot be sent.

    Raises:
        UnserializableError: when a part has no plain form (reasons `constant`, `guard`, `opaque_value`).
    """
    if code.torchbind_constants or getattr(code, "opaque_value_type_classes", None):
        raise UnserializableError("opaque_value", "the compiled graph holds objects of this process")
    graph: dict[str, Any] = {name: getattr(code, name, None) for name in _PLAIN if hasattr(code, name)}
    graph["cache_linemap"] = [
        [int(line), None if trace is None else str(trace)] for line, trace in code.cache_linemap or []
    ]
    graph["device_types"] = sorted(code.device_types)
    graph["device_idxs"] = sorted(code.device_idxs)
    graph["mutated_inputs"] = list(code.mutated_inputs)
    graph["mutated_input_idxs"] = list(code.mutated_input_idxs)
    graph["frozen_param_names"] = dict(code.frozen_param_names)
    graph["output_strides"] = (
        None
        if code.output_strides is None
        else [None if stride is None else [str(item) for item in stride] for stride in code.output_strides]
    )
    graph["counter_deltas"] = {str(name): int(value) for name, value in code.counter_deltas.items()}
    graph["metrics_deltas"] = {name: int(value) for name, value in vars(code.metrics_deltas).items()}
    graph["cudagraph_info"] = _cudagraph_data(code.cudagraph_info)
    graph["partition_maps"] = (
        None
        if code.partition_maps is None
        else [
            {
                "id": item.id,
                "input_index_mapping": list(item.input_index_mapping),
                "output_index_mapping": list(item.output_index_mapping),
                "constant_names": list(item.constant_names),
            }
            for item in code.partition_maps
        ]
    )
    graph["constants"] = {name: _constant_data(value, constants) for name, value in (code.constants or {}).items()}
    for guard in shape_env.guards:
        unknown = {symbol.name for symbol in guard.expr.free_symbols} - symbols
        if unknown:
            raise UnserializableError("guard", f"{guard.expr} is about symbols made while lowering: {sorted(unknown)}")
    guards = [
        {"expr": expressions.encode(guard.expr), "size_oblivious": bool(getattr(guard, "size_oblivious", False))}
        for guard in shape_env.guards
    ]
    return {"graph": graph, "guards": guards}


def _constant_data(value: Any, known: dict[int, str]) -> dict[str, Any]:
    if id(value) in known:
        return {"attribute": known[id(value)]}
    if not isinstance(value, torch.Tensor):
        raise UnserializableError("constant", f"a constant is a {type(value).__name__}")
    return {"tensor": tensors.encode(value)}


def _cudagraph_data(info: Any) -> dict[str, Any] | None:
    if info is None:
        return None
    return {
        "placeholders": [_placeholder_data(item) for item in info.placeholders],
        "stack_traces": [None if item is None else str(item) for item in info.stack_traces],
        "cudagraph_fail_reasons": [str(item) for item in info.cudagraph_fail_reasons],
    }


def _placeholder_data(item: Any) -> dict[str, Any]:
    return {
        "name": item.name,
        "stack_trace": item.stack_trace,
        "users": [_placeholder_data(user) for user in item.users],
        "mutating_use_stack_trace": item.mutating_use_stack_trace,
    }


# In the parent ------------------------------------------------------------------------------------------------


def decode_graph(
    data: Any,
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    inputs_to_check: Sequence[int],
    graph_kwargs: dict[str, Any],
    region: str | None = None,
) -> Any:
    """Check a reply, load the graph that it describes, and return the OutputCode that Inductor expects.

    The job's artifacts lie in Inductor's cache folder already. In this order: everything is checked, the graph is
    loaded, guards are added to the ShapeEnv, counts and the saved output code are handed on. Logs are not:
    see :func:`replay_logs`.

    Raises:
        WireError: when the reply is malformed, or does not fit ``gm`` or the shapes.
    """
    graph = _table(data, "graph", "reply")
    shape_env = _shape_env(example_inputs)
    symbols = _symbols(shape_env)
    built = kernels.check(data.get("kernels"))
    counting.check(data.get("counts"))
    logs.check(data)
    guards = _guards(data.get("guards"), shape_env, symbols)
    code = _compiled_graph(graph, gm, frozenset(symbols))
    code.compile_region_name = region
    code.fx_kwargs = graph_kwargs
    code.inputs_to_check = inputs_to_check
    if data["graph"].get("_wrap_compiled_regions"):
        code._original_gm = _without_metadata(gm)
    constants = compat.CompiledFxGraphConstantsWithGm(gm)
    with kernels.loading(built):
        try:
            code.after_deserialization(constants)
        except Exception as error:
            # Generated code may raise anything when it is imported.
            raise WireError(f"the compiled graph cannot be loaded: {type(error).__name__}: {error}") from error
    for expr, size_oblivious in guards:
        _add_guard(shape_env, expr, size_oblivious)
    if bool(graph_kwargs.get("cudagraphs")) and code.disabled_cudagraphs_reason:
        compat.BoxedBool.disable(graph_kwargs["cudagraphs"])
    counting.apply(data["counts"])
    if compat.GraphLowering.save_output_code is not None:
        compat.GraphLowering.save_output_code(code.source_code)
    return code


def _add_guard(shape_env: Any, expr: Any, size_oblivious: bool) -> None:
    """Evaluate a guard as lowering did in the child: that adds it here, with what follows from it."""
    try:
        holds = shape_env.evaluate_expr(expr, size_oblivious=size_oblivious)
    except Exception as error:
        # What evaluates in the child evaluates here; all else is a guard that lowering never made.
        raise WireError(f"the guard {expr} of the reply cannot be evaluated: {error}") from error
    if holds is not True and holds != sympy.true:
        raise WireError(f"the guard {expr} of the reply does not hold for the shapes that were traced")


def _without_metadata(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    import copy

    copied = copy.deepcopy(gm)
    for node in copied.graph.nodes:
        node.meta.clear()
    return copied


def _shape_env(example_inputs: Sequence[Any]) -> Any:
    tracing = compat.TracingContext.try_get()
    if tracing is not None and tracing.fake_mode is not None and tracing.fake_mode.shape_env is not None:
        return tracing.fake_mode.shape_env
    return compat.shape_env_from_inputs(list(example_inputs))


def _symbols(shape_env: Any) -> dict[str, Any]:
    if shape_env is None:
        return {}
    return {symbol.name: symbol for symbol in [*shape_env.var_to_range, *compat.hints_of(shape_env)]}


def _guards(data: Any, shape_env: Any, symbols: dict[str, Any]) -> list[tuple[Any, bool]]:
    if not isinstance(data, list) or (data and shape_env is None):
        raise WireError("the reply's guards are malformed, or there is no ShapeEnv to add them to")
    found = []
    for item in data:
        match item:
            case {"expr": list(expr), "size_oblivious": bool(oblivious), **rest} if not rest:
                found.append((expressions.decode(expr, symbols), oblivious))
            case _:
                raise WireError("a guard of the reply is malformed")
    return found


def _table(data: Any, name: str, where: str) -> dict[str, Any]:
    found = data.get(name) if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise WireError(f"{where}: {name!r} is missing or is not a table")
    return found


def _list(data: dict[str, Any], name: str, kinds: tuple[type, ...]) -> list[Any]:
    found = data.get(name)
    if not isinstance(found, list) or not all(type(item) in kinds for item in found):
        raise WireError(f"reply: {name!r} must be a list of {' or '.join(kind.__name__ for kind in kinds)}")
    return found


def _compiled_graph(data: dict[str, Any], gm: torch.fx.GraphModule, symbols: frozenset[str]) -> Any:
    """A CompiledFxGraph, field by field, without the callable."""
    code = object.__new__(compat.CompiledFxGraph)
    # What a failed load leaves behind must still be deletable.
    code.compiled_fn_runner = code.current_callable = code.recursively_apply_fns = None
    fields = compat.CompiledFxGraph.__dataclass_fields__
    for name, kinds in _PLAIN.items():
        if name not in fields:
            continue
        if name not in data:
            raise WireError(f"reply: {name!r} is missing")
        if type(data[name]) not in kinds:
            raise WireError(f"reply: {name!r} must be {' or '.join(kind.__name__ for kind in kinds)}")
        setattr(code, name, data[name])
    if missing := sorted({"output_strides", "cudagraph_info", "partition_maps"} - set(data)):
        raise WireError(f"reply: {', '.join(missing)} missing")
    if not _CACHE_KEY.match(data.get("cache_key") or ""):
        raise WireError(f"reply: the cache key {data.get('cache_key')!r:.80} is malformed")
    if not isinstance(data.get("source_code"), str):
        raise WireError("reply: 'source_code' is missing")
    code.cache_linemap = [_line(item) for item in _list(data, "cache_linemap", (list,))]
    code.device_types = compat.OrderedSet(_list(data, "device_types", (str,)))
    code.device_idxs = compat.OrderedSet(_list(data, "device_idxs", (int,)))
    code.mutated_inputs = compat.OrderedSet(_list(data, "mutated_inputs", (str,)))
    code.mutated_input_idxs = compat.OrderedSet(_list(data, "mutated_input_idxs", (int,)))
    code.output_strides = _strides(data.get("output_strides"), symbols)
    code.counter_deltas = Counter(_numbers(data, "counter_deltas"))
    code.metrics_deltas = _metrics(_numbers(data, "metrics_deltas"))
    code.cudagraph_info = _cudagraph_info(data.get("cudagraph_info"))
    code.partition_maps = _partition_maps(data)
    code.constants = {
        _identifier(name): _constant(value, gm) for name, value in _table(data, "constants", "reply").items()
    }
    frozen = _table(data, "frozen_param_names", "reply")
    code.frozen_param_names = {_identifier(name): _attribute_name(gm, where) for name, where in frozen.items()}
    code.torchbind_constants, code.opaque_value_type_classes = {}, {}
    code.guards_expr = None
    return code


def _line(item: list[Any]) -> tuple[int, str | None]:
    if len(item) != 2 or type(item[0]) is not int or not isinstance(item[1], str | None):
        raise WireError("reply: 'cache_linemap' must hold pairs of line and stack trace")
    return item[0], item[1]


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not _IDENTIFIER.match(name) or name.startswith("__"):
        raise WireError(f"reply: the constant name {name!r:.80} is malformed")
    return name


def _attribute(gm: torch.fx.GraphModule, name: Any) -> torch.Tensor:
    """A tensor of the parent's own graph module, by dotted name, looked up without running code of a class."""
    found: Any = gm
    for part in name.split(".") if isinstance(name, str) else ():
        tables = (vars(found).get("_parameters"), vars(found).get("_buffers"), vars(found).get("_modules"), vars(found))
        found = next((table[part] for table in tables if table and part in table), None)
        if not isinstance(found, torch.nn.Module):
            break
    if not isinstance(found, torch.Tensor):
        raise WireError(f"reply: the graph has no constant {name!r:.80}")
    return found


def _attribute_name(gm: torch.fx.GraphModule, name: Any) -> str:
    _attribute(gm, name)
    return str(name)


def _constant(data: Any, gm: torch.fx.GraphModule) -> torch.Tensor:
    match data:
        case {"attribute": str(name), **rest} if not rest:
            return _attribute(gm, name)
        case {"tensor": dict(tensor), **rest} if not rest:
            return tensors.decode(tensor)
    raise WireError("reply: a constant must name an attribute or bring a tensor")


def _numbers(data: dict[str, Any], name: str) -> dict[str, int]:
    found = _table(data, name, "reply")
    if not all(isinstance(key, str) and type(value) is int for key, value in found.items()):
        raise WireError(f"reply: {name!r} must map names to numbers")
    return found


def _metrics(data: dict[str, int]) -> Any:
    fields = compat.CachedMetricsDeltas.__dataclass_fields__
    if set(data) != set(fields):
        raise WireError(f"reply: 'metrics_deltas' must hold exactly {', '.join(fields)}")
    return compat.CachedMetricsDeltas(**data)


def _strides(data: Any, symbols: frozenset[str]) -> list[tuple[str, ...] | None] | None:
    if data is None:
        return None
    if not isinstance(data, list) or not all(isinstance(item, list | None) for item in data):
        raise WireError("reply: 'output_strides' must be a list of lists")
    return [None if item is None else tuple(expressions.check_stride(text, symbols) for text in item) for item in data]


def _partition_maps(data: dict[str, Any]) -> list[Any] | None:
    if data.get("partition_maps") is None:
        return None
    found = []
    for item in _list(data, "partition_maps", (dict,)):
        if type(item.get("id")) is not int:
            raise WireError("reply: a partition has no number")
        found.append(
            compat.GraphPartitionMap(
                item["id"],
                _list(item, "input_index_mapping", (int, type(None))),
                _list(item, "output_index_mapping", (int, type(None))),
                _list(item, "constant_names", (str,)),
            )
        )
    return found


def _cudagraph_info(data: Any) -> Any:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise WireError("reply: 'cudagraph_info' must be a table")
    placeholders = tuple(_placeholder(item, 0) for item in _list(data, "placeholders", (dict,)))
    traces = _list(data, "stack_traces", (str, type(None)))
    return compat.CudagraphCachedInfo(placeholders, traces, _list(data, "cudagraph_fail_reasons", (str,)))


def _placeholder(data: dict[str, Any], depth: int) -> Any:
    if depth > 8 or not isinstance(data.get("name"), str):
        raise WireError("reply: a placeholder is malformed")
    for name in ("stack_trace", "mutating_use_stack_trace"):
        if not isinstance(data.get(name), str | None):
            raise WireError(f"reply: a placeholder's {name!r} must be text")
    users = [_placeholder(item, depth + 1) for item in _list(data, "users", (dict,))]
    return compat.PlaceholderInfo(data["name"], data["stack_trace"], users, data["mutating_use_stack_trace"])

"""Inductor's CompiledFxGraph as plain data, and back: everything but the loaded code itself."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import compat, counting, expressions, tensors
from sandbox.inductor.budget import Budget, shown
from sandbox.opcodes import resolve

_CACHE_KEY: Final = re.compile(r"^[a-z0-9]{8,128}$")
_IDENTIFIER: Final = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,511}$")
_WHERE: Final = re.compile(r"[A-Za-z0-9_.]{1,200}:[A-Za-z0-9_.]{1,200}")

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
#: Levels of users of a placeholder: Inductor writes those of the placeholder alone (2.11, 2.13).
_MAX_USERS: Final = 2


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


def encode(code: Any, constants: dict[int, str]) -> dict[str, Any]:
    """A CompiledFxGraph as plain data.

    Args:
        code: what Inductor returned.
        constants: :func:`constants_of` the graph before it was compiled.

    Raises:
        UnserializableError: when a part has no plain form (reasons `constant`, `opaque_value`).
    """
    if code.torchbind_constants:
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
    classes = getattr(code, "opaque_value_type_classes", None) or {}
    graph["classes"] = {name: f"{cls.__module__}:{cls.__qualname__}" for name, cls in classes.items()}
    graph["constants"] = {name: encode_constant(value, constants) for name, value in (code.constants or {}).items()}
    return graph


def encode_constant(value: Any, known: dict[int, str]) -> dict[str, Any]:
    """A constant by the name that the parent knows it under, or with its data."""
    if isinstance(value, torch.Tensor):
        value = tensors.original_of(value)
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


def decode(data: Any, gm: torch.fx.GraphModule, symbols: frozenset[str], inputs: int, budget: Budget) -> Any:
    """A CompiledFxGraph, field by field, without the callable.

    Args:
        data: what :func:`encode` made; it is not trusted.
        gm: this process's graph, which holds the constants.
        symbols: names that strides may use.
        inputs: of the graph, a count.
        budget: what is left for the reply.

    Raises:
        WireError: when ``data`` is malformed or does not fit ``gm``.
        UnserializableError: a constant lives on a device that is not there.
    """
    if not isinstance(data, dict):
        raise WireError("the reply's graph is not a table")
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
    _check_key(code.cache_key, code.source_code)
    code.cache_linemap = [_line(item) for item in _list(data, "cache_linemap", (list,))]
    code.device_types = compat.OrderedSet(_list(data, "device_types", (str,)))
    code.device_idxs = compat.OrderedSet(_list(data, "device_idxs", (int,)))
    code.mutated_inputs = compat.OrderedSet(_list(data, "mutated_inputs", (str,)))
    code.mutated_input_idxs = compat.OrderedSet(_indices(data, "mutated_input_idxs", inputs))
    code.output_strides = _strides(data["output_strides"], symbols, budget)
    code.counter_deltas = Counter(counting.check_table(data.get("counter_deltas")))
    code.metrics_deltas = _metrics(counting.check_table(data.get("metrics_deltas")))
    code.cudagraph_info = _cudagraph_info(data["cudagraph_info"], budget)
    code.partition_maps = _partition_maps(data, inputs)
    code.constants = {
        _identifier(name): decode_constant(value, gm) for name, value in _table(data, "constants", "reply").items()
    }
    frozen = _table(data, "frozen_param_names", "reply")
    code.frozen_param_names = {_identifier(name): _attribute_name(gm, where) for name, where in frozen.items()}
    code.torchbind_constants = {}
    code.opaque_value_type_classes = {
        _identifier(name): decode_class(where) for name, where in _table(data, "classes", "reply").items()
    }
    code.guards_expr = None
    return code


def _check_key(key: str, source: str) -> None:
    """The key names the file of the source, and is made from it: else a reply could claim another graph's file."""
    if not _CACHE_KEY.match(key):
        raise WireError(f"reply: the cache key {shown(key)} is malformed")
    try:
        expected = compat.codecache.code_hash(source.strip())
    except UnicodeEncodeError:
        raise WireError("reply: the source code is not text") from None
    if key != expected:
        raise WireError("reply: the cache key is not that of the source code")


def _line(item: list[Any]) -> tuple[int, str | None]:
    if len(item) != 2 or type(item[0]) is not int or not isinstance(item[1], str | None):
        raise WireError("reply: 'cache_linemap' must hold pairs of line and stack trace")
    return item[0], item[1]


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not _IDENTIFIER.match(name) or name.startswith("__"):
        raise WireError(f"reply: the constant name {shown(name)} is malformed")
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
        raise WireError(f"reply: the graph has no constant {shown(name)}")
    return found


def _attribute_name(gm: torch.fx.GraphModule, name: Any) -> str:
    _attribute(gm, name)
    return str(name)


def _devices(gm: torch.fx.GraphModule) -> set[str]:
    """Where a graph has tensors, and the CPU."""
    made = [node.meta.get("val") for node in gm.graph.nodes]
    flat = [one for each in made for one in (each if isinstance(each, list | tuple) else (each,))]
    own = [*gm.parameters(), *gm.buffers(), *(one for one in flat if isinstance(one, torch.Tensor))]
    return {"cpu", *(str(one.device) for one in own)}


def decode_constant(data: Any, gm: torch.fx.GraphModule) -> torch.Tensor:
    """The tensor that :func:`encode_constant` described; WireError for anything else."""
    match data:
        case {"attribute": str(name), **rest} if not rest:
            return _attribute(gm, name)
        case {"tensor": dict(tensor), **rest} if not rest:
            if (device := tensor.get("device")) not in _devices(gm):
                raise WireError(f"reply: a constant on {shown(device)}, where nothing of the graph is")
            return tensors.decode(tensor)
    raise WireError("reply: a constant must name an attribute or bring a tensor")


def decode_class(where: Any) -> type:
    """A class whose objects torch writes into code as expressions: one that this process has registered as such."""
    if not isinstance(where, str) or not _WHERE.fullmatch(where) or not compat.has("is_opaque_value_type"):
        raise WireError(f"reply: the class {shown(where)} is malformed")
    found = resolve(where)
    if not compat.is_opaque_value_type(found):
        raise WireError(f"reply: {shown(where)} is not registered as a class of opaque values")
    return found


def _metrics(data: dict[str, int]) -> Any:
    fields = compat.CachedMetricsDeltas.__dataclass_fields__
    if set(data) != set(fields):
        raise WireError(f"reply: 'metrics_deltas' must hold exactly {', '.join(fields)}")
    return compat.CachedMetricsDeltas(**data)


def _strides(data: Any, symbols: frozenset[str], budget: Budget) -> list[tuple[str, ...] | None] | None:
    if data is None:
        return None
    if not isinstance(data, list) or not all(isinstance(item, list | None) for item in data):
        raise WireError("reply: 'output_strides' must be a list of lists")
    return [
        None if item is None else tuple(expressions.check_stride(text, symbols, budget) for text in item)
        for item in data
    ]


def _indices(data: dict[str, Any], name: str, end: int | None, *, gaps: bool = False) -> list[Any]:
    """A list of positions from 0 up to ``end`` (None: unknown), without it; None among them where ``gaps`` says so."""
    found = _list(data, name, (int, type(None)) if gaps else (int,))
    if not all(item is None or (item >= 0 and (end is None or item < end)) for item in found):
        raise WireError(f"reply: {name!r} holds a position that is not there")
    return found


def _partition_maps(data: dict[str, Any], inputs: int) -> list[Any] | None:
    if data["partition_maps"] is None:
        return None
    found = []
    for item in _list(data, "partition_maps", (dict,)):
        if type(item.get("id")) is not int:
            raise WireError("reply: a partition has no number")
        found.append(
            compat.GraphPartitionMap(
                item["id"],
                _indices(item, "input_index_mapping", inputs, gaps=True),
                _indices(item, "output_index_mapping", None, gaps=True),
                _list(item, "constant_names", (str,)),
            )
        )
    return found


def _cudagraph_info(data: Any, budget: Budget) -> Any:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise WireError("reply: 'cudagraph_info' must be a table")
    placeholders = tuple(_placeholder(item, 0, budget) for item in _list(data, "placeholders", (dict,)))
    traces = _list(data, "stack_traces", (str, type(None)))
    return compat.CudagraphCachedInfo(placeholders, traces, _list(data, "cudagraph_fail_reasons", (str,)))


def _placeholder(data: dict[str, Any], depth: int, budget: Budget) -> Any:
    budget.spend("placeholders")
    if depth > _MAX_USERS or not isinstance(data.get("name"), str):
        raise WireError("reply: a placeholder is malformed")
    for name in ("stack_trace", "mutating_use_stack_trace"):
        if not isinstance(data.get(name), str | None):
            raise WireError(f"reply: a placeholder's {name!r} must be text")
    users = [_placeholder(item, depth + 1, budget) for item in _list(data, "users", (dict,))]
    return compat.PlaceholderInfo(data["name"], data.get("stack_trace"), users, data.get("mutating_use_stack_trace"))

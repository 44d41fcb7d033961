"""The pickler that carries a graph to a child, and its way back.

Pickle goes from the parent to the child only: the child trusts its parent, never the other way round.
Everything that has no meaning outside this process (ops, fake tensors, symbols, graph modules, real tensors,
functions of the user's script) is taken apart here, and put together again by the `_make_*` functions.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import logging
import operator
import pickle
import threading
import types
import warnings
import weakref
from typing import Any, Final

import dill
import torch

from sandbox.errors import UnserializableError
from sandbox.inductor import compat, constants, groups, registrations, tensors

#: Node metadata that a child has no use for, and that tends to hold the user's modules.
DROPPED_META: Final = frozenset({"nn_module_stack", "fwd_source_fn_stack", "fwd_nn_module_stack", "example_value"})

#: What of a ShapeEnv stays here: stacks, caches, and guards, which come back as the new ones only.
_ENV_LEFT: Final = {
    "tracked_fakes": None,
    "fake_tensor_cache": dict,
    "var_to_stack": dict,
    "guards": list,
    "fx_node_cache": dict,
    "specialization_stacks": dict,
    "var_to_range_sloc": None,
    "replacements_slocs": None,
    "log": None,
    "events": list,
}
_LOCKS: Final[dict[type, Any]] = {type(make()): make for make in (threading.Lock, threading.RLock)}
_SYMBOLIC: Final = (torch.SymInt, torch.SymFloat, torch.SymBool)


class NodeRef:
    """Stands for the node of that index in the arguments of a pickled node."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Pickler(pickle.Pickler):
    """Pickles a graph. Raises UnserializableError where something has no form that travels."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self._token = object()
        self._describer = compat.MetaTensorDescriber(copy_data=False)

    def persistent_id(self, obj: object) -> str | None:
        return "state" if obj is self._token else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            return self._tensor(obj)
        if isinstance(obj, torch.fx.GraphModule):
            return _make_graph_module, (_module_state(obj), _graph_data(obj.graph))
        if isinstance(obj, compat.OperatorBase | compat.OpOverloadPacket):
            return _make_op, _op_name(obj)
        if isinstance(obj, compat.FakeTensorMode):
            # Descriptions of views hold the mode of their base.
            return _make_fake_mode, (self._token,)
        if isinstance(obj, compat.ShapeEnv):
            return _make_shape_env, (self._token, _env_state(obj))
        if isinstance(obj, _SYMBOLIC):
            node = obj.node
            if not isinstance(node, compat.SymNode):
                # A size of a nested tensor, or a constant: no expression, and nothing of this process.
                return type(obj), (node,)
            return _make_symbolic, (type(obj).__name__, node._expr, node.shape_env, node.pytype, _hint(node))
        if isinstance(obj, torch.fx.Node):
            return _make_none, ()
        if isinstance(obj, compat.FakeScriptObject):
            return self._script_object(obj)
        if groups.is_group(obj):
            return groups.find, (str(obj.group_name),)
        if isinstance(obj, weakref.ref):
            return _make_dead_reference, ()
        if isinstance(obj, type | types.FunctionType):
            return self._global(obj)
        if isinstance(obj, types.ModuleType):
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, torch.memory_format | torch.layout | torch.qscheme):
            # They do not say where they live, so pickle takes the first module that has imported torch: __main__ under
            # another name, perhaps, which the child has not.
            return _make_attribute, tuple(str(obj).split(".", 1))
        if isinstance(obj, torch.Generator):
            return _make_generator, (str(obj.device),)
        if isinstance(obj, logging.Logger):
            return logging.getLogger, (obj.name,)
        if type(obj) in _LOCKS:
            return _LOCKS[type(obj)], ()
        return NotImplemented

    def _tensor(self, obj: torch.Tensor) -> Any:
        if isinstance(obj, compat.FakeTensor):
            try:
                return _make_fake, (self._token, compat.TensorPickleData(self._describer, obj))
            except AssertionError as error:
                raise UnserializableError("fake_tensor", str(error)) from None
        if (form := constants.reduced(obj)) is not None:
            return form
        return tensors.decode, (tensors.encode(obj),)

    def _script_object(self, obj: Any) -> Any:
        real = object.__getattribute__(obj, "real_obj")
        if real is not None and compat.has("is_opaque_value_type") and compat.is_opaque_value_type(type(real)):
            return NotImplemented
        if (
            isinstance(real, torch.ScriptObject)
            or not compat.has("is_opaque_type")
            or not compat.is_opaque_type(type(real))
        ):
            raise UnserializableError("script_object", f"{type(real or obj).__name__} lives in this process only")
        return _make_fake_object, (self._token, real)

    def _global(self, obj: Any) -> Any:
        name, module = obj.__qualname__, obj.__module__
        if module == "torch.utils._sympy.functions" and "<locals>" in name:
            # Made by a factory, yet an attribute of its module under its plain name.
            return _make_attribute, (module, obj.__name__)
        if module == "__main__" or "<locals>" in name or "<lambda>" in name:
            return dill.loads, (by_value(obj),)
        return NotImplemented


class _ByValue(dill.Pickler):  # type: ignore[misc]
    """dill takes each global whose name occurs in a function, as an attribute too: ops and their namespaces among
    them, which it cannot take apart."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, compat.OperatorBase | compat.OpOverloadPacket):
            self.save_reduce(_make_op, _op_name(obj), obj=obj)
        elif isinstance(obj, compat.OpNamespace):
            self.save_reduce(_make_attribute, ("torch", f"ops.{obj.name}"), obj=obj)
        elif isinstance(obj, types.ModuleType) and obj.__name__ != "__main__":
            # dill would take one apart that does not lie below the interpreter.
            self.save_reduce(importlib.import_module, (obj.__name__,), obj=obj)
        elif isinstance(obj, torch.Tensor) and not isinstance(obj, compat.FakeTensor):
            self.save_reduce(*(constants.reduced(obj) or (tensors.decode, (tensors.encode(obj),))), obj=obj)
        elif type(obj) in _LOCKS:
            # dill makes a free RLock one that is held for ever.
            self.save_reduce(_LOCKS[type(obj)], (), obj=obj)
        elif isinstance(obj, logging.Logger):
            self.save_reduce(logging.getLogger, (obj.name,), obj=obj)
        else:
            super().save(obj, save_persistent_id)


def by_value(obj: Any) -> bytes:
    """A function or class with all that it refers to, by dill.

    Raises:
        UnserializableError: when dill cannot.
    """
    try:
        with warnings.catch_warnings():
            # dill warns of what it raises next.
            warnings.simplefilter("ignore", dill.PicklingWarning)
            stream = io.BytesIO()
            _ByValue(stream, protocol=5, byref=False, recurse=True).dump(obj)
            return stream.getvalue()
    except Exception as error:  # noqa: BLE001 - whatever a user's object raises while it is pickled
        raise UnserializableError("by_value", f"{obj!r:.120}: {type(error).__name__}: {error}") from None


def dumps(obj: Any) -> bytes:
    """Pickle ``obj``.

    Raises:
        UnserializableError: with reason `fake_constant`, `script_object`, `by_value`, `not_picklable`...
    """
    stream = io.BytesIO()
    try:
        Pickler(stream).dump(obj)
    except UnserializableError:
        raise
    except Exception as error:
        # __reduce__ of any object in the graph may raise anything.
        raise UnserializableError("not_picklable", f"{type(error).__name__}: {error}") from error
    return stream.getvalue()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, state: Any) -> None:
        super().__init__(io.BytesIO(data))
        self._state = state

    def persistent_load(self, pid: Any) -> Any:
        return self._state


def loads(data: bytes, fake_mode: Any) -> Any:
    """Unpickle what :func:`dumps` made, with every fake tensor and symbol in ``fake_mode``. In a child only."""
    return _Unpickler(data, compat.UnpickleState(fake_mode)).load()


# Fake tensors, symbols, small things -------------------------------------------------------------------------


def _make_none() -> None:
    return None


def _nothing() -> None:
    return None


def _make_dead_reference() -> Any:
    return _nothing


def _make_attribute(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _make_fake(state: Any, data: Any) -> Any:
    return data.unpickle(state)


def _make_fake_object(state: Any, real: Any) -> Any:
    """An object that torch passes through graphs as it is: a device mesh, for example."""
    return compat.maybe_to_fake_obj(state.fake_mode, real)


def _make_fake_mode(state: Any) -> Any:
    return state.fake_mode


def _make_generator(device: str) -> torch.Generator:
    return torch.Generator(device)


def _hint(node: Any) -> Any:
    hint = node._hint
    if isinstance(hint, torch.SymInt) and not isinstance(hint.node, compat.SymNode):
        return hint  # a size of a nested tensor, which nothing else tells
    return hint if isinstance(hint, int | float | bool | None) else None


def _make_symbolic(kind: str, expr: Any, shape_env: Any, pytype: Any, hint: Any) -> Any:
    return getattr(torch, kind)(compat.SymNode(expr, shape_env, pytype, hint))


def _env_state(env: Any) -> dict[str, Any]:
    kept = {name: value for name, value in vars(env).items() if name not in _ENV_LEFT and not _is_cached_method(value)}
    # Guards come back and are validated here.
    for name in ("validator", "graph", "name_to_node"):
        kept.pop(name, None)
    off = ("_translation_validation_enabled", "should_record_events", "check_recorded_events", "is_recording")
    return kept | dict.fromkeys(off, False)


def _is_cached_method(value: Any) -> bool:
    return hasattr(value, "cache_clear")


class _NoLocations(dict[Any, Any]):
    """Source locations of symbols are for messages; a child reports none."""

    def __missing__(self, key: Any) -> Any:
        found = compat.ValueRangesSLoc(compat.SLoc("", ""), compat.SLoc("", ""))
        self[key] = found
        return found


class _NoReplacementLocations(dict[Any, Any]):
    def __missing__(self, key: Any) -> Any:
        return compat.SLoc("", "")


def _make_shape_env(state: Any, data: dict[str, Any]) -> Any:
    env = state.fake_mode.shape_env
    vars(env).update(data)
    env.var_to_range_sloc = _NoLocations()
    env.replacements_slocs = _NoReplacementLocations()
    return env


# Ops ---------------------------------------------------------------------------------------------------------


def _op_name(op: Any) -> tuple[str, str, str, str]:
    """Its kind, name, overload (or module), and who has defined it."""
    if isinstance(op, compat.OpOverload):
        return "overload", op._schema.name, op._overloadname, registrations.definer(op)
    if isinstance(op, compat.OpOverloadPacket):
        return "packet", op._qualified_op_name, "", registrations.definer(op)
    if isinstance(op, compat.HigherOrderOperator):
        return "higher_order", op.name(), type(op).__module__, type(op).__module__
    raise UnserializableError("unknown_op", repr(op))


def _make_op(kind: str, name: str, extra: str, definer: str) -> Any:
    try:
        if definer.startswith("torch."):  # part of PyTorch, and imported when it is first used
            importlib.import_module(definer)
        if kind == "higher_order":
            importlib.import_module(extra)
            return compat.higher_order_ops[name]
        namespace, _, packet_name = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), packet_name)
        return packet if kind == "packet" else getattr(packet, extra or "default")
    except (AttributeError, KeyError, ImportError):
        raise UnserializableError("unknown_op", registrations.complaint(f"the op {name}", definer)) from None


def _target_data(target: Any) -> Any:
    """A node's target: strings and ops travel as they are, functions by where they are found."""
    if isinstance(target, str | compat.OperatorBase | compat.OpOverloadPacket):
        return target
    name = getattr(target, "__name__", None)
    for module in (operator, builtins, *([importlib.import_module(target.__module__)] if _module_of(target) else [])):
        if name is not None and getattr(module, name, None) is target:
            return _Attribute(module.__name__, name)
    return target


def _module_of(target: Any) -> bool:
    module = getattr(target, "__module__", None)
    return isinstance(module, str) and module not in ("__main__", "")


class _Attribute:
    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


# Graph modules -----------------------------------------------------------------------------------------------


def _module_state(gm: torch.fx.GraphModule) -> dict[str, Any]:
    """What a graph module holds besides its graph: submodules, parameters, buffers, plain attributes."""
    state: dict[str, Any] = {}
    for name, value in vars(gm).items():
        if name in ("_graph", "_code", "_tracer_cls", "_tracer_extras", "_lineno_map", "_prologue_start"):
            continue
        if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs") or name.endswith("_hooks_always_called"):
            value = type(value)()
        elif name == "meta":
            # Tensors: what buffers held before tracing changed them, for AOTInductor.
            plain = (str, int, float, bool, type(None), torch.Tensor)
            value = {key: kept for key, kept in value.items() if isinstance(kept, plain)}
        elif callable(value) and not isinstance(value, torch.nn.Module | compat.OperatorBase):
            continue
        state[name] = value
    return state


def _graph_data(graph: torch.fx.Graph) -> dict[str, Any]:
    index = {node: NodeRef(position) for position, node in enumerate(graph.nodes)}
    nodes = []
    for node in graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), index.__getitem__)
        nodes.append((node.op, _target_data(node.target), args, kwargs, node.name, node.type, _meta_data(node.meta)))
    return {"nodes": nodes, "codegen": graph._codegen}


def _meta_data(meta: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in meta.items() if name not in DROPPED_META}
    stack = kept.pop("source_fn_stack", None)
    if stack:
        # Only the name of the last function is read, for the names of kernels.
        last = stack[-1][1]
        name = last if isinstance(last, str) else getattr(last, "__name__", "fn")
        kept["source_fn_stack"] = [(str(stack[-1][0]), name)]
    return kept


def _make_graph_module(state: dict[str, Any], data: dict[str, Any]) -> torch.fx.GraphModule:
    gm = torch.fx.GraphModule.__new__(torch.fx.GraphModule)
    vars(gm).update(state)
    graph = torch.fx.Graph(gm)
    made: list[torch.fx.Node] = []

    def resolve(value: Any) -> Any:
        return made[value.index] if isinstance(value, NodeRef) else value

    for op, target, args, kwargs, name, kind, meta in data["nodes"]:
        if isinstance(target, _Attribute):
            target = _make_attribute(target.module, target.name)
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), resolve)
        node = graph.create_node(op, target, args, kwargs, name, kind)
        node.meta = meta
        made.append(node)
    graph._codegen = data["codegen"]
    # The setter compiles the code into a class of this module's own, which is what gives it its `forward`.
    gm.graph = graph
    return gm

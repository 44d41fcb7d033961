"""The reply of an `fx_graph` job: a compiled graph as plain data, and how the parent loads it.

The child's word is taken for what the generated code computes, which is no more than running it does. Everything
else is checked: no pickle, no evaluation of text before it is proven to be small arithmetic, every value's type
against a table, and one :class:`Budget` for all of it. Malformed data is a WireError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sandbox.errors import CompileFailed, SandboxError, UnserializableError, WireError
from sandbox.inductor import compat, counting, expressions, kernels, logs, outputcode
from sandbox.inductor.budget import Budget
from sandbox.inductor.logs import replay_logs
from sandbox.inductor.outputcode import constants_of

__all__ = [
    "Checked", "Sizes", "check_later", "constants_of", "decode_graph", "encode_graph", "load_later", "replay_logs",
    "symbols_of",
]  # fmt: skip


# In the child -------------------------------------------------------------------------------------------------


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
    graph = outputcode.encode(code, constants)
    for guard in shape_env.guards:
        unknown = {symbol.name for symbol in guard.expr.free_symbols} - symbols
        if unknown:
            raise UnserializableError("guard", f"{guard.expr} is about symbols made while lowering: {sorted(unknown)}")
    guards = [
        {"expr": expressions.encode(guard.expr), "size_oblivious": bool(getattr(guard, "size_oblivious", False))}
        for guard in shape_env.guards
    ]
    return {"graph": graph, "guards": guards}


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
        UnserializableError: when a constant lives on a device that is not there.
    """
    budget = Budget()
    shape_env = _shape_env(example_inputs)
    checked = _checked(data, gm, len(example_inputs), Sizes.of(shape_env), budget, shape_env)
    code = _loaded(checked, data, gm, inputs_to_check, graph_kwargs, region)
    budget.restart()
    for expr, size_oblivious in checked.guards:
        budget.spend("guards", 0)  # looks at the clock
        _add_guard(shape_env, expr, size_oblivious)
    if bool(graph_kwargs.get("cudagraphs")) and code.disabled_cudagraphs_reason:
        compat.BoxedBool.disable(graph_kwargs["cudagraphs"])
    _hand_on(code, data)
    return code


def check_later(data: Any, gm: torch.fx.GraphModule, sizes: Sizes, inputs: int) -> Checked:
    """The first half of :func:`decode_graph` when it is too late for guards, in any thread: nothing is loaded, and no
    ShapeEnv read or changed.

    Args:
        sizes: :meth:`Sizes.here` when the graph was traced.
        inputs: of the graph, a count.

    Raises:
        WireError: as :func:`decode_graph`.
    """
    return _checked(data, gm, inputs, sizes, Budget())


def load_later(
    checked: Checked,
    data: Any,
    gm: torch.fx.GraphModule,
    inputs_to_check: Sequence[int],
    graph_kwargs: dict[str, Any],
    region: str | None = None,
) -> Any:
    """The second half: returns the OutputCode. Whoever calls it keeps other compiles out meanwhile.

    Args:
        checked: what :func:`check_later` has made of ``data``.

    Raises:
        WireError, UnserializableError: as :func:`decode_graph`.
    """
    code = _loaded(checked, data, gm, inputs_to_check, graph_kwargs, region)
    _hand_on(code, data)
    return code


@dataclass(frozen=True)
class Sizes:
    """What this process knows of the symbolic sizes of a graph."""

    symbols: dict[str, Any]
    """The symbols by name."""
    hints: dict[Any, Any]
    """Symbol -> the value that it had when traced."""
    symbolic: bool
    """Whether there may be guards over them."""

    @staticmethod
    def of(shape_env: Any) -> Sizes:
        """Those of a ShapeEnv, or of none."""
        return Sizes(_symbols(shape_env), dict(compat.hints_of(shape_env)) if shape_env else {}, shape_env is not None)

    @staticmethod
    def here(example_inputs: Sequence[Any]) -> Sizes:
        """Those of the graph that this thread is compiling."""
        return Sizes.of(_shape_env(example_inputs))


@dataclass(frozen=True)
class Checked:
    """A reply that is well-formed. Nothing is applied or loaded yet."""

    kernels: dict[str, dict[str, str]]
    guards: list[tuple[Any, bool]]
    """Expressions, and whether they are size-oblivious."""
    code: Any
    """The OutputCode, which cannot be called yet."""


def _checked(
    data: Any, gm: torch.fx.GraphModule, inputs: int, sizes: Sizes, budget: Budget, shape_env: Any = None
) -> Checked:
    """``shape_env``: where Inductor is going to evaluate the strides at once."""
    try:
        budget.admit(data)
        if not isinstance(data, dict):
            raise WireError("the reply is not a table")
        built = kernels.check(data.get("kernels"))
        counting.check(data.get("counts"))
        logs.check(data)
        guards = _guards(data.get("guards"), sizes, budget)
        code = outputcode.decode(data.get("graph"), gm, frozenset(sizes.symbols), inputs, budget)
        _try_strides(code.output_strides, shape_env)
    except SandboxError:
        raise
    except Exception as error:
        raise WireError(f"the reply cannot be read: {type(error).__name__}") from error
    return Checked(built, guards, code)


def _loaded(
    checked: Checked,
    data: dict[str, Any],
    gm: torch.fx.GraphModule,
    inputs_to_check: Sequence[int],
    graph_kwargs: dict[str, Any],
    region: str | None,
) -> Any:
    code = checked.code
    code.compile_region_name = region
    code.fx_kwargs = graph_kwargs
    code.inputs_to_check = inputs_to_check
    if data["graph"].get("_wrap_compiled_regions"):
        code._original_gm = _without_metadata(gm)
    constants = compat.CompiledFxGraphConstantsWithGm(gm)
    with kernels.loading(checked.kernels):
        try:
            code.after_deserialization(constants)
        except (CompileFailed, TimeoutError):
            raise  # of a kernel that was compiled late; a deadline of the caller's
        except Exception as error:
            # Generated code may raise anything when it is imported.
            raise WireError(f"the compiled graph cannot be loaded: {type(error).__name__}: {error}") from error
    return code


def check_package(data: Any) -> Any:
    """Check the reply for an AOTInductor package, hand its counts on, and return what tells of its files.

    Raises:
        WireError: it is malformed.
    """
    Budget().admit(data)
    if not isinstance(data, dict) or "aoti" not in data:
        raise WireError("the reply holds no package")
    logs.check(data)
    counting.apply(data.get("counts"))
    return data["aoti"]


def _hand_on(code: Any, data: dict[str, Any]) -> None:
    counting.apply(data["counts"])
    if compat.GraphLowering.save_output_code is not None:
        compat.GraphLowering.save_output_code(code.source_code)


def _try_strides(strides: list[tuple[str, ...] | None] | None, shape_env: Any) -> None:
    """Evaluate what Inductor will evaluate when the graph is in use, where an error would reach the user."""
    context = compat.TracingContext.try_get()
    if context is None or context.output_strides is None:
        return
    if strides is None:
        raise WireError("reply: 'output_strides' is missing")
    for text in (text for item in strides for text in item or ()):
        value = int(text) if shape_env is None else shape_env.evaluate_symexpr(text)
        if not isinstance(value, int | float | sympy.Number):
            raise WireError("a stride of the reply is not a number")


def _add_guard(shape_env: Any, expr: Any, size_oblivious: bool) -> None:
    """Evaluate a guard as lowering did in the child: that adds it here, with what follows from it."""
    try:
        holds = shape_env.evaluate_expr(expr, size_oblivious=size_oblivious)
    except Exception as error:
        # What evaluates in the child evaluates here; all else is a guard that lowering never made.
        raise WireError(f"a guard of the reply cannot be evaluated: {type(error).__name__}") from error
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


def _guards(data: Any, sizes: Sizes, budget: Budget) -> list[tuple[Any, bool]]:
    if not isinstance(data, list) or (data and not sizes.symbolic):
        raise WireError("the reply's guards are malformed, or there is no ShapeEnv to add them to")
    found = []
    for item in data:
        budget.spend("guards")
        match item:
            case {"expr": list(expr), "size_oblivious": bool(oblivious), **rest} if not rest:
                made = expressions.decode(expr, sizes.symbols, budget)
                # Before any is added: one that is false for the traced sizes spoils all.
                if made.xreplace(sizes.hints) == sympy.false:
                    raise WireError("a guard of the reply does not hold for the shapes that were traced")
                found.append((made, oblivious))
            case _:
                raise WireError("a guard of the reply is malformed")
    return found

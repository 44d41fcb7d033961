"""The modes `async` and `progressive`: a graph that runs at once, and is exchanged for better code when that is there.

Until a child has made it, the graph runs as it is: uncompiled (`async`), or compiled in a hurry (`progressive`). The
better code is made, loaded and saved by a thread that nobody waits for; a call only looks whether it is there.
Whatever goes wrong on the way leaves the graph running as it did: nothing is raised to a caller who did not ask for
the compile.

Three things keep results the same before, during and after the exchange. Random numbers: those of uncompiled graphs
are those of compiled ones (:mod:`sandbox.inductor.philox`). Strides: the child is told to keep those of every output,
and code that does not is refused, since a backward graph may have been compiled for them. Guards: what the child
assumed of sizes comes too late for Dynamo, so it is asked again at each call, and a call for which it does not hold
runs the graph as it did before.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final

import sympy
import torch

from sandbox.errors import SandboxError
from sandbox.inductor import compat

# Strides ------------------------------------------------------------------------------------------------------


def _output(gm: torch.fx.GraphModule) -> torch.fx.Node:
    return next(node for node in reversed(gm.graph.nodes) if node.op == "output")


@contextlib.contextmanager
def keeping_strides(gm: torch.fx.GraphModule) -> Iterator[None]:
    """While the block runs, the graph says that every output must keep its strides, not only those that users see."""
    name, output = "user_visible_output_idxs", _output(gm)
    before = output.meta.get(name)
    nodes: Sequence[Any] = output.args[0]
    output.meta[name] = [place for place, node in enumerate(nodes) if isinstance(node, torch.fx.Node)]
    try:
        yield
    finally:
        if before is None:
            del output.meta[name]
        else:
            output.meta[name] = before


def keeps_more(gm: torch.fx.GraphModule) -> bool:
    """Whether :func:`keeping_strides` asks for more than the graph does: for what only a backward pass sees."""
    output = _output(gm)
    visible = set(output.meta.get("user_visible_output_idxs", ()))
    nodes: Sequence[Any] = output.args[0]
    return any(isinstance(node, torch.fx.Node) and place not in visible for place, node in enumerate(nodes))


def traced_strides(gm: torch.fx.GraphModule) -> list[tuple[tuple[str, ...], tuple[str, ...]] | None]:
    """Sizes and strides of each output as traced, as text; None for what is no strided tensor."""
    found: list[tuple[tuple[str, ...], tuple[str, ...]] | None] = []
    for node in _output(gm).args[0]:
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            found.append((tuple(map(_text, value.shape)), tuple(map(_text, value.stride()))))
        else:
            found.append(None)
    return found


def same_strides(
    traced: Sequence[tuple[tuple[str, ...], tuple[str, ...]] | None], strides: Sequence[Sequence[str] | None] | None
) -> bool:
    """Whether compiled code gives each output the strides that were traced; those of a size of 1 do not matter."""
    if strides is None or len(traced) != len(strides):
        return False
    for ours, theirs in zip(traced, strides, strict=True):
        if ours is None or theirs is None or "0" in ours[0]:
            continue
        if len(ours[1]) != len(theirs):
            return False
        for size, stride, made in zip(*ours, theirs, strict=True):
            if size != "1" and stride != made:
                return False
    return True


def _text(value: Any) -> str:
    return str(value.node.expr) if isinstance(value, torch.SymInt) else str(value)


# Guards -------------------------------------------------------------------------------------------------------


def guards_text(guards: Sequence[Any], symints: Sequence[Any]) -> str | None:
    """Guards as the expression that Inductor's cache keeps: `L['t0']` is the first of ``symints``. Empty if there is
    nothing to ask; None if they cannot be asked, since they are about a symbol that is no input of the graph."""
    names = {}
    for place, value in enumerate(symints):
        symbol = value.node.expr
        if isinstance(symbol, sympy.Symbol):
            names[symbol] = sympy.Symbol(f"L['t{place}']", **symbol.assumptions0)
    wanted = []
    for guard in guards:
        if guard == sympy.true:
            continue
        if not guard.free_symbols <= names.keys():
            return None
        # Printed from an expression that was decoded by an allow-list of functions: no text of the child's.
        wanted.append(f"({compat.PythonPrinter().doprint(guard.xreplace(names))})")
    return " and ".join(dict.fromkeys(wanted))


def check_of(text: str, places: Sequence[int]) -> Callable[[Sequence[Any]], bool] | None:
    """A function that says whether :func:`guards_text` holds for the inputs of a call; None if there is nothing to ask.

    Args:
        places: which inputs the symints are.
    """
    if not text:
        return None
    code = compile(text, "<guards>", "eval")
    names = dict(compat.SYMPY_INTERP)

    def check(inputs: Sequence[Any]) -> bool:
        sizes = {f"t{index}": inputs[place] for index, place in enumerate(places)}
        if any(type(size) is not int for size in sizes.values()):
            return False  # while something is being traced: nothing may be asked of its symbols
        return bool(eval(code, names, {"L": sizes}))

    return check


# Caches -------------------------------------------------------------------------------------------------------

#: Ends the key of code for which :func:`keeps_more` holds. AOTAutograd's cache pairs forward and backward code by their
#: keys alone, and a backward graph is compiled for the strides of one forward code: two kinds may not share a key.
KEPT: Final = "-strides"


class Saving:
    """What Inductor's cache needs to save a graph later: taken from the thread that compiles, when it would save."""

    def __init__(self, save: Callable[..., None], key: str, example_inputs: Sequence[Any], *where: Any) -> None:
        """``save``: `FxGraphCache._save_graph`; the rest: its arguments but the graph."""
        self._save = save
        self._key = key
        self._symints = [value for _, value in symints_of(example_inputs)]
        self._where = where
        self.guards: str | None = None
        context = compat.TracingContext.try_get()
        if self._symints and context is not None and context.fake_mode is not None:
            shape_env = context.fake_mode.shape_env
            pruned = shape_env.get_pruned_guards(self._symints)
            self.guards = shape_env.produce_guards_expression(placeholders=self._symints, guards=pruned)

    def save(self, code: Any, guards: str) -> None:
        """Save ``code``. ``guards``: of :func:`guards_text`, what it asks beyond those that there were then."""
        both = " and ".join(text for text in (self.guards, guards) if text) or None
        # Stands in for the ShapeEnv, which the service may be using: what it would be asked is known already.
        shape_env = SimpleNamespace(
            get_pruned_guards=lambda symints: [],
            produce_guards_expression=lambda placeholders, guards: both,
            cleanup=lambda: None,
        )
        with compat.tracing(SimpleNamespace(fake_mode=SimpleNamespace(shape_env=shape_env))):
            self._save(self._key, code, self._symints, *self._where)


# The graph itself ---------------------------------------------------------------------------------------------


def repeatable(gm: torch.fx.GraphModule) -> bool:
    """Whether a call that has failed half-way can be made again: nothing is written to, drawn or told to others."""
    for module in gm.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, compat.OpOverload):
                if node.op in ("call_function", "call_module") and getattr(node.target, "__module__", "") not in _PURE:
                    return False
                continue
            drawn = torch.Tag.nondeterministic_seeded in node.target.tags or "inductor_seed" in str(node.target)
            if node.target._schema.is_mutable or drawn or node.target.namespace not in ("aten", "prims"):
                return False
    return True


_PURE: Final = ("_operator", "math", "torch", "torch.fx.experimental.sym_node")


Run = Callable[[Any], Any]


def _guarded(check: Callable[[Any], bool], code: Run, first: Run) -> Run:
    return lambda inputs: code(inputs) if check(inputs) else first(inputs)


class _Trial:
    """The first call of the better code, where it can be made again: an error that the code before does not raise is a
    fault of the better code, and not the caller's to see. Several threads may make that call."""

    def __init__(self, code: Run, first: Run, passed: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """``passed``, ``failed``: told how a call has ended."""
        self._code = code
        self._first = first
        self._passed = passed
        self._failed = failed

    def __call__(self, inputs: Any) -> Any:
        kept, error = list(inputs), None
        try:
            made = self._code(inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # noqa: BLE001 - raised by the code before as well, or told to `failed`
            error = problem
        if error is None:
            self._passed()
            return made
        made = self._first(kept)
        self._failed(error)
        return made


_trials: Final = threading.Lock()


@functools.cache
def deferred_class() -> type[Any]:
    """The class of graphs that may be exchanged. Made on first use, since its base is Inductor's."""

    class DeferredOutputCode(compat.OutputCode):  # type: ignore[misc]
        """Runs the code that it began with until :meth:`exchange`. Takes its inputs as one list, which is cleared."""

        def __init__(self, first: Any, more: bool, begin: Callable[[Any], None] | None = None) -> None:
            """``more``: :func:`keeps_more`. ``begin``: called once, with this object, when it is complete and the
            better code may be made; None if there will be none."""
            self.more = more
            # AOTAutograd copies our attributes to the functions around us, so what is to be forgotten lies one deeper.
            # Of it an exchange changes `run` and `unchanged`, and any mixture of both is right: calls need no lock.
            self._now = SimpleNamespace(
                run=first, unchanged=True, context=contextvars.copy_context(), arguments=None, saving=None
            )
            self._begin = begin
            self._began = time.time_ns()
            self._boxed_call = True
            self._fx_graph_cache_key: str | None = None  # what both of Inductor's caches know it by
            self._fx_graph_cache_debug_lines: list[str] | None = None
            self.guards_expr: str | None = None  # AOTAutograd's cache asks for the entry that has just these

        def __call__(self, inputs: Any) -> Any:
            return self._now.run(inputs)

        @property
        def unchanged(self) -> bool:
            """Whether it runs the code that it began with."""
            found: bool = self._now.unchanged
            return found

        def save_with(self, saving: Saving) -> None:
            """How the better code is to be saved."""
            self._now.saving, self.guards_expr = saving, saving.guards

        def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: dict[str, Any]) -> None:
            # Recorded for the first code, they would have to be recorded again for the better one, by whoever calls.
            if graph_kwargs.get("cudagraphs"):
                compat.BoxedBool.disable(graph_kwargs["cudagraphs"])
            self._now.run.post_compile(example_inputs, constants, graph_kwargs)
            self._now.arguments = ([value for value in example_inputs if isinstance(value, torch.SymInt)], constants, {
                **graph_kwargs, "cudagraphs": compat.BoxedBool(False),
            })  # fmt: skip
            begin, self._begin = self._begin, None
            if begin is not None:
                begin(self)

        def set_triton_bundle(self, triton_bundle: Any) -> None:
            pass

        def within(self, function: Callable[[], Any]) -> Any:
            """Call ``function`` under the settings of the compile."""
            if self._now.context is None:
                raise SandboxError("the compile is settled")
            return self._now.context.copy().run(function)

        def settle(self) -> None:
            """Nothing more will come: forget what only a compile needs, graph and settings of the caller included."""
            self._now.context = self._now.arguments = self._now.saving = None

        def exchange(self, code: Any, guards: str, places: Sequence[int], again: bool, failed: Any) -> None:
            """Save ``code``, and run it from now on. In any thread.

            Args:
                guards, places: as of :func:`check_of`.
                again: :func:`repeatable`.
                failed: called with its error if the first call shows that the code is not usable.
            """
            code._fx_graph_cache_key = self._fx_graph_cache_key
            code._fx_graph_cache_debug_lines = self._fx_graph_cache_debug_lines
            code._time_taken_ns = time.time_ns() - self._began
            if self._now.saving is not None:
                self._now.saving.save(code, guards)
            code.post_compile(*self._now.arguments)
            first, check = self._now.run, check_of(guards, places)
            better: Run = code if check is None else _guarded(check, code, first)
            self._now.unchanged = False
            if not again:
                self._now.run = better
                return

            def passed() -> None:
                with _trials:
                    if self._now.run is trial:
                        self._now.run = better

            def not_usable(error: Exception) -> None:
                with _trials:
                    told, self._now.run = self._now.run is first, first
                    self._now.unchanged = True
                if not told:
                    failed(error)

            tried = _Trial(code, first, passed, not_usable)
            trial: Run = tried if check is None else _guarded(check, tried, first)
            self._now.run = trial

    return DeferredOutputCode


def symints_of(example_inputs: Sequence[Any]) -> list[tuple[int, Any]]:
    """Place and value of each input that is a symbolic size with a value, as Inductor's cache counts them."""
    return [
        (place, value)
        for place, value in enumerate(example_inputs)
        if isinstance(value, torch.SymInt) and value.node.has_hint()
    ]

"""While the graph of an inference call runs uncompiled, what runs is the program as Dynamo has traced it.

AOTAutograd hands Inductor a graph that is decomposed: a layer norm is ten operators there, and takes several times as
long when they run one by one. Dynamo's own graph has the operators that the user wrote, so calls go to that until there
is compiled code. Only where it makes no difference but to the time: no graph that draws random numbers from Inductor's
seeds (eager ones are others), and none with a backward pass, whose graph would never be asked for.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sandbox.inductor import compat, eager
from sandbox.inductor.deferred import repeatable


class _Made(NamedTuple):
    code: Any
    """A deferred graph, or one that stays uncompiled."""
    usable: bool
    again: bool
    """Whether a call of it that failed can be made again."""


#: The graphs of the program that AOTAutograd works on now, in this thread; None: nobody asks.
_made: contextvars.ContextVar[list[_Made] | None] = contextvars.ContextVar("sandbox_deferred_graphs", default=None)


def note(code: Any, gm: torch.fx.GraphModule, graph_kwargs: dict[str, Any]) -> None:
    """Tell that ``code``, a deferred graph, begins with ``gm`` uncompiled. Arguments as of the compile."""
    made = _made.get()
    if made is not None:
        inference = bool(graph_kwargs.get("is_inference")) and not graph_kwargs.get("is_backward")
        made.append(_Made(code, inference and not eager.draws(gm), repeatable(gm)))


@contextlib.contextmanager
def _collecting() -> Iterator[list[_Made]]:
    made: list[_Made] = []
    token = _made.set(made)
    try:
        yield made
    finally:
        _made.reset(token)


def calls(aot_autograd: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for Dynamo's `AotAutograd.__call__`, given here: it makes one callable of one program.

    Its signature is `(self, gm, example_inputs, **kwargs)`.
    """

    @functools.wraps(aot_autograd)
    def call(self: Any, gm: Any, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not isinstance(gm, torch.fx.GraphModule) or not compat.is_inductors_own(self):
            return aot_autograd(self, gm, example_inputs, **kwargs)
        with _collecting() as made:
            compiled = aot_autograd(self, gm, example_inputs, **kwargs)
        # One program can become several graphs: those stay as they are.
        usable = len(made) == 1 and made[0].usable and not _switches(gm)
        return _switch(gm, compiled, made[0]) if usable else compiled

    return call


def _calls(gm: torch.fx.GraphModule) -> Iterator[str]:
    """The name of each function and method that the program calls, subgraphs included."""
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_method":
                    yield str(node.target)
                elif node.op == "call_function":
                    yield getattr(node.target, "__name__", str(node.target))


def _switches(gm: torch.fx.GraphModule) -> bool:
    """Whether the program switches a state of its thread by calls in pairs (autocast, vmap), of which an error would
    skip the second. Of the grad mode, see `run` below."""
    return any(_SWITCH.search(name) and name != "_set_grad_enabled" for name in _calls(gm))


def _writes(gm: torch.fx.GraphModule) -> bool:
    """Whether it changes anything in place, by the names of what it calls: `add_`, `setitem`, `iadd`."""
    return any((name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE for name in _calls(gm))


def _switch(gm: torch.fx.GraphModule, compiled: Callable[..., Any], made: _Made) -> Callable[..., Any]:
    """``compiled``, but the program itself while there is nothing better."""
    compat.LazyGraphModule.force_recompile(gm)  # passes may have changed it
    again = made.again and not _writes(gm)
    program = gm.forward  # AOTAutograd keeps the program as well, as long as there is its callable
    fails = False

    def run(*arguments: Any) -> Any:
        nonlocal fails
        # Dynamo has traced through modes of the caller: what they do is in the program, and is not to be done twice.
        if fails or not made.code.unchanged or compat.function_modes():
            return compiled(*arguments)
        grad = torch.is_grad_enabled()
        try:
            return program(*arguments)
        except BaseException as error:
            # What the program switches off and on again, as for `no_grad`, are calls in it: an error skips the second.
            torch.set_grad_enabled(grad)
            if not again or not isinstance(error, Exception) or isinstance(error, _NO_MEMORY):
                raise
        # An operator that only its decomposition knows for these inputs; or the user's own error, which comes again.
        found = compiled(*arguments)
        fails = True
        return found

    # What AOTAutograd tells of its callable; not Dynamo's marks, by which Dynamo would call it instead of this one.
    run.__dict__.update({name: value for name, value in vars(compiled).items() if not name.startswith("_torchdynamo")})
    return run


_SWITCH = re.compile(r"enter|exit|push|pop|nesting|^_?set_(?!item)|inference_mode")
_IN_PLACE = frozenset(name for name in dir(operator) if name.startswith("i")) | {"setitem", "delitem", "setattr"}
_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)

__all__ = ["calls", "note"]

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sandbox.inductor import eager

#: The deferred graphs of the program that AOTAutograd works on now, in this thread; None: nobody asks.
_made: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("sandbox_deferred_graphs", default=None)


def note(code: Any, gm: torch.fx.GraphModule, graph_kwargs: dict[str, Any]) -> None:
    """Tell that ``code``, a deferred graph, begins with ``gm`` uncompiled. Arguments as of the compile."""
    made = _made.get()
    if made is None:
        return
    usable = graph_kwargs.get("is_inference") and not graph_kwargs.get("is_backward") and not eager.draws(gm)
    made.append(code if usable else None)


@contextlib.contextmanager
def _collecting() -> Iterator[list[Any]]:
    made: list[Any] = []
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
        with _collecting() as made:
            compiled = aot_autograd(self, gm, example_inputs, **kwargs)
        # One program can become several graphs, and compiled autograd boxes its inputs: those stay as they are.
        if len(made) != 1 or made[0] is None or not isinstance(gm, torch.fx.GraphModule):
            return compiled
        return _switch(gm, compiled, made[0])

    return call


def _switch(gm: torch.fx.GraphModule, compiled: Callable[..., Any], code: Any) -> Callable[..., Any]:
    """``compiled``, but the program itself while ``code`` has nothing better."""
    gm.recompile()  # what passes have left, and what is made on the first call otherwise
    uncompiled = gm.forward  # AOTAutograd keeps the program as well, as long as there is its callable

    def run(*arguments: Any) -> Any:
        return uncompiled(*arguments) if code.unchanged else compiled(*arguments)

    # What AOTAutograd tells of its callable; not Dynamo's marks, by which Dynamo would call it instead of this one.
    run.__dict__.update({name: value for name, value in vars(compiled).items() if not name.startswith("_torchdynamo")})
    return run


__all__ = ["calls", "note"]

"""The ladder's step `eager`: run the graph that was to be compiled, uncompiled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from sandbox.inductor import compat, philox

#: Inductor's random ops, which say nothing of their seed when they run uncompiled, and what stands in for them.
_RANDOM: Final[dict[str, Callable[..., torch.Tensor]]] = {
    "prims.inductor_seed.default": philox.seed,
    "prims.inductor_seeds.default": philox.seeds,
    "prims.inductor_random.default": philox.random,
    "prims.inductor_randint.default": philox.randint,
}
_SEEDED: Final = ("prims.inductor_random.default", "prims.inductor_randint.default")

#: Inductor's numbers of the graphs whose forward pass runs uncompiled; forward and backward share a number.
_uncompiled_forwards: set[int] = set()


def _random_nodes(gm: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from (n for n in module.graph.nodes if n.op == "call_function" and str(n.target) in _RANDOM)


def draws(gm: torch.fx.GraphModule) -> bool:
    """Whether it draws random numbers by Inductor's own operators, which eager code does not use."""
    return next(_random_nodes(gm), None) is not None


def seeded_on_gpu(gm: torch.fx.GraphModule) -> bool:
    """Whether it draws numbers from seeds on a GPU, where compiled and uncompiled code draw different ones."""
    for node in _random_nodes(gm):
        value = node.meta.get("val")
        if str(node.target) in _SEEDED and isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return True
    return False


def note(graph_kwargs: dict[str, Any]) -> None:
    """A graph is settled: it runs uncompiled."""
    if not graph_kwargs.get("is_backward") and isinstance(graph_kwargs.get("graph_id"), int):
        _uncompiled_forwards.add(graph_kwargs["graph_id"])


def mixes(gm: torch.fx.GraphModule, graph_kwargs: dict[str, Any], *, uncompiled: bool) -> bool:
    """Whether running this backward graph (un)compiled would recompute another random mask than its forward used.

    On the CPU compiled and uncompiled numbers are the same. On a GPU they are not (see `sandbox.inductor.philox`), so
    there a backward graph with seeded random ops has to run as its forward graph did.
    """
    if not graph_kwargs.get("is_backward") or not seeded_on_gpu(gm):
        return False
    return (graph_kwargs.get("graph_id") in _uncompiled_forwards) is not uncompiled


def seeded(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of ``gm`` whose random ops follow their seeds, subgraphs included; tensors are shared. ``gm`` itself
    if it has none."""
    if not draws(gm):
        return gm
    graph = torch.fx.Graph()
    copied: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.graph_copy(gm.graph, copied)
    (last,) = (node for node in gm.graph.nodes if node.op == "output")
    graph.output(output).meta = copy.copy(last.meta)
    graph.set_codegen(copy.copy(gm.graph._codegen))
    made = torch.fx.GraphModule(gm, graph)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _RANDOM.get(str(node.target), node.target)
        elif node.op in ("get_attr", "call_module"):
            # GraphModule made fresh modules on the way there, so ``gm`` keeps its own subgraphs.
            path, _, name = str(node.target).rpartition(".")
            owner = made.get_submodule(path)
            nested = getattr(owner, name)
            if isinstance(nested, torch.fx.GraphModule):
                setattr(owner, name, seeded(nested))
    made.recompile()
    return made


@functools.cache
def eager_class() -> type[Any]:
    """The class of uncompiled graphs. Made on first use, since its base is Inductor's."""

    class EagerOutputCode(compat.OutputCode):  # type: ignore[misc]
        """Runs an FX graph after AOTAutograd op by op. Takes its inputs as one list and clears it, as compiled code
        does. Never cached: the next process tries to compile again."""

        unchanged: Final = True
        """There is no better code for it."""

        def __init__(self, gm: torch.fx.GraphModule) -> None:
            self._gm = seeded(gm)
            self._forward: Callable[..., Any] | None = None
            self._boxed_call = True

        # AOTAutograd's cache keeps a graph by the key of its compiled code: there is none.
        @property
        def _fx_graph_cache_key(self) -> None:
            return None

        @_fx_graph_cache_key.setter
        def _fx_graph_cache_key(self, value: str | None) -> None:
            pass

        def __call__(self, inputs: Sequence[Any]) -> Any:
            if self._forward is None:
                # The graph may have changed since its code was last written, and may be a lazy one.
                self._gm.recompile()
                self._forward = self._gm.forward
            arguments = list(inputs)
            if isinstance(inputs, list):
                inputs.clear()
            with torch.no_grad():  # AOTAutograd has taken autograd out of the graph
                return self._forward(*arguments)

        def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: dict[str, Any]) -> None:
            cudagraphs = graph_kwargs.get("cudagraphs")
            if cudagraphs:
                compat.BoxedBool.disable(cudagraphs)
            context = compat.TracingContext.try_get()
            if context is not None and context.output_strides is not None:
                # None: AOTAutograd keeps the strides that it traced, which are those of eager.
                (output,) = (node for node in self._gm.graph.nodes if node.op == "output")
                context.output_strides.extend(None for _ in output.args[0])

        def set_triton_bundle(self, triton_bundle: Any) -> None:
            pass

    return EagerOutputCode

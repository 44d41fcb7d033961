"""Post-AOT graphs for a GPU, made on a machine without one: captured on the CPU, then traced again on `cuda`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from sandbox.inductor import compat

CUDA = torch.device("cuda", 0)


def captured(call: Callable[[Callable[..., Any]], Any], training: bool = False) -> list[tuple[Any, list[Any], str]]:
    """The graphs of what ``call`` does with the function that it is given for `torch.compile`, on `cuda`: each with its
    inputs and its role."""
    found: list[tuple[Any, list[Any], str]] = []

    def take(role: str, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if any(isinstance(node.meta.get("val"), torch.Tensor) for node in gm.graph.nodes):  # else it only counts
            with V.set_fake_mode(detect_fake_mode(inputs)):
                joint_graph_passes(gm)  # Inductor has them run before a graph comes to the hook
            found.append((*moved(gm, inputs), role))
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=functools.partial(take, "forward" if training else "inference"),
        bw_compiler=functools.partial(take, "backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compiler.reset()
    call(lambda function: torch.compile(function, backend=backend, dynamic=False))
    return found


@functools.cache
def lend_device_guard() -> Any:
    """For as long as this process lives: so do the graphs."""
    lent = compat.lent_device_guard()
    lent.__enter__()
    return lent


class _OnCuda(torch.fx.Interpreter):  # type: ignore[misc]
    """Runs a graph with its devices replaced, and with the given tensors for its constants."""

    def __init__(self, gm: torch.fx.GraphModule, constants: dict[str, Any]) -> None:
        super().__init__(gm)
        self.constants = constants

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda one: CUDA if isinstance(one, torch.device) else one, (args, kwargs))
        return super().call_function(target, args, kwargs)


def moved(gm: torch.fx.GraphModule, inputs: list[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """The same graph with every tensor on `cuda`, FakeTensors for its inputs, and its constants among them."""
    lend_device_guard()
    names = list(dict.fromkeys(node.target for node in gm.graph.nodes if node.op == "get_attr"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = [
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=CUDA)
            if isinstance(one, torch.Tensor)
            else one
            for one in (*inputs, *(getattr(gm, name) for name in names))
        ]

        def run(*values: Any) -> Any:
            runner = _OnCuda(gm, dict(zip(names, values[len(inputs) :], strict=True)))
            return tuple(runner.run(*values[: len(inputs)]))

        return make_fx(run, tracing_mode="real")(*fake), fake

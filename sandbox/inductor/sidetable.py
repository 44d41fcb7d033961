"""User-defined Triton kernels of a graph: the process-local table that its nodes point into, carried along.

A node names its kernel by an index into Inductor's side table. The entries that a graph uses travel under those
same indices and are put into the child's table there, so the graph itself needs no change.
"""

from __future__ import annotations

from typing import Any

import torch

from sandbox.inductor import compat
from sandbox.inductor.jitted import kernel_data, make_kernel


def _wrapper_nodes(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    wrappers = (compat.triton_kernel_wrapper_functional, compat.triton_kernel_wrapper_mutation)
    return [
        node
        for module in gm.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and node.target in wrappers
    ]


def used_by(gm: torch.fx.GraphModule) -> dict[str, Any]:
    """The entries of the side table that ``gm`` uses: `{kernels: {index: data}, constants: {index: args}}`.

    Raises:
        UnserializableError: reason `triton_kernel`, when a kernel has no source or refers to what cannot travel.
    """
    table = compat.kernel_side_table
    kernels: dict[int, Any] = {}
    constants: dict[int, Any] = {}
    for node in _wrapper_nodes(gm):
        index, arguments = node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"]
        if index not in kernels:
            kernels[index] = kernel_data(table.get_kernel(index), {})
        constants[arguments] = table.get_constant_args(arguments)
    return {"kernels": kernels, "constants": constants}


def install(data: dict[str, Any]) -> None:
    """Put the entries into this process's side table, under the indices that the graph names."""
    table = compat.kernel_side_table
    made: dict[str, Any] = {}
    for index, entry in data["kernels"].items():
        kernel = make_kernel(entry, made)
        table.id_to_kernel[index] = kernel
        table.kernel_to_id[kernel] = index
    table.constant_args.update(data["constants"])

"""What a service registers with Inductor: a lowering, and passes for its configuration.

The forkserver imports it, too, but not where there is a GPU: Inductor's lowerings start CUDA when they are imported,
and a process that has done so must not be forked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import lowerings, register_lowering

from benchmarks.corpus import registered  # noqa: F401 - the ops that are meant


@register_lowering(torch.ops.corpus_library.lowered.default)
def lowered(x: Any) -> Any:
    return lowerings[torch.ops.aten.mul.Tensor](x, 5)


class ToCosine(CustomGraphPass):
    """A pass of the kind that Inductor's configuration takes."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.aten.sin.default:
                node.target = torch.ops.aten.cos.default

    def uuid(self) -> Any:
        return "to-cosine"


def to_thrice(graph: torch.fx.Graph) -> None:
    """A pass that puts an op of this module into graphs that had none."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.sin.default:
            node.target = torch.ops.corpus_library.thrice.default

"""What a service registers with torch and Inductor: ops, a lowering, a pattern. The forkserver imports it, too."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import lowerings, register_lowering


@torch.library.custom_op("corpus::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _twice_backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
    return grad * 2


twice.register_autograd(_twice_backward)


@torch.library.custom_op("corpus::add_one_", mutates_args=("x",))
def add_one_(x: torch.Tensor) -> None:
    x.add_(1)


LIBRARY = torch.library.Library("corpus_library", "DEF")
LIBRARY.define("thrice(Tensor x) -> Tensor")
LIBRARY.impl("thrice", lambda x: x * 3, "CompositeExplicitAutograd")
torch.library.register_fake("corpus_library::thrice", lambda x: torch.empty_like(x), lib=LIBRARY)
LIBRARY.define("lowered(Tensor x) -> Tensor")
LIBRARY.impl("lowered", lambda x: x * 5, "CompositeExplicitAutograd")
torch.library.register_fake("corpus_library::lowered", lambda x: torch.empty_like(x), lib=LIBRARY)


@register_lowering(torch.ops.corpus_library.lowered.default)
def lowered(x: Any) -> Any:
    return lowerings[torch.ops.aten.mul.Tensor](x, 5)


class ToCosine(torch._inductor.custom_graph_pass.CustomGraphPass):
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

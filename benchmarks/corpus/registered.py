"""Ops that a service registers with torch. The forkserver imports this, too; it brings nothing of Inductor."""

from __future__ import annotations

from typing import Any

import torch


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

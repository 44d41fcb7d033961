"""The graphs of `sandbox bench`: small and distinct, each with its inputs; all results are compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Graph:
    """One thing to compile. ``make`` gives the function and its inputs."""

    name: str
    make: Callable[[], tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]
    backward: bool = False
    """Whether a backward pass follows: a second graph."""

    def call(self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run it; returns the output and, with a backward pass, the gradients of all inputs."""
        if not self.backward:
            with torch.no_grad():
                return [function(*inputs)]
        leaves = [value.detach().clone().requires_grad_(True) for value in inputs]
        output = function(*leaves)
        output.square().mean().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _pointwise() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return lambda x, y: torch.sin(x) * torch.exp(-y.abs()) + x / (1 + y * y), [torch.randn(64, 96), torch.randn(64, 96)]


def _reduction() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return lambda x: (x.var(dim=1) + x.amax(dim=1)).sqrt(), [torch.rand(64, 80) + 1]


def _gelu() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, weight, bias: functional.gelu(x @ weight + bias),
        [torch.randn(32, 48), torch.randn(48, 40), torch.randn(40)],
    )


def _layer_norm() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, weight, bias: functional.layer_norm(x, (72,), weight, bias) + x,
        [torch.randn(24, 72), torch.randn(72), torch.randn(72)],
    )


def _softmax() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return lambda x, mask: torch.softmax(x * 0.125 + mask, dim=-1), [torch.randn(4, 20, 20), torch.randn(20, 20)]


def _mlp() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, first, second: functional.relu(x @ first).tanh() @ second,
        [torch.randn(16, 24), torch.randn(24, 56), torch.randn(56, 8)],
    )


def _warm() -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return lambda x: (x + 1).cos().sum(dim=0), [torch.randn(10, 12)]


STEADY: Final = (
    Graph("pointwise", _pointwise),
    Graph("reduction", _reduction),
    Graph("matmul + bias + gelu", _gelu),
    Graph("layer norm", _layer_norm),
    Graph("softmax", _softmax),
    Graph("small MLP, forward and backward", _mlp, backward=True),
)
#: Compiled before the others and not counted, so that no scheme pays its first steps in "steady".
WARM: Final = Graph("warm-up", _warm)
#: What "first" compiles.
FIRST: Final = STEADY[2]

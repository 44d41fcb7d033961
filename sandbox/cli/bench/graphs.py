"""The graphs of `sandbox bench`: small and distinct; each comes in variants of other sizes, so other code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

#: Comparison with eager, fp32.
RTOL: Final = 1e-4
ATOL: Final = 1e-5


@dataclass(frozen=True)
class Graph:
    """One thing to compile. ``make`` gives the function and its inputs; its argument is the variant, from 0 on."""

    name: str
    make: Callable[[int], tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]
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


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether two lists of results are equal, within ``RTOL`` and ``ATOL``."""
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=RTOL, atol=ATOL) for a, b in zip(found, expected, strict=True)
    )


def _pointwise(variant: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    shape = (64 + variant, 96)
    return lambda x, y: torch.sin(x) * torch.exp(-y.abs()) + x / (1 + y * y), [torch.randn(shape), torch.randn(shape)]


def _reduction(variant: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return lambda x: (x.var(dim=1) + x.amax(dim=1)).sqrt(), [torch.rand(64 + variant, 80) + 1]


def _gelu(variant: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, weight, bias: functional.gelu(x @ weight + bias),
        [torch.randn(32 + variant, 48), torch.randn(48, 40), torch.randn(40)],
    )


def _layer_norm(variant: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, weight, bias: functional.layer_norm(x, (72,), weight, bias) + x,
        [torch.randn(24 + variant, 72), torch.randn(72), torch.randn(72)],
    )


def _softmax(variant: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, mask: torch.softmax(x * 0.125 + mask, dim=-1),
        [torch.randn(4 + variant, 20, 20), torch.randn(20, 20)],
    )


def _mlp(variant: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, first, second: functional.relu(x @ first).tanh() @ second,
        [torch.randn(16 + variant, 24), torch.randn(24, 56), torch.randn(56, 8)],
    )


def _first(variant: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    return (
        lambda x, weight: (functional.silu(x @ weight) * x.mean(dim=0)).sum(dim=1),
        [torch.randn(40 + variant, 32), torch.randn(32, 32)],
    )


STEADY: Final = (
    Graph("pointwise", _pointwise),
    Graph("reduction", _reduction),
    Graph("matmul + bias + gelu", _gelu),
    Graph("layer norm", _layer_norm),
    Graph("softmax", _softmax),
    Graph("small MLP, forward and backward", _mlp, backward=True),
)
#: The first compile of a process. What comes after it is steady.
FIRST: Final = Graph("matmul + silu + sums", _first)
#: What `crash` compiles again and again.
REPEATED: Final = STEADY[2]


class Block(nn.Module):  # type: ignore[misc]
    """What `async` serves: some linear layers, large enough that a request takes some milliseconds on one core."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: (batch, width)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + functional.gelu(layer(norm(x)))
        return x

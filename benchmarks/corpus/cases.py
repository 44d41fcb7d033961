"""How the special cases are written: one function each, that takes what compiles and returns what it computed.

``compile`` is `torch.compile`, or stands for "uncompiled". Every graph that comes of it has to be made in a child.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Compile = Callable[..., Any]

#: name -> function, in the order in which they are written.
CASES: dict[str, Callable[[Compile], Any]] = {}


def case(function: Callable[[Compile], Any]) -> Callable[[Compile], Any]:
    """Take the function up into :data:`CASES`."""
    CASES[function.__name__] = function
    return function


def step(compile: Compile, function: Callable[..., torch.Tensor], *inputs: torch.Tensor, **options: Any) -> Any:
    """Forward and backward: the result and the gradients of all inputs."""
    inputs = tuple(x.detach().clone().requires_grad_(x.dtype.is_floating_point) for x in inputs)
    result = compile(function, **options)(*inputs)
    result.sum().backward()
    return result, [x.grad for x in inputs]

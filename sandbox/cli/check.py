"""Running one of the demo's models compiled and uncompiled, and comparing the two."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from sandbox.cli.models import Model
from sandbox.inductor import compat
from sandbox.inductor.install import install, installed

#: Every run starts from it, so that weights, inputs and random numbers are equal.
SEED: Final = 20_240_731
#: Learning rate of the training step.
RATE: Final = 0.1

Tensors = dict[str, torch.Tensor]


def seed() -> None:
    """Equal random numbers from here on, whichever library draws them."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    if importlib.util.find_spec("numpy") is not None:
        import numpy

        numpy.random.seed(SEED % 2**32)


@dataclass(frozen=True)
class Comparison:
    """Whether two runs agree."""

    compared_with: str
    equal: bool
    max_difference: float
    detail: str = ""
    """The first that differs, when they do not agree."""


def infer(module: nn.Module, inputs: list[tuple[Any, ...]]) -> Tensors:
    """The outputs without gradients, by name."""
    seed()
    with torch.no_grad():
        return {f"output {number}": module(*values).detach().clone() for number, values in enumerate(inputs)}


def train(module: nn.Module, original: nn.Module, inputs: list[tuple[Any, ...]]) -> Tensors:
    """One step on each input: forward, backward, SGD. Loss, gradients and parameters, by name.

    ``module`` is ``original``, or its compiled form, which shares its parameters.
    """
    seed()
    optimizer = torch.optim.SGD(original.parameters(), lr=RATE)
    found: Tensors = {}
    for number, values in enumerate(inputs):
        optimizer.zero_grad()
        output = module(*values)
        # A fixed random functional of the output: gradients of a size that a tolerance means something for.
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(number))
        loss = (output * weights).sum() / output.numel() ** 0.5
        loss.backward()
        found[f"loss {number}"] = loss.detach().clone()
        for name, parameter in original.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {number} of {name}"] = parameter.grad.detach().clone()
        optimizer.step()
    found |= {f"state {name}": value.detach().clone() for name, value in original.state_dict().items()}
    return found


def compare(model: Model, ours: Tensors, other: Tensors, compared_with: str) -> Comparison:
    """Within the model's tolerances; both must have the same names, shapes and types."""
    largest, detail = 0.0, ""
    if ours.keys() != other.keys():
        detail = f"only in one of them: {', '.join(sorted(ours.keys() ^ other.keys()))}"
    for name in ours.keys() & other.keys():
        a, b = ours[name], other[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            detail = detail or f"{name}: {tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"
            continue
        largest = max(largest, float((a.double() - b.double()).abs().max()) if a.numel() else 0.0)
        if not torch.allclose(a, b, rtol=model.rtol, atol=model.atol):
            detail = detail or f"{name} differs"
    return Comparison(compared_with, not detail, largest, detail)


def check_inference(model: Model) -> list[Comparison]:
    """Compiled in eval mode, against eager."""
    module, inputs = _build(model)
    module.eval()
    expected = infer(module, inputs)
    with _random_as_eager():
        return [compare(model, infer(torch.compile(module), inputs), expected, "eager")]


def check_training(model: Model) -> list[Comparison]:
    """A compiled training step, against eager; with random numbers also against the in-process compile."""
    module, inputs = _build(model)
    module.train()
    eager = copy.deepcopy(module)
    found = []
    if model.random:
        torch.compiler.reset()
        ours, theirs = copy.deepcopy(module), copy.deepcopy(module)
        sandboxed = train(torch.compile(ours), ours, inputs)
        torch.compiler.reset()
        with _in_this_process():
            found.append(compare(model, sandboxed, train(torch.compile(theirs), theirs, inputs), "in-process compile"))
        torch.compiler.reset()
    with _random_as_eager():
        compiled = train(torch.compile(module), module, inputs)
    found.append(compare(model, compiled, train(eager, eager, inputs), "eager"))
    return found


def _build(model: Model) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    torch.compiler.reset()
    seed()
    return model.build()


@contextlib.contextmanager
def _random_as_eager() -> Iterator[None]:
    """Compiled code draws eager's random numbers inside the block: those of its own could not be compared."""
    with (
        compat.inductor_config.patch(fallback_random=True),
        compat.dynamo_config.patch(use_numpy_random_stream=True),
    ):
        yield


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """Compile inside the block as without the sandbox, and without the caches that would give back a child's work."""
    before = installed()
    if before is None:
        raise RuntimeError("the sandbox is not installed")
    install(before.policy, "normal")
    try:
        with compat.inductor_config.patch(force_disable_caches=True), warnings.catch_warnings():
            # It says that a cache is off, as asked for.
            warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
            yield
    finally:
        install(before.policy, before.mode)

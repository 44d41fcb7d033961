"""One run of one entry in this process: compiled, called, timed, its results kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch.utils import _pytree as pytree

from benchmarks.corpus.compare import Kept, keep
from benchmarks.corpus.entry import Call, Case, Entry, seed


@dataclass
class Run:
    """What one run gave."""

    seconds: float = 0.0
    """From `torch.compile` to the results and gradients of the last call, without the making of inputs."""
    kept: Kept = field(default_factory=list)


def execute(entry: Entry, *, compiled: bool = True) -> Run:
    """Run it, from nothing. With ``compiled`` false: eager, to see whether an error is the entry's own.

    Raises:
        Skip: it cannot run here.
        Exception: whatever making, compiling or calling it raises.
    """
    seed(entry.name)
    made = entry.make()
    run = Run()
    for number, case in enumerate([made] if isinstance(made, Case) else made):
        torch._dynamo.reset()
        seed(entry.name)
        started = time.perf_counter()
        function = _compiled(entry, case.function) if compiled and entry.compiles else case.function
        run.seconds += time.perf_counter() - started
        for index, call in enumerate(case.calls):
            started = time.perf_counter()
            results = _call(entry, function, call)
            run.seconds += time.perf_counter() - started
            run.kept += _keep(entry, case, call, results, f"case {number}, call {index}: ")
    return run


def _compiled(entry: Entry, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(  # type: ignore[no-any-return]
        function, dynamic=entry.dynamic, fullgraph=entry.fullgraph, options=dict(entry.options) or None
    )


def _call(entry: Entry, function: Callable[..., Any], call: Call) -> Any:
    if not entry.training:
        with torch.set_grad_enabled(not entry.compiles):  # what compiles by itself also decides this by itself
            return function(*call.args, **call.kwargs)
    results = function(*call.args, **call.kwargs)
    ends = [each for each in pytree.tree_leaves(results) if isinstance(each, torch.Tensor) and each.requires_grad]
    if ends:
        torch.autograd.backward(ends, [_weights(each) for each in ends])
    return results


def _weights(value: torch.Tensor) -> torch.Tensor:
    """A gradient that differs from place to place, so that no symmetry hides a wrong one."""
    if value.is_nested or value.layout is not torch.strided:
        return torch.ones_like(value)
    return torch.linspace(0.5, 1.5, max(value.numel(), 1))[: value.numel()].reshape(value.shape).to(value.dtype)


def _keep(entry: Entry, case: Case, call: Call, results: Any, place: str) -> Kept:
    kept = keep(results, f"{place}result")
    kept += keep((call.args, call.kwargs), f"{place}argument")
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    if isinstance(case.function, torch.nn.Module):
        kept += keep(dict(case.function.named_buffers()), f"{place}buffer")
        leaves += list(case.function.parameters())
    if entry.training:
        gradients = [each.grad for each in leaves if isinstance(each, torch.Tensor) and each.is_leaf]
        kept += keep(gradients, f"{place}gradient")
    return kept

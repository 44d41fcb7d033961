"""Special cases: what PyTorch's own databases and the models do not reach. See `benchmarks.corpus.cases`."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.corpus.entry import Call, Case, Entry, seed

#: Whether this host has an NVIDIA GPU.
GPU = bool(glob.glob("/dev/nvidia[0-9]*"))
#: Modules that the sandbox's forkserver imports for them (`forkserver.preload`): custom ops and lowerings.
PRELOAD: tuple[str, ...] = ("benchmarks.corpus.registered",)
if not GPU:
    PRELOAD += ("benchmarks.corpus.lowered",)
#: Results that depend on the order of sums.
TOLERANCES: dict[str, tuple[tuple[float, float], str]] = {}


def entries() -> Iterator[Entry]:
    """All of them."""
    # These import torch.
    from benchmarks.corpus import special_graphs, special_registered, special_uses, special_values  # noqa: F401
    from benchmarks.corpus.cases import CASES

    for name, function in CASES.items():
        tolerance, why = TOLERANCES.get(name, (None, ""))
        make = functools.partial(_make, name, function)
        yield Entry(name=f"special/{name}", make=make, compiles=False, tolerance=tolerance, why=why)


def _make(name: str, function: Callable[[Any], Any]) -> Case:
    import torch

    def run() -> Any:
        seed(name)
        return function(torch.compile)

    return Case(run, [Call()])

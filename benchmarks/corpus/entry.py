"""One thing to compile: what every part of the corpus is made of."""

from __future__ import annotations

import random
import sys
import types
import unittest
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Skip(Exception):
    """Raised by ``make`` or by the function itself: the entry cannot run here; the text says why."""


@dataclass(frozen=True)
class Call:
    """One call of the function, with its arguments."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A function (or nn.Module) and the calls to make of it, in order. Made anew for each run of an entry, since a call
    may change its inputs."""

    function: Callable[..., Any]
    calls: Sequence[Call]


@dataclass(frozen=True)
class Entry:
    """One line of the corpus.

    ``make`` is called with all generators seeded from the name, once for each run, in each scheme's process. All
    tensors in the results, the arguments after the call, the parameters' and arguments' gradients and the buffers are
    compared with those of NORMAL.
    """

    name: str
    """Unique, `part/...`: `op/add/float32/training`, `model/llama/inference`, `special/cond`."""
    make: Callable[[], Case | Sequence[Case]]
    training: bool = False
    """Whether a backward pass follows each call: into arguments that require a gradient and into parameters."""
    dynamic: bool | None = None
    """As of `torch.compile`."""
    fullgraph: bool = False
    """As of `torch.compile`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Inductor settings by dotted name, as of `torch.compile`."""
    compiles: bool = True
    """Whether the runner compiles the function. False: the function calls `torch.compile` itself (several threads,
    stances, export) and returns what is to be compared."""
    tolerance: tuple[float, float] | None = None
    """Relative and absolute; None means that results must be equal bit by bit."""
    why: str = ""
    """Why there is a tolerance."""
    exception: str = ""
    """Why graphs of this entry need not go to a child; such an entry is listed by name, with this reason."""
    seconds: float = 180.0
    """Time for the entry under one scheme, in seconds. When hit: the worker is killed, and `hung` recorded."""


def stable(name: str) -> int:
    """A number from a name, the same in every process."""
    return zlib.crc32(name.encode())


def seed(name: str) -> None:
    """Seed all generators from an entry's name."""
    import torch

    value = stable(name)
    random.seed(value)
    torch.manual_seed(value)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(value)


def allow_databases() -> None:
    """Make `torch.testing._internal` importable without the package expecttest, of which nothing is used here."""
    try:
        import expecttest  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in

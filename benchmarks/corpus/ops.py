"""PyTorch's OpInfo database: every operator, with sample inputs that its authors thought worth testing.

For each operator: inference and training (where there is a backward pass) in float32, inference with dynamic shapes,
and inference in one other data type, which differs from operator to operator.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, Final

import torch

from benchmarks.corpus.entry import Call, Case, Entry, Skip, allow_databases, stable

#: Samples of one entry, a count at most: each is a graph, or two in training.
SAMPLES: Final = 2
#: Samples that are generated to choose from, a count at most: some operators have thousands.
_POOL: Final = 40
_OTHER: Final = (
    torch.int64, torch.bfloat16, torch.complex64, torch.bool, torch.float16, torch.float64, torch.int32, torch.uint8,
)  # fmt: skip


def entries() -> Iterator[Entry]:
    """All of them."""
    allow_databases()
    from torch.testing._internal import common_methods_invocations as database

    # It wraps random operators in a change of the generator, which Dynamo leaves uncompiled. Ours are seeded anyway.
    database.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    for op in database.op_db:
        name = f"op/{op.name}" + (f".{op.variant_test_name}" if op.variant_test_name else "")
        supported = op.supported_dtypes("cpu")
        if torch.float32 in supported:
            yield _entry(op, name, torch.float32)
            yield _entry(op, name, torch.float32, dynamic=True)
            if op.supports_autograd and torch.float32 in op.supported_backward_dtypes("cpu"):
                yield _entry(op, name, torch.float32, training=True)
        others = [dtype for dtype in _OTHER if dtype in supported]
        if others:
            yield _entry(op, name, others[stable(name) % len(others)])


def _entry(op: Any, name: str, dtype: torch.dtype, *, training: bool = False, dynamic: bool = False) -> Entry:
    kind = "training" if training else "dynamic" if dynamic else "inference"
    count = 1 if dynamic or dtype != torch.float32 else SAMPLES
    return Entry(
        name=f"{name}/{str(dtype).removeprefix('torch.')}/{kind}",
        make=functools.partial(_cases, op, dtype, training, count),
        training=training,
        dynamic=dynamic,
    )


def _cases(op: Any, dtype: torch.dtype, training: bool, count: int) -> list[Case]:
    samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=training), _POOL))
    if not samples:
        raise Skip("the database has no sample inputs")
    operator = op.get_op()

    def function(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    return [
        Case(function, [Call((sample.input, *sample.args), dict(sample.kwargs))]) for sample in spread(samples, count)
    ]


def spread(found: list[Any], count: int) -> list[Any]:
    """``count`` of them, the first and the last among them; the second one alone, since the first is often a scalar."""
    if len(found) <= count:
        return found
    if count == 1:
        return [found[1]]
    step = (len(found) - 1) / (count - 1)
    return [found[round(index * step)] for index in range(count)]

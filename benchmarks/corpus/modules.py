"""PyTorch's module database: every nn.Module, with constructor and forward inputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.corpus.entry import Call, Case, Entry, Skip, allow_databases
from benchmarks.corpus.ops import SAMPLES, spread


def entries() -> Iterator[Entry]:
    """Inference and training, with fixed and with dynamic shapes."""
    allow_databases()
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if torch.float32 not in info.supported_dtypes("cpu"):
            continue
        for training in (False, True):
            for dynamic in (False, True):
                yield Entry(
                    name=f"module/{info.name}/{'training' if training else 'inference'}{'-dynamic' * dynamic}",
                    make=functools.partial(_cases, info, training, 1 if dynamic else SAMPLES),
                    training=training,
                    dynamic=dynamic,
                )


def _cases(info: Any, training: bool, count: int) -> list[Case]:
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=training, training=training)
    found = [each for each in inputs if each.forward_input is not None]
    if not found:
        raise Skip("the database has no forward inputs")
    cases = []
    for each in spread(found, count):
        made = each.constructor_input
        kwargs = {"device": "cpu", "dtype": torch.float32, **made.kwargs}
        try:
            module = info.module_cls(*made.args, **kwargs)
        except TypeError:  # some take neither
            module = info.module_cls(*made.args, **made.kwargs)
        module.train(training)
        cases.append(Case(module, [Call(tuple(each.forward_input.args), dict(each.forward_input.kwargs))]))
    return cases

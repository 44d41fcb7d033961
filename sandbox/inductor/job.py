"""The job kind `fx_graph`, as the worker sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sandbox.inductor import compile as child_side
from sandbox.inductor import devices
from sandbox.jobs import FxGraphSpec


def prepare(spec: FxGraphSpec, payload: bytes) -> Callable[[], dict[str, Any]]:
    """In the child: the compile, as a function that returns plain data. It unpickles when it is called, since the
    settings in the payload must be in force while its graph is rebuilt."""
    if spec.gpu:
        devices.show()
    return lambda: child_side.run(payload, dict(spec.config_overrides), spec.kernel_threads)

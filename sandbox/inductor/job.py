"""The job kind `fx_graph`, as the worker sees it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from sandbox.inductor import compat, devices, snapshot
from sandbox.inductor import compile as child_side
from sandbox.jobs import FxGraphSpec


def prepare(spec: FxGraphSpec, payload: bytes) -> Callable[[], dict[str, Any]]:
    """In the child: the compile, as a function that returns plain data. It unpickles when it is called, since the
    settings in the payload must be in force while its graph is rebuilt."""
    if spec.gpu:
        devices.show()
    cuda = contextlib.nullcontext() if spec.gpu else snapshot.of(spec.gpus)
    # Beside Inductor's cache folder, among the files that are handed back.
    artifacts = os.path.dirname(compat.runtime_cache_dir())
    debug, aoti = os.path.join(artifacts, "debug"), os.path.join(artifacts, "aoti")

    def work() -> dict[str, Any]:
        with cuda:
            return child_side.run(payload, dict(spec.config_overrides), spec.kernel_threads, debug, aoti, spec.gpu)

    return work

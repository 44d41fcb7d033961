"""GPUs in the template and in its children.

The template must never touch CUDA: a process that has done so cannot be forked into one that uses it, and CUDA
and NVML start threads. So the forkserver hides the GPUs from it (`CUDA_VISIBLE_DEVICES` is empty). A child whose
job may use the GPU sees them again: its environment is the caller's, and what Inductor remembers of their absence
is forgotten here.
"""

from __future__ import annotations

import functools
import glob
import sys
from typing import Any, Final

import torch

from sandbox.inductor import compat

#: Modules whose `functools` caches hold facts about GPUs (2.11, 2.13).
_MODULES: Final = (
    "torch.utils._triton",
    "torch.cuda",
    "torch._dynamo.debug_utils",
    "torch._inductor.utils",
    "torch._inductor.runtime.hints",
    "torch._inductor.runtime.benchmarking",
    "torch._inductor.runtime.runtime_utils",
    "torch._inductor.template_heuristics.triton",
)
_CACHE: Final = type(functools.lru_cache(lambda: None))


def present() -> bool:
    """Whether this host has an NVIDIA GPU that this PyTorch could use. Asks no driver."""
    return torch.version.cuda is not None and bool(glob.glob("/dev/nvidia[0-9]*"))


def show() -> None:
    """In a child, before anything of the job: forget what was found while the GPUs were hidden.

    Raises:
        RuntimeError: CUDA was initialised before the fork; this child cannot use it.
    """
    if compat.in_bad_fork():
        raise RuntimeError("CUDA was initialised in the forkserver: a module in forkserver.preload must have done it")
    for name in _MODULES:
        module = sys.modules.get(name)
        for value in list(vars(module).values()) if module is not None else ():
            _clear(value)
            if isinstance(value, type):
                for member in vars(value).values():
                    _clear(getattr(member, "__func__", member))
    compat.codecache.CacheBase.get_system.cache_clear()
    compat.forget_device_count()


def _clear(value: Any) -> None:
    if isinstance(value, _CACHE):
        value.cache_clear()

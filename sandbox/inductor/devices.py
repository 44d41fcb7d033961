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

from sandbox.gpus import Gpu, Gpus
from sandbox.inductor import compat

#: Modules whose `functools` caches hold facts about GPUs (2.11, 2.13).
_MODULES: Final = (
    "torch.utils._triton",
    "torch.cuda",
    "torch._dynamo.debug_utils",
    "torch._inductor.utils",
    "torch._inductor.comm_analysis",
    "torch._inductor.codegen.cuda.cuda_env",
    "torch._inductor.kernel.mm",
    "torch._inductor.runtime.hints",
    "torch._inductor.runtime.benchmarking",
    "torch._inductor.runtime.runtime_utils",
    "torch._inductor.template_heuristics.triton",
    "torch._inductor.compile_fx",
    "triton.backends.nvidia.compiler",
)
_CACHE: Final = type(functools.lru_cache(lambda: None))


def present() -> bool:
    """Whether this host has an NVIDIA GPU that this PyTorch could use. Asks no driver."""
    return torch.version.cuda is not None and bool(glob.glob("/dev/nvidia[0-9]*"))


def here() -> Gpus:
    """The GPUs that this process sees, for jobs that have none. Initialises CUDA. The devices are looked at once in a
    process, since they do not change.

    Raises:
        RuntimeError: there are none, or CUDA does not start.
        pydantic.ValidationError: the driver tells of one that cannot be.
    """
    return _devices(torch.cuda.device_count()).model_copy(update={"current": torch.cuda.current_device()})


@functools.cache
def _devices(count: int) -> Gpus:
    if not count:
        raise RuntimeError("there is no GPU here that this PyTorch can use")
    devices = []
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        # What this PyTorch does not tell of has a default, or is asked for.
        devices.append(
            Gpu(**{name: getattr(properties, name) for name in Gpu.model_fields if hasattr(properties, name)})
        )
    pairs = ((one, other) for one in range(count) for other in range(count) if one != other)
    return Gpus(
        devices=tuple(devices),
        cuda=torch.version.cuda or "",
        peers=tuple(pair for pair in pairs if torch.cuda.can_device_access_peer(*pair)),
    )


def show() -> None:
    """In a child, before anything of the job: forget what was found while the GPUs were hidden.

    Raises:
        RuntimeError: CUDA was initialised before the fork; this child cannot use it.
    """
    if compat.in_bad_fork():
        raise RuntimeError("CUDA was initialised in the forkserver: a module in forkserver.preload must have done it")
    forget()


def forget() -> None:
    """Forget what PyTorch, Inductor and Triton remember of the GPUs that they have seen or missed."""
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

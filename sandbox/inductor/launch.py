"""What the launch of a Triton kernel has to compile: the payload, and the child's side of a `triton_launch` job.

The child makes the entry of Triton's cache in the job's own folder. Its name is a hash of the kernel, of constants,
options and target, of Triton and its settings; made of the same in both processes, it is the one that the parent will
look for.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sandbox.errors import UnserializableError
from sandbox.inductor import compat, pickling
from sandbox.inductor.jitted import as_written, digest, kernel_data, make_kernel
from sandbox.jobs import TritonLaunchSpec


def encode(
    kernel: Any, signature: Mapping[str, Any], constants: Mapping[Any, Any], attrs: Any, options: Any, target: Any,
    variables: Mapping[str, str],
) -> bytes:  # fmt: skip
    """The payload.

    Args:
        kernel: a `JITFunction`.
        signature, constants, attrs: as of Triton's `ASTSource`; a constant may be another `JITFunction`.
        options: the backend's, as parsed.
        target: a `GPUTarget`.
        variables: those environment variables that are part of the entry's name.

    Raises:
        UnserializableError: reason `triton_kernel` or that of a value, when something cannot travel.
    """
    seen: dict[int, str] = {}
    kernels = [kernel, *(value for value in constants.values() if hasattr(value, "cache_key"))]
    data = pickling.dumps({
        "kernels": [(kernel_data(each, seen), digest(each), each.cache_key) for each in kernels],
        "signature": dict(signature),
        "constants": {
            place: None if hasattr(value, "cache_key") else (value,) for place, value in constants.items()
        },
        "attrs": attrs,
        "options": dict(vars(options)),
        "target": (target.backend, target.arch, target.warp_size),
        "variables": dict(variables),
    })  # fmt: skip
    return pickle.dumps(([entry for entry in sys.path if entry], data))


def prepare(spec: TritonLaunchSpec, payload: bytes) -> Callable[[], dict[str, Any]]:
    """In the child: the compile, as a function that returns the name of the kernel's entry."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    path, inner = pickle.loads(payload)
    # A module that a kernel names is imported from where the parent has it, also while the rest is unpickled.
    sys.path += [entry for entry in path if entry not in sys.path]
    data = pickling.loads(inner, None)
    # They are part of the entry's name, so they have to be true of what is in it, whatever a policy lets through.
    os.environ.update(data["variables"])
    # What the template remembers of it went with its environment.
    getattr(compat.set_ptxas_path, "cache_clear", lambda: None)()
    compat.set_ptxas_path()
    if (here := dict(compat.triton_environment())) != data["variables"]:
        different = sorted(set(here.items()) ^ set(data["variables"].items()))
        raise UnserializableError("triton_environment", f"Triton's settings are others in a child: {different}")
    made: dict[str, Any] = {}
    kernels = []
    for entry, whole, cache_key in data["kernels"]:
        kernel = make_kernel(entry, made)
        as_written(entry, made)
        if digest(kernel) != whole:
            raise UnserializableError("triton_kernel", f"{kernel.fn.__qualname__} is another kernel when it is rebuilt")
        # The child's own may differ for the same kernel: see `digest`.
        kernel.hash = cache_key
        kernels.append(kernel)
    first, *others = kernels
    constants = {place: value[0] if value else others.pop(0) for place, value in data["constants"].items()}

    def work() -> dict[str, Any]:
        source = ASTSource(first, data["signature"], constants, data["attrs"])
        compiled = triton.compile(
            source, target=GPUTarget(*data["target"]), options=data["options"], _env_vars=data["variables"]
        )
        return {"name": compiled.hash}

    return work

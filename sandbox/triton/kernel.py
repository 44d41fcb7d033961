"""The job kind `triton_kernel`: a Triton source to PTX and cubin for a named target. No GPU is needed.

Targets are `cuda:CAPABILITY[:WARP]`, for example `cuda:90` for an H100 or H200, or `hip:ARCH`. The compile takes
`triton.compile(ASTSource(...), target=GPUTarget(...))`, as seen in Triton 3.6 and 3.7.
"""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sandbox.errors import JobError
from sandbox.jobs import Job, Scalar, TritonKernelSpec, digest, given, new_job_id
from sandbox.limits import Confinement, Limits


def job(
    source: str,
    function: str,
    signature: Mapping[str, str],
    *,
    constants: Mapping[str, Scalar] | None = None,
    target: str = "cuda:90",
    num_warps: int = 4,
    num_stages: int = 3,
    limits: Limits | None = None,
    confinement: Confinement | None = None,
    environment: dict[str, str] | None = None,
) -> Job:
    """A job that compiles one Triton function.

    Args:
        source: Python source with the `@triton.jit` function and what it uses.
        function: the function's name in ``source``.
        signature: Triton type of each argument, for example `{"x": "*fp32", "n": "i32"}`.
        constants: values of the `tl.constexpr` arguments.
        target: device to compile for.

    The result's value is `{"metadata": {...}, "stages": {"ttir": str, ..., "ptx": str, "cubin": bytes}}`.

    Raises:
        JobError: the source holds no such function.
        pydantic.ValidationError: a field of the spec is wrong.
    """
    if f"def {function}(" not in source:
        raise JobError(f"triton_kernel: the source defines no function {function!r}")
    payload = source.encode()
    spec = TritonKernelSpec(
        job_id=new_job_id(),
        payload_sha256=digest(payload),
        payload_bytes=len(payload),
        **given(limits=limits, confinement=confinement, environment=environment),
        target=target,
        function=function,
        signature=dict(signature),
        constants=dict(constants or {}),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return Job(spec, payload)


def prepare(spec: TritonKernelSpec, payload: bytes) -> Callable[[], dict[str, Any]]:
    """In the child: the compile, as a function."""
    source = payload.decode()
    return lambda: compile_source(spec, source)


def compile_source(spec: TritonKernelSpec, source: str) -> dict[str, Any]:
    """In the child: compile, and return metadata and every stage as plain data."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(_load(source), spec.function)
    backend, _, rest = spec.target.partition(":")
    arch, _, warp = rest.partition(":")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp or (64 if backend == "hip" else 32)))
    signature = {name: "constexpr" if name in spec.constants else kind for name, kind in spec.signature.items()}
    signature.update({name: "constexpr" for name in spec.constants})
    order = [name for name in kernel.arg_names if name in signature]
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature={name: signature[name] for name in order},
            constexprs={(kernel.arg_names.index(name),): value for name, value in spec.constants.items()},
        ),
        target=target,
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    metadata = compiled.metadata._asdict()
    return {
        "metadata": {key: value for key, value in metadata.items() if isinstance(value, str | int | float | bool)},
        "stages": {name: bytes(code) if isinstance(code, bytes) else str(code) for name, code in compiled.asm.items()},
    }


def _load(source: str) -> ModuleType:
    """Import the source from a file: Triton reads a kernel's text back through `inspect`."""
    with tempfile.TemporaryDirectory(prefix="kernel_") as folder:
        path = Path(folder) / "kernel_source.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise JobError(f"triton_kernel: {path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # Before the file goes: Triton's cache key is over the text.
        inspect.getsource(module)
        return module

"""What is to be done: the job specs, plain models that know no torch.

A job is a :class:`JobSpec` (JSON, validated before anything is forked and again in the child before anything
is unpickled) and a payload (bytes, whose size and SHA-256 the spec names).
"""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from sandbox.errors import JobError
from sandbox.explain import explain
from sandbox.gpus import Gpus
from sandbox.limits import Confinement, Limits

SCHEMA_VERSION: Final = 1

JobId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{7,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Scalar = bool | int | float | str | None
Environment = dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str]

_TARGET = re.compile(r"^(cpu|cuda:[0-9]{2,3}|cuda:[0-9]{2,3}:(32|64)|hip:[a-z0-9]{4,12}(:(32|64))?)$")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class TraceContext(_Model):
    """Where the job belongs in the caller's distributed trace (W3C Trace Context)."""

    traceparent: Annotated[str, Field(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")]
    """The header of that name, https://www.w3.org/TR/trace-context/#traceparent-header."""


class _JobBase(_Model):
    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this schema. A child refuses a spec of another version."""

    job_id: JobId
    """Names the job in logs, leaks and artifacts. Unique within a forkserver."""

    payload_sha256: Sha256
    """SHA-256 of the payload, lower-case hex. Checked in the child before it unpickles."""

    payload_bytes: Annotated[int, Field(ge=0)]
    """Size of the payload, in bytes. Checked in the child before it unpickles."""

    limits: Limits = Limits()
    """What the job may use. If it is not given, `Sandbox.submit` fills in the policy's."""

    confinement: Confinement = Confinement()
    """What confines the job. If it is not given, `Sandbox.submit` fills in the policy's."""

    target: str = "cpu"
    """Device the job compiles for: `cpu`, `cuda:CAPABILITY[:WARP]` (for example `cuda:90`) or `hip:ARCH`."""

    gpu: bool = False
    """Whether the child may use the GPU itself (a CUDA context of its own)."""

    kernel_threads: Annotated[int, Field(ge=1, le=256)] = 2
    """How many kernels of the job are built side by side, a count of threads."""

    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """How far the job's processes step back behind others where cores are short: 0 to 19, as of `nice`."""

    compile_id: Annotated[str, Field(max_length=64)] | None = None
    """Dynamo's compile id (`frame/attempt`), for logs."""

    trace: TraceContext | None = None
    """The caller's trace."""

    trace_leaks: bool = False
    """Whether the child notes where descriptors, files, semaphores and threads are made, so that leaks can tell it. If
    it is not given, `Sandbox.submit` fills in the policy's."""

    environment: Environment = Field(default_factory=dict)
    """The whole environment of the child, already reduced to the policy's allow-list. If it is not given,
    `Sandbox.submit` fills in what the policy lets through."""

    def admits(self, path: str) -> bool:
        """Whether a file of this path, as of `sandbox.results.Artifact`, is taken over from the job."""
        return True

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str) -> str:
        if not _TARGET.fullmatch(value):  # not match: `$` would let a newline through
            raise ValueError("must be 'cpu', 'cuda:CAPABILITY[:WARP]' (for example 'cuda:90') or 'hip:ARCH'")
        return value


#: Endings of the files of a kernel in Triton's cache (3.6, 3.7).
_STAGES = ("json", "source", "ttir", "ttgir", "llir", "ptx", "cubin", "amdgcn", "hsaco")


class FxGraphSpec(_JobBase):
    """A post-AOT FX graph to a compiled artifact. Payload: `sandbox.inductor.payload`."""

    kind: Literal["fx_graph"] = "fx_graph"

    config_overrides: dict[str, Scalar] = Field(default_factory=dict)
    """Inductor settings that replace the caller's, by dotted name; the ladder's step `reduced` uses it."""

    gpus: Gpus | None = None
    """What the child, which has no GPU then, answers where the compile asks for some."""

    @model_validator(mode="after")
    def _gpus_of_the_target(self) -> FxGraphSpec:
        if self.gpus is not None and self.gpu:
            raise ValueError("a child that may use the GPU itself is given no snapshot of one")
        if self.gpus is not None and self.gpus.target != self.target:
            raise ValueError(f"the target is {self.target!r}, and the snapshot's current GPU is {self.gpus.target!r}")
        return self


class TritonKernelSpec(_JobBase):
    """A Triton source to PTX and cubin for a named target; no GPU is needed. Payload: the source, UTF-8."""

    kind: Literal["triton_kernel"] = "triton_kernel"

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name of the `@triton.jit` function in the source."""

    signature: dict[str, Annotated[str, Field(pattern=r"^[*A-Za-z0-9_<>\[\], ]{1,64}$")]]
    """Triton type of each argument, for example `{"x": "*fp32", "n": "i32"}`."""

    constants: dict[str, Scalar] = Field(default_factory=dict)
    """Values of the `tl.constexpr` arguments."""

    num_warps: Annotated[int, Field(ge=1, le=64)] = 4
    """Warps a program, a count."""

    num_stages: Annotated[int, Field(ge=0, le=32)] = 3
    """Software pipelining stages, a count."""


class TritonLaunchSpec(_JobBase):
    """What the launch of a `@triton.jit` function has to compile; no GPU is needed. Payload:
    `sandbox.inductor.launch`. The compiled kernel comes back as files of Triton's cache."""

    kind: Literal["triton_launch"] = "triton_launch"

    entry: Annotated[str, Field(pattern=r"^[A-Z2-7]{52}$")]
    """Name of the entry in Triton's cache that is to be made, which is a folder."""

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,149}$")]
    """Name of the function, by which the entry's files are called."""

    def admits(self, path: str) -> bool:
        """Only what belongs to that entry: what Triton makes of the function on the way to the GPU's code."""
        folder, _, name = path.rpartition("/")
        known = (f"__grp__{self.function}.json", *(f"{self.function}.{ending}" for ending in _STAGES))
        return folder == f"triton/{self.entry}" and name in known


class CallableSpec(_JobBase):
    """Any function, by dill: for tests and custom compilers. Payload: dill of `(function, args, kwargs)`."""

    kind: Literal["callable"] = "callable"

    result_globals: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+:[A-Za-z0-9_.]+$")], ...] = ()
    """Classes, as `module:name`, that the reply's unpickler admits besides plain data."""


Spec = FxGraphSpec | TritonKernelSpec | TritonLaunchSpec | CallableSpec
JobSpec = Annotated[Spec, Field(discriminator="kind")]

_SPEC: TypeAdapter[Spec] = TypeAdapter(JobSpec)


@dataclass(frozen=True)
class Job:
    """A spec with its payload: what :meth:`sandbox.Sandbox.submit` takes."""

    spec: Spec
    payload: bytes

    def __post_init__(self) -> None:
        check_payload(self.spec, self.payload)


def new_job_id() -> str:
    """A fresh job id: `job-` and 12 hex digits."""
    return f"job-{uuid.uuid4().hex[:12]}"


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None: what is left out of a spec is filled in from the policy."""
    return {name: value for name, value in fields.items() if value is not None}


def digest(payload: bytes) -> str:
    """SHA-256 of ``payload``, lower-case hex."""
    return hashlib.sha256(payload).hexdigest()


def parse_spec(data: bytes | str) -> Spec:
    """Validate the JSON of a spec.

    Raises:
        JobError: with one line per fault, naming key, value and what is allowed.
    """
    try:
        return _SPEC.validate_json(data)
    except ValidationError as error:
        raise JobError(explain("job spec", error)) from None


def check_payload(spec: _JobBase, payload: bytes) -> None:
    """Check size, cap and digest of a payload against its spec.

    Raises:
        JobError: naming what differs.
    """
    if len(payload) > spec.limits.payload_bytes:
        raise JobError(
            f"{spec.job_id}: the payload has {len(payload)} bytes, limits.payload_bytes allows "
            f"{spec.limits.payload_bytes}"
        )
    if len(payload) != spec.payload_bytes:
        raise JobError(f"{spec.job_id}: the payload has {len(payload)} bytes, the spec says {spec.payload_bytes}")
    if digest(payload) != spec.payload_sha256:
        raise JobError(f"{spec.job_id}: the payload's SHA-256 is not the one in the spec")

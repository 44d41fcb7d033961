"""The envelopes of the frames: what parent, keeper and worker say to each other, as validated models.

Each has a ``kind``; :func:`parse_envelope` reads only the kinds that are expected at that point of the talk.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from sandbox.errors import WireError
from sandbox.explain import explain
from sandbox.jobs import Environment, JobId
from sandbox.limits import Confinement, Limits
from sandbox.results import Artifact, Enforcement, Failure, Leak, Status

MAX_DETAIL: Final = 64 << 10
#: Faults of one envelope that are listed, a count at most: four megabytes hold a million, and to list them would keep
#: the parent busy for half a minute, with all its threads waiting. For the same reason a list fails at its first one.
MAX_FAULTS: Final = 100

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: What a child may say of itself. `timeout`, `cpu_limit` and `cancelled` are the parent's to say; `crashed` is for a
#: compiler that called `sys.exit`.
CHILD_STATUSES: Final = frozenset(Status) - {Status.TIMEOUT, Status.CPU_LIMIT, Status.CANCELLED}


def _claimable(status: Status) -> Status:
    if status not in CHILD_STATUSES:
        raise ValueError(f"a child cannot say that; allowed: {', '.join(sorted(CHILD_STATUSES))}")
    return status


# strict=False on the outside only: our own code may hand over a status's value or a list, JSON is the same either way.
ChildStatus = Annotated[Status, Field(strict=False), AfterValidator(_claimable)]
Leaks = Annotated[tuple[Leak, ...], FailFast(), Field(strict=False, max_length=10_000)]
Origins = Annotated[dict[str, Annotated[tuple[str, ...], FailFast()]], Field(max_length=1000)]
Artifacts = Annotated[tuple[Artifact, ...], FailFast(), Field(strict=False, max_length=100_000)]


class _Envelope(BaseModel):
    # Of pydantic's cache of strings, which takes up to 16,384 of them and 2 MB: job ids do not come again.
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, cache_strings="keys"
    )

    job_id: JobId
    """The job that the frame belongs to."""


class Prepare(_Envelope):
    """To a standby child: what its job will be confined by. The request itself follows when there is one."""

    kind: Literal["prepare"] = "prepare"
    limits: Limits
    """What the job may use; its memory limit may be lower."""
    confinement: Confinement
    """What confines the job."""
    environment: Environment
    """The whole environment of the job."""


class Started(_Envelope):
    """From the child: the spec is valid, the confinement is on, the job begins."""

    kind: Literal["started"] = "started"
    enforcement: Enforcement
    """What the child enforced on itself."""


class Reply(_Envelope):
    """From the child: how the job ended, as far as the child may say. The payload is the job's value."""

    kind: Literal["reply"] = "reply"
    status: ChildStatus
    """One of `CHILD_STATUSES`."""
    detail: Annotated[str, Field(max_length=MAX_DETAIL)] = ""
    """One line for people, at most 65,536 characters; see :func:`clip`."""
    failure: Failure | None = None
    """What the program raised, for `compile_error`."""
    artifacts: Artifacts = ()
    """The files handed back; the envelope's 4 MiB hold about 25,000."""
    leaks: Leaks = ()
    """What the child saw left over in itself."""
    origins: Origins = {}
    """With `trace_leaks`: where files and semaphores that still have a name were made, a call stack by name."""
    start_seconds: Seconds = 0.0
    """From the child's start until it had validated its spec and confined itself, in seconds."""


class KeeperReady(_Envelope):
    """From the keeper: the worker is forked."""

    kind: Literal["ready"] = "ready"
    pid: Annotated[int, Field(ge=1, lt=1 << 31)]
    """The worker's process id, as the keeper sees it."""
    init: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """That of the init of the job's own process ids, if it has some."""
    enforcement: Enforcement
    """What the keeper enforced on the tree."""


class Exited(_Envelope):
    """From the keeper: the worker has ended, and nothing of its tree lives but init, which ends with the keeper."""

    kind: Literal["exited"] = "exited"
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    """The worker's exit status, if it ended by exiting."""
    signal: Annotated[int, Field(ge=1, le=64)] | None = None
    """The number of the signal that ended it, if one did."""
    cpu_seconds: Seconds = 0.0
    """User and system CPU time of the tree, in seconds."""
    breach: Literal["", "memory", "processes", "threads"] = ""
    """What of [limits] the kernel stopped the job at, through its cgroup; `processes`: so many were left at its end."""
    peak_memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Most memory that the job's cgroup held, in bytes; 0 if it has none, or the kernel does not tell."""
    leaks: Leaks = ()
    """What the job left behind."""
    refused: Annotated[str, Field(max_length=MAX_DETAIL)] = ""
    """Why no worker was started: a required mechanism that the keeper could not enforce. Empty if one was."""

    violation: Annotated[str, Field(max_length=200)] = ""
    """The system call for which the job was killed, by name. Empty if it made none that is forbidden."""

    @model_validator(mode="after")
    def _one_way_to_end(self) -> Exited:
        if self.exit_code is not None and self.signal is not None:
            raise ValueError("a process ends by exiting or by a signal, not by both")
        return self


Model = TypeVar("Model", bound=BaseModel)


class _Kind(BaseModel):
    model_config = ConfigDict(strict=True)
    kind: str


def parse_envelope(data: bytes, *allowed: type[Model]) -> Model:
    """The envelope as one of the models that are expected at this point of the conversation.

    Raises:
        WireError: one line, if it is not JSON, of another kind, or not valid.
    """
    kinds = {model.model_fields["kind"].default: model for model in allowed}
    expected = " or ".join(sorted(kinds))
    try:
        kind = _Kind.model_validate_json(data).kind
    except ValidationError as error:
        raise WireError(f"expected an envelope of kind {expected}: {_first_line(error)}") from None
    if kind not in kinds:
        raise WireError(f"expected an envelope of kind {expected}, got {kind[:40]!r}")
    try:
        return kinds[kind].model_validate_json(data)
    except ValidationError as error:
        raise WireError(_first_line(error, kind)) from None


def _first_line(error: ValidationError, kind: str = "envelope") -> str:
    if error.error_count() > MAX_FAULTS:
        return f"{kind}: {error.error_count()} faults"
    lines = explain(kind, error).splitlines()
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def clip(text: str, limit: int = MAX_DETAIL) -> str:
    """``text`` as it fits into an envelope: without lone surrogates (JSON has none), at most ``limit`` characters."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: max(0, limit - 15)] + " ... (clipped)"

"""How a job ended: plain models that know no torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class Status(StrEnum):
    """How a job ended. The program's failures and ours are different words; the first cause wins."""

    OK = "ok"
    COMPILE_ERROR = "compile_error"  # the compiler raised
    CRASHED = "crashed"  # died of a signal, or exited without a reply
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"  # reply, stderr, scratch folder or artifacts too large
    VIOLATION = "violation"  # a confinement rule, or too many processes or files
    PROTOCOL_ERROR = "protocol_error"  # a truncated, garbled, duplicate or forged reply
    UNSERIALIZABLE = "unserializable"  # the graph or its result cannot be sent
    SANDBOX_ERROR = "sandbox_error"  # ours: no fork, dead forkserver, full disk
    CANCELLED = "cancelled"


#: The statuses that mean "this graph kills the process that compiles it": never repeated in-process.
KILLERS = frozenset(
    {
        Status.CRASHED,
        Status.TIMEOUT,
        Status.CPU_LIMIT,
        Status.MEMORY_LIMIT,
        Status.OUTPUT_LIMIT,
        Status.VIOLATION,
    }
)


def printable(text: str, limit: int = 2000) -> str:
    """Text of a job as it may stand in a log: without control characters, which could steer a terminal, without lone
    surrogates, which JSON has not, and with at most ``limit`` characters."""
    clipped = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in clipped)


class Usage(_Model):
    """What a job used."""

    model_config = ConfigDict(allow_inf_nan=False)

    wall_seconds: float = 0.0
    """From the fork until the whole process tree has ended and its artifacts are taken over, in seconds."""

    queue_seconds: float = 0.0
    """From submit to the fork request, in seconds."""

    start_seconds: float = 0.0
    """From the child's start until it had validated its spec and confined itself, in seconds."""

    cpu_seconds: float = 0.0
    """User and system CPU time of the process tree, in seconds."""

    peak_memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Highest private memory of the process tree that the watchdog saw, in bytes; or what the job's cgroup counted at
    its peak, page cache and kernel memory included, if that is more."""

    peak_gpu_memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Most GPU memory of the process tree that the watchdog saw, in bytes; 0 for a job that may use none, or where NVML
    does not tell."""

    memory_granted_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """What it was allowed to use: `limits.memory_bytes`, or less where less was free. 0 if it was not started."""

    stderr_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Bytes written to stdout and stderr in all; the result keeps a bounded tail."""


LeakKind = Literal[
    # descriptors, by what they lead to; `fd` is a file or whatever has no kind of its own
    "fd", "socket", "pipe", "eventfd", "epoll", "timerfd", "signalfd", "inotify", "memfd", "pidfd",
    "gpu_handle",  # a descriptor of /dev/nvidia*
    "cuda_context",  # a descriptor of /dev/nvidia-uvm
    "gpu_memory",  # held by a process that has ended, as NVML tells it
    "thread",
    "deleted_map",  # a mapped file without a name
    "tracked_resource",  # registered at a resource tracker of multiprocessing, and not taken back
    "zombie",  # a child that has ended and that nobody has waited for
    "process",  # alive, and so is its parent
    "orphan",  # alive, and its parent is not
    "posix_semaphore", "sysv_semaphore", "shared_memory", "message_queue", "temp_file",
]  # fmt: skip

#: What a worker tells of itself: it ends with its process. All else is the keeper's to tell, when all are dead.
OWN_LEAKS: frozenset[LeakKind] = frozenset(
    {
        *("fd", "socket", "pipe", "eventfd", "epoll", "timerfd", "signalfd", "inotify", "memfd", "pidfd"),
        *("gpu_handle", "cuda_context", "thread", "deleted_map", "tracked_resource", "zombie"),
    }
)


class Leak(_Model):
    """One thing that outlived the job."""

    kind: LeakKind
    object: str
    """What leaked: a path, a pid with its command, `fd 7 -> socket:[123]`."""
    owner: Literal["child", "forkserver", "parent"]
    reclaimed: bool
    """Whether it was removed, or has ended with its process. Leaks of the host process are told, never touched."""
    stack: Annotated[tuple[str, ...], FailFast()] = ()
    """For a thread: where it is. For others, with the policy's `trace_leaks`: where it was made. As `file:line
    function`, outermost first, at most 16 frames; empty if not known."""


class LeakReport(_Model):
    """Everything that outlived one job."""

    job_id: str
    leaks: tuple[Leak, ...] = ()

    def counts(self) -> dict[str, int]:
        """A count per kind."""
        found: dict[str, int] = {}
        for leak in self.leaks:
            found[leak.kind] = found.get(leak.kind, 0) + 1
        return found


class State(StrEnum):
    """What became of one confinement mechanism."""

    ENFORCED = "enforced"
    PARTIAL = "partial"
    UNAVAILABLE = "unavailable"
    OFF = "off"


class Mechanism(_Model):
    """State of one mechanism, and why it is not fully enforced."""

    state: State
    reason: str = ""


class Enforcement(_Model):
    """What was really enforced on a job: a state per mechanism."""

    mechanisms: dict[str, Mechanism] = Field(default_factory=dict)

    def states(self) -> dict[str, str]:
        """`{mechanism: state}`, for reports."""
        return {name: mechanism.state.value for name, mechanism in sorted(self.mechanisms.items())}


#: A path that a job may hand back: never one that PyTorch unpickles from.
ARTIFACT_PATH = (
    r"^(inductor/[a-z0-9]{2}/[A-Za-z0-9_.+=-]{1,200}\.(py|cpp|h|so|o|json|txt|cu|cubin|ptx|best_config)"
    r"|triton/[A-Za-z0-9_=-]{1,128}/[A-Za-z0-9_.+=-]{1,200}"
    r"|aoti/([a-z0-9]{8,128}/)?[A-Za-z0-9_.+=-]{1,200}\.(so|cpp|h|o|json|blob|bin|txt)"
    r"|debug/[A-Za-z0-9_.+=/-]{1,512})$"
)
#: How the names of the service's own tables end that say which libraries a cached graph loads: no job hands one back.
TABLE_ENDING = ".kernels.json"


class Artifact(_Model):
    """One file that the job hands back."""

    path: Annotated[str, Field(pattern=ARTIFACT_PATH)]
    """Relative to the job's artifact folder. `inductor/` and `triton/` hold kernels, each in a folder named by a hash;
    Inductor's folders of pickled state (`fxgraph`, `aotautograd`, `dynamo`) are not to be had. `aoti/` holds the files
    of an AOTInductor package. `debug/` holds what
    `TORCH_COMPILE_DEBUG` writes."""
    size: Annotated[int, Field(ge=0, lt=1 << 63)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if any(part in ("", ".", "..") for part in value.split("/")):
            raise ValueError("must not hold an empty part, '.' or '..'")
        if value.endswith(TABLE_ENDING):
            raise ValueError(f"must not end in {TABLE_ENDING}")
        return value


class Failure(_Model):
    """What was raised in a child, as plain data: enough to raise the same in the parent."""

    module: str
    qualname: str
    message: str
    traceback: str = ""


class JobResult(_Model):
    """How one job ended, what it made, what it used, what it left, and what was enforced on it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True)

    job_id: str
    status: Status
    by_child: bool = False
    """Whether the status is the child's own word, and not what this process saw."""
    no_memory: bool = False
    """Whether the job was never started for want of memory: the host's, not the job's limit."""
    detail: str = ""
    """One line for people: what failed and why. Empty when ok."""
    value: Any = None
    """What the job returned: plain data (fx_graph, triton_kernel) or the callable's result."""
    failure: Failure | None = None
    """What the program raised, for `compile_error`."""
    signal: str | None = None
    """Name of the signal that ended the child, for example `SIGSEGV`."""
    exit_code: int | None = None
    """Exit status of the child when it ended by exiting."""
    artifacts: tuple[Artifact, ...] = ()
    usage: Usage = Usage()
    stderr_tail: str = ""
    leaks: LeakReport
    enforcement: Enforcement = Enforcement()
    capsule: str = ""
    """Folder of the job's crash capsule; empty if the policy wants none. It is written in the background, so it
    appears a little later, or never if the disk is full: that is counted in `Stats.swallowed`."""

    @property
    def ok(self) -> bool:
        """Whether the job did what it was asked to."""
        return self.status is Status.OK

"""What is allowed: one schema for the policy files, and the loader that explains what is wrong with one."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sandbox.errors import PolicyError
from sandbox.explain import closest, explain
from sandbox.jobs import Scalar
from sandbox.limits import GIB, MIB, Confinement, Limits, Seconds
from sandbox.results import KILLERS, Status


def _failed(status: Status) -> Status:
    if status is Status.OK:
        raise ValueError(f"only failures leave a capsule; allowed: {', '.join(sorted(set(Status) - {Status.OK}))}")
    return status


Step = Literal["retry", "reduced", "in_process", "eager", "raise"]
FailedStatus = Annotated[Status, AfterValidator(_failed)]
#: What a pattern in `environment` never matches: TORCHINDUCTOR_REDIS_URL has a password in it.
_NOT_BY_PATTERN = re.compile(r"REDIS|REMOTE|MANAGER|TOKEN|KEY|PASSW|SECRET|CREDENTIAL", re.IGNORECASE)
#: A child has its own of these, whatever the service has. With its caches off Inductor sets the last two anew for each
#: graph, and no standby child would ever fit.
OWN_VARIABLES = frozenset({"HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"})
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\*?$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Ladder(_Model):
    """What to do, in order, after each way a job can end. When the steps are used up, `raise`.

    Steps: `retry` (the same job in a fresh child), `reduced` (a fresh child with the cheaper Inductor settings
    of `[reduced]`), `in_process` (compile in the serving process), `eager` (run the uncompiled graph), `raise`.
    `in_process` after a status that kills is refused unless `allow_in_process_after_crash` is set.
    """

    compile_error: tuple[Step, ...] = ("raise",)
    """The compiler raised. `raise` gives the exception that in-process Inductor would have raised."""
    crashed: tuple[Step, ...] = ("retry", "reduced", "eager")
    """The child died of a signal or exited without a reply."""
    timeout: tuple[Step, ...] = ("reduced", "eager")
    """`limits.wall_seconds` was hit."""
    cpu_limit: tuple[Step, ...] = ("reduced", "eager")
    """`limits.cpu_seconds` was hit."""
    memory_limit: tuple[Step, ...] = ("reduced", "eager")
    """`limits.memory_bytes` was hit."""
    output_limit: tuple[Step, ...] = ("reduced", "eager")
    """Reply, stderr, scratch folder or artifacts were too large."""
    violation: tuple[Step, ...] = ("eager",)
    """A confinement rule was broken, or there were too many processes or files."""
    protocol_error: tuple[Step, ...] = ("retry", "in_process")
    """The reply was truncated, garbled, duplicate or forged."""
    unserializable: tuple[Step, ...] = ("retry", "in_process")
    """The graph or its result cannot be sent. Counted under `in_process_reasons` when compiled in-process."""
    sandbox_error: tuple[Step, ...] = ("retry", "in_process")
    """Our own failure: no fork, dead forkserver, full disk."""
    cancelled: tuple[Step, ...] = ("raise",)
    """The job was cancelled, for example by a shutdown."""

    def steps(self, status: Status) -> tuple[Step, ...]:
        """The steps for ``status``. `ok` has none."""
        return () if status is Status.OK else getattr(self, status.value)


class CapsuleSettings(_Model):
    """The crash capsule: a folder that a failed job leaves, for `sandbox replay`."""

    statuses: tuple[FailedStatus, ...] = (
        Status.CRASHED, Status.TIMEOUT, Status.CPU_LIMIT, Status.MEMORY_LIMIT, Status.OUTPUT_LIMIT, Status.VIOLATION,
        Status.PROTOCOL_ERROR,
    )  # fmt: skip
    """Which failures leave one."""
    keep: Annotated[int, Field(ge=0, le=10_000)] = 20
    """Capsules that are kept, a count; the oldest are removed. 0 means that none is left. A capsule holds what the
    job was sent: the graph with its constants, or a function with its arguments."""
    max_bytes: Annotated[int, Field(ge=MIB, le=1 << 40)] = 16 * MIB
    """Size of one capsule, in bytes. When hit: the payload is left out, and the capsule says so; it can be read, not
    replayed."""
    folder: Annotated[str, Field(pattern=r"^([/~].*)?$")] = ""
    """Where they are left, an absolute path or one that begins with `~`. Empty means
    `torch-compile-sandbox/capsules` in the user's cache folder ($XDG_CACHE_HOME, or else ~/.cache). Made with mode
    0700; a folder that others may write to is not used."""


class ForkserverSettings(_Model):
    """The warm template process that children are forked from."""

    import_torch: bool = True
    """Import torch, Dynamo, Inductor and Triton before the first fork (about 6 s, 430 MB, shared with all children).
    Without it the template starts in 0.2 s and each graph job imports them itself; for `callable` jobs only."""
    warm_up: bool = True
    """Compile a few small graphs before the first job, so that no child repeats the vector-ISA probe, the precompiled
    header and Inductor's lazy imports; on a host with an NVIDIA GPU only one C++ kernel, which saves the probe and the
    header, unless `CUDA_VISIBLE_DEVICES` is empty. Without it each job does all of it again, about 10 s."""
    start_timeout_seconds: Seconds = 180.0
    """Time for import and warm-up, in seconds. When hit: killed; the job ends as `sandbox_error`."""
    fork_timeout_seconds: Seconds = 10.0
    """Time for one fork, in seconds. When hit: the forkserver is killed and restarted, the job retried."""
    standby: Annotated[int, Field(ge=0, le=64)] = 2
    """Children that are forked and confined ahead, each for one job, a count; a job then costs 6 ms instead of 40. Two,
    since a training step has a forward and a backward graph. A job whose limits, confinement or environment differ from
    the policy's, or that may use a GPU, gets a fresh child. They sleep, at about 60 MB of private memory each; a used
    one is replaced when no job needs the cores. 0 means none."""
    preload: tuple[str, ...] = ()
    """Modules to import in the forkserver besides torch: those that register custom ops or lowerings."""


class BreakerSettings(_Model):
    """The circuit breaker: when the sandbox itself keeps failing, no more children are tried for a while."""

    failures: Annotated[int, Field(ge=0, le=1000)] = 5
    """Jobs in a row that end as `sandbox_error` by our own fault (no forkserver, no fork, no disk), a count. When hit:
    it opens, and further jobs end at once as `sandbox_error`; the ladder says what becomes of them. 0 means never."""
    open_seconds: Seconds = 30.0
    """Time until one job tries again, in seconds. If it succeeds, all do; if it fails, it is open for as long again."""


class MemorySettings(_Model):
    """The memory that jobs may take follows what is free: of the host, and of each cgroup above this process, page
    cache discounted. A job gets `limits.memory_bytes`, or what is left."""

    reserve_bytes: Annotated[int, Field(ge=0, le=1 << 50)] = GIB // 4
    """Memory that is never granted to jobs, in bytes: room for the serving process itself."""
    min_bytes: Annotated[int, Field(ge=GIB // 16, le=1 << 50)] = GIB // 2
    """The least that a job is granted, in bytes; one whose `limits.memory_bytes` is less needs only that. If less is
    free: the job waits, first come first served."""
    wait_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 60.0
    """How long a job waits for memory, in seconds. When hit: it ends as `sandbox_error`, with what is free and which
    bound that is."""


class QuarantineSettings(_Model):
    """The memory of graphs that have killed a child and got no answer from another: they get no further child."""

    persist: bool = True
    """Whether it is kept in files, so that it outlives the process and other processes of the same user see it at their
    next compile. If false, or where the folder cannot be used, in memory until the process ends."""
    folder: str = ""
    """Where the files are; `~` at the start is the home folder. It must belong to the user and be writable by nobody
    else, or it is ignored with a warning. Empty means `torch-compile-sandbox/quarantine` below `$XDG_CACHE_HOME`, or
    below `~/.cache`."""
    days: Annotated[float, Field(gt=0, le=3650, allow_inf_nan=False)] = 30.0
    """How long an entry counts after the newest kill, in days. When over: the graph gets a child again."""


class DeferredSettings(_Model):
    """The modes `async` and `progressive`: compiles that nobody waits for."""

    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """How far their children step back behind the service where cores are short, as of `nice`: 0 (not at all) to 19.
    At 10 they get about a tenth of a core that the service keeps busy, and all of one that is idle."""


class Policy(_Model):
    """What sandboxed compiles may do and what happens when they fail. Read from TOML, see `policies/`."""

    name: str = "default"
    """Shown in reports. The loader sets it to the file's name without `.toml` unless the file says otherwise."""
    description: str = ""
    """One sentence for people."""
    parallel_jobs: Annotated[int, Field(ge=0, le=1024)] = 0
    """Jobs that run side by side, a count; more wait. 0 means one per usable core."""
    kernel_threads: Annotated[int, Field(ge=0, le=256)] = 0
    """Kernels of one job that are built side by side, a count. 0 means one per usable core, at most 8 (16 of a graph
    for a GPU), divided by the jobs that run when it begins."""
    gpu: bool = False
    """Whether a child may hold a CUDA context of its own (about 600 MiB of GPU memory while it lives), where the
    compile asks what only a GPU can answer: `max_autotune` and what else is chosen by running it. Else such a graph is
    `unserializable` (`needs_gpu`), and goes on down that ladder. All other children are told of the service's GPUs
    (`sandbox.gpus`) and have none, whatever is said here. AMD: there is no snapshot; true gives each child the GPU,
    false is `gpu_not_granted`."""
    triton_launches: bool = True
    """Whether what a direct launch of a Triton kernel has to compile (`kernel[grid](...)`, outside of any graph), and
    what Inductor compiles late while it tunes kernels by running them, is compiled in a child, too. If false, Triton
    compiles it in the serving process, as without the sandbox."""
    allow_in_process: bool = True
    """Whether any graph may be compiled in the serving process. If false, a ladder's `in_process` is skipped."""
    allow_in_process_after_crash: bool = False
    """DANGEROUS. Whether a graph that has killed a child may be compiled in the serving process."""
    trace_leaks: bool = False
    """Whether a child notes the Python call stack whenever it makes a descriptor, file, semaphore, process or thread,
    so that a leak can name its origin. Some 25 to 90 us for each that is made; for debugging."""
    allow_faults: bool = False
    """Whether code may inject faults into jobs (`sandbox.faults`): for tests. Nothing else arms one, no environment
    variable either."""
    environment: tuple[EnvironmentName, ...] = (
        "PATH", "LANG", "LC_*", "TZ", "CC", "CXX", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH",
        "TORCHINDUCTOR_*", "TORCH_LOGS", "TRITON_*", "OMP_NUM_THREADS", "CPATH", "LIBRARY_PATH",
    )  # fmt: skip
    """Environment variables that a child may see; `*` at the end matches any rest. All others are removed. A name that
    speaks of a secret or of a remote cache (REDIS, REMOTE, MANAGER, TOKEN, KEY, PASSW, SECRET, CREDENTIAL) passes only
    if it is written out here: a child has no network."""
    limits: Limits = Limits()
    """What one job may use."""
    ladder: Ladder = Ladder()
    """What to do when a job fails."""
    confinement: Confinement = Confinement()
    """Which mechanisms confine a child."""
    forkserver: ForkserverSettings = ForkserverSettings()
    """The warm template process."""
    memory: MemorySettings = MemorySettings()
    """The memory of all jobs together."""
    breaker: BreakerSettings = BreakerSettings()
    """The circuit breaker."""
    quarantine: QuarantineSettings = QuarantineSettings()
    """The memory of graphs that have killed a child."""
    capsule: CapsuleSettings = CapsuleSettings()
    """What a failed job leaves for `sandbox replay`."""
    deferred: DeferredSettings = DeferredSettings()
    """Compiles that nobody waits for."""
    reduced: dict[str, Scalar] = {
        "max_autotune": False,
        "max_autotune_gemm": False,
        "coordinate_descent_tuning": False,
        "epilogue_fusion": False,
        "cpp.max_horizontal_fusion_size": 1,
    }
    """Inductor settings of the ladder's step `reduced`, by dotted name under `torch._inductor.config`."""
    quick: dict[str, Scalar] = {
        "max_autotune": False,
        "max_autotune_gemm": False,
        "coordinate_descent_tuning": False,
        "epilogue_fusion": False,
        "cpp.max_horizontal_fusion_size": 1,
    }
    """Inductor settings of the first, quick compile of the mode `progressive`, by dotted name under
    `torch._inductor.config`. The better code is compiled with the caller's own."""

    def allowed(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Those of ``variables`` that `environment` lets through, without those that each child has its own of."""
        exact = {name for name in self.environment if not name.endswith("*")}
        prefixes = tuple(name[:-1] for name in self.environment if name.endswith("*"))
        names = [
            name
            for name in list(variables)
            if name not in OWN_VARIABLES
            and (name in exact or (name.startswith(prefixes) and not _NOT_BY_PATTERN.search(name)))
        ]
        # One by one: another thread may take a variable away meanwhile.
        return {name: value for name in names if (value := variables.get(name)) is not None}

    @model_validator(mode="after")
    def _no_silent_weakening(self) -> Policy:
        if not self.allow_in_process_after_crash:
            for status in sorted(KILLERS):
                steps = self.ladder.steps(status)
                if "in_process" in steps:
                    raise ValueError(
                        f"ladder.{status.value} = {list(steps)}: 'in_process' repeats in the serving process what "
                        f"has just killed a child; remove it, or set allow_in_process_after_crash = true"
                    )
        if self.limits.memory_bytes < GIB // 4:
            raise ValueError(
                f"limits.memory_bytes = {self.limits.memory_bytes}: must be at least 268435456 (256 MiB), which the "
                f"g++ of one kernel needs"
            )
        return self


def shipped() -> list[str]:
    """Names of the policies that the package ships, sorted."""
    return sorted(path.stem for path in _shipped_folder().glob("*.toml"))


def _shipped_folder() -> Path:
    """In a wheel the policy files are the folder `sandbox/policies`, in a checkout they stand beside `sandbox`."""
    package = Path(__file__).parent
    installed = package / "policies"
    return installed if installed.is_dir() else package.parent / "policies"


def load(policy: str | Path | Policy) -> Policy:
    """A policy from a shipped name (`default`), a path to a TOML file, or a :class:`Policy` itself.

    Raises:
        PolicyError: with one line per fault, naming file, key, value and what is allowed.
    """
    if isinstance(policy, Policy):
        return policy
    name = str(policy)
    if name in shipped():
        return parse(_read(_shipped_folder() / f"{name}.toml"), f"policies/{name}.toml", name)
    path = Path(policy)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise PolicyError(f"{name[:200]}: cannot be read: {error.strerror}") from None
    if is_folder:
        raise PolicyError(f"{name}: is a folder, not a policy file")
    if not is_file:
        raise PolicyError(
            f"no policy {name!r}: not one of the shipped policies ({', '.join(shipped())}) and not a file"
            + closest(name, shipped())
        )
    return parse(_read(path), str(path), path.stem)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")  # as TOML has it, whatever the locale says
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: not UTF-8 at byte {error.start}, which TOML has to be") from None
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror}") from None


def parse(text: str, source: str = "policy", name: str = "custom") -> Policy:
    """A policy from the text of a TOML file; ``source`` is what messages call it.

    Raises:
        PolicyError: as :func:`load`.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, as is a number too long to read
        raise PolicyError(f"{source}: not TOML: {error}") from None
    data.setdefault("name", name)
    try:
        # Through JSON, so that strict models accept arrays for tuples and reject everything else. Dates, which
        # JSON lacks, become what no key accepts.
        text = json.dumps(data, default=lambda value: {"date or time": str(value)})
        return Policy.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise PolicyError(explain(source, error, Policy)) from None


def schema() -> dict[str, Any]:
    """The JSON Schema of a policy file."""
    return Policy.model_json_schema()

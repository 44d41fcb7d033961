"""What one job may use and what confines it. Every limit has a unit, a default, and what happens when it is hit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Demand = Literal["require", "prefer", "off"]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Limits(BaseModel):
    """Resource limits of one job, over its whole process tree (g++ and ptxas included).

    All sizes are bytes, all times seconds. "Killed" means: the whole process tree gets SIGKILL, also
    processes that left the group with setsid, and nothing of the job is left behind.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    wall_seconds: Seconds = 600.0
    """Wall time from the fork to the end of the job, in seconds. When hit: killed, status `timeout`."""

    cpu_seconds: Seconds = 1200.0
    """CPU time of the process tree, user and system, in seconds. When hit: killed, status `cpu_limit`.
    RLIMIT_CPU, per process, stands behind it as a hard stop."""

    memory_bytes: Annotated[int, Field(ge=64 * MIB, le=1 << 50)] = 8 * GIB
    """Private memory of the process tree, in bytes; pages shared with the forkserver do not count.
    When hit: killed, status `memory_limit`. RLIMIT_DATA, per process, stands behind it as a hard stop:
    an allocation beyond it fails inside the job, which also ends as `memory_limit`."""

    gpu_memory_bytes: Annotated[int, Field(ge=256 * MIB, le=1 << 50)] = 8 * GIB
    """GPU memory of the process tree over all GPUs, CUDA contexts included, in bytes, as NVML tells it (the extra
    `gpu`). For jobs that may use a GPU; others get none. When hit: killed, status `memory_limit`."""

    processes: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Live processes in the tree, a count; threads are not counted. When hit: killed, status `violation`."""

    threads: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Live threads in the tree, a count. When hit: killed, status `violation`."""

    cores: Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)] = 0.0
    """Cores that the process tree may keep busy on average, a count; 0 means no limit. When hit: slowed down, not
    killed. Only with the mechanism `cgroup` and its controller cpu."""

    open_files: Annotated[int, Field(ge=32, le=1_000_000)] = 1024
    """Open file descriptors per process (RLIMIT_NOFILE), a count. When hit: `open` fails inside the job with
    EMFILE; a job that dies of it ends as `violation`."""

    disk_bytes: Annotated[int, Field(ge=MIB, le=1 << 50)] = 4 * GIB
    """Bytes in the job's scratch folder, removed files that are still open included, and the largest single file
    (RLIMIT_FSIZE). When hit: killed, status `output_limit`."""

    reply_bytes: Annotated[int, Field(ge=KIB, le=1 << 40)] = 512 * MIB
    """Size of the reply frame, in bytes. When hit: killed, status `output_limit`."""

    artifact_bytes: Annotated[int, Field(ge=KIB, le=1 << 40)] = 1 * GIB
    """Sum of the sizes of the kernel files handed back, in bytes. When hit: nothing is adopted, status
    `output_limit`."""

    stderr_bytes: Annotated[int, Field(ge=KIB, le=1 << 40)] = 64 * MIB
    """Bytes that the job may write to stdout and stderr in all. When hit: killed, status `output_limit`."""

    stderr_tail_bytes: Annotated[int, Field(ge=0, le=64 * MIB)] = 64 * KIB
    """The last bytes of stdout and stderr that are kept in the result. Older ones are dropped, silently by
    design: the result says how many bytes there were in all."""

    payload_bytes: Annotated[int, Field(ge=KIB, le=1 << 40)] = 2 * GIB
    """Size of the job's payload, in bytes. When hit: the job is refused with JobError before it starts."""


class Confinement(BaseModel):
    """Which mechanisms confine a child, and what they leave open. `require`: refuse to start a job without it.
    `prefer`: use it, report it as `unavailable` or `partial` if absent. `off`: do not use it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    rlimits: Demand = "require"
    """Kernel limits per process: data size, CPU, files, file size, no core dumps."""
    no_new_privs: Demand = "require"
    """No set-uid program can raise privileges inside a job."""
    watchdog: Demand = "require"
    """The parent measures the whole process tree and kills it at a breach."""
    process_tree: Demand = "require"
    """A keeper process per job is subreaper of the tree: nothing can leave it, all of it dies with the job."""
    ipc_namespace: Demand = "prefer"
    """Own SysV semaphores, shared memory and message queues."""
    mount_namespace: Demand = "prefer"
    """Own empty /dev/shm, /tmp and /var/tmp; of the rest only the job's scratch folder can be written."""
    network_namespace: Demand = "prefer"
    """No network but an own, unconnected loopback."""
    capabilities: Demand = "prefer"
    """No capability, whoever the service runs as: a child of root is a user who happens to own root's files."""
    landlock: Demand = "prefer"
    """Files by Landlock: read and execute what the compiler needs, write in the scratch folder and an own /dev/shm
    only; no TCP or UDP, no abstract socket and no signal that leaves the job. Denied calls fail inside the job."""
    seccomp: Demand = "prefer"
    """A filter for system calls that no compiler makes: sockets, ptrace, mounts, namespaces, keys, bpf, io_uring, the
    host's own. When one is made: killed, status `violation`, with the call's name."""
    run_as: Annotated[str, Field(pattern=r"^([a-z_][a-z0-9_-]*|[0-9]{1,9})?$", max_length=64)] = ""
    """User, by name or number, that the workers of a service with root's rights run as. Empty: the service's own. A
    service without the rights is refused with an error when it is set up."""
    pid_namespace: Demand = "prefer"
    """Own process ids: a job neither sees nor signals processes of others, and the kernel kills its tree as one."""
    cgroup: Demand = "prefer"
    """The kernel holds the tree to memory_bytes, threads and cores of [limits], where a cgroup (v2 or v1) is
    delegated to this user."""
    cgroup_parent: Annotated[str, Field(pattern=r"^(/[^\x00]*)?$", max_length=4096)] = ""
    """Cgroup in which those of jobs are made, an absolute path. Default: the nearest one that is delegated."""
    read: Annotated[tuple[AbsolutePath, ...], Field(max_length=1000)] = ()
    """Absolute paths that a job may read and execute besides what the compiler needs: interpreter, search path,
    toolchain (`sandbox/enforce/paths.py`). For code that lies directly in a home folder, or headers in odd places."""

    def demands(self) -> dict[str, Demand]:
        """The mechanisms, each with what the policy says of it."""
        return {name: value for name, value in self if name not in ("run_as", "cgroup_parent", "read")}

    def softened(self) -> Confinement:
        """The same with each `require` made a `prefer`, so that all can be tried where some are missing."""
        return self.model_copy(update={name: "prefer" for name, value in self.demands().items() if value == "require"})

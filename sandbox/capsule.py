"""The crash capsule: a folder with all that a failed job needs to be run again, and how it ended.

    capsule.json   when, by which policy, versions; whether the payload is there and if not, why
    spec.json      the job's spec: kind, limits, confinement, and the environment without secrets
    payload.bin    the job's payload
    outcome.json   the JobResult without value and stderr
    stderr.txt     the tail of stdout and stderr
    stack.txt      what faulthandler said in it: the Python stacks of a crash, or of a job that hung or spun

Written after the job was answered, by a thread of its own, so that a slow or full disk delays nothing but the
capsule. It appears by a rename, whole or not at all. Read with the suspicion that a file from elsewhere deserves:
no link is followed, sizes are capped, JSON is validated, and the payload stays bytes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from sandbox import scratch
from sandbox.errors import CapsuleError, JobError
from sandbox.explain import explain
from sandbox.jobs import CallableSpec, Job, Spec, new_job_id, parse_spec
from sandbox.limits import MIB, Limits
from sandbox.policy import CapsuleSettings, Policy
from sandbox.results import JobResult, Status

log = logging.getLogger("sandbox")

#: Capsules that wait to be written, a count at most: each holds its payload in memory.
BACKLOG: Final = 4
#: Caps of a capsule's files, in bytes. The payload's is `capsule.max_bytes` in writing, `limits.payload_bytes` in
#: reading.
SMALL, LARGE = 64 << 10, 4 << 20
#: Leaks and bytes of stderr that a capsule keeps.
MAX_LEAKS: Final = 100
MAX_STDERR: Final = MIB
#: Seconds after which a half-written capsule is one of a writer that has died.
STALE_SECONDS: Final = 3600.0

_NAME: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z-[a-z0-9][a-z0-9-]{7,63}")
_HALF: Final = ".half-"
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

#: Names of environment variables whose values never leave the process.
_SECRET: Final = re.compile(r"TOKEN|KEY|PASSW|SECRET|CREDENTIAL", re.IGNORECASE)
#: User and password in a URL.
_USERINFO: Final = re.compile(r"(?<=://)[^/\s@]+@")
REMOVED: Final = "<removed>"

Model = TypeVar("Model", bound=BaseModel)

_STACK: Final = re.compile(
    r"(?:^Fatal Python error: .*\n+|^(?:Current t|T)hread 0x.*\n)"
    r"(?:(?:Current thread|Thread 0x|Stack \(most|  File |  <|  \.\.\.|  Binary file |Extension modules: ).*\n|\n)*",
    re.MULTILINE,
)


class About(BaseModel):
    """The file `capsule.json`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    created: AwareDatetime
    policy: Annotated[str, Field(max_length=200)]
    """Name of the policy that the job ran under."""
    name: Annotated[str, Field(max_length=500)]
    """What was compiled, as reports call it."""
    step: Annotated[str, Field(max_length=50)]
    """Which step of the ladder started the job."""
    payload_left_out: Annotated[str, Field(max_length=500)] = ""
    """Why there is no `payload.bin`. Empty if there is one."""
    versions: Annotated[dict[str, Annotated[str, Field(max_length=200)]], Field(max_length=50)]
    """Of this package, torch, triton, Python and the kernel."""


@dataclass(frozen=True)
class Capsule:
    """A capsule that was read. ``spec`` is as it was recorded: :meth:`job` makes what may be run of it."""

    about: About
    spec: Spec
    outcome: JobResult
    payload: bytes

    def job(self, policy: Policy) -> Job:
        """The job to run again: confined as ``policy`` says, with the recorded limits or the policy's, whichever is
        less, with the recorded variables that the policy lets through, and with an id of its own."""
        recorded, allowed = self.spec.limits.model_dump(), policy.limits.model_dump()
        least = {name: min(recorded[name], allowed[name]) for name in allowed}
        if not least["cores"]:  # 0 means no limit
            least["cores"] = max(recorded["cores"], allowed["cores"])
        environment = policy.allowed(self.spec.environment)
        changes: dict[str, object] = {
            "job_id": new_job_id(),
            "limits": Limits(**least),
            "confinement": policy.confinement,
            "environment": {name: value for name, value in environment.items() if value != REMOVED},
            "gpu": self.spec.gpu and policy.gpu,
            "compile_id": None,
            "trace": None,
        }
        if isinstance(self.spec, CallableSpec):
            changes["result_globals"] = ()  # no class that a capsule names is made in this process
        return Job(self.spec.model_copy(update=changes), self.payload)


# Writing ------------------------------------------------------------------------------------------------------


class Writer:
    """Leaves the capsules of one sandbox. Thread-safe; nothing here raises, what goes wrong is told to a function."""

    def __init__(self, policy: Policy, swallowed: Callable[[BaseException], None]) -> None:
        self._policy = policy
        self._count = swallowed
        self._told = False
        self._lock = threading.Lock()
        self._waiting: deque[_Order] = deque()
        self._thread: threading.Thread | None = None

    def place(self, result: JobResult) -> Path | None:
        """The folder that the capsule of this result will be; None if the policy wants none."""
        settings = self._policy.capsule
        if settings.keep == 0 or result.status not in settings.statuses:
            return None
        try:
            return folder_of(settings) / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{result.job_id}"
        except RuntimeError as error:  # no home folder
            self._swallowed(error)
            return None

    def leave(self, job: Job, result: JobResult, name: str, step: str) -> None:
        """Have the capsule of ``result`` written in the background, in the folder that it names."""
        if not result.capsule:
            return
        # A payload that will be left out is not kept in memory until then.
        payload = job.payload if len(job.payload) <= self._policy.capsule.max_bytes else None
        order = _Order(job.spec, payload, result, name[:500], step[:50], datetime.now(UTC))
        with self._lock:
            if len(self._waiting) >= BACKLOG:
                self._swallowed(CapsuleError(f"{BACKLOG} wait already, the disk does not keep up"))
                return
            self._waiting.append(order)
            if self._thread is None:
                thread = threading.Thread(target=self._drain, name="sandbox-capsule", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no thread to be had
                    self._waiting.pop()
                    self._swallowed(error)
                    return
                self._thread = thread

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` for what is being written."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                order = self._waiting.popleft()
            try:
                about = About(
                    created=order.created,
                    policy=self._policy.name[:200],
                    name=order.name,
                    step=order.step,
                    versions=versions(),
                )
                settings = self._policy.capsule
                write(Path(order.result.capsule), order.spec, order.payload, order.result, about, settings)
            except Exception as error:  # noqa: BLE001 - a disk that is full, read-only or gone costs the capsule only
                self._swallowed(error)
            del order  # its payload may be large, and this thread may wait for the lock

    def _swallowed(self, error: BaseException) -> None:
        self._count(error)
        if not self._told:
            self._told = True
            log.warning("a crash capsule cannot be written: %s: %s; this is told once", type(error).__name__, error)


@dataclass(frozen=True)
class _Order:
    """A capsule to write."""

    spec: Spec
    payload: bytes | None
    result: JobResult
    name: str
    step: str
    created: datetime


def folder_of(settings: CapsuleSettings) -> Path:
    """The folder that capsules are left in.

    Raises:
        RuntimeError: the default, and this user has no home folder.
    """
    if settings.folder:
        return Path(settings.folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"  # as the XDG specification has it
    return base / "torch-compile-sandbox" / "capsules"


def write(
    folder: Path,
    spec: Spec,
    payload: bytes | None,
    result: JobResult,
    about: About,
    settings: CapsuleSettings,
) -> None:
    """Write the capsule ``folder``, then remove the oldest of those beside it beyond `settings.keep`.
    ``payload`` is None if it is larger than `settings.max_bytes`.

    Raises:
        OSError: it cannot be written; nothing of it is left, as far as the disk lets us.
        CapsuleError: the folder above it is not ours alone.
    """
    scrub = _Scrubber(spec.environment)
    tail = scrub(result.stderr_tail[-MAX_STDERR:])
    leaks = result.leaks.model_copy(update={"leaks": result.leaks.leaks[:MAX_LEAKS]})
    failure = result.failure and result.failure.model_copy(
        update={"message": scrub(result.failure.message), "traceback": scrub(result.failure.traceback)}
    )
    outcome = result.model_copy(
        update={"value": None, "stderr_tail": "", "leaks": leaks, "failure": failure, "detail": scrub(result.detail)}
    )
    texts = {
        "spec.json": spec.model_copy(update={"environment": scrub.environment}).model_dump_json(indent=2),
        "outcome.json": outcome.model_dump_json(indent=2, exclude={"value", "capsule"}),
        "stderr.txt": tail,
    }
    if stack := stacks(tail):
        texts["stack.txt"] = stack
    files = {name: text.encode(errors="backslashreplace") for name, text in texts.items()}
    room = settings.max_bytes - sum(map(len, files.values())) - SMALL
    if payload is not None and len(payload) <= room:
        files["payload.bin"] = payload
    else:
        left_out = f"the payload has {spec.payload_bytes} bytes, capsule.max_bytes = {settings.max_bytes}"
        about = about.model_copy(update={"payload_left_out": left_out})
    files["capsule.json"] = about.model_dump_json(indent=2).encode()
    for above in (folder.parent.parent, folder.parent):
        above.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _opened(folder.parent) as parent:
        state = os.fstat(parent)
        if state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise CapsuleError(f"{folder.parent}: others may write there; no capsule is left in it")
        half = f"{_HALF}{os.getpid()}-{folder.name}"
        os.mkdir(half, 0o700, dir_fd=parent)
        try:
            with _opened(half, parent) as into:
                for name, data in files.items():
                    with os.fdopen(os.open(name, _NEW, 0o600, dir_fd=into), "wb") as file:
                        file.write(data)
            os.rename(half, folder.name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            _remove(half, parent)
            raise
        _prune(parent, settings.keep)


def _remove(name: str, opened: int) -> None:
    scratch.remove(Path(f"/proc/self/fd/{opened}") / name)  # not by its path, which may lead elsewhere by now


def _prune(opened: int, keep: int) -> None:
    """Remove the oldest capsules but ``keep``, and what writers that died have left. Other names are not touched."""
    names = os.listdir(opened)
    for name in sorted(filter(_NAME.fullmatch, names))[:-keep]:
        _remove(name, opened)
    for name in names:
        if name.startswith(_HALF):
            with contextlib.suppress(FileNotFoundError):  # its writer is done
                if time.time() - os.stat(name, dir_fd=opened, follow_symlinks=False).st_mtime > STALE_SECONDS:
                    _remove(name, opened)


class _Scrubber:
    """Takes secrets out of an environment, and their values out of any text."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {
            name: REMOVED if _SECRET.search(name) else _USERINFO.sub(f"{REMOVED}@", value)
            for name, value in environment.items()
        }
        # A short value would be found everywhere; longest first, for one may hold another.
        values = {value for name, value in environment.items() if _SECRET.search(name) and len(value) >= 6}
        self._values = sorted(values, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, REMOVED)
        return _USERINFO.sub(f"{REMOVED}@", text)


def stacks(stderr: str) -> str:
    """What faulthandler has printed, from a job's stderr. Empty if it has printed nothing."""
    return "\n".join(match.group().rstrip() for match in _STACK.finditer(stderr + "\n"))


def versions() -> dict[str, str]:
    """Of all that a compile depends on, without importing it."""
    found = {"python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine()}
    for name in ("torch-compile-sandbox", "torch", "triton", "sympy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "executable": os.path.basename(sys.executable)}


# Reading ------------------------------------------------------------------------------------------------------


def read(folder: Path, max_payload: int) -> Capsule:
    """Read a capsule, whoever made it. All of it is in memory afterwards: nobody can change it under us.

    Args:
        folder: the capsule.
        max_payload: bytes that the payload may have.

    Raises:
        CapsuleError: it is none, or not one that is safe to read: with what is wrong.
    """
    try:
        with _opened(folder) as opened:
            if os.fstat(opened).st_uid != os.geteuid():
                raise CapsuleError(f"{folder}: the folder belongs to another user; copy it, and replay the copy")
            about = _model(About, folder, "capsule.json", _read(folder, opened, "capsule.json", SMALL))
            outcome = _model(JobResult, folder, "outcome.json", _read(folder, opened, "outcome.json", LARGE))
            try:
                spec = parse_spec(_read(folder, opened, "spec.json", LARGE))
            except JobError as error:
                raise CapsuleError(f"{folder}/spec.json: {error}") from None
            if about.payload_left_out:
                raise CapsuleError(f"{folder}: cannot be replayed, it holds no payload: {about.payload_left_out!r}")
            payload = _read(folder, opened, "payload.bin", min(max_payload, spec.payload_bytes))
    except OSError as error:
        raise CapsuleError(f"{folder}: not a capsule: {error.filename or ''}: {error.strerror}") from None
    if outcome.status is Status.OK:
        raise CapsuleError(f"{folder}/outcome.json: status 'ok': a capsule is of a job that failed")
    try:
        Job(spec, payload)
    except JobError as error:
        raise CapsuleError(f"{folder}/payload.bin: {error}") from None
    return Capsule(about, spec, outcome.model_copy(update={"value": None}), payload)


def _model(model: type[Model], folder: Path, name: str, data: bytes) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise CapsuleError(explain(f"{folder}/{name}", error)) from None


def _read(folder: Path, opened: int, name: str, limit: int) -> bytes:
    """A regular file of ours with one name and at most ``limit`` bytes; a FIFO or a device is not waited for."""
    handle = os.open(name, _READ, dir_fd=opened)
    with os.fdopen(handle, "rb") as file:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1 or state.st_uid != os.geteuid():
            raise CapsuleError(f"{folder}/{name}: must be a regular file of yours with one name")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CapsuleError(f"{folder}/{name}: more than {limit} bytes")
    return data


@contextlib.contextmanager
def _opened(folder: Path | str, parent: int | None = None) -> Iterator[int]:
    handle = os.open(folder, _FOLDER, dir_fd=parent)
    try:
        yield handle
    finally:
        os.close(handle)

"""The worker: one fresh process that runs one job and hands back one reply.

Phases, in order: `receive` (the frame), `check_spec` (validate before anything is unpickled), `confine`,
`unpickle`, `run` (compile), `collect` (the artifacts' manifest), `send_reply`, `leave`. Each is a function of this
module, so that tests can break each one. What goes wrong is said in the reply where that is still possible;
where it is not, the keeper and the parent see the exit status.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from sandbox import artifacts, ledger
from sandbox.enforce import Place, confine_worker, rlimits
from sandbox.enforce.privileges import die_with_parent
from sandbox.errors import EnforcementError, JobError, UnserializableError, WireError
from sandbox.jobs import CallableSpec, Spec, check_payload, digest, parse_spec
from sandbox.origins import Origins
from sandbox.results import OWN_LEAKS, Artifact, Enforcement, Failure, Leak, Status
from sandbox.sealed import unseal
from sandbox.trackers import Registrations
from sandbox.wire import (
    MAX_DETAIL,
    Frame,
    Prepare,
    Reply,
    Started,
    clip,
    encode_frame,
    parse_envelope,
    recv_frame,
    safe_dumps,
    send_frame,
)

#: Exit codes of a worker that could not even reply. Outside the range that compilers use.
EXIT_UNCONFINED = 120
EXIT_BAD_REQUEST = 121
EXIT_NO_PARENT = 122
EXIT_MEMORY = 123
#: Leaks of one worker that are told, a count at most: the envelope has an end.
MAX_LEAKS = 1000
#: Call stacks of what the keeper tells of, in one reply, a count at most.
MAX_ORIGINS = 500
#: Descriptors held back from the job, a count: a job that has used up all others can still reply.
RESERVED_FDS = 8
#: Has a worker print its Python stacks, as a JVM does; one that has set it otherwise does something else.
STACKS_SIGNAL = signal.SIGQUIT
#: Seconds that a thread which is none of Python's may take to end before it is told as a leak.
ENDING_SECONDS = 0.3
#: Seconds that the parent may take to send the whole request, and to read the whole reply.
RECEIVE_SECONDS = 60.0
SEND_SECONDS = 600.0

#: The module that does each kind of job: `prepare(spec, payload)` unpickles and returns the work as a function
#: without arguments. By name, so that a worker imports only what its job needs.
HANDLERS = {
    "fx_graph": "sandbox.inductor.job",
    "triton_kernel": "sandbox.triton.kernel",
    "triton_launch": "sandbox.inductor.launch",
    "callable": "sandbox.callables",
}

#: What the template has imported if it was warmed up. It does part of a graph's work for nothing.
REHEARSAL = "sandbox.inductor.warmup"


def main(job_id: str, standby: bool, place: Place, job_fd: int, stderr_fd: int, keeper: int) -> NoReturn:
    """Run in the fork of the keeper, whose pid is ``keeper``. A ``standby`` confines itself before it has a job, and
    ``job_id`` is its own name."""
    code = 1
    try:
        code = _work(job_id, standby, place, job_fd, stderr_fd, keeper)
    except MemoryError:
        code = EXIT_MEMORY
        traceback.print_exc()
    except BaseException:  # noqa: BLE001 - must never return into the keeper; the parent keeps the tail of stderr
        traceback.print_exc()
    finally:
        leave(code)


def _work(job_id: str, standby: bool, place: Place, job_fd: int, stderr_fd: int, keeper: int) -> int:
    started = time.monotonic()
    scratch = Path(place.scratch)
    os.setsid()
    _plain_signals()
    _standard_streams(stderr_fd)
    die_with_parent(signal.SIGKILL, keeper)
    os.chdir(scratch)
    # Descriptors that arrive by a socket are inheritable: no program that the job starts may talk for it.
    os.set_inheritable(job_fd, False)
    channel = socket.socket(fileno=job_fd)
    try:
        if standby:
            prepared = parse_envelope(receive(channel).envelope, Prepare)
            terms: Spec | Prepare = prepared
        else:
            frame = receive(channel)
            terms = spec = check_spec(frame, job_id)
        _surroundings(terms, scratch)
        if isinstance(terms, Spec) and terms.nice:
            step_back(terms.nice)
        enforcement = Enforcement(
            mechanisms=confine_worker(
                terms.confinement, terms.limits, keeper, place, gpu=isinstance(terms, Spec) and terms.gpu
            )
        )
        registrations, origins = Registrations(), Origins()
        registrations.watch()
        before = ledger.take(ipc=False)
        if standby:
            send_frame(channel, Started(job_id=job_id, enforcement=enforcement), b"", SEND_SECONDS)
            _rehearse(prepared, before, registrations, origins, scratch)
            if (compiler := sys.modules.get(REHEARSAL)) is not None:
                try:
                    compiler.rehearse(lambda: not select.select([channel], [], [], 0)[0])
                except Exception as error:  # noqa: BLE001 - told; the job that comes may do well all the same
                    print(f"rehearsal: {type(error).__name__}: {error}", file=sys.stderr)
            wait_for_job(channel)
            started = time.monotonic()
            frame = receive(channel)
            spec = check_spec(frame, None)
            check_terms(spec, prepared)
            if spec.limits.memory_bytes < prepared.limits.memory_bytes:
                rlimits.lower_memory(spec.limits.memory_bytes)
    except (WireError, JobError) as error:
        print(f"request refused: {error}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    except EnforcementError as error:
        print(f"confinement: {error}", file=sys.stderr)
        return EXIT_UNCONFINED
    job_id = spec.job_id
    start_seconds = time.monotonic() - started
    send_frame(channel, Started(job_id=job_id, enforcement=enforcement), b"", SEND_SECONDS)
    if spec.trace_leaks:
        origins.trace()
    reserved = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(RESERVED_FDS)]
    status, detail, failure, value = Status.OK, "", None, b""
    doing: Callable[[BaseException], tuple[Status, str]] = _unserializable
    try:
        function = unpickle(spec, frame.payload)
        del frame
        doing = classify
        result = run(function)
        doing = _unserializable
        value = safe_dumps(result)
    except BaseException as error:  # noqa: BLE001 - the reply says what was raised, whatever it was
        status, detail = doing(error)
        failure = _failure(error)
        # What the job's frames hold, memory and descriptors, is needed for the reply.
        for cause in _chain(error):
            traceback.clear_frames(cause.__traceback__)
    for fd in reserved:
        os.close(fd)
    leaks = own_leaks(spec, before, registrations, origins)
    files = collect(scratch) if status is Status.OK else ()
    reply = Reply(
        job_id=job_id,
        status=status,
        detail=clip(detail),
        failure=failure,
        artifacts=files,
        leaks=leaks,
        # Processes and what lies in the kernel are the keeper's to tell, once all are dead.
        origins=dict(list(origins.below((str(scratch), ledger.SHM)).items())[:MAX_ORIGINS]),
        start_seconds=start_seconds,
    )
    try:
        send_reply(channel, reply, value)
    except WireError as error:
        print(f"reply not sent: {error}", file=sys.stderr)
        return EXIT_NO_PARENT
    return 0


def receive(channel: socket.socket) -> Frame:
    """The request frame: the spec's JSON as envelope, the payload behind it, or in a sealed file that comes with it."""
    files: list[int] = []
    frame = recv_frame(channel, max_payload=1 << 40, deadline=RECEIVE_SECONDS, fds=files)
    return frame._replace(payload=unseal(files[0])) if files else frame


def _rehearse(
    prepared: Prepare, before: ledger.Snapshot, registrations: Registrations, origins: Origins, scratch: Path
) -> None:
    """Do once for nothing what a worker does around its job. What it touches it gets copies of then (a fork shares its
    pages until it writes to them), and not when the job waits for it."""
    spec = CallableSpec(
        job_id=prepared.job_id,
        payload_sha256=digest(b""),
        payload_bytes=0,
        limits=prepared.limits,
        confinement=prepared.confinement,
        environment=prepared.environment,
    )
    parse_spec(spec.model_dump_json())
    check_payload(spec, b"")
    importlib.import_module(HANDLERS[spec.kind])
    leaks = own_leaks(spec, before, registrations, origins)
    encode_frame(Reply(job_id=spec.job_id, status=Status.OK, artifacts=collect(scratch), leaks=leaks), safe_dumps(None))


def wait_for_job(channel: socket.socket) -> None:
    """In a standby child: sleep until there is a job, or the parent is gone."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.poll()


def check_terms(spec: Spec, prepared: Prepare) -> None:
    """Check that a standby child is confined as its job demands.

    Raises:
        JobError: it is not.
    """
    limits = spec.limits.model_copy(update={"memory_bytes": prepared.limits.memory_bytes})
    if (
        spec.gpu
        or spec.nice
        or spec.limits.memory_bytes > prepared.limits.memory_bytes
        or (limits, spec.confinement, spec.environment) != (prepared.limits, prepared.confinement, prepared.environment)
    ):
        raise JobError(f"{spec.job_id} reached a standby child that is confined otherwise")


def check_spec(frame: Frame, job_id: str | None) -> Spec:
    """Validate spec and payload before anything is unpickled. ``job_id``: the job that this worker was forked for, if
    it was for one.

    Raises:
        JobError: naming what is wrong.
    """
    spec = parse_spec(frame.envelope)
    if job_id is not None and spec.job_id != job_id:
        raise JobError(f"the spec of {spec.job_id} reached the worker of {job_id}")
    check_payload(spec, frame.payload)
    return spec


def step_back(nice: int) -> None:
    """Take less of the cores than others, with all that this process starts."""
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    # A session of its own is a scheduling group of its own, which weighs as much as the service's whatever the
    # niceness of its members (sched(7), "The autogroup feature").
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
        file.write(str(nice))


def unpickle(spec: Spec, payload: bytes) -> Callable[[], Any]:
    """The work to do, as a function without arguments that returns plain data."""
    return importlib.import_module(HANDLERS[spec.kind]).prepare(spec, payload)  # type: ignore[no-any-return]


def run(function: Callable[[], Any]) -> Any:
    """Do the work."""
    return function()


def collect(scratch: Path) -> tuple[Artifact, ...]:
    """The manifest of the files that the job hands back."""
    return artifacts.manifest(scratch / artifacts.FOLDER)


def own_leaks(spec: Spec, before: ledger.Snapshot, registrations: Registrations, origins: Origins) -> tuple[Leak, ...]:
    """What the job has left open in this process. All of it ends with the process, which the keeper sees to."""
    found = []
    for held in _left(before, 0.0 if spec.gpu else ENDING_SECONDS):
        # A CUDA context holds hundreds of descriptors, some threads and maps, as long as its process lives: no leaks.
        if held.kind in OWN_LEAKS and (not spec.gpu or held.kind == "zombie"):
            stack = origins.of(held.text)
            if held.thread is not None and (thread := ledger.python_thread(held.thread))[0]:
                held = replace(held, text=f"{held.text}, Python's {thread[0]!r}")
                stack = stack or thread[1]
            found.append(held.leak("child", reclaimed=True, stack=stack))
    for name, kind in registrations.names.items():
        found.append(ledger.Held("tracked_resource", f"{kind} {name}").leak("child", reclaimed=True))
    return tuple(found[:MAX_LEAKS])


def _left(before: ledger.Snapshot, seconds: float) -> tuple[ledger.Held, ...]:
    """What is there now and was not before. A thread that Python has joined takes the kernel another moment to end: for
    those that are none of Python's it waits at most so long."""
    deadline = time.monotonic() + seconds
    while True:
        found = ledger.differences(before, ledger.take(ipc=False))
        ending = any(held.thread is not None and not ledger.python_thread(held.thread)[0] for held in found)
        if not ending or time.monotonic() >= deadline:
            return found
        time.sleep(0.01)


def send_reply(channel: socket.socket, reply: Reply, value: bytes) -> None:
    """Send the one reply, then close the socket: nothing may follow it."""
    send_frame(channel, reply, value, SEND_SECONDS)
    channel.close()


def leave(code: int) -> NoReturn:
    """End at once: exit handlers belong to the template."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def classify(error: BaseException) -> tuple[Status, str]:
    """Which status an exception of the job means, and one line for people."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - an exception's own __str__ may raise anything
        text = type(error).__name__
    line = text.strip().splitlines()[0][:2000] if text.strip() else type(error).__name__
    if isinstance(error, UnserializableError):
        return Status.UNSERIALIZABLE, line
    for cause in _chain(error):
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return Status.MEMORY_LIMIT, f"an allocation failed under limits.memory_bytes: {line}"
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return Status.VIOLATION, f"too many open files (limits.open_files): {line}"
        if isinstance(cause, OSError) and cause.errno == errno.EFBIG:
            return Status.OUTPUT_LIMIT, f"a file larger than limits.disk_bytes: {line}"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            if os.statvfs(".").f_bavail == 0:
                return Status.SANDBOX_ERROR, f"the disk of the scratch folder is full: {line}"
            return Status.OUTPUT_LIMIT, f"no space left in a folder of limited size, /dev/shm perhaps: {line}"
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return Status.MEMORY_LIMIT, f"no memory for another thread under limits.memory_bytes: {line}"
    # g++ that hits RLIMIT_DATA exits with these words (GCC: libiberty/xmalloc.c; LLVM: ErrorHandling).
    if any(words in text for words in ("out of memory allocating", "virtual memory exhausted", "std::bad_alloc")):
        return Status.MEMORY_LIMIT, f"the C++ compiler ran out of limits.memory_bytes: {line}"
    if isinstance(error, SystemExit):
        return Status.CRASHED, f"the compiler called sys.exit({error.code!r})"
    return Status.COMPILE_ERROR, line


def _unserializable(error: BaseException) -> tuple[Status, str]:
    """An error while unpickling the payload or pickling the result; running out of something is still that."""
    status, detail = classify(error)
    return (Status.UNSERIALIZABLE, detail) if status is Status.COMPILE_ERROR else (status, detail)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def _failure(error: BaseException) -> Failure:
    """What was raised, as text that fits into the reply's envelope."""
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001 - an exception's own __str__ may raise anything
        message = f"(its message cannot be shown: {type(broken).__name__})"
    text = "".join(traceback.format_exception(error))
    return Failure(
        module=clip(type(error).__module__, 1000),
        qualname=clip(type(error).__qualname__, 1000),
        message=clip(message),
        traceback=clip(text[-MAX_DETAIL:]),
    )


def _plain_signals() -> None:
    """Undo what template and keeper set."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.enable()
    # The keeper asks with it for the stacks of a worker that hangs; it never meant anything to a compiler.
    faulthandler.register(STACKS_SIGNAL)


def _standard_streams(stderr_fd: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(stderr_fd, 1)
    os.dup2(stderr_fd, 2)
    os.close(stderr_fd)


def _surroundings(spec: Spec | Prepare, scratch: Path) -> None:
    """Own environment, home, temporary folder and cache folders; nothing of the template's."""
    os.environ.clear()
    os.environ.update(spec.environment)
    os.environ.update(
        HOME=str(scratch / "home"),
        TMPDIR=str(scratch / "tmp"),
        TORCHINDUCTOR_CACHE_DIR=str(scratch / artifacts.FOLDER / "inductor"),
        TRITON_CACHE_DIR=str(scratch / artifacts.FOLDER / "triton"),
    )
    if isinstance(spec, Prepare) or not spec.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # `tempfile` remembers the template's folder.
    import tempfile

    tempfile.tempdir = None

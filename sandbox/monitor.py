"""The parent's watchdog of one job: starts it, feeds it, watches it, kills it, and says how it ended.

    parent (this module)                     keeper                    worker
      fork request to the template ─────────▶ forked ────────────────▶ forked
      ◀── ready: worker's pid ───────────────┤
      ──── request frame: spec, payload ──────────────────────────────▶ checks, confines itself
      ◀─── started: what is enforced ─────────────────────────────────┤
      samples /proc: time, CPU, memory,                                 runs the job
      processes, disk; reads stderr
      ◀─── reply frame, then end of file ─────────────────────────────┤ exits
      ◀── exited: status, CPU, leaks ────────┤ kills what is left of the tree

At a breach the first cause is recorded and the keeper is told to kill the tree. A keeper that does not obey within
a second is killed together with the tree. Whatever the child sends, this module returns a JobResult.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import shutil
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from sandbox import artifacts
from sandbox.child import EXIT_BAD_REQUEST, EXIT_MEMORY, EXIT_NO_PARENT, EXIT_UNCONFINED
from sandbox.errors import WireError
from sandbox.forkserver import Forkserver, socket_pair
from sandbox.jobs import CallableSpec, Job
from sandbox.meter import TreeMeter, survey
from sandbox.processes import kill_tree
from sandbox.results import (
    Artifact,
    Enforcement,
    JobResult,
    Leak,
    LeakReport,
    Mechanism,
    State,
    Status,
    Usage,
)
from sandbox.wire import (
    Exited,
    FrameReader,
    KeeperReady,
    OversizedFrame,
    Reply,
    Started,
    encode_frame,
    parse_envelope,
    safe_loads,
)

#: Seconds between two looks at the process tree: the time a breach can go unseen. RLIMIT_DATA stands behind it.
SAMPLE_SECONDS = 0.1
#: Looks at the tree between two looks at the scratch folder, which cost more.
DISK_EVERY = 5
#: Seconds that a keeper has to kill the tree and report, before it is killed itself.
KILL_SECONDS = 1.0
#: Seconds that a worker has to exit once its reply is complete.
EXIT_SECONDS = 1.0
#: Frames from keeper and worker, other than the reply, carry no payload.
NO_PAYLOAD = 0
_READ = 1 << 16


@dataclass
class _Watch:
    """What is known of one running job."""

    job: Job
    scratch: Path
    worker: socket.socket
    keeper: socket.socket
    stderr: int
    started: float
    stack: contextlib.ExitStack
    keeper_pid: int
    keeper_handle: int | None = None
    handle: int | None = None
    cause: tuple[Status, str] | None = None
    kill_deadline: float | None = None
    reply: Reply | None = None
    reply_payload: bytes = b""
    reply_at: float = 0.0
    exited: Exited | None = None
    keeper_gone: bool = False
    pid: int | None = None
    meter: TreeMeter | None = None
    mechanisms: dict[str, Mechanism] = field(default_factory=dict)
    tail: deque[bytes] = field(default_factory=deque)
    tail_bytes: int = 0
    stderr_bytes: int = 0
    cpu_seconds: float = 0.0
    peak_memory: int = 0

    def breach(self, status: Status, detail: str) -> None:
        """Record the first cause and have the tree killed. A complete reply is a cause, too: what the child does
        after it loses nothing, unless it talks on."""
        if self.cause is None and (self.reply is None or status is Status.PROTOCOL_ERROR):
            self.cause = (status, detail)
        self.kill()

    def kill(self) -> None:
        """Tell the keeper to kill the tree; it may be gone already."""
        if self.kill_deadline is None:
            self.kill_deadline = time.monotonic() + KILL_SECONDS
            with contextlib.suppress(OSError):
                self.keeper.send(b"K")


class Cancel:
    """Lets another thread end a running job: wakes the monitor and gives the reason."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()

    def cancel(self, reason: str) -> None:
        """Ask for the end. Safe to call at any time, any number of times."""
        with self._lock:
            self.reason = self.reason or reason
            if self._write >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._write, b"c")

    def fileno(self) -> int:
        """For a selector."""
        return self._read

    def close(self) -> None:
        """Release the pipe."""
        with self._lock:
            if self._write >= 0:
                os.close(self._read)
                os.close(self._write)
                self._write = -1


def run(forkserver: Forkserver, job: Job, cancel: Cancel, targets: dict[str, Path], queued: float = 0.0) -> JobResult:
    """Run one job in one fresh child, to its end.

    Args:
        forkserver: where the child comes from.
        job: what to do.
        cancel: ends the job early with status `cancelled`.
        targets: the user's cache folders by the first part of an artifact's path.
        queued: seconds that the job waited before this call, for the result.

    Raises:
        ForkserverError: the child could not be forked; nothing is left of the job.
        OSError: the parent lacks descriptors or disk for it; nothing is left of the job.
    """
    scratch = forkserver.root / job.spec.job_id
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        for folder in ("home", "tmp", f"{artifacts.FOLDER}/inductor", f"{artifacts.FOLDER}/triton"):
            (scratch / folder).mkdir(parents=True)
        worker, worker_end = socket_pair(socket.SOCK_STREAM)
        stack.callback(worker.close)
        stack.callback(worker_end.close)
        keeper, keeper_end = socket_pair(socket.SOCK_STREAM)
        stack.callback(keeper.close)
        stack.callback(keeper_end.close)
        stderr, stderr_end = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, stderr)
        started = time.monotonic()
        try:
            keeper_pid = forkserver.fork(
                job.spec.job_id,
                scratch,
                job.spec.confinement.model_dump_json(),
                (worker_end.fileno(), stderr_end, keeper_end.fileno()),
            )
        finally:
            os.close(stderr_end)
        worker_end.close()
        keeper_end.close()
        for sock in (worker, keeper):
            sock.setblocking(False)
        os.set_blocking(stderr, False)
        watch = _Watch(job, scratch, worker, keeper, stderr, started, stack, keeper_pid)
        watch.meter = TreeMeter(keeper_pid, job.spec.limits.memory_bytes)
        watch.keeper_handle = _handle(keeper_pid, stack)
        try:
            _watch(watch, cancel)
        finally:
            if watch.exited is None:
                _kill_directly(watch, forkserver)
        return _result(watch, targets, queued)


def _watch(watch: _Watch, cancel: Cancel) -> None:
    """Serve the job's three channels and look at its tree, until the keeper has reported or must be given up."""
    limits = watch.job.spec.limits
    outgoing = _Outgoing(watch.job)
    replies = FrameReader(limits.reply_bytes)
    reports = FrameReader(NO_PAYLOAD)
    deadline = watch.started + limits.wall_seconds
    ticks = 0
    next_sample = watch.started + SAMPLE_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(watch.worker, selectors.EVENT_READ | selectors.EVENT_WRITE, "worker")
        selector.register(watch.keeper, selectors.EVENT_READ, "keeper")
        selector.register(watch.stderr, selectors.EVENT_READ, "stderr")
        selector.register(cancel, selectors.EVENT_READ, "cancel")
        while watch.exited is None and not watch.keeper_gone:
            now = time.monotonic()
            limit = min(next_sample, deadline if watch.cause is None else next_sample)
            for key, events in selector.select(max(0.0, limit - now)):
                if key.data == "worker":
                    _serve_worker(watch, selector, outgoing, replies, events)
                elif key.data == "keeper":
                    _serve_keeper(watch, reports)
                elif key.data == "stderr":
                    if not _read_stderr(watch):
                        selector.unregister(watch.stderr)
                else:
                    selector.unregister(cancel)
                    watch.breach(Status.CANCELLED, cancel.reason or "cancelled")
            now = time.monotonic()
            if now >= deadline and watch.reply is None:
                watch.breach(Status.TIMEOUT, f"still running after limits.wall_seconds = {limits.wall_seconds:g} s")
            if watch.reply is not None and now > watch.reply_at + EXIT_SECONDS:
                watch.kill()  # the reply is complete; a worker that does not exit loses nothing
            if watch.kill_deadline is not None and now > watch.kill_deadline:
                return
            if now >= next_sample:
                next_sample = now + SAMPLE_SECONDS
                ticks += 1
                _sample(watch, ticks)
    # What the job wrote last is still in the pipe.
    while _read_stderr(watch):
        pass
    _drain_replies(watch, replies)


class _Outgoing:
    """The request frame, sent as the worker's socket takes it."""

    def __init__(self, job: Job) -> None:
        self._buffers = [memoryview(buffer) for buffer in encode_frame(job.spec, job.payload)]

    def send(self, sock: socket.socket) -> bool:
        """Send some more; returns whether all is sent."""
        while self._buffers:
            try:
                sent = sock.sendmsg(self._buffers[:8])
            except BlockingIOError:
                return False
            except OSError:
                self._buffers.clear()  # the worker is gone; its exit status says why
                return True
            while self._buffers and sent >= len(self._buffers[0]):
                sent -= len(self._buffers.pop(0))
            if sent:
                self._buffers[0] = self._buffers[0][sent:]
        return True


def _serve_worker(
    watch: _Watch, selector: selectors.BaseSelector, outgoing: _Outgoing, replies: FrameReader, events: int
) -> None:
    if events & selectors.EVENT_WRITE and outgoing.send(watch.worker):
        selector.modify(watch.worker, selectors.EVENT_READ, "worker")
    if events & selectors.EVENT_READ and not _read_worker(watch, replies):
        selector.unregister(watch.worker)


def _read_worker(watch: _Watch, replies: FrameReader) -> bool:
    """Take what the worker has sent; returns whether more may come."""
    try:
        data = watch.worker.recv(_READ * 16)
    except BlockingIOError:
        return True
    except OSError:
        data = b""
    try:
        if not data:
            if replies.pending and watch.cause is None:
                raise WireError("the reply is truncated")
            return False
        for frame in replies.feed(data):
            envelope = parse_envelope(frame.envelope, Started, Reply)
            _take(watch, envelope, frame.payload)
    except OversizedFrame as error:
        watch.breach(Status.OUTPUT_LIMIT, f"limits.reply_bytes: {error}")
        return False
    except WireError as error:
        watch.breach(Status.PROTOCOL_ERROR, str(error))
        return False
    return True


def _take(watch: _Watch, envelope: BaseModel, payload: bytes) -> None:
    job_id = watch.job.spec.job_id
    if watch.reply is not None:
        raise WireError(f"a second frame after the reply of {job_id}")
    if isinstance(envelope, Started):
        if envelope.job_id != job_id or payload:
            raise WireError(f"a 'started' frame that is not {job_id}'s")
        watch.mechanisms.update(envelope.enforcement.mechanisms)
    elif isinstance(envelope, Reply):
        if envelope.job_id != job_id:
            raise WireError(f"a reply of {envelope.job_id} on the channel of {job_id}")
        watch.reply, watch.reply_payload, watch.reply_at = envelope, payload, time.monotonic()


def _serve_keeper(watch: _Watch, reports: FrameReader) -> None:
    try:
        data = watch.keeper.recv(_READ)
        if not data:
            raise WireError("the keeper of the job is gone")
        for frame in reports.feed(data):
            report: BaseModel = parse_envelope(frame.envelope, KeeperReady, Exited)
            if getattr(report, "job_id", None) != watch.job.spec.job_id:
                raise WireError("a report of another job's keeper")
            if isinstance(report, KeeperReady):
                watch.pid = report.pid
                watch.handle = _handle(report.pid, watch.stack)
                watch.mechanisms.update(report.enforcement.mechanisms)
                watch.mechanisms["watchdog"] = Mechanism(state=State.ENFORCED)
            elif isinstance(report, Exited):
                watch.exited = report
    except BlockingIOError:
        return
    except (WireError, OSError) as error:
        watch.keeper_gone = True
        if watch.cause is None:
            # Before it forked the worker the failure is ours; afterwards only the job could reach its keeper.
            status = Status.SANDBOX_ERROR if watch.pid is None else Status.CRASHED
            watch.cause = (status, f"the job's keeper died: {error}")


def _read_stderr(watch: _Watch) -> bool:
    """Take what the job has written; returns whether there may be more now."""
    try:
        data = os.read(watch.stderr, _READ)
    except BlockingIOError:
        return False
    if not data:
        return False
    limits = watch.job.spec.limits
    watch.stderr_bytes += len(data)
    watch.tail.append(data)
    watch.tail_bytes += len(data)
    while watch.tail and watch.tail_bytes - len(watch.tail[0]) >= limits.stderr_tail_bytes:
        watch.tail_bytes -= len(watch.tail.popleft())
    if watch.stderr_bytes > limits.stderr_bytes and watch.cause is None:
        watch.breach(Status.OUTPUT_LIMIT, f"more than limits.stderr_bytes = {limits.stderr_bytes} bytes of output")
    return True


def _sample(watch: _Watch, ticks: int) -> None:
    """Look at the tree and the scratch folder; kill at a breach."""
    if watch.meter is None or watch.kill_deadline is not None:
        return
    limits = watch.job.spec.limits
    usage = watch.meter.sample()
    watch.cpu_seconds = max(watch.cpu_seconds, usage.cpu_seconds)
    watch.peak_memory = max(watch.peak_memory, usage.memory_bytes)
    if usage.memory_bytes > limits.memory_bytes:
        watch.breach(
            Status.MEMORY_LIMIT,
            f"{usage.memory_bytes} bytes of private memory, limits.memory_bytes = {limits.memory_bytes}",
        )
    elif usage.processes > limits.processes:
        watch.breach(Status.VIOLATION, f"{usage.processes} processes, limits.processes = {limits.processes}")
    elif usage.cpu_seconds > limits.cpu_seconds:
        watch.breach(
            Status.CPU_LIMIT, f"{usage.cpu_seconds:.1f} s of CPU time, limits.cpu_seconds = {limits.cpu_seconds:g}"
        )
    elif ticks % DISK_EVERY == 0:
        used = survey(watch.scratch)
        if used.bytes > limits.disk_bytes or not used.complete:
            watch.breach(
                Status.OUTPUT_LIMIT,
                f"{used.bytes} bytes in {used.entries} files{'' if used.complete else ' or more'} of the scratch "
                f"folder, limits.disk_bytes = {limits.disk_bytes}",
            )


def _drain_replies(watch: _Watch, replies: FrameReader) -> None:
    """The tree is dead: what the worker sent before is in the socket's buffer, and nothing else will come."""
    if watch.cause is None or watch.reply is None:
        while _read_worker(watch, replies) and _readable(watch.worker):
            pass


def _readable(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _kill_directly(watch: _Watch, forkserver: Forkserver) -> None:
    """The keeper is gone or does not obey: kill the tree ourselves, and have the template kill what reached it."""
    for pid, handle in ((watch.keeper_pid, watch.keeper_handle), (watch.pid, watch.handle)):
        if pid is not None and handle is not None and _alive(handle):
            kill_tree(pid, include_root=True)
    forkserver.sweep()


def _alive(handle: int) -> bool:
    """Whether the process of a pidfd has not ended, so that its pid still means it."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return not poll.poll(0)


def _handle(pid: int, stack: contextlib.ExitStack) -> int | None:
    """A pidfd, or None if the process has ended already."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    stack.callback(os.close, handle)
    return handle


def _result(watch: _Watch, targets: dict[str, Path], queued: float) -> JobResult:
    status, detail, value = _judge(watch)
    adopted: tuple[Artifact, ...] = ()
    if status is Status.OK and watch.reply is not None and watch.reply.artifacts:
        try:
            artifacts.adopt(watch.reply.artifacts, watch.scratch / artifacts.FOLDER, targets, watch.job.spec.limits)
            adopted = watch.reply.artifacts
        except WireError as error:
            status, detail, value = Status.PROTOCOL_ERROR, str(error), None
        except OSError as error:
            status, detail, value = Status.SANDBOX_ERROR, f"the kernel files could not be adopted: {error}", None
    exited, reply = watch.exited, watch.reply
    tail = b"".join(watch.tail)[-watch.job.spec.limits.stderr_tail_bytes :]
    leaks: tuple[Leak, ...] = (reply.leaks if reply else ()) + (exited.leaks if exited else ())
    return JobResult(
        job_id=watch.job.spec.job_id,
        status=status,
        detail=detail,
        value=value,
        failure=reply.failure if reply is not None and status.value == reply.status else None,
        signal=_signal_name(exited.signal) if exited is not None and exited.signal is not None else None,
        exit_code=exited.exit_code if exited is not None else None,
        artifacts=adopted,
        usage=Usage(
            wall_seconds=time.monotonic() - watch.started,
            queue_seconds=queued,
            start_seconds=reply.start_seconds if reply else 0.0,
            cpu_seconds=max(watch.cpu_seconds, exited.cpu_seconds if exited else 0.0),
            peak_memory_bytes=watch.peak_memory,
            stderr_bytes=watch.stderr_bytes,
        ),
        stderr_tail=tail.decode(errors="replace"),
        leaks=LeakReport(job_id=watch.job.spec.job_id, leaks=leaks),
        enforcement=Enforcement(mechanisms=watch.mechanisms),
    )


def _judge(watch: _Watch) -> tuple[Status, str, object]:
    """The status, one line why, and the value: the first cause recorded wins."""
    if watch.cause is not None:
        return *watch.cause, None
    spec, exited, reply = watch.job.spec, watch.exited, watch.reply
    if reply is not None:
        status = Status(reply.status)
        if status is not Status.OK:
            return status, reply.detail, None
        allowed = frozenset(spec.result_globals) if isinstance(spec, CallableSpec) else frozenset()
        try:
            return status, "", safe_loads(watch.reply_payload, allowed)
        except WireError as error:
            return Status.PROTOCOL_ERROR, str(error), None
    if exited is None:
        return Status.SANDBOX_ERROR, "the keeper did not report", None
    if exited.refused:
        return Status.SANDBOX_ERROR, exited.refused, None
    if exited.signal is not None:
        name = _signal_name(exited.signal)
        if exited.signal == signal.SIGXCPU:
            return Status.CPU_LIMIT, f"died of {name}: RLIMIT_CPU behind limits.cpu_seconds", None
        if exited.signal == signal.SIGXFSZ:
            return Status.OUTPUT_LIMIT, f"died of {name}: RLIMIT_FSIZE behind limits.disk_bytes", None
        hint = " (nobody of ours sent it; perhaps the kernel's out-of-memory killer)" if exited.signal == 9 else ""
        return Status.CRASHED, f"the child died of {name}{hint}", None
    if exited.exit_code == EXIT_MEMORY:
        return Status.MEMORY_LIMIT, "an allocation failed under limits.memory_bytes", None
    ours_to_blame = {
        EXIT_UNCONFINED: "a required confinement is unavailable: ",
        EXIT_BAD_REQUEST: "the child refused the request: ",
        EXIT_NO_PARENT: "the child could not send its reply: ",
    }
    if exited.exit_code in ours_to_blame:
        last = b"".join(watch.tail).decode(errors="replace").strip().splitlines()
        return Status.SANDBOX_ERROR, ours_to_blame[exited.exit_code] + (last[-1] if last else "no word"), None
    return Status.CRASHED, f"the child exited with {exited.exit_code} without a reply", None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

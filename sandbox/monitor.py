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
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from sandbox import artifacts, ledger, reclaim, scratch, sealed
from sandbox.background import Background
from sandbox.enforce import identity
from sandbox.envelopes import Exited, KeeperReady, Reply, Started, parse_envelope
from sandbox.errors import ForkserverError, WireError
from sandbox.forkserver import SHORTAGES, Forkserver
from sandbox.gpu_memory import GpuMemory
from sandbox.jobs import CallableSpec, Job, TritonLaunchSpec
from sandbox.keeper import KILL, KILL_WITH_STACKS
from sandbox.launch import KILL_SECONDS, Launched, check_closed, launch, only_init_lives, see_dead
from sandbox.meter import survey
from sandbox.results import (
    OWN_LEAKS,
    Artifact,
    Enforcement,
    JobResult,
    Leak,
    LeakReport,
    State,
    Status,
    Usage,
    printable,
)
from sandbox.standby import Standbys
from sandbox.verdict import Evidence, judge, signal_name
from sandbox.wire import FrameReader, OversizedFrame, encode_frame

#: Seconds between two looks at the process tree: the time a breach can go unseen. RLIMIT_DATA stands behind it.
SAMPLE_SECONDS = 0.1
#: Looks at the tree between two looks at the scratch folder, which cost more.
DISK_EVERY = 5
#: This process looks ten times a second. If it has not for so many seconds, it was stopped (a paused container, a
#: debugger), and most likely the job with it: the time does not count as the job's, or its graph would be taken for one
#: that hangs.
STALL_SECONDS = 2.0
#: Seconds that a standby child has to begin with its job, to end its rehearsal and to read the request; at most half of
#: the job's. Then its job gets a fresh child, and all of its time again.
BEGIN_SECONDS = 30.0
#: Seconds that a worker has to exit once its reply is complete.
EXIT_SECONDS = 1.0
#: The same for one that replies at its deadline.
LAST_SECONDS = 0.1
#: Seconds, and bytes, for what a dead tree has left in its pipes: more than their buffers hold, less than a hang.
DRAIN_SECONDS = 1.0
DRAIN_BYTES = 8 << 20
#: What a worker may say of its own confinement; the rest is the keeper's and ours to say.
WORKER_MECHANISMS = frozenset({"rlimits", "no_new_privs", "capabilities", "landlock", "seccomp"})
#: Keepers of answered jobs that may be about to end, a count; the next one is waited for before its job is answered.
MAX_ENDING = 16
#: Frames from the keeper carry no payload.
NO_PAYLOAD = 0
_READ = 1 << 16


@dataclass
class _Watch:
    """One running job."""

    job: Job
    child: Launched
    started: float
    tell_memory: Callable[[int], None]
    seen: Evidence = field(default_factory=Evidence)
    kill_deadline: float | None = None
    reply_at: float = 0.0
    keeper_gone: bool = False
    tail: deque[bytes] = field(default_factory=deque)
    tail_bytes: int = 0
    stderr_bytes: int = 0
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    gpu_memory: GpuMemory | None = None

    def __post_init__(self) -> None:
        self.seen.forked = self.child.pid is not None

    def breach(self, status: Status, detail: str) -> None:
        """Record the first cause and have the tree killed. A complete reply is a cause, too: what the child does
        after it loses nothing, unless it talks on."""
        if self.seen.cause is None and (self.seen.reply is None or status is Status.PROTOCOL_ERROR):
            self.seen.cause = (status, detail)
        self.kill()

    def kill(self) -> None:
        """Tell the keeper to kill the tree; it may be gone already."""
        if self.kill_deadline is None:
            self.kill_deadline = time.monotonic() + KILL_SECONDS
            self.seen.ordered = True
            runs_on = self.seen.cause is not None and self.seen.cause[0] in (Status.TIMEOUT, Status.CPU_LIMIT)
            with contextlib.suppress(OSError):
                self.child.keeper.send(KILL_WITH_STACKS if runs_on else KILL)


class Cancel:
    """Lets another thread end a running job: wakes the monitor and gives the reason."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._write = -1

    def cancel(self, reason: str) -> None:
        """Ask for the end. Safe to call at any time, any number of times."""
        with self._lock:
            self.reason = self.reason or reason
            if self._write >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._write, b"c")

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """A descriptor that becomes readable at :meth:`cancel`. Only a running job needs one."""
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with self._lock:
                self._write = write
                if self.reason is not None:
                    os.write(write, b"c")
            yield read
        finally:
            with self._lock:
                self._write = -1
            os.close(read)
            os.close(write)


def run(
    forkserver: Forkserver,
    job: Job,
    cancel: Cancel,
    targets: dict[str, Path],
    queued: float = 0.0,
    tell_memory: Callable[[int], None] = lambda _: None,
    *,
    standbys: Standbys | None = None,
    background: Background,
) -> JobResult:
    """Run one job in one child, to its end.

    Args:
        forkserver: where the child comes from.
        job: what to do.
        cancel: ends the job early with status `cancelled`.
        targets: the user's cache folders by the first part of an artifact's path.
        queued: seconds that the job waited before this call, for the result.
        tell_memory: called at each look with the bytes that the job uses.
        standbys: children that wait for a job; without one that fits, a fresh one is forked.
        background: where the end of the keeper is waited for, and its folder removed.

    Raises:
        ForkserverError: the child could not be forked, or was a standby that ended before it had begun; nothing is
            left of the job.
        OSError: the parent lacks descriptors or disk for it; nothing is left of the job.
    """
    left: list[Leak] = []
    spec = job.spec
    made: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        # Called last: by then all that this job has opened here must be closed.
        stack.callback(check_closed, spec.job_id, made, forkserver)
        wake = stack.enter_context(cancel.listening())
        child = standbys.take(spec) if standbys is not None else None
        if child is None:
            child = launch(forkserver, spec.job_id, spec.confinement, spec.limits, gpu=spec.gpu)
        stack.callback(child.close)
        made |= child.made | ledger.links((wake,))
        watch = _Watch(job, child, time.monotonic(), tell_memory)
        try:
            if not child.standby:
                child.measure()
            watch.seen.mechanisms.update(child.mechanisms)
            if spec.gpu:
                watch.gpu_memory = GpuMemory()
            for channel in (child.worker, child.keeper):
                channel.setblocking(False)
            os.set_blocking(child.stderr, False)
            _watch(watch, cancel, wake)
        finally:
            reported = watch.seen.exited is not None
            if not (reported and only_init_lives(child, watch.seen.mechanisms)):
                see_dead(child, reported)
                left += _recorded(child.folder)
            # The kernel and the disk take their time for it, and no answer has to wait.
            stack.callback(background.add, child.clear_away, MAX_ENDING)
            if watch.gpu_memory is not None:
                left += watch.gpu_memory.left()
                watch.seen.mechanisms["gpu_memory"] = watch.gpu_memory.mechanism
        cause = watch.seen.cause
        if child.standby and not watch.seen.started and (cause is None or cause[0] is not Status.CANCELLED):
            why = f": {cause[1]}" if cause is not None else ""
            raise ForkserverError(f"a standby child ended before its job began{why}")
        result = _result(watch, targets, queued)
    if left:
        # Whoever reads the report must know what the job has left on the disk.
        leaks = LeakReport(job_id=result.job_id, leaks=(*result.leaks.leaks, *left))
        result = result.model_copy(update={"leaks": leaks})
    return result


def _recorded(folder: Path) -> list[Leak]:
    """Remove what a keeper that was killed had seen of the job in shared namespaces. The others do it themselves."""
    path = reclaim.record_path(folder)
    found = [held.leak("child", not reclaim.remove_held(held)) for held in reclaim.recorded(path)]
    scratch.remove(path)  # whatever it is: see there
    return found


def _clean(leak: Leak) -> Leak:
    """As it may stand in a log, whatever the job has written into it."""
    stack = tuple(printable(line, ledger.MAX_TEXT) for line in leak.stack[: ledger.MAX_FRAMES])
    return leak.model_copy(update={"object": printable(leak.object, ledger.MAX_TEXT), "stack": stack})


def _watch(watch: _Watch, cancel: Cancel, wake: int) -> None:
    """Serve the job's three channels and look at its tree, until the keeper has reported or must be given up."""
    limits = watch.job.spec.limits
    outgoing = _Outgoing(watch.job)
    replies = FrameReader(limits.reply_bytes)
    reports = FrameReader(NO_PAYLOAD)
    deadline = watch.started + limits.wall_seconds
    begin = watch.started + min(BEGIN_SECONDS, limits.wall_seconds / 2)
    looked = watch.started
    ticks = 0
    next_sample = watch.started + SAMPLE_SECONDS
    with selectors.DefaultSelector() as selector, contextlib.closing(outgoing):
        selector.register(watch.child.worker, selectors.EVENT_READ | selectors.EVENT_WRITE, "worker")
        selector.register(watch.child.keeper, selectors.EVENT_READ, "keeper")
        selector.register(watch.child.stderr, selectors.EVENT_READ, "stderr")
        selector.register(wake, selectors.EVENT_READ, "cancel")
        while watch.seen.exited is None and not watch.keeper_gone:
            settled = watch.kill_deadline is not None or watch.seen.reply is not None
            limit = next_sample if settled else min(next_sample, deadline)
            # A second look: after a stop of this process that outlasts the wait (SIGSTOP, a debugger) the first comes
            # back with nothing, whatever has arrived meanwhile.
            for key, events in selector.select(max(0.0, limit - time.monotonic())) or selector.select(0):
                if key.data == "worker":
                    _serve_worker(watch, selector, outgoing, replies, events)
                elif key.data == "keeper":
                    _serve_keeper(watch, reports)
                elif key.data == "stderr":
                    if _read_stderr(watch) < 0:
                        selector.unregister(watch.child.stderr)
                else:
                    selector.unregister(wake)
                    watch.breach(Status.CANCELLED, cancel.reason or "cancelled")
            now = time.monotonic()
            if now - looked > STALL_SECONDS:
                deadline += now - looked
            looked = now
            if now >= deadline and watch.seen.reply is None:
                watch.breach(Status.TIMEOUT, f"still running after limits.wall_seconds = {limits.wall_seconds:g} s")
            if watch.child.standby and not watch.seen.started and now > begin:
                watch.breach(
                    Status.SANDBOX_ERROR, f"a standby child has not begun within {begin - watch.started:.1f} s"
                )
            if watch.seen.reply is not None:
                # The reply is complete; a worker that does not exit loses nothing. Nor does it gain time beyond the
                # deadline by a reply just before it.
                last = max(deadline, watch.reply_at + LAST_SECONDS)
                if now > min(watch.reply_at + EXIT_SECONDS, last):
                    watch.kill()
            if watch.kill_deadline is not None and now > watch.kill_deadline:
                return
            if now >= next_sample:
                next_sample = now + SAMPLE_SECONDS
                ticks += 1
                _sample(watch, ticks)
        # What was sent last is still in the buffers. A survivor may go on writing: it is killed next.
        end = time.monotonic() + DRAIN_SECONDS
        budget = DRAIN_BYTES
        while (read := _read_stderr(watch)) > 0 and budget > 0 and time.monotonic() < end:
            budget -= read
        budget = limits.reply_bytes + DRAIN_BYTES
        while watch.seen.cause is None and budget > 0 and time.monotonic() < end and _readable(watch.child.worker):
            if (read := _read_worker(watch, replies)) < 0:
                break
            budget -= read
        watch.seen.truncated = replies.pending


class _Outgoing:
    """The request frame, sent as the worker's socket takes it; a large payload in a sealed file that goes with it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._file = -1
        if len(job.payload) > sealed.LARGE:
            with contextlib.suppress(OSError):  # no memory or descriptor for it, or no memfd here: by the socket
                self._file = sealed.seal(job.payload)
        self._encode()

    def _encode(self) -> None:
        payload = self._job.payload if self._file < 0 else b""
        self._buffers = [memoryview(buffer) for buffer in encode_frame(self._job.spec, payload)]

    def close(self) -> None:
        """Close the file; the kernel keeps it as long as it is under way or held by the worker."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def send(self, sock: socket.socket) -> bool:
        """Send some more; returns whether all is sent."""
        while self._buffers:
            try:
                if self._file >= 0:
                    sent = socket.send_fds(sock, self._buffers[:8], [self._file])
                    self.close()
                else:
                    sent = sock.sendmsg(self._buffers[:8])
            except BlockingIOError:
                return False
            except OSError as error:
                if self._file >= 0 and error.errno in SHORTAGES:
                    self.close()
                    self._encode()  # nothing is out yet
                    continue
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
    if events & selectors.EVENT_WRITE and outgoing.send(watch.child.worker):
        selector.modify(watch.child.worker, selectors.EVENT_READ, "worker")
    if events & selectors.EVENT_READ and _read_worker(watch, replies) < 0:
        selector.unregister(watch.child.worker)


def _read_worker(watch: _Watch, replies: FrameReader) -> int:
    """Take what the worker has sent; returns how many bytes, or -1 if no more will be taken."""
    try:
        data = watch.child.worker.recv(_READ * 16)
    except BlockingIOError:
        return 0
    except OSError:
        return -1
    if not data:
        return -1
    try:
        for frame in replies.feed(data):
            _take(watch, parse_envelope(frame.envelope, Started, Reply), frame.payload)
    except OversizedFrame as error:
        watch.breach(Status.OUTPUT_LIMIT, f"limits.reply_bytes: {error}")
        return -1
    except WireError as error:
        watch.breach(Status.PROTOCOL_ERROR, str(error))
        return -1
    return len(data)


def _take(watch: _Watch, envelope: BaseModel, payload: bytes) -> None:
    job_id, seen = watch.job.spec.job_id, watch.seen
    if seen.reply is not None:
        raise WireError(f"a second frame after the reply of {job_id}")
    if isinstance(envelope, Started):
        said = envelope.enforcement.mechanisms
        if envelope.job_id != job_id or payload or seen.started or not WORKER_MECHANISMS.issuperset(said):
            raise WireError(f"a 'started' frame that is not the one of {job_id}")
        seen.started = True
        seen.mechanisms.update(said)
    elif isinstance(envelope, Reply):
        if envelope.job_id != job_id:
            raise WireError(f"a reply of {envelope.job_id} on the channel of {job_id}")
        if not seen.started:
            raise WireError("a reply without the 'started' that tells what was enforced")
        if any(leak.kind not in OWN_LEAKS or leak.owner != "child" for leak in envelope.leaks):
            raise WireError("a reply that tells of leaks which are not the worker's to tell")
        seen.reply, seen.payload, watch.reply_at = envelope, payload, time.monotonic()


def _serve_keeper(watch: _Watch, reports: FrameReader) -> None:
    seen = watch.seen
    try:
        data = watch.child.keeper.recv(_READ)
        if not data:
            raise WireError("it is gone")
        for frame in reports.feed(data):
            report: BaseModel = parse_envelope(frame.envelope, KeeperReady, Exited)
            if getattr(report, "job_id", None) != watch.child.name:
                raise WireError("a report of another job's keeper")
            if isinstance(report, KeeperReady):
                if watch.child.pid is not None:
                    raise WireError("a second 'ready'")
                watch.child.ready(report)
                seen.forked = True
                seen.mechanisms.update(report.enforcement.mechanisms)
            elif isinstance(report, Exited):
                seen.exited = report
    except BlockingIOError:
        return
    except (WireError, OSError) as error:
        watch.keeper_gone = True
        if seen.cause is None and seen.reply is None and not watch.child.standby:
            # Before it forked the worker the failure is ours; afterwards only the job could reach its keeper.
            status = Status.SANDBOX_ERROR if watch.child.pid is None else Status.CRASHED
            seen.cause = (status, f"the job's keeper died: {error}")


def _read_stderr(watch: _Watch) -> int:
    """Take what the job has written; returns how many bytes there were, or -1 at the end."""
    try:
        data = os.read(watch.child.stderr, _READ)
    except BlockingIOError:
        return 0
    if not data:
        return -1
    limits = watch.job.spec.limits
    watch.stderr_bytes += len(data)
    watch.tail.append(data)
    watch.tail_bytes += len(data)
    while watch.tail and watch.tail_bytes - len(watch.tail[0]) >= limits.stderr_tail_bytes:
        watch.tail_bytes -= len(watch.tail.popleft())
    if watch.stderr_bytes > limits.stderr_bytes and watch.seen.cause is None:
        watch.breach(Status.OUTPUT_LIMIT, f"more than limits.stderr_bytes = {limits.stderr_bytes} bytes of output")
    return len(data)


def _sample(watch: _Watch, ticks: int) -> None:
    """Look at the tree and the scratch folder; kill at a breach."""
    if watch.child.meter is None or watch.kill_deadline is not None:
        return
    limits = watch.job.spec.limits
    usage = watch.child.meter.sample()
    watch.cpu_seconds = max(watch.cpu_seconds, usage.cpu_seconds - watch.child.cpu_seconds)
    watch.peak_memory = max(watch.peak_memory, usage.memory_bytes)
    watch.tell_memory(usage.memory_bytes)
    # The init of the job's process ids is ours. Whether there is one is not known before the keeper is ready.
    pids = watch.seen.mechanisms.get("pid_namespace")
    init = 1 if watch.child.pid is None or (pids is not None and pids.state in (State.ENFORCED, State.PARTIAL)) else 0
    processes, threads = usage.processes - init, usage.threads - init
    # The more telling cause first: a fork bomb is over the memory limit, too.
    if processes > limits.processes:
        watch.breach(Status.VIOLATION, f"{processes} processes, limits.processes = {limits.processes}")
    elif threads > limits.threads:
        watch.breach(Status.VIOLATION, f"{threads} threads, limits.threads = {limits.threads}")
    elif usage.memory_bytes > limits.memory_bytes:
        watch.breach(
            Status.MEMORY_LIMIT,
            f"{usage.memory_bytes} bytes of private memory, limits.memory_bytes = {limits.memory_bytes}",
        )
    elif watch.gpu_memory is not None and watch.gpu_memory.sample(watch.child.meter.live) > limits.gpu_memory_bytes:
        watch.breach(
            Status.MEMORY_LIMIT,
            f"{watch.gpu_memory.peak_bytes} bytes of GPU memory, limits.gpu_memory_bytes = {limits.gpu_memory_bytes}",
        )
    elif watch.cpu_seconds > limits.cpu_seconds:
        watch.breach(
            Status.CPU_LIMIT, f"{watch.cpu_seconds:.1f} s of CPU time, limits.cpu_seconds = {limits.cpu_seconds:g}"
        )
    elif ticks % DISK_EVERY == 0:
        used = survey(watch.child.folder)
        nameless = watch.child.meter.nameless_bytes(os.stat(watch.child.folder.parent).st_dev)
        if used.bytes + nameless > limits.disk_bytes or not used.complete:
            removed = f" and {nameless} in removed files that are still open" if nameless else ""
            watch.breach(
                Status.OUTPUT_LIMIT,
                f"{used.bytes} bytes in {used.entries} files{'' if used.complete else ' or more'} of the scratch "
                f"folder{removed}, limits.disk_bytes = {limits.disk_bytes}",
            )


def _readable(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _result(watch: _Watch, targets: dict[str, Path], queued: float) -> JobResult:
    spec, seen = watch.job.spec, watch.seen
    tail = b"".join(watch.tail)[-spec.limits.stderr_tail_bytes :] if spec.limits.stderr_tail_bytes else b""
    seen.last_words = tail.decode(errors="replace")
    status, detail, value = judge(
        seen, frozenset(spec.result_globals) if isinstance(spec, CallableSpec) else frozenset()
    )
    exited, reply = seen.exited, seen.reply
    adopted: tuple[Artifact, ...] = ()
    if status is Status.OK and reply is not None and reply.artifacts:
        try:
            user = identity.user_of(spec.confinement)
            owner = None if user is None else user.uid
            wanted = tuple(artifact for artifact in reply.artifacts if spec.admits(artifact.path))
            folder = watch.child.folder / artifacts.FOLDER
            artifacts.adopt(wanted, folder, targets, spec.limits, owner, replace=isinstance(spec, TritonLaunchSpec))
            adopted = wanted
        except artifacts.ArtifactsTooLarge as error:
            status, detail, value = Status.OUTPUT_LIMIT, str(error), None
        except WireError as error:
            status, detail, value = Status.PROTOCOL_ERROR, str(error), None
        except OSError as error:
            status, detail, value = Status.SANDBOX_ERROR, f"the kernel files could not be adopted: {error}", None
    origins = reply.origins if reply else {}
    leaks = tuple(
        _clean(leak.model_copy(update={"stack": leak.stack or origins.get(leak.object, ())}))
        for leak in (*(reply.leaks if reply else ()), *(exited.leaks if exited else ()))
    )
    return JobResult(
        job_id=spec.job_id,
        status=status,
        by_child=reply is not None and status is reply.status,
        detail=detail,
        value=value,
        failure=reply.failure if reply is not None and status is reply.status else None,
        signal=signal_name(exited.signal) if exited is not None and exited.signal is not None else None,
        exit_code=exited.exit_code if exited is not None else None,
        artifacts=adopted,
        usage=Usage(
            wall_seconds=time.monotonic() - watch.started,
            queue_seconds=queued,
            start_seconds=reply.start_seconds if reply else 0.0,
            cpu_seconds=max(watch.cpu_seconds, (exited.cpu_seconds if exited else 0.0) - watch.child.cpu_seconds),
            peak_memory_bytes=max(watch.peak_memory, exited.peak_memory_bytes if exited else 0),
            peak_gpu_memory_bytes=watch.gpu_memory.peak_bytes if watch.gpu_memory is not None else 0,
            memory_granted_bytes=spec.limits.memory_bytes,
            stderr_bytes=watch.stderr_bytes,
        ),
        stderr_tail=seen.last_words,
        leaks=LeakReport(job_id=spec.job_id, leaks=leaks),
        enforcement=Enforcement(mechanisms=seen.mechanisms),
    )

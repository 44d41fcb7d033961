"""The parent's handle on the template process: starts it, asks it for children, restarts it when it dies.

The parent never forks: it may hold CUDA and threads. It execs a fresh interpreter for the template. One thread of
ours, which lives as long as the process, does that, for two reasons: start and warm-up overlap with the
caller's work, and the kernel's "die with the parent" signal follows the *thread* that started the child.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox import ledger, leftovers
from sandbox.enforce import cgroups, identity
from sandbox.errors import ForkserverError
from sandbox.limits import Confinement, Limits
from sandbox.policy import Policy
from sandbox.processes import read_stat
from sandbox.results import Leak
from sandbox.scratch import Root
from sandbox.template import MAX_MESSAGE

#: Seconds until a template that was told to leave is killed.
LEAVE_SECONDS = 2.0
#: Leaks of the template and of this process that are kept for the report, a count.
MAX_LEAKS = 1000
#: A template that lived shorter than this, in seconds, is not started again before a job asks for it.
MIN_LIFE_SECONDS = 5.0
#: What makes the injection points, in the template: by name, and only where the policy allows faults.
_FAULTS = ("sandbox.faults.inside",)
#: What a host may be short of when descriptors are sent, which is no fault of the template. ETOOMANYREFS: this user's
#: processes have too many descriptors under way.
SHORTAGES = (errno.ETOOMANYREFS, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_START = "import sys; sys.path[:] = {path!r}; from sandbox.template import main; main({fd})"


#: Our ends of the sockets to templates, keepers and workers. If the host forks, its child must not hold them open:
#: their closing is how the other side learns that the parent is gone.
_OURS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def ours(sock: socket.socket) -> socket.socket:
    """Register a socket that a fork of the host must close."""
    _OURS.add(sock)
    return sock


def _close_ours() -> None:
    for sock in list(_OURS):
        sock.close()


os.register_at_fork(after_in_child=_close_ours)


@dataclass(frozen=True)
class Keeper:
    """The keeper process of one job, named by pid and start time: a pid alone may be somebody else's by now."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        """Whether it has not ended."""
        stat = read_stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks and not stat.dead


class Forkserver:
    """One template process and its restarts. Thread-safe. Its folder ``root`` holds every job's scratch folder."""

    def __init__(self, policy: Policy, environment: dict[str, str]) -> None:
        """``environment``: what the template may see, already reduced to the policy's allow-list."""
        self._policy = policy
        self._environment = environment
        try:
            leftovers.sweep()
            self.root = Root()
        except OSError as error:
            raise ForkserverError(
                f"the temporary folder cannot be written: {error}; set TMPDIR to a folder that can"
            ) from None
        self._change = threading.Condition(threading.RLock())
        self._fork_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._wanted = False
        self._starting = False
        self._closed = False
        self._failure = ""
        self._start_failed = False
        self._ready_since = 0.0
        self.starts = 0
        self.forks = 0
        self.strays = 0
        self._leaks: dict[str, Leak] = {}
        self.facts: dict[str, Any] = {}
        self.on_ready: Callable[[], None] = lambda: None
        """Called whenever a template has warmed up; must return at once."""
        self._thread: threading.Thread | None = None

    @property
    def restarts(self) -> int:
        """How often a template had to be started again, a count."""
        return max(0, self.starts - 1)

    @property
    def pid(self) -> int | None:
        """Pid of the template, or None when there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def ready_pid(self) -> int | None:
        """Pid of the template, or None when there is none that can fork."""
        return self.pid if self._ready else None

    def start(self) -> None:
        """Begin to start the template in the background, if none is running."""
        with self._change:
            if self._closed:
                raise ForkserverError("the forkserver was shut down")
            # Whoever asks while one is being started gets that one.
            self._wanted = self._wanted or not (self._starting or self._ready)
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="sandbox-forkserver", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise ForkserverError(f"no thread can be started for the forkserver: {error}") from None
                self._thread = thread
            self._change.notify_all()

    def wait_ready(self, seconds: float | None = None, wanted: Callable[[], bool] = lambda: True) -> None:
        """Block until the template can fork, or until ``wanted`` says no (it is asked again at every :meth:`poke`).

        Raises:
            ForkserverError: it could not be started, or not within ``seconds`` (default: the policy's).
        """
        limit = seconds or self._policy.forkserver.start_timeout_seconds
        deadline = time.monotonic() + limit
        with self._change:
            if not self._ready:
                self._failure = ""
                self.start()
            while not self._ready and wanted():
                if self._closed:
                    raise ForkserverError("the forkserver was shut down")
                if self._failure:
                    raise ForkserverError(self._failure)
                if not self._change.wait(deadline - time.monotonic()):
                    raise ForkserverError(f"the forkserver was not ready within {limit:.0f} s")

    def poke(self) -> None:
        """Have everyone in :meth:`wait_ready` ask again whether it is still wanted."""
        with self._change:
            self._change.notify_all()

    def fork(
        self,
        job_id: str,
        folder: Path,
        confinement: Confinement,
        limits: Limits,
        fds: Sequence[int],
        *,
        standby: bool = False,
        gpu: bool = False,
    ) -> Keeper:
        """Fork a keeper for a job. ``fds``: job socket, stderr pipe, keeper socket (the child's ends). A ``standby``
        has no job yet, and ``job_id`` is its own name.

        Raises:
            ForkserverError: the template is dead, does not answer in time, or refuses.
        """
        request = {
            "op": "fork",
            "job_id": job_id,
            "scratch": str(folder),
            "confinement": confinement.model_dump_json(),
            "limits": limits.model_dump_json(),
            "gpu": gpu,
            "standby": standby,
        }
        answer = self._ask(request, fds, self._policy.forkserver.fork_timeout_seconds)
        if answer.get("event") != "forked" or answer.get("job_id") != job_id:
            raise ForkserverError(f"the forkserver refused: {answer.get('reason', answer)}")
        self.forks += not standby  # those that get a job are counted then
        return Keeper(int(answer["pid"]), int(answer["start_ticks"]))

    def leaks(self) -> tuple[Leak, ...]:
        """What the template, or this process on its behalf, holds that it should not: told, never touched."""
        with self._change:
            found = tuple(self._leaks.values())
        if self.strays:
            strays = Leak(kind="orphan", object=f"{self.strays} strays", owner="forkserver", reclaimed=True)
            return (*found, strays)
        return found

    def tell(self, leak: Leak) -> None:
        """Keep a leak of ours for the report; the first 1,000 are kept, each once."""
        with self._change:
            if len(self._leaks) < MAX_LEAKS:
                self._leaks.setdefault(leak.object, leak)

    def tell_running(self, thread: threading.Thread) -> None:
        """Tell of a thread of ours that should have ended by now, and where it is, if it has not."""
        if thread.is_alive() and thread.native_id is not None:
            name, stack = ledger.python_thread(thread.native_id)
            text = f"thread {thread.native_id}, Python's {name!r}"
            self.tell(Leak(kind="thread", object=text, owner="parent", reclaimed=False, stack=stack))

    def sweep(self) -> None:
        """Have the template, if it lives, kill the processes that reached it from dead keepers."""
        if self._ready:
            # One that dies of it is noticed by the thread, counted as a restart, and its strays are counted below.
            with contextlib.suppress(ForkserverError):
                self._ask({"op": "inspect"}, (), self._policy.forkserver.fork_timeout_seconds)

    def inspect(self) -> dict[str, Any]:
        """Threads, leaks and killed strays of the template, after it has killed strays."""
        self.wait_ready()
        return self._ask({"op": "inspect"}, (), self._policy.forkserver.fork_timeout_seconds)

    def begin_close(self) -> None:
        """From now on nothing is started or forked, and whoever waits for it is told. Returns at once."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def close(self) -> None:
        """End the template and remove the scratch root. Idempotent; returns within a few seconds."""
        self.begin_close()
        with self._change:
            control, process, thread = self._control, self._process, self._thread
        if control is not None:
            with contextlib.suppress(OSError):
                control.send(b'{"op": "leave"}')
        if process is not None:
            try:
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if thread is not None and thread is not threading.current_thread():
            # It notices the end of the template, or that a start is no longer wanted.
            thread.join(LEAVE_SECONDS)
            self.tell_running(thread)
        cgroups.sweep(cgroups.group_names(self.root.path), self._policy.confinement.cgroup_parent)
        for text in self.root.remove():
            self.tell(Leak(kind="temp_file", object=text[:300], owner="parent", reclaimed=False))

    def _ask(self, request: dict[str, Any], fds: Sequence[int], seconds: float) -> dict[str, Any]:
        with self._fork_lock:
            with self._change:
                control, process, ready = self._control, self._process, self._ready
            # Whoever asks has waited until it was ready, and does so again: nobody waits here, holding the lock.
            if control is None or process is None or not ready:
                raise ForkserverError("the forkserver died")
            problem = ""
            try:
                control.settimeout(seconds)
                try:
                    socket.send_fds(control, [json.dumps(request).encode()], list(fds))
                except OSError as error:
                    if error.errno in SHORTAGES:
                        raise ForkserverError(f"the fork cannot be asked for: {error}") from None
                    raise
                answer = json.loads(control.recv(MAX_MESSAGE) or b"null")
                if isinstance(answer, dict):
                    self.strays += int(answer.get("strays", 0))
                    for text, kind in answer.get("leaks", {}).items():
                        self.tell(
                            Leak(kind=kind, object=f"{text} of pid {process.pid}", owner="forkserver", reclaimed=False)
                        )
                    return answer
                problem = "the forkserver died"
            except TimeoutError:
                problem = f"the forkserver did not answer within {seconds:.0f} s; killed"
            except OSError as error:
                problem = f"the forkserver died: {error}"
            except ValueError:
                problem = "the forkserver's answer is not JSON; killed"
            self._kill(process)
            raise ForkserverError(problem)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill this template. Our thread notices, and the next request starts another."""
        with self._change:
            if self._process is process:
                self._ready = False
            process.kill()
            self._change.notify_all()

    # The thread.

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._wanted and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                self._wanted, self._starting, self._failure = False, True, ""
            try:
                process = self._start_one()
            except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits is told, and the thread lives on
                with self._change:
                    self._failure = f"the forkserver could not be started: {error}"
                    self._start_failed = True
                    self._reset()
                continue
            process.wait()
            with self._change:
                # Warm again before the next job asks for it; one that dies at once waits until it is asked for.
                self._wanted = self._wanted or time.monotonic() - self._ready_since > MIN_LIFE_SECONDS
                self._reset()

    def _gpus_hidden(self) -> bool:
        """Whether the next template is not warmed up for GPUs: hidden from this process, they are none of its
        children's either; and a ptxas that ends or holds up a template must not take graphs for the CPU with it."""
        return self._start_failed or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")

    def _reset(self) -> None:
        """No template any more."""
        self._ready = self._starting = False
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._control is not None:
            self._control.close()
        self._control = None
        self._process = None
        self._change.notify_all()

    def _start_one(self) -> subprocess.Popen[bytes]:
        """Start a template and see it through its warm-up.

        Raises:
            ForkserverError, OSError, TypeError, ValueError: it failed; the message says why.
        """
        path = _search_path()
        settings = {
            "root": str(self.root.path),
            "cgroup_parent": self._policy.confinement.cgroup_parent,
            "parent_pid": os.getpid(),
            "sys_path": path,
            "import_torch": self._policy.forkserver.import_torch,
            "warm_up": self._policy.forkserver.warm_up,
            "gpus_hidden": self._gpus_hidden(),
            "preload": [*self._policy.forkserver.preload, *(_FAULTS if self._policy.allow_faults else ())],
        }
        # A folder of its own for each start: a job may have done anything to the last one.
        folder = self.root.folder("template")
        log_path = folder / "log"
        control, theirs = socket_pair(socket.SOCK_SEQPACKET)
        try:
            with theirs, log_path.open("xb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _START.format(path=path, fd=theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=self._template_environment(folder),
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException:
            control.close()
            raise
        with self._change:
            # From here on `close` and `_reset` see it.
            self._process, self._control = process, control
            self.starts += 1
            if self._closed:
                raise ForkserverError("the forkserver was shut down")
        control.settimeout(self._policy.forkserver.start_timeout_seconds)
        try:
            control.send(json.dumps(settings).encode())
            answer = json.loads(control.recv(MAX_MESSAGE) or b'{"event": "failed", "reason": "it died"}')
        except TimeoutError:
            answer = {"event": "failed", "reason": "no answer in forkserver.start_timeout_seconds"}
        except OSError as error:
            answer = {"event": "failed", "reason": f"it died: {error}"}
        if answer.get("event") != "ready":
            raise ForkserverError(f"{answer.get('reason')}{_last_lines(log_path)}")
        if self._policy.confinement.run_as:
            identity.open_to_all(folder)  # what the warm-up has left is for another user's workers, too
        with self._change:
            self.facts = answer
            self._starting = False
            self._ready = not self._closed
            self._ready_since = time.monotonic()
            self._change.notify_all()
        self.on_ready()
        return process

    def _template_environment(self, folder: Path) -> dict[str, str]:
        (folder / "tmp").mkdir()
        environment = {
            **self._environment,
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
            "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
            # One thread in the template and one worker pool less to fork: see sandbox/template.py.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # The template must not touch the GPUs, or its children cannot: see sandbox/inductor/devices.py. With
            # this check PyTorch heeds the empty list without asking CUDA.
            "CUDA_VISIBLE_DEVICES": "",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        environment.pop("TORCHINDUCTOR_FX_COMPILE_MODE", None)
        return environment


def _search_path() -> list[str]:
    """This process's search path, for another working folder. One that was deleted holds nothing to import."""
    entries = [os.fspath(entry) for entry in sys.path]
    try:
        return [entry or os.getcwd() for entry in entries]
    except FileNotFoundError:
        return [entry for entry in entries if entry]


def _last_lines(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
        text = file.read(2000).decode(errors="replace").strip()
    return f"\n{text}" if text else ""


def socket_pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """A connected pair of local sockets: our end, and the other side's. A fork of the host closes both: the other
    side's end, held open there, would hide that its process has died."""
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    return ours(_away_from_standard(here)), ours(_away_from_standard(there))


def _away_from_standard(sock: socket.socket) -> socket.socket:
    """A host that has closed stdin, stdout or stderr would give us their numbers; Popen would overwrite them."""
    if sock.fileno() > 2:
        return sock
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))

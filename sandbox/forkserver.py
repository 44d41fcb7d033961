"""The parent's handle on the template process: starts it, asks it for children, restarts it when it dies.

The parent never forks: it may hold CUDA and threads. It execs a fresh interpreter for the template. One thread of
ours, which lives as long as the process, does that, for two reasons: start and warm-up overlap with the
caller's work, and the kernel's "die with the parent" signal follows the *thread* that started the child.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sandbox.errors import ForkserverError
from sandbox.policy import Policy
from sandbox.template import MAX_MESSAGE

#: Seconds until a template that was told to leave is killed.
LEAVE_SECONDS = 2.0
#: A template that lived shorter than this, in seconds, is not started again before a job asks for it.
MIN_LIFE_SECONDS = 5.0
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


class Forkserver:
    """One template process and its restarts. Thread-safe. Its folder ``root`` holds every job's scratch folder."""

    def __init__(self, policy: Policy, environment: dict[str, str]) -> None:
        """``environment``: what the template may see, already reduced to the policy's allow-list."""
        self._policy = policy
        self._environment = environment
        self.root = Path(tempfile.mkdtemp(prefix=f"sandbox-{os.geteuid()}-{os.getpid()}-"))
        self._change = threading.Condition(threading.RLock())
        self._fork_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._wanted = False
        self._closed = False
        self._failure = ""
        self._ready_since = 0.0
        self.starts = 0
        self.forks = 0
        self.facts: dict[str, Any] = {}
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

    def start(self) -> None:
        """Begin to start the template in the background, if none is running."""
        with self._change:
            if self._closed:
                raise ForkserverError("the forkserver was shut down")
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sandbox-forkserver", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def wait_ready(self, seconds: float | None = None) -> None:
        """Block until the template can fork.

        Raises:
            ForkserverError: it could not be started, or not within ``seconds`` (default: the policy's).
        """
        limit = seconds or self._policy.forkserver.start_timeout_seconds
        deadline = time.monotonic() + limit
        with self._change:
            if not self._ready:
                self._failure = ""
                self.start()
            while not self._ready:
                if self._closed:
                    raise ForkserverError("the forkserver was shut down")
                if self._failure:
                    raise ForkserverError(self._failure)
                if not self._change.wait(deadline - time.monotonic()):
                    raise ForkserverError(f"the forkserver was not ready within {limit:.0f} s")

    def fork(self, job_id: str, scratch: Path, confinement: str, fds: Sequence[int]) -> int:
        """Fork a keeper for a job; returns its pid. ``fds``: job socket, stderr pipe, keeper socket (the child's ends).

        Raises:
            ForkserverError: the template is dead, does not answer in time, or refuses.
        """
        request = {"op": "fork", "job_id": job_id, "scratch": str(scratch), "confinement": confinement}
        answer = self._ask(request, fds, self._policy.forkserver.fork_timeout_seconds)
        if answer.get("event") != "forked" or answer.get("job_id") != job_id:
            self._kill()
            raise ForkserverError(f"the forkserver refused: {answer.get('reason', answer)}")
        self.forks += 1
        return int(answer["pid"])

    def sweep(self) -> None:
        """Have the template, if it lives, kill the processes that reached it from dead keepers."""
        if self._ready:
            # A template that dies of it is noticed, counted and restarted as any other.
            with contextlib.suppress(ForkserverError):
                self.inspect()

    def inspect(self) -> dict[str, Any]:
        """Threads and open descriptors of the template, after it has killed strays."""
        return self._ask({"op": "inspect"}, (), self._policy.forkserver.fork_timeout_seconds)

    def close(self) -> None:
        """End the template and remove the scratch root. Idempotent; returns within a few seconds."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            control, process = self._control, self._process
        if control is not None:
            control.close()
        if process is not None:
            try:
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _ask(self, request: dict[str, Any], fds: Sequence[int], seconds: float) -> dict[str, Any]:
        with self._fork_lock:
            self.wait_ready()
            control = self._control
            if control is None:
                raise ForkserverError("the forkserver died")
            try:
                control.settimeout(seconds)
                socket.send_fds(control, [json.dumps(request).encode()], list(fds))
                answer = control.recv(MAX_MESSAGE)
            except TimeoutError:
                self._kill()
                raise ForkserverError(f"the forkserver did not answer within {seconds:.0f} s; killed") from None
            except OSError as error:
                self._kill()
                raise ForkserverError(f"the forkserver died: {error}") from None
            if not answer:
                self._kill()
                raise ForkserverError("the forkserver died")
            try:
                return json.loads(answer)  # type: ignore[no-any-return]
            except ValueError:
                self._kill()
                raise ForkserverError("the forkserver's answer is not JSON; killed") from None

    def _kill(self) -> None:
        """Kill the template and wait until our thread has noticed, so that the next request starts a new one."""
        with self._change:
            process = self._process
            self._ready = False
            if process is not None:
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
                self._wanted = False
            try:
                self._start_one()
            except (OSError, ValueError, ForkserverError) as error:
                with self._change:
                    self._failure = f"the forkserver could not be started: {error}"
                    self._reset()
                    self._change.notify_all()
                continue
            process = self._process
            if process is not None:
                process.wait()
            with self._change:
                self._reset()
                # Warm again before the next job asks for it; one that dies at once waits until it is asked for.
                if time.monotonic() - self._ready_since > MIN_LIFE_SECONDS:
                    self._wanted = True
                self._change.notify_all()

    def _reset(self) -> None:
        self._ready = False
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._control is not None:
            self._control.close()
        self._control = None
        self._process = None

    def _start_one(self) -> None:
        control, theirs = socket_pair(socket.SOCK_SEQPACKET)
        folder = self.root / "template"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        log_path = folder / "log"
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
        path = [entry or os.getcwd() for entry in sys.path]
        with theirs, log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START.format(path=path, fd=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        with self._change:
            self._process, self._control = process, control
            self.starts += 1
        settings = {
            "root": str(self.root),
            "parent_pid": os.getpid(),
            "sys_path": path,
            "import_torch": self._policy.forkserver.import_torch,
            "warm_up": self._policy.forkserver.warm_up,
            "preload": list(self._policy.forkserver.preload),
        }
        control.settimeout(self._policy.forkserver.start_timeout_seconds)
        try:
            control.send(json.dumps(settings).encode())
            answer = json.loads(control.recv(MAX_MESSAGE) or b'{"event": "failed", "reason": "it died"}')
        except TimeoutError:
            answer = {"event": "failed", "reason": "no answer in forkserver.start_timeout_seconds"}
        if answer.get("event") != "ready":
            raise ForkserverError(f"{answer.get('reason')}{_last_lines(log_path)}")
        with self._change:
            self.facts = answer
            self._ready = not self._closed
            self._ready_since = time.monotonic()
            self._change.notify_all()


def _last_lines(log: Path) -> str:
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    return f"\n{text[-2000:]}" if text else ""


def socket_pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """A connected pair of local sockets: our end (closed in forks of the host), and the other side's."""
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    return ours(_away_from_standard(here)), _away_from_standard(there)


def _away_from_standard(sock: socket.socket) -> socket.socket:
    """A host that has closed stdin, stdout or stderr would give us their numbers; Popen would overwrite them."""
    if sock.fileno() > 2:
        return sock
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))

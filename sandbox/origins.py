"""Where things were made: the Python call stacks of what opens descriptors, semaphores, files, threads and processes.

Opt-in (`trace_leaks` in the policy), for a worker that wants to say in its report who has left something open. The
functions below are replaced by ones that note the stack and what came of the call. What C code opens, and what a
module has taken from `os` by name before the job began, is not seen: such a leak is told without a stack.

Audit hooks (`sys.addaudithook`) would see more calls, but they are called before a descriptor has a number, and there
is none for pipes, eventfds and semaphores.
"""

from __future__ import annotations

import _multiprocessing  # type: ignore[import-not-found]
import _posixshmem  # type: ignore[import-not-found]
import builtins
import functools
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from sandbox.ledger import SHM, Frames, call_stack, fd_text, frames

#: Things whose stacks are kept, the newest, a count.
MAX_STACKS: Final = 10_000
_OF_OS: Final = (
    "open", "pipe", "pipe2", "dup", "dup2", "memfd_create", "eventfd", "pidfd_open", "openpty", "fork",
    "posix_spawn", "posix_spawnp", "timerfd_create",
)  # fmt: skip


class Origins:
    """The stacks, by the beginning of the text by which a leak is told (`ledger.Held.text`)."""

    def __init__(self) -> None:
        self._stacks: dict[str, Frames] = {}

    def trace(self) -> None:
        """From now on, in this process, and for good: it is a worker's."""
        for name in _OF_OS:
            if hasattr(os, name):  # not all are in every Python
                told = self._process if name in ("fork", "posix_spawn", "posix_spawnp") else self._descriptors
                setattr(os, name, self._traced(getattr(os, name), told))
        builtins.open = io.open = self._traced(io.open, lambda _call, file: self._descriptors(_call, file.fileno()))
        _posixshmem.shm_open = self._traced(_posixshmem.shm_open, self._shared_memory)
        self._after(socket.socket, "__init__", lambda sock: self._descriptors((), sock.fileno()))
        self._after(threading.Thread, "start", lambda thread: self._note(f"thread {thread.native_id}"))
        self._after(subprocess.Popen, "__init__", lambda process: self._process((), process.pid))
        semaphores, note = _multiprocessing.SemLock, self._note

        class SemLock(semaphores):  # type: ignore[misc, valid-type]
            def __new__(cls, kind: int, value: int, maximum: int, name: str, unlink: bool) -> Any:
                made = semaphores.__new__(cls, kind, value, maximum, name, unlink)
                note(f"{SHM}/sem.{name.lstrip('/')}")
                return made

        _multiprocessing.SemLock = SemLock

    def of(self, text: str) -> tuple[str, ...]:
        """The stack of what a leak calls ``text``; empty if it is not known."""
        return call_stack(self._stacks.get(text) or self._stacks.get(text.partition(" (")[0], []))

    def below(self, folders: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The stacks of files and semaphores that still have a name in one of ``folders``."""
        starts = tuple(f"{folder}/" for folder in folders)
        named = {text: found for text, found in self._stacks.items() if text.startswith(starts)}
        return {text: call_stack(found) for text, found in named.items() if os.path.lexists(text)}

    def _traced(self, function: Callable[..., Any], told: Callable[[tuple[Any, ...], Any], None]) -> Any:
        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            told(args, result)
            return result

        return traced

    def _after(self, owner: type, name: str, told: Callable[[Any], None]) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def traced(this: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(this, *args, **kwargs)
            told(this)
            return result

        setattr(owner, name, traced)

    def _descriptors(self, _call: tuple[Any, ...], result: Any) -> None:
        for fd in result if isinstance(result, tuple) else (result,):
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue  # closed already, or no descriptor: a file object that was given an opener
            self._note(fd_text(fd, target))
            if target.startswith("/"):
                self._note(target)

    def _shared_memory(self, call: tuple[Any, ...], fd: int) -> None:
        self._note(f"{SHM}/{str(call[0]).lstrip('/')}" if call else "")
        self._descriptors(call, fd)

    def _process(self, _call: tuple[Any, ...], pid: int) -> None:
        if pid > 0:
            self._note(f"pid {pid}")

    def _note(self, text: str) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == Origins._note.__code__.co_filename and frame.f_back is not None:
            frame = frame.f_back
        # The newest last, so that the oldest can be dropped.
        self._stacks.pop(text, None)
        self._stacks[text] = frames(frame)
        while len(self._stacks) > MAX_STACKS:
            del self._stacks[next(iter(self._stacks))]

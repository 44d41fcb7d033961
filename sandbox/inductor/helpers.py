"""In a child: the Triton kernels of a graph are compiled side by side, by forks of the child.

Inductor has a pool of processes for that, which lives on; and Triton's front end holds the interpreter, so threads
would wait for each other. What a helper is given is one configuration of one kernel (a reduction may have five), which
it compiles into the job's own Triton cache. The child then does what it would have done alone, and finds the binaries.
A helper that fails or dies says nothing of it: the child comes to the same error itself, or dies of it, and that is how
the job ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sandbox.enforce.privileges import die_with_parent
from sandbox.inductor import compat

#: Bytes of the length before each kernel.
_LENGTH = 8


class _Helper:
    """One fork, which compiles one thing after the other. Its group of processes is its own."""

    def __init__(self, work: Callable[[Any], object]) -> None:
        child = os.getpid()
        self._kernels, theirs = socket.socketpair()
        # A pipe: it holds 65,536 answers of a byte, and a helper must never wait for the child, which may wait for it.
        self._answers, answers = os.pipe()
        try:
            self.pid = os.fork()
        except OSError:
            for each in (self._kernels, theirs):
                each.close()
            for fd in (self._answers, answers):
                os.close(fd)
            raise
        if self.pid == 0:
            # Never back into the child's own frames, whatever happens.
            try:
                die_with_parent(signal.SIGKILL, child)
                os.setpgid(0, 0)
                self._kernels.close()
                os.close(self._answers)
                _serve(theirs, answers, work)
            finally:
                os._exit(0)
        with contextlib.suppress(OSError):  # it has done so already, or has ended
            os.setpgid(self.pid, self.pid)
        theirs.close()
        os.close(answers)
        self.given = 0
        self.done = 0

    def give(self, kernel: Any) -> int:
        """One more; returns its number."""
        data = pickle.dumps(kernel)
        try:
            self._kernels.sendall(len(data).to_bytes(_LENGTH) + data)
        except OSError:
            self.done = sys.maxsize  # it has died: the child will do it
        self.given += 1
        return self.given

    def wait(self, number: int) -> None:
        """Until that one is done, or this helper gone."""
        while self.done < number:
            answers = os.read(self._answers, 1024)
            self.done = self.done + len(answers) if answers else sys.maxsize

    def end(self) -> None:
        """Kill it, with the ptxas that it may have started, and reap it."""
        self._kernels.close()
        os.close(self._answers)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _may_fork() -> bool:
    """Not if another thread may hold a lock that a fork would wait for."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return len(os.listdir("/proc/self/task")) == 1


def _serve(channel: socket.socket, answers: int, work: Callable[[Any], object]) -> None:
    with channel.makefile("rb") as kernels:
        while head := kernels.read(_LENGTH):
            kernel = pickle.loads(kernels.read(int.from_bytes(head)))
            with contextlib.suppress(Exception):  # the child will come to the same
                work(kernel)
            os.write(answers, b".")


def _configurations(name: str, source: str) -> int:
    """How many a kernel has; 0 if it is of a kind that has none."""
    return len(getattr(compat.load_triton_kernel(name, source), "configs", None) or ())


def _compile_one(what: tuple[str, str, int]) -> None:
    """In a helper: one configuration of a kernel."""
    name, source, number = what
    kernel = compat.load_triton_kernel(name, source)
    compat.compile_configuration(kernel, kernel.configs[number])


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[None]:
    """Inside the block Inductor's Triton kernels are compiled by up to ``count`` helpers at the same time, which are
    forked when there are kernels: by each as soon as its source is written, while the child writes the next. By none
    where the child has other threads."""
    compile_one = compat.AsyncCompile.triton
    helpers: list[_Helper] = []
    given: dict[str, list[tuple[_Helper, int]]] = {}  # by source: who has which of its configurations, as what number

    def least_busy() -> _Helper | None:
        """A new one while there is work for it and it may be made."""
        alive = (one for one in helpers if one.done < sys.maxsize)
        found = min(alive, key=lambda one: one.given - one.done, default=None)
        if len(helpers) < count and (found is None or found.given > found.done):
            with contextlib.suppress(OSError):  # no process or descriptor left: slower, but no reason to fail
                if _may_fork():
                    found = _Helper(_compile_one)
                    helpers.append(found)
        return found

    def give(name: str, source: str) -> None:
        given[source] = []
        for number in range(_configurations(name, source)):
            if (helper := least_busy()) is not None:
                given[source].append((helper, helper.give((name, source, number))))

    def triton(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
        alone = functools.partial(compile_one, self, kernel_name, source_code, device_str)
        if source_code not in given:
            if least_busy() is None:
                return alone()
            give(kernel_name, source_code)

        def result() -> Any:
            for helper, number in given[source_code]:
                helper.wait(number)
            return alone()

        return compat.codecache.LambdaFuture(result)

    if count < 2:
        yield
        return
    with compat.replaced(compat.AsyncCompile, "triton", triton), compat.written_ahead():
        try:
            yield
        finally:
            for helper in helpers:
                helper.end()

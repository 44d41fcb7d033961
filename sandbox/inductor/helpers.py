"""In a child: the Triton kernels of a graph are compiled side by side, by forks of the child.

Inductor has a pool of processes for that, which lives on; and Triton's front end holds the interpreter, so threads
would wait for each other. A helper compiles kernels into the job's own Triton cache. The child then does what it would
have done alone, and finds the binaries. A helper that fails or dies says nothing of it: the child comes to the same
error itself, or dies of it, and that is how the job ends.
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

import torch

from sandbox.inductor import compat

#: Bytes of the length before each kernel.
_LENGTH = 8


class _Helper:
    """One fork, which compiles one kernel after the other."""

    def __init__(self, work: Callable[[Any], object]) -> None:
        self._channel, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            # Never back into the child's own frames, whatever happens.
            try:
                self._channel.close()
                _serve(theirs, work)
            finally:
                os._exit(0)
        theirs.close()
        self.given = 0
        self.done = 0

    def give(self, kernel: Any) -> int:
        """One more; returns its number."""
        data = pickle.dumps(kernel)
        with contextlib.suppress(OSError):  # it has died: the child will do it
            self._channel.sendall(len(data).to_bytes(_LENGTH) + data)
        self.given += 1
        return self.given

    def wait(self, number: int) -> None:
        """Until that one is done, or this helper gone."""
        while self.done < number:
            with contextlib.suppress(OSError):
                if answers := self._channel.recv(1024):
                    self.done += len(answers)
                    continue
            self.done = sys.maxsize

    def end(self) -> None:
        """Kill and reap it."""
        self._channel.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _serve(channel: socket.socket, work: Callable[[Any], object]) -> None:
    with channel.makefile("rb") as kernels:
        while head := kernels.read(_LENGTH):
            kernel = pickle.loads(kernels.read(int.from_bytes(head)))
            with contextlib.suppress(Exception):  # the child will come to the same
                work(kernel)
            channel.sendall(b".")


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[None]:
    """Inside the block Inductor's Triton kernels are compiled by up to ``count`` helpers at the same time, which are
    forked when there are kernels. By none where the child uses a GPU itself, which its forks could not."""
    compile_one = compat.AsyncCompile.triton
    helpers: list[_Helper] = []

    def triton(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
        alone = functools.partial(compile_one, self, kernel_name, source_code, device_str)
        if torch.cuda.is_initialized() or os.environ.get("TRITON_INTERPRET") == "1":
            return alone()
        helper = min(helpers, key=lambda one: one.given - one.done, default=None)
        if helper is None or (len(helpers) < count and helper.given > helper.done):
            helper = _Helper(lambda kernel: compile_one(self, *kernel))
            helpers.append(helper)
        number = helper.give((kernel_name, source_code, device_str))

        def result() -> Any:
            helper.wait(number)
            return alone()

        return compat.codecache.LambdaFuture(result)

    if count < 2:
        yield
        return
    with compat.replaced(compat.AsyncCompile, "triton", triton):
        try:
            yield
        finally:
            for helper in helpers:
                helper.end()

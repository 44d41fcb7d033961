"""Compiles graphs in forked children of a small template, with the modules under test and nothing else of ours."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

import sandbox
from sandbox import child, template
from sandbox.inductor import compat, compile, failures, install, payload, reply, warmup
from sandbox.inductor.scheme import Scheme


@contextlib.contextmanager
def installed(policy: sandbox.Policy) -> Iterator[Scheme]:
    """The sandbox, installed inside the block; its forkserver is ready."""
    sandbox.install(policy=policy)
    try:
        one = install.installed()
        assert one is not None
        one.sandbox.wait_ready()
        yield one
    finally:
        sandbox.uninstall()


def _read(fd: int) -> bytes | None:
    header = _exactly(fd, 8)
    return None if header is None else _exactly(fd, struct.unpack("<q", header)[0])


def _exactly(fd: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            return None
        data += part
    return data


def _write(fd: int, data: bytes) -> None:
    data = struct.pack("<q", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


class Template:
    """A process forked after the warm-up, that forks a child per payload."""

    def __init__(self) -> None:
        before = template.thread_count()
        warmup.warm_up()
        self.threads_added = template.thread_count() - before
        to_child, self._send = os.pipe()
        self._receive, from_child = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._send)
                while (request := _read(to_child)) is not None:
                    folder, data = pickle.loads(request)
                    pid = os.fork()
                    if pid == 0:
                        _serve(folder, data, from_child)
                    os.waitpid(pid, 0)
            finally:
                os._exit(0)
        os.close(to_child)
        os.close(from_child)
        self.replies: list[dict[str, Any]] = []
        self.payloads: list[bytes] = []

    def run(self, data: bytes) -> dict[str, Any]:
        """The reply to one payload, its artifacts moved into this process's cache folder."""
        folder = tempfile.mkdtemp(prefix="sandbox-test-")
        _write(self._send, pickle.dumps((folder, data)))
        answer = _read(self._receive)
        if answer is None:
            raise RuntimeError("the template died")
        kind, value = pickle.loads(answer)
        if kind == "failed":
            raise failures.rebuild_exception(value)
        # A library that is mapped already must never be written into: move, do not copy over.
        for root, _, files in os.walk(folder):
            target = os.path.join(compat.runtime_cache_dir(), os.path.relpath(root, folder))
            os.makedirs(target, exist_ok=True)
            for name in files:
                os.replace(os.path.join(root, name), os.path.join(target, name))
        shutil.rmtree(folder)
        return value  # type: ignore[no-any-return]

    def compile_locally(
        self, gm: Any, example_inputs: Any, inputs_to_check: Any, compile_region_name: Any = None, **graph_kwargs: Any
    ) -> Any:
        """Stands where Inductor's `fx_codegen_and_compile` stands."""
        data = payload.encode(gm, example_inputs, inputs_to_check, graph_kwargs, compile_region_name)
        self.payloads.append(data)
        value = self.run(data)
        self.replies.append(value)
        found = reply.decode_graph(value, gm, example_inputs, inputs_to_check, graph_kwargs, compile_region_name)
        reply.replay_logs(value, "job-test00000000")
        return found

    @contextlib.contextmanager
    def installed(self) -> Iterator[Template]:
        """Every compile inside the block is sent, with Inductor's own caches off."""
        self.replies, self.payloads = [], []
        torch._dynamo.reset()
        before = compat.replace_compile(self.compile_locally)
        try:
            with (
                compat.inductor_config.patch(fx_graph_cache=False),
                compat.functorch_config.patch(enable_autograd_cache=False),
            ):
                yield self
        finally:
            compat.replace_compile(before)

    def close(self) -> None:
        os.close(self._send)
        os.close(self._receive)
        os.waitpid(self.pid, 0)


def _serve(folder: str, data: bytes, fd: int) -> None:
    try:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
        answer: tuple[str, Any]
        try:
            answer = ("ok", compile.run(data, {}, 2))
        except BaseException as error:
            answer = ("failed", child._failure(error))
        _write(fd, pickle.dumps(answer))
    finally:
        os._exit(0)

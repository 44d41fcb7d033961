"""Large payloads go as sealed files; where that cannot be, by the socket."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import pytest
from conftest import light_policy

import sandbox
from sandbox import sealed
from sandbox.errors import JobError
from sandbox.limits import Limits
from sandbox.policy import ForkserverSettings

BIG = os.urandom(1 << 20) * 3


def ends(box: sandbox.Sandbox) -> list[object]:
    done = box.submit(sandbox.callable_job(lambda data: [len(data), hash(data) == hash(bytes(data))], BIG)).result(60)
    assert done.leaks.leaks == ()
    return done.value  # type: ignore[no-any-return]


@pytest.mark.usefixtures("nothing_left")
def test_a_large_payload_arrives(light: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    real = socket.send_fds
    monkeypatch.setattr(socket, "send_fds", lambda *a: (sent.append(a), real(*a))[1])
    assert ends(light) == [len(BIG), True]
    # The fork request has three descriptors, the job's request one.
    assert [len(fds) for _, _, fds in sent] == [3, 1]
    assert sum(map(len, sent[1][1])) < 1 << 16, "the payload went by the socket"


def test_it_reaches_a_standby_child() -> None:
    settings = ForkserverSettings(import_torch=False, standby=1)
    with sandbox.Sandbox(light_policy(forkserver=settings, limits=Limits(memory_bytes=1 << 29))) as box:
        box.wait_ready()
        for _ in range(3):
            assert ends(box) == [len(BIG), True]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("where", ["memfd_create", "send_fds"])
def test_without_one_it_goes_by_the_socket(light: sandbox.Sandbox, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.send_fds

    def short(sock: socket.socket, buffers: list[bytes], fds: list[int]) -> int:
        if len(fds) == 1:
            raise OSError(errno.ETOOMANYREFS, "Too many references")
        return real(sock, buffers, fds)

    def none(*_: object) -> int:
        raise OSError(errno.ENOSYS, "not here")

    if where == "send_fds":
        monkeypatch.setattr(socket, "send_fds", short)
    else:
        monkeypatch.setattr(os, "memfd_create", none)
    assert ends(light) == [len(BIG), True]


def test_nobody_can_change_it() -> None:
    handle = sealed.seal(b"payload")
    try:
        for change in (
            lambda: os.pwrite(handle, b"P", 0),
            lambda: os.ftruncate(handle, 3),
            lambda: os.ftruncate(handle, 30),
            lambda: fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                change()
    finally:
        assert sealed.unseal(handle) == b"payload"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


@pytest.mark.parametrize("content", [b"", b"payload"])
def test_one_that_is_not_sealed_is_refused(content: bytes) -> None:
    handle = os.memfd_create("payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(handle, content)
    with pytest.raises(JobError, match="not sealed"):
        sealed.unseal(handle)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_a_payload_that_is_not_the_one_of_the_spec_is_refused(
    light: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sealed.seal
    monkeypatch.setattr(sealed, "seal", lambda payload: real(payload[:-1] + b"?"))
    done = light.submit(sandbox.callable_job(len, BIG)).result(60)
    assert done.status is sandbox.Status.SANDBOX_ERROR and "SHA-256" in done.detail

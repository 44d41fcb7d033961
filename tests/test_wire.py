"""Frames and envelopes: what is valid goes through unchanged, everything else is a WireError."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from sandbox.errors import WireError
from sandbox.results import Artifact, Enforcement, Failure, Leak, Mechanism, State, Status
from sandbox.wire import (
    MAX_DETAIL,
    MAX_ENVELOPE,
    Exited,
    Frame,
    FrameReader,
    KeeperReady,
    OversizedFrame,
    PeerClosed,
    Reply,
    Started,
    WireTimeout,
    clip,
    encode_frame,
    parse_envelope,
    recv_frame,
    send_frame,
)

JOB = "job-0123456789ab"
CAP = 1 << 16
HEADER = struct.Struct("!4sIQ32s")


def wire(payload: bytes = b"", detail: str = "") -> bytes:
    return b"".join(encode_frame(Reply(job_id=JOB, status=Status.OK, detail=detail), payload))


def forge(head: bytes, body: bytes = b"", **header: Any) -> bytes:
    """A frame with a right digest and whatever else is asked for."""
    sha = hashlib.sha256(head + body).digest()
    fields = {"magic": b"SBX1", "envelope": len(head), "payload": len(body), "sha": sha} | header
    return HEADER.pack(*fields.values()) + head + body


# Frames


@given(payloads=st.lists(st.binary(max_size=300), max_size=5), cuts=st.randoms(use_true_random=False))
def test_frames_arrive_whole_however_the_stream_is_cut(payloads: list[bytes], cuts: random.Random) -> None:
    stream = b"".join(wire(payload) for payload in payloads)
    reader, frames, at = FrameReader(CAP), [], 0
    while at < len(stream):
        size = cuts.randint(1, 120)
        frames += reader.feed(stream[at : at + size])
        at += size
    assert [frame.payload for frame in frames] == payloads
    assert not reader.pending
    assert reader.feed(b"") == []


def test_pending_and_wanted_never_reach_into_the_next_frame() -> None:
    reader = FrameReader(CAP)
    stream = wire(b"12345") + wire(b"next")
    assert not reader.pending
    frames: list[Frame] = []
    at = 0
    while not frames:
        step = reader.wanted
        frames = reader.feed(stream[at : at + step])
        at += step
        assert reader.pending != bool(frames)
    assert stream[at:] == wire(b"next")


@pytest.mark.parametrize(
    "payload", [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(struct.pack("2d", 1, 2))]
)
def test_a_payload_is_sent_without_a_copy(payload: Any) -> None:
    buffers = encode_frame(Reply(job_id=JOB, status=Status.OK), payload)
    assert len(buffers) == 2
    if isinstance(payload, bytearray):
        assert isinstance(buffers[1], memoryview) and buffers[1].obj is payload
    assert FrameReader(CAP).feed(b"".join(buffers))[0].payload == bytes(payload)
    if isinstance(payload, memoryview) and payload.format != "B":
        return
    assert len(encode_frame(Reply(job_id=JOB, status=Status.OK))) == 1


@st.composite
def mutations(draw: st.DrawFn) -> tuple[bytes, bytes, bytes]:
    """A frame, another one, and the first after an accident, perhaps with a piece of the other."""
    good = wire(draw(st.binary(max_size=80)), draw(st.text("ab", max_size=5)))
    other = wire(draw(st.binary(max_size=80)), "other")
    kind = draw(st.sampled_from(["flip", "truncate", "splice", "insert", "delete", "header"]))
    at = draw(st.integers(0, len(good) - 1))
    if kind == "flip":
        bad = bytearray(good)
        bad[at] ^= 1 << draw(st.integers(0, 7))
        return good, other, bytes(bad)
    if kind == "truncate":
        return good, other, good[:at]
    if kind == "splice":
        return good, other, good[:at] + other[draw(st.integers(0, len(other) - 1)) :]
    if kind == "insert":
        return good, other, good[:at] + draw(st.binary(min_size=1, max_size=9)) + good[at:]
    if kind == "delete":
        return good, other, good[:at] + good[at + draw(st.integers(1, 9)) :]
    return good, other, draw(st.binary(min_size=HEADER.size, max_size=HEADER.size)) + good[HEADER.size :]


@settings(max_examples=400)
@given(mutations())
def test_a_mutated_frame_is_never_taken(streams: tuple[bytes, bytes, bytes]) -> None:
    good, other, bad = streams
    reader = FrameReader(CAP)
    try:
        frames = reader.feed(bad)
    except WireError:
        with pytest.raises(WireError, match="the stream is broken"):
            reader.feed(good)
        return
    # No error can only mean: the frame is not complete yet, or a whole one came through and more is to come.
    whole = [stream for stream in (good, other) if bad.startswith(stream)]
    assert frames == [frame for stream in whole[:1] for frame in FrameReader(CAP).feed(stream)]
    assert whole or reader.pending or not bad


def test_a_spliced_duplicate_is_two_frames_and_garbage_after_a_frame_is_an_error() -> None:
    assert len(FrameReader(CAP).feed(wire(b"a") * 2)) == 2  # the reader's user sees the duplicate
    with pytest.raises(WireError, match="not a frame: it begins with b'xxxx', not b'SBX1'"):
        FrameReader(CAP).feed(wire(b"a") + b"x" * HEADER.size)


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (forge(b"{}", magic=b"SBX2"), WireError, "not a frame"),
        (forge(b""), WireError, "1 to 4194304 are allowed"),
        (forge(b"{}", envelope=MAX_ENVELOPE + 1), WireError, "would have 4194305 bytes"),
        (forge(b"{}", envelope=(1 << 32) - 1), WireError, "1 to 4194304 are allowed"),
        (forge(b"{}", payload=CAP + 1), OversizedFrame, "65537 bytes, 65536 are allowed"),
        (forge(b"{}", payload=(1 << 64) - 1), OversizedFrame, "65536 are allowed"),
        (forge(b"{}", sha=bytes(32)), WireError, "SHA-256"),
    ],
)
def test_a_bad_header_is_refused_as_soon_as_it_is_there(stream: bytes, error: type, message: str) -> None:
    first = stream if "SHA" in message else stream[: HEADER.size]
    with pytest.raises(error, match=message):
        FrameReader(CAP).feed(first)


def test_nothing_is_allocated_for_what_a_header_promises() -> None:
    tracemalloc.start()
    try:
        FrameReader(1 << 40).feed(forge(b"{}", payload=1 << 40))
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_feeding_a_large_payload_in_small_pieces_is_linear() -> None:
    stream = memoryview(wire(bytes(16 << 20)))
    reader, began = FrameReader(1 << 30), time.monotonic()
    frames = [frame for at in range(0, len(stream), 4096) for frame in reader.feed(stream[at : at + 4096])]
    assert len(frames[0].payload) == 16 << 20
    assert time.monotonic() - began < 10


# Sockets


def test_a_large_frame_goes_through_a_small_socket_buffer_and_leaves_the_next_one_alone() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        payload = random.Random(1).randbytes(3 << 20)
        reply = Reply(job_id=JOB, status=Status.OK)

        def send() -> None:
            send_frame(left, reply, payload, 30)
            send_frame(left, reply, b"second", 30)

        sender = threading.Thread(target=send)
        sender.start()
        assert recv_frame(right, 4 << 20, 30).payload == payload
        assert recv_frame(right, 4 << 20, 30).payload == b"second"
        sender.join()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_peer_that_does_not_read_or_write_runs_into_the_deadline(blocking: bool) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(blocking)
        began = time.monotonic()
        with pytest.raises(WireTimeout):
            send_frame(left, Reply(job_id=JOB, status=Status.OK), bytes(16 << 20), 0.2)
        with pytest.raises(WireTimeout):
            recv_frame(left, CAP, 0.2)
        assert time.monotonic() - began < 5


def test_a_peer_that_drips_bytes_runs_into_the_deadline() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.sendall(wire(bytes(1000))[:100])
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.02):
                right.send(b"\0")

        dripper = threading.Thread(target=drip)
        dripper.start()
        with pytest.raises(WireTimeout):
            recv_frame(left, CAP, 0.4)
        stop.set()
        dripper.join()


def test_a_closed_peer_is_told_apart() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.sendall(wire(b"abc")[:-1])
        right.close()
        with pytest.raises(PeerClosed, match="truncated"):
            recv_frame(left, CAP, 5)
        with pytest.raises(PeerClosed, match="without a frame"):
            recv_frame(left, CAP, 5)
        with pytest.raises(PeerClosed):
            send_frame(left, Reply(job_id=JOB, status=Status.OK), bytes(1 << 20), 5)
        left.close()
        with pytest.raises(WireError, match="closed on this side"):
            recv_frame(left, CAP, 5)


# Envelopes

leaks = (Leak(kind="fd", object="fd 7", owner="child", reclaimed=False),)
enforcement = Enforcement(mechanisms={"rlimits": Mechanism(state=State.PARTIAL, reason="one")})
ENVELOPES: list[BaseModel] = [
    Started(job_id=JOB, enforcement=enforcement),
    KeeperReady(job_id=JOB, pid=7, enforcement=enforcement),
    Exited(job_id=JOB, signal=11, cpu_seconds=1.5, leaks=leaks),
    Exited(job_id=JOB, exit_code=0),
    Reply(
        job_id=JOB,
        status=Status.COMPILE_ERROR,
        detail="ä",
        failure=Failure(module="m", qualname="q", message="x"),
        artifacts=(Artifact(path="triton/a/b.cubin", size=3, sha256="0" * 64),),
        leaks=leaks,
        start_seconds=0.25,
    ),
]


@pytest.mark.parametrize("model", ENVELOPES, ids=lambda model: type(model).__name__)
def test_an_envelope_comes_back_equal(model: BaseModel) -> None:
    frame = FrameReader(CAP).feed(b"".join(encode_frame(model)))[0]
    assert parse_envelope(frame.envelope, Started, KeeperReady, Exited, Reply) == model
    assert parse_envelope(frame.envelope, type(model)) == model


def envelope(**fields: str) -> bytes:
    pairs = {"job_id": f'"{JOB}"', "kind": '"reply"', "status": '"ok"'} | fields
    return ("{" + ", ".join(f'"{key}": {value}' for key, value in pairs.items() if value) + "}").encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected an envelope of kind reply or started: .*Invalid JSON"),
        (b"\xff{}", "Invalid JSON"),
        (b"[]", "kind reply or started"),
        (b"[" * 100_000, "kind reply or started"),
        (envelope(kind=""), "kind"),
        (envelope(kind='"exited"'), "expected an envelope of kind reply or started, got 'exited'"),
        (envelope(status='"timeout"'), "reply: status = 'timeout': .*a child cannot say that; allowed: compile_error"),
        (envelope(status='"cancelled"'), "a child cannot say that"),
        (envelope(status='"fine"'), "status = 'fine'"),
        (envelope(status="1"), "status = 1"),
        (envelope(job_id='"../x"'), "job_id"),
        (envelope(extra="1"), "extra"),
        (envelope(start_seconds="NaN"), "start_seconds"),
        (envelope(start_seconds="-1"), "start_seconds"),
        (envelope(start_seconds='"1"'), "start_seconds"),
        (envelope(detail='"' + "x" * (MAX_DETAIL + 1) + '"'), "detail"),
        (envelope(artifacts='[{"path": "triton/k/x", "size": -1, "sha256": "' + "0" * 64 + '"}]'), r"s\[0\].size"),
        (envelope(artifacts='[{"path": "/etc/passwd", "size": 1, "sha256": "' + "0" * 64 + '"}]'), r"s\[0\].path"),
        (envelope(leaks='[{"kind": "soul"}]'), r"leaks\[0\].kind = 'soul': .* \(and 3 more\)"),
    ],
)
def test_a_bad_envelope_gives_one_readable_line(data: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        parse_envelope(data, Reply, Started)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("fields", [{"exit_code": 0, "signal": 9}, {"exit_code": 256}, {"signal": 0}])
def test_an_exit_that_cannot_be_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Exited(job_id=JOB, **fields)


def test_too_many_artifacts_or_leaks_are_refused() -> None:
    with pytest.raises(ValidationError):
        Reply(job_id=JOB, status=Status.OK, leaks=leaks * 10_001)
    with pytest.raises(WireError, match="4194304 are allowed"):
        failure = Failure(module="m", qualname="q", message="x" * MAX_ENVELOPE)
        encode_frame(Reply(job_id=JOB, status=Status.COMPILE_ERROR, failure=failure))


@given(st.text(st.characters(), max_size=300), st.integers(0, 400))
def test_clipped_text_always_fits_into_an_envelope(text: str, limit: int) -> None:
    clipped = clip("\udcff" + text, limit)
    assert len(clipped) <= max(limit, 15)
    encode_frame(Reply(job_id=JOB, status=Status.OK, detail=clipped))


def test_lone_surrogates_are_a_wire_error_not_a_crash() -> None:
    with pytest.raises(WireError, match="cannot be sent as JSON"):
        failure = Failure(module="m", qualname="q", message="\ud800")
        encode_frame(Reply(job_id=JOB, status=Status.COMPILE_ERROR, failure=failure))

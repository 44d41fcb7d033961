"""Frames over a stream socket: how parent, keeper and child talk.

    magic "SBX1" | u32 envelope length | u64 payload length | SHA-256 of envelope + payload | envelope | payload

Numbers are big-endian. The envelope is a small JSON model (UTF-8, at most 4 MiB) that says what the payload is;
the payload is bytes. A frame is taken whole or not at all: a wrong magic, an oversized length (refused as soon as
the header is there, nothing is allocated for it) or a wrong digest raises :class:`WireError`, and a reader that
has raised takes nothing more. The digest finds corruption, not forgery: who may write to a socket is decided by
who holds its descriptor.

The models of the envelopes (:mod:`sandbox.envelopes`) and the reader of payloads that are Python values
(:func:`sandbox.unpickle.safe_loads`) are re-exported here: this module is all that a user of the wire imports.
"""

from __future__ import annotations

import hashlib
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel

from sandbox.envelopes import MAX_DETAIL, Exited, KeeperReady, Prepare, Reply, Started, clip, parse_envelope
from sandbox.errors import WireError
from sandbox.unpickle import safe_dumps, safe_loads

__all__ = [
    "MAX_DETAIL",
    "MAX_ENVELOPE",
    "Exited",
    "Frame",
    "FrameReader",
    "KeeperReady",
    "OversizedFrame",
    "PeerClosed",
    "Prepare",
    "Reply",
    "Started",
    "WireTimeout",
    "clip",
    "encode_frame",
    "parse_envelope",
    "recv_frame",
    "safe_dumps",
    "safe_loads",
    "send_frame",
]

MAGIC: Final = b"SBX1"
MAX_ENVELOPE: Final = 4 << 20
_HEADER: Final = struct.Struct("!4sIQ32s")
_CHUNK: Final = 1 << 20

Buffer = bytes | bytearray | memoryview


class OversizedFrame(WireError):
    """The payload that a header announces is above the reader's cap: status `output_limit`."""


class PeerClosed(WireError):
    """The other end closed the connection, between frames or within one."""


class WireTimeout(WireError):
    """The deadline passed before the frame was through."""


class Frame(NamedTuple):
    """One whole frame with the right digest. The envelope is still unparsed JSON."""

    envelope: bytes
    payload: bytes


def encode_frame(envelope: BaseModel, payload: Buffer = b"") -> list[bytes | memoryview]:
    """The frame as buffers for `sendmsg`; the payload is not copied.

    Raises:
        WireError: the envelope cannot be said in UTF-8 JSON, or is above 4 MiB.
    """
    try:
        head = envelope.model_dump_json().encode()
    except ValueError as error:  # lone surrogates: UnicodeEncodeError, or pydantic's PydanticSerializationError
        raise WireError(f"the envelope cannot be sent as JSON: {error}") from None
    if len(head) > MAX_ENVELOPE:
        raise WireError(f"the envelope has {len(head)} bytes, {MAX_ENVELOPE} are allowed")
    body = memoryview(payload).cast("B")
    sha = hashlib.sha256(head)
    sha.update(body)
    buffers: list[bytes | memoryview] = [_HEADER.pack(MAGIC, len(head), len(body), sha.digest()) + head]
    if len(body):
        buffers.append(body)
    return buffers


def send_frame(sock: socket.socket, envelope: BaseModel, payload: Buffer = b"", deadline: float | None = None) -> None:
    """Send one frame, whether ``sock`` blocks or not. ``deadline``: seconds that the whole frame may take,
    counted from the call; None waits for ever.

    After an error a part of the frame may be out: close the socket.

    Raises:
        PeerClosed: the other end is gone.
        WireTimeout: the deadline passed first.
        WireError: the envelope cannot be encoded, or the socket failed.
    """
    end = None if deadline is None else time.monotonic() + deadline
    left = [memoryview(buffer) for buffer in encode_frame(envelope, payload)]
    while left:
        _wait(sock, select.POLLOUT, end)
        try:
            # MSG_DONTWAIT: a blocking socket would otherwise sit in the kernel past the deadline. Not `sendmsg`, which
            # a job's filter forbids.
            sent = sock.send(left[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            raise PeerClosed("the other end closed the connection before the frame was through") from None
        except OSError as error:
            raise WireError(f"cannot send: {error}") from error
        left[0] = left[0][sent:]
        if not left[0]:
            del left[0]


class FrameReader:
    """Takes bytes as they come, gives whole frames. ``max_payload`` is the largest payload taken, in bytes.

    Memory in use is bounded by what has really arrived, not by what a header promises.
    """

    def __init__(self, max_payload: int) -> None:
        self._max_payload = max_payload
        self._failure: str | None = None
        self._reset()

    def _reset(self) -> None:
        self._stage: Literal["header", "envelope", "payload"] = "header"
        self._wanted = _HEADER.size
        self._got = bytearray()
        self._envelope = b""
        self._payload_size = 0
        self._digest = b""

    @property
    def pending(self) -> bool:
        """Whether a part of a frame is here: if the peer closes now, the frame is truncated."""
        return self._stage != "header" or bool(self._got)

    @property
    def wanted(self) -> int:
        """How many bytes may be read without reaching into the next frame, at least 1."""
        return self._wanted - len(self._got)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Take ``data``, give the frames that it completes.

        Raises:
            OversizedFrame: a header announces a payload above the cap.
            WireError: wrong magic, wrong envelope length, wrong digest; and on every call after an error.
        """
        if self._failure is not None:
            raise WireError(f"the stream is broken: {self._failure}")
        frames: list[Frame] = []
        view = memoryview(data)
        try:
            while view:
                take = self.wanted
                self._got += view[:take]
                view = view[take:]
                if self.wanted == 0:
                    frames.extend(self._advance())
        except WireError as error:
            self._failure = str(error)
            self._got = bytearray()
            raise
        return frames

    def _advance(self) -> Sequence[Frame]:
        """The current stage is complete: check it and go on to the next."""
        if self._stage == "header":
            magic, envelope_size, self._payload_size, self._digest = _HEADER.unpack(self._got)
            if magic != MAGIC:
                raise WireError(f"not a frame: it begins with {magic!r}, not {MAGIC!r}")
            if not 0 < envelope_size <= MAX_ENVELOPE:
                raise WireError(f"the envelope would have {envelope_size} bytes, 1 to {MAX_ENVELOPE} are allowed")
            if self._payload_size > self._max_payload:
                raise OversizedFrame(
                    f"the payload would have {self._payload_size} bytes, {self._max_payload} are allowed"
                )
            self._stage, self._wanted, self._got = "envelope", envelope_size, bytearray()
            return ()
        if self._stage == "envelope":
            self._envelope = bytes(self._got)
            self._stage, self._wanted, self._got = "payload", self._payload_size, bytearray()
            if self._payload_size:
                return ()
        payload = bytes(self._got)
        sha = hashlib.sha256(self._envelope)
        sha.update(payload)
        if sha.digest() != self._digest:
            raise WireError("the frame's SHA-256 is not the one in its header")
        frame = Frame(self._envelope, payload)
        self._reset()
        return (frame,)


def recv_frame(
    sock: socket.socket, max_payload: int, deadline: float | None = None, fds: list[int] | None = None
) -> Frame:
    """Receive exactly one frame; bytes after it stay in the socket. ``deadline`` as in :func:`send_frame`. ``fds``
    takes the descriptors that come with it, one at most; without it they are closed.

    Raises:
        PeerClosed: the other end closed before or within the frame; the message says which.
        WireTimeout: the deadline passed first.
        WireError: as :meth:`FrameReader.feed`, or the socket failed.
    """
    end = None if deadline is None else time.monotonic() + deadline
    reader = FrameReader(max_payload)
    while True:
        _wait(sock, select.POLLIN, end)
        try:
            wanted = min(reader.wanted, _CHUNK)
            if fds is None:
                data = sock.recv(wanted, socket.MSG_DONTWAIT)
            else:
                data, found, _, _ = socket.recv_fds(sock, wanted, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                fds += found
        except BlockingIOError:
            continue
        except ConnectionResetError:
            data = b""
        except OSError as error:
            raise WireError(f"cannot receive: {error}") from error
        if not data:
            raise PeerClosed(
                "the frame is truncated: the other end closed the connection within it"
                if reader.pending
                else "the other end closed the connection without a frame"
            )
        for frame in reader.feed(data):
            return frame


def _wait(sock: socket.socket, event: int, end: float | None) -> None:
    """Wait until ``sock`` is ready, at most until ``end`` of `time.monotonic()`. EINTR restarts `poll` (PEP 475)."""
    left = None if end is None else end - time.monotonic()
    # Checked before the poll too: a peer that drips one byte after the other is ready every time.
    if left is not None and left <= 0:
        raise WireTimeout("the deadline passed before the frame was through")
    poller = select.poll()  # select() would fail above descriptor 1023
    try:
        poller.register(sock, event)
    except ValueError:
        raise WireError("the socket is closed on this side") from None
    if not poller.poll(None if left is None else left * 1000):
        raise WireTimeout("the deadline passed before the frame was through")

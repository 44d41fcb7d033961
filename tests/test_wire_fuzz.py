"""The wire under fire: 100,000 mutated frames, and a few hundred from a real hostile child through a real socket.

What "accepted" means, and must never happen:

- a frame that the reader gives is not byte for byte one that was sent (`test_mutated_frames`);
- an envelope whose digest was made right again is taken for something that its JSON does not say, or for another job's,
  or for a kind that is not expected (`test_mutated_envelopes`);
- a value whose digest was made right again is anything but plain data (`test_mutated_values`).

Every case follows from its number alone: `mutated(number)`, `envelope(number)`, `value(number)` make it again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import eventually

import sandbox
from sandbox import child, monitor
from sandbox.errors import WireError
from sandbox.results import Artifact, Enforcement, Failure, Leak, Mechanism, State, Status
from sandbox.verdict import Evidence, judge
from sandbox.wire import (
    Exited,
    FrameReader,
    KeeperReady,
    Reply,
    Started,
    encode_frame,
    parse_envelope,
    safe_dumps,
    safe_loads,
)

FRAMES, ENVELOPES, VALUES = 70_000, 15_000, 15_000
JOB = "job-0123456789ab"
CAP = 1 << 16
HEADER = struct.Struct("!4sIQ32s")
#: Growth of this process that all cases together may cause, in bytes; `safe_loads` alone may take 256 MiB for one.
MEMORY = 400 << 20
#: Seconds for one case.
SECONDS = 10.0

enforcement = Enforcement(mechanisms={"rlimits": Mechanism(state=State.PARTIAL, reason="one")})
PLAIN: list[Any] = [
    None, 42, -1.5, "text", b"bytes", [1, "two", b"three", [4.0, None]], {"a": (1, 2), "b": {3, 4}},
    {"code": "def f():\n    return 1\n" * 20, "strides": [(1, 2, 3)] * 8, "constants": {"c0": b"\0" * 64}},
    OrderedDict(x=range(3), y=frozenset({1})), [[[[[[1]]]]]], "é" * 200, {str(n): n for n in range(50)},
]  # fmt: skip
SENT = [
    Started(job_id=JOB, enforcement=enforcement),
    KeeperReady(job_id=JOB, pid=7, enforcement=enforcement),
    Exited(job_id=JOB, exit_code=0, cpu_seconds=1.5),
    Exited(job_id=JOB, signal=11, leaks=(Leak(kind="process", object="pid 1", owner="child", reclaimed=True),)),
    Reply(job_id=JOB, status=Status.OK, artifacts=(Artifact(path="inductor/ab/cd.py", size=3, sha256="0" * 64),)),
    Reply(
        job_id=JOB,
        status=Status.COMPILE_ERROR,
        detail="ä",
        failure=Failure(module="m", qualname="E", message="x", traceback="t"),
        leaks=(Leak(kind="fd", object="fd 7", owner="child", reclaimed=False),),
    ),
]
WIRE = [
    *(b"".join(encode_frame(model)) for model in SENT[:4]),
    *(b"".join(encode_frame(SENT[4], safe_dumps(value))) for value in PLAIN),
    b"".join(encode_frame(SENT[5])),
]


def mutate(stream: bytes, chance: random.Random) -> bytes:
    """One to three changes that know nothing of the digest."""
    data = bytearray(stream)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(data)) if data else 0
        match chance.randrange(10):
            case 0 | 1 if data:  # a bit
                data[at] ^= 1 << chance.randrange(8)
            case 2:  # the end is missing
                del data[at:]
            case 3:  # a piece is missing
                del data[at : at + chance.randrange(1, 40)]
            case 4:  # a piece too many
                data[at:at] = chance.randbytes(chance.randrange(1, 40))
            case 5 if len(data) >= HEADER.size:  # a lie about a length
                lie = chance.choice((0, 1, 255, CAP, CAP + 1, (1 << 32) - 1, (1 << 63), chance.getrandbits(20)))
                if chance.randrange(2):
                    data[4:8] = (lie & 0xFFFFFFFF).to_bytes(4, "big")
                else:
                    data[8:16] = lie.to_bytes(8, "big")
            case 6:  # a piece twice
                data[at:at] = data[at : at + chance.randrange(1, 100)]
            case 7:  # header of one, body of another
                other = chance.choice(WIRE)
                data[: HEADER.size] = other[: HEADER.size]
            case 8:  # another frame in the middle
                data[at:at] = chance.choice(WIRE)
            case _:  # bytes of the digest
                data[16:48] = chance.randbytes(32)
    return bytes(data)


def mutated(number: int) -> tuple[list[bytes], bytes, random.Random]:
    """The frames that were sent, what arrives, and how it is cut."""
    chance = random.Random(f"frame {number}")
    sent = [chance.choice(WIRE) for _ in range(chance.choice((1, 1, 2, 3)))]
    return sent, mutate(b"".join(sent), chance), chance


def whole(frame: Any) -> bytes:
    """A frame as it stands on the wire."""
    return b"".join(_raw(frame.envelope, frame.payload))


def _raw(envelope: bytes, payload: bytes) -> list[bytes]:
    digest = hashlib.sha256(envelope + payload).digest()
    return [HEADER.pack(b"SBX1", len(envelope), len(payload), digest), envelope, payload]


def many(cases: int, one: Callable[[int], None]) -> None:
    """Every case, with its number in what fails; none takes long, all together take no memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(cases):
        started = time.monotonic()
        try:
            one(number)
        except Exception as error:
            error.add_note(f"case {number} of {one.__name__}")
            raise
        assert time.monotonic() - started < SECONDS, f"case {number} of {one.__name__} hangs"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MEMORY, f"{grown >> 20} MiB"


def test_mutated_frames() -> None:
    known = set(WIRE)
    given = 0

    def one(number: int) -> None:
        nonlocal given
        _sent, stream, chance = mutated(number)
        reader = FrameReader(CAP)
        frames: list[Any] = []
        at, failed = 0, False
        while at < len(stream):
            size = chance.choice((1, 7, 100, 5000))
            try:
                frames += reader.feed(stream[at : at + size])
            except WireError:
                failed = True
                with pytest.raises(WireError, match="broken"):
                    reader.feed(b"SBX1")
                break
            at += size
        # What is given was sent as it is: a mutation elsewhere in the stream has not touched it.
        for frame in frames:
            assert whole(frame) in known, "a frame that nobody has sent"
        given += len(frames)
        untouched = b"".join(whole(frame) for frame in frames)
        assert stream.startswith(untouched)
        if not failed:
            assert reader.pending == (untouched != stream)

    many(FRAMES, one)
    assert FRAMES * 0.02 < given < FRAMES * 2, f"{given} frames: the fuzzer has become too wild or too tame"


JUNK: list[Any] = [
    None, True, -1, 0, 1 << 70, 1.5, 1e308, "", "x", "é" * 5000, [], [[]], {}, {"a": 1}, "ok", "timeout", "started",
    "reply", "exited", "job-ffffffffffff", "JOB", "../../etc/passwd", "\x00", [1] * 500, {"kind": "reply"},
]  # fmt: skip


def envelope(number: int) -> bytes:
    """The JSON of an envelope with something else in it."""
    chance = random.Random(f"envelope {number}")
    document = json.loads(chance.choice(SENT).model_dump_json())
    for _ in range(chance.choice((1, 1, 2))):
        holder = document
        while True:
            values = holder.values() if isinstance(holder, dict) else holder
            inner = [value for value in values if isinstance(value, dict | list) and value]
            if not inner or chance.randrange(3):
                break
            holder = chance.choice(inner)
        junk = copy.deepcopy(chance.choice(JUNK))
        if isinstance(holder, list):
            holder[chance.randrange(len(holder))] = junk
            continue
        key = chance.choice(sorted(holder)) if holder else "x"
        match chance.randrange(4):
            case 0:
                holder.pop(key, None)
            case 1:
                holder[chance.choice(("x", "kind", "payload", "job_id", "__class__", "status"))] = junk
            case _:
                holder[key] = junk
    text = json.dumps(document).encode()
    match chance.randrange(12):
        case 0:
            return text[: chance.randrange(len(text))]
        case 1:
            return text + chance.choice((b" ", b"{}", b"\0", text))
        case 2:
            return b"[" * chance.choice((10, 1000, 100_000)) + text
        case 3:
            return text.replace(b'"', b"'", 1)
        case 4:
            return text[:-1] + b', "kind": "reply"}'
        case _:
            return text


def said(document: Any, model: Any) -> bool:
    """Whether a model holds what the JSON says, and besides that only defaults."""
    dumped = model.model_dump(mode="json")
    for name, value in dumped.items():
        if name in document and document[name] != value and not (document[name] == [] and value == ()):
            return same(document[name], value)
    return set(document) <= set(dumped)


def same(json_value: Any, value: Any) -> bool:
    if isinstance(json_value, dict) and isinstance(value, dict):
        return all(same(json_value[name], value[name]) for name in json_value)
    if isinstance(json_value, list) and isinstance(value, list | tuple):
        return len(json_value) == len(value) and all(map(same, json_value, value))
    return json_value == value and not isinstance(json_value, bool) ^ isinstance(value, bool)


def test_mutated_envelopes() -> None:
    taken = 0

    def one(number: int) -> None:
        nonlocal taken
        data = envelope(number)
        for kinds in ((Started, Reply), (KeeperReady, Exited)):
            try:
                model = parse_envelope(data, *kinds)
            except WireError as error:
                assert len(str(error)) < 4000 and "\n" not in str(error)
                continue
            assert type(model) in kinds
            document = json.loads(data)
            assert document["kind"] == model.kind  # type: ignore[attr-defined]
            assert said(document, model), "it says what its JSON does not"
            if kinds[0] is Started:
                # What the monitor makes of it.
                watch = SimpleNamespace(
                    job=SimpleNamespace(spec=SimpleNamespace(job_id=JOB)),
                    seen=Evidence(started=isinstance(model, Reply), forked=True),
                    reply_at=0.0,
                )
                try:
                    monitor._take(watch, model, safe_dumps(1) if isinstance(model, Reply) else b"")  # type: ignore[arg-type]
                except WireError:
                    continue
                assert model.job_id == JOB  # type: ignore[attr-defined]
                status, _detail, value = judge(watch.seen)
                assert value == (1 if status is Status.OK else None)
                assert status not in (Status.TIMEOUT, Status.CPU_LIMIT, Status.CANCELLED)
            taken += 1

    many(ENVELOPES, one)
    assert 0 < taken < ENVELOPES, "the fuzzer has become too wild or too tame"


TYPES = (
    type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, OrderedDict, set, frozenset,
    range, slice,
)  # fmt: skip
#: The classes that `safe_loads` knows by name may be values themselves.
CLASSES = (complex, range, slice, OrderedDict)
OPCODES = bytes(range(256))


def value(number: int) -> bytes:
    """A pickle of plain data with some bytes, opcodes most of all, changed."""
    chance = random.Random(f"value {number}")
    data = bytearray(safe_dumps(chance.choice(PLAIN)))
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(data))
        match chance.randrange(6):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice(OPCODES)
            case 2:
                data[at:at] = chance.choice(
                    (b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"(", b"R", b"b", b"\x81", b"0", b"2" * 9,
                     b"\x8e" + b"\xff" * 8, b"B\xff\xff\xff\x7f", b"\x94", b"j\xff\xff\xff\xff", b"e", b"u", b"Q")
                )  # fmt: skip
            case 3:
                del data[at : at + chance.randrange(1, 8)]
            case 4:
                data[at:at] = data[at : at + chance.randrange(1, 30)]
            case _:
                other = safe_dumps(chance.choice(PLAIN))
                data[at:] = other[chance.randrange(len(other)) :]
        if not data:
            break
    return bytes(data)


def plain(found: Any) -> bool:
    seen: set[int] = set()
    left = [found]
    while left:
        each = left.pop()
        if any(each is known for known in CLASSES):
            continue
        if type(each) not in TYPES:
            return False
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            left += each
    return True


def test_mutated_values() -> None:
    taken = 0

    def one(number: int) -> None:
        nonlocal taken
        try:
            found = safe_loads(value(number))
        except WireError:
            return
        assert plain(found)
        taken += 1

    many(VALUES, one)
    assert 0 < taken < VALUES, "the fuzzer has become too wild or too tame"


# Through the monitor.


def hostile(number: int) -> dict[str, int]:
    """A job whose worker sends something else than its reply."""

    def send_reply(channel: Any, reply: Reply, payload: bytes) -> None:
        chance = random.Random(f"child {number}")
        frame = b"".join(encode_frame(reply, payload))
        match number % 4:
            case 0 | 1:
                frame = mutate(frame, chance)
            case 2:
                frame = b"".join(_raw(envelope(number), payload))
            case _:
                frame = b"".join(_raw(reply.model_dump_json().encode(), value(number)))
        channel.setblocking(True)
        channel.sendall(frame)
        channel.close()

    child.send_reply = send_reply
    return {"number": number}


@pytest.mark.usefixtures("nothing_left")
def test_a_hostile_child(light: sandbox.Sandbox) -> None:
    statuses: dict[str, int] = {}
    futures = [light.submit(sandbox.callable_job(hostile, number)) for number in range(200)]
    for number, future in enumerate(futures):
        result = future.result(60)
        statuses[result.status.value] = statuses.get(result.status.value, 0) + 1
        if not result.ok:
            assert result.value is None, number
        elif number % 4 < 2:
            assert result.value == {"number": number}, number  # the mutation was behind a whole frame, or none
        else:
            assert plain(result.value), number
        assert result.status not in (Status.TIMEOUT, Status.CPU_LIMIT, Status.CANCELLED, Status.SANDBOX_ERROR), result
    assert statuses["protocol_error"] > 100, statuses
    assert light.submit(sandbox.callable_job(lambda: 1)).result(60).value == 1
    assert eventually(lambda: not light._tasks)

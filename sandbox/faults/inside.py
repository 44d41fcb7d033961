"""The part of fault injection that lives in the template: it makes the points of forkserver, keeper and child.

Production code has no hook for this. A template whose policy says `allow_faults` imports this module before it forks
anything; it replaces the functions at the points by name. Which fault a job has comes with its fork request.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from sandbox import child, keeper, template
from sandbox.enforce import libc
from sandbox.faults.kinds import DELAY_SECONDS, KINDS, Shot, mutate
from sandbox.wire import Exited, KeeperReady, Reply, Started, encode_frame

#: Which function is entered at a point of the worker or the keeper.
_FUNCTIONS = {
    "child.receive": (child, "receive"),
    "child.check_spec": (child, "check_spec"),
    "child.confine": (child, "confine_worker"),
    "child.unpickle": (child, "unpickle"),
    "child.run": (child, "run"),
    "child.spawn": (subprocess.Popen, "__init__"),
    "child.collect": (child, "collect"),
    "child.send_reply": (child, "send_reply"),
    "child.leave": (child, "leave"),
    "keeper.confine": (keeper, "prepare_keeper"),
    "keeper.wait": (keeper, "_wait"),
    "keeper.clean": (keeper, "_clean"),
}
_FRAMES: dict[type, str] = {
    Started: "wire.started",
    Reply: "wire.reply",
    KeeperReady: "wire.ready",
    Exited: "wire.exited",
}

#: The fault that this process still has before it.
_ahead: Shot | None = None


def _take(*points: str) -> Shot | None:
    """The fault, if it is at one of these points: it happens once."""
    global _ahead
    if _ahead is None or _ahead.point not in points:
        return None
    shot, _ahead = _ahead, None
    return shot


def _reach(*points: str) -> Any:
    """Have the fault, if it is here; returns what stands in for the result of the function at this point, or None."""
    shot = _take(*points)
    if shot is None:
        return None
    if shot.kind == "unserializable":
        return lambda: None
    act = KINDS[shot.kind].act
    return act and act()


def _at(point: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return _reach(point) or function(*args, **kwargs)

    return replacement


def _send_frame(function: Callable[..., None]) -> Callable[..., None]:
    def replacement(sock: socket.socket, envelope: Any, payload: Any = b"", deadline: float | None = None) -> None:
        shot = _take(_FRAMES.get(type(envelope), ""))
        if shot is None:
            return function(sock, envelope, payload, deadline)
        frame = b"".join(encode_frame(envelope, payload))
        foreign = envelope.model_copy(update={"job_id": "job-000000000000"})
        sock.setblocking(True)
        if shot.kind == "delayed":
            time.sleep(DELAY_SECONDS)
        sock.sendall(mutate(shot, frame, b"".join(encode_frame(foreign, payload))))
        if shot.kind == "stalled":
            signal.pause()
        return None

    return replacement


def _fork(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A fork request: the template has its faults around its fork, keeper and worker inherit theirs."""

    def replacement(request: dict[str, Any], *args: Any) -> dict[str, Any]:
        global _ahead
        fault = request.get("fault")
        _ahead = Shot(**fault) if fault else None
        _reach("forkserver.before_fork")
        if _ahead is not None and _ahead.point == "forkserver.during_fork":
            real = libc.fork

            def fork() -> int:
                pid = real()
                libc.fork = real
                if pid:
                    _reach("forkserver.during_fork")
                return pid

            libc.fork = fork
        answer = function(request, *args)
        if _ahead is not None and not _ahead.point.startswith("forkserver."):
            _ahead = None  # theirs
        return answer

    return replacement


def _send(function: Callable[..., None]) -> Callable[..., None]:
    def replacement(*args: Any) -> None:
        function(*args)
        _reach("forkserver.after_fork")

    return replacement


def _install() -> None:
    for point, (owner, name) in _FUNCTIONS.items():
        setattr(owner, name, _at(point, getattr(owner, name)))
    for module in (child, keeper):
        module.send_frame = _send_frame(module.send_frame)  # type: ignore[attr-defined]
    template._fork = _fork(template._fork)
    template._send = _send(template._send)


_install()

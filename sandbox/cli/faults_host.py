"""The host under test of `sandbox faults`: `python -m sandbox.cli.faults_host`, a process of its own.

On stdin it gets one line of JSON, the task; on its stdout it answers one line of JSON for each thing that it has done.
What the campaign does to a host (close its standard streams, say) is done to this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from sandbox import callables, faults, ledger
from sandbox.enforce.privileges import die_with_parent
from sandbox.errors import ForkserverError
from sandbox.executor import Sandbox
from sandbox.faults.kinds import LATE, Shot
from sandbox.policy import Policy
from sandbox.report import JobRow, Stats

#: Seconds that what a job has held may take to be gone: a keeper reports before it ends.
SETTLE_SECONDS: Final = 3.0
#: Jobs in flight while the forkserver is killed, a count.
IN_FLIGHT: Final = 2


def main() -> int:
    """Work off the task."""
    task = json.loads(sys.stdin.readline())
    die_with_parent(signal.SIGKILL, task["parent"])
    answers = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 20)
    os.dup2(2, 1)  # what compilers print is not an answer
    lock = threading.Lock()

    def tell(answer: dict[str, Any]) -> None:
        with lock:
            os.write(answers, json.dumps(answer).encode() + b"\n")

    policy = Policy.model_validate_json(task["policy"])
    host = _Light(policy) if task["light"] else _Compiler(policy)
    try:
        host.run(-1)  # lazy imports, caches and threads that stay are no leaks of the first fault
        tell({"ready": True})
        if task["kills"]:
            _killed(host, task["kills"], task["seed"], tell)
        for number, kind, point, seed, times in task["shots"]:
            tell({"number": number, **_shot(host, number, Shot(kind, point, seed), times)})
    finally:
        host.close()
    return 0


class _Light:
    """Jobs without torch: no ladder, so the answer is the status."""

    def __init__(self, policy: Policy) -> None:
        self.box = Sandbox(policy)

    def run(self, number: int) -> bool:
        """One job; whether its value, if it has one, is right."""
        result = self.box.submit(callables.job(_work, number)).result(300)
        return not result.ok or result.value == number * 3

    def stats(self) -> Stats:
        return self.box.stats()

    def close(self) -> None:
        self.box.close()


def _work(number: int) -> int:
    from pathlib import Path

    Path("output").write_text(str(number))
    return number * 3


class _Compiler:
    """Real compiles: a graph of its own for each number, so that no cache and no quarantine knows it."""

    def __init__(self, policy: Policy) -> None:
        import torch

        from sandbox.inductor.install import install, installed

        torch.manual_seed(0)
        self._x, self._y = torch.randn(33), torch.randn(33)
        install(policy)
        scheme = installed()
        if scheme is None:
            raise RuntimeError("install() did not install")
        self.box = scheme.sandbox

    def run(self, number: int) -> bool:
        """Compile and run a graph; whether it equals eager."""
        import torch

        factor = 1.0 + (number + 2) / 4096

        def graph(x: Any, y: Any) -> Any:
            return torch.relu(x * factor - y) + factor

        torch.compiler.reset()
        return bool(torch.allclose(torch.compile(graph)(self._x, self._y), graph(self._x, self._y)))

    def stats(self) -> Stats:
        from sandbox.inductor.install import stats

        return stats()

    def close(self) -> None:
        from sandbox.inductor.install import uninstall

        uninstall()


def _shot(host: _Light | _Compiler, number: int, shot: Shot, times: int | None) -> dict[str, Any]:
    """One fault, and what has become of it."""
    host.box.wait_ready()
    before, held = host.stats(), _held(host)
    seen = {row.job_id for row in before.jobs}
    started = time.monotonic()
    error = ""
    right = True
    with faults.inject(shot, into=host.box, times=times) as injection:
        if shot.point == "host":
            _kill(host)  # so that one is started in this state of the host
        try:
            right = host.run(number)
        except Exception as raised:  # noqa: BLE001 - what the caller of a compile would have got is a row of the table
            error = f"{type(raised).__name__}: {str(raised)[:300]}"
    seconds = time.monotonic() - started
    after = host.stats()
    rows = [row for row in after.jobs if row.job_id not in seen]
    host.box.wait_ready()
    left = _left(host, held)
    late = [_late(host, shot, row, times is None or place < times) for place, row in enumerate(rows)]
    return {
        "statuses": [row.status for row in rows],
        "steps": [row.step for row in rows],
        "answer": _answer(before, after, rows),
        "seconds": seconds,
        "besides": seconds - sum(row.usage.wall_seconds + row.usage.queue_seconds for row in rows),
        "late": max(late, default=0.0),
        "leaks": left,
        "right": right,
        "given": len(injection.given) if rows else 0,
        "error": error,
        "details": [row.detail[:200] for row in rows],
    }


def _answer(before: Stats, after: Stats, rows: list[JobRow]) -> str:
    for name in ("in_child", "in_process", "eager", "raised"):
        if getattr(after, name) > getattr(before, name):
            return name
    return rows[-1].status if rows else "none"


def _late(host: _Light | _Compiler, shot: Shot, row: JobRow, has_it: bool) -> float:
    """Seconds that a job lived past its deadline."""
    if shot.kind == "clock_skip":
        return 0.0  # the clock that tells it is the one that has skipped
    wall = host.box.policy.limits.wall_seconds
    if has_it and shot.point not in LATE:
        wall = min(wall, faults.KINDS[shot.kind].limits.get("wall_seconds", wall))
    return max(0.0, row.usage.wall_seconds - wall)


def _held(host: _Light | _Compiler) -> ledger.Snapshot:
    return ledger.take(ipc=False)


def _left(host: _Light | _Compiler, held: ledger.Snapshot) -> list[str]:
    """What this process holds that it did not hold before; the forkserver may be another one."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        template, control = host.box.forkserver_pid, set(held.fds.values())
        found = [
            each.text
            for each in ledger.differences(held, _held(host))
            if not (each.kind == "process" and f"pid {template} " in each.text)
        ]
        # The socket to a new forkserver is another one; as many as before are no leak.
        sockets = [text for text in found if "socket:" in text]
        gone = sum("socket:" in target for target in control - set(_held(host).fds.values()))
        if len(sockets) <= gone:
            found = [text for text in found if text not in sockets]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def _kill(host: _Light | _Compiler) -> bool:
    """Kill the forkserver; whether there was one."""
    pid = host.box.forkserver_pid
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False  # it ended by itself, or the host's own thread was faster
    return True


def _killed(host: _Light | _Compiler, kills: int, seed: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Jobs without end while the forkserver is killed at random moments; every one must be answered, rightly."""
    chance = random.Random(seed)
    done = threading.Event()
    answered: list[float] = []
    wrong: list[str] = []
    before = host.stats()

    def jobs(start: int) -> None:
        for number in range(start, 1_000_000, IN_FLIGHT):
            if done.is_set():
                return
            started = time.monotonic()
            try:
                if not host.run(number):
                    wrong.append(f"job {number}: a wrong value")
            except Exception as error:  # noqa: BLE001 - an answer all the same, and one that is told
                wrong.append(f"job {number}: {type(error).__name__}: {str(error)[:300]}")
            answered.append(time.monotonic() - started)

    # One graph after the other in the real case: Dynamo's reset is not for threads.
    starts = range(IN_FLIGHT) if isinstance(host, _Light) else [0]
    threads = [threading.Thread(target=jobs, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    span = 0.4 if isinstance(host, _Light) else 3.0
    try:
        for number in range(kills):
            # Most when a forkserver is ready, idle or not; one in five while the next one starts.
            if chance.random() > 0.2:
                with contextlib.suppress(ForkserverError):  # that one was killed while it started
                    host.box.wait_ready()
            time.sleep(chance.uniform(0.0, span))
            while not _kill(host):
                time.sleep(0.001)
            tell({"kill": number})
    finally:
        done.set()
    for thread in threads:
        thread.join()
    after = host.stats()
    tell(
        {
            "kills": kills,
            "jobs": len(answered),
            "longest_seconds": max(answered, default=0.0),
            "statuses": {
                name: count - before.outcomes.get(name, 0)
                for name, count in after.outcomes.items()
                if count - before.outcomes.get(name, 0)
            },
            "restarts": after.forkserver_restarts - before.forkserver_restarts,
            "wrong": wrong,
        }
    )


if __name__ == "__main__":
    sys.exit(main())

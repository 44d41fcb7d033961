"""`jobs`, `crash` and `idle`: what the sandbox itself costs."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sandbox.callables import job as callable_job
from sandbox.cli.bench.summary import Answer
from sandbox.executor import Sandbox
from sandbox.policy import Policy, load
from sandbox.processes import descendants
from sandbox.results import JobResult, Status

#: Empty jobs of each kind, a count, after those that are not measured.
JOBS: Final = 25
UNMEASURED: Final = 3
#: Seconds without a job in which a standby child is made anew, and in which what has ended goes.
PAUSE_SECONDS: Final = 0.3
#: Compiles of each kind in `crash`, a count.
COMPILES: Final = 4
#: Seconds in which wake-ups are counted, and those that a process gets to come to rest before.
IDLE_SECONDS: Final = 10.0
REST_SECONDS: Final = 3.0
#: The empty job, by a function that every child has: one of ours would be imported there first, for 0.1 s.
nothing: Callable[[], object] = int


def crash() -> None:
    """A job that dies of a signal."""
    os.kill(os.getpid(), signal.SIGSEGV)


def jobs(task: dict[str, Any]) -> Answer:
    """The fixed cost of a job: an empty function, from submit to the reply, one job at a time."""
    answer = Answer("jobs")
    policy = load(task["policy"])
    # A standby child has the policy's limits; a job with others gets a fresh one.
    other = policy.limits.model_copy(update={"wall_seconds": policy.limits.wall_seconds + 1})
    kinds = {"fresh": other, "standby": policy.limits} if _standby(policy) else {"fresh": other}
    order = [kind for kind in kinds for _ in range(JOBS)]
    random.Random(task["seed"]).shuffle(order)
    values: dict[str, list[float]] = {kind: [] for kind in kinds}
    with Sandbox(policy) as box:
        box.wait_ready()
        for kind in (*["fresh"] * UNMEASURED, *order):
            # Alike for both: a standby child that was used is replaced when nothing else is to be done.
            time.sleep(PAUSE_SECONDS)
            job = callable_job(nothing, limits=kinds[kind])
            started = time.perf_counter()
            result = box.submit(job).result()
            values[kind].append((time.perf_counter() - started) * 1000)
            if not result.ok or result.value != 0:
                answer.wrong(f"{kind}: an empty job ended {result.status.value}: {result.detail}")
        stats = box.stats()
    del values["fresh"][:UNMEASURED]
    for kind, told in values.items():
        answer.add("jobs", "", "ms", told, scheme=kind)
    answer.facts["enforcement"] = stats.enforcement
    peaks = [row.usage.peak_memory_bytes / 2**20 for row in stats.jobs]
    answer.facts["memory of a child, MiB"] = round(statistics.median(peaks), 1)
    return answer


def crashes(task: dict[str, Any]) -> Answer:
    """A compile right after a child has crashed, and one after a compile that went well."""
    import torch

    import sandbox
    from sandbox.cli.bench.graphs import REPEATED
    from sandbox.inductor.install import installed

    answer = Answer("subprocess")
    torch.compiler.config.force_disable_caches = True
    torch.manual_seed(0)
    sandbox.install(task["policy"], "subprocess")
    scheme = installed()
    if scheme is None:
        raise RuntimeError("install() has installed nothing")
    scheme.sandbox.wait_ready()
    order = ["steady", "after a crash"] * COMPILES
    random.Random(task["seed"]).shuffle(order)
    seconds: dict[str, list[float]] = {"steady": [], "after a crash": []}
    for variant, kind in enumerate(["", *order]):  # the first one is not measured
        function, inputs = REPEATED.make(10 + variant)
        expected = REPEATED.call(function, inputs)
        time.sleep(PAUSE_SECONDS)
        if kind == "after a crash":
            _crashed(scheme.sandbox.submit(callable_job(crash)).result(), answer)
        torch.compiler.reset()
        started = time.perf_counter()
        found = REPEATED.call(torch.compile(function, dynamic=False), inputs)
        if kind:
            seconds[kind].append(time.perf_counter() - started)
        answer.check(kind or "warm-up", [(found, expected)])
    for kind, values in seconds.items():
        answer.add("crash", "", "seconds", values, scheme=kind)
    if (stats := sandbox.stats()).in_child != len(order) + 1:
        answer.wrong(f"{len(order) + 1 - stats.in_child} graphs were not compiled in a child: {stats.outcomes}")
    sandbox.uninstall()
    return answer


def _crashed(result: JobResult, answer: Answer) -> None:
    if result.status is not Status.CRASHED:
        answer.wrong(f"a child that kills itself ended {result.status.value}: {result.detail}")


def idle(task: dict[str, Any]) -> Answer:
    """One forkserver with its standby children after a first job, at rest: memory and wake-ups of all its processes.

    Of this process its threads but the one that measures are counted.
    """
    answer = Answer("forkserver")
    with Sandbox(task["policy"]) as box:
        box.wait_ready()
        box.submit(callable_job(nothing)).result()
        time.sleep(REST_SECONDS)
        if (template := box.forkserver_pid) is None:
            answer.wrong("there is no forkserver")
            return answer
        pids = [template, *sorted(process.pid for process in descendants(template))]
        before = _switches(pids)
        time.sleep(IDLE_SECONDS)
        after = _switches(pids)
        woken = {who: count - before.get(who, 0) for who, count in after.items() if count != before.get(who, 0)}
        answer.add("idle", "", "wake-ups per second", [sum(woken.values()) / IDLE_SECONDS], processes=len(pids))
        answer.add("idle", "", "MiB of memory, proportional", [sum(map(_proportional, pids))], processes=len(pids))
        answer.facts["woken"] = {f"{pid}/{thread}": count for (pid, thread), count in woken.items()}
        answer.facts["MiB, proportional, by process"] = {str(pid): _proportional(pid) for pid in pids}
    return answer


def _switches(pids: list[int]) -> dict[tuple[int, int], int]:
    """Voluntary context switches so far, by process and thread: one each time that a thread has slept."""
    own, measuring = os.getpid(), int(os.readlink("/proc/thread-self").rpartition("/")[2])
    found = {}
    for pid in (*pids, own):
        for thread in os.listdir(f"/proc/{pid}/task"):
            if (pid, int(thread)) == (own, measuring):
                continue
            for line in Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    found[pid, int(thread)] = int(line.split()[1])
    return found


def _proportional(pid: int) -> float:
    """Proportional set size of a process in MiB: what it shares counts by how many share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _standby(policy: Policy) -> int:
    """Standby children that the policy has, a count."""
    return int(getattr(policy.forkserver, "standby", 0))

"""What a cgroup does to a job that wants too much, with the watchdog off, and what it costs.

    python benchmarks/cgroups.py [--jobs N] [--json]

For any host that delegates a cgroup (v2 or v1) with the controllers memory and pids; elsewhere it says why not and ends
with 1. Uses a forkserver without torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox import Confinement, Limits, Policy, Sandbox, callable_job
from sandbox.enforce import cgroups
from sandbox.limits import MIB
from sandbox.policy import ForkserverSettings

#: So that nothing but the cgroup can stop a job.
ALONE = Confinement(watchdog="off", rlimits="off", seccomp="off", cgroup="require")
LIMITS = Limits(wall_seconds=300.0, memory_bytes=128 * MIB, threads=100, processes=1000)
#: Processes that are killed at once.
CROWD = 50


def hog() -> None:
    """Take memory, a megabyte at a time, and touch it."""
    kept = []
    while True:
        kept.append(bytearray(os.urandom(4096)) * 256)


def bomb() -> None:
    """Fork until the kernel refuses."""
    for number in range(1000):
        try:
            if os.fork() == 0:
                time.sleep(300)
                os._exit(0)
        except OSError:
            raise RuntimeError(f"fork {number + 1} was refused") from None


def crowd() -> float:
    """Seconds from the order to kill until all of a crowd in a cgroup are collected."""
    group = cgroups.Group(f"sandbox-benchmark-{os.getpid()}", cgroups.find(), Limits())
    ready, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        group.join()
        pids = []
        for _ in range(CROWD - 1):
            pid = os.fork()
            if pid == 0:
                signal.pause()
            pids.append(pid)
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    begin = time.perf_counter()
    group.kill()
    if not any(os.path.exists(f"{folder}/cgroup.kill") for folder, _ in group.folders):
        for pid in Path(group.folders[0][0], "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    os.waitpid(parent, 0)
    while any(Path(folder, "cgroup.procs").read_text() for folder, _ in group.folders):
        time.sleep(0.0002)
    seconds = time.perf_counter() - begin
    group.close()
    group.remove()
    return seconds


def milliseconds(box: Sandbox, confinement: Confinement, jobs: int) -> float:
    """Median of a small job, from submit to result."""
    found = []
    for _ in range(jobs):
        begin = time.perf_counter()
        box.submit(callable_job(abs, -1, confinement=confinement)).result(300)
        found.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(found)


def main() -> int:
    """Measure and print. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=20, help="small jobs for each median (default: 20)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        places = cgroups.find()
    except cgroups.NotDelegated as problem:
        print(f"no cgroup is delegated here: {problem}", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    with Sandbox(Policy(forkserver=ForkserverSettings(import_torch=False))) as box:
        box.wait_ready()
        works: dict[str, Callable[[], None]] = {"memory beyond 128 MiB": hog, "fork bomb, 100 threads allowed": bomb}
        for name, work in works.items():
            result = box.submit(callable_job(work, limits=LIMITS, confinement=ALONE)).result(600)
            said = result.failure.message if result.failure is not None else ""
            rows.append(
                {
                    "what": name,
                    "status": result.status.value,
                    "detail": "; ".join(filter(None, (result.detail, said))),
                    "seconds": round(result.usage.wall_seconds, 3),
                    "peak_bytes": result.usage.peak_memory_bytes,
                }
            )
        costs = {
            "job_without_cgroup_ms": round(milliseconds(box, Confinement(cgroup="off"), arguments.jobs), 1),
            "job_with_cgroup_ms": round(milliseconds(box, Confinement(cgroup="require"), arguments.jobs), 1),
            "kill_of_50_processes_ms": round(crowd() * 1e3, 1),
        }
    report = {
        "kernel": platform.release(),
        "places": [[place.folder, place.version, sorted(place.controllers)] for place in places],
        "rows": rows,
        **costs,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"Linux {report['kernel']}; " + "; ".join(f"{p.version} {p.folder}" for p in places))
    for row in rows:
        print(f"{row['what']:32} {row['status']:14} {row['seconds']:8.3f} s  {row['detail']}")
    for name, value in costs.items():
        print(f"{name:32} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Many small jobs in one process: what grows.

    python benchmarks/soak.py [--jobs N] [--parallel N] [--torch] [--json]

Descriptors, threads, semaphores and processes have to be flat, and the resident memory of this process and of the
forkserver has to grow by less than 1% after the first 1,000 jobs (or half of them), when all rows of the report are
there. Ends with 1 otherwise. Shown besides: private memory, and the heaps of the C library's allocator.
Semaphores are the host's: nothing else may make some.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

from sandbox import JobResult, Policy, Sandbox, callable_job, ledger
from sandbox.meter import sizes
from sandbox.policy import ForkserverSettings
from sandbox.processes import PAGE_BYTES, read_stat

#: Looks between the first and the last job.
LOOKS = 20
#: What has to be the same in the end as after the first jobs.
FLAT = ("descriptors", "threads", "semaphores", "processes", "forkserver_descriptors", "forkserver_threads", "files")
#: What may grow, by so much of what it was.
MEMORY, MOST = ("resident_bytes", "forkserver_resident_bytes"), 0.01


def work(number: int) -> int:
    """A small job: it allocates, writes a file, and gives back what it was given."""
    with open("note", "w") as file:
        file.write("x" * 1000)
    return number


def run(box: Sandbox, jobs: int, parallel: int) -> None:
    """Run so many jobs, ``parallel`` at a time."""
    running: deque[Future[JobResult]] = deque()
    for number in range(jobs + parallel):
        if len(running) == parallel or number >= jobs:
            if not running:
                return
            result = running.popleft().result(300)
            if not result.ok or result.leaks.leaks:
                raise SystemExit(f"a job ended otherwise: {result}")
        if number < jobs:
            running.append(box.submit(callable_job(work, number)))


def look(box: Sandbox) -> dict[str, int]:
    """What this process and the forkserver hold, once all jobs are over and nothing is left to be done for them."""
    deadline = time.monotonic() + 10.0
    while box.standbys < box.policy.forkserver.standby and time.monotonic() < deadline:
        time.sleep(0.01)
    box.settle(10.0)
    gc.collect()
    template = box.forkserver_pid or 0
    heaps, heaps_bytes = _heaps()
    here, there = ledger.take(), ledger.take(template, ipc=False)
    return {
        "descriptors": len(here.fds),
        "threads": len(here.threads),
        "semaphores": len(here.posix) + len(here.sysv),
        "processes": len(here.processes),
        "files": len(os.listdir(box._forkserver.root.path)),
        "resident_bytes": _resident(os.getpid()),
        "private_bytes": sizes(os.getpid())[0],
        "heaps": heaps,
        "heaps_bytes": heaps_bytes,
        "forkserver_descriptors": len(there.fds),
        "forkserver_threads": len(there.threads),
        "forkserver_resident_bytes": _resident(template),
        "forkserver_private_bytes": sizes(template)[0],
    }


def _heaps() -> tuple[int, int]:
    """Heaps of the C library's allocator, a count (a thread that finds all locked makes another), and their bytes."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    with tempfile.TemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        file.seek(0)
        text = file.read().decode()
    return text.count("<heap "), int(re.findall(r'<system type="current" size="(\d+)"', text)[-1])


def _resident(pid: int) -> int:
    stat = read_stat(pid)
    return stat.rss_pages * PAGE_BYTES if stat is not None else 0


def soak(jobs: int, parallel: int, torch: bool = False) -> dict[str, Any]:
    """Run ``jobs`` small jobs, look now and then; returns the report."""
    first = max(1, min(1000, jobs // 2))
    settings = ForkserverSettings(import_torch=torch)
    began = time.monotonic()
    with Sandbox(Policy(parallel_jobs=parallel, forkserver=settings)) as box:
        box.wait_ready()
        run(box, first, parallel)
        rows = [{"jobs": first, **look(box)}]
        for number in range(1, LOOKS + 1):
            count = (jobs - first) * number // LOOKS + first - rows[-1]["jobs"]
            run(box, count, parallel)
            rows.append({"jobs": rows[-1]["jobs"] + count, **look(box)})
        stats = box.stats()
    grown = {name: rows[-1][name] / rows[0][name] - 1.0 for name in MEMORY}
    problems = [f"{name}: {rows[0][name]}, then {rows[-1][name]}" for name in FLAT if rows[0][name] != rows[-1][name]]
    problems += [f"{name} has grown by {share:.2%}" for name, share in grown.items() if share > MOST]
    problems += [
        f"{name}: {found}" for name, found in (("leaks", stats.leaks), ("swallowed", stats.swallowed)) if found
    ]
    return {
        "kernel": platform.release(),
        "jobs": jobs,
        "parallel": parallel,
        "torch": torch,
        "seconds": round(time.monotonic() - began, 1),
        "forkserver_restarts": stats.forkserver_restarts,
        "grown": {name: round(share, 5) for name, share in grown.items()},
        "rows": rows,
        "problems": problems,
    }


def main() -> int:
    """Measure and print. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--parallel", type=int, default=2, help="jobs at a time (default: 2)")
    parser.add_argument("--torch", action="store_true", help="a full forkserver")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = soak(arguments.jobs, arguments.parallel, arguments.torch)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        names = list(report["rows"][0])
        print("  ".join(names))
        for row in report["rows"]:
            print("  ".join(f"{row[name]:>{len(name)}}" for name in names))
        print(f"{report['jobs']} jobs in {report['seconds']} s; grown: {report['grown']}")
        for problem in report["problems"]:
            print(f"not ok: {problem}", file=sys.stderr)
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

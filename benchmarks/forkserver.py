"""Our forkserver beside that of the package multiprocess: what does one child cost, and what is held for it?

    python benchmarks/forkserver.py [--jobs N] [--json]

Both preload torch, Dynamo, Inductor and Triton, and neither warms up. multiprocess's is an own instance of
`multiprocess.forkserver.ForkServer`, used as its `Popen` does: connect, send, read the pid, wait for the exit status.
Ours runs a `callable` job, whole: spec and payload checked twice, keeper and worker forked, confined, watched,
leaks looked for. The row "confinement off" tells what of it the confinement costs. "Until it runs" ends for ours when
the child has checked its spec (`usage.start_seconds`), for multiprocess when the unpickled function runs. One
uncounted import of the same modules comes first, so that the server measured first does not pay for reading files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dill
import psutil
from multiprocess import forkserver as theirs

from sandbox import Confinement, Policy, Sandbox, callable_job
from sandbox.policy import ForkserverSettings

#: Imported by both servers. Ours is told so, too: with `warm_up` off it would import less.
PRELOAD = ["torch", "torch._dynamo", "torch._inductor.compile_fx", "triton", "dill"]
#: A keeper answers before it exits, and giving back its memory takes some milliseconds.
SETTLE_SECONDS = 0.5


@dataclass
class Row:
    """One forkserver's figures; times in seconds, the others counts."""

    name: str
    start: float = 0.0
    until_running: list[float] = field(default_factory=list)
    until_exited: list[float] = field(default_factory=list)
    recovery: float = 0.0
    processes: int = 0
    semaphores: int = 0
    descriptors: int = 0
    template_threads: int = 0


def trivial() -> int:
    """The job."""
    return os.getpid()


class _Job:
    """What multiprocess's server runs in a child: anything with a method `_bootstrap`."""

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        # Dill sends a class of `__main__` by value, and methods without the module's globals.
        import os

        from multiprocess import forkserver

        os.write(forkserver._forkserver._inherited_fds[0], b"R")
        return 0


def held() -> tuple[int, int, int]:
    """Child processes, semaphores and descriptors of this process."""
    semaphores = len(list(Path("/dev/shm").glob("sem.*")))
    with contextlib.suppress(OSError):
        semaphores += len(Path("/proc/sysvipc/sem").read_text().splitlines()) - 1
    return len(psutil.Process().children(recursive=True)), semaphores, len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def holding(row: Row) -> Iterator[None]:
    """What is held at the end of the block more than at its beginning."""
    before = held()
    yield
    time.sleep(SETTLE_SECONDS)
    row.processes, row.semaphores, row.descriptors = (now - then for now, then in zip(held(), before, strict=True))


def measure_multiprocess(jobs: int) -> Row:
    """multiprocess's ForkServer."""
    row = Row("multiprocess.ForkServer")
    server = theirs.ForkServer()
    server.set_forkserver_preload(PRELOAD)  # without `__main__`: the caller's script must not run again
    # The preparation data as `spawn.get_preparation_data` makes it, less the way to `__main__`.
    message = dill.dumps({"name": "job", "sys_path": sys.path, "dir": os.getcwd()}) + dill.dumps(_Job())

    def one() -> tuple[float, float]:
        started = time.perf_counter()
        read, write = os.pipe()
        status, data = server.connect_to_new_process([write])
        os.close(write)
        with open(data, "wb") as stream:
            stream.write(message)
            stream.flush()
            theirs.read_signed(status)  # the pid
            if os.read(read, 1) != b"R":
                raise RuntimeError("the child did not run")
            running = time.perf_counter() - started
            if theirs.read_signed(status) != 0:
                raise RuntimeError("the child failed")
        exited = time.perf_counter() - started
        os.close(read)
        os.close(status)
        return running, exited

    with holding(row):
        row.start = one()[1]
        for _ in range(jobs):
            running, exited = one()
            row.until_running.append(running)
            row.until_exited.append(exited)
        row.template_threads = psutil.Process(server._forkserver_pid).num_threads()
        psutil.Process(server._forkserver_pid).kill()
        # Asked while the dead one is still a zombie in the making, it would answer with an error: give it a moment.
        os.waitid(os.P_PID, server._forkserver_pid, os.WEXITED | os.WNOWAIT)
        row.recovery = one()[1]
    server._stop()
    return row


def measure_ours(name: str, policy: Policy, jobs: int) -> Row:
    """Ours, under ``policy``."""
    row = Row(name)
    with holding(row):
        sandbox = Sandbox(policy)

        def one() -> tuple[float, float]:
            started = time.perf_counter()
            job = callable_job(trivial, limits=policy.limits, confinement=policy.confinement)
            result = sandbox.submit(job).result(300)
            if not result.ok:
                raise RuntimeError(f"{result.status.value}: {result.detail}")
            return result.usage.queue_seconds + result.usage.start_seconds, time.perf_counter() - started

        row.start = one()[1]
        for _ in range(jobs):
            running, exited = one()
            row.until_running.append(running)
            row.until_exited.append(exited)
        pid = sandbox.forkserver_pid
        if pid is None:
            raise RuntimeError("no forkserver is running")
        row.template_threads = psutil.Process(pid).num_threads()
        os.kill(pid, signal.SIGKILL)
        row.recovery = one()[1]
    sandbox.close()
    return row


def main() -> int:
    """Measure all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", metavar="N", type=int, default=50, help="children per forkserver; default 50")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    settings = ForkserverSettings(import_torch=True, warm_up=False, preload=tuple(PRELOAD))
    confined = Policy(name="confined", forkserver=settings, parallel_jobs=1)
    off: dict[str, Any] = {name: "off" for name in Confinement.model_fields}
    loose = confined.model_copy(update={"name": "loose", "confinement": Confinement(**off)})
    subprocess.run([sys.executable, "-c", "import " + ", ".join(PRELOAD)], check=True)
    rows = [
        measure_multiprocess(arguments.jobs),
        measure_ours("ours, confinement off", loose, arguments.jobs),
        measure_ours("ours, default confinement", confined, arguments.jobs),
    ]
    if arguments.json:
        print(json.dumps({"load": os.getloadavg(), "rows": [asdict(row) for row in rows]}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "forkserver", "start and first child s", "until it runs ms", "until exited ms", "after SIGKILL s",
        "processes held", "semaphores held", "descriptors held", "threads of the template",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.name, f"{row.start:.2f}", spread(row.until_running), spread(row.until_exited), f"{row.recovery:.2f}",
            str(row.processes), str(row.semaphores), str(row.descriptors), str(row.template_threads),
        )  # fmt: skip
    Console(width=160).print(table)
    print(f"{arguments.jobs} children each; load average over one minute {os.getloadavg()[0]:.2f}")
    return 0


def spread(seconds: list[float]) -> str:
    """Median and range in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.1f} ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})"


if __name__ == "__main__":
    sys.exit(main())

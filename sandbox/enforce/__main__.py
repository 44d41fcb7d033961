"""`python -m sandbox.enforce`: try a confinement (JSON on stdin) on this host and print what was reached (JSON).

This process plays the keeper and forks one worker, as for a job. It exists so that the process that asks, which has
many threads and must not be confined, does neither.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from sandbox import enforce, meter
from sandbox.enforce import cgroups, libc, namespaces, paths
from sandbox.limits import Confinement, Limits
from sandbox.results import Enforcement, Mechanism, State


def main() -> int:
    """Read, try, print. Returns the exit status."""
    asked = Confinement.model_validate_json(sys.stdin.buffer.read())
    # What is required is only preferred here: it is to be told, not to stop the others from being tried.
    confinement = asked.softened().model_copy(update={"run_as": ""})
    name = f"sandbox-probe-{os.getpid()}"
    cgroup, group = cgroups.enter(confinement, Limits(), name)
    entered = enforce.prepare_keeper(confinement)
    keeper = os.getpid()
    from_worker, to_keeper = os.pipe()
    go, start = os.pipe()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as root:
        scratch = Path(root) / "job"
        scratch.mkdir()
        read = paths.needed(os.environ, gpu=False, extra=confinement.read).read
        worker = os.fork()
        if worker == 0:
            status = 1
            try:
                found = namespaces.close_off(entered, scratch, read)
                found["cgroup"] = _join(cgroup, group)
                found |= enforce.confine_worker(confinement, Limits(), 0 if entered.own_pids else keeper)
                os.write(to_keeper, Enforcement(mechanisms=found).model_dump_json().encode())
                os.close(start)
                os.read(go, 1)  # stay to be measured, until the keeper closes its end
                status = 0
            finally:
                os._exit(status)
        try:
            return _tell(confinement, worker, from_worker, to_keeper, start)
        finally:
            if group is not None:
                group.close()
                group.remove()


def _join(state: Mechanism, group: cgroups.Group | None) -> Mechanism:
    if group is None:
        return state
    try:
        group.join()
    except OSError as error:
        return Mechanism(state=State.UNAVAILABLE, reason=libc.reason(error))
    return state


def _tell(confinement: Confinement, worker: int, from_worker: int, to_keeper: int, start: int) -> int:
    os.close(to_keeper)
    answer = os.read(from_worker, 65_536)
    watchdog = _watch(confinement, os.getpid())
    os.close(start)
    _, status = os.waitpid(worker, 0)
    if status or not answer:
        print(f"the worker of the probe ended with wait status {status}", file=sys.stderr)
        return 1
    states = Enforcement.model_validate_json(answer).mechanisms | {"watchdog": watchdog}
    print(json.dumps(Enforcement(mechanisms=states).model_dump(mode="json")))
    return 0


def _watch(confinement: Confinement, keeper: int) -> Mechanism:
    """Whether a process tree can be measured here, by measuring this one."""
    if confinement.watchdog == "off":
        return Mechanism(state=State.OFF)
    usage = meter.TreeMeter(keeper, memory_limit_bytes=0).sample()
    if usage.processes < 1:
        return Mechanism(state=State.UNAVAILABLE, reason="/proc does not show the processes of a job")
    if not meter.can_read_exactly(keeper):
        return Mechanism(
            state=State.PARTIAL,
            reason="no smaps_rollup here: memory shared with the forkserver counts as the job's",
        )
    return Mechanism(state=State.ENFORCED)


if __name__ == "__main__":
    sys.exit(main())

"""Standby children: as confined as a fresh one, used only where they fit, replaced, and gone with whoever dies."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually, family, held, light_policy

import sandbox
from sandbox import faults, monitor
from sandbox.enforce import cgroups
from sandbox.launch import Launched
from sandbox.limits import MIB, Confinement, Limits
from sandbox.policy import ForkserverSettings
from sandbox.processes import read_stat
from sandbox.results import JobResult, Status

SETTINGS = ForkserverSettings(import_torch=False, preload=("faultpoints",), standby=1)


def standby_policy(**changes: object) -> sandbox.Policy:
    return light_policy(**{"forkserver": SETTINGS, "allow_faults": True, **changes})


@pytest.fixture
def box() -> Iterator[sandbox.Sandbox]:
    with sandbox.Sandbox(standby_policy()) as one:
        one.wait_ready()
        yield one


def waiting(box: sandbox.Sandbox) -> Launched:
    """The standby child, once there is one."""
    assert eventually(lambda: box._standbys.ready == 1, 20.0)
    return box._standbys._ready[0][0]


def counts(box: sandbox.Sandbox) -> list[object]:
    """What this process, the host and the template hold; of processes, how many."""
    template = box.forkserver_pid
    both = (dataclasses.asdict(held(pid)) for pid in (None, template))
    return [{**each, "children": len(each["children"])} for each in both] + [len(family(template))]


def run(box: sandbox.Sandbox, function: object, *args: object, **settings: object) -> JobResult:
    return box.submit(sandbox.callable_job(function, *args, **settings)).result(60)  # type: ignore[arg-type]


def facts() -> dict[str, object]:
    """What a job sees of its confinement."""
    status = {line.partition(":")[0]: line for line in Path("/proc/self/status").read_text().splitlines()}
    kept = (
        "CapEff",
        "CapPrm",
        "CapBnd",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "Uid",
        "NSpid",
        "SigIgn",
        "SigCgt",
    )
    return {
        "status": {name: status.get(name) for name in kept},
        "rlimits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n[:7] == "RLIMIT_"},
        "environment": sorted(os.environ),
        "fds": {
            int(fd): os.path.realpath(f"/proc/self/fd/{fd}").partition(":")[0] for fd in os.listdir("/proc/self/fd")
        },
        "threads": len(os.listdir("/proc/self/task")),
        "mounts": sum(1 for _ in open("/proc/self/mountinfo")),
        "tmp": os.statvfs("/tmp").f_blocks,
        "umask": os.umask(0o077),
        "session": os.getsid(0) == os.getpid(),
        "oom": Path("/proc/self/oom_score_adj").read_text(),
        "namespaces": sorted(os.listdir("/proc/self/ns")),
        "folder": sorted(os.listdir(".")),
    }


def test_a_standby_is_confined_as_a_fresh_child(box: sandbox.Sandbox) -> None:
    pid = waiting(box).pid
    ready = run(box, facts)
    assert ready.ok, ready.detail
    assert box._standbys.ready == 0 or waiting(box).pid != pid, "it was not used"
    fresh = run(box, facts, environment={**box.environment(), "SANDBOX_TEST_OTHER": "1"})
    ready.value["environment"].append("SANDBOX_TEST_OTHER")
    ready.value["environment"].sort()
    for seen in (ready.value, fresh.value):
        data = seen["rlimits"].pop("RLIMIT_DATA")
        assert abs(data[0] - box.policy.limits.memory_bytes) < 256 * MIB and data[0] == data[1]
        # The reserve of the worker and the job's socket are where they happen to be.
        seen["fds"] = sorted(seen["fds"].values())
    assert ready.value == fresh.value
    assert ready.enforcement == fresh.enforcement
    assert ready.leaks.leaks == fresh.leaks.leaks == ()
    assert box.stats().children_started == 2 and not box.stats().swallowed


@pytest.mark.parametrize(
    "settings",
    [
        {"limits": Limits(memory_bytes=1 << 29, wall_seconds=30.0)},
        {"limits": Limits(memory_bytes=1 << 30)},
        {"confinement": Confinement(network_namespace="off")},
        {"environment": {"PATH": "/usr/bin:/bin"}},
    ],
)
def test_a_job_that_differs_gets_a_fresh_child(box: sandbox.Sandbox, settings: dict[str, object]) -> None:
    before = waiting(box).pid
    assert run(box, abs, -2, **settings).value == 2
    assert waiting(box).pid == before, "it was used"


def test_a_changed_environment_makes_it_stale(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    before = waiting(box).pid
    monkeypatch.setenv("SANDBOX_TEST_COLOUR", "blue")
    assert run(box, os.getenv, "SANDBOX_TEST_COLOUR").value == "blue"
    assert eventually(lambda: box._standbys.ready == 1 and waiting(box).pid != before, 20.0)
    assert run(box, os.getenv, "SANDBOX_TEST_COLOUR").value == "blue"


def test_folders_of_which_each_child_has_its_own_make_none_stale(
    box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its caches off, Inductor sets them anew for each graph."""
    before, taken, take = waiting(box).pid, [], box._standbys.take
    monkeypatch.setattr(box._standbys, "take", lambda spec: taken.append(take(spec)) or taken[-1])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere/inductor")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere/triton")
    found = run(box, os.getenv, "TORCHINDUCTOR_CACHE_DIR").value
    assert found and not str(found).startswith("/nowhere")
    assert [child.pid for child in taken] == [before]


def test_what_a_standby_has_used_before_is_not_its_jobs(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rehearses after it has been measured first: what it had used is asked when its job begins."""

    def burn() -> int:
        return sum(range(5_000_000))

    assert run(box, burn).usage.cpu_seconds > 0.05
    meter = waiting(box).meter
    assert meter is not None and 0 <= meter.cpu() < 10
    monkeypatch.setattr(meter, "cpu", lambda: 10.0)
    assert run(box, burn).usage.cpu_seconds == 0


def test_a_lower_grant_of_memory_is_set_in_the_standby(box: sandbox.Sandbox) -> None:
    before = waiting(box).pid
    low = Limits(memory_bytes=256 * MIB)
    ends = run(box, lambda: sum(map(len, [bytearray(os.urandom(1 << 20)) for _ in range(400)])), limits=low)
    assert ends.status is Status.MEMORY_LIMIT
    assert eventually(lambda: box._standbys.ready == 1 and waiting(box).pid != before, 20.0), "it was not used"


def act(kind: str) -> None:
    from sandbox.faults import KINDS

    KINDS[kind].act()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("sigsegv", Status.CRASHED),
        ("exit", Status.CRASHED),
        ("hang_gil", Status.TIMEOUT),
        ("oom_sudden", Status.MEMORY_LIMIT),
        ("fork_bomb", Status.VIOLATION),
        ("stderr_flood", Status.OUTPUT_LIMIT),
        ("leak_semaphore", Status.OK),
        ("orphan", Status.OK),
    ],
)
def test_what_a_job_does_to_a_standby_child(kind: str, status: Status) -> None:
    limits = light_policy().limits.model_copy(update={**faults.KINDS[kind].limits})
    with sandbox.Sandbox(standby_policy(limits=limits)) as box:
        box.wait_ready()
        waiting(box)
        before = counts(box)
        done = run(box, act, kind)
        assert done.status is status, done
        assert bool(done.leaks.leaks) is (status is Status.OK)
        assert run(box, abs, -1).value == 1
        waiting(box)
        assert eventually(lambda: counts(box) == before, 5.0), (counts(box), before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("who", ["worker", "keeper"])
def test_one_that_has_died_costs_its_job_nothing(box: sandbox.Sandbox, who: str, number: int) -> None:
    child = waiting(box)
    before = counts(box)
    assert child.pid is not None
    os.kill(child.pid if who == "worker" else child.process.pid, number)
    assert eventually(lambda: not child.process.alive())
    assert run(box, abs, -3).value == 3
    assert box.stats().swallowed == {"ForkserverError": 1}
    waiting(box)
    assert eventually(lambda: counts(box) == before, 5.0), (counts(box), before)
    assert eventually(lambda: not child.folder.exists())
    assert not cgroups.left(cgroups.group_name(child.folder))


def test_one_that_is_stopped_is_not_used(box: sandbox.Sandbox) -> None:
    child = waiting(box)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    assert eventually(lambda: (stat := read_stat(child.pid or 0)) is not None and stat.state == "T")
    started = time.monotonic()
    assert run(box, abs, -3).value == 3
    assert time.monotonic() - started < monitor.BEGIN_SECONDS / 2, "it was waited for"
    assert eventually(lambda: not child.folder.exists())


def test_one_that_does_not_begin_costs_its_job_only_time(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    child = waiting(box)
    monkeypatch.setattr(monitor, "BEGIN_SECONDS", 0.3)
    real = type(box._standbys).take

    def take(self: object, spec: object) -> object:
        found = real(self, spec)  # type: ignore[arg-type]
        if found is child:
            os.kill(child.pid or 0, signal.SIGSTOP)
        return found

    monkeypatch.setattr(type(box._standbys), "take", take)
    ends = run(box, abs, -3)
    assert (ends.status, ends.value) == (Status.OK, 3)
    assert box.stats().swallowed == {"ForkserverError": 1}
    assert eventually(lambda: not child.folder.exists())


def test_a_slot_outlives_whatever_a_refill_raises(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refill(self: object) -> None:
        raise KeyError("a variable went away")

    monkeypatch.setattr(type(box._standbys), "refill", refill)
    for number in range(2 * box.slots):
        assert run(box, abs, -number).value == number
    assert eventually(lambda: box.stats().swallowed == {"KeyError": 2 * box.slots})


@pytest.mark.parametrize("who", ["worker", "keeper"])
def test_one_that_dies_as_its_job_begins(box: sandbox.Sandbox, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    child = waiting(box)
    assert child.pid is not None
    pid = child.pid if who == "worker" else child.process.pid
    real = type(box._standbys).take

    def take(self: object, spec: object) -> object:
        found = real(self, spec)  # type: ignore[arg-type]
        if found is child:
            os.kill(pid, signal.SIGKILL)
            # It dies with its keeper, but not at once: one that has said that it began is a crash of the job.
            assert eventually(lambda: not Path(f"/proc/{child.pid}").exists(), 20)
        return found

    monkeypatch.setattr(type(box._standbys), "take", take)
    assert run(box, abs, -3).value == 3
    assert eventually(lambda: not child.folder.exists())


def test_those_of_a_dead_template_are_replaced(box: sandbox.Sandbox) -> None:
    child = waiting(box)
    template = box.forkserver_pid
    assert template is not None
    os.kill(template, signal.SIGKILL)
    for _ in range(2):  # the first may have had the standby: it lives, and may be used as long as that is not known
        assert run(box, abs, -1).value == 1
    assert eventually(lambda: box.forkserver_pid not in (None, template), 20.0)
    assert eventually(lambda: not child.process.alive() and not child.folder.exists(), 20.0)
    assert waiting(box).template == box.forkserver_pid


def test_nothing_is_left_by_close() -> None:
    before = held(), family(None)
    with sandbox.Sandbox(standby_policy(forkserver=SETTINGS.model_copy(update={"standby": 3}))) as box:
        box.wait_ready()
        assert eventually(lambda: box._standbys.ready == 3, 20.0)
    assert eventually(lambda: not held().more_than(before[0]) and family(None) <= before[1]), held().more_than(
        before[0]
    )


def test_close_while_one_is_made() -> None:
    before = held(), family(None)
    with sandbox.Sandbox(standby_policy(forkserver=SETTINGS.model_copy(update={"standby": 8}))) as box:
        box.wait_ready()
        assert eventually(lambda: box._standbys._making is not None)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert eventually(lambda: not held().more_than(before[0]) and family(None) <= before[1]), held().more_than(
        before[0]
    )


HOST = """
    import sys, time
    import conftest, sandbox
    from test_standby import standby_policy, waiting
    box = sandbox.Sandbox(standby_policy())
    box.wait_ready()
    child = waiting(box)
    print(box.forkserver_pid, child.process.pid, child.pid, box._forkserver.root.path, flush=True)
    time.sleep(600)
"""


def test_the_service_dies() -> None:
    host = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOST)], stdout=subprocess.PIPE, text=True)
    try:
        assert host.stdout is not None
        *pids, root = host.stdout.readline().split()
    finally:
        host.kill()
        host.communicate()
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5.0)
    assert eventually(lambda: not Path(root).exists(), 5.0)


def test_a_fork_of_the_host_holds_none_alive(box: sandbox.Sandbox) -> None:
    child = waiting(box)
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(tell, b"x")
        signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)
        box.close()
        assert not child.process.alive()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def test_a_job_with_a_fault_gets_a_fresh_child(box: sandbox.Sandbox) -> None:
    before = waiting(box).pid
    with faults.inject("sigkill", "child.confine", into=box, times=1) as injection:
        assert run(box, abs, -1).status is Status.CRASHED
    assert injection.given and waiting(box).pid == before
    with faults.inject("raise", "parent.folder", into=box, times=1):
        assert run(box, abs, -1).status is Status.SANDBOX_ERROR


def test_an_idle_service_wakes_nobody(box: sandbox.Sandbox) -> None:
    waiting(box)
    assert run(box, abs, -1).value == 1
    waiting(box)
    assert box.settle(5.0)

    def seen() -> list[tuple[str, bool, int]]:
        return [(each.role, each.standby, each.wakeups) for each in box.processes()]

    def asleep() -> bool:
        before = seen()
        time.sleep(0.5)  # what is measured: nobody wakes in it
        return seen() == before

    assert eventually(asleep, 10.0)
    roles = ("forkserver", False), ("keeper", True), ("init", True), ("worker", True)
    assert [each[:2] for each in seen() if each[0] != "init"] == [each for each in roles if each[0] != "init"]
    private = {each.role: each.private_bytes for each in box.processes()}
    assert all(0 < size < 100 * MIB for size in private.values())
    assert not [thread for thread in threading.enumerate() if thread.name in ("sandbox-background", "sandbox-job")]


@pytest.mark.slow
def test_many_small_jobs_leave_nothing_behind() -> None:
    """The short form of benchmarks/soak.py, whose figures of memory need more jobs than this."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "soak.py"), "--jobs", "200", "--json"],
        capture_output=True,
        timeout=110,
    )
    report = json.loads(done.stdout)
    assert [problem for problem in report["problems"] if "resident_bytes" not in problem] == []
    assert [row["jobs"] for row in report["rows"]][-1] == 200
    # 4 KB for a row in the report of each job.
    assert report["rows"][-1]["private_bytes"] - report["rows"][0]["private_bytes"] < 4 * MIB
    assert report["rows"][-1]["forkserver_private_bytes"] - report["rows"][0]["forkserver_private_bytes"] < MIB


def test_one_that_is_being_made_is_waited_for(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs one right after the other: the next one is made as soon as one is over."""
    waiting(box)
    fresh = []
    real = monitor.launch
    monkeypatch.setattr(monitor, "launch", lambda *a, **k: (fresh.append(a), real(*a, **k))[1])
    monkeypatch.setattr("sandbox.standby.MAKING_SECONDS", 20.0)
    for number in range(3):
        assert eventually(lambda: box.standbys == 1 or box._standbys._making is not None, 20.0)
        assert run(box, abs, -number).value == number
    assert fresh == []


def test_memory_is_put_together_to_huge_pages_where_the_kernel_has_them() -> None:
    """A fork has fewer page table entries to copy then."""
    program = (
        "import mmap\n"
        "from sandbox import hugepages\n"
        "held = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "held.write(bytes(range(256)) * (1 << 16))\n"
        "told = hugepages.collapse()\n"
        "assert held[:] == bytes(range(256)) * (1 << 16)\n"
        "lines = open('/proc/self/smaps_rollup').read().splitlines()\n"
        "print(told, next(int(line.split()[1]) << 10 for line in lines if line.startswith('AnonHugePages')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    told, seen = map(int, done.stdout.split())
    assert told == 0 or seen >= 8 << 20, "told, but not so"

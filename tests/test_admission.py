"""Jobs and the memory that is free: who gets how much, who waits, who is refused, and what a real job is told."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import eventually, light_policy

import sandbox
from sandbox import admission
from sandbox.admission import Admission
from sandbox.errors import RefusedError
from sandbox.limits import GIB, MIB, Confinement, Limits
from sandbox.memory import Free
from sandbox.policy import MemorySettings, load
from sandbox.results import Status

SETTINGS = MemorySettings(reserve_bytes=100 * MIB, min_bytes=500 * MIB, wait_seconds=60.0)


class Host:
    """A host whose free memory the test sets, and an admission on it."""

    def __init__(self, free: int | None) -> None:
        self.free = free
        self.looks = 0
        self.admission = Admission(self.look)
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []
        self.leave: dict[str, threading.Event] = {}
        self.granted: dict[str, int | str | None] = {}

    def look(self) -> Free | None:
        self.looks += 1
        return None if self.free is None else Free(self.free, "the host")

    def job(
        self, name: str, wanted: int, settings: MemorySettings = SETTINGS, wish: Callable[[], bool] = lambda: True
    ) -> None:
        """A job that asks in a thread of its own, and stays until it is told to leave."""
        self.leave[name] = threading.Event()

        def work() -> None:
            try:
                with self.admission.granted(settings, wanted, wish) as grant:
                    self.order.append(name)
                    self.granted[name] = grant.bytes if grant is not None else None
                    self.leave[name].wait(60)
            except RefusedError as error:
                self.granted[name] = str(error)

        before = len(self.admission._queue) + len(self.granted)
        thread = threading.Thread(target=work)
        thread.start()
        self.threads.append(thread)
        assert eventually(lambda: len(self.admission._queue) + len(self.granted) > before)

    def end(self) -> None:
        self.free = 1 << 50
        for event in self.leave.values():
            event.set()
        self.admission.poke()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        assert not self.admission._queue and not self.admission._grants


@pytest.fixture
def host() -> Iterator[Host]:
    one = Host(2 * GIB)
    yield one
    one.end()


def test_a_job_gets_its_limit_or_what_is_left(host: Host) -> None:
    with host.admission.granted(SETTINGS, 600 * MIB) as one:
        assert one is not None and one.bytes == 600 * MIB and one.explain() == ""
        with host.admission.granted(SETTINGS, 8 * GIB) as two:
            assert two is not None and two.bytes == (2048 - 100 - 600) * MIB
            assert two.explain() == (
                f"granted {two.bytes} of limits.memory_bytes = {8 * GIB}, because the host had only {2 * GIB} bytes "
                "free when it started"
            )


def test_what_a_job_uses_is_not_counted_twice(host: Host) -> None:
    with host.admission.granted(SETTINGS, 1000 * MIB) as one:
        assert one is not None
        host.free = (2048 - 700) * MIB
        one.tell(700 * MIB)
        with host.admission.granted(SETTINGS, 8 * GIB) as two:
            assert two is not None and two.bytes == (2048 - 100 - 1000) * MIB
        one.tell(2000 * MIB)  # over its limit, about to be killed: it may take nothing more
        with host.admission.granted(SETTINGS, 8 * GIB) as two:
            assert two is not None and two.bytes == (2048 - 700 - 100) * MIB


def test_where_nobody_knows_what_is_free_a_job_gets_its_limit() -> None:
    unknown = Host(None)
    with unknown.admission.granted(SETTINGS, 1 << 40) as one:
        assert one is not None and one.bytes == 1 << 40
    unknown.end()


def test_a_small_job_needs_only_its_own_limit(host: Host) -> None:
    host.free = 200 * MIB
    with host.admission.granted(SETTINGS, 90 * MIB) as one:
        assert one is not None and one.bytes == 90 * MIB


def test_first_come_first_served_and_nobody_starves(host: Host) -> None:
    host.job("running", 1700 * MIB)
    host.job("large", 1000 * MIB)
    host.job("small", 64 * MIB)
    host.job("small too", 64 * MIB)
    time.sleep(0.05)
    assert host.order == ["running"], "a small one fits, but was not first"
    host.leave["running"].set()
    assert eventually(lambda: len(host.order) == 4)
    assert host.order[1:] == ["large", "small", "small too"]


def test_memory_that_another_process_gives_back_is_noticed_without_busy_polling(host: Host) -> None:
    host.free = 300 * MIB
    host.job("first", GIB)
    host.job("second", GIB)
    looks = host.looks
    started = time.monotonic()
    assert eventually(lambda: host.looks >= looks + 3, 10)
    assert host.looks - looks <= 2 + (time.monotonic() - started) / admission.LOOK_SECONDS, "it polls"
    host.free = 4 * GIB
    assert eventually(lambda: host.order == ["first", "second"], 10)
    assert host.granted == {"first": GIB, "second": GIB}


def test_who_waited_too_long_is_told_all_that_matters(host: Host) -> None:
    host.job("running", 1700 * MIB)
    hurry = SETTINGS.model_copy(update={"wait_seconds": 0.2})
    host.job("first", 8 * GIB, hurry)
    host.job("second", 400 * MIB, hurry)
    assert eventually(lambda: len(host.granted) == 3, 10)
    first, second = host.granted["first"], host.granted["second"]
    assert isinstance(first, str) and isinstance(second, str)
    for words in (
        "memory.wait_seconds = 0.2 s",
        f"it needs {500 * MIB} bytes",
        f"the host has {2 * GIB} bytes free",
        f"memory.reserve_bytes keeps {100 * MIB} of them, and running jobs (1) may still take {1700 * MIB}",
        "raise the memory",
    ):
        assert words in first
    assert f"it needs {400 * MIB} bytes" in second


def test_no_wait_at_all(host: Host) -> None:
    now = SETTINGS.model_copy(update={"wait_seconds": 0.0})
    with host.admission.granted(now, GIB) as one:
        assert one is not None
        with pytest.raises(RefusedError), host.admission.granted(now, GIB):
            with host.admission.granted(now, GIB):
                pass


def test_one_that_is_not_wanted_any_more_leaves_at_once(host: Host) -> None:
    wanted = [True]
    host.job("running", 1700 * MIB)
    host.job("waiting", GIB, wish=lambda: wanted[0])
    host.job("behind", 64 * MIB)
    assert "waiting" not in host.granted
    wanted[0] = False
    host.admission.poke()
    assert eventually(lambda: "behind" in host.granted)
    assert host.granted["waiting"] is None and host.granted["behind"] == 64 * MIB


def test_a_fork_of_the_host_has_an_admission_of_its_own() -> None:
    """A thread that does not exist in the fork holds the lock."""
    with admission.shared()._change:
        pid = os.fork()
        if pid == 0:
            with admission.shared().granted(MemorySettings(), MIB) as grant:
                os._exit(0 if grant is not None else 1)
    assert os.waitpid(pid, 0)[1] == 0


# With real jobs.


@pytest.fixture
def scarce() -> Iterator[tuple[sandbox.Sandbox, Host]]:
    """A sandbox of two slots on a host with little memory."""
    host = Host(900 * MIB)
    policy = light_policy(
        parallel_jobs=2,
        # A job waits for a file of the test, which lies in the host's temporary folder.
        confinement=Confinement(mount_namespace="off", landlock="off"),
        limits=Limits(memory_bytes=2 * GIB),
        memory=MemorySettings(reserve_bytes=100 * MIB, min_bytes=512 * MIB, wait_seconds=60.0),
    )
    with sandbox.Sandbox(policy) as one:
        one._admission = host.admission
        one.wait_ready()
        yield one, host
    assert not host.admission._grants and not host.admission._queue


def until(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.005)
    return os.getpid()


def test_jobs_side_by_side_follow_from_the_memory(scarce: tuple[sandbox.Sandbox, Host], tmp_path: Path) -> None:
    one, host = scarce
    gate = tmp_path / "gate"
    futures = [one.submit(sandbox.callable_job(until, str(gate))) for _ in range(3)]
    assert eventually(lambda: len(host.admission._grants) == 1 and len(host.admission._queue) == 1, 10)
    gate.touch()
    results = [future.result(30) for future in futures]
    assert [result.ok for result in results] == [True] * 3
    assert [result.usage.memory_granted_bytes for result in results] == [800 * MIB] * 3


def hog() -> None:
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 20)))


def test_a_job_dies_of_what_it_was_granted_and_the_result_says_so(scarce: tuple[sandbox.Sandbox, Host]) -> None:
    one, _ = scarce
    result = one.submit(sandbox.callable_job(hog)).result(60)
    assert result.status is Status.MEMORY_LIMIT
    assert result.usage.peak_memory_bytes < 1000 * MIB
    assert f"granted {800 * MIB} of limits.memory_bytes = {2 * GIB}, because the host had only" in result.detail


def test_a_refused_job_is_our_failure_but_opens_no_breaker(scarce: tuple[sandbox.Sandbox, Host]) -> None:
    one, host = scarce
    host.free = 300 * MIB
    memory = one.policy.memory.model_copy(update={"wait_seconds": 0.1})
    breaker = one.policy.breaker.model_copy(update={"failures": 1})
    with sandbox.Sandbox(one.policy.model_copy(update={"memory": memory, "breaker": breaker})) as hurried:
        hurried._admission = host.admission
        for _ in range(2):
            result = hurried.submit(sandbox.callable_job(os.getpid)).result(30)
            assert result.status is Status.SANDBOX_ERROR and result.no_memory
            assert "no memory became free" in result.detail
            assert result.usage.memory_granted_bytes == 0
        assert hurried.stats().breaker == "closed"
        host.free = 900 * MIB
        assert hurried.submit(sandbox.callable_job(os.getpid)).result(30).ok


def test_a_job_that_waits_for_memory_is_cancelled_or_closed_at_once(scarce: tuple[sandbox.Sandbox, Host]) -> None:
    one, host = scarce
    host.free = 300 * MIB
    first, second = sandbox.callable_job(os.getpid), sandbox.callable_job(os.getpid)
    futures = [one.submit(job) for job in (first, second)]
    assert eventually(lambda: len(host.admission._queue) == 2, 10)
    # Not the first in the queue, who would look again by himself.
    assert one.cancel(second.spec.job_id, "not needed")
    result = futures[1].result(5)
    assert (result.status, result.detail) == (Status.CANCELLED, "not needed")
    started = time.monotonic()
    one.close()
    assert futures[0].result(5).status is Status.CANCELLED
    assert time.monotonic() - started < 5


def test_sandboxes_of_one_process_share_the_memory() -> None:
    with sandbox.Sandbox(light_policy()) as one, sandbox.Sandbox(light_policy()) as two:
        assert one._admission is two._admission is admission.shared()


def test_the_shipped_policies_work_on_a_small_pod() -> None:
    """4 GiB, of which service and forkserver use 1 GiB."""
    for name in ("default", "production", "strict", "ci"):
        policy = load(name)
        pod = Host(3 * GIB)
        with pod.admission.granted(policy.memory, policy.limits.memory_bytes) as grant:
            assert grant is not None and grant.bytes >= 2 * GIB
        pod.end()

"""The circuit breaker: its states by the clock, and in front of a forkserver that cannot start."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from conftest import eventually, light_policy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import sandbox
from sandbox.breaker import Breaker
from sandbox.errors import RefusedError
from sandbox.policy import BreakerSettings, ForkserverSettings
from sandbox.results import Status


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def made(failures: int = 3, open_seconds: float = 10.0) -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(BreakerSettings(failures=failures, open_seconds=open_seconds), clock), clock


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.leave(breaker.enter(), False, "no fork")


def test_it_opens_after_so_many_in_a_row_and_says_why() -> None:
    breaker, clock = made()
    fail(breaker, 2)
    breaker.leave(breaker.enter(), True)
    fail(breaker, 2)
    breaker.leave(breaker.enter(), None)  # nobody can say: the row goes on
    assert breaker.state == "closed"
    fail(breaker)
    assert (breaker.state, breaker.opened) == ("open", 1)
    clock.now += 4
    with pytest.raises(RefusedError, match=r"open: 3 jobs in a row .*: no fork\. The next try is in 6 s"):
        breaker.enter()


def test_exactly_one_tries_and_its_success_closes_it() -> None:
    breaker, clock = made()
    fail(breaker, 3)
    clock.now += 10
    assert breaker.state == "half_open"
    trial = breaker.enter()
    with pytest.raises(RefusedError, match="Another job is trying now"):
        breaker.enter()
    breaker.leave(trial, True)
    assert breaker.state == "closed"
    fail(breaker, 2)
    assert breaker.state == "closed", "the row begins anew"


def test_a_failed_try_opens_it_again_and_one_without_an_answer_leaves_it_half_open() -> None:
    breaker, clock = made()
    fail(breaker, 3)
    clock.now += 10
    breaker.leave(breaker.enter(), None)
    assert breaker.state == "half_open"
    fail(breaker)
    assert (breaker.state, breaker.opened) == ("open", 2)
    clock.now += 9.9
    with pytest.raises(RefusedError):
        breaker.enter()


def test_what_began_before_it_opened_decides_nothing_afterwards() -> None:
    breaker, clock = made()
    early = [breaker.enter() for _ in range(3)]
    fail(breaker, 3)
    breaker.leave(early[0], True)
    assert breaker.state == "open"
    clock.now += 10
    trial = breaker.enter()
    breaker.leave(early[1], True)
    breaker.leave(early[2], False, "late")
    with pytest.raises(RefusedError, match="Another job"):
        breaker.enter()
    breaker.leave(trial, True)
    assert (breaker.state, breaker.opened) == ("closed", 1)


def test_zero_is_off() -> None:
    breaker, _ = made(failures=0)
    fail(breaker, 1000)
    assert (breaker.state, breaker.opened) == ("off", 0)


def test_of_many_threads_one_tries() -> None:
    breaker, clock = made()
    fail(breaker, 3)
    clock.now += 10
    passed: list[int] = []
    refused: list[str] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        try:
            passed.append(breaker.enter())
        except RefusedError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(passed), len(refused)) == (1, 7)


class Model(RuleBasedStateMachine):
    """Against a model that is as plain as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker, self.clock = made()
        self.row = 0
        self.until: float | None = None
        self.running: list[tuple[int, bool, int]] = []  # stretch, whether it tries, how often it had changed
        self.changes = 0

    @property
    def tries(self) -> bool:
        return any(trial and changes == self.changes for _, trial, changes in self.running)

    @rule()
    def enter(self) -> None:
        may = self.until is None or (self.clock.now >= self.until and not self.tries)
        try:
            stretch = self.breaker.enter()
        except RefusedError:
            assert not may
            return
        assert may
        if self.until is not None:
            self.changes += 1
        self.running.append((stretch, self.until is not None, self.changes))

    @rule(data=st.data(), works=st.sampled_from([True, False, None]))
    def leave(self, data: st.DataObject, works: bool | None) -> None:
        if not self.running:
            return
        stretch, trial, changes = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.breaker.leave(stretch, works, "why")
        if changes != self.changes:
            return
        if works:
            self.row, self.until = 0, None
        elif works is False:
            self.row += 1
            if trial or self.row >= 3:
                self.until = self.clock.now + 10
                self.changes += 1

    @rule(seconds=st.sampled_from([0.1, 5.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def same_state(self) -> None:
        want = "closed" if self.until is None else "half_open" if self.clock.now >= self.until else "open"
        assert self.breaker.state == want


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, deadline=None)


def test_jobs_end_at_once_behind_a_forkserver_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real forkserver, whose preloaded module fails until a file is gone."""
    gate = tmp_path / "gate"
    gate.touch()
    (tmp_path / "fails.py").write_text(
        f"import os\nif os.path.exists({str(gate)!r}): raise ImportError('gate is shut')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = light_policy(
        parallel_jobs=1,
        breaker=BreakerSettings(failures=2, open_seconds=4.0),
        forkserver=ForkserverSettings(import_torch=False, preload=("fails",)),
    )
    with sandbox.Sandbox(policy) as one:
        assert one.stats().breaker == "closed"
        for _ in range(2):
            result = one.submit(sandbox.callable_job(os.getpid)).result(60)
            assert result.status is Status.SANDBOX_ERROR and "breaker" not in result.detail
        starts = one._forkserver.starts
        for _ in range(10):
            result = one.submit(sandbox.callable_job(os.getpid)).result(60)
            assert result.status is Status.SANDBOX_ERROR
            assert "the circuit breaker is open: 2 jobs in a row" in result.detail and "gate is shut" in result.detail
        assert one._forkserver.starts == starts, "somebody waited for a forkserver"
        assert one.stats().breaker == "open" and one.stats().breaker_opened == 1
        gate.unlink()
        assert eventually(lambda: one.stats().breaker == "half_open", 10)
        assert one.submit(sandbox.callable_job(os.getpid)).result(60).ok
        assert one.stats().breaker == "closed"


def say_sandbox_error() -> None:
    """What a hostile child may claim: that it was our fault."""
    import errno

    class Full(OSError):
        pass

    os.statvfs = lambda _: type("Full", (), {"f_bavail": 0})()  # type: ignore[assignment]
    raise Full(errno.ENOSPC, "no space")


def test_what_a_child_says_opens_nothing() -> None:
    policy = light_policy(breaker=BreakerSettings(failures=1, open_seconds=60.0))
    with sandbox.Sandbox(policy) as one:
        for _ in range(2):
            result = one.submit(sandbox.callable_job(say_sandbox_error)).result(20)
            assert result.status is Status.SANDBOX_ERROR and result.by_child, result
        assert (one.stats().breaker, one.stats().breaker_opened) == ("closed", 0)

"""Threads that compile the same graph at once share its children: one start, one kill told, nobody hangs or fails for
another."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from conftest import eventually

from sandbox.inductor.inflight import Flight, Flights
from sandbox.results import JobResult, LeakReport, Status


class Children:
    """Stands for the sandbox: counts what is started and cancelled."""

    def __init__(self) -> None:
        self.futures: list[Future[JobResult]] = []
        self.cancelled: list[str] = []

    def start(self) -> tuple[str, Future[JobResult]]:
        future: Future[JobResult] = Future()
        self.futures.append(future)
        return f"job-{len(self.futures)}", future

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)


def result(job_id: str, status: Status = Status.OK) -> JobResult:
    return JobResult(job_id=job_id, status=status, leaks=LeakReport(job_id=job_id))


@pytest.fixture
def children() -> Children:
    return Children()


def waiting(flight: Flight, step: str = "first") -> int:
    child = flight._children.get(step)
    return child.waiting if child is not None else 0


def test_one_child_for_all_and_one_of_them_is_the_first_to_hear(children: Children) -> None:
    flight = Flight()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(flight.result, "first", children.start, children.cancel) for _ in range(4)]
        assert eventually(lambda: waiting(flight) == 4)
        children.futures[0].set_result(result("job-000000000001", Status.CRASHED))
        told = [answer.result(5) for answer in answers]
    assert len(children.futures) == 1 and children.cancelled == []
    assert {each.job_id for each, _ in told} == {"job-000000000001"}
    assert sorted(first for _, first in told) == [False, False, False, True]


def test_who_comes_while_another_is_still_on_its_way_gets_its_result(children: Children) -> None:
    flights = Flights()
    with flights.joined("key") as one:
        children.start()[1].set_result(result("job-000000000001"))
        assert one.result("first", lambda: ("j", children.futures[0]), children.cancel)[1]
        with flights.joined("key") as two, flights.joined("other") as other, flights.joined(None) as alone:
            assert two is one and other is not one and alone is not one
            assert two.result("first", children.start, children.cancel) == (result("job-000000000001"), False)
    assert len(flights) == 0
    with flights.joined("key") as three:
        assert three is not one


def test_each_step_has_a_child_of_its_own(children: Children) -> None:
    flight = Flight()
    for step in ("first", "retry", "reduced"):
        future: Future[JobResult] = Future()
        future.set_result(result("job-000000000001", Status.CRASHED))
        assert flight.result(step, lambda future=future: ("j", future), children.cancel)[1]


@pytest.mark.parametrize("who", [0, 1])
def test_an_interrupted_thread_takes_no_child_from_another(who: int, children: Children) -> None:
    """``who``: the one that started it, or the one that joined."""
    flight = Flight()
    with ThreadPoolExecutor(1) as pool:
        interrupted = Interrupted()

        def start() -> tuple[str, Future[JobResult]]:
            job_id, future = children.start()
            interrupted.after(future)
            return job_id, (interrupted if who == 0 else future)  # type: ignore[return-value]

        if who == 0:
            # The thread that started it is interrupted in its wait; another has joined meanwhile.
            other: list[Future[tuple[JobResult, bool]]] = []
            interrupted.then(lambda: other.append(pool.submit(flight.result, "first", children.start, children.cancel)))
            interrupted.until(lambda: waiting(flight) == 2)
            with pytest.raises(KeyboardInterrupt):
                flight.result("first", start, children.cancel)
            assert children.cancelled == []
            children.futures[0].set_result(result("job-000000000001"))
            assert other[0].result(5) == (result("job-000000000001"), True)
        else:
            first = pool.submit(flight.result, "first", start, children.cancel)
            assert eventually(lambda: waiting(flight) == 1)
            flight._children["first"].future = interrupted  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                flight.result("first", start, children.cancel)
            assert children.cancelled == []
            children.futures[0].set_result(result("job-000000000001"))
            assert first.result(5)[1]
    assert len(children.futures) == 1


class Interrupted:
    """A future whose first wait is interrupted by Ctrl-C; later ones are those of another future."""

    def __init__(self) -> None:
        self._waits = 0
        self._lock = threading.Lock()
        self._then = self._until = None

    def after(self, future: Future[JobResult]) -> None:
        self._future = future

    def then(self, act: object) -> None:
        self._then = act

    def until(self, condition: object) -> None:
        self._until = condition

    def result(self) -> JobResult:
        with self._lock:
            self._waits += 1
            first = self._waits == 1
        if not first:
            return self._future.result(10)
        if self._then is not None:
            self._then()
            assert eventually(self._until, 5)
        raise KeyboardInterrupt


def test_the_last_one_that_is_interrupted_ends_the_child_and_the_next_starts_another(children: Children) -> None:
    flight = Flight()

    class Never:
        def result(self) -> JobResult:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flight.result("first", lambda: ("job-1", Never()), children.cancel)  # type: ignore[arg-type,return-value]
    assert children.cancelled == ["job-1"]
    future: Future[JobResult] = Future()
    future.set_result(result("job-000000000002"))
    assert flight.result("first", lambda: ("job-2", future), children.cancel) == (result("job-000000000002"), True)


def test_a_child_that_cannot_be_started_is_started_by_the_next(children: Children) -> None:
    flight = Flight()

    def refuse() -> tuple[str, Future[JobResult]]:
        raise OSError("no thread")

    with pytest.raises(OSError, match="no thread"):
        flight.result("first", refuse, children.cancel)
    future: Future[JobResult] = Future()
    future.set_result(result("job-000000000001"))
    assert flight.result("first", lambda: ("j", future), children.cancel)[1]

"""The memory of killers."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from sandbox.quarantine import Entry, MemoryStore, Quarantine
from sandbox.results import KILLERS, Status

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


def test_a_killer_is_remembered_and_counted() -> None:
    now = [NOON]
    quarantine = Quarantine(now=lambda: now[0])
    assert quarantine.get("a") is None
    first = quarantine.add("a", Status.CRASHED, "job-1")
    assert first == quarantine.get("a") == Entry(
        digest="a", status=Status.CRASHED, job_id="job-1", since=NOON, time=NOON, kills=1
    )  # fmt: skip
    now[0] += timedelta(hours=1)
    quarantine.add("a", Status.TIMEOUT, "job-2")
    entry = quarantine.get("a")
    assert entry is not None
    assert (entry.status, entry.job_id, entry.since, entry.time, entry.kills) == (
        Status.TIMEOUT, "job-2", NOON, now[0], 2,
    )  # fmt: skip
    assert quarantine.get("b") is None
    assert len(quarantine) == 1
    quarantine.clear()
    assert quarantine.get("a") is None and len(quarantine) == 0


@pytest.mark.parametrize("status", sorted(set(Status) - KILLERS))
def test_only_what_kills_is_a_reason(status: Status) -> None:
    with pytest.raises(ValueError, match="no reason for quarantine; allowed: cpu_limit, crashed"):
        Quarantine().add("a", status, "job-1")


def test_entries_are_frozen_strict_and_survive_json() -> None:
    entry = Quarantine().add("a", Status.CRASHED, "job-1")
    assert entry.time.tzinfo is not None
    with pytest.raises(ValidationError):
        entry.kills = 2  # type: ignore[misc]
    assert Entry.model_validate_json(entry.model_dump_json()) == entry
    with pytest.raises(ValidationError):
        Entry.model_validate({**entry.model_dump(), "more": 1})
    with pytest.raises(ValidationError):
        Entry.model_validate({**entry.model_dump(), "time": datetime(2025, 1, 1)})
    with pytest.raises(ValidationError):
        Quarantine().add("", Status.CRASHED, "job-1")


def test_the_one_asked_for_longest_ago_is_forgotten() -> None:
    quarantine = Quarantine(MemoryStore(3))
    for name in "abc":
        quarantine.add(name, Status.CRASHED, "job")
    assert quarantine.get("a")
    quarantine.add("d", Status.CRASHED, "job")
    assert [bool(quarantine.get(name)) for name in "abcd"] == [True, False, True, True]
    quarantine.add("c", Status.CRASHED, "job")
    assert len(quarantine) == 3


def test_many_threads_lose_nothing() -> None:
    quarantine = Quarantine(MemoryStore(50))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(300):
                quarantine.add("shared", Status.CRASHED, "job")
                quarantine.add(f"{number}-{i}", Status.TIMEOUT, "job")
                quarantine.get(f"{number}-{i}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    entry = quarantine.get("shared")
    assert entry is not None and entry.kills == 6 * 300
    assert len(quarantine) == 50

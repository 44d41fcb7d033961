"""The ladder: a pure decision that always ends, and never repeats in-process what has killed a child."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sandbox.fallback import MAX_ATTEMPTS, Attempt, ChildStep, decide, decide_quarantined, explain, ladder_of, weigh
from sandbox.policy import Ladder, Policy, Step, load, shipped
from sandbox.results import KILLERS, Status

FAILURES = sorted(set(Status) - {Status.OK})
CHILD_STEPS = ("retry", "reduced")


def history(*attempts: tuple[str, str]) -> tuple[Attempt, ...]:
    return tuple(Attempt(step=step, status=Status(status)) for step, status in attempts)  # type: ignore[arg-type]


def once(status: str) -> tuple[Attempt, ...]:
    return history(("first", status))


def twice(before: str, status: str) -> tuple[Attempt, ...]:
    return history(("first", before), ("retry", status))


def thrice(before: str, then: str, status: str) -> tuple[Attempt, ...]:
    return history(("first", before), ("retry", then), ("reduced", status))


# After the first attempt, after a retry that ended the same way, after a reduced one, too.
TABLE: dict[str, dict[str, tuple[str, str, str]]] = {
    "default": {
        "compile_error": ("raise", "raise", "raise"),
        "crashed": ("retry", "reduced", "eager"),
        "timeout": ("reduced", "reduced", "eager"),
        "cpu_limit": ("reduced", "reduced", "eager"),
        "memory_limit": ("reduced", "reduced", "eager"),
        "output_limit": ("reduced", "reduced", "eager"),
        "violation": ("eager", "eager", "eager"),
        "protocol_error": ("retry", "in_process", "in_process"),
        "unserializable": ("retry", "in_process", "in_process"),
        "sandbox_error": ("retry", "in_process", "in_process"),
        "cancelled": ("raise", "raise", "raise"),
    },
    "production": {
        "compile_error": ("eager", "eager", "eager"),
        "crashed": ("retry", "reduced", "eager"),
        "timeout": ("reduced", "reduced", "eager"),
        "cpu_limit": ("reduced", "reduced", "eager"),
        "memory_limit": ("reduced", "reduced", "eager"),
        "output_limit": ("reduced", "reduced", "eager"),
        "violation": ("eager", "eager", "eager"),
        "protocol_error": ("retry", "eager", "eager"),
        "unserializable": ("eager", "eager", "eager"),
        "sandbox_error": ("retry", "eager", "eager"),
        "cancelled": ("raise", "raise", "raise"),
    },
    "strict": {
        "compile_error": ("raise", "raise", "raise"),
        "crashed": ("retry", "reduced", "eager"),
        "timeout": ("reduced", "reduced", "eager"),
        "cpu_limit": ("reduced", "reduced", "eager"),
        "memory_limit": ("reduced", "reduced", "eager"),
        "output_limit": ("reduced", "reduced", "eager"),
        "violation": ("raise", "raise", "raise"),
        "protocol_error": ("retry", "raise", "raise"),
        "unserializable": ("raise", "raise", "raise"),
        "sandbox_error": ("retry", "raise", "raise"),
        "cancelled": ("raise", "raise", "raise"),
    },
    "ci": {status: ("raise", "raise", "raise") for status in FAILURES} | {"sandbox_error": ("retry", "raise", "raise")},
}


def test_the_table_is_complete() -> None:
    assert sorted(TABLE) == shipped()
    for rows in TABLE.values():
        assert sorted(rows) == FAILURES


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("status", FAILURES)
def test_each_status_in_each_shipped_policy(name: str, status: Status) -> None:
    policy = load(name)
    histories = once(status), twice(status, status), thrice(status, status, status)
    assert tuple(decide(policy, status, found) for found in histories) == TABLE[name][status]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("status", FAILURES)
def test_each_status_after_each_other_in_each_shipped_policy(name: str, status: Status) -> None:
    """After a retry and after a retry and a reduced one, with each pair of statuses before."""
    policy = load(name)
    for before, then in itertools.product(FAILURES, FAILURES):
        killed = bool({before, then, status} & KILLERS)
        last = decide(policy, status, thrice(before, then, status))
        expected = TABLE[name][status][2]
        assert last == ("eager" if expected == "in_process" and killed else expected)
        middle = decide(policy, status, twice(before, status))
        expected = TABLE[name][status][1]
        killed = bool({before, status} & KILLERS)
        assert middle == ("eager" if expected == "in_process" and killed else expected)


@pytest.mark.parametrize("killer", sorted(KILLERS))
def test_a_graph_that_crashed_first_and_was_garbled_on_retry_is_not_compiled_in_process(killer: Status) -> None:
    policy = load("default")
    found = twice(killer, "protocol_error")
    assert decide(policy, Status.PROTOCOL_ERROR, found) == "eager"
    assert f"in_process (refused: a child of this graph ended with {killer.value})" in explain(
        policy, Status.PROTOCOL_ERROR, found
    )
    weak = policy.model_copy(update={"allow_in_process_after_crash": True})
    assert decide(weak, Status.PROTOCOL_ERROR, found) == "in_process"


def ladder(*steps: Step, **policy: Any) -> Policy:
    return Policy(ladder=Ladder(sandbox_error=steps), **policy)


@pytest.mark.parametrize(
    ("steps", "allowed", "expected"),
    [
        (("in_process",), True, "in_process"),
        (("in_process",), False, "eager"),
        (("retry", "in_process"), False, "eager"),
        (("in_process", "raise"), False, "raise"),
        (("in_process", "eager"), False, "eager"),
        (("raise", "in_process"), False, "raise"),
        (("in_process", "reduced"), False, "reduced"),
        (("retry",), True, "raise"),
        ((), True, "raise"),
    ],
)
def test_the_end_of_a_ladder(steps: tuple[Step, ...], allowed: bool, expected: str) -> None:
    found = twice("sandbox_error", "sandbox_error")
    assert decide(ladder(*steps, allow_in_process=allowed), Status.SANDBOX_ERROR, found) == expected


def test_a_step_that_stands_twice_is_taken_twice_but_not_without_end() -> None:
    policy, found = ladder(*["retry"] * 50), once("sandbox_error")
    while decide(policy, Status.SANDBOX_ERROR, found) == "retry":
        found += history(("retry", "sandbox_error"))
    assert len(found) == MAX_ATTEMPTS
    assert decide(policy, Status.SANDBOX_ERROR, found) == "raise"
    assert decide(ladder("retry", "retry", "eager"), Status.SANDBOX_ERROR, found[:2]) == "retry"
    assert decide(ladder("retry", "retry", "eager"), Status.SANDBOX_ERROR, found[:3]) == "eager"


def test_a_quarantined_graph_gets_no_child_and_no_in_process() -> None:
    assert decide_quarantined(load("default"), Status.CRASHED) == "eager"
    assert decide_quarantined(load("ci"), Status.CRASHED) == "raise"
    assert decide_quarantined(load("strict"), Status.VIOLATION) == "raise"
    weak = Policy(allow_in_process_after_crash=True, ladder=Ladder(crashed=("retry", "in_process"), timeout=("retry",)))
    assert decide_quarantined(weak, Status.CRASHED) == "eager"
    assert decide_quarantined(weak, Status.TIMEOUT) == "raise"


def test_what_makes_no_sense_is_refused() -> None:
    policy = load("default")
    for status, found in [
        (Status.OK, once("ok")),
        (Status.CRASHED, ()),
        (Status.CRASHED, once("timeout")),
        (Status.CRASHED, twice("crashed", "ok")),
    ]:
        for function in (decide, weigh, explain):
            with pytest.raises(ValueError):
                function(policy, status, found)
    with pytest.raises(ValueError):
        decide_quarantined(policy, Status.OK)
    with pytest.raises(ValidationError):
        Attempt(step="in_process", status=Status.OK)  # type: ignore[arg-type]


def test_the_explanation_is_one_line() -> None:
    policy = load("default")
    assert ladder_of(policy, Status.CRASHED) == "retry → reduced → eager"
    assert ladder_of(policy, Status.OK) == "(empty)"
    assert explain(policy, Status.CRASHED, twice("timeout", "crashed")) == (
        "next: reduced; so far first: timeout, retry: crashed; ladder.crashed: retry → reduced → eager; "
        "left out retry (taken before)"
    )
    assert explain(ladder("retry"), Status.SANDBOX_ERROR, twice("sandbox_error", "sandbox_error")).endswith("; used up")


steps = st.lists(st.sampled_from(get_args(Step)), max_size=6).map(tuple)
policies = st.builds(
    lambda ladders, allowed, after_crash: Policy.model_construct(
        ladder=Ladder(**ladders), allow_in_process=allowed, allow_in_process_after_crash=after_crash
    ),  # model_construct: the decision must be safe even for a policy that validation would refuse
    st.fixed_dictionaries({status.value: steps for status in FAILURES}),
    st.booleans(),
    st.booleans(),
)
attempts = st.lists(
    st.builds(Attempt, step=st.sampled_from(get_args(ChildStep)), status=st.sampled_from(FAILURES)),
    min_size=1,
    max_size=8,
).map(tuple)


@given(policies, attempts)
def test_never_in_process_after_a_killer(policy: Policy, found: tuple[Attempt, ...]) -> None:
    step = decide(policy, found[-1].status, found)
    if step == "in_process":
        assert policy.allow_in_process
        assert policy.allow_in_process_after_crash or not {attempt.status for attempt in found} & KILLERS
    assert step in get_args(Step)
    assert decide_quarantined(policy, found[-1].status) in ("eager", "raise")


@given(policies, attempts)
def test_pure(policy: Policy, found: tuple[Attempt, ...]) -> None:
    before = policy.model_copy(deep=True), found
    first = weigh(policy, found[-1].status, found)
    assert weigh(policy, found[-1].status, tuple(found)) == first
    assert decide(policy, found[-1].status, found) == first.step
    assert (policy, found) == before
    line = explain(policy, found[-1].status, found)
    assert "\n" not in line and first.step in line


def test_what_had_not_the_memory_for_a_child_is_not_compiled_here() -> None:
    first = Attempt(step="first", status=Status.SANDBOX_ERROR, no_memory=True)
    again = Attempt(step="retry", status=Status.SANDBOX_ERROR)
    assert decide(Policy(), Status.SANDBOX_ERROR, (first,)) == "retry"
    decision = weigh(Policy(), Status.SANDBOX_ERROR, (first, again))
    assert decision.step == "eager"
    assert ("in_process", "refused: there was not the memory to start a child") in decision.left_out
    healthy = Attempt(step="first", status=Status.SANDBOX_ERROR)
    assert decide(Policy(), Status.SANDBOX_ERROR, (healthy, again)) == "in_process"


@given(policies, st.lists(st.sampled_from(FAILURES), min_size=20, max_size=20))
def test_it_ends_however_the_statuses_alternate(policy: Policy, statuses: list[Status]) -> None:
    step: str = "first"
    found: tuple[Attempt, ...] = ()
    for status in statuses:
        found += (Attempt(step=step, status=status),)  # type: ignore[arg-type]
        step = decide(policy, status, found)
        if step not in CHILD_STEPS:
            break
    assert step not in CHILD_STEPS
    assert len(found) <= MAX_ATTEMPTS

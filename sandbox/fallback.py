"""What to do after a failed attempt: a pure function of policy, status and history.

    1  The ladder of the status that has just occurred is read from the top; a step that was taken before, for this or
       another status, is skipped as often as it was taken.
    2  `retry` and `reduced` start a child. After :data:`MAX_ATTEMPTS` children no more is started.
    3  `in_process` is skipped if the policy does not allow it, and refused if *any* attempt of the history killed
       its child: a graph that crashed first and was garbled on retry is not safer than one that crashed twice.
       Only `allow_in_process_after_crash = true` lifts that. It is refused as well if a child was not started for
       want of memory: the serving process would take the same memory from the same host, without a limit.
    4  `eager` and `raise` end it.
    5  A ladder that is used up ends with `raise`. But if an `in_process` was left out, the policy had asked for an
       answer and not for an exception, and it ends with `eager`. A ladder that says `raise` itself, as in
       `["retry", "in_process", "raise"]`, gets `raise`.

A graph in quarantine takes the same way without children and without `in_process`: :func:`decide_quarantined`.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from sandbox.policy import Policy, Step
from sandbox.results import KILLERS, Status

#: Children that one graph gets at most, the first included, a count. Bounds ladders that hold a step many times.
MAX_ATTEMPTS: Final = 5

ChildStep = Literal["first", "retry", "reduced"]


class Attempt(BaseModel):
    """One child that was started for a graph, and how it ended."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    step: ChildStep
    """What led to this attempt."""
    status: Status
    """How it ended."""
    no_memory: bool = False
    """Whether the child was never started for want of memory."""


class Decision(NamedTuple):
    """The next step, and which steps of the ladder were left out on the way to it, each with the reason."""

    step: Step
    left_out: tuple[tuple[Step, str], ...]
    used_up: bool
    """Whether the step is not from the ladder, but what rule 5 says."""


def decide(policy: Policy, status: Status, history: tuple[Attempt, ...]) -> Step:
    """The next step after the attempt that ended with ``status``, the last one of ``history``.

    Raises:
        ValueError: the status is `ok`, or is not the one of the last attempt.
    """
    return weigh(policy, status, history).step


def decide_quarantined(policy: Policy, status: Status) -> Literal["eager", "raise"]:
    """What becomes of a graph that is in quarantine because a child of it once ended with ``status``: no child, and
    never `in_process`, whatever the policy allows. `raise` if the ladder says so before `eager`, or ends without
    either; in a ladder that holds an `in_process` the end is `eager`, as for a new graph.

    Raises:
        ValueError: the status is `ok`.
    """
    _check(status)
    ladder = policy.ladder.steps(status)
    for step in ladder:
        if step == "eager" or step == "raise":
            return step
    return "eager" if "in_process" in ladder else "raise"


def weigh(policy: Policy, status: Status, history: tuple[Attempt, ...]) -> Decision:
    """:func:`decide` with its reasons."""
    _check(status)
    if not history or history[-1].status is not status:
        raise ValueError(f"the history must end with the attempt that ended with {status.value}")
    taken: Counter[str] = Counter(attempt.step for attempt in history)
    killer = next((attempt.status for attempt in history if attempt.status in KILLERS), None)
    left_out: list[tuple[Step, str]] = []
    for step in policy.ladder.steps(status):
        why = ""
        if step == "retry" or step == "reduced":
            if taken[step]:
                taken[step] -= 1
                why = "taken before"
            elif len(history) >= MAX_ATTEMPTS:
                why = f"{MAX_ATTEMPTS} children are the most"
        elif step == "in_process":
            if not policy.allow_in_process:
                why = "allow_in_process = false"
            elif killer is not None and not policy.allow_in_process_after_crash:
                why = f"refused: a child of this graph ended with {killer.value}"
            elif any(attempt.no_memory for attempt in history):
                why = "refused: there was not the memory to start a child"
        if not why:
            return Decision(step, tuple(left_out), False)
        left_out.append((step, why))
    answer: Step = "eager" if any(step == "in_process" for step, _ in left_out) else "raise"
    return Decision(answer, tuple(left_out), True)


def ladder_of(policy: Policy, status: Status) -> str:
    """The ladder in one line, for people: `retry → reduced → eager`."""
    return " → ".join(policy.ladder.steps(status)) or "(empty)"


def explain(policy: Policy, status: Status, history: tuple[Attempt, ...]) -> str:
    """The decision in one line, for logs. Raises as :func:`decide`."""
    decision = weigh(policy, status, history)
    attempts = ", ".join(f"{attempt.step}: {attempt.status.value}" for attempt in history)
    parts = [f"next: {decision.step}", f"so far {attempts}", f"ladder.{status.value}: {ladder_of(policy, status)}"]
    if decision.left_out:
        parts.append("left out " + ", ".join(f"{step} ({why})" for step, why in decision.left_out))
    if decision.used_up:
        parts.append("used up")
    return "; ".join(parts)


def _check(status: Status) -> None:
    if status is Status.OK:
        raise ValueError("there is nothing to decide after ok")

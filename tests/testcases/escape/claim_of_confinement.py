"""Say that something is enforced that is not, after one's own report has gone out."""

from escape_tools import frame, reply, say

NEEDS = ()


def attempt(at):
    claim = {"mechanisms": {"moat": {"state": "enforced"}}}
    say(frame("started", enforcement=claim) + reply())


def proof(at, seen):
    return "moat" in seen.result.enforcement.mechanisms or seen.result.status.value == "ok"

"""Answer twice, once so and once otherwise."""

from escape_tools import reply, say

NEEDS = ()


def attempt(at):
    say(reply("first") + reply("second"))


def proof(at, seen):
    return seen.result.status.value == "ok"

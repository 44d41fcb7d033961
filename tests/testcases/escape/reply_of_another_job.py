"""Answer in the name of another job."""

from escape_tools import reply, say

NEEDS = ()


def attempt(at):
    say(reply("forged", job_id="job-0123456789ab"))


def proof(at, seen):
    return seen.result.status.value == "ok"

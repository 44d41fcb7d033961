"""Hand back a kernel whose path leaves the cache."""

import os

from escape_tools import reply, say

NEEDS = ()


def attempt(at):
    say(reply(path=f"inductor/../../home/{at.mark}.so", content=b"EVIL"))


def proof(at, seen):
    return os.path.exists(f"{at.home}/{at.mark}.so") or seen.result.status.value == "ok"

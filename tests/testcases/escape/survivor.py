"""Leave a process behind by a session of its own and a double fork."""

import time

from escape_tools import detach

NEEDS = ()


def attempt(at):
    if detach(at.mark):
        time.sleep(30)


def proof(at, seen):
    return at.alive(at.mark)

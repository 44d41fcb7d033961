"""Fork without end."""

import os
import time

NEEDS = ()


def attempt(at):
    for _ in range(300):  # a bound for the case that nothing stops it
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
    time.sleep(5)


def proof(at, seen):
    return seen.result.status.value == "ok"

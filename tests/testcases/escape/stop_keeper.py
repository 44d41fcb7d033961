"""Stop the keeper, and outlive the deadline."""

import os
import signal
import time

from escape_tools import keeper

NEEDS = ()
LIMITS = {"wall_seconds": 1.0}


def attempt(at):
    os.kill(keeper(), signal.SIGSTOP)
    time.sleep(60)


def proof(at, seen):
    return seen.outcome == "returned" or seen.result.usage.wall_seconds > 15

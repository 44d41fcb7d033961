"""Kill the keeper by a process that has left the job's session, and go on without it."""

import os
import signal
import time

from escape_tools import detach, keeper

NEEDS = ()


def attempt(at):
    above = keeper()
    if detach(at.mark):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(above, number)
        time.sleep(30)
    time.sleep(1)


def proof(at, seen):
    return at.alive(at.mark)

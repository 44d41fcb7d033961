"""Set the host's clock: to the time that it has."""

import time

NEEDS = ("seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    time.clock_settime(time.CLOCK_REALTIME, time.time())

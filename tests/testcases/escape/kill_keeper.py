"""Kill the keeper, who is to clean up after the job."""

import os
import signal
import time

from escape_tools import keeper

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    os.kill(keeper(), signal.SIGKILL)
    time.sleep(0.5)


def proof(at, seen):
    return "keeper" in seen.result.detail

"""Use more of the processor than the job may, in several processes."""

import os

NEEDS = ()
LIMITS = {"cpu_seconds": 0.5}


def attempt(at):
    os.fork()
    for _ in range(1 << 32):
        pass


def proof(at, seen):
    return seen.result.status.value not in ("cpu_limit", "violation")

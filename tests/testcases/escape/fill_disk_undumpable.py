"""Write more to the disk than the job may, in files without a name, by a process that lets nobody look into it."""

import os
import time

from escape_tools import set_dumpable

NEEDS = ("seccomp",)
PRIVILEGED = True  # from root it cannot hide


def attempt(at):
    set_dumpable(0)
    kept = []
    for _ in range(20):
        kept.append(os.open("tmp/file", os.O_RDWR | os.O_CREAT, 0o600))
        os.write(kept[-1], bytes(4 << 20))
        os.unlink("tmp/file")
    time.sleep(3)


def proof(at, seen):
    return seen.outcome == "returned"

"""Take memory that is no process's: files that exist in memory only, written and never mapped."""

import os
import time

NEEDS = ("cgroup", "seccomp")
LIMITS = {"memory_bytes": 96 << 20}


def attempt(at):
    kept = [os.memfd_create("hog") for _ in range(16)]
    for fd in kept:
        os.write(fd, bytes(10 << 20))
    time.sleep(0.3)
    return len(kept)


def proof(at, seen):
    return seen.outcome == "returned"

"""Write more to the disk than the job may, in files that have no name any more."""

import os
import time

NEEDS = ()


def attempt(at):
    kept = []
    for _ in range(20):
        kept.append(os.open("tmp/file", os.O_RDWR | os.O_CREAT, 0o600))
        os.write(kept[-1], bytes(4 << 20))
        os.unlink("tmp/file")
    time.sleep(3)


def proof(at, seen):
    return seen.outcome == "returned"

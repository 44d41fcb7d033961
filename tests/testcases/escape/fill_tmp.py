"""Write more into the temporary folder of the host than the job may have of memory or disk."""

import os

NEEDS = ("landlock", "mount_namespace")
LIMITS = {"memory_bytes": 96 << 20}


def attempt(at):
    names = [f"/tmp/{at.mark}-{number}" for number in range(16)]
    try:
        for name in names:
            with open(name, "xb") as file:
                file.write(bytes(10 << 20))
    finally:
        for name in filter(os.path.exists, names):
            os.unlink(name)


def proof(at, seen):
    return seen.outcome == "returned"

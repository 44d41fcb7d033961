"""Take more memory than the job may, as files in /dev/shm."""

import os

NEEDS = ("mount_namespace", "landlock", "cgroup")
LIMITS = {"memory_bytes": 96 << 20}


def attempt(at):
    names = [f"/dev/shm/{at.mark}-{number}" for number in range(16)]
    try:
        for name in names:
            with open(name, "xb") as file:
                file.write(bytes(10 << 20))
    finally:
        for name in filter(os.path.exists, names):
            os.unlink(name)


def proof(at, seen):
    return seen.outcome == "returned"

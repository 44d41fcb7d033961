"""Make a new file in /etc."""

import contextlib
import os

NEEDS = ("landlock", "mount_namespace")
PRIVILEGED = True


def attempt(at):
    open(f"/etc/{at.mark}", "x").close()


def proof(at, seen):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"/etc/{at.mark}")
        return True

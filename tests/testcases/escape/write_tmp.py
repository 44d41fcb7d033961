"""Leave a file in the temporary folder of the host."""

import contextlib
import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    open(f"/tmp/{at.mark}", "x").close()


def proof(at, seen):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"/tmp/{at.mark}")
        return True

"""Leave a file in the temporary folder of the host."""

import contextlib
import os

NEEDS = ("landlock", "read_only_mounts")


def attempt(at):
    open(f"/tmp/{at.mark}", "x").close()


def proof(at, seen):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"/tmp/{at.mark}")
        return True

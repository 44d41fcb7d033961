"""Get all capabilities back by executing a program as root, who gains them by default."""

from escape_tools import capabilities, read_by

NEEDS = ("capabilities",)
PRIVILEGED = True


def attempt(at):
    return capabilities(read_by(["/bin/cat", "/proc/self/status"]))


def proof(at, seen):
    return bool(seen.got)

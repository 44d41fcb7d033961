"""Ask for all capabilities again."""

from escape_tools import capabilities, raise_capabilities

NEEDS = ("capabilities",)
PRIVILEGED = True


def attempt(at):
    raise_capabilities()
    return capabilities(open("/proc/self/status").read())


def proof(at, seen):
    return bool(seen.got)

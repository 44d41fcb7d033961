"""Read the command lines of the host's processes, in which passwords and names of customers may stand."""

NEEDS = ("pid_namespace",)


def attempt(at):
    return open(f"/proc/{at.service}/cmdline").read()


def proof(at, seen):
    return "escape_host" in str(seen.got)

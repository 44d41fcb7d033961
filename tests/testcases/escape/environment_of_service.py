"""Read the service's environment by /proc/PID/environ."""

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    return open(f"/proc/{at.service}/environ").read()


def proof(at, seen):
    return "ESCAPE_DECOY=" in str(seen.got)

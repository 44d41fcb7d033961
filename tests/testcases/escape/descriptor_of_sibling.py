"""Open a descriptor of another job by /proc/PID/fd."""

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    return open(f"/proc/{at.sibling}/fd/{at.sibling_fd}").read()


def proof(at, seen):
    return seen.tells(at.token)

"""Open a descriptor of the service by /proc/PID/fd."""

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    return open(f"/proc/{at.service}/fd/{at.secret_fd}").read()


def proof(at, seen):
    return seen.tells(at.token)

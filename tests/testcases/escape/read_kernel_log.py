"""Read the kernel's log, in which addresses and other users' programs stand."""

import ctypes

from escape_tools import call

NEEDS = ("seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    return call("syslog", 3, ctypes.create_string_buffer(4096), 4096)

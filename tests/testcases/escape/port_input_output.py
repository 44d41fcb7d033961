"""Raise the privilege level for ports of the machine."""

from escape_tools import call

NEEDS = ("seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    call("iopl", 3)
    call("iopl", 0)

"""Attach to another job as a debugger."""

from escape_tools import call

NEEDS = ("pid_namespace", "landlock", "seccomp")


def attempt(at):
    call("ptrace", 0x4206, at.sibling, 0, 0)

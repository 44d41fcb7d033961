"""Attach to the keeper as a debugger."""

from escape_tools import call, keeper

NEEDS = ("landlock", "seccomp")


def attempt(at):
    call("ptrace", 0x4206, keeper(), 0, 0)

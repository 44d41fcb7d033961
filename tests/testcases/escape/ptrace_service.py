"""Attach to the service as a debugger."""

from escape_tools import call

NEEDS = ("pid_namespace", "landlock", "seccomp")


def attempt(at):
    call("ptrace", 0x4206, at.service, 0, 0)  # PTRACE_SEIZE, which does not stop it

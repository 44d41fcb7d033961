"""Make a BPF map, the first step of a program in the kernel."""

import ctypes
import struct

from escape_tools import call

NEEDS = ("seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    call("bpf", 0, ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 4, 1), 72), 72)

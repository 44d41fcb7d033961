"""Open a performance counter, a source of side channels and of kernel bugs."""

import ctypes
import struct

from escape_tools import call

NEEDS = ("seccomp",)


def attempt(at):
    attributes = ctypes.create_string_buffer(struct.pack("IIQ24xQ", 1, 112, 0, 0b1100001), 112)
    call("perf_event_open", attributes, 0, -1, -1, 0)

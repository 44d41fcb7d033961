"""Read a key of the service's session keyring."""

import ctypes

from escape_tools import call

NEEDS = ("seccomp",)


def attempt(at):
    key = call("keyctl", 10, -3, b"user", b"escape-secret", 0)  # KEYCTL_SEARCH in the session keyring
    buffer = ctypes.create_string_buffer(100)
    call("keyctl", 11, key, buffer, 100)
    return buffer.value.decode()


def proof(at, seen):
    return seen.tells(at.token)

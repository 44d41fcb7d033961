"""Attach SysV shared memory of the service by its key."""

import ctypes

NEEDS = ("ipc_namespace",)


def attempt(at):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(at.shared_memory, 0, 0)
    if number < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    return ctypes.string_at(libc.shmat(number, None, 0o10000), 32).decode()


def proof(at, seen):
    return seen.tells(at.token)

"""Take the socket by which the job's first process tells the keeper of the worker's end, and tell of another one."""

import contextlib
import json
import os
import time

from escape_tools import Absent, call, channel, reply

NEEDS = ("seccomp",)


def attempt(at):
    if os.getppid() != 1:
        raise Absent("the worker's parent is the keeper itself")
    handle = os.pidfd_open(1)
    taken = []
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            taken.append(call("pidfd_getfd", handle, number, 0))
    if not taken:
        call("pidfd_getfd", handle, 0, 0)  # says why
    os.write(channel(), reply())
    for fd in taken:
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps({"status": 77 << 8}).encode())
    time.sleep(10)


def proof(at, seen):
    return seen.result.exit_code == 77

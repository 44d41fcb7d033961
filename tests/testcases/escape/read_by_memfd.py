"""Read a secret by a program that was never a file: `cat`, executed from a memfd."""

import os

from escape_tools import read_by

NEEDS = ("landlock",)


def attempt(at):
    fd = os.memfd_create("cat", 0)
    os.write(fd, open("/bin/cat", "rb").read())
    return read_by([f"/proc/self/fd/{fd}", at.secret], pass_fds=(fd,))


def proof(at, seen):
    return seen.tells(at.token)

"""Bind a folder of secrets to the job's own folder."""

import os

from escape_tools import call

NEEDS = ("capabilities", "seccomp", "landlock")
PRIVILEGED = True


def attempt(at):
    call("mount", at.home.encode(), b"home", None, 0x1000, None)
    try:
        return open("home/secret").read()
    finally:
        call("umount2", os.path.abspath("home").encode(), 2)


def proof(at, seen):
    return seen.outcome == "returned"

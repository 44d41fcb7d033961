"""Become another user, whose files and processes would then be one's own."""

import os

from escape_tools import forked

NEEDS = ("capabilities",)
PRIVILEGED = True


def attempt(at):
    forked(lambda: os.setresuid(54321, 54321, 54321))

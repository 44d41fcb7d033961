"""Open the keeper's memory for writing."""

import os

from escape_tools import keeper

NEEDS = ("landlock",)


def attempt(at):
    os.open(f"/proc/{keeper()}/mem", os.O_RDWR)

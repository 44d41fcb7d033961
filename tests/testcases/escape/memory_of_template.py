"""Open the template's memory for writing: all later jobs would run what is put there."""

import os

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    os.open(f"/proc/{at.template}/mem", os.O_RDWR)

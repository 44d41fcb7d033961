"""Get more of the processor than others."""

import os

NEEDS = ("capabilities",)
PRIVILEGED = True


def attempt(at):
    os.nice(-1)

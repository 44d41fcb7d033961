"""Reach the template, from which all jobs are forked, with a signal."""

import os

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    os.kill(at.template, 0)  # the check of rights is the same for each number

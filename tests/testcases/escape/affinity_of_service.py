"""Bind the service to one core: the kernel asks for the same user only, Landlock not at all."""

import os

NEEDS = ("pid_namespace",)


def attempt(at):
    os.sched_setaffinity(at.service, {min(os.sched_getaffinity(at.service))})


def proof(at, seen):
    bound = len(os.sched_getaffinity(at.service)) < len(os.sched_getaffinity(at.template))
    os.sched_setaffinity(at.service, os.sched_getaffinity(at.template))
    return bound

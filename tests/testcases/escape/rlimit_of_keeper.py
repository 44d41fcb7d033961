"""Take the keeper's descriptors away by its limit."""

import resource

from escape_tools import keeper

NEEDS = ("seccomp",)


def attempt(at):
    resource.prlimit(keeper(), resource.RLIMIT_NOFILE, (0, 0))
    return resource.prlimit(keeper(), resource.RLIMIT_NOFILE)


def proof(at, seen):
    return seen.outcome == "returned" or seen.result.status.value == "sandbox_error"

"""Take the keeper's descriptors away by its limit."""

import resource

from escape_tools import keeper

NEEDS = ("seccomp",)


def attempt(at):
    resource.prlimit(keeper(), resource.RLIMIT_NOFILE, (0, 0))
    return resource.prlimit(keeper(), resource.RLIMIT_NOFILE)


def proof(at, seen):
    # The keeper may be gone before the call returns.
    return (
        seen.outcome == "returned" or "keeper died" in seen.result.detail or seen.result.status.value == "sandbox_error"
    )

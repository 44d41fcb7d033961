"""Dump core into a folder of the user's, where another program reads by name."""

import contextlib
import glob
import os
import resource

NEEDS = ()


def attempt(at):
    os.chdir(at.home)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.abort()


def proof(at, seen):
    return bool(glob.glob(f"{at.home}/core*"))

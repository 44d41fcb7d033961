"""Become root by a set-uid program."""

import os

from escape_tools import Absent, read_by

NEEDS = ("no_new_privs",)


def attempt(at):
    if os.getuid() == 0 or not at.suid:
        raise Absent("root already, or no set-uid program that is ours")
    return read_by([at.suid, at.root_secret])


def proof(at, seen):
    return "only root may read this" in str(seen.got)

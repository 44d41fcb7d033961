"""Read a secret through a symbolic link in the job's own folder."""

import os

NEEDS = ("landlock",)


def attempt(at):
    os.symlink(at.secret, "innocent")
    return open("innocent").read()


def proof(at, seen):
    return seen.tells(at.token)

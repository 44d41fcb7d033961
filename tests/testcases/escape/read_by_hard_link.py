"""Give a secret a second name in the job's own folder, and read it there."""

import os

NEEDS = ("landlock",)


def attempt(at):
    os.link(at.secret, "innocent")
    return open("innocent").read()


def proof(at, seen):
    return seen.tells(at.token)

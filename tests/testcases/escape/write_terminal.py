"""Write on the service's terminal, whose escape sequences a user's screen obeys."""

import os

NEEDS = ("landlock",)


def attempt(at):
    os.write(os.open(at.tty, os.O_WRONLY | os.O_NOCTTY), at.mark.encode())


def proof(at, seen):
    return at.mark in at.drain(at.master)

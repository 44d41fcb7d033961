"""Type on the service's terminal (TIOCSTI): a command that the user's shell would run."""

import fcntl
import os
import termios

NEEDS = ("landlock", "capabilities")
PRIVILEGED = True


def attempt(at):
    fcntl.ioctl(os.open(at.tty, os.O_RDWR | os.O_NOCTTY), termios.TIOCSTI, b"!")


def proof(at, seen):
    return "!" in at.drain(at.slave)

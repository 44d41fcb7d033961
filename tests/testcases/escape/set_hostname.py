"""Set the host's name: to the one that it has."""

import socket

from escape_tools import call

NEEDS = ("seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    name = socket.gethostname().encode()
    call("sethostname", name, len(name))

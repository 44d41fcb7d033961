"""Have the kernel send the signal: the owner of a socket's SIGIO is whoever one names."""

import fcntl
import os
import signal
import socket

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    near, far = socket.socketpair()
    fcntl.fcntl(near, fcntl.F_SETOWN, at.service)
    fcntl.fcntl(near, fcntl.F_SETSIG, signal.SIGRTMIN + 3)
    fcntl.fcntl(near, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    far.send(b"x")


def proof(at, seen):
    return at.signalled(3)

"""Open a socket to the hypervisor, which no network namespace separates."""

import socket

NEEDS = ("seccomp",)


def attempt(at):
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)

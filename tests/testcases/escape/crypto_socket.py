"""Open a socket to the kernel's ciphers (AF_ALG), the start of several exploits."""

import socket

NEEDS = ("seccomp",)


def attempt(at):
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).bind(("hash", "sha256"))

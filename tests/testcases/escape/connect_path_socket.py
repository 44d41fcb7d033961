"""Connect to a socket in the file system, such as that of a container daemon or a database."""

import socket

NEEDS = ("seccomp",)


def attempt(at):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(at.path_socket)
        peer.sendall(at.mark.encode())
        peer.recv(1)


def proof(at, seen):
    return at.mark in at.connections

"""Listen on a TCP port of the host, and be answered."""

import socket

NEEDS = ("network_namespace", "landlock", "seccomp")


def attempt(at):
    with socket.create_server(("127.0.0.1", at.free_port)) as server:
        server.settimeout(2)
        server.accept()[0].sendall(at.mark.encode())


def proof(at, seen):
    return at.mark in at.connections

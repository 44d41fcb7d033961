"""Send a datagram, as one that carries a secret away by a name server would."""

import socket
import time

NEEDS = ("network_namespace", "seccomp")


def attempt(at):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(at.mark.encode(), ("127.0.0.1", at.udp_port))
    time.sleep(0.1)


def proof(at, seen):
    return at.mark in at.connections
